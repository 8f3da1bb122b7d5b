"""What interval, slots and finer units free, and where even placement reaches T_bound: every case, by the recurrence.

Modelled: no model runs and nothing is timed. Layers are alike and compute one unit of time each; a copy of one takes r,
the rest of the step R. Blocks are the layers' attention and MLP, ATTENTION_SHARE of bytes and of compute in the first,
as in a model whose MLP has twice the attention's parameters (OPT, Llama-2). Freed memory is in layers, less the slots.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from itertools import combinations
from pathlib import Path
from statistics import median
from typing import Any

from tqdm import tqdm

from benchmarks.common import Check, finish, parse_arguments
from selectn_core.latency.placement import best_placement, place_by_index, place_evenly, place_integer_interval
from selectn_core.latency.recurrence import Link, StepCosts, bound_s, predict_step_s
from selectn_core.memory.memory_model import MemoryModel, kv_of_tokens
from selectn_core.memory.workspace import Workspace
from selectn_core.planning.candidates import Objective, UnitSet
from selectn_core.planning.search import PlanRange, search

LAYERS = range(12, 81)
TABLE_LAYERS = (32, 40, 80)
COPY_RATIOS = (0.25, 0.5, 1.0, 2.0, 3.5, 5.0, 8.0, 13.8)
BOUND_COPY_RATIOS = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0, 2.5, 3.0, 3.5, 4.0, 5.0, 6.5, 8.0, 10.0, 13.8)
RESTS = (0.0, 1.0, 4.0)
MAX_SLOTS = 4
TOLERANCE = 1.1  # times the unloaded step
ATTENTION_SHARE = 1 / 3
SUBSET_LAYERS = 10
_SECTOR = 256
_LAYER_BYTES = 3 * _SECTOR


def main() -> int:
    arguments = parse_arguments(
        __doc__ or "",
        [
            ("--plot", {"type": Path, "metavar": "FILE", "help": "draw freed layers and steps over T_bound"}),
            ("--markdown", {"type": Path, "metavar": "FILE", "help": "write the tables of docs/algorithm.md"}),
        ],
    )
    layers = TABLE_LAYERS if arguments.quick else LAYERS
    cells = [(n, r, rest) for n in layers for r in COPY_RATIOS for rest in RESTS if rest == 0 or n in TABLE_LAYERS]
    samples = [_freed(*cell) for cell in tqdm(cells, desc="freed within the tolerance")]
    samples += list(_bound_samples(layers))
    samples.append(_subset_sample(8 if arguments.quick else SUBSET_LAYERS))
    print(markdown_tables(samples))
    if arguments.markdown:
        arguments.markdown.write_text(markdown_tables(samples), encoding="utf-8")
    if arguments.plot:
        from benchmarks.plots import plot_enumeration  # late: matplotlib is only needed here

        plot_enumeration(samples, arguments.plot)
    return finish(arguments, "modelled", samples, _checks(samples))


# -- what is freed --------------------------------------------------------------------------------------------------


def _freed(num_layers: int, ratio: float, rest: float) -> dict[str, Any]:
    layers, blocks = layer_costs(num_layers, rest), block_costs(num_layers, rest)
    link = Link(bytes_per_s=_LAYER_BYTES / ratio)
    sets = {
        "blocks": None,
        "MLP": tuple(range(1, 2 * num_layers, 2)),
        "attention": tuple(range(0, 2 * num_layers, 2)),
    }
    any_k, best = (_search({"layers": None}, layers, link, slots) for slots in (1, MAX_SLOTS))
    finer = _search(sets, blocks, link, MAX_SLOTS)
    return {
        "what": "freed",
        "num_layers": num_layers,
        "copy_ratio": ratio,
        "rest": rest,
        "paper": _paper_freed(layers, link),
        "any_k_one_slot": _in_layers(any_k),
        "best_slots": _in_layers(best),
        "best_slots_plan": _shown(best),
        "blocks": _in_layers(finer),
        "blocks_plan": _shown(finer),
    }


def layer_costs(num_layers: int, rest: float) -> StepCosts:
    """Layers alike, one unit of compute each."""
    return StepCosts(compute_s=(1.0,) * num_layers, unit_bytes=(_LAYER_BYTES,) * num_layers, rest_s=rest)


def block_costs(num_layers: int, rest: float) -> StepCosts:
    """The same step with attention and MLP as units."""
    compute = (ATTENTION_SHARE, 1 - ATTENTION_SHARE) * num_layers
    return StepCosts(compute_s=compute, unit_bytes=(_SECTOR, _LAYER_BYTES - _SECTOR) * num_layers, rest_s=rest)


def _search(sets: dict[str, tuple[int, ...] | None], costs: StepCosts, link: Link, max_slots: int) -> PlanRange:
    memory = MemoryModel(resident_bytes=0, kv=kv_of_tokens(_SECTOR // 16), workspace=Workspace(), max_slots=max_slots)
    objectives = (Objective(name="step", limit_s=TOLERANCE * costs.unloaded_s, steps=(costs,)),)
    return search(
        [UnitSet(name=name, objectives=objectives, memory=memory, among=among) for name, among in sets.items()], link
    )


def _paper_freed(costs: StepCosts, link: Link) -> int:
    """The largest k = floor(L / N) of an integer N within the tolerance, less its one slot."""
    limit_s = TOLERANCE * costs.unloaded_s * (1 + 1e-9)
    num_layers = len(costs.compute_s)
    plans = (place_integer_interval(interval, num_layers) for interval in range(1, num_layers + 1))
    within = [len(plan) for plan in plans if predict_step_s(costs, plan, 1, link) <= limit_s]
    return max(0, max(within, default=0) - 1)


def _in_layers(found: PlanRange) -> float:
    return round(found.freed_bytes / _LAYER_BYTES, 3)


def _shown(found: PlanRange) -> str:
    if not found.plan.offloaded:
        return "nothing"
    return f"{found.unit_set}, k={found.plan.num_offloaded}, S={found.plan.num_slots}"


# -- where even placement reaches the bound -------------------------------------------------------------------------


def _bound_samples(layers: Iterable[int]) -> Iterator[dict[str, Any]]:
    """Per R, r and S: steps over T_bound of every L and k > S, by the faster of both placements and by each alone."""
    for rest in RESTS:
        for ratio in tqdm(BOUND_COPY_RATIOS, desc=f"even placement over T_bound, R = {rest:g}"):
            for slots in range(1, MAX_SLOTS + 1):
                yield _bound_sample(layers, rest, ratio, slots)


def _bound_sample(layers: Iterable[int], rest: float, ratio: float, slots: int) -> dict[str, Any]:
    link = Link(bytes_per_s=_LAYER_BYTES / ratio)
    in_time, by_index, places = [], [], []
    for n in layers:
        costs = layer_costs(n, rest)
        for k in range(slots + 1, n + 1):
            in_time.append(_over_bound(costs, place_evenly(k, costs), slots, link))
            by_index.append(_over_bound(costs, place_by_index(k, n), slots, link))
            places.append((n, k))
    faster = [min(pair) for pair in zip(in_time, by_index, strict=True)]
    worst = max(range(len(faster)), key=faster.__getitem__)
    return {
        "what": "bound",
        "rest": rest,
        "copy_ratio": ratio,
        "num_slots": slots,
        "num_cases": len(faster),
        "at_bound": sum(over <= 1 + 1e-6 for over in faster) / len(faster),
        "median": median(faster),
        "worst": faster[worst],
        "worst_at": "L={}, k={}".format(*places[worst]),
        "worst_in_time": max(in_time),
        "worst_by_index": max(by_index),
        "worst_where_k_divides_layers": max(over for over, (n, k) in zip(faster, places, strict=True) if n % k == 0),
    }


def _over_bound(costs: StepCosts, offloaded: tuple[int, ...], num_slots: int, link: Link) -> float:
    return predict_step_s(costs, offloaded, num_slots, link) / bound_s(costs, offloaded, num_slots, link)


def _subset_sample(num_layers: int) -> dict[str, Any]:
    """The placement that is used, against the fastest of all subsets of a small model."""
    ratios = []
    for rest in RESTS:
        costs = layer_costs(num_layers, rest)
        for ratio in tqdm(COPY_RATIOS, desc=f"every subset of {num_layers} layers, R = {rest:g}"):
            link = Link(bytes_per_s=_LAYER_BYTES / ratio)
            for slots in (1, 2, 3):
                for k in range(slots + 1, num_layers + 1):
                    used = predict_step_s(costs, best_placement(k, slots, costs, link).offloaded, slots, link)
                    fastest = min(
                        predict_step_s(costs, subset, slots, link) for subset in combinations(range(num_layers), k)
                    )
                    ratios.append(used / fastest)
    return {
        "what": "subsets",
        "num_layers": num_layers,
        "num_cases": len(ratios),
        "fastest": sum(ratio <= 1 + 1e-6 for ratio in ratios) / len(ratios),
        "worst": max(ratios),
    }


# -- checks and tables ----------------------------------------------------------------------------------------------


def _checks(samples: list[dict[str, Any]]) -> list[Check]:
    freed = [s for s in samples if s["what"] == "freed"]
    bound = [s for s in samples if s["what"] == "bound"]
    two_slots = [s for s in bound if s["num_slots"] == 2 and s["rest"] == 0]
    return [
        Check(
            name="step over T_bound, S = 2, R = 0, k divides L: worst",
            value=max(s["worst_where_k_divides_layers"] for s in two_slots),
            target="<= 1.000001",
        ),
        Check(
            name="step over T_bound, S = 1: worst",
            value=max(s["worst"] for s in bound if s["num_slots"] == 1),
            target="<= 2.000001",
        ),
        Check(
            name="any k over integer N, one slot, layers freed: least difference",
            value=min(s["any_k_one_slot"] - s["paper"] for s in freed),
            target=">= 0",
        ),
        Check(
            name="best S over one slot, layers freed: least difference",
            value=min(s["best_slots"] - s["any_k_one_slot"] for s in freed),
            target=">= 0",
        ),
    ]


def markdown_tables(samples: list[dict[str, Any]]) -> str:
    """The tables of docs/algorithm.md."""
    freed = [_freed_table(samples, n) for n in TABLE_LAYERS]
    return "\n".join([*freed, _gain_table(samples), _bound_table(samples), _subset_line(samples)])


def _freed_table(samples: list[dict[str, Any]], num_layers: int) -> str:
    mine = [s for s in samples if s["what"] == "freed" and (s["num_layers"], s["rest"]) == (num_layers, 0)]
    columns = [f"{s['copy_ratio']:g}" for s in mine]
    rows = [
        ("paper: integer N, one slot", [f"{s['paper']:g}" for s in mine]),
        ("any k, one slot", [f"{s['any_k_one_slot']:g}" for s in mine]),
        ("any k, best S", [f"{s['best_slots']:g}" for s in mine]),
        ("blocks as units, best S", [f"{s['blocks']:.3g}" for s in mine]),
        ("best of layers and blocks", [f"{max(s['best_slots'], s['blocks']):.3g}" for s in mine]),
    ]
    return _markdown([f"layers freed, L = {num_layers}; r =", *columns], [[name, *cells] for name, cells in rows])


def _gain_table(samples: list[dict[str, Any]]) -> str:
    """Over every L at R = 0: how often and by how much more is freed than by the paper's integer interval."""
    rows = []
    for ratio in COPY_RATIOS:
        mine = [s for s in samples if s["what"] == "freed" and (s["copy_ratio"], s["rest"]) == (ratio, 0)]
        cells = [f"{ratio:g}"]
        for key in ("any_k_one_slot", "best_slots", "blocks"):
            more = sum(s[key] > s["paper"] for s in mine) / len(mine)
            gains = [s[key] / s["paper"] for s in mine if s["paper"]]
            cells.append(f"{more:.0%}, x {median(gains):.2f}" if gains else f"{more:.0%}")
        cells.append(f"{sum(s['blocks'] < s['best_slots'] for s in mine) / len(mine):.0%}")
        rows.append(cells)
    header = ["r", "any k, one slot", "any k, best S", "blocks, best S", "layers better than blocks"]
    return _markdown(header, rows)


