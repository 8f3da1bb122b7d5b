"""All checks, one after the other: one that raises is a finding, and stops no other."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence

from deployments.commands.doctor import hardware, leftovers, limits, memory, network, records, software
from deployments.commands.doctor.findings import Finding, error, ok, warning
from deployments.commands.doctor.subject import Subject

logger = logging.getLogger(__name__)

Check = Callable[[Subject], Iterator[Finding]]


def check_config(subject: Subject) -> Iterator[Finding]:
    """The Serve config itself."""
    if subject.problem is not None:
        do = "correct it; what depends on the configuration was not looked at"
        yield error("config", subject.problem, do)
    else:
        yield ok("config", f"{subject.where} is valid")


CHECKS: tuple[Check, ...] = (
    check_config,
    software.check_versions,
    software.check_device,
    software.check_model,
    hardware.check_link,
    hardware.check_numa,
    memory.check_shared_memory,
    memory.check_host_memory,
    limits.check_locked_memory,
    limits.check_cpus,
    limits.check_files,
    limits.check_processes,
    network.check_ports,
    network.check_access,
    records.check_record,
    records.check_objectives,
    records.check_need,
    leftovers.check_stores,
    leftovers.check_buses,
)


def examine(subject: Subject, checks: Sequence[Check] = CHECKS) -> list[Finding]:
    """What every check has found, in their order."""
    return [finding for check in checks for finding in _findings(check, subject)]


def _findings(check: Check, subject: Subject) -> list[Finding]:
    found: list[Finding] = []
    try:
        for finding in check(subject):  # one by one: what comes before an error is kept
            found.append(finding)
    except Exception as reason:
        logger.debug("a check has failed", exc_info=True)
        name = check.__name__.removeprefix("check_").replace("_", " ")
        what = " ".join(f"{type(reason).__name__}: {reason}".split())
        found.append(
            warning(name, f"this could not be looked at: {what}", "`selectn --verbose doctor` has the details")
        )
    return found
