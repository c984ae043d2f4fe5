"""A whole ladder: N -> N/K -> ... -> 1 steps, every rung trained, then measured in the same way as the first teacher.

docs/formats.md names its files. Each is written in one piece as soon as its content is known, so that the same command,
started again, does only what was not finished: a stage resumes from its own training state; a finished one, and a
measured seed set, are read.
"""

from __future__ import annotations

import contextlib
import io
import json
import shlex
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from dnnlib.atomic import atomic_write, check_no_link, locked
from dnnlib.errors import UsageError, UserError
from dnnlib.util import count, read_json
from engine.costs import describe_cost, disk_need, free_disk, gib, training_calls
from engine.next_steps import has_classes, inception_fits, launched, train_command, trusting
from engine.options import ALTERING, COMMAND_LINE, by_content
from engine.setup import GRID_FILE, Run, load_everywhere, prepare, teacher_grid, train
from formats.network_files import NetworkFile
from formats.state import images_seen, list_states
from torch_utils import distributed as dist
from training import pictures
from training.config import check_run_dir, differences
from training.grids import Sampling
from training.recipe import LadderOptions, Options, flag
from training.samplers import nfe
from training.steps import plan_ladder

from .measuring import SHOWN, Log, Measuring, curve_plan
from .results import CurvePoint, Rung, describe, ladder_figure, to_csv

LONGEST = 1e6  # Mimg, as in train.py
SEEDS = 1 << 32  # different ones


