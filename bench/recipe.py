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
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import click

from dnnlib import cli
from ladders.results import Rung
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


@dataclass
class Group:
    """Ladders of one kind: by a student's number of steps, one value for every seed."""

    name: str
    seeds: int = 0
    distances: dict[int, list[float]] = field(default_factory=dict)  # over the teacher's; none where not measured
    errors: dict[int, list[float]] = field(default_factory=dict)  # end-point RMSE


def read_group(name: str, folders: Iterable[Path]) -> Group:
    """The ladders in `folders`."""
    group = Group(name)
    for folder in folders:
        teacher, *students = [Rung(**line) for line in json.loads((folder / "ladder.json").read_text(encoding="utf-8"))]
        group.seeds += 1
        for rung in students:
            group.errors.setdefault(rung.steps, []).append(rung.endpoint_rmse)
            if rung.fd is not None and teacher.fd:
                group.distances.setdefault(rung.steps, []).append(rung.fd / teacher.fd)
    return group


def to_markdown(groups: Sequence[Group]) -> str:
    """A row for every group, a column for every number of steps: distance over the teacher's, then end-point RMSE."""
    steps = sorted({count for group in groups for count in group.errors}, reverse=True)
    rows = [["ladder", "seeds", *(f"{count} step{'s' * (count > 1)}" for count in steps)], ["---"] * (2 + len(steps))]
    for group in groups:
        cells = [group.name, str(group.seeds)]
        for count in steps:
            distance = [f"{spread(group.distances[count], 3)}x"] if count in group.distances else []
            error = [spread(group.errors[count], 4)] if count in group.errors else []
            cells.append("<br>".join(distance + error))
        rows.append(cells)
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
def command(
    screens: tuple[str, ...],
    teacher: str,
    data: str,
    detector: str,
    outdir: str,
    seeds: list[int],
    jobs: int,
    eval_num: int,
    only: str,
    extra: str,
) -> None:
    """Run the named screens, by default all, and print how good each variant's students are."""
    variants = list(plan(screens or list(SCREENS), only))
    if not variants:
        raise cli.UsageError(f"--only={only}: no variant of these screens has that in its name")
    common = [f"--data={data}", f"--transfer={teacher}", f"--detector={detector}", f"--eval-num={eval_num}"]
    common += ["--eval-batch=125", "--eval-sets=1", "--curve=0", "--tick=10", "--save-every=5"]

    first = Path(outdir, f"teacher-{eval_num}")  # a ladder of next to no training: what it measures is good for all
    if not run_ladder(first, [*common, *SHORT.split(), "--duration=0.001", "--seed=0", *extra.split()]):
        raise cli.UserError(f"the teacher can't be measured: {first}/log.txt has the reason")
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        runs: dict[str, dict[str, list[Path]]] = {}  # screen -> variant -> folders
        results = {}
        for screen, variant, folder, options in variants:
            for seed in seeds:
                place = Path(outdir, folder, f"seed{seed}")
                words = [*common, *options, f"--seed={seed}", *extra.split()]
                results[place] = pool.submit(run_ladder, place, words, first)
                runs.setdefault(screen, {}).setdefault(variant, []).append(place)
        for screen, folders in runs.items():
            good = {name: [place for place in places if results[place].result()] for name, places in folders.items()}
            print(f"{screen}\n\n{to_markdown([read_group(*each) for each in good.items()])}\n", flush=True)
    failed = [place for place, result in results.items() if not result.result()]
    if failed:
        raise cli.UserError(f"{len(failed)} of {len(results)} runs failed; log.txt has the reason: {failed[0]}/log.txt")


def main(args: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    return cli.run(command, args)


if __name__ == "__main__":
    sys.exit(main())
