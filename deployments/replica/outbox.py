"""What has become final for the requests of one caller since it was last taken: merged by request.

So it never holds more than the text of those requests.
"""

from __future__ import annotations

from deployments.messages import Finished
from deployments.routing.frames import Piece


class Outbox:
    """Pieces to deliver, one of each inbox at most, in the order in which their first part came."""

    def __init__(self) -> None:
        self._pieces: dict[int, tuple[str, Finished | None]] = {}

    def __len__(self) -> int:
        return len(self._pieces)

    def put(self, inbox: int, text: str, end: Finished | None) -> None:
        """Adds text behind what waits for the inbox; nothing may follow an end."""
        waiting = self._pieces.get(inbox)
        if waiting is not None:
            assert waiting[1] is None, "text behind an end"
            text = waiting[0] + text
        self._pieces[inbox] = (text, end)

    def forget(self, inbox: int) -> None:
        """Nobody reads the inbox any more. Idempotent."""
        self._pieces.pop(inbox, None)

    def take(self) -> list[Piece]:
        """All that waits."""
        taken, self._pieces = self._pieces, {}
        return [(inbox, text, end) for inbox, (text, end) in taken.items()]
