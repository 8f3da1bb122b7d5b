"""The command line, `selectn`: one module per command, each of which registers its own parser."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from deployments.commands import dashboards, demo, explain, node_report, plan, profile, serve, status
from deployments.commands.doctor import command as doctor
from selectn_core.errors import SelectNError

EXIT_OK, EXIT_ERROR = 0, 2
EXIT_BROKEN_PIPE, EXIT_TERMINATED = 128 + signal.SIGPIPE, 128 + signal.SIGTERM  # as a shell says it

DESCRIPTION = "Latency-SLO-aware memory offloading for LLM inference, on Ray Serve."
EXAMPLES = """\
examples:
  selectn demo                             the whole system once, with a report
  selectn serve                            serve the embedded model on http://127.0.0.1:8000
  selectn serve --model ./llama --port 9000
  selectn profile --out record.yaml        measure the model on this machine, for plans
  selectn plan --record record.yaml --tpot-ms 60 --batch 8
  selectn node-report                      this machine's GPUs, host buses and host memory
  selectn status --watch                   what a running server does now
  selectn explain                          what it has decided lately, and why
  selectn dashboards install               show it in Grafana, alert in Prometheus
  selectn doctor                           whether this machine can serve serve_config.yaml, and how well
  selectn serve --help                     every option of a command
"""

# Each adds a sub-command, whose parser sets `run`: from the parsed arguments to the exit code.
COMMANDS: tuple[Callable[[Any], None], ...] = (
    serve.register,
    profile.register,
    plan.register,
    demo.register,
    node_report.register,
    status.register,
    explain.register,
    dashboards.register,
    doctor.register,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code: 0, the command's own, or 2 for a wrong call or expected failure."""
    try:
        with _ending_in_order_when_terminated(), _written_to_the_end():
            args = build_parser().parse_args(argv)
            level = logging.DEBUG if args.verbose else logging.WARNING
            logging.basicConfig(level=level, format="%(levelname)s %(name)s: %(message)s")
            return int(args.run(args))
    except BrokenPipeError:  # whoever read our output has seen enough
        with contextlib.suppress(OSError, ValueError):  # a test's stdout has no descriptor
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_BROKEN_PIPE
    except (SelectNError, OSError) as error:
        logging.getLogger(__name__).debug("the command has failed", exc_info=True)
        print(f"selectn: error: {error}", file=sys.stderr)
        return EXIT_ERROR
    except KeyboardInterrupt:
        return EXIT_OK


@contextlib.contextmanager
def _written_to_the_end() -> Iterator[None]:
    """What was printed is written within the block, `--help` too: an error there is one of this call."""
    try:
        yield
    finally:
        sys.stdout.flush()


@contextlib.contextmanager
def _ending_in_order_when_terminated() -> Iterator[None]:
    """SIGTERM raises SystemExit, so that what a command has in host memory goes with it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(*_: object) -> None:
        raise SystemExit(EXIT_TERMINATED)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGTERM) is end:
            signal.signal(signal.SIGTERM, before)


def build_parser() -> argparse.ArgumentParser:
    """The parser of every command."""
    parser = argparse.ArgumentParser(
        prog="selectn",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"selectn {_version()}")
    parser.add_argument("--verbose", action="store_true", help="log what is done, for finding faults")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for register in COMMANDS:
        register(commands)
    return parser


def _version() -> str:
    try:
        return version("selectn")
    except PackageNotFoundError:  # run out of a checkout that is not installed
        return "0+unknown"


if __name__ == "__main__":
    sys.exit(main())
