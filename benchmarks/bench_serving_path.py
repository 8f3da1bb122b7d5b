"""What the way from the engine to the client costs: tokens per second, latencies, and CPU time by process.

A closed loop of streamed completions, each begun as one ends, by a load generator in a process of its own. Two models:
one that costs next to nothing (`benchmarks/free_model.py`), so that the host path is all that there is, with 1, 8, 64
and 256 streams of 300 tokens; and `--model`, with 16 streams of 64 tokens. Sides take turns, round by round:

- engine: the engine alone, in this process, its tokens counted from the handles;
- ours: the same configuration as a Serve application, over HTTP: no layer is offloaded;
- floor 1, floor 8: a Serve application of two deployments that streams constants, one or eight tokens an item: what
  Ray's own path allows from a replica through ingress and proxy (free model only);
- every `--against NAME=URL`: an OpenAI-compatible server that runs already and serves one of the two models. Which one
  is found out by asking it. `--save DIR` writes both as checkpoints that such a server can load.

TTFT and times between tokens (ITL) are as the client sees them; of the engine they are a request's own TTFT, and the
time from step to step. TPOT is a request's mean over its tokens. CPU milliseconds a token are of the server's
processes, `load` is the load generator; everybody shares the machine's cores. `replica` without its busiest thread,
which is the engine's, is what the replica does besides (with more compute threads than one, their work as well); an
engine in a process of its own counts as `engine`.

Every stream of the free model is checked, token by token: nothing lost, doubled or out of order. An hour of it:
`--streams 64 --model none --sides ours --rounds 1 --seconds 3600`.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import mean, median
from typing import Any
from urllib.parse import urlsplit

import psutil

from benchmarks import free_model, stream_load
from benchmarks.common import Check, finish, parse_arguments, table
from benchmarks.cpu_use import CpuUse, Groups, Used
from benchmarks.noise import NoiseReport, pace_spread, paces_s
from deployments.commands.local_cluster import ClusterConfig, local_cluster
from deployments.commands.serving import base_urls, deployed, free_port, served_model, wait_until_serving
from deployments.config import IMPORT_PATH, INGRESS_NAME, REPLICA_NAME, AppArgs
from selectn_core.config import ModelConfig
from selectn_core.device import resolve_kind
from selectn_core.engine.engine import Engine
from selectn_core.requests.handle import RequestHandle
from selectn_core.requests.sampling import SamplingParams
from selectn_core.start import load_unsteered_engine
from selectn_core.weights.checkpoint import load_model

FREE, NO_MODEL = "free", "none"
APP_NAME, FLOOR_NAME = "selectn", "floor"
FLOOR_ROUTE, FLOOR_IMPORT_PATH = "/floor", "benchmarks.ray_floor:app"
FREE_STREAMS, MODEL_STREAMS = (1, 8, 64, 256), 16
FREE_TOKENS, ALONE_TOKENS, MODEL_TOKENS, MODEL_TOKENS_QUICK = 300, 100, 64, 16
FLOORS = {"floor 1": 1, "floor 8": 8}
SECONDS, SECONDS_QUICK, NUM_ROUNDS, NUM_ROUNDS_QUICK = 10.0, 3.0, 3, 1
WARM_UP_S, WARM_UP_QUICK_S = 2.0, 0.5
POLL_S = 0.005
# What is busy for less than this share of a core between two sides is at rest.
RESTING_SHARE, REST_S, MOST_REST_S = 0.25, 0.25, 30.0
PROMPTS = [
    f"{who} walked along the river and under the trees, and counted aloud, one, two, three, four, five, six, seven, "
    "eight, nine, ten, while the light went and the first stars came out over the hills. Then somebody asked what "
    for who in ("A child", "A farmer", "The teacher", "My neighbour")
]
ASKED = {"stream": True, "temperature": 0, "ignore_eos": True, "stream_options": {"include_usage": True}}
PROCESSES = ("engine", "replica", "ingress", "proxy", "controller", "other", "front", "behind", "load")


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One closed loop: which model, how many streams of how many tokens, for how long it is counted."""

    model: str
    num_streams: int
    num_tokens: int
    seconds: float
    warm_up_s: float

    @property
    def prompts(self) -> list[str] | None:
        return None if self.model == FREE else PROMPTS


@dataclass(frozen=True, kw_only=True)
class Server:
    """A server that can be measured. `groups`: its processes by what they are. `body`: what every request says."""

    url: str
    body: Mapping[str, Any]
    groups: Callable[[], Groups]


