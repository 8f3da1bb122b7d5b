"""Ten times the load that can be served: what the admitted get, how soon the others hear, and what it costs.

A real Serve application on this machine, real HTTP, three API keys and three priorities. One run, four parts:

- warm-up, which is not counted. Many invalid requests come first: the heaps of the proxy and the ingress grow to their
  working size with the first ten thousand requests, and then no more, so that what grows in the overload is a leak;
- full load: as many clients as the replica runs requests, and one more, ask again as soon as they have an answer. What
  they get within their objectives is the goodput at full load, and what they complete is the capacity;
- overload: ten times the capacity arrives at random (Poisson), whatever becomes of it. The keys send in the ratio
  6 : 3 : 1, 2 % of all requests with priority high, a tenth with priority low;
- recovery: at the very end of the overload the clients of the full load come back, and return after a 429 when told to.

TTFT is from sending the request until its first text, TPOT over the tokens after the first, both as the client sees
them, so with HTTP, Serve's proxy, the ingress and its queue in them. Goodput counts the tokens, as they came, of
requests that met both objectives. Server and load share the machine's cores: the share of a core that each process took
is in the samples, as is how late the load itself was.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import random
import secrets
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from statistics import mean, median
from typing import Any

import psutil
from ray import serve

from benchmarks.common import Check, finish, parse_arguments, table
from benchmarks.http_load import ClientRequest, Load, Outcome, client_session
from deployments.commands.local_cluster import ClusterConfig, local_cluster
from deployments.commands.serving import base_urls, deployed, free_port, wait_until_serving
from deployments.config import IMPORT_PATH, REPLICA_NAME
from selectn_core.requests.objectives import Objectives

APP_NAME, MODEL = "selectn", "bench"
MAX_REQUESTS = 8
NUM_CLIENTS = MAX_REQUESTS + 1  # one waits at the door, so that no place is ever empty
LINK_GB_PER_S = 1.0
TIMES_CAPACITY = 10
KEY_SHARES = {"most": 0.6, "some": 0.3, "few": 0.1}
PRIORITY_SHARES = {"high": 0.02, "normal": 0.88, "low": 0.1}
SHORTEST, LONGEST = 8, 32  # output tokens
SAMPLE_PERIOD_S = 1.0
PROCESSES = {"proxy": "ProxyActor", "ingress": "SelectNIngress", "replica": REPLICA_NAME}
REFUSED_WITHIN_S = 0.25
RAW = ("owner", "priority", "status", "sent_s", "first_s", "ended_s", "tokens")


@dataclass(frozen=True, kw_only=True)
class Durations:
    """How long each part lasts, and how many invalid requests come before the first."""

    num_invalid: int
    warm_up_s: float
    full_s: float
    overload_s: float
    recovery_s: float


QUICK = Durations(num_invalid=500, warm_up_s=8, full_s=15, overload_s=20, recovery_s=10)
FULL = Durations(num_invalid=10_000, warm_up_s=20, full_s=60, overload_s=120, recovery_s=30)


@dataclass(frozen=True, kw_only=True)
class Part:
    """One part of the run: when it was, and what became of the requests that were sent in it."""

    name: str
    began_s: float
    ended_s: float
    outcomes: list[Outcome]

    @property
    def admitted(self) -> list[Outcome]:
        return [each for each in self.outcomes if each.status == 200]

    @property
    def refused(self) -> list[Outcome]:
        return [each for each in self.outcomes if each.status == 429]

    @property
    def offered(self) -> list[Outcome]:
        """What counts for attainment (`selectn_core.requests.attainment`)."""
        return [each for each in self.outcomes if each.outcome is not None]


@dataclass(kw_only=True)
class Watch:
    """Resident bytes and CPU seconds of the server's processes and of this one, once a second."""

    processes: dict[str, psutil.Process]
    rows: list[dict[str, float]] = field(default_factory=list)

    async def run(self) -> None:
        while True:
            before_s = time.perf_counter()
            await asyncio.sleep(SAMPLE_PERIOD_S)
            row = {"at_s": time.perf_counter(), "late_s": time.perf_counter() - before_s - SAMPLE_PERIOD_S}
            for name, process in self.processes.items():
                times = process.cpu_times()
                row[f"{name}_rss"] = process.memory_info().rss
                row[f"{name}_cpu_s"] = times.user + times.system
            self.rows.append(row)

    def between(self, begin_s: float, end_s: float) -> list[dict[str, float]]:
        return [row for row in self.rows if begin_s <= row["at_s"] <= end_s]


