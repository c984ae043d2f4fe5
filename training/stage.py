"""One stage of progressive distillation: a teacher, its noise grid and a ratio make a student with a coarser grid.

The student's grid is every K-th level of the teacher's, never a fresh one: a jump that a student has not learnt cannot
serve the next student as its teacher's step. `train.py` runs one stage, `distill.py` strings stages together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dnnlib.cli import UsageError, UserError

from .grids import MAX_STEPS, NoiseGrid, Sampling, Solver, network_grid, ratios_that_work


@dataclass(frozen=True)
class Stage:
    """teacher on `grid` by `solver`  ->  student on every `ratio`-th level of it, by Euler jumps."""

    teacher: Any  # network_files.NetworkFile
    grid: NoiseGrid
    ratio: int
    solver: Solver
    self_teacher: bool = False  # the teacher makes one step of a jump, the student's own average the rest

    @property
    def sampling(self) -> Sampling:
        """What the student's file says: its own grid, and all teachers before it, the first one first."""
        before = self.teacher.sampling.lineage if self.teacher.sampling else ()
        entry: dict[str, Any] = {
            "network": str(self.teacher.source),
            "sha256": self.teacher.sha256,
            "steps": self.grid.steps,
            "solver": self.solver,
        }
        if self.self_teacher:
            entry["self_teacher"] = True
        return Sampling(self.grid.every(self.ratio), "euler", self.ratio, (*before, entry))

    def describe(self) -> str:
        """One line for people: '32 heun steps -> 16, noise levels 80, 55.74, 38.07, ..., 0.004267, 0'."""
        levels = self.sampling.grid.levels
        shown = [f"{level:.4g}" for level in levels]
        if len(shown) > 8:
            shown = [*shown[:3], "...", *shown[-3:]]
        how = " with a self-teacher" if self.self_teacher else ""
        return f"{self.grid.steps} {self.solver} steps -> {len(levels) - 1}{how}, noise levels {', '.join(shown)}"


def check_steps(num_steps: int | None, ratio: int) -> None:
    """Refuses step counts that no teacher could make good. Raises UsageError."""
    if ratio < 2:
        raise UsageError(f"--ratio={ratio}: a student takes at least 2 steps of its teacher at once")
    if num_steps is None:
        return
    if num_steps < 1:
        raise UsageError(f"--num_steps={num_steps}: the teacher takes at least {ratio} steps")
    if num_steps > MAX_STEPS:
        raise UsageError(f"--num_steps={num_steps}: a teacher takes {MAX_STEPS} steps at most")
    if num_steps % ratio:
        works = ratios_that_work(num_steps)
        hint = f"ratios that work: {', '.join(map(str, works))}" if works else "a single step is the end"
        raise UsageError(f"--num_steps={num_steps} is not divisible by --ratio={ratio}; {hint}")


def plan_stage(
    teacher: Any, num_steps: int | None, ratio: int = 2, solver: str | None = None, self_teacher: bool = False
) -> Stage:
    """Checks what is asked for against what the teacher is, and returns the stage. Raises UsageError.

    teacher: a `network_files.NetworkFile`. Undistilled (no grid in its file), it needs `num_steps`, gets the rho
    schedule of that length and is run by Heun unless asked otherwise. A student brings its own grid and Euler.
    """
    check_steps(num_steps, ratio)
    if teacher.sampling is None:
        if num_steps is None:
            raise UsageError(f"--num_steps is needed: {teacher.source} is undistilled and has no noise grid of its own")
        try:
            grid = network_grid(teacher.net, num_steps)
        except ValueError as exc:
            raise UsageError(f"--num_steps={num_steps}: {exc}") from exc
        return Stage(teacher, grid, ratio, "euler" if solver == "euler" else "heun", self_teacher)
    grid = teacher.sampling.grid
    if num_steps not in (None, grid.steps):
        raise UsageError(
            f"--num_steps={num_steps}, but {teacher.source} was distilled to {grid.steps} steps on a grid of its own; "
            f"use --num_steps={grid.steps} or leave it out"
        )
    check_steps(grid.steps, ratio)
    if solver == "heun" and teacher.sampling.solver == "euler":
        raise UsageError(
            "--teacher-solver=heun: this teacher is a student, its output is a jump and not a slope; use euler"
        )
    return Stage(teacher, grid, ratio, teacher.sampling.solver, self_teacher)


def plan_ladder(num_steps: int, until: int, ratios: Sequence[int]) -> list[int]:
    """The ratios of every stage from `num_steps` down to `until`; one given ratio is used throughout.

    Raises UsageError for a chain that does not arrive, with one that does.
    """
    if until < 1 or num_steps <= until:
        raise UsageError(f"a ladder from {num_steps} to {until} steps has no stages; --until must be below --num_steps")
    chain: list[int] = []
    steps = num_steps
    while steps > until:
        ratio = ratios[0] if len(ratios) == 1 else ratios[len(chain)] if len(chain) < len(ratios) else 0
        if ratio < 2 or steps % ratio or steps // ratio < until:
            raise UsageError(_no_chain(num_steps, until, ratios))
        chain.append(ratio)
        steps //= ratio
    if len(ratios) > 1 and len(chain) != len(ratios):
        raise UsageError(_no_chain(num_steps, until, ratios))
    return chain


def _no_chain(num_steps: int, until: int, ratios: Sequence[int]) -> str:
    text = f"--ratio={','.join(map(str, ratios))} does not lead from {num_steps} steps to {until}"
    if num_steps % until:
        ratio = max([*ratios[:1], 2])
        fits = [until * ratio**k for k in range(1, 12)]
        near = min(fits, key=lambda n: abs(n - num_steps))
        return f"{text}: {num_steps} is no multiple of {until}; --num_steps={near} with --ratio={ratio} does"
    factors, rest, prime = [], num_steps // until, 2
    while prime * prime <= rest:
        while rest % prime == 0:
            factors.append(prime)
            rest //= prime
        prime += 1
    if rest > 1:
        factors.append(rest)
    return f"{text}; --ratio={','.join(map(str, factors))} does"


def check_compatible(net: Any, resolution: int, channels: int, label_dim: int, source: str) -> None:
    """Refuses a data set that a teacher was not made for. Raises UserError."""
    if net.img_resolution != resolution or net.img_channels != channels:
        raise UserError(
            f"{source} makes images of {net.img_resolution}x{net.img_resolution} with {net.img_channels} channels, the "
            f"data set has {resolution}x{resolution} with {channels}; use the teacher's own data set"
        )
    if net.label_dim != label_dim:
        if net.label_dim == 0:
            raise UserError(f"{source} knows no classes; use --cond=0")
        if label_dim == 0:
            raise UserError(f"{source} has {net.label_dim} classes, and the data set has no labels for them")
        raise UserError(f"{source} has {net.label_dim} classes, the data set has {label_dim}; use the teacher's own")
