"""Compares recipes of distillation: each is a set of distill.py's options, each run is a ladder of its own.

    python -m bench.recipe --teacher=runs/demo/teacher/network-snapshot-000050.pkl --data=runs/demo/digits.zip \\
        --detector=runs/demo/detector.pt --outdir=runs/recipe rates weightings

trains every variant of the named screens (SCREENS below) and prints a table of each: the Fréchet distance as a multiple
of the same run's teacher, and the end-point RMSE; means over the seeds, with their sample standard deviation. What was
run before is not run again, what was interrupted resumes. Each run is a process of one thread, `--jobs` at a time.
"""

from __future__ import annotations

import concurrent.futures
import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import click

from dnnlib import cli
from dnnlib.util import count
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
            "16 -> 4 -> 1": "--ratio=4 --duration=0.08",
            "16 -> 4 -> 1, equal time": "--ratio=4 --duration=0.049",
            "8 -> 1": "--num_steps=8 --duration=0.0533",
            "16 -> 1, self-teacher": "--ratio=16 --self-teacher --duration=0.16",
            "16 -> 1, self-teacher, equal time": "--ratio=16 --self-teacher --duration=0.147",
            "16 -> 4 -> 1, self-teacher": "--ratio=4 --self-teacher --duration=0.08",
        },
    ),
}


def plan(screens: Sequence[str], only: str = "") -> Iterator[tuple[str, str, str, list[str]]]:
    """(screen, variant, name of its folder, options of distill.py) of every variant whose name contains `only`."""
    for screen in screens:
        base, variants = SCREENS[screen]
        for variant, options in variants.items():
            if only in variant:
                name = "".join(c if c.isalnum() or c in "-.+" else "_" for c in variant)
                yield screen, variant, f"{screen}/{name}", [*base.split(), *options.split()]


def run_ladder(folder: Path, options: Sequence[str], measured: Path | None = None) -> bool:
    """Runs distill.py in a process of its own; returns whether it succeeded.

    measured: a ladder of the same teacher and data, whose measurements of these are not made again.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if measured is not None and not (folder / "rungs").exists():
        shutil.copytree(measured / "rungs", folder / "rungs")
    command = [sys.executable, str(ROOT / "distill.py"), f"--outdir={folder}", *options]
    with open(folder / "log.txt", "a", encoding="utf-8") as log:
        done = subprocess.run(command, stdout=log, stderr=log, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"})
    return done.returncode == 0


def to_markdown(variants: Mapping[str, Sequence[Path]]) -> str:
    """A row for every variant, which has a ladder's folder for every seed, and a column for every number of steps:
    distance over the teacher's where it was measured, then end-point RMSE."""
    table: dict[str, dict[int, str]] = {}
    for name, folders in variants.items():
        ladders = [json.loads((folder / "ladder.json").read_text(encoding="utf-8")) for folder in folders]
        pairs = [(teacher, student) for teacher, *students in ladders for student in students]
        table[f"{name} | {len(folders)}"] = cells = {}
        for steps in {student["steps"] for _, student in pairs}:
            same = [(teacher, student) for teacher, student in pairs if student["steps"] == steps]
            measured = [(teacher, student) for teacher, student in same if None not in (teacher["fd"], student["fd"])]
            cells[steps] = spread([student["endpoint_rmse"] for _, student in same], 4)
            if measured:
                ratios = [student["fd"] / teacher["fd"] for teacher, student in measured]
                cells[steps] = f"{spread(ratios, 3)}x<br>{cells[steps]}"
    columns = sorted({steps for cells in table.values() for steps in cells}, reverse=True)
    rows = [["ladder | seeds", *(count(steps, "step") for steps in columns)], ["---"] * (2 + len(columns))]
    rows += [[name, *(cells.get(steps, "") for steps in columns)] for name, cells in table.items()]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def spread(values: Sequence[float], digits: int) -> str:
    """'0.0743 ± 0.0012'; a single value has no deviation."""
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{deviation}"


@cli.command(name="recipe")
@click.argument("screens", nargs=-1, type=cli.Choice(list(SCREENS)))
@click.option("--teacher", help="Network file of the first teacher", metavar="PKL", required=True)
@click.option("--data", help="Path to the dataset", metavar="ZIP|DIR", required=True)
@click.option("--detector", help="Features for the Fréchet distance", metavar="FILE", required=True)
@click.option("--outdir", help="A folder for every run is made there", metavar="DIR", default="runs/recipe")
@click.option("--seeds", help="Seeds of every variant", metavar="LIST", type=cli.IntList(), default="0")
@click.option("--jobs", help="Runs at the same time", metavar="INT", type=cli.Whole(min=1), default=2)
@click.option("--eval-num", help="Images that measure a rung", metavar="INT", type=cli.Whole(min=2), default=2000)
@click.option("--only", help="Variants whose names contain this", metavar="TEXT", default="")
@click.option("--extra", help="Further options of distill.py, for all runs; they win", metavar="TEXT", default="")
def command(screens: tuple[str, ...], outdir: str, seeds: list[int], jobs: int, only: str, **given: Any) -> None:
    """Run the named screens, by default all, and print how good each variant's students are."""
    variants = list(plan(screens or list(SCREENS), only))
    if not variants:
        raise cli.UsageError(f"--only={only}: no variant of these screens has that in its name")
    names = {"data": "data", "teacher": "transfer", "detector": "detector", "eval_num": "eval-num"}
    common = [f"--{name}={given[own]}" for own, name in names.items()]
    common += ["--eval-batch=125", "--eval-sets=1", "--curve=0", "--tick=10", "--save-every=5"]
    extra = given["extra"].split()

    # a ladder of next to no training: what it measures is good for all
    first = Path(outdir, f"teacher-{given['eval_num']}")
    if not run_ladder(first, [*common, *SHORT.split(), "--duration=0.001", "--seed=0", *extra]):
        raise cli.UserError(f"the teacher can't be measured: {first}/log.txt has the reason")
    failed: list[Path] = []
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        runs: dict[str, dict[str, dict[Path, Any]]] = {}  # screen -> variant -> folder -> whether it succeeds
        for screen, variant, folder, options in variants:
            places = {seed: Path(outdir, folder, f"seed{seed}") for seed in seeds}
            runs.setdefault(screen, {})[variant] = {
                place: pool.submit(run_ladder, place, [*common, *options, f"--seed={seed}", *extra], first)
                for seed, place in places.items()
            }
        for screen, folders in runs.items():
            good = {name: [place for place in places if places[place].result()] for name, places in folders.items()}
            failed += [place for name, places in folders.items() for place in places if place not in good[name]]
            print(f"{screen}\n\n{to_markdown(good)}\n", flush=True)
    if failed:
        total = len(variants) * len(seeds)
        raise cli.UserError(f"{len(failed)} of {total} runs failed; log.txt has the reason: {failed[0]}/log.txt")


main = partial(cli.run, command)

if __name__ == "__main__":
    sys.exit(main())
