"""The errors a caller is expected to handle, each saying what to change."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


class SelectNError(Exception):
    """Base class of every expected error of this project."""


class ConfigError(SelectNError, ValueError):
    """A configuration value is not allowed; the message names the field, the value and what is allowed."""


class UnsupportedModel(SelectNError):
    """The model cannot be served with offloading; the message says which property of it is in the way."""


class DeviceMemoryExceeded(SelectNError, MemoryError):
    """An allocation does not fit the device's fixed memory; the message gives wanted, free and capacity bytes."""


class HostMemoryExceeded(SelectNError, MemoryError):
    """The weights do not fit where they were to go; the message says what limits it and what to set."""


class StoreRefused(SelectNError):
    """A file that should be a host store cannot be trusted or used; the message says which, why, and what to do."""


class LockHeld(SelectNError):
    """Another process has had a file's lock for too long; the message says which process and file."""


class RecordRefused(SelectNError):
    """A performance record cannot be read, or is of something else than what runs; the message says what differs."""


class NotMeasured(SelectNError):
    """A step of this size was never measured, so nothing is known of what it takes."""


class PinningRefused(SelectNError):
    """The pages of host memory cannot be locked for a link; the message says why, and what to change."""


class LinkError(SelectNError):
    """A host-to-device copy failed, and repeating it did not help."""


class RequestError(SelectNError, ValueError):
    """A request asks for something that is not allowed.

    Attributes:
        field: the request field at fault, or None when it is the request as a whole.
    """

    def __init__(self, message: str, *, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field


class RequestTooLarge(RequestError):
    """The model could serve the request, but this device's memory never holds it."""


class EngineOverloaded(SelectNError):
    """The waiting queue is full; the request was not taken and may be sent again later."""


class EngineUnavailable(SelectNError):
    """The engine is not running (not started, closed, or failed beyond repair)."""


@dataclass(frozen=True, kw_only=True)
class Change:
    """One quantity: what it is now, and what alone would make a plan feasible (None: nothing realistic would)."""

    quantity: str
    unit: str  # bytes, bytes/s, s, or x for a factor
    now: float | None
    needed: float | None

    def __str__(self) -> str:
        if self.needed is None:
            return f"{self.quantity}: no amount of it would be enough"
        if self.unit == "x":
            return f"{self.quantity}: {self.needed:.2f} times as fast"
        assert self.now is not None
        return f"{self.quantity}: {_shown(self.needed, self.unit)} instead of {_shown(self.now, self.unit)}"


class Infeasible(SelectNError):
    """No plan meets the objectives and fits memory.

    Attributes:
        limiting: the quantity that stands in the way first: compute, device memory, host memory, or link bandwidth.
        changes: for each quantity the smallest change that would be enough by itself.
    """

    def __init__(self, *, limiting: str, changes: Sequence[Change]) -> None:
        self.limiting, self.changes = limiting, tuple(changes)
        enough = [str(change) for change in changes if change.needed is not None]
        remedy = "any one of these is enough:\n  " + "\n  ".join(enough) if enough else "no single change is enough"
        super().__init__(f"no plan meets the objectives; the limit is {limiting}; {remedy}")


def _shown(value: float, unit: str) -> str:
    """For people, rounded up: what is named must be enough."""
    scale, digits, name = {"bytes": (1 << 30, 4, "GiB"), "bytes/s": (1e9, 3, "GB/s"), "s": (1e-3, 2, "ms")}[unit]
    return f"{math.ceil(value / scale * 10**digits) / 10**digits:.{digits}f} {name}"
