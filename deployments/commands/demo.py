"""`selectn demo`: the whole system once, on real input, with a report that says whether offloading changed a thing.

The device is CUDA where there is one, else an emulated device too small for the model, so that offloading is what
makes it run. The policy decides how much is offloaded, and the objective it decides by changes twice while answers are
being generated; afterwards the same prompts are answered without offloading, and the answers must be equal.
"""

from __future__ import annotations

import argparse
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from deployments.commands.chat_client import Answer, stream_chat
from deployments.commands.demo_report import build_report, render
from deployments.commands.file_options import file_name
from deployments.commands.local_cluster import ClusterConfig, keep_ray_on_loopback, local_cluster
from deployments.commands.profile import require_writable
from deployments.commands.serve import interrupt_on_first_signal, resolve_local_models
from deployments.commands.serving import base_urls, cleaned_up, deployed, free_port, served_model, wait_until_serving
from deployments.config import IMPORT_PATH, REPLICA_NAME, AppArgs, parse
from selectn_core.config import DEVICE_KINDS, SloConfig

APP_NAME = "selectn-demo"
HOST = "127.0.0.1"
MAX_TOKENS = 48
QUESTIONS = (
    "What is the capital of France?",
    "Write one sentence about the sea.",
    "Explain in two sentences why the sky is blue.",
    "List three things that grow in a garden.",
)
# Smaller than the embedded model's 538 MB: it cannot run here with every layer resident.
EMULATED_MEMORY_GIB = 0.375
EMULATED_LINK_GB_PER_S = 2.0
LOOSER = 1.5  # times the TPOT objective, for a part of the answers
EXIT_DIFFERENT = 1


