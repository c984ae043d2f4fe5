"""Compares recipes of distillation: each is a set of distill.py's options, each run is a ladder of its own.

    python -m bench.recipe --teacher=runs/demo/teacher/network-snapshot-000050.pkl --data=runs/demo/digits.zip \\
        --detector=runs/demo/detector.pt --outdir=runs/recipe rates weightings

runs the named screens (see SCREENS below, or --list) and prints a table: end-point RMSE
and Fréchet distance of every rung, mean and deviation over the seeds. What was run before is not run again, what was
interrupted resumes. Each run is one process of one thread, `--jobs` at a time.
"""

from __future__ import annotations

import concurrent.futures
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from dnnlib import cli
from training.weighting import WEIGHTINGS

ROOT = Path(__file__).resolve().parent.parent

# What all runs of a screen share; a variant's own options come after and win.
SHORT = "--num_steps=16 --until=8 --duration=0.02 --batch=64 --lr=5e-4"  # the first halving
OLD = f"{SHORT} --weighting=snr-trunc --intervals=uniform"  # what the defaults were before these screens
LADDER = "--num_steps=16 --until=1 --duration=0.04 --batch=64 --lr=5e-4"  # four equal stages, with the defaults

Screen = tuple[str, dict[str, str]]
SCREENS: dict[str, Screen] = {
    "weightings": (OLD, {name: f"--weighting={name}" for name in WEIGHTINGS}),
    "intervals": (SHORT, {f"{name}, by loss": f"--weighting={name} --intervals=loss" for name in WEIGHTINGS}),
    "rates": (OLD, {f"lr {lr}": f"--lr={lr}" for lr in ("1e-3", "5e-4", "3.5e-4", "2.5e-4")}),
    "rates-new": (SHORT, {f"lr {lr}": f"--lr={lr}" for lr in ("1e-3", "7e-4", "5e-4", "3.5e-4", "2.5e-4")}),
    "optimiser": (
        SHORT,
        {
            "batch 32": "--batch=32",
            "batch 128": "--batch=128",
            "warm-up 2 kimg": "--warmup=0.002",
            "clipped at 1": "--clip=1",
            "cosine decay": "--lr-decay=cosine",
            "no decay": "--lr-decay=none",
            "no decay, EMA of width 0.1": "--lr-decay=none --ema-std=0.1",
            "no decay, EMA of width 0.05": "--lr-decay=none --ema-std=0.05",
            "EMA of width 0.05": "--ema-std=0.05",
            "no EMA": "--ema=0",
            "dropout 0.13": "--dropout=0.13",
        },
    ),
    "teachers": (SHORT, {"heun": "", "euler": "--teacher-solver=euler"}),
    "ladders": (
        LADDER,
        {
            "defaults": "",
            "old defaults": "--weighting=snr-trunc --intervals=uniform",
            "jump": "--weighting=jump",
            "landing": "--weighting=landing",
            "longer last stages": "--duration=0.03,0.03,0.05,0.05",
            "longer first stage": "--duration=0.07,0.03,0.03,0.03",
            "from 32": "--num_steps=32 --duration=0.032",
            "from 64": "--num_steps=64 --duration=0.02667",
            "16 -> 4 -> 1": "--ratio=4 --duration=0.08",
            "16 -> 4 -> 1, equal time": "--ratio=4 --duration=0.049",
            "8 -> 1": "--num_steps=8 --duration=0.0533",
            "16 -> 1 at once": "--ratio=16 --duration=0.16",
            "16 -> 1, self-teacher": "--ratio=16 --self-teacher --duration=0.16",
            "16 -> 1, self-teacher, equal time": "--ratio=16 --self-teacher --duration=0.147",
            "16 -> 4 -> 1, self-teacher": "--ratio=4 --self-teacher --duration=0.08",
        },
    ),
    "finalists": (
        LADDER,
        {
            "geomean": "--weighting=geomean",
            "landing": "--weighting=landing",
            "geomean, longer first stage": "--weighting=geomean --duration=0.07,0.03,0.03,0.03",
        },
    ),
    "budgets": (LADDER, {f"{kimg} kimg a stage": f"--duration={kimg / 1000}" for kimg in (10, 20, 40, 80)}),
}


@dataclass(frozen=True)
class Task:
    """One run: a variant of a screen with one seed."""

    screen: str
    variant: str
    options: list[str]  # of distill.py
    folder: Path


def plan(screens: Sequence[str], seeds: Sequence[int], only: str, outdir: Path) -> list[Task]:
    """Every variant of the screens whose name contains `only`, with every seed."""
    tasks = []
    for screen in screens:
        base, variants = SCREENS[screen]
        for variant, options in variants.items():
            if only in variant:
                name = "".join(c if c.isalnum() or c in "-.+" else "_" for c in variant)
                for seed in seeds:
                    words = [*base.split(), *options.split(), f"--seed={seed}"]
                    tasks.append(Task(screen, variant, words, outdir / screen / name / f"seed{seed}"))
    return tasks


