"""A request as admission and the board see it: what it needs of a replica, for whom, and where it has been."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

from deployments.messages import Priority


@dataclass(frozen=True, kw_only=True)
class Ask:
    """A request by its size and its standing, without its prompt: what every decision of this ingress goes by.

    It needs `tokens` of KV (prompt and the most output), and its first token within `ttft_s`. `least_tokens` is what it
    needs for certain, where the prompt's tokens are an estimate. `model` "": any will do.

    It came at `arrived_s`, and is not to go to `excluded`. `has_waited`: it had a place, and was not let in there.
    `retried_s`: when the replica that ran it died.
    """

    request_id: str
    tokens: int
    least_tokens: int
    prompt_tokens: int
    ttft_s: float | None = None
    prefixes: tuple[int, ...] = ()
    model: str = ""
    key: str = ""
    priority: Priority = "normal"
    arrived_s: float = 0.0
    excluded: frozenset[str] = frozenset()
    has_waited: bool = False
    retried_s: float | None = None

    def again(self, excluded: Collection[str] = ()) -> Ask:
        """One that had a place and was not let in: it is in front of those that came later."""
        return replace(self, has_waited=True, excluded=self.excluded.union(excluded))

    def after_death(self, replica_id: str, now_s: float) -> Ask:
        """One whose replica died: late or not, it is run on another."""
        return replace(self.again((replica_id,)), retried_s=now_s)
