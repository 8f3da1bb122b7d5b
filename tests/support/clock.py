"""A clock that stands still until a test moves it."""

from __future__ import annotations

from collections.abc import Callable


class Clock:
    """Modelled time: `now_s` is set, or `sleep` makes it pass."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.on_sleep: Callable[[], None] = lambda: None

    def __call__(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds
        self.on_sleep()
