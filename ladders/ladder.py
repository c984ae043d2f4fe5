"""A whole ladder: N -> N/K -> ... -> 1 steps, every rung trained, then measured in the same way as the first teacher.

What a ladder's folder holds besides ladder.json, ladder.csv, teacher-curve.json, teacher-curve.csv, ladder.png and
samples.png:

    stage-1-32to16/          a run directory as train.py makes it, and stage.json: with what it began, and how it ended,
                             and the train.py command that does the same
    ladder-options.json      the options that were given, for distill.py --config
    rungs/steps-16.npz       a rung's first seed set: its numbers, everything they depend on, the first images
    rungs/steps-16-set-2.npz the same of its second one, without images
    rungs/curve-heun-8.npz   the teacher itself at a student's cost
    rungs/reference-*.npz    statistics of the data set, good for --ref too
    rungs/floor-*.json       how far as many images of the data set are from all of it

Each is written in one piece as soon as its content is known, so that the same command started again does again only
what was not finished: a stage goes on from its own training state; a finished one, and a measured seed set, are read.
"""

from __future__ import annotations

import contextlib
import io
import json
import shlex
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from dnnlib.atomic import atomic_write, check_no_link, locked, write_text
from dnnlib.errors import UsageError, UserError, public_url
from dnnlib.util import count, read_json
from engine.costs import describe_cost, disk_need, free_disk, gib, training_calls
from engine.next_steps import (
    by_images,
    has_classes,
    images_to_measure,
    inception_fits,
    launched,
    train_command,
    trusting,
)
from engine.options import ALTERING, COMMAND_LINE, by_content
from engine.setup import Run, load_everywhere, prepare, train
from formats.network_files import NetworkFile
from formats.state import images_seen, list_states
from torch_utils import distributed as dist
from training import pictures
from training.config import check_run_dir, differences
from training.grids import Sampling, Solver
from training.recipe import LadderOptions, Options, flag
from training.samplers import nfe
from training.steps import plan_ladder

from .measuring import SEEDS, SHOWN, Measured, Measuring, Past, curve_plan
from .results import (
    CurvePoint,
    Rung,
    describe_rung,
    plot_ladder,
    to_csv,
)

LONGEST = 1e6  # Mimg, as in train.py


