"""`selectn status`: what a running server does, and why, as tables or JSON; once, or again and again."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping
from typing import Any

from deployments.commands.status_client import NoStatus, StatusClient, add_options
from deployments.commands.status_report import render_status

PERIOD_S = 2.0
CLEAR = "\x1b[H\x1b[2J"
EXAMPLES = """\
examples:
  selectn status
      the server on http://127.0.0.1:8000
  selectn status --watch --url http://10.0.0.5:8000 --api-key-file key
      another server, again every two seconds until Ctrl-C
  SELECTN_API_KEY=... selectn status --json
      for programs
"""


def register(commands: Any) -> None:
    """Adds the command to `selectn`."""
    parser = commands.add_parser(
        "status",
        help="show what a running server does, and why",
        description="Shows replicas, nodes, buses, GPUs, objectives and recent decisions of a running server.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_options(parser)
    parser.add_argument("--watch", action="store_true", help="show it again every two seconds, until Ctrl-C")
    parser.add_argument("--json", action="store_true", help="print JSON; with --watch a line each time")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Prints the status. Raises NoStatus where there is none, with --watch at the first time only."""
    client = StatusClient.of(args)
    status = client.status()
    if not args.watch:
        print(json.dumps(status, indent=2) if args.json else render_status(status))
        return 0
    _redraw(status, as_json=args.json)
    while True:
        time.sleep(PERIOD_S)
        try:
            _redraw(client.status(), as_json=args.json)
        except NoStatus as error:  # a server that is started again comes back
            print(f"selectn: {error}", file=sys.stderr, flush=True)


def _redraw(status: Mapping[str, Any], *, as_json: bool) -> None:
    """What was shown before goes, where that is a terminal."""
    text = json.dumps(status) if as_json else render_status(status)
    print(f"{CLEAR if sys.stdout.isatty() and not as_json else ''}{text}", flush=True)
