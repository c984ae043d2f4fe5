"""Noise grids: the levels a sampler visits. A grid is part of what a distilled network *is*, and travels in its file.

Notation: a grid g has levels g_0 = sigma_max > ... > g_{N-1} = sigma_min and g_N = 0. Imports no torch at start, so
that command lines can check step counts at once.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal

import numpy as np

from .steps import MAX_STEPS

Solver = Literal["heun", "euler"]


@dataclass(frozen=True)
class NoiseGrid:
    """Noise levels from sigma_max down to and including 0: strictly decreasing, finite, the last one 0.

    Python floats, because a grid must survive the trip through a file to the last bit.
    Raises ValueError for levels that are no grid.
    """

    levels: tuple[float, ...]
    origin: Mapping[str, Any] | None = field(default=None, compare=False)  # how it was measured; None: it was not

    def __post_init__(self) -> None:
        if len(self.levels) < 2 or self.levels[-1] != 0.0:
            raise ValueError("a noise grid needs at least one positive level and ends in 0")
        if not all(math.isfinite(level) for level in self.levels):
            raise ValueError("noise levels must be finite numbers")
        if any(high <= low for high, low in pairwise(self.levels)):
            raise ValueError("noise levels must decrease strictly")

    @property
    def steps(self) -> int:
        """Number of steps, one fewer than levels."""
        return len(self.levels) - 1

    def __str__(self) -> str:
        """'80, 55.74, 38.07, ..., 0.02, 0.004267, 0': all of up to eight levels, else both ends."""
        shown = [f"{level:.4g}" for level in self.levels]
        return ", ".join(shown if len(shown) <= 8 else [*shown[:3], "...", *shown[-3:]])

    def every(self, ratio: int) -> NoiseGrid:
        """The student's grid: every `ratio`-th level, g_0, g_K, ..., g_N = 0. Raises ValueError unless it divides."""
        if ratio < 1 or self.steps % ratio:
            raise ValueError(f"{self.steps} steps cannot be taken {ratio} at a time")
        return NoiseGrid(self.levels[::ratio])


def check_count(steps: int) -> None:
    """Raises ValueError for a number of steps that no sampler takes."""
    if steps < 1:
        raise ValueError(f"a sampler needs at least one step, not {steps}")
    if steps > MAX_STEPS:
        raise ValueError(f"{steps} steps are too many; a sampler takes {MAX_STEPS} at most")


def karras_levels(steps: int, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0) -> np.ndarray:
    """Eq. 5 of Karras et al. 2022, without the final 0: float64 [steps]. A single step starts at sigma_max."""
    check_count(steps)
    ramp = np.arange(steps, dtype=np.float64) / max(steps - 1, 1)
    try:
        return np.asarray((sigma_max ** (1 / rho) + ramp * (sigma_min ** (1 / rho) - sigma_max ** (1 / rho))) ** rho)
    except OverflowError:
        raise ValueError(f"rho={rho:g} gives no noise levels in float64") from None


def clamped(net: Any, sigma_min: float, sigma_max: float) -> tuple[float, float]:
    """The part of a noise range that the network covers. Raises ValueError when nothing is left."""
    low, high = max(sigma_min, float(net.sigma_min)), min(sigma_max, float(net.sigma_max))
    if not 0 < low < high:
        covers = f"this network covers {float(net.sigma_min):g} to {float(net.sigma_max):g}"
        raise ValueError(f"noise levels from sigma_min {low:g} to sigma_max {high:g} leave nothing to sample; {covers}")
    return low, high


def network_grid(
    net: Any, steps: int, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0
) -> NoiseGrid:
    """The grid on which `net` is sampled and distilled: eq. 5, clamped to its range, rounded to levels it knows, and 0.

    `net` has `sigma_min`, `sigma_max` and `round_sigma` as EDM's networks have them. Raises ValueError when two levels
    fall together, naming the largest number of steps that works.
    """
    low, high = clamped(net, sigma_min, sigma_max)

    def levels(count: int) -> tuple[float, ...]:
        return (*rounded(net.round_sigma, karras_levels(count, low, high, rho)), 0.0)

    def falls_together(count: int) -> bool:
        return not all(a > b for a, b in pairwise(levels(count)))

    if falls_together(steps):  # one by one would take minutes, and it may be a file that asks
        works = bisect_left(range(1, steps), True, key=falls_together)
        raise ValueError(f"{steps} steps need more noise levels than this network distinguishes; at most {works} work")
    return NoiseGrid(levels(steps))


def rounded(round_sigma: Callable[[Any], Any], levels: np.ndarray) -> list[float]:
    """`levels` after the network's own rounding (float64 in, Python floats out)."""
    import torch

    return [float(level) for level in round_sigma(torch.as_tensor(levels, dtype=torch.float64)).double().cpu()]


@dataclass(frozen=True)
class Sampling:
    """How a distilled network must be sampled, and where it comes from.

    grid          its own noise levels, the ones it was taught to jump between
    solver        'euler' for a student: its output is a jump, not a slope
    ratio         steps of its teacher per step of its own
    teacher_steps number of steps of its teacher's grid (== grid.steps * ratio)
    lineage       one dict per teacher, the undistilled one first: `network` (name or URL), `sha256`, `steps`, `solver`
                  (and `unknown_variants`, `own_code`, `self_teacher`: docs/formats.md)
    """

    grid: NoiseGrid
    solver: Solver = "euler"
    ratio: int = 2
    lineage: tuple[Mapping[str, Any], ...] = field(default=())

    @property
    def teacher_steps(self) -> int:
        return self.grid.steps * self.ratio

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, strings and Python numbers, as they go into a network file."""
        return {
            "levels": list(self.grid.levels),
            "solver": self.solver,
            "ratio": self.ratio,
            "teacher_steps": self.teacher_steps,
            "lineage": [dict(entry) for entry in self.lineage],
        }

    @classmethod
    def from_dict(cls, data: Any) -> Sampling:
        """The inverse of `to_dict`. Raises ValueError for anything that isn't one (files can hold anything)."""
        try:
            levels, solver, ratio = data["levels"], data["solver"], data["ratio"]
            lineage = tuple(dict(entry) for entry in data.get("lineage", ()))
            numbers = tuple(float(level) for level in levels)
        except (TypeError, KeyError, AttributeError, ValueError, OverflowError) as exc:
            raise ValueError(f"not a description of a noise grid: {exc!r}") from exc
        if solver not in ("heun", "euler") or isinstance(ratio, bool) or not isinstance(ratio, int) or ratio < 1:
            raise ValueError(f"unknown solver {solver!r} or ratio {ratio!r} in the description of a noise grid")
        return cls(NoiseGrid(numbers), solver, ratio, lineage)
