"""Where a store of shared weights may be, and whether its bytes are to be had there."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from selectn_core.config import HostConfig
from selectn_core.device.host_memory import SHARED_MEMORY, available_host_memory, free_bytes, is_in_memory
from selectn_core.errors import ConfigError, HostMemoryExceeded
from selectn_core.weights.store_files import FILES, distinct_directories

logger = logging.getLogger(__name__)

# Asked before host memory is used: bytes, and the name under which processes of the node share them (None: this process
# alone). Raises HostMemoryExceeded where they are not to be had. Asking for the same again does no harm.
ReserveHost = Callable[[int, str | None], None]


def reserve_nothing(num_bytes: int, shared_as: str | None) -> None:
    """For a process that shares its node's host memory with nobody."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """A directory, and whether its files are host memory."""

    directory: Path
    in_memory: bool


def usable_places(host: HostConfig) -> list[Place]:
    """Where a store may be, in the order of preference. Raises ConfigError where there is no such directory."""
    configured = Path(host.directory) if host.directory is not None else None
    places = []
    if host.weights != "file":
        places.append(Place(directory=configured or SHARED_MEMORY, in_memory=True))
    if host.weights == "file":
        places.append(Place(directory=configured or FILES, in_memory=False))
    if host.weights == "auto":
        places.append(Place(directory=FILES, in_memory=False))
    usable = [place for place in places if os.access(place.directory, os.W_OK | os.X_OK)]
    if not usable:
        tried = " and ".join(str(place.directory) for place in places)
        raise ConfigError(f"{tried} is no directory this user can write to: set host.directory to one")
    distinct = distinct_directories([place.directory for place in usable])
    if len(distinct) < len(usable):  # two that are one are what they are
        return [Place(directory=each, in_memory=is_in_memory(each)) for each in distinct]
    return usable


def place_for(places: Sequence[Place], num_bytes: int, reserve: Callable[[], None]) -> Place:
    """The first place with room for `num_bytes`. Raises HostMemoryExceeded, saying what to set, if there is none."""
    reasons: list[str] = []
    for place in places:
        reason = _why_not(place, num_bytes) or (_why_refused(reserve) if place.in_memory else None)
        if reason is None:
            for passed_over in reasons:
                logger.warning("%s; the weights go to a mapped file in %s instead", passed_over, place.directory)
            return place
        reasons.append(reason)
    raise HostMemoryExceeded("; ".join(reasons))


def _why_refused(reserve: Callable[[], None]) -> str | None:
    try:
        reserve()
    except HostMemoryExceeded as error:
        return str(error)
    return None


def _why_not(place: Place, num_bytes: int) -> str | None:
    free = free_bytes(place.directory)
    if not place.in_memory:
        if num_bytes <= free:
            return None
        return (
            f"{place.directory} has {free:,} bytes free and the weights take {num_bytes:,}: set host.directory to "
            "one with more room and host.weights to 'file'"
        )
    if num_bytes > free:
        return (
            f"{place.directory} has {free:,} bytes free and the weights take {num_bytes:,}: make it larger (docker "
            f"run --shm-size={-(-num_bytes // 2**30) + 1}g; in Kubernetes an emptyDir with medium: Memory mounted "
            "there), or set host.directory to a larger tmpfs"
        )
    memory = available_host_memory()
    if num_bytes > memory.available_bytes:
        return (
            f"the weights take {num_bytes:,} bytes of host memory and {memory.available_bytes:,} are left by "
            f"{memory.limited_by}: raise that limit, or set host.weights to 'file'"
        )
    return None