def main() -> int:
    arguments = parse_arguments(
        __doc__ or "", [("--seconds", {"type": float, "help": "of overload (default: 120; quick: 20)"})]
    )
    durations = QUICK if arguments.quick else FULL
    overload_s = arguments.seconds or durations.overload_s
    keys = {owner: secrets.token_hex(16) for owner in KEY_SHARES}
    with _serving(arguments.model, keys) as base_url:
        replica = serve.get_deployment_handle(REPLICA_NAME, APP_NAME)
        objectives = Objectives(**replica.snapshot.remote().result()["objectives"])
        print(f"objectives: TTFT {objectives.ttft_s:.2f} s, TPOT {objectives.tpot_s * 1e3:.0f} ms", flush=True)
        watch = Watch(processes=_processes())
        parts = asyncio.run(_run(base_url, keys, watch, durations, overload_s))
        snapshot = replica.snapshot.remote().result()
    rows = {part.name: _row(part, objectives, watch) for part in parts}
    overload = parts[1]
    _print(rows)
    sample = {
        "objectives": asdict(objectives),
        "durations": {**asdict(durations), "overload_s": overload_s},
        "server": {name: snapshot[name] for name in ("attainment", "num_offloaded", "num_units", "preemptions")},
        "parts": rows,
        "tokens_by_key": dict(zip(KEY_SHARES, _tokens_by_key(overload), strict=True)),
        "refusals": Counter(each.code for each in overload.refused),
        "watched": [{name: round(value, 3) for name, value in row.items()} for row in watch.rows],
        "outcome_fields": RAW,
        "outcomes": {part.name: [_raw(each, part.began_s) for each in part.outcomes] for part in parts},
    }
    return finish(arguments, "emulated", [sample], _checks(parts, objectives, watch))


# -- the server --------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _serving(source: str, keys: dict[str, str]) -> Iterator[str]:
    with tempfile.TemporaryDirectory() as directory:
        keys_file = Path(directory) / "keys"
        keys_file.write_text("".join(f"{owner} {key}\n" for owner, key in keys.items()), encoding="utf-8")
        document = _document(source, str(keys_file))
        with local_cluster(ClusterConfig(address="local", num_cpus=2)), deployed(document):
            print("starting; the first start on a machine measures the model for a minute", flush=True)
            wait_until_serving(document, lambda elapsed_s: None)
            yield base_urls(document)[0]


def _document(source: str, keys_file: str) -> dict[str, Any]:
    application = {
        "name": APP_NAME,
        "route_prefix": "/",
        "import_path": IMPORT_PATH,
        "args": {
            "model": {"source": source, "served_name": MODEL},
            "device": {"kind": "emulated", "link_gb_per_s": LINK_GB_PER_S, "compute_threads": 1},
            "batch": {"max_requests": MAX_REQUESTS, "kv_tokens": 1024},
            "limits": {"api_keys_file": keys_file},
        },
    }
    return {"http_options": {"host": "127.0.0.1", "port": free_port("127.0.0.1")}, "applications": [application]}


def _processes() -> dict[str, psutil.Process]:
    """The server's processes, by what they are, and this one, which is the load."""
    found = {"load": psutil.Process()}
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            title = " ".join(process.cmdline()[:1])  # "ray::ServeReplica:app:deployment"
            found.update({name: process for name, word in PROCESSES.items() if f":{word}" in title})
    missing = PROCESSES.keys() - found.keys()
    if missing:
        raise RuntimeError(f"no process of the server's {', '.join(sorted(missing))} was found")
    return found


# -- the load ----------------------------------------------------------------------------------------------------


async def _run(
    base_url: str, keys: dict[str, str], watch: Watch, durations: Durations, overload_s: float
) -> list[Part]:
    asks = _asks(keys, random.Random(0))
    async with client_session() as session:
        load = Load(session, base_url, MODEL)
        watching = asyncio.create_task(watch.run())
        await _send_invalid(load, asks, durations.num_invalid)
        await _keep_busy("warm-up", load, asks, durations.warm_up_s)
        full = await _keep_busy("full load", load, asks, durations.full_s)
        requests_per_s = _completed_per_s(full)
        arrivals = list(_arrivals(asks, TIMES_CAPACITY * requests_per_s, overload_s, random.Random(1)))
        print(f"overload: {TIMES_CAPACITY} x {requests_per_s:.2f} requests/s, {len(arrivals)} requests", flush=True)
        began_s = time.perf_counter()
        tasks = await load.arrive(arrivals)
        ended_s = time.perf_counter()
        recovery = await _keep_busy("recovery", load, asks, durations.recovery_s)
        outcomes = list(await asyncio.gather(*tasks))
        watching.cancel()
    return [full, Part(name="overload", began_s=began_s, ended_s=ended_s, outcomes=outcomes), recovery]


