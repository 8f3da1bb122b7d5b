"""What may join a step: which requests begin, and how many tokens of prefill, so that all requests keep their TPOT.

Only requests that hold KV count. One that waits is judged as it would begin: whether the others keep their objectives
with it, and it its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from selectn_core.control.estimates import ComputeScale
from selectn_core.control.load import (
    PLANNED_SHARE,
    Load,
    Waiting,
    in_turn,
    prefill_pace_s,
    rounded_up,
    tpot_limit_s,
)
from selectn_core.latency.step_times import StepTimes
from selectn_core.latency.steps import Chunk, StepShape

_SMALLEST_CHUNK = 16
# Of a step that decodes, what its compute may take with a chunk of prefill in it: what is left hides copies.
_CHUNK_SHARE = 0.85

# Whether memory holds a batch that lacks so many bytes, with steps as short as this, at the bandwidth guaranteed.
HasMemory = Callable[[Load, float, int], bool]


@dataclass(frozen=True, kw_only=True)
class StepAdmission:
    """What the next step may take in: tokens of prefill, and the requests without KV that may begin, in their turn.

    `turn` are those that hold KV and have prefill to do, and those that may begin.
    """

    prefill_tokens: int
    beginning: Sequence[Waiting] = ()
    turn: Sequence[Waiting] = ()


class Joining:
    """Asked before every step. `tpot_s` and `limit_s` are what the steps are aimed at since then.

    `tpot_s` is the tightest TPOT objective that is aimed at, `limit_s` what steps may take for all of them, and
    `prefill_s_per_token` the pace at which prompts are in time.
    """

    def __init__(
        self, times: StepTimes, scales: Mapping[bool, ComputeScale], *, slowdown: float, max_tokens: int
    ) -> None:
        """`scales` of steps that only decode (True), and of others; `slowdown` as the controller's."""
        self._times, self._scales, self._slowdown, self._max_tokens = times, scales, slowdown, max_tokens
        self.tpot_s = self.limit_s = self.prefill_s_per_token = math.inf
        self._decoding: list[tuple[float, float]] = []  # of each: its TPOT, and what steps may take for it

    def admit(self, load: Load, lacking_bytes: int, has_memory: HasMemory) -> StepAdmission:
        """What may join the next step. Those who hold KV lack `lacking_bytes` of memory if nothing is offloaded."""
        unloaded_s = self.unloaded_s(load.decoding_now)
        self._decoding = [(each.tpot_s, tpot_limit_s(each, load.now_s, unloaded_s)) for each in load.decoding]
        beginning = self._beginning(load, lacking_bytes, has_memory) if load.candidates else []
        turn = [*load.begun, *beginning]
        self.prefill_s_per_token = prefill_pace_s(turn, load.now_s, self._max_tokens, self._full_chunk_s)
        return StepAdmission(prefill_tokens=self._join(load, turn), beginning=beginning, turn=turn)

    def _join(self, load: Load, turn: Sequence[Waiting]) -> int:
        """Tokens of prefill for the next step, which is aimed at what those want who will hold KV, and no others."""
        self._aim(load, load.begun)
        limit_s, tokens = self.limit_s, self._chunk(load, turn)
        num_reached = len(in_turn(turn, tokens))
        if num_reached <= load.num_begun:
            return tokens
        for num in range(num_reached, load.num_begun, -1):
            self._aim(load, turn[:num])
            if num == num_reached and self.limit_s == limit_s:
                return tokens
            tokens = self._chunk(load, turn[:num])
            if len(in_turn(turn, tokens)) >= num:
                return tokens
        self._aim(load, load.begun)
        return self._chunk(load, load.begun)

    def _aim(self, load: Load, holding: Sequence[Waiting]) -> None:
        """Sets what steps may take: for those who decode, and for those who hold KV and will.

        An objective that the unloaded step exceeds is missed whatever is done: it is not aimed at, unless all are so.
        """
        reachable_s = self._times.expected_s(load.decoding_now) * self._scales[True].middle
        wanted = [*self._decoding, *_limits(holding)]
        aimed_at = [each for each in wanted if each[0] >= reachable_s] or wanted
        self.tpot_s = min((tpot_s for tpot_s, _ in aimed_at), default=math.inf)
        self.limit_s = min((limit_s for _, limit_s in aimed_at), default=math.inf)

    # -- who begins ---------------------------------------------------------------------------------------------

    def _beginning(self, load: Load, lacking_bytes: int, has_memory: HasMemory) -> list[Waiting]:
        """Who may begin, in their turn: with them decoding everybody is within the objective still, themselves too.

        One may where nobody else runs: it is not served better later.
        """
        num, num_keys = len(load.decoding) + load.num_begun, load.mean_kv_tokens * len(load.decoding)
        num_keys += sum(each.num_keys for each in load.begun)
        alone_s = self._alone_s(load)  # a request that would be too slow alone does not keep others from beginning
        wanted = [*self._decoding, *_limits(load.begun)]
        limit_s = min((most_s for tpot_s, most_s in wanted if alone_s <= PLANNED_SHARE * tpot_s), default=math.inf)
        beginning: list[Waiting] = []
        for each in load.candidates:
            keys, lacks_bytes = num_keys + each.num_keys, lacking_bytes + each.kv_bytes
            with_it = load.joined_by([*beginning, each])
            unloaded_s = self.unloaded_s(with_it.decode_step(num + 1, rounded_up(-(-keys // (num + 1)))))
            own_s = PLANNED_SHARE * each.tpot_s
            if self._alone_s(load.joined_by([each], 0), each.num_keys) > own_s:
                own_s = math.inf  # it is missed in any case, and hurries nobody
            if num and unloaded_s > limit_s:
                break
            if num and own_s < limit_s:  # it wants shorter steps than there are
                beside = with_it.step_with([Chunk(_SMALLEST_CHUNK, 0)], rounded_up(load.mean_kv_tokens))
                is_fast = max(unloaded_s, (1 + self._slowdown) * self.unloaded_s(beside)) <= own_s
                if not (is_fast and has_memory(with_it, own_s, lacks_bytes)):
                    if load.now_s < each.passed_until_s:
                        continue
                    break
            beginning.append(each)
            num, num_keys, lacking_bytes, limit_s = num + 1, keys, lacks_bytes, min(limit_s, own_s)
        return beginning

    def tightest_kept_tpot_s(self, load: Load) -> float:
        """The smallest TPOT objective, of those who hold KV, that can be kept at all; infinite without any."""
        alone_s = self._alone_s(load)
        tpots_s = (each.tpot_s for each in load.holding)
        return min((tpot_s for tpot_s in tpots_s if alone_s <= PLANNED_SHARE * tpot_s), default=math.inf)

    def _alone_s(self, load: Load, num_keys: int | None = None) -> float:
        """Of one request that decodes with nobody beside it; `num_keys` None: as short as can be."""
        return self.unloaded_s(load.alone if num_keys is None else load.decode_step(1, rounded_up(num_keys)))

    # -- how much prefill ---------------------------------------------------------------------------------------

    def _chunk(self, load: Load, turn: Sequence[Waiting]) -> int:
        """Tokens of prefill for the next step: what its compute has room for, more where TTFT wants it, some if any."""
        batch, kv_tokens = len(load.decoding), load.mean_kv_tokens
        room = min(self._max_tokens - batch, sum(each.prefill_tokens for each in turn))
        alone_s = self._alone_s(load)
        if room <= 0 or not any(alone_s <= PLANNED_SHARE * each.tpot_s for each in load.decoding):
            return max(0, room)  # nobody's next token can be in time or late
        needed = max(_SMALLEST_CHUNK, self.limit_s / self.prefill_s_per_token)
        slowed = 1 + self._slowdown  # beside a link that is always busy, as it is where most is offloaded
        for tokens in chunks(room):
            unloaded_s = slowed * self.unloaded_s(load.step_with(in_turn(turn, tokens), kv_tokens))
            if unloaded_s <= (self.limit_s if tokens <= needed else _CHUNK_SHARE * self.limit_s):
                return tokens
        return 0

    def _full_chunk_s(self, num_past: int) -> float:
        return self._times.expected_s(StepShape.prefill(self._max_tokens, rounded_up(num_past)))

    def unloaded_s(self, shape: StepShape) -> float:
        """Seconds of a step with nothing offloaded, on the careful side."""
        return self._times.expected_s(shape) * self._scales[shape.is_decode_only].high


def _limits(holding: Sequence[Waiting]) -> list[tuple[float, float]]:
    """TPOT of each, and what steps may take for it."""
    return [(each.tpot_s, PLANNED_SHARE * each.tpot_s) for each in holding]


def chunks(most: int) -> Iterator[int]:
    """Sizes of a chunk of prefill to try, from the largest down: a long prompt goes on token by token at last."""
    while most:
        yield most
        most = most * 3 // 4
