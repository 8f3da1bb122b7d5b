"""How long until all is as it was after each kind of loss, on a real Ray cluster under HTTP load.

The cluster of tests/integration/test_cluster.py: three raylets, three replicas of a tiny model on two emulated buses,
with the periods of a configuration that says nothing of them (--quick: the tests' own, shorter ones). Each loss is a
SIGKILL, of all processes of a node at once, or a SIGSTOP for longer than a lease. Back to full: every replica runs, has
the range that the allocation gives it, and is in its node's ledger. A lost node is replaced as soon as Ray counts it as
dead. `bound` is what docs/operations.md states (deployments/commands/recovery.py).
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.common import Check, finish, parse_arguments, table
from deployments.commands.recovery import LOSSES, Loss, Surroundings
from tests.support.load import NUM_CLIENTS, Answer
from tests.support.serving_cluster import DEFAULT_PACE, IMPATIENT
from tests.support.tiny_checkpoint import save_tiny_llama
from tests.support.watched_cluster import Ledgers, WatchedCluster, watched_cluster

NUM_ROUNDS, NUM_ROUNDS_QUICK = 3, 1
# What takes longer than its bound is a check that fails; what takes so many times as long ends the benchmark.
PATIENCE = 3
STARTING = Surroundings()


def main() -> int:
    arguments = parse_arguments(__doc__ or "")
    pace = IMPATIENT if arguments.quick else DEFAULT_PACE
    bounds_s = pace.bounds_s(
        replica_start_s=STARTING.replica_start_s,
        actor_start_s=STARTING.actor_start_s,
        answer_s=STARTING.answer_s,
    )
    patience_s: dict[Loss, float] = {loss: PATIENCE * bounds_s[loss] for loss in LOSSES}
    samples = []
    with tempfile.TemporaryDirectory() as directory:
        checkpoint = str(save_tiny_llama(Path(directory)))
        with watched_cluster(pace, checkpoint, patience_s) as cluster:
            ledgers = cluster.whole_ledgers()
            cluster.load.wait_for_more()
            for number in range(NUM_ROUNDS_QUICK if arguments.quick else NUM_ROUNDS):
                for loss in LOSSES:
                    samples.append({"round": number, "loss": loss, **_lose(cluster, loss, ledgers)})
                    print(samples[-1], flush=True)
            num_wrong = len(cluster.load.wrong)
    header = ("loss", "noticed s", "back to full s", "bound s", "whole lost", "streams lost")
    print(table(header, [_row(loss, samples, bounds_s[loss]) for loss in LOSSES]))
    samples = [{**sample, "bound_s": bounds_s[sample["loss"]]} for sample in samples]
    return finish(arguments, "emulated", samples, _checks(samples, num_wrong))


def _lose(cluster: WatchedCluster, loss: Loss, ledgers: Ledgers) -> dict[str, Any]:
    """`noticed_s`: when a successor is there, the ledger lacks the replica, or Ray counts the node as dead."""
    cluster.load.take_lost()
    lost_s = since_s = time.monotonic()
    if loss == "coordinator killed":
        since_s = cluster.kill_coordinator()
    elif loss == "coordinator cut off":
        with cluster.coordinator_cut_off():
            time.sleep(1.5 * cluster.pace.lease_s)
        lost_s = since_s = time.monotonic()
    elif loss == "agent killed":
        since_s = cluster.kill_agent("left")
    elif loss == "replica killed":
        since_s = cluster.kill_replica(min(cluster.replica_ids("left")))
    else:
        cluster.kill_node("right")
    noticed_s = time.monotonic() - lost_s
    if loss == "node lost":
        since_s = cluster.add_node("right")
    seconds = cluster.recovered(loss, ledgers, since_s)
    lost = cluster.load.take_lost()
    return {
        "noticed_s": noticed_s,
        # Of a node: from its loss, but for the time that another takes to join.
        "seconds": seconds + (noticed_s if loss == "node lost" else 0.0),
        "whole_lost": sum(not answer.is_stream for answer in lost),
        "streams_lost": sum(answer.is_stream for answer in lost),
        "errors": sorted({_code(answer) for answer in lost}),
    }


def _code(answer: Answer) -> str:
    return str(answer.error["code"]) if answer.error is not None else ""


def _row(loss: Loss, samples: list[dict[str, Any]], bound_s: float) -> list[str]:
    own = [sample for sample in samples if sample["loss"] == loss]

    def span(key: str) -> str:
        values = sorted(sample[key] for sample in own)
        return f"{values[0]:.1f} to {values[-1]:.1f}"

    lost = [str(sum(sample[key] for sample in own)) for key in ("whole_lost", "streams_lost")]
    return [loss, span("noticed_s"), span("seconds"), f"{bound_s:.1f}", *lost]


def _checks(samples: list[dict[str, Any]], num_wrong: int) -> list[Check]:
    slowest = {loss: max(s["seconds"] / s["bound_s"] for s in samples if s["loss"] == loss) for loss in LOSSES}
    return [
        *(Check(name=f"{loss}: the slowest over its bound", value=slowest[loss], target="<= 1") for loss in LOSSES),
        Check(name="whole responses lost", value=sum(s["whole_lost"] for s in samples), target="<= 0"),
        Check(
            name="streams lost in one loss",
            value=max(s["streams_lost"] for s in samples),
            target=f"<= {NUM_CLIENTS['stream']}",
        ),
        Check(name="wrong answers", value=num_wrong, target="<= 0"),
    ]


if __name__ == "__main__":
    sys.exit(main())