async def _send_invalid(load: Load, asks: Iterator[ClientRequest], number: int) -> None:
    print(f"warm-up: {number} invalid requests", flush=True)
    invalid = (replace(ask, priority="none") for ask in islice(asks, number))

    async def client() -> None:
        for ask in invalid:
            outcome = await load.complete(ask)
            if outcome.status != 400:
                raise RuntimeError(f"an unknown priority was answered with status {outcome.status}")

    await asyncio.gather(*(client() for _ in range(NUM_CLIENTS)))


async def _keep_busy(name: str, load: Load, asks: Iterator[ClientRequest], seconds: float) -> Part:
    print(f"{name}: {NUM_CLIENTS} clients, {seconds:.0f} s", flush=True)
    began_s = time.perf_counter()
    outcomes = await load.keep_busy(asks, NUM_CLIENTS, seconds)
    return Part(name=name, began_s=began_s, ended_s=began_s + seconds, outcomes=outcomes)


def _asks(keys: dict[str, str], rng: random.Random) -> Iterator[ClientRequest]:
    """Requests of all keys and priorities, each with a prompt of its own."""
    while True:
        (owner,) = rng.choices(list(KEY_SHARES), list(KEY_SHARES.values()))
        (priority,) = rng.choices(list(PRIORITY_SHARES), list(PRIORITY_SHARES.values()))
        words = " ".join(rng.choice(("a", "river", "of", "light", "and", "stone", "under", "the")) for _ in range(20))
        yield ClientRequest(
            owner=owner,
            key=keys[owner],
            priority=priority,
            prompt=f"{rng.randrange(10**6)}: {words}",
            max_tokens=rng.randint(SHORTEST, LONGEST),
        )


def _arrivals(
    asks: Iterator[ClientRequest], requests_per_s: float, duration_s: float, rng: random.Random
) -> Iterator[tuple[float, ClientRequest]]:
    at_s = rng.expovariate(requests_per_s)
    while at_s < duration_s:
        yield at_s, next(asks)
        at_s += rng.expovariate(requests_per_s)


# -- what it was -------------------------------------------------------------------------------------------------


def _completed_per_s(part: Part) -> float:
    """Requests a second, each counted by the share of its tokens that came while the part lasted."""
    done = sum(
        each.tokens_between(part.began_s, part.ended_s) / each.num_tokens for each in part.admitted if each.is_whole
    )
    return done / (part.ended_s - part.began_s)


def _goodput(part: Part, objectives: Objectives, before: Part | None = None) -> float:
    """Tokens a second, while the part lasted, of requests of it or the part before that met both objectives."""
    outcomes = part.admitted + (before.admitted if before is not None else [])
    good = [each for each in outcomes if each.met(objectives)]
    tokens = sum(each.tokens_between(part.began_s, part.ended_s) for each in good)
    return tokens / (part.ended_s - part.began_s)


def _row(part: Part, objectives: Objectives, watch: Watch) -> dict[str, Any]:
    whole = [each for each in part.admitted if each.is_whole]
    ttfts_s, tpots_s = [each.ttft_s for each in whole], [each.tpot_s for each in whole]
    refused_s = [each.latency_s for each in part.refused]
    rows = watch.between(part.began_s, part.ended_s)
    cpu = {name: _rate(rows, f"{name}_cpu_s") for name in watch.processes}
    return {
        "offered": len(part.outcomes),
        "admitted": len(part.admitted),
        "refused": len(part.refused),
        "attained": mean(each.met(objectives) for each in part.offered),
        "attained_of_admitted": _attained(part, objectives),
        "goodput_tokens_per_s": _goodput(part, objectives),
        "completed_per_s": _completed_per_s(part),
        "ttft_p50_s": _at(ttfts_s, 50),
        "ttft_p99_s": _at(ttfts_s, 99),
        "tpot_p50_s": _at(tpots_s, 50),
        "tpot_p99_s": _at(tpots_s, 99),
        "refused_p50_s": _at(refused_s, 50),
        "refused_p95_s": _at(refused_s, 95),
        "refused_max_s": _at(refused_s, 100),
        "cores": cpu,
        "load_late_s": _at([row["late_s"] for row in rows], 95),
    }


