"""Trains a diffusion model (VP, VE, EDM), or distils one into half its steps (edm_distillation)."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

from dnnlib import cli  # before packages: it prints what to do where they are missing

# isort: split
import click

from engine.options import check_options, options_of_file
from training.recipe import Options, options_of


@cli.command(name="train")
@options_of("train", "Main")
@cli.config_option(options_of_file)
@options_of("train", "Distillation")
@options_of("train", "Hyperparameters")
@cli.section("Performance")
@cli.device_option
@options_of("train", "Performance")
@options_of("train", "Output and resuming")
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
    start makes a new numbered directory in --outdir; with --nosubdir the same command resumes the run.
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
        snapshot = setup.train(options, run, announce=run.announce)
        for line in next_steps.describe_end(options, run, snapshot):
            dist.print0(line)
    dist.shutdown()


def describe_start(found: tuple[Path, dict[str, Any]] | None, total_nimg: int) -> str:
    """What a run would do, by the state that it has found."""
    if found is None:
        return "start from the beginning"
    path, state = found
    if state["position"]["nimg"] >= total_nimg:
        return f"have nothing to train: {path} belongs to a finished run"
    return f"resume from {path}"


main = partial(cli.run, command)

if __name__ == "__main__":
    sys.exit(main())
