"""What deciding costs: a door with up to 512 requests inside, a board of up to 128 replicas. No Ray.

Both run on event loops that also serve requests: the door's decisions on the replica's, every 50 ms while somebody
waits, and whenever a request comes or goes; the board's on the ingress's. The door has requests of many lengths inside,
each a few tokens further at every decision; in front of it waits one that needs all there is, and some that stay too
long to pass it. Every replica of the board is full and has promised something to 64 callers; 256 requests wait. Times
are the CPU's.
"""

from __future__ import annotations

import asyncio
import random
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from statistics import median
from typing import Any

from benchmarks.common import Check, finish, parse_arguments, table
from deployments.replica.door import Door, Visit
from deployments.routing.admission import Admission, AdmissionConfig
from deployments.routing.ask import Ask
from deployments.routing.board import Board
from deployments.routing.headroom_report import MAX_ORIGINS, HeadroomReport, Promise
from deployments.routing.shared_board import SharedBoard

NUM_INSIDE, NUM_REPLICAS = (64, 128, 256, 512), (16, 32, 64, 128)
NUM_QUEUED, OWN_PER_REPLICA, PAGE = 256, 8, 16
PROMPT, OUTPUT = (20, 400), (1, 512)
MOST_MS = 5.0


def main() -> int:
    arguments = parse_arguments(__doc__ or "")
    num_samples = 30 if arguments.quick else 200
    samples = [_door(num_inside, num_samples) for num_inside in NUM_INSIDE]
    samples += [asyncio.run(_board(num_replicas, num_samples)) for num_replicas in NUM_REPLICAS]
    for what in ("door", "board"):
        rows = [sample for sample in samples if sample["what"] == what]
        names = list(rows[0]["seconds"])
        print(f"{what}, median / 95 % in ms")
        print(table([rows[0]["of"], *names], [[row["number"], *(_cell(row, name) for name in names)] for row in rows]))
        print()
    return finish(arguments, "measured", samples, _checks(samples))


