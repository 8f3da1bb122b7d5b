"""The links of the GPUs, and NUMA: what copies are slowed down by."""

from __future__ import annotations

from collections.abc import Iterator

from cluster.node.bus_topology import link_bytes_per_s
from cluster.protocol.node_reports import GpuReport, Unavailable, Utilisation
from deployments.commands.doctor.findings import Finding, note, ok, warning
from deployments.commands.doctor.subject import Subject
from selectn_core.device import numa_nodes

RESEAT = "look at the slot, a riser, and how the BIOS divides its lanes; then measure with benchmarks/bench_interval.py"


def check_link(subject: Subject) -> Iterator[Finding]:
    """Each GPU's PCIe link now against what GPU and slot can do together."""
    gpus = subject.node.gpus
    if not gpus:
        yield ok("link", "no GPU, so no PCIe link to look at")
    for gpu in gpus:
        yield from _link(gpu)


def _link(gpu: GpuReport) -> Iterator[Finding]:
    values = (gpu.pcie_generation, gpu.pcie_width, gpu.pcie_max_generation, gpu.pcie_max_width)
    missing = next((each for each in values if isinstance(each, Unavailable)), None)
    if missing is not None:
        yield note("link", f"GPU {gpu.index}: {missing.cause.replace('_', ' ')} ({missing.detail})")
        return
    generation, width, max_generation, max_width = (each for each in values if isinstance(each, int))
    found = f"GPU {gpu.index}: PCIe {generation} x{width}, of {max_generation} x{max_width} at most"
    if width < max_width:
        share = link_bytes_per_s(generation, width, 1) / link_bytes_per_s(generation, max_width, 1)
        yield warning("link", f"{found}: {share:.0%} of the lanes, and of the bandwidth", RESEAT)
    elif generation < max_generation:
        yield _slow_generation(gpu, found)
    else:
        yield ok("link", found)
    if isinstance(gpu.pcie_replays, int) and gpu.pcie_replays > 0:
        yield note("link", f"GPU {gpu.index}: {gpu.pcie_replays} packets were sent again", "if it grows, see the slot")


def _slow_generation(gpu: GpuReport, found: str) -> Finding:
    busy = isinstance(gpu.utilisation, Utilisation) and gpu.utilisation.compute_percent > 0
    if busy:
        return warning(
            "link", f"{found}, while the GPU computes", "look at the slot's setting in the BIOS, and a riser"
        )
    return note("link", f"{found}: an idle link sleeps", "look again under load")


def check_numa(subject: Subject) -> Iterator[Finding]:
    """How many nodes there are, and which of them the GPUs are on."""
    nodes = numa_nodes.nodes(subject.machine.sys)
    if len(nodes) < 2:
        yield ok("numa", "one NUMA node")
        return
    places = []
    for gpu in subject.node.gpus:
        address = gpu.pci_bus_id if isinstance(gpu.pci_bus_id, str) else ""
        # NVML writes eight digits of the domain, and the kernel four.
        node = numa_nodes.node_of_pci(address[-12:], subject.machine.sys)
        places.append(f"GPU {gpu.index} on {'an unknown one' if node is None else node}")
    found = f"{len(nodes)} NUMA nodes; {', '.join(places) or 'no GPU'}"
    do = "start the node's Ray under `numactl --cpunodebind` where all its GPUs are on one: docs/gpu.md"
    yield note("numa", found, do if places else "")
