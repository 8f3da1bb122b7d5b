"""The performance record: what was measured of a model on a machine, what it is valid for, and its file."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, TypeVar, cast, get_type_hints

import yaml

from selectn_core.bounds import flaw_in
from selectn_core.errors import RecordRefused
from selectn_core.latency.recurrence import Link
from selectn_core.latency.step_times import MeasuredStep, SamplingTimes, StepTimes
from selectn_core.latency.steps import StepShape
from selectn_core.memory.kv_geometry import BlockGeometry, KvGeometry
from selectn_core.memory.workspace import Workspace
from selectn_core.yaml_file import read_yaml

Made = TypeVar("Made")

VERSION = 2
# Far beyond what can be measured: a file that says so is damaged.
_MOST_BYTES, _MOST_COUNT, _MOST_TOKENS = 1 << 60, 1 << 20, 1 << 31
_LEAST_S, _MOST_S, _MOST_SLOWDOWN = 1e-12, 1e6, 1e4


@dataclass(frozen=True, kw_only=True)
class Fingerprint:
    """What a record is valid for. Two that differ in anything are not interchangeable."""

    model: str  # a hash of the model's configuration
    model_type: str
    dtype: str
    attention: str
    unit: str
    device: str
    device_name: str
    compute_threads: int
    link: str
    max_batch_tokens: int
    max_requests: int
    page_size: int
    torch: str
    transformers: str

    def key(self) -> str:
        """A short name, for files."""
        return hashlib.sha256(repr(astuple(self)).encode()).hexdigest()[:16]

    def differences(self, running: Fingerprint) -> list[str]:
        """One line per field that is not what is running."""
        return [
            f"{each.name}: the record has {getattr(self, each.name)!r}, running is {getattr(running, each.name)!r}"
            for each in fields(self)
            if getattr(self, each.name) != getattr(running, each.name)
        ]


@dataclass(frozen=True, kw_only=True)
class UnitKind:
    """Units that are alike: same module, same bytes, same attention."""

    name: str
    num_bytes: int


@dataclass(frozen=True, kw_only=True)
class MeasuredCopy:
    """Copies of one size over an idle link, back to back; seconds of one, at best, in the median and at worst."""

    num_bytes: int
    low_s: float
    median_s: float
    high_s: float
    num_samples: int


@dataclass(frozen=True, kw_only=True)
class LinkRecord:
    """The host link: `copy_s` is the fixed cost of a copy, `busy_bytes_per_s` its bandwidth while the model computes.

    `slowdown` is by how much compute takes longer, relative to an idle link, while the link is always busy.
    """

    bytes_per_s: float
    copy_s: float
    busy_bytes_per_s: float
    slowdown: float
    copies: tuple[MeasuredCopy, ...]

    @property
    def link(self) -> Link:
        """What a plan may count on: the link as it is while the model computes."""
        return Link(bytes_per_s=min(self.bytes_per_s, self.busy_bytes_per_s), copy_s=self.copy_s)


@dataclass(frozen=True, kw_only=True)
class MemoryRecord:
    """Sizes that decide what fits: weights that never move, the KV cache's geometry, what a step's activations take."""

    resident_bytes: int
    num_reserved_sectors: int
    geometry: KvGeometry
    workspace: Workspace


@dataclass(frozen=True, kw_only=True)
class PerformanceRecord:
    """One model on one machine. `unit_kinds[l]` is the kind of unit l, an index into `kinds`.

    `is_complete` is False where the time for profiling ran out; a later run goes on from there. `table` is what was
    derived from the rest (planner), for people to read.
    """

    fingerprint: Fingerprint
    provenance: str
    created: str
    kinds: tuple[UnitKind, ...]
    unit_kinds: tuple[int, ...]
    memory: MemoryRecord
    link: LinkRecord
    steps: tuple[MeasuredStep, ...]
    is_complete: bool
    sampling: SamplingTimes = field(default_factory=SamplingTimes)
    table: tuple[Mapping[str, Any], ...] = ()

    @property
    def unit_bytes(self) -> tuple[int, ...]:
        """Parameter bytes of every unit."""
        return tuple(self.kinds[kind].num_bytes for kind in self.unit_kinds)

    def step_times(self) -> StepTimes:
        """The model of time that these steps give."""
        windows = [_windows_of(kind, self.memory.geometry) for kind in self.kinds]
        return StepTimes(self.steps, self.unit_kinds, self.unit_bytes, windows, sampling=self.sampling)

    def require(self, running: Fingerprint, where: str = "the performance record") -> None:
        """Raises RecordRefused, naming every difference, unless the record is of what is running."""
        if differences := self.fingerprint.differences(running):
            raise RecordRefused(
                f"{where} is of something else:\n  " + "\n  ".join(differences) + "\nrun `selectn profile` to make one"
            )

    def require_units(self, unit_bytes: Sequence[int], where: str = "the performance record") -> None:
        """Raises RecordRefused unless the record is of as many units, each of as many bytes, as those that run."""
        flaw = None
        if len(self.unit_bytes) != len(unit_bytes):
            flaw = f"unit_kinds: the record has {len(self.unit_bytes)} units, running are {len(unit_bytes)}"
        for unit, (recorded, running) in enumerate(zip(self.unit_bytes, unit_bytes, strict=False)):
            if flaw is None and recorded != running:
                field_name = f"kinds.{self.unit_kinds[unit]}.num_bytes"
                flaw = f"{field_name}: in the record unit {unit} has {recorded} bytes, running it has {running}"
        if flaw is not None:
            raise RecordRefused(f"{where} is of other units: {flaw}; run `selectn profile` to make one")

    def save(self, path: Path) -> None:
        """Writes the record, whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, building = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                file.write("# A Select-N performance record; docs/algorithm.md says what is in it.\n")
                yaml.safe_dump(_to_plain(self), file, sort_keys=False, default_flow_style=None, width=120)
            Path(building).rename(path)
        except BaseException:
            Path(building).unlink(missing_ok=True)
            raise

    @classmethod
    def load(cls, path: Path) -> PerformanceRecord:
        """Reads what `save` wrote. Raises RecordRefused for a file that is not there, or not a record."""
        document = read_yaml(path, RecordRefused, advice=": run `selectn profile` to make one")
        found = document.get("version") if isinstance(document, dict) else None
        if type(found) is not int or found != VERSION:
            raise RecordRefused(f"{path}: version={found!r} is not allowed: expected {VERSION}; run `selectn profile`")
        try:
            return _checked(_from_plain(document))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            what = " ".join(f"{type(error).__name__}: {error}".split())
            raise RecordRefused(f"{path} is damaged ({what}): run `selectn profile`") from None

    def with_table(self, table: tuple[Mapping[str, Any], ...]) -> PerformanceRecord:
        """The same record with what was derived from it."""
        return replace(self, table=table)