def _door(num_inside: int, num_samples: int) -> dict[str, Any]:
    generator = random.Random(num_inside)
    generated: dict[int, int] = {}
    capacity = num_inside * (PROMPT[1] + OUTPUT[1])
    door = Door(
        lambda: capacity,
        lambda tokens: -(-tokens // PAGE) * PAGE,
        max_requests=2 * num_inside,
        max_waiting=16,
    )

    def come(number: int, prompt: int, output: int) -> Visit:
        visit = Visit(
            origin=f"o{number % MAX_ORIGINS}",
            sequence=number,
            prompt_tokens=prompt,
            total_tokens=prompt + output,
            decide=lambda _: None,
            num_generated=lambda: generated.get(number, 0),
        )
        door.knock(visit)
        return visit

    def go_on() -> None:
        for number in range(num_inside):
            generated[number] = generated.get(number, 0) + generator.randrange(2)

    for number in range(num_inside):
        come(number, generator.randint(*PROMPT), generator.randint(*OUTPUT))
    one_more = [_seconds(lambda: door.leave(come(num_inside, 20, 20)), go_on) for _ in range(num_samples)]
    come(-1, capacity - 30, 30)
    for number in range(4):
        come(-2 - number, 1, 2 * OUTPUT[1])
    assert door.num_waiting == 5, "nobody of these may come in"
    seconds = {
        "let in and leave": one_more,
        "decide": [_seconds(door.let_in, go_on) for _ in range(num_samples)],
        "report": [_seconds(lambda: (door.promises(), door.drain_tokens_per_s()), go_on) for _ in range(num_samples)],
    }
    return {"what": "door", "of": "inside", "number": num_inside, "seconds": seconds}


async def _board(num_replicas: int, num_samples: int) -> dict[str, Any]:
    shared = SharedBoard("me")
    config = AdmissionConfig(max_queued_requests=NUM_QUEUED, timeout_s=600.0, refuse_late=False)
    admission = Admission(shared, config)
    names = [f"replica{number}" for number in range(num_replicas)]
    empty = HeadroomReport(
        replica_id="r",
        reported_s=0.0,
        kv_capacity_tokens=100 * OWN_PER_REPLICA,
        longest_request_tokens=10_000,
        max_requests=512,
        drain_tokens_per_s=10.0,
        prefill_s_per_token=0.001,
    )
    others = tuple(Promise(origin=f"o{number}", tokens=100, requests=8) for number in range(MAX_ORIGINS))
    full = replace(empty, promises=others, prefixes=tuple(range(128)))

    latest: dict[str, HeadroomReport | None] = dict.fromkeys(names, full)

    def a_fifth_reports(number: int) -> dict[str, HeadroomReport | None]:
        """Replicas report twice a second, and Serve tells callers of what is new ten times a second."""
        latest.update({name: replace(full, reported_s=1.0 + number) for name in names[number % 5 :: 5]})
        return dict(latest)

    with shared.locked() as board:
        board.observe(dict.fromkeys(names, empty))
        for number in range(OWN_PER_REPLICA * num_replicas):
            assert board.place(_ask(f"own{number}", 100)) is not None
        board.observe(latest)
        while board.place(_ask(f"door{board.door_tokens()}", 1000)) is not None:
            continue
        rank = [_seconds(lambda: board.rank(_ask("one", 200))) for _ in range(num_samples)]
        arriving = [a_fifth_reports(number) for number in range(num_samples)]
        observe = [_seconds(partial(_observe, board, reports)) for reports in arriving]
    waiting = [
        asyncio.ensure_future(
            admission.enter(replace(_ask(f"q{number}", 5000 - number), key="k", arrived_s=admission.now_s))
        )
        for number in range(NUM_QUEUED)
    ]
    await asyncio.sleep(0)
    assert admission.num_waiting == NUM_QUEUED
    pump = [_seconds(lambda: admission.on_board(lambda _: None)) for _ in range(num_samples)]
    for each in waiting:
        each.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)
    seconds = {"rank": rank, "a fifth reports": observe, "pump in vain": pump}
    return {"what": "board", "of": "replicas", "number": num_replicas, "seconds": seconds}


def _observe(board: Board, reports: dict[str, HeadroomReport | None]) -> None:
    """Takes them in, and adds up what is asked of them next."""
    board.observe(reports)
    board.drain_tokens_per_s()


def _ask(request_id: str, tokens: int) -> Ask:
    return Ask(
        request_id=request_id,
        tokens=tokens,
        least_tokens=tokens,
        prompt_tokens=tokens // 2,
        ttft_s=1.0,
        prefixes=(1, 2),
    )


def _seconds(function: Callable[[], object], before: Callable[[], None] = lambda: None) -> float:
    before()
    started_s = time.thread_time()
    function()
    return time.thread_time() - started_s


def _cell(sample: dict[str, Any], name: str) -> str:
    ordered = sorted(sample["seconds"][name])
    return f"{1e3 * median(ordered):.2f} / {1e3 * ordered[int(0.95 * len(ordered))]:.2f}"


def _checks(samples: list[dict[str, Any]]) -> list[Check]:
    checks = []
    for what, number, fewer in (("door", NUM_INSIDE[-1], NUM_INSIDE[0]), ("board", NUM_REPLICAS[-1], NUM_REPLICAS[0])):
        most, least = (
            next(each for each in samples if (each["what"], each["number"]) == (what, count))
            for count in (number, fewer)
        )
        for name, seconds in most["seconds"].items():
            value_ms, growth = 1e3 * median(seconds), median(seconds) / median(least["seconds"][name])
            times, title = number / fewer, f"{what} with {number} {most['of']}, {name}"
            checks.append(Check(name=f"{title}: ms", value=value_ms, target=f"<= {MOST_MS}"))
            checks.append(
                Check(name=f"{title}: over {times:.0f} x with {fewer}", value=growth / times, target="<= 1.5")
            )
    return checks


if __name__ == "__main__":
    sys.exit(main())
