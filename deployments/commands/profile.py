"""`selectn profile`: measures a model on this machine and writes the performance record that plans are made from."""

from __future__ import annotations

import argparse
import errno
import logging
import os
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deployments.commands.file_options import file_name
from selectn_core.bounds import Bounds, require_number
from selectn_core.config import DEVICE_KINDS, MOST_MS, MOST_TOKENS
from selectn_core.errors import ConfigError

if TYPE_CHECKING:
    from selectn_core.config import EngineConfig
    from selectn_core.planning.record import PerformanceRecord

EXAMPLES = """\
examples:
  selectn profile
      the model and device of serve_config.yaml if there is one, else the embedded model; into the cache
  selectn profile --model ./llama-3-8b --device cuda --budget-s 300 --out llama.yaml
      five minutes at most, into a file that `selectn plan --record llama.yaml` reads
  selectn profile --out record.yaml --plot record.png
      what exists is not measured again; draws step time and host bytes against the interval
"""


def register(commands: Any) -> None:
    """Adds the command to `selectn`."""
    parser = commands.add_parser(
        "profile",
        help="measure a model on this machine",
        description="Measures step times over a grid of shapes, and the host link, and writes a performance record.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", type=file_name, help="Serve config file (default: serve_config.yaml if there)")
    parser.add_argument("--model", help="directory, .gguf file, hub id, or 'embedded'")
    parser.add_argument("--device", choices=DEVICE_KINDS, help="auto: CUDA where there is a GPU")
    parser.add_argument("--link-gb-per-s", type=float, help="speed of the emulated link")
    parser.add_argument("--unit", choices=("layer", "block"), help="what is offloaded as one")
    parser.add_argument("--budget-s", type=float, default=120.0, help="seconds it may take (%(default)g)")
    parser.add_argument("--max-length", type=int, default=2048, help="tokens of the longest request (%(default)s)")
    parser.add_argument("--out", type=file_name, metavar="FILE", help="where the record goes (default: the cache)")
    parser.add_argument("--again", action="store_true", help="measure everything again, whatever is known")
    parser.add_argument(
        "--plot", type=file_name, metavar="FILE", help="draw step time and host bytes against the interval"
    )
    parser.add_argument("--tpot-ms", type=float, help="the objective in the plot (default: as served)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Measures, or goes on measuring. Raises SelectNError for whatever the user can put right."""
    require_number("--budget-s", args.budget_s, bounds=Bounds(above=0, at_most=86_400))
    require_number("--max-length", args.max_length, bounds=Bounds(at_least=16, at_most=MOST_TOKENS), is_whole=True)
    require_number("--tpot-ms", args.tpot_ms, bounds=Bounds(above=0, at_most=MOST_MS))
    for path in (args.out, args.plot):
        require_writable(path)
    config = _config(args)
    record, path = _measured(args, config)
    print(f"{path}: {len(record.steps)} shapes, {'complete' if record.is_complete else 'incomplete: run it again'}")
    print(_summary(record))
    if args.plot:
        _plot(args, config, record)
        print(f"plot: {args.plot}")
    return 0


def require_writable(path: Path | None) -> None:
    """Minutes of work should not end in an error: raises ConfigError unless a file can be written there."""
    if path is None:
        return
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except (OSError, ValueError) as error:  # ValueError: of a name with a NUL in it
        raise ConfigError(f"{path} cannot be written: {getattr(error, 'strerror', None) or error}") from None


def _config(args: argparse.Namespace) -> EngineConfig:
    from deployments.commands.serve import DEFAULT_CONFIG
    from deployments.config import AppArgs, parse
    from deployments.serve_file import app_args, load_yaml, select_n_applications

    path = args.config or (DEFAULT_CONFIG if DEFAULT_CONFIG.is_file() else None)
    values = app_args(select_n_applications(load_yaml(path))[0]) if path else {}
    config = parse(AppArgs, values, where=str(path)).engine
    model = replace(config.model, source=args.model) if args.model else config.model
    device = replace(config.device, kind=args.device) if args.device else config.device
    device = replace(device, link_gb_per_s=args.link_gb_per_s) if args.link_gb_per_s is not None else device
    offload = replace(config.offload, num_offloaded="auto", unit=args.unit or config.offload.unit)
    return replace(config, model=model, device=device, offload=offload)


def _measured(args: argparse.Namespace, config: EngineConfig) -> tuple[PerformanceRecord, Path]:
    from tqdm import tqdm

    from selectn_core.profiling.profiler import is_long_enough
    from selectn_core.profiling.record_cache import earlier_record, measured_record, record_path
    from selectn_core.start import load_unsteered_engine

    logging.getLogger("transformers").setLevel(logging.ERROR)
    engine = load_unsteered_engine(config)
    try:
        path = args.out or record_path(engine.fingerprint)
        earlier = None if args.again else earlier_record(path, engine, strict=args.out is not None)
        if earlier is not None and earlier.is_complete and is_long_enough(earlier, engine, args.max_length):
            return earlier, path
        with tqdm(total=100, unit="%", bar_format="{l_bar}{bar}| {elapsed} {postfix}") as bar:

            def show(share: float, what: str) -> None:
                bar.set_postfix_str(what, refresh=False)
                bar.update(round(share * 100) - bar.n)

            record = measured_record(
                engine, budget_s=args.budget_s, max_length=args.max_length, earlier=earlier, on_progress=show
            )
        record.save(path)
        return record, path
    finally:
        engine.close()


def _summary(record: PerformanceRecord) -> str:
    times, link = record.step_times(), record.link
    decode = min((s for s in record.steps if s.shape.is_decode_only), key=lambda s: s.shape.kv_tokens)
    return (
        f"link {link.bytes_per_s / 1e9:.2f} GB/s alone, {link.busy_bytes_per_s / 1e9:.2f} GB/s while computing; "
        f"compute {link.slowdown:.0%} slower beside a busy link\n"
        f"one request decodes in {times.expected_s(decode.shape) * 1e3:.1f} ms with nothing offloaded; "
        f"expected times are within {times.median_error():.1%} of the measured ones (median); {record.provenance}"
    )


def _plot(args: argparse.Namespace, config: EngineConfig, record: PerformanceRecord) -> None:
    from deployments.commands.record_plot import plot_record
    from selectn_core.requests.objectives import resolve_objectives

    objectives = resolve_objectives(config.slo, record.step_times(), config.batch)
    tpot_s = args.tpot_ms / 1e3 if args.tpot_ms else objectives.tpot_s
    plot_record(record, config.batch.max_requests, tpot_s, args.plot)
