"""`selectn explain`: why a running server decided what it did, in plain words.

Over HTTP, as `selectn status`: a URL and a key are all that it needs, from any machine. To ask through Serve it would
join the Ray cluster as a driver, which takes seconds, Ray's token, and a machine that Ray can reach.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

from deployments.commands.status_client import StatusClient, add_options
from deployments.commands.status_report import render_decisions, render_explanation

EXAMPLES = """\
examples:
  selectn explain
      the latest decisions, with their ids
  selectn explain i-8h3k2a1b-123
      what was known, what was decided, why, and what would have changed it
"""


def register(commands: Any) -> None:
    """Adds the command to `selectn`."""
    parser = commands.add_parser(
        "explain",
        help="explain a decision of a running server",
        description="Explains a decision: about the offloading interval (i-...), or about admission (a-...).",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("id", nargs="?", metavar="ID", help="a decision's id; without it the latest are listed")
    add_options(parser)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Prints an explanation, or the latest decisions. Raises NoStatus."""
    client = StatusClient.of(args)
    if args.id is None:
        decisions = client.status()["decisions"]
        print(json.dumps(decisions, indent=2) if args.json else render_decisions(decisions))
    else:
        explanation = client.explanation(args.id)
        print(json.dumps(explanation, indent=2) if args.json else render_explanation(explanation))
    return 0
