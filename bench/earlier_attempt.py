"""What an earlier attempt at distilling EDM networks did, as an ablation: how much each of its habits costs.

    python -m bench.earlier_attempt --teacher=TEACHER.pkl --data=digits.zip --detector=detector.pt --outdir=runs/earlier

climbs the same ladder as distill.py, with the same teacher and the same images, measures it in the same way, and leaves
the same files; `--habits` chooses which of these are taken over (by default all of them):

    clamp    the last interval ends at sigma_min, while the sampler's last jump goes to 0
    regrid   every stage builds a fresh rho-grid of its teacher's number of steps
    heun     every stage runs its teacher by Heun's method, a student too
    rate     1e-3, ramped up over the first half of a stage, then constant
    dropout  0.13, as in training from scratch
    augment  0.12, as in training from scratch (for a teacher that takes augmentation labels)

`--habits=none` is distill.py's own recipe. The rest is distill.py's, with its defaults.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
from torch import Tensor

from dnnlib import cli
from engine import setup
from engine.setup import Run
from formats.network_files import NetworkFile
from ladders.ladder import Ladder
from ladders.results import format_table
from torch_utils import distributed as dist
from training.distillation import EDMDistillationLoss
from training.grids import Solver, network_grid
from training.recipe import LadderOptions, Options
from training.training_loop import Trainer

HABITS = ("clamp", "regrid", "heun", "rate", "dropout", "augment")


class ClampedLoss(EDMDistillationLoss):
    """No jump ends below the teacher's last positive level: the last sub-step of the last interval has no length."""

    def levels(self, interval: Tensor) -> Tensor:
        return super().levels(interval).clamp(min=self.grid.levels[-2])


class ClampedTrainer(Trainer):
    """A training loop with that loss."""

    distillation_loss = ClampedLoss


class EarlierLadder(Ladder):
    """A ladder whose stages have some of the earlier attempt's habits."""

    habits: frozenset[str] = frozenset()

    def stage_options(self, index: int, teacher: NetworkFile) -> Options:
        options = super().stage_options(index, teacher)
        assert options.duration is not None
        if "rate" in self.habits:
            options = replace(options, lr=1e-3, lr_decay="none", warmup=options.duration / 2)
        if "dropout" in self.habits:
            options = replace(options, dropout=0.13)
        if "augment" in self.habits:
            options = replace(options, augment=0.12)
        return options

    def recipe(self, index: int, first: Run) -> dict[str, Any]:
        return {**super().recipe(index, first), "--habits": sorted(self.habits)}

    def train(self, options: Options, run: Run) -> Path:
        stage = run.stage
        assert stage is not None
        grid = network_grid(stage.teacher.net, stage.grid.steps) if "regrid" in self.habits else stage.grid
        solver: Solver = "heun" if "heun" in self.habits else stage.solver
        run.stage = replace(stage, grid=grid, solver=solver)
        run.config.distillation = setup.describe_distillation(run.stage)
        run.config.loss_kwargs["teacher_solver"] = solver
        return setup.train(options, run, ClampedTrainer if "clamp" in self.habits else Trainer)


class Habits(click.ParamType):
    """Comma-separated words of HABITS; or 'all', or 'none'."""

    name = "list of habits"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> frozenset[str]:
        if not isinstance(value, str):
            return frozenset(value)
        words = frozenset({"all": HABITS, "none": ()}.get(value, value.split(",")))
        if words - set(HABITS):
            self.fail(
                f"'{value}' names {', '.join(sorted(words - set(HABITS)))}; there are {', '.join(HABITS)}", param, ctx
            )
        return words


@cli.command(name="earlier_attempt")
@click.option("--habits", help="What to take over", metavar="LIST|all|none", type=Habits(), default="all")
@click.option("--teacher", help="Network file of the first teacher", metavar="PKL", required=True)
@click.option("--data", help="Path to the dataset", metavar="ZIP|DIR", required=True)
@click.option("--detector", help="Features for the Fréchet distance", metavar="FILE", required=True)
@click.option("--outdir", help="Where to save the results", metavar="DIR", required=True)
@click.option("--num_steps", help="The teacher's sampling steps", type=cli.Whole(min=2), default=16)
@click.option(
    "--duration", help="Length of a stage", metavar="MIMG", type=cli.Number(min=0, min_open=True), default=0.04
)
@click.option("--batch", help="Total batch size", type=cli.Whole(min=1), default=64)
@click.option("--eval-num", help="Images that measure a rung", type=cli.Whole(min=2), default=2000)
@click.option("--eval-sets", help="Measure a rung so many times", type=cli.Whole(min=1), default=1)
@click.option("--seed", help="Random seed", type=cli.Whole(min=0), default=0)
def command(
    habits: frozenset[str],
    teacher: str,
    data: str,
    detector: str,
    outdir: str,
    num_steps: int,
    duration: float,
    batch: int,
    eval_num: int,
    eval_sets: int,
    seed: int,
) -> None:
    """Climb a ladder with the habits of an earlier attempt, to see what each of them costs."""
    dist.init("auto")
    stages = Options(
        outdir=outdir,
        data=data,
        transfer=teacher,
        precond="edm_distillation",
        batch=batch,
        seed=seed,
        tick=10,
        lr_decay="linear",
    )
    options = LadderOptions(
        num_steps=num_steps,
        until=1,
        ratio=[2],
        duration=[duration],
        lr=[5e-4],
        detector=detector,
        eval_num=eval_num,
        eval_batch=125,
        eval_sets=eval_sets,
        curve=False,
    )
    ladder = EarlierLadder(stages, options)
    ladder.habits = habits
    dist.print0(format_table(ladder.run()))
    dist.shutdown()


def main(args: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    return cli.run(command, args)


if __name__ == "__main__":
    sys.exit(main())
