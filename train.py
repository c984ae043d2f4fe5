"""Trains a diffusion model (VP, VE, EDM), or distils one into half its steps (edm_distillation)."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dnnlib import cli  # before packages: it prints what to do where they are missing

# isort: split
import click

from engine.options import (
    WANDB_PROJECT,
    Options,
    batch_gpu_option,
    check_options,
    options_of_file,
    recompute_option,
    teacher_precision_option,
)
from training.config import ARCHITECTURES, INTERVALS
from training.weighting import WEIGHTINGS

NAMES = cli.Choice


@cli.command(name="train")
@cli.section("Main")
@click.option("--outdir", help="Where to save the results", metavar="DIR", required=True)
@click.option("--data", help="Path to the dataset", metavar="ZIP|DIR", required=True)
@click.option(
    "--cond", help="Class-conditional: default 0, or as the teacher", metavar="BOOL", type=cli.Bool(), default=None
)
@click.option("--arch", help="Network architecture: default ddpmpp, or the teacher's", type=NAMES(list(ARCHITECTURES)))
@click.option(
    "--precond",
    help="Preconditioning and loss; edm_distillation runs one stage of progressive distillation",
    type=NAMES(["vp", "ve", "edm", "edm_distillation"]),
    default="edm",
)
@click.option("--transfer", help="Teacher, or weights to start from", metavar="PATH|URL")
@cli.config_option(options_of_file)
@cli.section("Distillation")
@click.option("--num_steps", help="Teacher's sampling steps; the student gets N / ratio", metavar="N", type=cli.Whole())
@click.option("--ratio", help="Teacher steps per student step", metavar="INT", type=cli.Whole(min=2), default=2)
@click.option(
    "--teacher-solver",
    help="How the teacher steps: default heun for an undistilled teacher, euler for a student",
    type=NAMES(["heun", "euler"]),
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
@click.option(
    "--self-teacher",
    help="The student's own EMA makes all but the first step of a jump (TRACT, consistency)",
    is_flag=True,
)
@click.option("--targets", help="How often to save targets-KKKKKK.png", metavar="TICKS", type=cli.Whole(min=1))
@cli.section("Hyperparameters")
@click.option(
    "--duration",
    help="Training duration: default 200, distillation 20",
    metavar="MIMG",
    type=cli.Number(0, 1_000_000, min_open=True),
)
@click.option("--batch", help="Total batch size", metavar="INT", type=cli.Whole(1, 1_000_000), default=512)
@batch_gpu_option
@click.option("--cbase", help="Channel multiplier  [default: varies]", metavar="INT", type=cli.Whole(1, 65536))
@click.option("--cres", help="Channels per resolution  [default: varies]", metavar="LIST", type=cli.IntList(1, 1024))
@click.option(
    "--blocks", help="Residual blocks per resolution  [default: varies]", metavar="INT", type=cli.Whole(1, 64)
)
@click.option(
    "--lr",
    help="Learning rate: default 10e-4, distillation 5e-4",
    metavar="FLOAT",
    type=cli.Number(min=0, min_open=True),
)
@click.option(
    "--lr-decay",
    help="Decay to 0 at the end: default none, distillation linear",
    type=NAMES(["none", "linear", "cosine"]),
)
@click.option("--warmup", help="Learning-rate ramp: default 10, distillation 0", metavar="MIMG", type=cli.Number(min=0))
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
@click.option(
    "--dropout", help="Dropout probability: default 0.13, distillation 0", metavar="FLOAT", type=cli.Number(0, 1)
)
@click.option(
    "--augment", help="Augment probability: default 0.12, distillation 0", metavar="FLOAT", type=cli.Number(0, 1)
)
@click.option("--xflip", help="Enable dataset x-flips", metavar="BOOL", type=cli.Bool(), default=False)
@click.option(
    "--sigma-data",
    help="Data deviation (edm)  [default: 0.5]",
    metavar="FLOAT",
    type=cli.Number(min=0, min_open=True),
)
@click.option("--p-mean", help="Mean of ln(sigma) (edm)  [default: -1.2]", metavar="FLOAT", type=cli.Number(-20, 20))
@click.option(
    "--p-std",
    help="Deviation of ln(sigma) (edm)  [default: 1.2]",
    metavar="FLOAT",
    type=cli.Number(min=0, min_open=True),
)
@cli.section("Performance")
@click.option("--device", help="Where to compute", type=NAMES(["auto", "cuda", "cpu"]), default="auto")
@click.option(
    "--precision", help="Arithmetic of the trained network: default fp32", type=NAMES(["fp32", "tf32", "bf16", "fp16"])
)
@click.option("--fp16", help="Same as --precision=fp16", metavar="BOOL", type=cli.Bool(), default=False)
@teacher_precision_option
@recompute_option
@click.option("--compile", help="torch.compile the networks", metavar="BOOL", type=cli.Bool(), default=False)
@click.option("--ls", help="Loss scaling", metavar="FLOAT", type=cli.Number(min=0, min_open=True), default=1)
@click.option("--bench", help="Enable cuDNN benchmarking", metavar="BOOL", type=cli.Bool(), default=True)
@click.option("--cache", help="Cache dataset in CPU memory", metavar="BOOL", type=cli.Bool(), default=True)
@click.option("--workers", help="Threads that read images", metavar="INT", type=cli.Whole(1, 256), default=1)
@click.option("--deterministic", help="CUDA: deterministic kernels, for exact resuming", is_flag=True)
@cli.section("Output and going on")
@click.option("--desc", help="String to include in result dir name", metavar="STR")
@click.option("--nosubdir", help="Use --outdir itself; the same command goes on where it was", is_flag=True)
@click.option(
    "--tick",
    help="How often to print progress",
    metavar="KIMG",
    type=cli.Number(min=0, min_open=True),
    default=50,
)
@click.option("--snap", help="How often to save snapshots", metavar="TICKS", type=cli.Whole(min=1), default=50)
@click.option(
    "--dump", help="How often to dump state (the last 10 are kept)", metavar="TICKS", type=cli.Whole(min=1), default=500
)
@click.option(
    "--save-every",
    help="Rolling training state (the last 2 are kept)",
    metavar="MIN",
    type=cli.Number(min=0),
    default=10,
)
@click.option("--seed", help="Random seed  [default: random]", metavar="INT", type=cli.Whole(min=0))
@click.option("--resume", help="Go on from a training state", metavar="PT|latest")
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
@click.option("-n", "--dry-run", help="Print training options and costs, then exit", is_flag=True)
def command(device: str, dry_run: bool, **values: Any) -> None:
    """Train a diffusion model, or distil one into fewer steps.

    \b
    Train a class-conditional EDM model on 8 GPUs:
      torchrun --standalone --nproc_per_node=8 train.py --outdir=training-runs \\
          --data=datasets/cifar10-32x32.zip --cond=1 --arch=ddpmpp

    \b
    Distil 32 Heun steps of a teacher into 16, then these into 8:
      torchrun --standalone --nproc_per_node=8 train.py --outdir=training-runs \\
          --data=datasets/cifar10-32x32.zip --precond=edm_distillation --num_steps=32 --transfer=teacher.pkl
      torchrun --standalone --nproc_per_node=8 train.py --outdir=training-runs \\
          --data=datasets/cifar10-32x32.zip --precond=edm_distillation --transfer=student-16.pkl

    \b
    What would it cost? And the same run again, with another seed:
      python train.py --outdir=training-runs --data=datasets/cifar10-32x32.zip --cond=1 --dry-run
      python train.py --config=training-runs/00000-run/training_options.json --seed=1

    MIMG stands for millions of images, KIMG for thousands, and a tick ends with a line of progress (--tick). Every
    start makes a new numbered directory in --outdir; with --nosubdir the same command goes on where it was.
    """
    options = Options(**values)
    check_options(options, cli.world_size())  # answered at once, before anything heavy is loaded

    from torch_utils import distributed as dist

    dist.init(device, cli.options_in_use())
    from engine import costs, next_steps, setup

    run = setup.prepare(options)

    if dry_run:
        found = setup.find_state(options, run)
        dist.print0(f"\nTraining options:\n{json.dumps(run.config.to_options(), indent=2)}\n")
        run.announce()
        for line in costs.describe_cost(run):
            dist.print0(line)
        dist.print0(f"Would {describe_start(found, run.config.total_nimg)}")
        dist.print0("Dry run; exiting.")
    else:
        snapshot = setup.train(options, run, tell=run.announce)
        for line in next_steps.describe_end(options, run, snapshot):
            dist.print0(line)
    dist.shutdown()


def describe_start(found: tuple[Path, dict[str, Any]] | None, total_nimg: int) -> str:
    """What a run would do, by the state that it has found."""
    if found is None:
        return "start from the beginning"
    path, state = found
    if state["position"]["nimg"] >= total_nimg:
        return f"have nothing to train: {path} is a finished run's"
    return f"go on from {path}"


def main(args: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    return cli.run(command, args)


if __name__ == "__main__":
    sys.exit(main())
