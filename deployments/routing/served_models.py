"""Which models there are: what the replicas that run now say that they serve.

That changes while an ingress runs: in a rolling redeploy with another name some replicas have the one and some the
other. So nothing is remembered for longer than the board's set of replicas stays as it is.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection
from pathlib import Path

from deployments.api.errors import model_not_found, unavailable
from deployments.messages import ModelCard
from deployments.prompt_length import TextBound
from deployments.routing.headroom_report import HeadroomReport
from deployments.routing.shared_board import SharedBoard
from selectn_core.config import ModelConfig
from selectn_core.weights.embedded_model import SERVED_NAME


class ServedModels:
    """The cards of the models that can be asked for now."""

    def __init__(
        self, shared: SharedBoard, ask_any: Callable[[], Awaitable[ModelCard]], expected: Collection[str] = ()
    ) -> None:
        """`ask_any` asks some replica, where none has reported. `expected`: names that replicas may yet come with."""
        self._shared, self._ask_any, self._expected = shared, ask_any, frozenset(expected)
        self._asked: tuple[frozenset[str], ModelCard] | None = None

    async def cards(self) -> tuple[ModelCard, ...]:
        """One for each name, of the replica that has loaded it last. Raises ApiError 503 where there is no replica."""
        reported = self._reported()
        return tuple(reported.values()) if reported else (await self._asked_card(),)

    async def card(self, name: str) -> ModelCard:
        """Raises ApiError: 404 for a name that no replica has, 503 where one may come to have it."""
        cards = {card.name: card for card in await self.cards()}
        if name in cards:
            return cards[name]
        with self._shared.locked() as board:
            num_unnamed, num_replicas = board.num_unnamed, len(board.replica_ids)
        if name in self._expected or (num_unnamed and num_replicas > 1):
            raise unavailable(f"no replica serves the model '{name}' yet; retry later")
        raise model_not_found(name, "', '".join(cards))

    def longest_tokens(self, name: str) -> int | None:
        """What a request for the model may have at all, as far as replicas have said."""
        card = self._reported().get(name)
        return card.max_model_len if card is not None else None

    @property
    def most_tokens(self) -> int | None:
        """What a request for whichever model may have at most, as far as replicas have said."""
        return max((card.max_model_len for card in self._reported().values()), default=None)

    def _reported(self) -> dict[str, ModelCard]:
        with self._shared.locked() as board:
            models = board.models()
        return {name: _card_in(report) for name, report in models.items()}

    async def _asked_card(self) -> ModelCard:
        if self._asked is not None and self._asked[0] == self._replica_ids:
            return self._asked[1]
        card = await self._ask_any()
        self._asked = (self._replica_ids, card) if self._replica_ids else None
        return card

    @property
    def _replica_ids(self) -> frozenset[str]:
        with self._shared.locked() as board:
            return board.replica_ids


def possible_names(config: ModelConfig) -> frozenset[str]:
    """What the model may be called, by its configuration alone: which file it is only the replica's node can see."""
    if config.served_name is not None:
        return frozenset((config.served_name,))
    if config.source == "embedded":
        return frozenset((SERVED_NAME,))
    return frozenset((config.source, Path(config.source).name, Path(config.source).stem))


def _card_in(report: HeadroomReport) -> ModelCard:
    bound = None
    if report.most_prompt_chars is not None:
        bound = TextBound(max_chars=report.most_prompt_chars, uncounted=report.uncounted_chars)
    return ModelCard(
        name=report.model,
        max_model_len=report.max_model_len,
        created_unix_s=report.model_created_unix_s,
        text_bound=bound,
    )
