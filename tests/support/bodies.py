"""Bodies of requests that are refused."""

from __future__ import annotations

import json
from collections.abc import Mapping

import pytest
from pydantic import BaseModel

from deployments.api.errors import ApiError
from deployments.http.body import parsed_body


def problem(kind: type[BaseModel], body: Mapping[str, object]) -> ApiError:
    """Why this is no request of that kind."""
    with pytest.raises(ApiError) as caught:
        parsed_body(json.dumps(body).encode(), kind)
    assert caught.value.status == 400
    return caught.value