def _checked(record: PerformanceRecord) -> PerformanceRecord:
    """The record itself. Raises ValueError for one that no measurement can have made."""
    # Where nothing was copied while the model computed, nothing is known of that bandwidth.
    if flaw := flaw_in(record, endless=("link.busy_bytes_per_s",), least=0.0):
        raise ValueError(f"{flaw}: expected a number, finite and not negative")
    if not (record.link.bytes_per_s > 0 and record.link.busy_bytes_per_s > 0 and record.steps and record.unit_kinds):
        raise ValueError("it has no units, no steps, or a link without bandwidth")
    if max(record.unit_kinds) >= len(record.kinds) or any(
        len(step.kind_s) != len(record.kinds) for step in record.steps
    ):
        raise ValueError("unit_kinds and steps.kind_s: expected as many kinds as there are in kinds")
    for name, value, least, most in _bounded(record):
        if not least <= value <= most:
            raise ValueError(f"{name}={value!r}: expected {least:g} to {most:g}")
    return record


def _bounded(record: PerformanceRecord) -> Iterator[tuple[str, float, float, float]]:
    """Numbers that must be more than not negative: name, value, and the range of what can have been measured."""
    geometry, link, sampling = record.memory.geometry, record.link, record.sampling
    for i, kind in enumerate(record.kinds):
        yield f"kinds.{i}.num_bytes", kind.num_bytes, 1, _MOST_BYTES
    yield "memory.geometry.types (how many)", len(geometry.types), 1, _MOST_COUNT
    yield "memory.geometry.sector_bytes", geometry.sector_bytes, 1, _MOST_BYTES
    for i, blocks in enumerate(geometry.types):
        where = f"memory.geometry.types.{i}"
        yield f"{where}.page_size", blocks.page_size, 1, _MOST_COUNT
        yield f"{where}.blocks_per_sector", blocks.blocks_per_sector, 1, _MOST_COUNT
        if blocks.sliding_window is not None:
            yield f"{where}.sliding_window", blocks.sliding_window, 1, _MOST_TOKENS
    yield "link.copy_s", link.copy_s, 0, _MOST_S
    yield "link.slowdown", link.slowdown, 0, _MOST_SLOWDOWN
    for each in fields(sampling):
        yield f"sampling.{each.name}", getattr(sampling, each.name), 0, _MOST_S
    for i, step in enumerate(record.steps):
        for k, kind_s in enumerate(step.kind_s):
            yield f"steps.{i}.kind_s.{k}", kind_s, _LEAST_S, _MOST_S
        for name in ("rest_s", "low_s", "high_s"):
            yield f"steps.{i}.{name}", getattr(step, name), 0 if name == "rest_s" else _LEAST_S, _MOST_S