def register(commands: Any) -> None:
    """Adds the command to `selectn`."""
    parser = commands.add_parser(
        "demo",
        help="serve a model, ask it a few things, and report",
        description="Starts a local Ray, serves the model with part of it in host memory, asks it a few things "
        "over HTTP while its objectives change, compares the answers with those without offloading, and stops.",
        epilog="exit code: 0 if the answers equal those without offloading, 1 if not, 2 if it could not run",
        allow_abbrev=False,
    )
    parser.add_argument("--model", default="embedded", help="directory, .gguf file, hub id, or 'embedded'")
    parser.add_argument("--device", choices=DEVICE_KINDS, default="auto", help="auto: CUDA if there is one")
    parser.add_argument("--device-memory-gib", type=float, help=f"size of its memory (emulated: {EMULATED_MEMORY_GIB})")
    parser.add_argument(
        "--link-gb-per-s", type=float, default=EMULATED_LINK_GB_PER_S, help="speed of the emulated link"
    )
    parser.add_argument(
        "--json",
        type=file_name,
        default=Path("build/demo-report.json"),
        help="where the report goes (%(default)s)",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Runs the demo. Raises SelectNError for whatever the user can put right."""
    require_writable(args.json)
    keep_ray_on_loopback()
    app_args = _app_args(args)
    answers, before, after, elapsed_s = _serve_and_ask(app_args)
    _say("answering the same questions without offloading")
    reference = _answers_without_offloading(app_args)
    report = build_report(app_args, answers, reference, before=before, after=after, generating_s=elapsed_s)
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(report.to_json(), encoding="utf-8")
    print(render(report))
    print(f"\nthe same as JSON: {args.json}")
    return 0 if report.tokens_equal_reference else EXIT_DIFFERENT


def _app_args(args: argparse.Namespace) -> AppArgs:
    from selectn_core.config import DeviceConfig
    from selectn_core.device import resolve_kind

    kind = resolve_kind(DeviceConfig(kind=args.device))
    emulated_gib = EMULATED_MEMORY_GIB if kind == "emulated" else None
    memory_gib = emulated_gib if args.device_memory_gib is None else args.device_memory_gib
    return parse(
        AppArgs,
        {
            "model": {"source": args.model, "dtype": "float32"},
            "device": {"kind": kind, "memory_gib": memory_gib, "link_gb_per_s": args.link_gb_per_s},
            "batch": {"kv_tokens": 1024, "max_requests": 8},
        },
        where="options",
    )


def _serve_and_ask(app_args: AppArgs) -> tuple[list[Answer], dict[str, Any], dict[str, Any], float]:
    """Answers over HTTP, the replica's state before and after, and the seconds in between."""
    document = _document(app_args)
    resolve_local_models(document)
    _say("starting a local Ray")
    with (
        cleaned_up(document),
        local_cluster(ClusterConfig(address="local")) as cluster,
        deployed(document, is_gone=cluster.is_gone),
    ):
        interrupt_on_first_signal()  # Ray has put its own handler of SIGTERM in place
        _say(f"loading {app_args.model.source}; the first start on a machine measures it for about a minute")
        wait_until_serving(document, lambda elapsed_s: None)
        replica = _Replica()
        before = replica.snapshot()
        _say(
            f"{before['num_offloaded']} of {before['num_units']} {before['unit']}s must be in host memory here; asking "
            f"{len(QUESTIONS)} questions at once; the TPOT objective is loosened for a while, and more go there"
        )
        started_s = time.perf_counter()
        answers = _ask_while_objectives_change(base_urls(document)[0], replica, before)
        return answers, before, replica.snapshot(), time.perf_counter() - started_s


def _ask_while_objectives_change(base_url: str, replica: _Replica, before: dict[str, Any]) -> list[Answer]:
    model = served_model(base_url)
    first_steps = before["num_steps"]
    with ThreadPoolExecutor(len(QUESTIONS)) as pool:
        asked: list[Future[Answer]] = [
            pool.submit(stream_chat, base_url, model, question, max_tokens=MAX_TOKENS) for question in QUESTIONS
        ]
        usual_ms = {f"{name}_ms": before["objectives"][f"{name}_s"] * 1e3 for name in ("ttft", "tpot")}
        loose_ms = {**usual_ms, "tpot_ms": LOOSER * usual_ms["tpot_ms"]}
        for num_steps, objectives_ms in ((8, loose_ms), (24, usual_ms)):
            replica.wait_for_steps(first_steps + num_steps, asked)
            replica.set_objectives(SloConfig(**objectives_ms))
        return [future.result() for future in asked]


class _Replica:
    """The running replica, through its Serve handle."""

    def __init__(self) -> None:
        from ray import serve

        self._handle = serve.get_deployment_handle(REPLICA_NAME, APP_NAME)

    def snapshot(self) -> dict[str, Any]:
        state: dict[str, Any] = self._handle.snapshot.remote().result()
        return state

    def set_objectives(self, slo: SloConfig) -> None:
        self._handle.set_objectives.remote(slo).result()

    def wait_for_steps(self, num_steps: int, asked: list[Future[Answer]]) -> None:
        """Returns at that step, or when every answer is complete."""
        while self.snapshot()["num_steps"] < num_steps and not all(future.done() for future in asked):
            time.sleep(0.02)


def _answers_without_offloading(app_args: AppArgs) -> list[Answer]:
    """The same questions to an engine that keeps every layer on a device with room for all."""
    from deployments.messages import ChatMessage, GenerateRequest
    from deployments.replica.detokenizer import Detokenizer
    from deployments.replica.prompting import encode_prompt
    from selectn_core.requests.sampling import SamplingParams
    from selectn_core.start import load_engine

    config = parse(
        AppArgs,
        {
            "model": {"source": app_args.model.source, "dtype": app_args.model.dtype},
            "device": {"kind": app_args.device.kind},
            "batch": {"kv_tokens": app_args.batch.kv_tokens, "max_requests": app_args.batch.max_requests},
            "offload": {"num_offloaded": 0},
        },
        where="reference",
    ).engine
    engine = load_engine(config)
    prompts = [
        encode_prompt(
            engine.tokenizer,
            GenerateRequest(request_id=question, prompt=(ChatMessage(role="user", content=question),)),
        )
        for question in QUESTIONS
    ]
    answers = []
    with engine:
        handles = [engine.submit(prompt, SamplingParams(max_tokens=MAX_TOKENS)) for prompt in prompts]
        for question, prompt, handle in zip(QUESTIONS, prompts, handles, strict=True):
            tokens = handle.result()
            assert engine.tokenizer is not None
            detokenizer = Detokenizer(engine.tokenizer, prompt)
            text = detokenizer.push(tokens) + detokenizer.finish()
            answers.append(Answer(question=question, text=text, num_tokens=len(tokens), ttft_s=0.0, tpot_s=0.0))
    return answers


def _document(app_args: AppArgs) -> dict[str, Any]:
    application = {
        "name": APP_NAME,
        "route_prefix": "/",
        "import_path": IMPORT_PATH,
        "args": app_args.model_dump(),
    }
    return {"http_options": {"host": HOST, "port": free_port(HOST)}, "applications": [application]}


def _say(what: str) -> None:
    print(f"{what} ...", flush=True)
