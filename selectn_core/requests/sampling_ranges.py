"""The numbers that a request may choose, each with its range: one source for what reads requests and what samples.

Apart from `sampling.py`, since the HTTP front imports no torch.
"""

from __future__ import annotations

from selectn_core.bounds import Bounds, Number

MAX_TOKEN_ID = 2**31 - 1


def _number(bounds: Bounds, *, is_whole: bool, is_optional: bool = False) -> Number:
    return Number(bounds=bounds, is_whole=is_whole, is_optional=is_optional, words=())


RANGES = {
    "max_tokens": _number(Bounds(at_least=1, at_most=2**31 - 1), is_whole=True),
    "temperature": _number(Bounds(at_least=0, at_most=2), is_whole=False),
    "top_p": _number(Bounds(above=0, at_most=1), is_whole=False),
    # 0 keeps all tokens.
    "top_k": _number(Bounds(at_least=0, at_most=2**63 - 1), is_whole=True),
    "seed": _number(Bounds(at_least=-(2**63), at_most=2**63 - 1), is_whole=True, is_optional=True),
}
