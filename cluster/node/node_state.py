"""From a node's report to what the coordinator divides: the one place where telemetry's words become the protocol's."""

from __future__ import annotations

from cluster.protocol.messages import BusState, NodeState
from cluster.protocol.node_reports import BusReport, NodeReport, Unavailable

# Beyond this a driver or a configuration is wrong; one such bus must not keep the node's others from being heard of.
MOST_BYTES_PER_S = 1e15 + 1


def node_state(report: NodeReport, *, heard_life: int, num_sharing: int) -> NodeState:
    """What `report` says of the node's buses.

    A bus whose rate is not known, or is no rate, is left out: nobody on it is told anything new. The devices of a bus
    are its GPUs; a bus of emulated devices has as many as are configured to share it (`num_sharing`), or as are there.
    """
    return NodeState(
        node_id=report.node_id,
        # An agent that was restarted counts its samples anew; the node's monotonic clock goes on, and nobody sets it.
        sequence=round(report.telemetry.sampled_s * 1e6),
        heard_life=heard_life,
        buses=tuple(
            state for bus in report.telemetry.buses if (state := _bus_state(bus, report, num_sharing)) is not None
        ),
    )


def _bus_state(bus: BusReport, report: NodeReport, num_sharing: int) -> BusState | None:
    if isinstance(bus.bytes_per_s, Unavailable) or not 0 < bus.bytes_per_s < MOST_BYTES_PER_S:
        return None
    ledger = report.ledger
    placed = [each.replica_id for each in ledger.replicas if each.bus_id == bus.name] if ledger is not None else []
    return BusState(
        bus_id=bus.name,
        bytes_per_s=int(bus.bytes_per_s),
        num_devices=max(len(bus.gpus) or num_sharing, len(placed)),
        replica_ids=tuple(placed) if ledger is not None and ledger.is_complete else None,
    )


def bus_of_gpu(report: NodeReport, gpu_uuid: str) -> str | None:
    """The bus that a GPU is on; None where the node's report does not have it."""
    return next((bus.name for bus in report.telemetry.buses if gpu_uuid in bus.gpus), None)
