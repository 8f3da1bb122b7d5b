"""The controller's numbers, each with its unit and its reason. Apart from the controller, which uses them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ControllerTuning:
    """None of them is a setting of a server: they say how cautious the controller is.

    Attributes:
        busy_stretch: unloaded steps that a step may take at most while requests wait for memory. They need speed, not
            more memory.
        busy_steps: steps for which that holds after the last one in which requests waited. More are likely to follow,
            and moving weights costs steps.
        look_every_steps: steps from one look for a better plan to the next, where nothing presses: each costs as much
            as the rest of deciding.
        raise_after_looks: looks that must find a plan that frees more before it is followed.
        tolerance: share of the limit by which a step may exceed it before weights come home. Predictions are rounded to
            a few percent.
        gain: share by which more must be freed before units move.
        rounding: share to which factors and limits are rounded, so that what was asked before is found again.
        pays_off_steps: steps whose shortening must make up for the copies of weights that come home.
        urgent_share: TPOT objectives; longer steps are a reason to take memory from running requests.
        fewest_copied: units with which a link is tried that nothing has been seen of.
        rehearsed: how many times what was recorded the compute of a rehearsed step takes.
    """

    busy_stretch: float = 1.1
    busy_steps: int = 24
    look_every_steps: int = 3
    raise_after_looks: int = 2
    tolerance: float = 0.04
    gain: float = 0.1
    rounding: float = 0.02
    pays_off_steps: int = 16
    urgent_share: float = 1.25
    fewest_copied: int = 2
    rehearsed: tuple[float, ...] = (0.95, 1.05, 1.15)