def _subset_line(samples: list[dict[str, Any]]) -> str:
    (found,) = (s for s in samples if s["what"] == "subsets")
    return (
        f"Against every subset of {found['num_layers']} layers ({found['num_cases']} cases of k, S, r and R): the "
        f"placement used is the fastest in {found['fastest']:.0%}, and {found['worst']:.3f} times as long at worst.\n"
    )


def _bound_table(samples: list[dict[str, Any]]) -> str:
    rows = []
    for rest in RESTS:
        for slots in range(1, MAX_SLOTS + 1):
            mine = [s for s in samples if s["what"] == "bound" and (s["rest"], s["num_slots"]) == (rest, slots)]
            cases = sum(s["num_cases"] for s in mine)
            at_bound = sum(s["at_bound"] * s["num_cases"] for s in mine) / cases
            worst = max(mine, key=lambda s: s["worst"])
            where = f"{worst['worst_at']}, r={worst['copy_ratio']:g}" if worst["worst"] > 1 + 1e-6 else "nowhere above"
            alone = [f"{max(s[key] for s in mine):.3f}" for key in ("worst_in_time", "worst_by_index")]
            rows.append([f"{rest:g}", str(slots), f"{at_bound:.0%}", f"{worst['worst']:.3f}", where, *alone])
    header = ["R, in layers", "S", "at T_bound", "worst over T_bound", "where", "in time alone", "by index alone"]
    return _markdown(header, rows)


def _markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


if __name__ == "__main__":
    sys.exit(main())
