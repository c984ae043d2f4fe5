"""Compares recipes of distillation: each is a set of distill.py's options, each run is a ladder of its own.

    python -m bench.recipe --teacher=runs/demo/teacher/network-snapshot-000050.pkl --data=runs/demo/digits.zip \\
        --detector=runs/demo/detector.pt --outdir=runs/recipe rates weightings

runs the named screens (see SCREENS below, or --list) and prints a table: end-point RMSE
and Fréchet distance of every rung, mean and deviation over the seeds. What was run before is not run again, what was
interrupted goes on. Each run is one process of one thread, `--jobs` at a time.
"""

from __future__ import annotations

import concurrent.futures
import json
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import click

from training.config import WEIGHTINGS

ROOT = Path(__file__).resolve().parent.parent

# What all runs of a screen share; a variant's own options come after and win.
SHORT = "--num_steps=16 --until=8 --duration=0.02 --batch=64 --lr=5e-4"  # the first halving
OLD = f"{SHORT} --weighting=snr-trunc --intervals=uniform"  # what the defaults were before these screens
LADDER = "--num_steps=16 --until=1 --duration=0.04 --batch=64 --lr=5e-4"  # the demo's, with the defaults

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
            "8 -> 1": "--num_steps=8 --duration=0.0533",
            "16 -> 1 at once": "--ratio=16 --duration=0.16",
            "16 -> 1, self-teacher": "--ratio=16 --self-teacher --duration=0.16",
            "16 -> 1, self-teacher, equal time": "--ratio=16 --self-teacher --duration=0.147",
            "16 -> 4 -> 1, self-teacher": "--ratio=4 --self-teacher --duration=0.08",
        },
    ),
    "budgets": (LADDER, {f"{kimg} kimg a stage": f"--duration={kimg / 1000}" for kimg in (10, 20, 40, 80)}),
}


def run_one(folder: Path, options: list[str], common: list[str], share: Path | None) -> list[dict[str, Any]] | None:
    """One ladder in `folder`, unless it is there; its rungs, or None where it failed (its log says why)."""
    folder.mkdir(parents=True, exist_ok=True)
    if share is not None and not (folder / "rungs").exists():  # the teacher is measured once for all
        shutil.copytree(
            share / "rungs",
            folder / "rungs",
            ignore=lambda _, names: [n for n in names if "steps-" in n and n not in teacher_files(share)],
        )
    command = [sys.executable, str(ROOT / "distill.py"), f"--outdir={folder}", *common, *options]
    with open(folder / "log.txt", "a", encoding="utf-8") as log:
        done = subprocess.run(command, stdout=log, stderr=log, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"})
    return json.loads((folder / "ladder.json").read_text()) if done.returncode == 0 else None


def teacher_files(share: Path) -> list[str]:
    """Names of the files in which a finished ladder keeps its teacher's measurement."""
    rungs = json.loads((share / "ladder.json").read_text())
    return [path.name for path in (share / "rungs").glob(f"steps-{rungs[0]['steps']}*")]


def summary(runs: list[list[dict[str, Any]]]) -> str:
    """Every student's end-point RMSE and Fréchet distance over the teacher's: mean and deviation over runs."""
    cells = []
    for rungs in zip(*runs, strict=True):
        teacher = [run[0]["fd"] for run in runs]
        if rungs[0]["nfe"] == runs[0][0]["nfe"]:
            continue
        errors = [rung["endpoint_rmse"] for rung in rungs]
        text = f"{rungs[0]['steps']}: {spread(errors)}"
        if all(rung["fd"] is not None for rung in rungs):
            text += f" fd x{spread([rung['fd'] / first for rung, first in zip(rungs, teacher, strict=True)], 3)}"
        cells.append(text)
    return "   ".join(cells)


def spread(values: list[float], digits: int = 4) -> str:
    """'0.0743 +- 0.0012'."""
    deviation = f" +- {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{deviation}"


@click.command(context_settings={"show_default": True})
@click.argument("screens", nargs=-1)
@click.option("--teacher", required=True, help="Network file of the first teacher")
@click.option("--data", required=True, help="Data set")
@click.option("--detector", required=True, help="Made by fid.py detector")
@click.option("--outdir", default="runs/recipe", help="A folder for every run is made there")
@click.option("--seeds", default="0", help="Comma-separated seeds of every variant")
@click.option("--jobs", default=2, help="Runs at the same time")
@click.option("--eval-num", default=2000, help="Images that measure a rung")
@click.option("--only", default="", help="Variants whose names contain this")
@click.option("--extra", default="", help="Further options of distill.py for all runs")
@click.option("--list", "show", is_flag=True, help="Only show the variants")
def main(
    screens: tuple[str, ...],
    teacher: str,
    data: str,
    detector: str,
    outdir: str,
    seeds: str,
    jobs: int,
    eval_num: int,
    only: str,
    extra: str,
    show: bool,
) -> None:
    """Runs SCREENS and prints how good each variant's students are."""
    common = [f"--data={data}", f"--transfer={teacher}", f"--detector={detector}", f"--eval-num={eval_num}"]
    common += ["--eval-batch=125", "--tick=10", "--save-every=5", *extra.split()]
    tasks: dict[tuple[str, str], list[tuple[Path, list[str]]]] = {}
    for screen in screens:
        base, variants = SCREENS[screen]
        for name, options in variants.items():
            if only in name:
                words = [*base.split(), *options.split()]
                tasks[screen, name] = [
                    (
                        Path(
                            outdir,
                            screen,
                            "".join(c if c.isalnum() or c in "-.+" else "_" for c in name),
                            f"seed{seed}",
                        ),
                        [*words, f"--seed={seed}"],
                    )
                    for seed in seeds.split(",")
                ]
    if show:
        for (screen, name), runs in tasks.items():
            print(f"{screen:12s} {name:28s} {' '.join(runs[0][1])}")
        return
    share = Path(outdir, "teacher")  # its measurement, shared by all runs
    first = next(iter(tasks.values()))[0][1] if tasks else []
    steps = next(word for word in first if word.startswith("--num_steps"))
    if (
        run_one(
            share,
            [steps, f"--until={int(steps.split('=')[1]) // 2}", "--duration=0.001", "--batch=64", "--seed=0"],
            common,
            None,
        )
        is None
    ):
        sys.exit(f"the teacher can't be measured: see {share}/log.txt")
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        futures = {
            key: [pool.submit(run_one, folder, options, common, share) for folder, options in runs]
            for key, runs in tasks.items()
        }
        for (screen, name), waiting in futures.items():
            results = [future.result() for future in waiting]
            good = [result for result in results if result is not None]
            failed = f"   {len(results) - len(good)} failed" if len(good) < len(results) else ""
            print(f"{screen:12s} {name:28s} {summary(good) if good else ''}{failed}", flush=True)


if __name__ == "__main__":
    main()
