"""The contract between the executor and a device: fixed memory, host memory the link can read, ordered copies."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Self

import torch

from selectn_core.device.link_usage import LinkUsage


class Event(ABC):
    """A point in the device's work that other work can wait for."""

    @abstractmethod
    def is_done(self) -> bool:
        """Whether the work before this point has finished."""

    @abstractmethod
    def synchronize(self) -> None:
        """Blocks the caller until it has; raises LinkError if that work was a copy that failed."""


class Timestamp(ABC):
    """A point in the compute order whose time is taken. Only the time between two of one device means anything."""

    @abstractmethod
    def since(self, earlier: Timestamp) -> float:
        """Seconds from `earlier` to this one; only after `Device.synchronize`."""


class Device(ABC):
    """Device memory of a fixed size, an ordered copy engine, and the compute order of the calling thread.

    Copies run in the order they are issued and overlap with compute. Compute is whatever the calling thread does
    on tensors of `torch_device`. `provenance` labels every figure taken on the device.
    """

    kind: str
    provenance: str
    torch_device: torch.device
    capacity_bytes: int

    @property
    def gpu_uuid(self) -> str | None:
        """Of the GPU that it is, as NVML names it; None for one that is none."""
        return None

    @property
    @abstractmethod
    def allocated_bytes(self) -> int:
        """Bytes of device memory given out by `allocate` and not freed."""

    @property
    def room_bytes(self) -> int | None:
        """Bytes that could really be had now, beside what `allocate` gave out; None: what the accounts say, always."""
        return None

    @property
    def free_bytes(self) -> int:
        """Bytes that `allocate` could still give out, were they in one piece."""
        return self.capacity_bytes - self.allocated_bytes

    @abstractmethod
    def allocate(self, num_bytes: int, purpose: str) -> torch.Tensor:
        """A uint8 tensor [num_bytes], aligned to ALIGNMENT_BYTES; its size is rounded up in the accounts.

        Raises DeviceMemoryExceeded, naming `purpose`, where it does not fit.
        """

    @abstractmethod
    def free(self, tensor: torch.Tensor) -> None:
        """Gives back what `allocate` returned; ValueError for anything else.

        A device may have the memory again only when the last tensor that views it has gone: drop them first.
        """

    @abstractmethod
    def allocate_host(self, num_bytes: int) -> torch.Tensor:
        """A uint8 tensor [num_bytes] in host memory that the link can read at full speed; it takes whole pages.

        It stays until the device is closed, and then until no tensor views it. Raises PinningRefused.
        """

    @property
    @abstractmethod
    def host_allocated_bytes(self) -> int:
        """Bytes of host memory that `allocate_host` has taken."""

    @abstractmethod
    def register_host(self, memory: torch.Tensor) -> None:
        """Lets the link read `memory` at full speed: a read-only mapping of a file that is open for writing, whole.

        It stays read-only. Raises PinningRefused where that cannot be had; then nothing has changed.
        """

    @abstractmethod
    def unregister_host(self, memory: torch.Tensor) -> None:
        """Undoes `register_host`, when no copy from `memory` is under way; ValueError for anything else."""

    @abstractmethod
    def copy_async(self, source: torch.Tensor, target: torch.Tensor, *, after: Event | None = None) -> Event:
        """Copies `source` to `target` (uint8, same size), one in host and one in device memory, once `after` happened.

        Returns at once; the event is done when the bytes are there.
        """

    @abstractmethod
    def copies_issued(self) -> Event:
        """An event that is done when every copy issued so far is, or has failed."""

    @abstractmethod
    def record(self) -> Event:
        """An event that is done when the compute issued so far by the calling thread is."""

    @abstractmethod
    def wait(self, event: Event) -> None:
        """Makes later compute of the calling thread wait for `event`; blocks the caller only if it has to.

        Raises LinkError if the event is a copy that failed.
        """

    @abstractmethod
    def synchronize(self) -> None:
        """Blocks until every copy and all compute issued so far is done."""

    @abstractmethod
    def timestamp(self) -> Timestamp:
        """Marks this point of the compute order."""

    @abstractmethod
    def peak_bytes(self, run: Callable[[], None]) -> int:
        """Calls `run`, waits for its work, and returns the most bytes that it had beyond what `allocate` gave out."""

    @abstractmethod
    def link_usage(self) -> LinkUsage:
        """What the host link has carried for this device so far: the copies that are done. Any thread may ask."""

    @abstractmethod
    def close(self) -> None:
        """Ends the copy engine and gives the memory back. Idempotent."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
