"""What one field of a request may hold, as the API's own server takes it, and how it is named where it is wrong.

Strict: true is no number, "5" is no number, 5.0 is no whole number, and "yes" is neither true nor false.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Discriminator, FailFast, Field, Strict, Tag
from pydantic_core import PydanticCustomError, core_schema

from selectn_core.bounds import Number
from selectn_core.requests.sampling_ranges import MAX_TOKEN_ID

# What is shown of a name, or of a path to a field, that a client made up.
MAX_SHOWN_CHARS = 64
MAX_PATH_CHARS = 256
# What is shown of a number.
MAX_NUMBER_CHARS = 24

Flag = Annotated[bool, Strict()]


@dataclass(frozen=True)
class InRange:
    """Annotates a number: what pydantic would make one of is refused, as is what is out of range."""

    number: Number

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        """Pydantic's hook for a type that is annotated with this."""
        return core_schema.no_info_before_validator_function(self._checked, handler(source))

    def __get_pydantic_json_schema__(self, schema: Any, handler: Any) -> dict[str, Any]:
        """Pydantic's hook for what /openapi.json says of it."""
        bounds = self.number.bounds
        limits = {"minimum": bounds.at_least, "exclusiveMinimum": bounds.above, "maximum": bounds.at_most}
        return {**handler(schema), **{name: limit for name, limit in limits.items() if limit is not None}}

    def _checked(self, value: Any) -> Any:
        if self.number.allows(value):
            return value
        bounds = self.number.bounds
        limits = (("more than", bounds.above), ("at least", bounds.at_least), ("at most", bounds.at_most))
        told = {
            "kind": "a whole number" if self.number.is_whole else "a number",
            "limits": ", ".join(f"{word} {limit}" for word, limit in limits if limit is not None),
            "sent": _kind_or_number(value),
        }
        raise PydanticCustomError("no_number", "expected {kind}, {limits}, not {sent}", told)


def only(allowed: int) -> BeforeValidator:
    """Takes this number alone: true and 1.0 equal 1 in Python."""

    def check(value: Any) -> Any:
        if type(value) is not int or value != allowed:
            told = {"allowed": allowed, "sent": _kind_or_number(value)}
            raise PydanticCustomError("no_number", "expected {allowed}, not {sent}", told)
        return value

    return BeforeValidator(check)


def at_most(limit: int, *, at_least: int = 0) -> BeforeValidator:
    """Refuses a list of more than `limit`, before any of its items is validated."""

    def check(value: Any) -> Any:
        if isinstance(value, list) and len(value) < at_least:
            raise PydanticCustomError("too_few", "expected at least {at_least}", {"at_least": at_least})
        if isinstance(value, list) and len(value) > limit:
            message = "at most {limit} are allowed, and there are {count}"
            raise PydanticCustomError("too_many", message, {"limit": limit, "count": len(value)})
        return value

    return BeforeValidator(check)


def text_or_list(expected: str, *, batches: bool = False) -> Discriminator:
    """Of the union's branches, tagged <text>, <list> and <batch>, only the one that was meant says what is wrong."""

    def branch(value: Any) -> str | None:
        if batches and isinstance(value, list) and value and isinstance(value[0], str | list):
            return "<batch>"
        branches: dict[type, str] = {str: "<text>", list: "<list>", tuple: "<list>"}
        return branches.get(type(value))

    return Discriminator(branch, custom_error_type="no_text_or_list", custom_error_message=expected)


class FirstErrorEnds(FailFast):
    """pydantic's FailFast for lists within a union: what annotates those must have a hash."""

    __hash__ = object.__hash__


class BatchOfOne:
    """Annotates what stands alone in a list, and is taken out of it; larger batches are not served."""

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        """Pydantic's hook for a type that is annotated with this."""
        batch = core_schema.no_info_before_validator_function(_no_other, core_schema.list_schema(handler(source)))
        return core_schema.no_info_after_validator_function(lambda value: value[0], batch)


def _no_other(batch: list[Any]) -> list[Any]:
    if len(batch) > 1:
        raise PydanticCustomError("one_prompt", "only one prompt per request is served")
    return batch


def _not_empty(value: Any) -> Any:
    if not value:
        raise PydanticCustomError("empty", "is empty: expected at least one token")
    return value


TokenId = Annotated[int, Strict(), Field(ge=0, le=MAX_TOKEN_ID)]
TextPrompt = Annotated[str, AfterValidator(_not_empty), Tag("<text>")]
IdsPrompt = Annotated[tuple[TokenId, ...], FirstErrorEnds(), AfterValidator(_not_empty), Tag("<list>")]
_PROMPT = "expected text, or a list of token ids"
# [text] and [[ids]] are batches of one.
Prompt = Annotated[
    TextPrompt
    | IdsPrompt
    | Annotated[
        Annotated[TextPrompt | IdsPrompt, text_or_list(_PROMPT)],
        BatchOfOne(),
        Tag("<batch>"),
    ],
    text_or_list(_PROMPT, batches=True),
]

# What each of pydantic's errors says here, by its type. Its own words are about Python.
WORDS = {
    "missing": "is missing",
    **dict.fromkeys(("tuple_type", "list_type"), "expected a list"),
    **dict.fromkeys(("model_type", "model_attributes_type", "dict_type"), "expected an object"),
    **dict.fromkeys(("int_type", "int_parsing", "int_from_float", "int_parsing_size"), "expected a whole number"),
    **dict.fromkeys(("float_type", "float_parsing", "finite_number"), "expected a number"),
    **dict.fromkeys(("bool_type", "bool_parsing"), "expected true or false"),
    **dict.fromkeys(("string_type", "string_unicode"), "expected text"),
    "literal_error": "expected {expected}",
    "string_too_short": "expected {min_length} or more characters",
    "string_too_long": "expected at most {max_length} characters",
    "greater_than": "expected more than {gt}",
    "greater_than_equal": "expected at least {ge}",
    "less_than_equal": "expected at most {le}",
}
# Parts of pydantic's locations that are no part of the request.
BRANCHES = frozenset({"<text>", "<list>", "<batch>"})


def in_plain_words(kind: str, message: str, context: Mapping[str, Any]) -> str:
    """One of pydantic's errors; one of this server's own is its message."""
    return WORDS[kind].format_map(context) if kind in WORDS else message


def shown(text: str, limit: int = MAX_SHOWN_CHARS) -> str:
    """What a client sent, fit for a message: what is not printed is escaped, line breaks too, and the rest is cut off.

    What was made fit once stays as it is.
    """
    plain = "".join(each if each.isprintable() else _escaped(each) for each in text[: limit + 1])
    return plain if len(plain) <= limit else f"{plain[:limit]}..."


def path_to(parts: Sequence[str | int]) -> str | None:
    """('messages', 0, 'content') as "messages[0].content", each name and the whole made fit to be shown."""
    path = ""
    for part in parts:
        if len(path) > MAX_PATH_CHARS:
            break
        path += f"[{part}]" if isinstance(part, int) else f".{shown(part)}" if path else shown(part)
    return shown(path, MAX_PATH_CHARS) or None


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode()


def _kind_or_number(value: Any) -> str:
    """What was sent, in words; of a text no character, as it may be part of a prompt."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return shown(str(value), MAX_NUMBER_CHARS)
    kinds: dict[type, str] = {str: "text", list: "a list", dict: "an object"}
    return kinds.get(type(value), "null")