Measure = Callable[[Setting], dict[str, Any]]


def main() -> int:
    arguments = parse_arguments(
        __doc__ or "",
        [
            ("--against", {"action": "append", "default": [], "metavar": "NAME=URL[#MODEL]", "help": AGAINST}),
            ("--streams", {"type": int, "nargs": "*", "default": FREE_STREAMS, "help": "of the free model; or none"}),
            ("--seconds", {"type": float, "help": "of each part that is counted (default: 10; quick: 3)"}),
            ("--rounds", {"type": int, "help": "of all sides (default: 3; quick: 1)"}),
            ("--chat", {"action": "store_true", "help": "chat completions in place of completions"}),
            ("--args", {"type": json.loads, "default": {}, "metavar": "JSON", "help": ARGS}),
            ("--save", {"type": Path, "metavar": "DIR", "help": "write DIR/free and DIR/model, and measure nothing"}),
            ("--sides", {"nargs": "*", "help": "only these: engine, ours, 'floor 1', 'floor 8', names of --against"}),
        ],
    )
    if arguments.save is not None:
        return _save(arguments.model, arguments.save)
    before_s = paces_s()
    against = [_against(each, arguments.chat) for each in arguments.against]
    samples: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as directory, local_cluster(ClusterConfig(address="local", num_cpus=2)):
        port = free_port("127.0.0.1")
        for model, settings in _settings(arguments).items():
            source = arguments.model if model != FREE else str(free_model.save(Path(directory)))
            document = _document(source, settings, port, more_args=arguments.args)
            others = {name: server for name, is_free, server in against if is_free == (model == FREE)}
            with _sides(document, others, is_chat=arguments.chat, wanted=arguments.sides) as sides:
                samples += _measure(settings, sides, arguments.rounds or _num_rounds(arguments.quick))
    _print(samples)
    noise = NoiseReport(
        taken_share=mean(sample["taken_share"] for sample in samples),
        pace_spread=pace_spread([*before_s, *paces_s()]),
    )
    return finish(arguments, "measured on the CPU", samples, _checks(samples, list(FLOORS)), noise)


def _save(source: str, directory: Path) -> int:
    free_model.save(directory / "free")
    loaded = load_model(ModelConfig(source=source, dtype="float32"))
    loaded.model.save_pretrained(directory / "model")
    if loaded.tokenizer is not None:
        loaded.tokenizer.save_pretrained(directory / "model")
    return 0


AGAINST = "a server that runs already, to be measured in turn with ours (may be given several times)"
ARGS = "what else the application's args are to say, sections merged, e.g. '{\"num_ingress_replicas\": 2}'"


def _num_rounds(is_quick: bool) -> int:
    return NUM_ROUNDS_QUICK if is_quick else NUM_ROUNDS


def _settings(arguments: Any) -> dict[str, list[Setting]]:
    common = {
        "seconds": arguments.seconds or (SECONDS_QUICK if arguments.quick else SECONDS),
        "warm_up_s": WARM_UP_QUICK_S if arguments.quick else WARM_UP_S,
    }
    free = [
        Setting(model=FREE, num_streams=each, num_tokens=ALONE_TOKENS if each == 1 else FREE_TOKENS, **common)
        for each in arguments.streams
    ]
    num_tokens = MODEL_TOKENS_QUICK if arguments.quick else MODEL_TOKENS
    common["seconds"] *= 2  # of a slower model
    own = [Setting(model=arguments.model, num_streams=MODEL_STREAMS, num_tokens=num_tokens, **common)]
    return {
        **({FREE: free} if free else {}),
        **({arguments.model: own} if arguments.model != NO_MODEL else {}),
    }


def _document(source: str, settings: Sequence[Setting], port: int, more_args: Mapping[str, Any]) -> dict[str, Any]:
    """A Serve config in which nothing is offloaded, nothing refused, and there is room for all streams."""
    most = max(each.num_streams for each in settings)
    args: dict[str, Any] = {
        "model": {"source": source, "served_name": "bench", "dtype": "float32"},
        "device": {"kind": "emulated"},
        "batch": {"max_requests": most, "max_batch_tokens": max(256, 2 * most), "kv_tokens": 512 * most},
        "offload": {"num_offloaded": 0},
        "slo": {"ttft_ms": 600_000, "tpot_ms": 60_000},
        "cluster": {"coordinator": False},
        "limits": {"refuse_late": False},
    }
    for name, value in more_args.items():
        args[name] = {**args.get(name, {}), **value} if isinstance(value, dict) else value
    applications = [{"name": APP_NAME, "route_prefix": "/", "import_path": IMPORT_PATH, "args": args}]
    if settings[0].model == FREE:
        applications.append({"name": FLOOR_NAME, "route_prefix": FLOOR_ROUTE, "import_path": FLOOR_IMPORT_PATH})
    return {"http_options": {"host": "127.0.0.1", "port": port}, "applications": applications}