class Ladder:
    """Trains and measures the stages one after the other, and writes the files of a ladder.

    Construction and the start of `run` refuse all that cannot work, by UsageError or UserError with one helpful line,
    before anything is trained or measured.
    """

    def __init__(self, stage_options: Options, options: LadderOptions, log: Log = dist.print0) -> None:
        assert stage_options.transfer is not None
        self.base, self.options, self.log = stage_options, options, log
        if options.eval_sets * options.eval_num > SEEDS:
            raise UsageError(
                f"--eval-sets={options.eval_sets} of --eval-num={options.eval_num} images need more seeds than the "
                f"{SEEDS} there are; use fewer"
            )
        if not stage_options.outdir:
            raise UsageError("--outdir is empty")
        self.outdir = Path(stage_options.outdir)
        check_run_dir(str(self.outdir), make=False, owner="ladder")
        self.teacher = load_everywhere(stage_options.transfer, stage_options.trust_network_code)
        num_steps = options.num_steps or (self.teacher.sampling.grid.steps if self.teacher.sampling else None)
        if num_steps is None:
            raise UsageError(
                f"--num_steps is needed: {self.teacher.source} is undistilled and has no noise grid of its own"
            )
        self.ratios = plan_ladder(num_steps, options.until, options.ratio)
        self.chain = [num_steps]
        for ratio in self.ratios:
            self.chain.append(self.chain[-1] // ratio)
        self.durations = one_per_stage("--duration", options.duration, self.chain)
        if max(self.durations) > LONGEST:
            raise UsageError(f"--duration: {max(self.durations):g} million images are too many; {LONGEST:g} at most")
        self.lrs = one_per_stage("--lr", options.lr, self.chain)
        self.has_curve = options.curve and self.teacher.sampling is None  # the teacher itself at its students' costs
        self.rungs: list[Rung] = []
        self.images: list[Tensor] = []  # of the first seed set of each rung
        self.curve: list[CurvePoint] = []

    def check(self) -> Run:
        """The first stage, and a few lines about what is going to happen. Raises UsageError or UserError for options
        and data that won't do."""
        options = self.stage_options(0, self.teacher)
        self.grid = teacher_grid(options, self.teacher, self.chain)
        first = prepare(options, self.grid)
        assert first.stage is not None
        first.dataset.close()
        self.config, self.solver = first.config, first.stage.solver
        grid = Sampling(first.stage.grid, self.solver, ratio=1)  # an undistilled teacher is sampled as it is distilled
        self.first = replace(self.teacher, sampling=self.teacher.sampling or grid)
        self.recipes = [self.recipe(index, first) for index in range(len(self.ratios))]
        problem = dist.broadcast_object(self.find_changes() if dist.is_main() else None)
        if problem is not None:
            raise UserError(f"{problem}. Use those of before, or a new --outdir")
        self.log(f"Ladder:                  {' -> '.join(map(str, self.chain))} steps, {self.solver} teacher")
        self.log(f"Results:                 {self.outdir}/ladder.json, ladder.csv, ladder.png, samples.png")
        if self.options.detector == "inception" and not inception_fits(first.dataset):
            note = "Inception, made for photographs, says little of such images: see --detector, fid.py detector"
            self.log(f"Note: {note}")
        runs = [replace(first, config=replace(self.config, duration=each)) for each in self.durations]
        need = sum(disk_need(each).total for each in runs)
        self.log(f"Disk of all stages:      at most {gib(need)}, {gib(free_disk(str(self.outdir)))} free")
        return first

    def print_costs(self) -> None:
        """`--dry-run`: what each stage and its measurement cost. Nothing is written."""
        first = self.check()
        sets, size, flops = self.options.eval_sets, self.options.eval_num, first.cost.flops
        rows: list[Sequence[object]] = [("", "training", "", "", "measuring", "", "")]
        rows.append(("stage", "kimg", "calls an image", "FLOP", "images", "FLOP", "done before"))
        total, teacher = 0.0, self.teacher.sha256
        for index, steps in enumerate(self.chain[1:]):
            kimg = max(int(self.durations[index] * 1000), 1)
            calls = training_calls("euler" if index else self.solver, self.ratios[index], self.base.self_teacher)
            costs = kimg * 1000 * calls * flops, sets * size * steps * flops
            total += sum(costs)
            record = self.record_of(index, teacher) or {"sha256": None}
            teacher, done = record["sha256"], f"{record['kimg']:g} kimg" if "kimg" in record else "-"
            row = (f"{self.chain[index]} -> {steps}", kimg, f"{calls:g}", f"{costs[0]:.3g}", f"{sets} x {size}")
            rows.append((*row, f"{costs[1]:.3g}", done))
        points = curve_plan(self.chain[1:]) if self.has_curve else []
        for name, networks in {"the teacher": [(self.solver, self.chain[0])] * sets, "its curve": points}.items():
            cost = size * flops * sum(nfe(steps, solver) for solver, steps in networks)
            total += cost
            if networks:
                rows.append((name, "", "", "", f"{len(networks)} x {size}", f"{cost:.3g}", ""))
        table = ["{:<12} {:>9} {:>14} {:>10}   {:>12} {:>10}   {}".format(*row).rstrip() for row in rows]
        for line in [*describe_cost(first)[:2], "", *table, f"All together:            {total:.3g} FLOP"]:
            self.log(line)

    def run(self) -> list[Rung]:
        """Everything; returns the rungs, the teacher first."""
        self.check()
        self.measuring = Measuring(self.options, self.first, self.config, self.outdir, self.log)
        if dist.is_main():
            for folder in (self.outdir / "rungs", *map(self.stage_dir, range(len(self.recipes)))):
                check_no_link(folder)
            check_run_dir(str(self.outdir / "rungs"))
        with contextlib.ExitStack() as lock:
            dist.from_rank0(lambda: lock.enter_context(locked(self.outdir)))
            self.measuring.open()
            if self.options.command_line is not None:
                given = {COMMAND_LINE: self.options.command_line, "steps": self.chain}
                self.write(self.outdir / "ladder-options.json", to_json(given))
            self.add_rung(self.first, kimg=0)
            network = self.first
            for index in range(len(self.ratios)):
                network, kimg = self.train_stage(index, network)
                self.add_rung(network, kimg)
                if self.got_worse(index):
                    break
            if self.has_curve:
                if self.measuring.news:
                    self.write_files()
                self.curve = self.measuring.curve([rung.steps for rung in self.rungs[1:]])
            self.write_files()
        return self.rungs

    def add_rung(self, network: NetworkFile, kimg: float) -> None:
        rung, images = self.measuring.measure(network, kimg)
        self.rungs.append(rung)
        self.images.append(images)
        self.log(describe(rung))

    def got_worse(self, index: int) -> bool:
        """Whether --stop-if-worse ends the ladder after stage `index`, which one line explains.

        The first student has nothing to be compared with: the teacher's end-point error is 0 by definition.
        """
        factor, (before, after) = self.options.stop_if_worse, self.rungs[-2:]
        if not factor or not index or not dist.broadcast_object(after.endpoint_rmse > factor * before.endpoint_rmse):
            return False
        go_on = ", or leave out --stop-if-worse to go on" if index + 1 < len(self.ratios) else ""
        self.log(
            f"Stopped by --stop-if-worse={factor:g}: the end-point RMSE of {count(after.steps, 'step')} is "
            f"{after.endpoint_rmse:.4g}, that of {count(before.steps, 'step')} {before.endpoint_rmse:.4g}; give stage "
            f"{index + 1} a longer --duration ({self.durations[index]:g} now; remove {self.stage_dir(index)} first, or "
            f"use a new --outdir){go_on}"
        )
        return True

    # -- stages ------------------------------------------------------------------------------------------------------

    def stage_dir(self, index: int) -> Path:
        return self.outdir / f"stage-{index + 1}-{self.chain[index]}to{self.chain[index + 1]}"

    def stage_options(self, index: int, teacher: NetworkFile) -> Options:
        """What `train.py` would be given for stage `index`."""
        return replace(
            self.base,
            outdir=str(self.stage_dir(index)),
            nosubdir=True,
            transfer=str(teacher.source) if index else self.base.transfer,
            num_steps=self.chain[index],
            ratio=self.ratios[index],
            teacher_solver=self.base.teacher_solver if index == 0 else None,
            grid=self.base.grid if index == 0 else "edm",
            duration=self.durations[index],
            lr=self.lrs[index],
        )

    def recipe(self, index: int, first: Run) -> dict[str, Any]:
        """All options that alter the student of stage `index`, with defaults filled in and files named by content."""
        assert first.stage is not None
        known = {
            "transfer": self.teacher.sha256,
            "data": first.config.data_fingerprint,
            "cond": first.config.dataset_kwargs["use_labels"],
            "teacher_solver": first.stage.solver,
            "num_steps": self.chain[0],
            "grid": self.base.grid if self.base.grid in ("edm", "measured") else list(first.stage.grid.levels),
            "ratio": self.ratios[: index + 1],
            "duration": self.durations[index],
            "lr": self.lrs[index],
        }
        return {flag(name): known.get(name, getattr(self.base, name)) for name in ALTERING}

    def find_changes(self) -> str | None:
        """A message about the first stage with a student or a state that other options were recorded for, or None."""
        for index, recipe in enumerate(self.recipes):
            for path in sorted(self.outdir.glob(f"stage-{index + 1}-*/stage.json")):
                record = read_record(path)
                if record and (record["student"] or list_states(path.parent)):
                    changes = differences(*map(by_content, (record["options"], recipe)))
                    if changes:
                        return f"{path.parent} was made with other options: {', '.join(changes)}"
        return None

    def record_of(self, index: int, teacher: str | None) -> dict[str, Any] | None:
        """The record of stage `index`, if it had this teacher, by its SHA-256 (`check` has compared its options)."""
        record = dist.from_rank0(lambda: read_record(self.stage_dir(index) / "stage.json"))
        return record if record is not None and record["teacher"] == teacher else None

    def train_stage(self, index: int, teacher: NetworkFile) -> tuple[NetworkFile, float]:
        """The student of stage `index`, and the kimg it was trained for."""
        folder, title = self.stage_dir(index), f"Stage {index + 1} of {len(self.ratios)}"
        self.log("")
        record = self.record_of(index, teacher.sha256)
        if record is not None and record["student"] is not None:
            path = folder / record["student"]
            try:
                student = load_everywhere(str(path), self.base.trust_network_code)
                if student.sha256 != record["sha256"]:
                    raise UserError(f"{path}: is not the file that this stage has left")
                self.log(f"{title}: done before, {student.source}")
                return student, record["kimg"]
            except UserError as exc:
                damaged = path.with_name(f"{path.name}.damaged")
                self.log(f"{exc}; renamed to {damaged.name}; this stage is trained again")
            dist.barrier()
            if dist.is_main():
                path.replace(damaged)
        self.write_files()  # which a start before this one may not have come to
        self.log(f"{title}: {self.chain[index]} -> {self.chain[index + 1]} steps")
        options = self.stage_options(index, teacher)
        if index == 0 and self.base.grid == "measured":  # for this chain of steps
            options = replace(options, grid=str(folder / GRID_FILE))
        run = prepare(options, self.grid if index == 0 else None)
        run.announce(self.log)
        command = train_command(options, dist.device().type)  # whose kind alters the result
        self.log(f"The same stage by itself (name another --outdir): {command}")
        self.log("")
        record = {"options": self.recipes[index], "teacher": teacher.sha256, "kimg": run.config.total_kimg}
        record |= {"train_command": command, "student": None, "sha256": None}
        self.write(folder / "stage.json", to_json(record))
        path = train(options, run)
        run.dataset.close()
        student = load_everywhere(str(path), self.base.trust_network_code)
        self.write(folder / "stage.json", to_json({**record, "student": path.name, "sha256": student.sha256}))
        return student, run.config.total_kimg

    # -- files -------------------------------------------------------------------------------------------------------

    def write(self, path: Path, data: bytes) -> None:
        if dist.is_main() and not (path.is_file() and path.read_bytes() == data):
            with atomic_write(path) as file:
                file.write(data)

    def write_files(self) -> None:
        """All that people and programs read of the rungs so far; a file that has this content already is left alone."""
        if not dist.is_main():
            return
        figure, sheet, curve = io.BytesIO(), io.BytesIO(), self.outdir / "teacher-curve.json"
        ladder_figure(self.rungs, self.curve, self.measuring.floor).savefig(figure, format="png")
        names = [f"{count(rung.steps, 'step')}, {rung.nfe} NFE" for rung in self.rungs]
        rows = [pictures.to_uint8(images[:SHOWN]) for images in self.images]
        title = "A column is one latent, a row is one network"
        pictures.labelled_rows(rows, [f"teacher: {names[0]}", *names[1:]], title).save(sheet, format="PNG")
        if self.curve:
            self.write(curve.with_suffix(".csv"), to_csv(self.curve).encode())
            self.write(curve, to_json([asdict(point) for point in self.curve]))
        else:  # what an earlier start has left goes
            curve.unlink(missing_ok=True)
            curve.with_suffix(".csv").unlink(missing_ok=True)
        self.write(self.outdir / "ladder.csv", to_csv(self.rungs).encode())
        self.write(self.outdir / "ladder.png", figure.getvalue())
        self.write(self.outdir / "samples.png", sheet.getvalue())
        self.write(self.outdir / "ladder.json", to_json([asdict(rung) for rung in self.rungs]))  # after the others


def one_per_stage(name: str, values: list[float], chain: Sequence[int]) -> list[float]:
    """One value for all stages of a chain of steps, or one for each. Raises UsageError for any other number of them."""
    stages = len(chain) - 1
    if len(values) not in (1, stages):
        raise UsageError(
            f"{name} has {count(len(values), 'value')} for {count(stages, 'stage')} ({' -> '.join(map(str, chain))} "
            f"steps); give one, or one for each stage"
        )
    return values * stages if len(values) == 1 else values


def next_commands(ladder: Ladder) -> list[tuple[str, str]]:
    """(what for, command) after a ladder: images of its last student, a report, and a detector where there is none."""
    last, data, file = ladder.rungs[-1], str(ladder.config.dataset_kwargs["path"]), ladder.outdir / "detector.pt"
    images = [f"--network={last.network}", f"--outdir={ladder.outdir / 'images'}", "--seeds=0-63"]
    images += [*([f"--labels={data}"] if ladder.measuring.labels is not None else []), *trusting(ladder.base)]
    commands = {
        f"images of the student of {count(last.steps, 'step')}": [*launched("generate.py"), *images],
        "all about this ladder on one page": [*launched("report.py", alone=True), str(ladder.outdir)],
    }
    if last.fd is None and has_classes(data):
        title = f"a detector of its own, then the same command with --detector={file} adds distances"
        commands[title] = [*launched("fid.py", alone=True), "detector", f"--data={data}", f"--dest={file}"]
    return [(title, shlex.join(words)) for title, words in commands.items()]


def to_json(content: Any) -> bytes:
    return (json.dumps(content, indent=2, allow_nan=False) + "\n").encode()


def read_record(path: Path) -> dict[str, Any] | None:
    """The content of a stage.json, or None if it is missing or unreadable. If the student's file is missing, `student`
    is None and `kimg` that of the newest state."""
    try:
        record = read_json(path)
        student, kimg, _ = record["student"], record["kimg"], (record["teacher"], record["sha256"])
        if not record["options"].keys() >= set(map(flag, ALTERING)):  # of a version that left some out
            run = read_json(path.with_name("training_options.json"))
            values = {**asdict(Options("", "")), **run[COMMAND_LINE]}
            record["options"] = {**{flag(name): values[name] for name in ALTERING}, **record["options"]}
        if student not in (None, Path(student or "").name):  # a path, and what has other content is renamed
            return None
        if not isinstance(kimg, (int, float)) or not 0 <= kimg < 1e15:
            return None
    except (AttributeError, KeyError, TypeError):
        return None
    if student is None or not (path.parent / student).is_file():
        states = list_states(path.parent)
        record |= {"student": None, "sha256": None, "kimg": images_seen(states[0]) / 1000 if states else 0.0}
    return record
