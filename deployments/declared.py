"""What a replica is declared to run: `args`, patched by `user_config`. The whole of it is applied, or nothing.

What `user_config` names counts instead of the same field in `args`; what it does not name, or names no longer, is as in
`args`. So the state follows from the two alone, whatever was declared before, and however the replica came to it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from deployments.config import Changeable, nearest, parse
from selectn_core.config import EngineConfig
from selectn_core.errors import ConfigError

if TYPE_CHECKING:
    from selectn_core.engine.engine import Engine

# The rest of `offload` is what an engine is built for: it changes in `args`, with a restart.
CHANGEABLE: dict[str, tuple[str, ...] | None] = {"slo": None, "offload": ("num_offloaded", "num_slots")}


def declared(args: EngineConfig, user_config: Any, *, where: str = "user_config") -> EngineConfig:
    """`args` with what `user_config` changes. Pure. Raises ConfigError naming each field that is wrong.

    A number of units where `args` let the policy decide is a plan by hand. The reverse is refused: for a policy
    something must have been measured when the replica started.
    """
    patch = _sections(user_config, where)
    base = {name: asdict(getattr(args, name)) for name in CHANGEABLE}
    wanted = parse(Changeable, {name: {**base[name], **patch.get(name, {})} for name in base}, where=where)
    if wanted.offload.num_offloaded == "auto" != args.offload.num_offloaded:
        raise ConfigError(
            f"{where}: offload.num_offloaded='auto' is not allowed: expected a number of units, since args.offload has "
            "one and nothing was measured for a policy: set it to 'auto' there"
        )
    return replace(args, slo=wanted.slo, offload=wanted.offload)


def apply_declared(engine: Engine, wanted: EngineConfig) -> None:
    """Has a running engine do what is declared, from its next step on. Raises ConfigError, and changes nothing then."""
    offload, before = wanted.offload, engine.config.slo
    if offload.num_offloaded != "auto":  # looked at before anything is changed
        engine.check_num_offloaded("user_config.offload.num_offloaded", offload.num_offloaded, offload.num_slots)
    if wanted.slo != before:
        engine.set_objectives(wanted.slo)
    if offload.num_offloaded != "auto":
        engine.set_num_offloaded(offload.num_offloaded, offload.num_slots)
    else:
        engine.resume_policy()


def _sections(user_config: Any, where: str) -> dict[str, Mapping[str, Any]]:
    """The sections that `user_config` has, their keys known. None, for a section too, is one that changes nothing."""
    sections = {name: values for name, values in _mapping(user_config, where).items() if values is not None}
    for name in sections:
        if name not in CHANGEABLE:
            raise ConfigError(f"{where}: unknown key '{name}'{nearest(str(name), CHANGEABLE)}")
        allowed = CHANGEABLE[name]
        for key in _mapping(sections[name], f"{where}.{name}"):
            if allowed is not None and key not in allowed:
                raise ConfigError(f"{where}: unknown key '{name}.{key}'{nearest(str(key), allowed)}")
    return sections


def _mapping(values: Any, where: str) -> Mapping[str, Any]:
    if values is None:
        return {}
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where}: {values!r} is not allowed: expected a mapping")
    return values
