"""Distils a whole ladder: every stage from N steps down to one, each measured like the teacher."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from dnnlib import cli  # before packages: it prints what to do where they are missing

# isort: split
import click

from engine.options import (
    WANDB_PROJECT,
    Options,
    batch_gpu_option,
    check_options,
    ladder_options_of_file,
    recompute_option,
    teacher_precision_option,
)
from training.config import INTERVALS
from training.steps import plan_ladder
from training.weighting import WEIGHTINGS

NAMES = cli.Choice
POSITIVE = cli.Number(min=0, min_open=True)


@cli.command(name="distill")
@cli.section("Main")
@click.option(
    "--outdir", help="Where to save the results; the same command goes on there", metavar="DIR", required=True
)
@click.option("--data", help="Path to the dataset", metavar="ZIP|DIR", required=True)
@click.option("--transfer", help="The teacher", metavar="PATH|URL", required=True)
@click.option("--num_steps", help="The teacher's sampling steps", metavar="N", type=cli.Whole(1, 100_000))
@click.option("--until", help="Steps of the last student", metavar="N", type=cli.Whole(min=1), default=1)
@click.option(
    "--ratio",
    help="Teacher steps per student step, for all stages or each",
    metavar="LIST",
    type=cli.IntList(2, 100_000),
    default="2",
)
@click.option(
    "--duration",
    help="Length of a stage, for all or each: a first one of twice the others or more measured best",
    metavar="MIMG,...",
    type=cli.FloatList(),
    default="20",
)
@click.option("--cond", help="Class-conditional: default as the teacher", metavar="BOOL", type=cli.Bool(), default=None)
@cli.config_option(ladder_options_of_file)
@cli.section("Distillation")
@click.option(
    "--teacher-solver", help="How the first teacher steps: default heun if undistilled", type=NAMES(["heun", "euler"])
)
@click.option(
    "--weighting",
    help="Weight of noise levels in the loss; the default measured best",
    type=NAMES(list(WEIGHTINGS)),
    default="geomean",
)
@click.option(
    "--intervals",
    help="Train all jumps equally often, or by their loss: default loss, which measured better",
    type=NAMES(INTERVALS),
)
@click.option("--self-teacher", help="The student's own EMA makes all but the first step of a jump", is_flag=True)
@click.option(
    "--stop-if-worse",
    help="End where a student's endpoint_rmse is so many times that of the one before, such as 1.5",
    metavar="FACTOR",
    type=POSITIVE,
)
@cli.section("Hyperparameters")
@click.option("--batch", help="Total batch size", metavar="INT", type=cli.Whole(1, 1_000_000), default=512)
@batch_gpu_option
@click.option(
    "--lr", help="Learning rate, for all stages or each", metavar="FLOAT,...", type=cli.FloatList(), default="5e-4"
)
@click.option("--lr-decay", help="Decay to 0 over a stage", type=NAMES(["none", "linear", "cosine"]), default="linear")
@click.option("--warmup", help="Learning-rate ramp of a stage", metavar="MIMG", type=cli.Number(min=0), default=0)
@click.option(
    "--ema", help="EMA half-life, at most 5% of the images seen", metavar="MIMG", type=cli.Number(min=0), default=0.5
)
@click.option(
    "--ema-std",
    help="Power-function EMA of this relative width (EDM2's sigma_rel) instead of --ema",
    metavar="FLOAT",
    type=cli.Number(0, 0.28, min_open=True),
)
@click.option(
    "--clip", help="Largest gradient norm  [default: none]", metavar="FLOAT", type=cli.Number(min=0, min_open=True)
)
@click.option("--dropout", help="Dropout probability", metavar="FLOAT", type=cli.Number(0, 1), default=0)
@click.option("--augment", help="Augment probability", metavar="FLOAT", type=cli.Number(0, 1), default=0)
@click.option("--xflip", help="Enable dataset x-flips", metavar="BOOL", type=cli.Bool(), default=False)
@click.option("--seed", help="Random seed", metavar="INT", type=cli.Whole(min=0), default=0)
@cli.section("Measuring")
@click.option("--ref", help="Reference statistics  [default: computed from --data]", metavar="NPZ|URL")
@click.option(
    "--detector",
    help="Features for the Fréchet distance; none: endpoint_rmse alone",
    metavar="inception|none|FILE",
    default="inception",
)
@click.option(
    "--eval-num",
    help="Images that measure a rung (endpoint_rmse: the first 2048)",
    metavar="INT",
    type=cli.Whole(min=2),
    default=50000,
)
@click.option(
    "--eval-sets",
    help="Measure a rung so many times, each with --eval-num other seeds: fd becomes mean ± std",
    metavar="INT",
    type=cli.Whole(min=1),
    default=3,
)
@click.option("--eval-batch", help="Batch size when measuring", metavar="INT", type=cli.Whole(min=1), default=64)
@click.option(
    "--curve",
    help="Also measure an undistilled teacher itself at the students' costs",
    metavar="BOOL",
    type=cli.Bool(),
    default=True,
)
@cli.section("Performance")
@click.option("--device", help="Where to compute", type=NAMES(["auto", "cuda", "cpu"]), default="auto")
@click.option(
    "--precision", help="Arithmetic of the student", type=NAMES(["fp32", "tf32", "bf16", "fp16"]), default="fp32"
)
@teacher_precision_option
@recompute_option
@click.option("--compile", help="torch.compile the networks", metavar="BOOL", type=cli.Bool(), default=False)
@click.option("--bench", help="Enable cuDNN benchmarking", metavar="BOOL", type=cli.Bool(), default=True)
@click.option("--cache", help="Cache dataset in CPU memory", metavar="BOOL", type=cli.Bool(), default=True)
@click.option("--workers", help="Threads that read images", metavar="INT", type=cli.Whole(1, 256), default=1)
@click.option("--deterministic", help="CUDA: deterministic kernels, for exact resuming", is_flag=True)
@cli.section("Output and going on")
@click.option("--tick", help="How often to print progress", metavar="KIMG", type=POSITIVE, default=50)
@click.option("--snap", help="How often to save snapshots", metavar="TICKS", type=cli.Whole(min=1), default=50)
@click.option(
    "--dump", help="How often to dump state (the last 10 are kept)", metavar="TICKS", type=cli.Whole(min=1), default=500
)
@click.option("--targets", help="How often to save targets-KKKKKK.png", metavar="TICKS", type=cli.Whole(min=1))
@click.option(
    "--save-every",
    help="Rolling training state (the last 2 are kept)",
    metavar="MIN",
    type=cli.Number(min=0),
    default=10,
)
@click.option("--tensorboard", help="Also write TensorBoard events", is_flag=True)
@click.option(
    "--wandb",
    help="Also log to Weights & Biases, --wandb=PROJECT or just --wandb",
    metavar="[PROJECT]",
    is_flag=False,
    flag_value=WANDB_PROJECT,
)
@click.option(
    "--trust-network-code", help="Run the code in a --transfer file of unknown class or version", is_flag=True
)
@click.option("-n", "--dry-run", help="Print what the stages cost, then exit", is_flag=True)
def command(
    device: str,
    dry_run: bool,
    num_steps: int | None,
    until: int,
    ratio: list[int],
    duration: list[float],
    lr: list[float],
    ref: str | None,
    detector: str,
    eval_num: int,
    eval_batch: int,
    eval_sets: int,
    curve: bool,
    stop_if_worse: float | None,
    **values: Any,
) -> None:
    """Distil a teacher into students of half its steps, again and again, and measure every rung of the ladder.

    \b
    From 32 steps to 1 on 8 GPUs, with FID:
      torchrun --standalone --nproc_per_node=8 distill.py --outdir=ladder --data=datasets/cifar10-32x32.zip \\
          --transfer=teacher.pkl --num_steps=32 --until=1 --duration=20 --ref=cifar10-32x32.npz

    Leaves ladder.json, ladder.csv, ladder.png and samples.png in --outdir, teacher-curve.json and .csv (the teacher
    itself with as few steps), and a run directory for every stage. The same command started again goes on there.

    What would it cost? The same command with --dry-run tells, and changes nothing.

    \b
    The same ladder elsewhere, with another seed:
      python distill.py --config=ladder/ladder-options.json --outdir=ladder-seed-1 --seed=1
    """
    stages = Options(precond="edm_distillation", **values)
    check_options(stages, cli.world_size())  # this and the next are answered at once, before anything heavy is loaded
    if num_steps is not None:
        plan_ladder(num_steps, until, ratio)

    from torch_utils import distributed as dist

    dist.init(device, cli.options_in_use())
    from engine.stopping import stopping_at_once
    from ladders.ladder import Ladder, LadderOptions, next_commands
    from ladders.results import format_table

    options = LadderOptions(
        num_steps=num_steps,
        until=until,
        ratios=ratio,
        durations=duration,
        lrs=lr,
        ref=ref,
        detector=detector,
        eval_num=eval_num,
        eval_batch=eval_batch,
        eval_sets=eval_sets,
        curve=curve,
        stop_if_worse=stop_if_worse,
        command_line={
            k: v for k, v in cli.given(click.get_current_context()).items() if k not in cli.COMMAND_LINE_ONLY
        },
    )
    ladder = Ladder(stages, options)
    if dry_run:
        ladder.tell_costs()
        dist.print0("Dry run; exiting.")
        dist.shutdown()
        return
    with stopping_at_once("what is finished is kept: run the same command to resume"):
        rungs = ladder.run()
    dist.print0()
    dist.print0(format_table(rungs, ladder.curve, ladder.measuring.floor))
    dist.print0()
    dist.print0(
        cli.green(f"Pictures: {stages.outdir}/ladder.png (the curve) and {stages.outdir}/samples.png (the images)")
    )
    dist.print0(cli.bold("Next:"))
    for title, words in next_commands(ladder):
        dist.print0(f"  {title}\n    {words}")
    dist.shutdown()


def main(args: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    return cli.run(command, args)


if __name__ == "__main__":
    sys.exit(main())
