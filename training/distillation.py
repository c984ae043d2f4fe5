"""Progressive distillation (Salimans & Ho 2022) in EDM's variables. The method, top to bottom: stage, jump, loss.

A stage turns a teacher of N steps into a student of N / K steps. The student's noise grid is every K-th level of its
teacher's, the last one 0. One training example is one jump:

    t, s = two neighbouring levels of the student's grid
    x_t  = y + t n                             noised image
    x_s  = where the teacher arrives from x_t in its K steps from t to s
    D*   = (x_s - (s/t) x_t) / (1 - s/t)       the answer whose Euler jump lands on x_s
    loss = weight(t, s) * |D_student(x_t; t) - D*|^2

The formulas of steps and targets are in `training.solvers`, grids in `training.grids`, weightings in
`training.weighting`; how often each jump is trained is in `training.intervals`. docs/derivation.md derives all of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dnnlib.cli import UsageError
from dnnlib.util import count

from .augment import augment_batch, call_network
from .draws import RandomSource
from .grids import NoiseGrid, Sampling, Solver, network_grid
from .intervals import Intervals
from .solvers import Denoiser, jump_target, segment_landing, teacher_landing
from .steps import check_steps
from .weighting import WEIGHTINGS

# ----------------------------------------------------------------------------------------------------------------------
# Stage


@dataclass(frozen=True)
class Stage:
    """A teacher on `grid`, run by `solver`; its student takes every `ratio`-th level of that grid, by Euler jumps.

    The student's grid is never a fresh one: the next stage would then use teacher steps that this student was never
    trained on.
    """

    teacher: Any  # network_files.NetworkFile
    grid: NoiseGrid
    ratio: int
    solver: Solver
    self_teacher: bool = False  # see SelfTeacherLoss

    @property
    def sampling(self) -> Sampling:
        """What the student's file holds: its own grid, and all its teachers, the undistilled one first."""
        before = self.teacher.sampling.lineage if self.teacher.sampling else ()
        entry: dict[str, Any] = {"network": str(self.teacher.source), "sha256": self.teacher.sha256}
        entry |= {"steps": self.grid.steps, "solver": self.solver}
        variants = list(self.teacher.variants)
        special = {
            "grid": self.grid.origin and dict(self.grid.origin),
            "own_code": self.teacher.foreign_code,
            "unknown_variants": variants,
            "self_teacher": self.self_teacher,
        }
        entry |= {name: value for name, value in special.items() if value}
        return Sampling(self.grid.every(self.ratio), "euler", self.ratio, (*before, entry))

    def describe(self) -> str:
        """One line for people: '32 heun steps -> 16, noise levels 80, 55.74, 38.07, ..., 0.004267, 0'."""
        student = self.sampling.grid
        how = " with a self-teacher" if self.self_teacher else ""
        return f"{self.grid.steps} {self.solver} steps -> {student.steps}{how}, noise levels {student}"


def plan_stage(
    teacher: Any,
    num_steps: int | None,
    ratio: int = 2,
    solver: str | None = None,
    self_teacher: bool = False,
    grid: NoiseGrid | None = None,
) -> Stage:
    """The stage that `teacher` (a network_files.NetworkFile) can teach. Raises UsageError for one that it cannot.

    An undistilled teacher (no grid in its file) is run by Heun unless `solver` is euler, on `grid`, or on eq. 5's of
    `num_steps` steps. A student brings its own grid and solver.
    """
    check_steps(num_steps if grid is None else grid.steps, ratio)
    if grid is not None:
        if teacher.sampling is not None:
            raise UsageError(f"--grid: {teacher.source} was distilled on a noise grid of its own; leave it out")
        if num_steps not in (None, grid.steps):
            raise UsageError(
                f"--num_steps={num_steps}, but --grid has {count(grid.steps, 'step')}; leave one of them out"
            )
        return Stage(teacher, grid, ratio, "euler" if solver == "euler" else "heun", self_teacher)
    if teacher.sampling is None:
        if num_steps is None:
            raise UsageError(f"--num_steps is needed: {teacher.source} is undistilled and has no noise grid of its own")
        try:
            grid = network_grid(teacher.net, num_steps)
        except ValueError as exc:
            raise UsageError(f"--num_steps={num_steps}: {exc}") from exc
        return Stage(teacher, grid, ratio, "euler" if solver == "euler" else "heun", self_teacher)
    grid = teacher.sampling.grid
    check_steps(grid.steps, ratio)
    if num_steps not in (None, grid.steps):
        raise UsageError(
            f"--num_steps={num_steps}, but {teacher.source} was distilled to {grid.steps} steps on a grid of its own; "
            f"use --num_steps={grid.steps} or leave it out"
        )
    if solver == "heun" and teacher.sampling.solver == "euler":
        raise UsageError(
            "--teacher-solver=heun: this teacher is a student, its output is a jump and not a slope; use euler"
        )
    return Stage(teacher, grid, ratio, teacher.sampling.solver, self_teacher)


# ----------------------------------------------------------------------------------------------------------------------
# Jump


@dataclass
class Jump:
    """A batch of jumps that a student is to learn. Noise levels are [N, 1, 1, 1], images [N, C, H, W]; all float64."""

    interval: Tensor  # [N] int64: index into the loss's `starts`
    x: Tensor  # noised images, x_t
    t: Tensor
    s: Tensor
    target: Tensor  # D*: the denoiser output whose jump lands where the teacher arrives
    augment_labels: Tensor | None


# ----------------------------------------------------------------------------------------------------------------------
# Loss