def _to_plain(record: PerformanceRecord) -> dict[str, Any]:
    plain = asdict(record)
    plain["sampling"] = _rounded(plain["sampling"])
    plain["steps"] = [
        {**{k: v for k, v in _rounded(asdict(step)).items() if k != "shape"}, "shape": _plain_shape(step.shape)}
        for step in record.steps
    ]
    return {"version": VERSION, **_listed(plain)}


def _plain_shape(shape: StepShape) -> dict[str, Any]:
    """Chunks of prefill as [tokens, keys before them], and of the decoding requests [keys, how many have so many].

    None of the steps that were measured has sampled rows: what those take was measured apart.
    """
    return {"prefills": shape.prefills, "decodes": tuple(Counter(shape.decodes).items())}


def _from_plain(document: Mapping[str, Any]) -> PerformanceRecord:
    _require_fields(document, ("version", *_names(PerformanceRecord)), "")
    memory = _require_fields(document["memory"], _names(MemoryRecord), "memory")
    geometry = _require_fields(memory["geometry"], _names(KvGeometry), "memory.geometry")
    fingerprint = _made(Fingerprint, document["fingerprint"], "fingerprint")
    link = _require_fields(document["link"], _names(LinkRecord), "link")
    most = min(_MOST_COUNT, fingerprint.max_requests) if type(fingerprint.max_requests) is int else 0
    record = PerformanceRecord(
        fingerprint=fingerprint,
        provenance=document["provenance"],
        created=document["created"],
        kinds=_all_made(UnitKind, document["kinds"], "kinds"),
        unit_kinds=tuple(_a_list(document["unit_kinds"], "unit_kinds")),
        memory=MemoryRecord(
            resident_bytes=memory["resident_bytes"],
            num_reserved_sectors=memory["num_reserved_sectors"],
            geometry=KvGeometry(
                sector_bytes=geometry["sector_bytes"],
                types=_all_made(BlockGeometry, geometry["types"], "memory.geometry.types"),
            ),
            workspace=_made(Workspace, memory["workspace"], "memory.workspace"),
        ),
        link=LinkRecord(**{**link, "copies": _all_made(MeasuredCopy, link["copies"], "link.copies")}),
        steps=tuple(_step(point, f"steps.{i}", most) for i, point in enumerate(_a_list(document["steps"], "steps"))),
        is_complete=document["is_complete"],
        sampling=_made(SamplingTimes, document["sampling"], "sampling"),
        table=tuple(_a_list(document["table"], "table")),
    )
    _require_words(record, "")
    for i, row in enumerate(record.table):
        _require(isinstance(row, Mapping), f"table.{i}", row, "a mapping")
    return record