def run_ladder(folder: Path, options: Sequence[str]) -> list[dict[str, Any]] | None:
    """Runs distill.py in a process of its own, or reads what it left; its rungs, None where it failed."""
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(ROOT / "distill.py"), f"--outdir={folder}", *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with open(folder / "log.txt", "a", encoding="utf-8") as log:
        done = subprocess.run(command, stdout=log, stderr=log, cwd=ROOT, env=environment)
    if done.returncode:
        return None
    rungs: list[dict[str, Any]] = json.loads((folder / "ladder.json").read_text(encoding="utf-8"))
    return rungs


def share_teacher(source: Path, folder: Path) -> None:
    """Copies what a ladder has measured of teacher and data, so that it is not measured again."""
    if not (folder / "rungs").exists():
        teacher = json.loads((source / "ladder.json").read_text(encoding="utf-8"))[0]["steps"]
        files = [
            *source.glob("rungs/reference-*"),
            *source.glob("rungs/floor-*"),
            *source.glob(f"rungs/steps-{teacher}*"),
        ]
        (folder / "rungs").mkdir(parents=True)
        for file in files:
            shutil.copy(file, folder / "rungs")


def summary(runs: Sequence[list[dict[str, Any]]]) -> str:
    """Every student's end-point RMSE and Fréchet distance over the teacher's: mean and deviation over runs."""
    cells = []
    for rungs in list(zip(*runs, strict=True))[1:]:
        cell = f"{rungs[0]['steps']}: {spread([rung['endpoint_rmse'] for rung in rungs], 4)}"
        if all(rung["fd"] is not None for rung in rungs):
            cell += f" fd x{spread([rung['fd'] / run[0]['fd'] for rung, run in zip(rungs, runs, strict=True)], 3)}"
        cells.append(cell)
    return "   ".join(cells)


def spread(values: Sequence[float], digits: int) -> str:
    """'0.0743 +- 0.0012'; a single value has no deviation."""
    deviation = f" +- {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{deviation}"


@cli.command(name="recipe")
@click.argument("screens", nargs=-1, type=cli.Choice(list(SCREENS)))
@click.option("--teacher", help="Network file of the first teacher", metavar="PKL")
@click.option("--data", help="Path to the dataset", metavar="ZIP|DIR")
@click.option("--detector", help="Features for the Fréchet distance", metavar="FILE")
@click.option("--outdir", help="A folder for every run is made there", metavar="DIR", default="runs/recipe")
@click.option("--seeds", help="Seeds of every variant", metavar="LIST", type=cli.IntList(), default="0")
@click.option("--jobs", help="Runs at the same time", metavar="INT", type=cli.Whole(min=1), default=2)
@click.option("--eval-num", help="Images that measure a rung", metavar="INT", type=cli.Whole(min=2), default=2000)
@click.option("--only", help="Variants whose names contain this", metavar="TEXT", default="")
@click.option("--extra", help="Further options of distill.py, for all runs; they win", metavar="TEXT", default="")
@click.option("--list", "show", help="Only show the variants and their options", is_flag=True)
def command(
    screens: tuple[str, ...],
    teacher: str | None,
    data: str | None,
    detector: str | None,
    outdir: str,
    seeds: list[int],
    jobs: int,
    eval_num: int,
    only: str,
    extra: str,
    show: bool,
) -> None:
    """Run the named screens, all unless named, and print how good each variant's students are."""
    tasks = plan(screens or list(SCREENS), seeds, only, Path(outdir))
    if show:
        for task in tasks:
            print(f"{task.screen:11s} {task.variant:34s} {' '.join(task.options)}")
        return
    if not tasks:
        raise cli.UsageError(f"--only={only}: no variant of these screens has that in its name")
    if teacher is None or data is None or detector is None:
        raise cli.UsageError("--teacher, --data and --detector are needed")
    common = [f"--data={data}", f"--transfer={teacher}", f"--detector={detector}", f"--eval-num={eval_num}"]
    common += ["--eval-batch=125", "--eval-sets=1", "--curve=0", "--tick=10", "--save-every=5"]

    first = Path(outdir, f"teacher-{eval_num}")  # a ladder of next to no training: what it measures is good for all
    if run_ladder(first, [*common, *SHORT.split(), "--duration=0.001", "--seed=0", *extra.split()]) is None:
        raise cli.UserError(f"the teacher can't be measured: {first}/log.txt has the reason")

    def run(task: Task) -> list[dict[str, Any]] | None:
        share_teacher(first, task.folder)
        return run_ladder(task.folder, [*common, *task.options, *extra.split()])

    failures = 0
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        results = zip(tasks, pool.map(run, tasks), strict=True)
        for (screen, variant), group in itertools.groupby(results, key=lambda pair: (pair[0].screen, pair[0].variant)):
            runs = list(group)
            good = [rungs for _, rungs in runs if rungs is not None]
            failures += len(runs) - len(good)
            failed = f"  ({len(runs) - len(good)} failed, see their log.txt)" if len(good) < len(runs) else ""
            print(f"{screen:11s} {variant:34s} {summary(good) if good else ''}{failed}", flush=True)
    if failures:
        raise cli.UserError(f"{failures} of {len(tasks)} runs failed; log.txt in the folder of each has the reason")


def main(args: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    return cli.run(command, args)


if __name__ == "__main__":
    sys.exit(main())