class EDMDistillationLoss:
    """The loss of one stage (Salimans & Ho 2022, Alg. 2): the teacher takes K steps, the student one jump.

    teacher     network in eval mode without gradients; neither trained nor stored
    grid        the teacher's noise grid, N steps from sigma_max to 0
    ratio       teacher steps per student step, K
    solver      'heun' for an undistilled teacher, 'euler' for a student
    weighting   a name in `WEIGHTINGS`
    intervals   'loss' or 'uniform': how often each jump is trained (`training.intervals`)

    `starts` are the levels at which jumps begin. Raises ValueError for unknown names.
    """

    target_name = "teacher's target"

    def __init__(
        self,
        teacher: Any,
        grid: NoiseGrid,
        ratio: int = 2,
        solver: str = "heun",
        weighting: str = "geomean",
        intervals: str = "loss",
        device: torch.device | str = "cpu",
    ) -> None:
        if weighting not in WEIGHTINGS:
            raise ValueError(f"unknown weighting {weighting!r}; there are {', '.join(WEIGHTINGS)}")
        if solver not in ("heun", "euler"):
            raise ValueError(f"unknown solver {solver!r}; there are heun and euler")
        self.teacher, self.grid, self.ratio, self.solver, self.weighting = teacher, grid, ratio, solver, weighting
        self.student_grid = grid.every(ratio)
        self.starts = self._starts()
        self.intervals = Intervals(len(self.starts), intervals, device)
        self._grid_levels = torch.tensor(grid.levels, dtype=torch.float64, device=device)

    def _starts(self) -> tuple[float, ...]:
        return self.student_grid.levels[:-1]

    def _level_index(self, interval: Tensor) -> Tensor:
        """Indices into the teacher's levels, from where each jump starts to where it ends: int64 [K + 1, N]."""
        return torch.arange(self.ratio + 1, device=interval.device)[:, None] + interval * self.ratio

    def _landing(self, x: Tensor, levels: Tensor, labels: Tensor | None, augment_labels: Tensor | None) -> Tensor:
        """x_s, where the teacher arrives from `x` at levels[0] when it steps down `levels`."""
        return teacher_landing(self._denoiser(self.teacher, labels, augment_labels), x, levels, self.solver)

    def _denoiser(self, net: Any, labels: Tensor | None, augment_labels: Tensor | None) -> Denoiser:
        return lambda x, sigma: call_network(net, x, sigma.flatten(), labels, augment_labels).to(torch.float64)

    def levels(self, interval: Tensor) -> Tensor:
        """The noise levels that each image passes, from start to end of its jump: float64 [steps + 1, N, 1, 1, 1]."""
        self._grid_levels = self._grid_levels.to(interval.device)
        index = self._level_index(interval)
        return self._grid_levels[index].reshape(len(index), -1, 1, 1, 1)

    @torch.no_grad()
    def jumps(
        self,
        clean: Tensor,
        interval: Tensor,
        noise: Tensor,
        labels: Tensor | None = None,
        augment_labels: Tensor | None = None,
    ) -> Jump:
        """Noises `clean` to the start of each image's interval, and asks the teacher where its jump should land.

        float64, because an error in the landing grows by t / (t - s) in the target; the network itself computes in its
        own precision.
        """
        levels = self.levels(interval)
        t, s = levels[0], levels[-1]
        x = clean.to(torch.float64) + t * noise.to(torch.float64)
        landing = self._landing(x, levels, labels, augment_labels)
        return Jump(interval, x, t, s, jump_target(x, landing, t, s), augment_labels)

    def __call__(
        self,
        net: Any,
        images: Tensor,
        labels: Tensor | None = None,
        augment_pipe: Callable[..., tuple[Tensor, Tensor]] | None = None,
        draws: RandomSource | None = None,
    ) -> Tensor:
        """The loss of every pixel, as in `training.loss`; also records each interval's loss for `intervals`."""
        draws = draws or RandomSource(images.device)
        interval, correction = self.intervals.draw(draws, len(images))
        clean, augment_labels = augment_batch(net, images, augment_pipe, draws)
        jump = self.jumps(clean, interval, draws.randn(*clean.shape), labels, augment_labels)
        answer = call_network(net, jump.x, jump.t.flatten(), labels, augment_labels)
        weight = WEIGHTINGS[self.weighting](jump.t, jump.s, getattr(net, "sigma_data", None))
        loss = weight.to(answer.dtype) * (answer - jump.target.to(answer.dtype)) ** 2
        self.intervals.note(interval, loss.flatten(1).mean(dim=1))
        return loss if self.intervals.rule == "uniform" else loss * correction.to(loss.dtype).reshape(-1, 1, 1, 1)


class SelfTeacherLoss(EDMDistillationLoss):
    """The teacher takes one step only, and the student's own moving average jumps the rest of the way.

    `self_teacher` is that average; the other arguments are those of the plain loss. Jumps start at every level of the
    teacher and end where their segment of K levels ends (TRACT, Berthelot et al. 2023; with a single segment,
    consistency distillation, Song et al. 2023). A step costs the same for any `ratio`.
    """

    target_name = "target"

    def __init__(self, teacher: Any, self_teacher: Any, *stage: Any, **settings: Any) -> None:
        super().__init__(teacher, *stage, **settings)
        self.self_teacher = self_teacher

    def _starts(self) -> tuple[float, ...]:
        return self.grid.levels[:-1]

    def _level_index(self, interval: Tensor) -> Tensor:
        """Start of the jump, end of the teacher's one step, end of the segment: int64 [3, N]."""
        return torch.stack([interval, interval + 1, (interval // self.ratio + 1) * self.ratio])

    def _landing(self, x: Tensor, levels: Tensor, labels: Tensor | None, augment_labels: Tensor | None) -> Tensor:
        first, rest = (self._denoiser(net, labels, augment_labels) for net in (self.teacher, self.self_teacher))
        return segment_landing(first, rest, x, levels, self.solver)
