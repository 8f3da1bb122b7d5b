"""What processes that are gone have left in shared memory: stores of weights, and emulated buses."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from deployments.commands.doctor.findings import Finding, gib, note, ok, warning
from deployments.commands.doctor.subject import Subject
from selectn_core.device.bus import Bus
from selectn_core.weights.store_files import abandoned


def check_stores(subject: Subject) -> Iterator[Finding]:
    """Host stores that nothing uses. Only looked at: the next replica of the same model may use one again."""
    machine = subject.machine
    configured = [Path(args.host.directory) for args in subject.apps if args.host.directory is not None]
    left = []
    for directory in dict.fromkeys([machine.shared_memory, machine.files, *configured]):
        left += abandoned(directory) if directory.is_dir() else []
    if not left:
        yield ok("stores", "no store of weights is left behind")
    for path in left:
        size = gib(path.stat().st_size)
        do = "the next server takes it over or removes it; or remove it by hand, if no container shares the directory"
        yield warning("stores", f"{path}, {size}, which no process uses: it was left by one that was killed", do)


def check_buses(subject: Subject) -> Iterator[Finding]:
    """Emulated buses that no process has open. One keeps its bandwidth, whatever is configured later."""
    directory = subject.machine.shared_memory
    names = Bus.names(directory)
    in_use = _mapped_names(subject.machine.proc)
    wanted = {args.device.bus: args.device.link_gb_per_s for args in subject.apps if args.device.bus is not None}
    for name in names:
        path, rate = Bus.path(name, directory), (Bus.peek(name, directory) or 0.0) / 1e9
        if path.name in in_use:
            yield ok("buses", f"the emulated bus {name} has {rate:g} GB/s")
        elif name in wanted and wanted[name] != rate:
            found = f"{path} is of no process, and has {rate:g} GB/s where device.link_gb_per_s is {wanted[name]:g}"
            yield warning("buses", found, f"remove {path}: a bus keeps its bandwidth")
        else:
            yield note("buses", f"{path}, of {rate:g} GB/s, is of no process", f"remove {path} if nothing is to use it")
    if not names:
        yield ok("buses", "no emulated bus is left behind")


def _mapped_names(proc: Path) -> set[str]:
    """Names of the buses that some process has mapped, as far as this user may see."""
    found = set()
    for maps in proc.glob("[0-9]*/maps"):
        try:
            lines = maps.read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:  # it has ended, or is another user's
            continue
        found |= {line.rpartition("/")[2] for line in lines if "/selectn-bus-" in line}
    return found
