"""A fake of CUDA on the CPU whose streams and events are logical: `CudaDevice` as it is, under a race checker.

Memory and registration are those of `tests/standins/fake_cuda.py`. Copies happen at once. What orders them is noted,
and nothing is timed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import pytest
import torch
from transformers.generation.continuous_batching import ContinuousBatchingManager
from transformers.generation.continuous_batching.input_outputs import ContinuousBatchingIOs

import selectn_core.batching.attention as attention_module
import selectn_core.device.cuda as cuda_module
import selectn_core.engine.engine as engine_module
from selectn_core.config import DeviceConfig
from selectn_core.device.cuda import CudaDevice, CudaEvent
from tests.standins.fake_cuda import FakeCuda, install
from tests.support.streams import Checker, Event, Stream

_TOTAL_BYTES = 1 << 40


class _CudaEvent(Event):
    """As `torch.cuda.Event`."""

    def elapsed_time(self, later: Event) -> float:
        """An error on a GPU where one of the two is not done."""
        if not (self.query() and later.query()):
            self._checker.found("the host asks for the time between two events, and does not know that they are done")
        return 0.0


class LogicalDevice(CudaDevice):
    """A fake: what `CudaDevice` does, on streams that are only said to be there."""

    kind = "logical"
    provenance = "fake"

    @property
    def checker(self) -> Checker:
        return cast("Stream", self._copy_stream).checker

    def never(self) -> CudaEvent:
        """What a mutant has in the place of `record()`: an event that orders nothing."""
        event = CudaEvent.__new__(CudaEvent)
        event._events = cuda_module.CudaEvents(timed=False)
        event.event = cuda_module.torch.cuda.Event()
        return event


class LogicalCuda(FakeCuda):
    """Streams are those of a checker; `calls` has every time that the whole device was waited for."""

    def __init__(self, checker: Checker) -> None:
        super().__init__()
        self.total_bytes = self.driver_free_bytes = _TOTAL_BYTES
        self._checker = checker
        # In the place of methods: their types are others.
        vars(self).update(
            Event=lambda enable_timing=False: _CudaEvent(checker),
            Stream=lambda _: Stream(checker, f"copy stream {len(checker.streams)}"),
            stream=checker.on,
            current_stream=lambda _: checker.current,
        )

    def synchronize(self, _: object) -> None:
        self.calls.append("synchronize")
        for stream in self._checker.streams:
            stream.synchronize()

    def reset_peak_memory_stats(self, _: object) -> None: ...

    def max_memory_reserved(self, _: object) -> int:
        return 0


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
        install(patch, LogicalCuda(checker))
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