def _checks(parts: Sequence[Part], objectives: Objectives, watch: Watch) -> list[Check]:
    full, overload, recovery = parts
    answered = [each for each in overload.outcomes if each.status in (200, 429) and each.is_whole]
    full_goodput = _goodput(full, objectives)
    tokens = _tokens_by_key(overload)
    high_admitted = mean(each.status == 200 for each in overload.outcomes if each.priority == "high")
    first_s = min(each.first_s for each in recovery.admitted if each.first_s is not None)
    values = [
        ("admitted that met both objectives", _attained(overload, objectives), ">= 0.99"),
        ("429 latency p95, s", _at([each.latency_s for each in overload.refused], 95), f"<= {REFUSED_WITHIN_S}"),
        ("offered that got a whole answer or a well-formed 429", len(answered) / len(overload.outcomes), ">= 1"),
        ("goodput over that at full load", _goodput(overload, objectives) / full_goodput, ">= 0.9"),
        ("tokens of the key with least over those of the one with most", min(tokens) / max(tokens), ">= 0.8"),
        ("admitted of high priority, which asks for less than its share", high_admitted, ">= 0.9"),
        ("first token after the overload over the objective", (first_s - recovery.began_s) / objectives.ttft_s, "<= 1"),
        ("goodput after it over that at full load", _goodput(recovery, objectives, overload) / full_goodput, ">= 0.9"),
    ]
    for name in PROCESSES:
        values.append((f"memory of the {name}, last quarter over second", _growth(watch, overload, name), "<= 1.02"))
    return [Check(name=name, value=value, target=target) for name, value, target in values]


def _attained(part: Part, objectives: Objectives) -> float:
    return mean(each.met(objectives) for each in part.admitted)


def _tokens_by_key(part: Part) -> list[int]:
    """Tokens, prompt and output, that each key got for requests of normal priority, in the order of `KEY_SHARES`."""
    normal = [
        (each.owner, each.num_prompt_tokens + each.num_tokens) for each in part.admitted if each.priority == "normal"
    ]
    return [sum(tokens for owner, tokens in normal if owner == name) for name in KEY_SHARES]


def _growth(watch: Watch, part: Part, name: str) -> float:
    """Resident bytes in the last quarter of a part over those in its second, medians: in the first it warms up."""
    quarter_s = (part.ended_s - part.began_s) / 4
    second = watch.between(part.began_s + quarter_s, part.began_s + 2 * quarter_s)
    last = watch.between(part.ended_s - quarter_s, part.ended_s)
    return median(row[f"{name}_rss"] for row in last) / median(row[f"{name}_rss"] for row in second)


def _rate(rows: Sequence[dict[str, float]], name: str) -> float:
    return (rows[-1][name] - rows[0][name]) / (rows[-1]["at_s"] - rows[0]["at_s"])


def _at(values: Sequence[float], percent: int) -> float:
    """The smallest value that so many percent do not exceed; 0 where there is none."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)] if ordered else 0.0


def _raw(outcome: Outcome, began_s: float) -> str:
    """The values of `RAW`, times from the part's beginning."""
    first_s = None if outcome.first_s is None else round(outcome.first_s - began_s, 3)
    times_s = (round(outcome.sent_s - began_s, 3), first_s, round(outcome.ended_s - began_s, 3))
    return " ".join(map(str, [outcome.owner, outcome.priority, outcome.status, *times_s, outcome.num_tokens]))


def _print(rows: dict[str, dict[str, Any]]) -> None:
    cells = [
        [
            name,
            row["offered"],
            row["admitted"],
            row["refused"],
            f"{row['attained']:.1%} ({row['attained_of_admitted']:.1%})",
            f"{row['goodput_tokens_per_s']:.1f}",
            f"{row['ttft_p50_s']:.2f} / {row['ttft_p99_s']:.2f} s",
            f"{row['tpot_p50_s'] * 1e3:.0f} / {row['tpot_p99_s'] * 1e3:.0f} ms",
            f"{row['refused_p50_s'] * 1e3:.0f} / {row['refused_p95_s'] * 1e3:.0f} ms",
            " ".join(f"{each}={cores:.2f}" for each, cores in row["cores"].items()),
        ]
        for name, row in rows.items()
    ]
    header = [
        "part",
        "offered",
        "admitted",
        "refused",
        "attained of offered / admitted",
        "goodput",
        "TTFT p50 / p99",
        "TPOT p50 / p99",
    ]
    print()
    print(table([*header, "429 p50 / p95", "cores"], cells))


if __name__ == "__main__":
    sys.exit(main())