# -- the sides -----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _sides(
    document: dict[str, Any], others: Mapping[str, Server], *, is_chat: bool, wanted: Sequence[str] | None
) -> Iterator[dict[str, Measure]]:
    """How to measure each side, while the block lasts."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(deployed(document))
        wait_until_serving(document, lambda elapsed_s: None)
        servers = {**_own_servers(document, is_chat), **others}
        sides = {name: _over_http(server) for name, server in servers.items() if wanted is None or name in wanted}
        if wanted is None or "engine" in wanted:
            engine = stack.enter_context(_engine(document["applications"][0]["args"]))
            sides = {"engine": lambda setting: engine_alone(engine, setting), **sides}
        yield sides


def _own_servers(document: dict[str, Any], is_chat: bool) -> dict[str, Server]:
    """The applications of the config, the floor once for every number of tokens an item."""
    (base_url,), path = base_urls(document), _path(is_chat)
    body = {**ASKED, "model": "bench"}
    servers = {"ours": Server(url=base_url + path, body=body, groups=partial(_ray_groups, APP_NAME))}
    if len(document["applications"]) > 1 and not is_chat:
        url = base_url + FLOOR_ROUTE + path
        for name, per_item in FLOORS.items():
            body = {**ASKED, "per_item": per_item}
            servers[name] = Server(url=url, body=body, groups=partial(_ray_groups, FLOOR_NAME))
        _wait_for_floor(servers["floor 1"])
    return servers


def _path(is_chat: bool) -> str:
    return "/v1/chat/completions" if is_chat else "/v1/completions"


def _engine(args: Mapping[str, Any]) -> Engine:
    """The engine that a replica with these args has."""
    config = AppArgs.model_validate(args).engine
    return load_unsteered_engine(replace(config, device=replace(config.device, kind=resolve_kind(config.device))))


def _measure(settings: Sequence[Setting], sides: Mapping[str, Measure], num_rounds: int) -> list[dict[str, Any]]:
    samples = []
    for setting in settings:
        for number in range(num_rounds):
            for name, measure in sides.items():
                sample = {**asdict(setting), "round": number, "side": name, **measure(setting)}
                samples.append(sample)
                print(
                    f"{setting.model}, {setting.num_streams} streams, {name}: {sample['tokens_per_s']:.0f} tokens/s",
                    flush=True,
                )
    return samples


def engine_alone(engine: Engine, setting: Setting) -> dict[str, Any]:
    """The closed loop on the engine itself: handles are looked at now and then, and nobody waits for an event."""
    loop = _EngineLoop(engine, setting)
    loop.run_until(lambda: all(handle.num_tokens for handle in loop.handles))
    loop.run_for(setting.warm_up_s)
    first = engine.steps.num_steps
    began_s, before = time.perf_counter(), loop.num_tokens
    resting = [process.pid for process in psutil.Process().children(recursive=True)]
    with CpuUse({"engine": [os.getpid()], "other": resting}) as use:
        loop.ended.clear()
        loop.run_for(setting.seconds)
        num_tokens, seconds = loop.num_tokens - before, time.perf_counter() - began_s
    ended, inside = list(loop.ended), list(loop.handles)
    loop.close()
    records = [each for each in list(engine.steps.records) if each.iteration > first]
    gaps_s = [after.ended_s - each.ended_s for each, after in zip(records, records[1:], strict=False)]
    timings = [handle.timing for handle in (*ended, *inside) if handle.arrived_s >= began_s]
    ttfts_s = [each.ttft_s for each in timings if each.ttft_s is not None]
    return {
        "tokens": num_tokens,
        "tokens_per_s": num_tokens / seconds,
        "step_s": median(each.duration_s for each in records),
        "ttft_p50_s": stream_load.at(ttfts_s, 0.5),
        "ttft_p99_s": stream_load.at(ttfts_s, 0.99),
        "num_ttfts": len(ttfts_s),
        "itl_p50_s": stream_load.at(gaps_s, 0.5),
        "itl_p99_s": stream_load.at(gaps_s, 0.99),
        "tpot_s": median(each.timing.tpot_s or 0.0 for each in ended) if ended else None,
        "num_whole": len(ended),
        "wrong": {},
        **_cpu(use.used, num_tokens),
    }


class _EngineLoop:
    """Keeps so many requests in the engine; first ones are of all lengths, as `stream_load`'s."""

    def __init__(self, engine: Engine, setting: Setting) -> None:
        self._engine, self._setting = engine, setting
        self._job = stream_load.Job(
            url="", body={}, groups={}, prompts=setting.prompts, warm_up_s=0.0, seconds=0.0,
            num_streams=setting.num_streams, num_tokens=setting.num_tokens,
        )  # fmt: skip
        self._numbers = [0] * setting.num_streams
        self._num_ended_tokens = 0
        self.ended: list[RequestHandle] = []
        self.handles = [
            self._submit(client, max(1, setting.num_tokens * (client + 1) // setting.num_streams))
            for client in range(setting.num_streams)
        ]

    @property
    def num_tokens(self) -> int:
        return self._num_ended_tokens + sum(handle.num_tokens for handle in self.handles)

    def run_for(self, seconds: float) -> None:
        until_s = time.perf_counter() + seconds
        self.run_until(lambda: time.perf_counter() >= until_s)

    def run_until(self, is_over: Callable[[], bool]) -> None:
        while not is_over():
            for client, handle in enumerate(self.handles):
                assert handle.params is not None
                if handle.num_tokens >= handle.params.max_tokens:
                    self.ended.append(handle)
                    self._num_ended_tokens += handle.num_tokens
                    self.handles[client] = self._submit(client, self._setting.num_tokens)
            if not self._engine.is_healthy():
                raise RuntimeError("the engine has stopped")
            time.sleep(POLL_S)

    def close(self) -> None:
        for handle in self.handles:
            handle.cancel()
        for handle in self.handles:
            handle.result()

    def _submit(self, client: int, num_tokens: int) -> RequestHandle:
        text = self._job.prompt(client, self._numbers[client])
        self._numbers[client] += 1
        tokenizer: Any = self._engine.tokenizer
        return self._engine.submit(tokenizer(text)["input_ids"], SamplingParams(max_tokens=num_tokens, ignore_eos=True))


def _over_http(server: Server) -> Measure:
    def measure(setting: Setting) -> dict[str, Any]:
        groups = {name: list(pids) for name, pids in server.groups().items()}
        _rest(groups)
        job = stream_load.Job(
            url=server.url,
            body=dict(server.body),
            prompts=setting.prompts,
            num_streams=setting.num_streams,
            num_tokens=setting.num_tokens,
            warm_up_s=setting.warm_up_s,
            seconds=setting.seconds,
            groups=groups,
        )
        seen = _run_load(job)
        used = Used(**{each: seen.pop(each) for each in ("seconds", "cpu_s", "busiest_s", "taken_share")})
        _rest(groups)  # it has the streams to end that were cut
        return {**seen, **_cpu(used, seen["tokens"])}

    return measure


def _run_load(job: stream_load.Job) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.stream_load"]
    load = subprocess.run(command, input=json.dumps(asdict(job)), stdout=subprocess.PIPE, text=True, check=True)
    return dict(json.loads(load.stdout))


def _cpu(used: Used, num_tokens: float) -> dict[str, Any]:
    """CPU milliseconds a token, by process; of the replica also without its busiest thread, the engine's."""
    ms = {name: 1e3 * seconds / max(1.0, num_tokens) for name, seconds in used.cpu_s.items()}
    outside = None
    if "replica" in ms:
        busiest_s = 0.0 if ms.get("engine") else used.busiest_s["replica"]
        outside = ms["replica"] - 1e3 * busiest_s / max(1.0, num_tokens)
    return {"cpu_ms": ms, "outside_engine_ms": outside, "taken_share": used.taken_share}


def _rest(groups: Groups) -> None:
    """Returns when the server is at rest, or does not come to it."""
    until_s = time.perf_counter() + MOST_REST_S
    while time.perf_counter() < until_s:
        with CpuUse(groups) as use:
            time.sleep(REST_S)
        if sum(use.used.cpu_s.values()) < RESTING_SHARE * use.used.seconds:
            return


def _ray_groups(app_name: str) -> Groups:
    """An application's processes and those of Serve and Ray; an engine apart from its replica is its child."""
    app = f"ray::ServeReplica:{app_name}:"
    groups: dict[str, list[int]] = {name: [] for name in ("engine", "replica", "ingress", "proxy", "controller")}
    groups["other"] = [os.getpid()]
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            title, parent = " ".join(process.cmdline()), process.parent()
            if parent is not None and " ".join(parent.cmdline()).startswith(app):
                groups["engine"].append(process.pid)
            elif title.startswith((f"{app}{INGRESS_NAME}", f"{app}FloorIngress")):
                groups["ingress"].append(process.pid)
            elif title.startswith((f"{app}{REPLICA_NAME}", f"{app}FloorReplica")):
                groups["replica"].append(process.pid)
            elif title.startswith("ray::ProxyActor") or process.name() == "haproxy":
                groups["proxy"].append(process.pid)
            elif title.startswith("ray::ServeController"):
                groups["controller"].append(process.pid)
            else:
                groups["other"].append(process.pid)
    return {name: pids for name, pids in groups.items() if pids}


def _wait_for_floor(server: Server) -> None:
    until_s = time.monotonic() + MOST_REST_S
    while True:
        try:
            _post(server.url, {**server.body, "prompt": free_model.prompt(0, 0), "max_tokens": 1})
            return
        except OSError:
            if time.monotonic() >= until_s:
                raise
            time.sleep(REST_S)


# -- other servers -------------------------------------------------------------------------------------------------


def _against(option: str, is_chat: bool) -> tuple[str, bool, Server]:
    """The name of a server that runs already, whether it serves the free model, and how it is asked."""
    name, _, address = option.partition("=")
    url, _, model = address.partition("#")
    url = url.rstrip("/").removesuffix("/v1")
    model = model or served_model(url)
    path, prompt = _path(is_chat), free_model.prompt(0, 0)
    asked = {"messages": [{"role": "user", "content": prompt}]} if is_chat else {"prompt": prompt}
    body: dict[str, Any] = {"model": model, "temperature": 0, "ignore_eos": True, **asked, "max_tokens": 8}
    try:
        answer = _post(url + path, body)
    except urllib.error.HTTPError:  # that option is not OpenAI's
        del body["ignore_eos"]
        answer = _post(url + path, body)
    choice = answer["choices"][0]
    text = choice["message"]["content"] if is_chat else choice["text"]
    common = {key: value for key, value in ASKED.items() if key != "ignore_eos" or key in body}
    server = Server(url=url + path, body={**common, "model": model}, groups=lambda: _groups_at(url))
    return name, text.strip() == free_model.continuation(prompt, 8), server


def _groups_at(url: str) -> Groups:
    """The processes that listen at `url`, and those that they have started; none where it is another machine."""
    port = urlsplit(url).port
    listening = {each.pid for each in psutil.net_connections("tcp") if each.status == "LISTEN" and each.pid is not None
                 and each.laddr and each.laddr.port == port}  # fmt: skip
    behind = {child.pid for pid in listening for child in psutil.Process(pid).children(recursive=True)} - listening
    return {name: sorted(pids) for name, pids in (("front", listening), ("behind", behind)) if pids}


def _post(url: str, body: Mapping[str, Any]) -> Any:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request, timeout=stream_load.MOST_WARM_UP_S) as response:
        data = response.read()
    return json.loads(data) if data.startswith(b"{") else None


# -- what it was ---------------------------------------------------------------------------------------------------


def _checks(samples: Sequence[dict[str, Any]], floors: Sequence[str]) -> list[Check]:
    checks = []

    def add(name: str, value: float | None, target: str, *, is_timed: bool = True) -> None:
        if value is not None:
            checks.append(Check(name=name, value=value, target=target, is_timed=is_timed))

    def of(side: str, num_streams: int, what: str, model: str = FREE) -> float | None:
        return _median(samples, model, num_streams, side, what)

    def ratio(side: str, other: str, num_streams: int, what: str, model: str = FREE) -> float | None:
        mine, others = of(side, num_streams, what, model), of(other, num_streams, what, model)
        return mine / others if mine is not None and others else None

    wrong = sum(sum(sample["wrong"].values()) for sample in samples if sample["side"] in ("ours", *floors))
    add("streams with a lost, doubled or reordered token, or broken off", wrong, "<= 0", is_timed=False)
    for num_streams, most_ms in ((8, 4), (64, 10)):
        step_s = of("engine", num_streams, "step_s")
        add(f"{num_streams} requests: the engine's step, ms", 1e3 * step_s if step_s else None, f"<= {most_ms}")
    for num_streams in (8, 64):
        value = ratio("ours", "floor 1", num_streams, "tokens_per_s")
        add(f"{num_streams} streams: tokens/s over Ray's floor of one token an item", value, ">= 0.8")
    path_ms = [each for name in ("ingress", "proxy") if (each := of("ours", 64, f"cpu_ms.{name}")) is not None]
    add("64 streams: CPU ms a token, ingress and proxy", sum(path_ms) if path_ms else None, "<= 0.2")
    add("64 streams: CPU ms a token, replica outside the engine", of("ours", 64, "outside_engine_ms"), "<= 0.1")
    many, fewer = of("ours", 256, "tokens_per_s"), of("ours", 64, "tokens_per_s")
    add("256 streams over 64, tokens/s", many / fewer if many is not None and fewer else None, ">= 1")
    for what, most_ms in (("ttft_p50_s", 10), ("tpot_s", 1)):
        mine, alone = of("ours", 1, what), of("engine", 1, what)
        more_ms = 1e3 * (mine - alone) if mine is not None and alone is not None else None
        add(f"1 stream: {what.split('_')[0].upper()} over the engine's, ms", more_ms, f"<= {most_ms}")
    for side in dict.fromkeys(sample["side"] for sample in samples):
        if side in ("engine", "ours", *floors):
            continue
        for num_streams in (8, 64):
            value = ratio("ours", side, num_streams, "tokens_per_s")
            add(f"{num_streams} streams: tokens/s over {side}'s", value, ">= 1")
        for model in dict.fromkeys(sample["model"] for sample in samples if sample["model"] != FREE):
            value = ratio("ours", side, MODEL_STREAMS, "tokens_per_s", model)
            add(f"{model}: tokens/s over {side}'s", value, ">= 1")
            for what in ("ttft_p50_s", "itl_p50_s"):
                value = ratio("ours", side, MODEL_STREAMS, what, model)
                add(f"{model}: {what.split('_')[0].upper()} p50 over {side}'s", value, "<= 1")
    return checks


def _median(samples: Sequence[Mapping[str, Any]], model: str, num_streams: int, side: str, what: str) -> float | None:
    """Over the rounds; `what` may be a key in a key. None where there is no such figure."""
    values = []
    for sample in samples:
        if (sample["model"], sample["num_streams"], sample["side"]) == (model, num_streams, side):
            value: Any = sample
            for key in what.split("."):
                value = value.get(key) if value is not None else None
            values.append(value)
    known = [value for value in values if value is not None]
    return median(known) if known else None


def _print(samples: Sequence[dict[str, Any]]) -> None:
    rows = []
    for model, num_streams, side in dict.fromkeys((s["model"], s["num_streams"], s["side"]) for s in samples):
        of = [s for s in samples if (s["model"], s["num_streams"], s["side"]) == (model, num_streams, side)]
        rates = [sample["tokens_per_s"] for sample in of]

        def ms(what: str, of: Sequence[dict[str, Any]] = of) -> str:
            known = [1e3 * sample[what] for sample in of if sample.get(what) is not None]
            return f"{median(known):.1f}" if known else "-"

        cpu = [
            f"{name} {median(sample['cpu_ms'][name] for sample in of):.2f}"
            for name in PROCESSES
            if all(name in sample["cpu_ms"] for sample in of)
        ]
        rows.append(
            [
                model,
                num_streams,
                side,
                f"{median(rates):.0f}",
                f"{min(rates):.0f}..{max(rates):.0f}",
                f"{ms('ttft_p50_s')} / {ms('ttft_p99_s')}",
                f"{ms('itl_p50_s')} / {ms('itl_p99_s')}",
                ms("tpot_s"),
                sum(sample["num_whole"] for sample in of),
                sum(sum(sample["wrong"].values()) for sample in of),
                ", ".join(cpu),
            ]
        )
    header = ["model", "streams", "side", "tokens/s", "rounds", "TTFT p50 / p99 ms", "ITL p50 / p99 ms", "TPOT ms"]
    print()
    print(table([*header, "whole", "wrong", "CPU ms a token"], rows))


if __name__ == "__main__":
    sys.exit(main())