def _step(point: Any, where: str, most_requests: int) -> MeasuredStep:
    """A step of at most so many requests: what stands for many of them is bounded before it is expanded."""
    _require_fields(point, _names(MeasuredStep), where)
    plain = _require_fields(point["shape"], ("prefills", "decodes"), f"{where}.shape")
    prefills = _pairs(plain["prefills"], (1, 0), f"{where}.shape.prefills")
    decodes = _pairs(plain["decodes"], (1, 1), f"{where}.shape.decodes")
    num_requests = len(prefills) + sum(count for _, count in decodes)
    allowed = f"1 to {most_requests} requests (fingerprint.max_requests)"
    _require(1 <= num_requests <= most_requests, f"{where}.shape", plain, allowed)
    shape = StepShape.of(prefills, [keys for keys, count in decodes for _ in range(count)])
    return MeasuredStep(**{**point, "shape": shape, "kind_s": tuple(_a_list(point["kind_s"], f"{where}.kind_s"))})


def _pairs(value: Any, least: tuple[int, int], where: str) -> list[tuple[int, int]]:
    """Pairs of whole numbers, each at least so large."""
    pairs = []
    for i, pair in enumerate(_a_list(value, where)):
        is_sound = isinstance(pair, list) and len(pair) == 2 and all(type(number) is int for number in pair)
        is_sound = is_sound and all(low <= number <= _MOST_TOKENS for low, number in zip(least, pair, strict=True))
        _require(is_sound, f"{where}.{i}", pair, f"two whole numbers, at least {least[0]} and {least[1]}")
        pairs.append((pair[0], pair[1]))
    return pairs


def _require(condition: bool, where: str, value: object, allowed: str) -> None:
    if not condition:
        raise ValueError(f"{where}={repr(value)[:80]}: expected {allowed}")


def _names(section: type[Any]) -> tuple[str, ...]:
    return tuple(each.name for each in fields(section))


def _require_fields(value: Any, names: Sequence[str], where: str) -> Mapping[str, Any]:
    """`value`, a mapping with these fields and no others."""
    _require(isinstance(value, Mapping), where, value, f"the fields {', '.join(names)}")
    path = f"{where}." if where else ""
    for name in names:
        if name not in value:
            raise ValueError(f"{path}{name} is missing")
    for name in value:
        if name not in names:
            raise ValueError(f"{path}{str(name)[:80]}: there is no such field")
    return cast(Mapping[str, Any], value)


def _made(section: type[Made], value: Any, where: str) -> Made:
    return section(**_require_fields(value, _names(section), where))


def _all_made(section: type[Made], value: Any, where: str) -> tuple[Made, ...]:
    return tuple(_made(section, each, f"{where}.{i}") for i, each in enumerate(_a_list(value, where)))


def _a_list(value: Any, where: str) -> list[Any]:
    _require(isinstance(value, list), where, value, "a list")
    return cast(list[Any], value)


def _require_words(data: Any, path: str) -> None:
    """Text where a field's type says text, and true or false where it says so; numbers are `flaw_in`'s."""
    hints = get_type_hints(type(data))
    for each in fields(data):
        value, hint = getattr(data, each.name), hints[each.name]
        if hint in (str, bool):
            allowed = "text" if hint is str else "true or false"
            _require(type(value) is hint, f"{path}{each.name}", value, allowed)
        nested = value if isinstance(value, tuple) else (value,)
        for i, inner in enumerate(nested):
            if is_dataclass(inner):
                index = f"{i}." if isinstance(value, tuple) else ""
                _require_words(inner, f"{path}{each.name}.{index}")


def _windows_of(kind: UnitKind, geometry: KvGeometry) -> list[int | None]:
    """The sliding windows of the attention that a unit of this kind may have, by its name (`units.Unit.kind`)."""
    _, _, attention = kind.name.split("#")[0].partition("/")
    if attention == "full_attention":
        return [None]
    if attention == "sliding_attention":
        return [window for window in geometry.windows if window is not None]
    return list(geometry.windows)


def _rounded(values: Mapping[str, Any]) -> dict[str, Any]:
    """Times to a tenth of a microsecond: more was not measured, and people read the file."""
    return {key: round(value, 7) if isinstance(value, float) else value for key, value in values.items()}


def _listed(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _listed(each) for key, each in value.items()}
    return [_listed(each) for each in value] if isinstance(value, list | tuple) else value
