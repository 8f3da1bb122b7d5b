"""The bytes of a response: one event is one line, for any reader of lines."""

from __future__ import annotations

import json
import sys

from deployments.api.protocol import ErrorDetail, ErrorResponse
from deployments.http.responses import ChatWriter, CompletionWriter, _event

LINE_ENDS = [char for char in map(chr, range(sys.maxunicode + 1)) if len(f"a{char}b".splitlines()) > 1]


def test_an_event_is_one_line_whatever_is_said() -> None:
    assert "\u2028" in LINE_ENDS
    text = "世é".join(["", *LINE_ENDS, ""])
    for body in (
        ChatWriter("id", "m").piece(text),
        CompletionWriter("id", "m").piece(text),
        ErrorResponse(error=ErrorDetail(message=text, type="t")),
    ):
        event = _event(body)
        assert event.endswith("\n\n")
        (line,) = event[:-2].splitlines()
        assert json.loads(line.removeprefix("data: ")) == body.model_dump(mode="json")