class Ladder:
    """Trains and measures the stages one after the other, and writes the files of a ladder.

    Construction and the start of `run` refuse all that cannot work, by UsageError or UserError with one helpful line,
    before anything is trained or measured.
    """

    def __init__(
        self, stage_options: Options, options: LadderOptions, say: Callable[[str], None] = dist.print0
    ) -> None:
        assert stage_options.transfer is not None
        self.base, self.options, self.say = stage_options, options, say
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
        self.lengths = [max(int(duration * 1000), 1) for duration in self.durations]  # kimg
        self.lrs = one_per_stage("--lr", options.lr, self.chain)
        self.held = contextlib.ExitStack()  # the folder, from the first file on
        self.noted: set[str] = set()
        self.measured: list[Measured] = []
        self.curve: list[CurvePoint] = []
        self.written: Any = None  # what the files say, as far as this start of the program knows

    def run(self) -> list[Rung]:
        """Everything; returns the rungs, the teacher first."""
        first = self.check()
        with self.held:
            return self.climb(first)

    def check(self) -> Run:
        """The first stage. Raises UsageError or UserError for options and data that won't do."""
        first = prepare(self.stage_options(0, self.teacher))
        assert first.stage is not None
        first.dataset.close()
        self.check_stages(first)
        self.config, self.solver = first.config, first.stage.solver
        return first

    def announce(self, first: Run) -> None:
        """What is going to happen, in a few lines."""
        self.say(f"Ladder:                  {' -> '.join(map(str, self.chain))} steps, {self.solver} teacher")
        self.say(f"Results:                 {self.outdir}/ladder.json, ladder.csv, ladder.png, samples.png")
        if self.options.detector == "inception" and not inception_fits(first.dataset):
            self.say(
                "Note: Inception, made for photographs, says little of such images: see --detector, fid.py detector"
            )
        need = sum(
            disk_need(replace(self.config, duration=each), first.dataset, first.stage).total for each in self.durations
        )
        self.say(f"Disk of all stages:      at most {gib(need)}, {gib(free_disk(str(self.outdir)))} free")

    def tell_costs(self) -> None:
        """`--dry-run`: what each stage and its measurement cost. Nothing is written."""
        first = self.check()
        self.announce(first)
        for line in describe_cost(first)[:2]:
            self.say(line)
        solvers: list[Solver] = ["euler"] * len(self.ratios)  # students take Euler steps
        solvers[0] = self.solver
        calls = [training_calls(*each, self.base.self_teacher) for each in zip(solvers, self.ratios, strict=True)]
        sets, size, flops = self.options.eval_sets, self.options.eval_num, first.cost.flops
        past, costs = Past(self.outdir, self.options), []
        form = "{:<12} {:>9} {:>14} {:>10}   {:>12} {:>10}   {}"

        def tell(name: str, looks: int, looked: float, done: str, training: Sequence[str] = ("", "", "")) -> None:
            self.say(form.format(name, *training, f"{looks} x {size}", f"{looks * looked:.3g}", done))

        self.say("")
        self.say(form.format("", "training", "", "", "measuring", "", "").rstrip())
        self.say(form.format("stage", "kimg", "calls an image", "FLOP", "images", "FLOP", "done before"))
        for index, (kimg, each) in enumerate(zip(self.lengths, calls, strict=True)):
            steps = self.chain[index + 1]
            trained, looked = kimg * 1000 * each * flops, size * steps * flops
            before, student = self.trained_before(index)
            known = past.sets(steps, student)
            costs.append((trained + sets * looked, trained * max(1 - before / kimg, 0) + (sets - known) * looked))
            done = f"{before:g} kimg, {known} of {count(sets, 'seed set')}" if before else "-"
            tell(f"{self.chain[index]} -> {steps}", sets, looked, done, (str(kimg), f"{each:g}", f"{trained:.3g}"))
        known, looked = past.sets(self.chain[0], self.teacher.sha256), size * nfe(self.chain[0], self.solver) * flops
        costs.append((sets * looked, (sets - known) * looked))
        tell("the teacher", sets, looked, f"{known} of {count(sets, 'seed set')}" if known else "-")
        if self.has_curve:
            points = curve_plan(self.chain[1:])
            missing = past.curve(self.teacher.sha256, points)
            everything, rest = (size * flops * sum(nfe(n, s) for s, n in each) for each in (points, missing))
            costs.append((everything, rest))
            known = len(points) - len(missing)
            done = f"{known} of {count(len(points), 'point')}" if known else "-"
            tell("its curve", len(points), everything / len(points), done)
        total, left = map(sum, zip(*costs, strict=True))
        to_do = f", about {left:.3g} of them still to do" if left else ", all of them done"
        self.say(f"All together:            {total:.3g} FLOP{to_do if left < total else ''}")

    def trained_before(self, index: int) -> tuple[float, str | None]:
        """kimg that stage `index` has behind it, as its files' names say, and a finished student's SHA-256."""
        folder = self.stage_dir(index)
        record = read_record(folder / "stage.json")
        if record is None or record["options"] != self.recipes[index]:
            return 0.0, None
        if record["student"] is not None and (folder / record["student"]).is_file():
            return record["kimg"], record["sha256"]
        states = list_states(folder)
        return (images_seen(states[0]) / 1000 if states else 0.0), None

    @property
    def has_curve(self) -> bool:
        """Whether the teacher itself is measured at its students' costs."""
        return self.options.curve and self.teacher.sampling is None

    def climb(self, first: Run) -> list[Rung]:
        """`run`, once nothing speaks against it."""
        assert first.stage is not None
        self.announce(first)
        options, steps = self.options, self.chain[0]
        self.measuring = Measuring(options, self.teacher, steps, self.solver, self.config, self.outdir, self.say)
        if dist.is_main():
            for folder in (self.outdir / "rungs", *map(self.stage_dir, range(len(self.recipes)))):
                check_no_link(folder)
            check_run_dir(str(self.outdir / "rungs"))
        dist.from_rank0(lambda: self.held.enter_context(locked(self.outdir)))
        self.measuring.open()
        if self.options.command_line is not None and dist.is_main():
            told = json.dumps({COMMAND_LINE: self.options.command_line, "steps": self.chain}, indent=2)
            write_text(self.outdir / "ladder-options.json", told + "\n")

        grid = Sampling(first.stage.grid, self.solver, ratio=1)  # an undistilled teacher is sampled as it is distilled
        network = replace(self.teacher, sampling=self.teacher.sampling or grid)
        if self.has_curve:
            self.curve = self.measuring.curve(self.chain[1:], measure=False)
        self.add_rung(network, kimg=0)
        for index in range(len(self.ratios)):
            network, kimg = self.train_stage(index, network)
            self.add_rung(network, kimg)
            if self.got_worse(index):
                break
        if self.has_curve:
            self.curve = self.measuring.curve([measured.rung.steps for measured in self.measured[1:]])
        self.write_files()
        return [measured.rung for measured in self.measured]

    def got_worse(self, index: int) -> bool:
        """Whether --stop-if-worse ends the ladder after stage `index`; then one line says why, and what to do.

        The first student has nothing to be compared with: the teacher's end-point error is 0 by definition.
        """
        factor = self.options.stop_if_worse
        if factor is None or index == 0:
            return False
        before, after = (measured.rung.endpoint_rmse for measured in self.measured[-2:])
        if not dist.broadcast_object(after > factor * before):
            return False
        names = [count(steps, "step") for steps in self.chain[index : index + 2]]
        go_on = ", or leave out --stop-if-worse to go on" if index + 1 < len(self.ratios) else ""
        self.say(
            f"Stopped by --stop-if-worse={factor:g}: the end-point RMSE of {names[1]} is {after:.4g}, that of "
            f"{names[0]} {before:.4g}; give stage {index + 1} a longer --duration ({self.durations[index]:g} now; "
            f"remove {self.stage_dir(index)} first, or use a new --outdir){go_on}"
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
            duration=self.durations[index],
            lr=self.lrs[index],
        )

    def recipe(self, index: int, first: Run) -> dict[str, Any]:
        """All options that alter the student of stage `index`, with defaults filled in and files told by content."""
        assert first.stage is not None
        known = {
            "transfer": self.teacher.sha256,
            "data": first.config.data_fingerprint,
            "cond": first.config.dataset_kwargs["use_labels"],
            "teacher_solver": first.stage.solver,
            "num_steps": self.chain[0],
            "ratio": self.ratios[: index + 1],
            "duration": self.durations[index],
            "lr": self.lrs[index],
        }
        return {flag(name): known.get(name, getattr(self.base, name)) for name in ALTERING}

    def check_stages(self, first: Run) -> None:
        """Raises UserError, naming them, for options that differ from those of a stage that has come to something."""
        self.recipes = [self.recipe(index, first) for index in range(len(self.ratios))]
        problem = dist.broadcast_object(self.find_changes() if dist.is_main() else None)
        if problem is not None:
            raise UserError(f"{problem}. Use those of before, or a new --outdir")

    def find_changes(self) -> str | None:
        """What the first stage that differs from its recipe was made with."""
        for index, recipe in enumerate(self.recipes):
            for path in sorted(self.outdir.glob(f"stage-{index + 1}-*/stage.json")):
                record = read_record(path)
                if record and (record["student"] or list_states(path.parent)):
                    changes = differences(*map(by_content, (record["options"], recipe)))
                    if changes:
                        return f"{path.parent} was made with other options: {', '.join(changes)}"
        return None

    def train_stage(self, index: int, teacher: NetworkFile) -> tuple[NetworkFile, float]:
        """The student of stage `index`, and the kimg it was trained for."""
        folder, title = self.stage_dir(index), f"Stage {index + 1} of {len(self.ratios)}"
        self.say("")
        record = dist.broadcast_object(read_record(folder / "stage.json") if dist.is_main() else None)
        if record and record["options"] == self.recipes[index] and record["teacher"] == teacher.sha256:
            student = self.load_finished(folder, record)
            if student is not None:
                self.say(f"{title}: done before, {student.source}")
                return student, record["kimg"]
        self.write_files()  # which a start before this one may not have come to
        self.say(f"{title}: {self.chain[index]} -> {self.chain[index + 1]} steps")
        options = self.stage_options(index, teacher)
        run = prepare(options)
        run.announce(self.say_once)
        command = train_command(options, dist.device().type)  # whose kind alters the result
        self.say(f"The same stage by itself (name another --outdir): {command}")
        self.say("")
        record = {
            "options": self.recipes[index],
            "teacher": teacher.sha256,
            "kimg": run.config.total_kimg,
            "train_command": command,
        }
        self.write_record(folder, {**record, "student": None, "sha256": None})
        path = train(options, run)
        run.dataset.close()
        student = load_everywhere(str(path), self.base.trust_network_code)
        self.write_record(folder, {**record, "student": path.name, "sha256": student.sha256})
        return student, run.config.total_kimg

    def say_once(self, line: str) -> None:
        """Prints a line, unless it is a note that an earlier stage had too."""
        if line not in self.noted:
            self.say(line)
        if line.startswith("Note: "):
            self.noted.add(line)

    def load_finished(self, folder: Path, record: dict[str, Any]) -> NetworkFile | None:
        """The student that a finished stage left; None where it isn't finished, or the file is not the one it left."""
        path = folder / str(record["student"])
        if not dist.broadcast_object(record["student"] is not None and path.is_file()):
            return None
        try:
            student = load_everywhere(str(path), self.base.trust_network_code)
            problem = None if student.sha256 == record["sha256"] else "is not the file that this stage has left"
        except UserError as exc:
            problem = str(exc).removeprefix(f"{path}: ")
        if problem is None:
            return student
        damaged = path.with_name(f"{path.name}.damaged")
        self.say(f"{path} {problem}: it is {damaged.name} now, and made again")
        dist.barrier()
        if dist.is_main():
            path.replace(damaged)
        return None

    def write_record(self, folder: Path, record: dict[str, Any]) -> None:
        if dist.is_main():
            write_text(folder / "stage.json", json.dumps(record, indent=2) + "\n")

    def add_rung(self, network: NetworkFile, kimg: float) -> None:
        """Measures a network; then the files are up to date."""
        measured, news = self.measuring.measure(network, kimg)
        self.measured.append(measured)
        if news:
            self.write_files()
        self.say(describe_rung(measured.rung))

    # -- files -------------------------------------------------------------------------------------------------------

    def write_files(self) -> None:
        """All that people and programs read of the rungs so far; a file that says the same already is left alone."""
        if not dist.is_main():
            return
        rungs = [measured.rung for measured in self.measured]
        content = (rungs, self.curve, self.measuring.floor)
        if content == self.written:
            return
        contents = {"ladder.csv": to_csv(Rung, rungs).encode()}
        if self.curve:
            contents["teacher-curve.csv"] = to_csv(CurvePoint, self.curve).encode()
        figure = io.BytesIO()
        plot_ladder(rungs, figure, self.curve, self.measuring.floor)
        contents["ladder.png"] = figure.getvalue()
        names = [f"{count(rung.steps, 'step')}, {rung.nfe} NFE" for rung in rungs]
        names[0] = f"teacher: {names[0]}"
        rows = [pictures.to_uint8(measured.images[:SHOWN]) for measured in self.measured]
        sheet = io.BytesIO()
        pictures.labelled_rows(rows, names, "A column is one latent, a row is one network").save(sheet, format="PNG")
        contents["samples.png"] = sheet.getvalue()
        if self.curve:
            contents["teacher-curve.json"] = to_json(self.curve)
        else:  # what an earlier start has left may have been measured in another way
            for name in ("teacher-curve.json", "teacher-curve.csv"):
                (self.outdir / name).unlink(missing_ok=True)
        contents["ladder.json"] = to_json(rungs)  # last: where it is, the others are
        for name, data in contents.items():
            path = self.outdir / name
            if not path.is_file() or path.read_bytes() != data:
                with atomic_write(path) as file:
                    file.write(data)
        self.written = content


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
    """(what for, command) after a ladder: images of its last student, a picture of them, a report, and its distance by
    more images, if there is time for more."""
    outdir, last = ladder.outdir, ladder.measured[-1].rung
    student = f"--network={last.network}"
    data = str(ladder.config.dataset_kwargs["path"])
    drawn = [*([f"--labels={data}"] if ladder.measuring.labels is not None else []), *trusting(ladder.base)]
    images = [*launched("generate.py"), student, f"--outdir={outdir / 'images'}", "--seeds=0-63", *drawn]
    picture = [*launched("example.py", alone=True), student, f"--out={outdir / 'grid.png'}", *drawn]
    commands = [
        (f"images of the student of {count(last.steps, 'step')}", images),
        ("a picture of them", picture),
        ("all about this ladder on one page", [*launched("report.py", alone=True), str(outdir)]),
    ]
    if last.fd is None and has_classes(data):
        file = outdir / "detector.pt"
        own = [*launched("fid.py", alone=True), "detector", f"--data={data}", f"--dest={file}"]
        commands.append((f"a detector of its own, then the same command with --detector={file} adds distances", own))
    if last.fd is not None and ladder.options.eval_num < images_to_measure():
        distance = [*launched("fid.py"), "gen", student, f"--ref={ladder.measuring.reference_source}", *drawn]
        if ladder.options.detector not in ("inception", "none"):
            distance.append(f"--detector={public_url(ladder.options.detector)}")
        commands.append(by_images("its distance by more images", distance))
    return [(title, shlex.join(words)) for title, words in commands]


def to_json(rows: Sequence[Any]) -> bytes:
    """Dataclass values as a JSON list."""
    return (json.dumps([asdict(row) for row in rows], indent=2, allow_nan=False) + "\n").encode()


def read_record(path: Path) -> dict[str, Any] | None:
    """What `write_record` wrote, or None where there is no such file or it can't be read."""
    try:
        record = read_json(path)
        if not {"options", "teacher", "kimg", "student", "sha256"} <= record.keys():
            return None
        if not record["options"].keys() >= set(map(flag, ALTERING)):  # of a version that left some out
            run = read_json(path.with_name("training_options.json"))
            values = {**asdict(Options("", "")), **run[COMMAND_LINE]}
            record["options"] = {**{flag(name): values[name] for name in ALTERING}, **record["options"]}
        is_sound = isinstance(record["kimg"], (int, float)) and 0 <= record["kimg"] < 1e15
        # a name, not a path: where its content is another, the file is renamed
        return record if is_sound and record["student"] in (None, Path(record["student"] or "").name) else None
    except (AttributeError, KeyError, TypeError):
        return None
