"""`selectn plan --emit`: a plan as the flags of another server, and what of it is lost there.

Flags, as published by each server:

vLLM        `--offload-backend`, `--offload-group-size`, `--offload-num-in-group`, `--offload-prefetch-step`:
            vllm/config/offload.py (PrefetchOffloadConfig), https://docs.vllm.ai/en/stable/api/vllm/config/offload/.
            Its buffers are as many as the step (vllm/model_executor/offloader/prefetch.py). That a step below
            num_in_group stalls: github.com/vllm-project/vllm-ascend/pull/11945. That a step which does not divide the
            number of offloaded layers overwrote weights in use: github.com/vllm-project/vllm/pull/54975.
SGLang      `--offload-group-size`, `--offload-num-in-group`, `--offload-prefetch-step`, `--offload-mode`: server
            arguments; python/sglang/srt/utils/offloader.py (OffloaderV2). The next layer's memory is taken before the
            last one's is given back: one buffer more than the step. What of a layer moves, each model's code says
            (`offloader_kwargs`, for example in python/sglang/srt/models/deepseek_v2.py).
llama.cpp   `--n-gpu-layers`, `--override-tensor` (`-ot`), `--fit`: tools/server/README.md of ggml-org/llama.cpp.
            Tensors of layer n are named `blk.n.*`.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from selectn_core.errors import ConfigError

if TYPE_CHECKING:
    from selectn_core.planning.groups import Choice, Group
    from selectn_core.planning.planner import Planner, Workload
    from selectn_core.planning.record import PerformanceRecord
    from selectn_core.planning.search import PlanRange

SERVERS = ("vllm", "sglang", "llama.cpp")
ANYWHERE = (
    "the plan stays as it is while the server runs: for other batches, lengths, objectives and bandwidths too",
    "no bus is divided between servers: each copies as fast as it can",
)
GROUPED = "the memory that this frees is KV cache only as far as that server's own settings allow"


@dataclass(frozen=True, kw_only=True)
class Emitted:
    """A server's command-line flags, and what a reader must know of them. `fits`: within the device's memory."""

    flags: tuple[str, ...]
    notes: tuple[str, ...]
    fits: bool = True

    @property
    def line(self) -> str:
        """The flags for a shell."""
        return shlex.join(self.flags)


def require_layers(records: Sequence[PerformanceRecord]) -> None:
    """Raises ConfigError for records that are of anything but layers."""
    units = [record.fingerprint.unit for record in records]
    if units != ["layer"]:
        raise ConfigError(f"--emit: other servers offload whole layers: give one --record of layers, not {units}")


def emitted(server: str, found: PlanRange, planner: Planner, workload: Workload) -> Emitted:
    """The flags that make `server`, one of SERVERS, follow a plan of layers as nearly as it can.

    `found` is what `planner` says of `workload`.
    """
    if found.plan.num_offloaded == 0:
        return Emitted(flags=(), notes=("nothing is offloaded: no flags",))
    if server == "llama.cpp":
        return _llama_cpp(found)
    return _grouped(server, found, planner, workload)


def _grouped(server: str, found: PlanRange, planner: Planner, workload: Workload) -> Emitted:
    from selectn_core.planning.groups import nearest_group

    spare = 1 if server == "sglang" else 0  # buffers beyond those that are copied ahead
    num_layers = found.plan.num_units

    def fits(group: Group) -> bool:
        return planner.candidate(workload, group.offloaded(num_layers), group.step + spare).fits

    def meets(group: Group) -> bool:
        return planner.meets(planner.candidate(workload, group.offloaded(num_layers), group.step))

    max_step = max(1, planner.sources[0].memory.max_slots - spare)
    choice = nearest_group(found.plan, max_step, fits=fits, meets=meets)
    group = choice.group
    sizes = ("--offload-group-size", group.size, "--offload-num-in-group", group.num_in_group)
    step = ("--offload-prefetch-step", group.step)
    own = ("--offload-backend", "prefetch") if server == "vllm" else ("--offload-mode", "cpu")
    flags = (*own, *sizes, *step) if server == "vllm" else (*sizes, *step, *own)
    notes = (*_rounding(found, choice), *_caveats(server, group, num_layers), *ANYWHERE, GROUPED)
    return Emitted(flags=tuple(map(str, flags)), notes=notes, fits=choice.fits)


def _rounding(found: PlanRange, choice: Choice) -> list[str]:
    """What is not as in the plan: how many layers and which, buffers, and whether the limits are still kept."""
    plan, group = found.plan, choice.group
    offloaded = group.offloaded(plan.num_units)
    if len(offloaded) != plan.num_offloaded:
        word = "fewer" if len(offloaded) < plan.num_offloaded else "more: no fewer fit and meet the objectives"
        notes = [
            f"{len(offloaded)} layers are offloaded and not {plan.num_offloaded} ({word}): groups know whole intervals "
            f"only, and the plan's is {plan.interval:.2f}"
        ]
    elif offloaded != plan.offloaded:
        notes = ["as many layers are offloaded as in the plan, but not the same ones: groups count from the first"]
    else:
        notes = []
    if group.step != plan.num_slots:
        notes.append(f"the step is {group.step}, where the plan has {plan.num_slots} slots")
    if not choice.fits:
        notes.append("no group of layers fits the device memory: more memory, or a plan of fewer requests, is needed")
    elif not choice.meets:
        notes.append("the objectives are not met: no group of layers that fits is predicted to meet them")
    return notes


def _caveats(server: str, group: Group, num_layers: int) -> list[str]:
    count = len(group.offloaded(num_layers))
    if server == "sglang":
        return [
            "SGLang moves of a layer only what the model's code names, in DeepSeek-V2 and V3 the experts: for other "
            "models it moves less or refuses, so look at its log",
        ]
    if count % group.step:
        return [
            f"{group.step} buffers do not divide {count} layers: a vLLM without pull request 54975 (September 2026) "
            "overwrites weights that are still needed, and answers are wrong"
        ]
    return []


def _llama_cpp(found: PlanRange) -> Emitted:
    """All layers on the device, but for the weights of those that the plan offloads. Exact: no rounding."""
    plan = found.plan
    layers = "|".join(map(str, plan.offloaded))
    # One more than there are layers: the output layer counts as one.
    flags = ("--n-gpu-layers", str(plan.num_units + 1), "--fit", "off", "-ot", rf"^blk\.({layers})\.=CPU")
    notes = (
        "llama.cpp has no prefetch: it computes these layers on the CPU, or copies them when they are needed. The "
        "predicted times do not hold",
        f"it has no slots: {plan.num_offloaded - plan.slots_used} layers would free as much device memory as "
        f"{plan.num_offloaded} do here",
        "`--fit off` is for builds that fit arguments by themselves: leave it out where it is not known",
    )
    return Emitted(flags=flags, notes=(*notes, *ANYWHERE))
