"""Where a model's forward calls its executor: as a step begins, and around the units that need it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from torch import nn
from torch.utils.hooks import RemovableHandle

from selectn_core.weights.units import Unit


class UnitHooks:
    """An executor's. Units that are not hooked run as transformers built them; `len` is of those that are."""

    def __init__(
        self,
        model: nn.Module,
        units: Sequence[Unit],
        *,
        begin_step: Callable[[], None],
        before_unit: Callable[[Unit], None],
        after_unit: Callable[[Unit], None],
    ) -> None:
        self._model, self._units = model, units
        self._begin_step, self._before_unit, self._after_unit = begin_step, before_unit, after_unit
        self._on_model: RemovableHandle | None = None
        self._on_units: dict[int, tuple[RemovableHandle, RemovableHandle]] = {}

    def __len__(self) -> int:
        return len(self._on_units)

    def attach(self) -> None:
        """Hooks the model; no unit yet."""
        self._on_model = self._model.register_forward_pre_hook(lambda *_: self._begin_step())

    def put_around(self, indices: Iterable[int]) -> None:
        """Hooks these units and no others."""
        self._leave_units()
        for index in indices:
            self._on_units[index] = self._around(self._units[index])

    def _around(self, unit: Unit) -> tuple[RemovableHandle, RemovableHandle]:
        # First and last: what others hook in between sees the unit with its weights there.
        before = unit.module.register_forward_pre_hook(lambda *_: self._before_unit(unit), prepend=True)
        return before, unit.module.register_forward_hook(lambda *_: self._after_unit(unit))

    def detach(self) -> None:
        """Leaves model and units as transformers built them."""
        self._leave_units()
        if self._on_model is not None:
            self._on_model.remove()
        self._on_model = None

    def _leave_units(self) -> None:
        for handles in self._on_units.values():
            for handle in handles:
                handle.remove()
        self._on_units.clear()
