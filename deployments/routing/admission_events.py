"""Who hears of what admission says to requests, for metrics; apart, since admission does not depend on it."""

from __future__ import annotations

from typing import Protocol


class AdmissionEvents(Protocol):
    """Called on the ingress's event loop."""

    def admitted(self, waited_s: float) -> None:
        """A replica has let a request in, so long after it came."""

    def started(self, ttft_s: float) -> None:
        """A request's first text is here, so long after it came."""

    def refused(self, reason: str, status: int) -> None:
        """A request is answered with an error before an engine has it; `reason` is the error's code."""

    def given_up(self, *, met: bool | None) -> None:
        """Who asked has left while it waited; whether it was within its objective still (None: it has none)."""


class Unheard:
    """For nobody."""

    def admitted(self, waited_s: float) -> None: ...
    def started(self, ttft_s: float) -> None: ...
    def refused(self, reason: str, status: int) -> None: ...
    def given_up(self, *, met: bool | None) -> None: ...
