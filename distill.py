"""Distils a whole ladder: every stage from N steps down to one, each measured like the teacher."""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

from dnnlib import cli  # before packages: it prints what to do where they are missing

# isort: split
import click

from engine.options import check_options, ladder_options_of_file
from training.recipe import LadderOptions, Options, entries, options_of
from training.steps import plan_ladder


@cli.command(name="distill")
@options_of("distill", "Main")
@cli.config_option(ladder_options_of_file)
@options_of("distill", "Distillation")
@options_of("distill", "Hyperparameters")
@options_of("distill", "Measuring")
@cli.section("Performance")
@cli.device_option
@options_of("distill", "Performance")
@options_of("distill", "Output and resuming")
@click.option("-n", "--dry-run", help="Print what the stages cost, then exit", is_flag=True)
def command(device: str, dry_run: bool, **values: Any) -> None:
    """Distil a teacher into students of half its steps, again and again, and measure every rung of the ladder.

    \b
    From 32 steps to 1 on 8 GPUs, with FID:
      torchrun --standalone --nproc_per_node=8 distill.py --outdir=ladder --data=datasets/cifar10-32x32.zip \\
          --transfer=teacher.pkl --num_steps=32 --until=1 --duration=20 --ref=cifar10-32x32.npz

    Leaves ladder.json, ladder.csv, ladder.png and samples.png in --outdir, teacher-curve.json and .csv (the teacher
    itself with as few steps), and a run directory for every stage. The same command resumes there.

    What would it cost? The same command with --dry-run prints it and changes nothing.

    \b
    The same ladder elsewhere, with another seed:
      python distill.py --config=ladder/ladder-options.json --outdir=ladder-seed-1 --seed=1
    """
    given = {k: v for k, v in cli.given(click.get_current_context()).items() if k not in cli.COMMAND_LINE_ONLY}
    options = LadderOptions(**{each.name: values.pop(each.name) for each in entries(LadderOptions)}, command_line=given)
    stages = Options(precond="edm_distillation", **values)
    check_options(stages, cli.world_size())  # this and the next are answered at once, before anything heavy is loaded
    if options.num_steps is not None:
        plan_ladder(options.num_steps, options.until, options.ratio)

    from torch_utils import distributed as dist

    dist.init(device, cli.options_in_use())
    from engine.stopping import stopping_at_once
    from ladders.ladder import Ladder, next_commands
    from ladders.results import format_table

    ladder = Ladder(stages, options)
    if dry_run:
        ladder.print_costs()
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


main = partial(cli.run, command)

if __name__ == "__main__":
    sys.exit(main())
