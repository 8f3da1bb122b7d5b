"""What a node's agent tells the coordinator: frozen, plain data without behaviour."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class BusReport:
    """A bus of the node: what it can move from host memory to its devices, and who may be using it.

    `replica_ids` are the replicas alive on it, None where the agent cannot tell. To leave one out that is alive is
    the only mistake here that could have the bus promised twice.
    """

    bus_id: str
    bytes_per_s: int
    num_devices: int
    replica_ids: tuple[str, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class DeviceState:
    """One device of the node; `problem` says what is wrong with it or with what is known about it."""

    device_id: str
    bus_id: str
    problem: str | None = None


@dataclass(frozen=True, kw_only=True)
class NodeReport:
    """A node's state. `heard_life` is what the coordinator answered to the last one (0 before there was an answer).

    `host_limit_bytes` is what all replicas of the node may hold together.
    """

    node_id: str
    sequence: int
    heard_life: int
    buses: tuple[BusReport, ...]
    host_limit_bytes: int
    host_available_bytes: int
    devices: tuple[DeviceState, ...] = ()
