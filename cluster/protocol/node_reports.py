"""What a node reports about its hardware: frozen, plain data. Every counter is a value, or a state with its reason."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias, TypeVar

from selectn_core.device.host_memory import HostMemory, MemoryPressure

Cause = Literal[
    "nvml_absent",  # no NVML library on this node
    "nvml_failed",  # the library is there, but did not start (no driver, another version)
    "gpu_lost",  # fell off the bus
    "reset_required",
    "timed_out",  # the driver has not answered yet
    "no_permission",
    "not_supported",  # by this GPU, driver or kernel
    "failed",  # anything else
]


@dataclass(frozen=True, kw_only=True)
class Unavailable:
    """Why there is no value. `detail` is for people."""

    cause: Cause
    detail: str


T = TypeVar("T")
Reading: TypeAlias = T | Unavailable


@dataclass(frozen=True, kw_only=True)
class DeviceMemory:
    """Bytes of a GPU's memory; `used_bytes` counts every process and what the driver keeps."""

    total_bytes: int
    used_bytes: int
    free_bytes: int


@dataclass(frozen=True, kw_only=True)
class Utilisation:
    """Percent of the driver's last sample period in which a kernel ran, and in which memory was read or written."""

    compute_percent: int
    memory_percent: int


@dataclass(frozen=True, kw_only=True)
class XidErrors:
    """Xid errors that the driver has reported since this agent started: how many, and the last few codes."""

    total: int
    last_codes: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class GpuReport:
    """One GPU. `trouble` is what is wrong with it as a whole; None: it answers, whatever single counters say.

    A GPU in trouble may go on answering some counters: a lost one often still knows its link.

    `pcie_generation` falls to 1 while a GPU is idle. rx is what the GPU receives, host to device, over the last 20 ms.
    ECC errors count since the driver was loaded.
    """

    index: int
    trouble: Unavailable | None
    uuid: Reading[str]
    name: Reading[str]
    pci_bus_id: Reading[str]
    memory: Reading[DeviceMemory]
    pcie_generation: Reading[int]
    pcie_width: Reading[int]
    pcie_max_generation: Reading[int]
    pcie_max_width: Reading[int]
    pcie_rx_bytes_per_s: Reading[int]
    pcie_tx_bytes_per_s: Reading[int]
    pcie_replays: Reading[int]
    utilisation: Reading[Utilisation]
    temperature_c: Reading[int]
    power_w: Reading[float]
    power_limit_w: Reading[float]
    throttle_reasons: Reading[tuple[str, ...]]
    ecc_corrected_errors: Reading[int]
    ecc_uncorrected_errors: Reading[int]
    xid_errors: Reading[XidErrors]


@dataclass(frozen=True, kw_only=True)
class BusReport:
    """A host bus, whose bandwidth the GPUs behind it share. `name` is unique on its node and stays across restarts.

    `gpus` are UUIDs (`gpu-<index>` where one is not known); empty for the bus of emulated devices. `found_by`:
    "assumed" is one bus for GPUs whose driver does not know how they are connected. `rate_from`: where `bytes_per_s`
    comes from; "pcie_link" is modelled, from generation, width and an efficiency.
    """

    name: str
    gpus: tuple[str, ...]
    bytes_per_s: Reading[float]
    found_by: Literal["topology", "assumed", "configuration", "emulated"]
    rate_from: Literal["pcie_link", "configuration", "emulated"]


@dataclass(frozen=True, kw_only=True)
class HostReport:
    """A node's host memory. `shared_memory_free_bytes`: what /dev/shm can still take."""

    memory: Reading[HostMemory]
    pressure: Reading[MemoryPressure]
    shared_memory_free_bytes: Reading[int]


@dataclass(frozen=True, kw_only=True)
class NvmlInfo:
    """NVML answers on this node."""

    driver_version: Reading[str]
    num_gpus: int


@dataclass(frozen=True, kw_only=True)
class NodeTelemetry:
    """One sample of a node's hardware. `sampling_s` is how long taking it has taken.

    `sampled_s` is when, on the node's monotonic clock, which orders samples; `sampled_unix_s` is for people.
    """

    sampled_s: float
    sampled_unix_s: float
    sampling_s: float
    nvml: Reading[NvmlInfo]
    gpus: tuple[GpuReport, ...]
    buses: tuple[BusReport, ...]
    host: HostReport


@dataclass(frozen=True, kw_only=True)
class HostClaim:
    """What a replica keeps in its node's host memory, and where it is: made before the memory is used, then renewed.

    `own_bytes` are its alone; the store is one for all replicas of the node that name it. `process_start_ticks`
    (`processes.start_ticks`) tells its process from a later one of the same `pid`. `is_renewal`: this was granted
    before, and is in use.
    """

    replica_id: str
    bus_id: str | None
    pid: int
    process_start_ticks: int
    own_bytes: int = 0
    store_name: str | None = None
    store_bytes: int = 0
    is_renewal: bool = False


@dataclass(frozen=True, kw_only=True)
class HostAnswer:
    """The answer to a claim: `held_bytes` are what the replica counts as its own, a store with the first of its users.

    `refusal` says why the claim was not granted; what was held before still is. `ask_again`: that will pass.
    """

    held_bytes: int
    refusal: str | None = None
    ask_again: bool = False


@dataclass(frozen=True, kw_only=True)
class Placement:
    """A replica that lives on the node, and the bus it uses; None: a bus of its own."""

    replica_id: str
    bus_id: str | None


@dataclass(frozen=True, kw_only=True)
class LedgerReport:
    """The node's host-memory ledger. While not `is_complete` replicas that live may be missing from it."""

    capacity_bytes: int
    reserved_bytes: int
    replicas: tuple[Placement, ...]
    is_complete: bool


@dataclass(frozen=True, kw_only=True)
class NodeReport:
    """A sample and where it is from. `sequence` counts the samples of one `agent_id`, which a restart changes.

    `ledger` is None where nobody keeps one.
    """

    node_id: str
    agent_id: str
    sequence: int
    telemetry: NodeTelemetry
    ledger: LedgerReport | None = None
