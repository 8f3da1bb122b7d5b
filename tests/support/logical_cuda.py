"""A stand-in for CUDA on the CPU: `CudaDevice` as it is, over streams and events that are logical.

Copies happen at once. Nothing is timed; `provenance` says that it is a fake.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from transformers.generation.continuous_batching import ContinuousBatchingManager
from transformers.generation.continuous_batching.input_outputs import ContinuousBatchingIOs

import selectn_core.batching.attention as attention_module
import selectn_core.device.cuda as cuda_module
import selectn_core.engine.engine as engine_module
from selectn_core.config import DeviceConfig
from selectn_core.device.cuda import CudaDevice, CudaEvent
from tests.support.streams import Checker, Event, Stream

_CAPACITY_BYTES = 1 << 40


class _TimedEvent(Event):
    """As `torch.cuda.Event`."""

    _time_s = 0.0

    def record(self, stream: Stream) -> None:
        super().record(stream)
        self._time_s = time.perf_counter()

    def elapsed_time(self, end: _TimedEvent) -> float:
        return (end._time_s - self._time_s) * 1e3


class LogicalDevice(CudaDevice):
    """A fake: what `CudaDevice` does, on streams that are only said to be there."""

    kind = "logical"
    provenance = "fake"

    def never(self) -> CudaEvent:
        """What a test puts in the place of `record()`: an event that orders nothing."""
        event = CudaEvent.__new__(CudaEvent)
        event.event = cuda_module.torch.cuda.Event()
        return event


class _Cuda:
    """What `CudaDevice` uses of `torch.cuda`."""

    def __init__(self, checker: Checker) -> None:
        self._checker = checker
        self.Event = lambda enable_timing=False: _TimedEvent(checker)
        self.Stream = lambda _: Stream(checker, f"copy stream {len(checker.streams)}")
        self.stream = checker.on

    def current_stream(self, _: Any = None) -> Stream:
        return self._checker.current

    def synchronize(self, _: Any = None) -> None:
        for stream in self._checker.streams:
            stream.synchronize()

    def mem_get_info(self, _: Any) -> tuple[int, int]:
        return _CAPACITY_BYTES, _CAPACITY_BYTES

    def empty_cache(self) -> None: ...

    def reset_peak_memory_stats(self, _: Any) -> None: ...

    def memory_reserved(self, _: Any) -> int:
        return 0

    max_memory_reserved = memory_reserved


class _Torch:
    """What `CudaDevice` uses of `torch`."""

    def __init__(self, checker: Checker) -> None:
        self._checker = checker
        self.cuda = _Cuda(checker)

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def device(self, *_: Any) -> torch.device:
        return torch.device("cpu")

    def empty(
        self, num_bytes: int, *, device: Any = None, dtype: torch.dtype = torch.uint8, pin_memory: bool = False
    ) -> torch.Tensor:
        tensor = torch.empty(num_bytes, dtype=torch.uint8)
        if pin_memory:
            self._checker.shadow(tensor, is_host=True)
        return tensor


@contextmanager
def logical_cuda(memory_share: float = 1.0) -> Iterator[Checker]:
    """Meanwhile engines compute on logical streams, as transformers has it: on one of its own, inputs on the default.

    Their device has `memory_share` of what everything would take. What the calling thread and generation threads do is
    checked.
    """
    checker = Checker()
    make_ios, tolist = ContinuousBatchingIOs.__init__, torch.Tensor.tolist
    run_loop = ContinuousBatchingManager._run_generation_loop

    def make_ios_with_a_stream(self: Any, *args: Any, **kwargs: Any) -> None:
        make_ios(self, *args, **kwargs)
        self.compute_stream = Stream(checker, f"compute stream {len(checker.streams)}")

    def watched_loop(self: Any) -> None:
        with checker.watching():
            run_loop(self)

    def open_device(_: DeviceConfig, *, default_capacity_bytes: int) -> LogicalDevice:
        return LogicalDevice(int(memory_share * default_capacity_bytes))

    def record_stream(tensor: torch.Tensor, stream: Stream) -> None:
        checker.shadow(tensor).recorded.add(stream.number)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda_module, "torch", _Torch(checker))
        patch.setattr(engine_module, "open_device", open_device)
        patch.setattr(ContinuousBatchingIOs, "__init__", make_ios_with_a_stream)
        patch.setattr(ContinuousBatchingManager, "_run_generation_loop", watched_loop)
        patch.setattr(torch.cpu, "stream", checker.on)  # what transformers' `stream_context` comes to
        patch.setattr(torch.Tensor, "tolist", lambda tensor: checker.to_list(tolist, tensor))
        patch.setattr(torch.Tensor, "record_stream", record_stream)
        # Sparse matrices are for the CPU.
        patch.setattr(attention_module, "can_attend_in_place", lambda keys: False)
        with checker.watching():
            yield checker
