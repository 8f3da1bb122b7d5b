"""Which models can be asked for follows the replicas that run, as they change while an ingress runs."""

from __future__ import annotations

import json
from typing import Any

import pytest

from deployments.api.errors import ApiError
from deployments.messages import ModelCard
from deployments.prompt_length import TextBound
from deployments.replica.report import served_fields
from deployments.routing.headroom_report import HeadroomReport
from deployments.routing.served_models import ServedModels, possible_names
from deployments.routing.shared_board import SharedBoard
from selectn_core.config import ModelConfig
from tests.support.routing import run


class Case:
    """The models of a board; who is asked directly has `asked`."""

    def __init__(self, *expected: str) -> None:
        self.shared, self.num_asked = SharedBoard(), 0
        self.asked = ModelCard(name="asked", max_model_len=10, created_unix_s=1)
        self.models = ServedModels(self.shared, self._ask, expected)

    async def _ask(self) -> ModelCard:
        self.num_asked += 1
        return self.asked

    def run(self, **replicas: str | HeadroomReport | None) -> None:
        """These replicas run, each with this model; None: it has not said."""
        reports = {
            name: report(name, model=model) if isinstance(model, str) else model for name, model in replicas.items()
        }
        with self.shared.locked() as board:
            board.observe(reports)

    async def status(self, name: str) -> int | str:
        try:
            return (await self.models.card(name)).name
        except ApiError as error:
            return error.status if error.status != 503 or error.retry_after_s is not None else "503 without a time"


def report(replica_id: str, **fields: Any) -> HeadroomReport:
    values = {"kv_capacity_tokens": 1000, "longest_request_tokens": 500, "max_requests": 8, "max_model_len": 100}
    return HeadroomReport(replica_id=replica_id, reported_s=1.0, **{**values, **fields})


def test_during_a_roll_each_name_is_known_as_long_as_a_replica_has_it() -> None:
    async def check() -> None:
        case = Case("new")
        case.run(a="old", b="old")
        assert (await case.status("old"), await case.status("new")) == ("old", 503)
        case.run(a="old", c=None)
        assert (await case.status("old"), await case.status("new"), await case.status("wrong")) == ("old", 503, 503)
        case.run(a="old", c="new")
        assert {card.name for card in await case.models.cards()} == {"old", "new"}
        assert (await case.status("old"), await case.status("new"), await case.status("wrong")) == ("old", "new", 404)
        case.run(c="new", d="new")
        assert (await case.status("old"), await case.status("new")) == (404, "new")
        assert case.num_asked == 0

    run(check)


def test_of_one_name_the_limits_are_those_of_who_loaded_it_last() -> None:
    async def check() -> None:
        case = Case()
        old = report("a", model="m", max_model_len=100, model_created_unix_s=1)
        case.run(a=old, b=report("b", model="m", max_model_len=200, model_created_unix_s=2))
        (card,) = await case.models.cards()
        assert (card.max_model_len, case.models.longest_tokens("m")) == (200, 200)
        case.run(a=old)
        assert case.models.longest_tokens("m") == 100
        assert case.models.longest_tokens("other") is None

    run(check)


@pytest.mark.parametrize("bound", [None, TextBound(max_chars=900, uncounted="\x04\x7f")])
def test_a_card_is_the_same_by_way_of_a_report(bound: TextBound | None) -> None:
    card = ModelCard(name="m", max_model_len=100, created_unix_s=2, text_bound=bound)
    said = report("a", **served_fields(card))
    read = HeadroomReport.from_json(json.loads(json.dumps(said.to_json())))

    async def check() -> None:
        case = Case()
        case.run(a=read)
        assert await case.models.card("m") == card

    run(check)


@pytest.mark.parametrize("fields", [{"most_prompt_chars": -1}, {"most_prompt_chars": 0.5}, {"uncounted_chars": None}])
def test_a_report_with_no_sensible_bound_is_none(fields: dict[str, Any]) -> None:
    assert HeadroomReport.from_json({**report("a", model="m").to_json(), **fields}) is None


def test_where_no_replica_has_reported_one_is_asked_again_whenever_the_replicas_change() -> None:
    async def check() -> None:
        case = Case()
        case.run(a=None)
        assert [await case.status("asked") for _ in range(3)] == ["asked"] * 3
        assert (case.num_asked, await case.status("wrong")) == (1, 404)
        case.asked = ModelCard(name="another", max_model_len=10, created_unix_s=2)
        case.run(b=None)
        assert (await case.status("asked"), await case.status("another")) == (404, "another")
        case.run()
        await case.status("another")
        case.asked = ModelCard(name="third", max_model_len=10, created_unix_s=3)
        assert await case.status("third") == "third", "what nobody has reported is not remembered"

    run(check)


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (ModelConfig(), "SmolLM2-135M-Instruct"),
        (ModelConfig(source="/models/tiny"), "tiny"),
        (ModelConfig(source="/models/tiny.gguf"), "tiny"),
        (ModelConfig(source="org/name"), "org/name"),
        (ModelConfig(source="/models/tiny", served_name="mine"), "mine"),
    ],
)
def test_the_name_to_come_is_known_before_a_replica_has_said_it(config: ModelConfig, name: str) -> None:
    assert name in possible_names(config)


def test_a_replica_that_serves_under_another_name_than_configured_is_not_expected() -> None:
    assert possible_names(ModelConfig(source="/models/tiny", served_name="mine")) == {"mine"}
