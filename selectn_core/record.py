"""The performance record: what was measured of a model on a machine, what it is valid for, and its file."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, astuple, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import yaml

from selectn_core.bounds import flaw_in
from selectn_core.errors import RecordRefused
from selectn_core.kv_geometry import BlockGeometry, KvGeometry
from selectn_core.latency import Link
from selectn_core.step_times import MeasuredStep, SamplingTimes, StepTimes
from selectn_core.steps import StepShape
from selectn_core.workspace import Workspace
from selectn_core.yaml_file import read_yaml

VERSION = 2


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
        if not isinstance(document, dict) or document.get("version") != VERSION:
            found = document.get("version") if isinstance(document, dict) else None
            raise RecordRefused(f"{path}: version={found!r} is not allowed: expected {VERSION}; run `selectn profile`")
        try:
            return _checked(_from_plain(document))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise RecordRefused(f"{path} is damaged ({type(error).__name__}: {error}): run `selectn profile`") from None

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
    return record


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
    memory, link, steps = document["memory"], document["link"], document["steps"]
    geometry = memory["geometry"]
    return PerformanceRecord(
        fingerprint=Fingerprint(**document["fingerprint"]),
        provenance=document["provenance"],
        created=document["created"],
        kinds=tuple(UnitKind(**kind) for kind in document["kinds"]),
        unit_kinds=tuple(document["unit_kinds"]),
        memory=MemoryRecord(
            resident_bytes=memory["resident_bytes"],
            num_reserved_sectors=memory["num_reserved_sectors"],
            geometry=KvGeometry(
                sector_bytes=geometry["sector_bytes"],
                types=tuple(BlockGeometry(**each) for each in geometry["types"]),
            ),
            workspace=Workspace(**memory["workspace"]),
        ),
        link=LinkRecord(**{**link, "copies": tuple(MeasuredCopy(**copy) for copy in link["copies"])}),
        steps=tuple(_step(point) for point in steps),
        is_complete=document["is_complete"],
        sampling=SamplingTimes(**document["sampling"]),
        table=tuple(document["table"]),
    )


def _step(point: Mapping[str, Any]) -> MeasuredStep:
    plain = point["shape"]
    shape = StepShape.of(
        prefills=[(tokens, past) for tokens, past in plain["prefills"]],
        decodes=[keys for keys, count in plain["decodes"] for _ in range(count)],
    )
    return MeasuredStep(**{**point, "shape": shape, "kind_s": tuple(point["kind_s"])})


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
