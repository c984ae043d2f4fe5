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
import hashlib
import io
import json
import math
import shlex
import statistics
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dnnlib.atomic import atomic_write, locked, write_text
from dnnlib.cli import UsageError, UserError
from dnnlib.util import open_url
from metrics import detectors
from metrics.detectors import Detector
from metrics.statistics import (
    Stats,
    check_reference,
    check_same_detector,
    dataset_against_itself,
    frechet_between,
    load_reference,
    statistics_of_images,
)
from torch_utils import distributed as dist

from . import pictures
from .config import check_run_dir, differences
from .costs import describe_cost, disk_need, free_disk, gib
from .grids import Sampling, Solver, network_grid
from .ladder_report import (
    CurvePoint,
    Floor,
    Rung,
    count,
    describe_point,
    describe_rung,
    plot_ladder,
    to_csv,
)
from .network_files import NetworkFile
from .next_steps import FID_IMAGES, launched, train_command
from .options import COMMAND_LINE, Options
from .progress import show_progress
from .samplers import nfe
from .sampling import Batch, iterate_images, plan_sampling
from .setup import Run, load_everywhere, prepare, train
from .speed import use_cpu_kernels
from .stage import plan_ladder
from .state import list_states
from .training_loop import set_precision

END_POINT_IMAGES = 2048  # compared with the teacher's: the end-point error has little noise, more would change nothing
END_POINT_VALUES = 1 << 25  # fewer of large images: 128 MiB of them are kept
SHOWN = 16  # images of every rung in samples.png
DRAWS, FEW_DRAWS, WIDE = 10, 3, 512  # from the data set; few where a detector has more than WIDE features
ABSURD = 100.0  # an end-point error of images that have left [-1, 1] for good
LONGEST = 1e6  # Mimg, as in train.py
SEEDS = 1 << 32  # different ones
PATIENCE = 4.0  # seconds of silence after which a try (of three) to download the Inception weights is given up


@dataclass(frozen=True)
class MeasuredSet:
    """What one seed set of a network came to, and what that depends on: a file in `rungs/`.

    images: of the first set, float32 [M, C, H, W] on the CPU for the first seeds: of the teacher as many as students
    are compared with, of a student those to be shown. Of the other sets and of the teacher's curve none.
    """

    key: dict[str, Any]
    fd: float | None
    endpoint_rmse: float | None  # of a first set
    seconds: float  # spent sampling `timed` images
    timed: int
    images: Tensor
    problem: str | None = None  # why there are no numbers


@dataclass(frozen=True)
class Measured:
    """A rung, and the images of its first seed set."""

    rung: Rung
    images: Tensor


@dataclass
class LadderOptions:
    """The values of `distill.py`'s options that are not a stage's own."""

    num_steps: int | None
    until: int
    ratios: list[int]
    durations: list[float]  # Mimg, one for all stages or one each
    lrs: list[float]
    ref: str | None = None
    detector: str = "inception"
    eval_num: int = 50000
    eval_batch: int = 64
    eval_sets: int = 3
    curve: bool = True
    stop_if_worse: float | None = None
    command_line: dict[str, Any] | None = None  # what was typed, for ladder-options.json


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
                f"--num_steps is needed: {stage_options.transfer} is undistilled and has no noise grid of its own"
            )
        self.ratios = plan_ladder(num_steps, options.until, options.ratios)
        self.chain = [num_steps]
        for ratio in self.ratios:
            self.chain.append(self.chain[-1] // ratio)
        self.durations = one_per_stage("--duration", options.durations, self.chain)
        if max(self.durations) > LONGEST:
            raise UsageError(f"--duration: {max(self.durations):g} million images are too many; {LONGEST:g} at most")
        self.lengths = [max(int(duration * 1000), 1) for duration in self.durations]  # kimg
        self.lrs = one_per_stage("--lr", options.lrs, self.chain)
        self.held = contextlib.ExitStack()  # the folder, from the first file on
        self.measured: list[Measured] = []
        self.curve: list[CurvePoint] = []
        self.floor: Floor | None = None
        self.written: Any = None  # what the files say, as far as this start of the program knows
        self.told_why = False  # that it was measured in another way before
        self.warned = False  # that there are few images for the detector's features

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
        need = sum(disk_need(replace(self.config, total_kimg=kimg), first.dataset).total for kimg in self.lengths)
        self.say(f"Disk of all stages:      at most {gib(need)}, {gib(free_disk(str(self.outdir)))} free")

    def tell_costs(self) -> None:
        """`--dry-run`: what each stage and its measurement cost. Nothing is written."""
        first = self.check()
        self.announce(first)
        for line in describe_cost(first)[:2]:
            self.say(line)
        calls = [first.calls if index == 0 else self.later_calls(index) for index in range(len(self.ratios))]
        nfes = [nfe(self.chain[0], self.solver), *self.chain[1:]]
        measured = self.options.eval_num * self.options.eval_sets
        total = 0.0
        self.say("")
        self.say(f"{'stage':<12} {'kimg':>9} {'calls an image':>15} {'FLOP':>10}   measuring its student: images, FLOP")
        for index, (kimg, each) in enumerate(zip(self.lengths, calls, strict=True)):
            trained = kimg * 1000 * each * first.cost.flops
            looked = measured * nfes[index + 1] * first.cost.flops
            total += trained + looked
            name = f"{self.chain[index]} -> {self.chain[index + 1]}"
            self.say(f"{name:<12} {kimg:>9} {each:>15g} {trained:>10.3g}   {measured} {looked:.3g}")
        looked = measured * nfes[0] * first.cost.flops
        self.say(f"{'the teacher':<12} {'':>9} {'':>15} {'':>10}   {measured} {looked:.3g}")
        self.say(f"All together:            {total + looked:.3g} FLOP, the teacher's own curve apart")

    def later_calls(self, index: int) -> float:
        """What training on an image costs in stage `index`, in network calls: its teacher takes Euler steps."""
        return 3.0 + (2 if self.base.self_teacher else self.ratios[index])

    def climb(self, first: Run) -> list[Rung]:
        """`run`, once nothing speaks against it."""
        assert first.stage is not None
        self.announce(first)
        self.prepare_measuring(str(self.config.extras["data_fingerprint"]))
        if self.options.command_line is not None and dist.is_main():
            told = json.dumps({COMMAND_LINE: self.options.command_line, "steps": self.chain}, indent=2)
            write_text(self.outdir / "ladder-options.json", told + "\n")

        grid = Sampling(first.stage.grid, self.solver, ratio=1)  # an undistilled teacher is sampled as it is distilled
        network = replace(self.teacher, sampling=self.teacher.sampling or grid)
        has_curve = self.options.curve and self.teacher.sampling is None
        if has_curve:
            self.curve = self.find_curve(self.chain[1:], measure=False)
        self.add_rung(network, kimg=0)
        for index in range(len(self.ratios)):
            network, kimg = self.train_stage(index, network)
            self.add_rung(network, kimg)
            if self.got_worse(index):
                break
        if has_curve:
            self.curve = self.find_curve([measured.rung.steps for measured in self.measured[1:]])
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
            transfer=str(teacher.source),
            num_steps=self.chain[index],
            ratio=self.ratios[index],
            teacher_solver=self.base.teacher_solver if index == 0 else None,
            duration=self.durations[index],
            lr=self.lrs[index],
        )

    def recipe(self, index: int, first: Run) -> dict[str, Any]:
        """All options that alter the student of stage `index`, with defaults filled in and files told by content."""
        assert first.stage is not None
        same = "weighting self_teacher lr_decay warmup batch ema ema_std clip dropout augment xflip precision"
        return {
            "--transfer": self.teacher.sha256,
            "--data": first.config.extras["data_fingerprint"],
            "--cond": first.config.dataset_kwargs["use_labels"],
            "--teacher-solver": first.stage.solver,
            "--intervals": first.config.loss_kwargs["intervals"],
            "--num_steps": self.chain[0],
            "--ratio": self.ratios[: index + 1],
            "--duration": self.durations[index],
            "--lr": self.lrs[index],
            **{f"--{name.replace('_', '-')}": getattr(self.base, name) for name in [*same.split(), "seed"]},
        }

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
                    changes = differences(record["options"], recipe)
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
        run.announce(self.say)
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
        path = self.train(options, run)
        run.dataset.close()
        student = load_everywhere(str(path), self.base.trust_network_code)
        self.write_record(folder, {**record, "student": path.name, "sha256": student.sha256})
        return student, run.config.total_kimg

    def train(self, options: Options, run: Run) -> Path:
        """What `train.py` does."""
        return train(options, run)

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

    # -- measuring ---------------------------------------------------------------------------------------------------

    def prepare_measuring(self, data_fingerprint: str) -> None:
        """Finds detector and reference; without a detector that can be had, the end-point error alone judges."""
        spec, ref = self.options.detector, self.options.ref
        given = None if ref is None else load_reference(ref)
        if given is not None and spec == "inception":
            check_same_detector(detectors.INCEPTION, given.detector_id)  # a download comes after this
        self.detector = self.find_detector()
        self.detector_id = self.detector.id if self.detector else detectors.INCEPTION
        if given is not None:
            check_same_detector(self.detector_id, given.detector_id)  # hours of work come after this
            if self.detector is not None:
                check_reference(given, self.detector)
            self.reference_id = hashlib.sha256(given.mu.tobytes() + given.sigma.tobytes()).hexdigest()
        else:
            self.reference_id = data_fingerprint
        self.reference_source = ref
        if dist.is_main():
            check_run_dir(str(self.outdir / "rungs"))
        dist.from_rank0(lambda: self.held.enter_context(locked(self.outdir)))
        self.reference = given
        if given is None:
            self.find_reference()

    def find_detector(self) -> Detector | None:
        """The detector that --detector names, or None where that is Inception and its weights can't be had."""
        if self.options.detector == "inception":
            problem = dist.broadcast_object(try_inception() if dist.is_main() else None)
            if problem is not None:
                self.say(
                    f"No Fréchet distances (fd will be null), the end-point error alone judges: {problem}. With "
                    "--detector=FILE (fid.py detector makes one) the same command adds them later, without training"
                )
                return None
        return detectors.load_detector(self.options.detector, dist.device())

    def find_reference(self) -> None:
        """Statistics of --data, and how far images drawn from it are from them: both from one pass, made once."""
        name, size = f"{self.reference_id} {self.detector_id}", self.options.eval_num
        path = self.outdir / "rungs" / f"reference-{short_hash(name)}.npz"
        self.reference_source = str(path)
        floor_path = self.outdir / "rungs" / f"floor-{short_hash(f'{name} {size}')}.json"
        known = (load_stats(path), load_floor(floor_path)) if dist.is_main() else None
        self.reference, self.floor = dist.broadcast_object(known)
        if self.detector is not None and (self.reference is None or self.floor is None):
            self.say(f"Computing the reference statistics of {self.base.data}...")
            stats, distances = dataset_against_itself(
                self.base.data,
                self.detector,
                draws=DRAWS if self.detector.dim <= WIDE else FEW_DRAWS,
                images=size,
                batch=self.options.eval_batch,
                progress=True,
            )
            self.floor = Floor(size, distances)
            if self.reference is None:  # otherwise what has been measured stands on the one that is there
                self.reference = stats
                if dist.is_main():
                    stats.save(path)
            if dist.is_main():
                write_text(floor_path, json.dumps(asdict(self.floor)) + "\n")

    def add_rung(self, network: NetworkFile, kimg: float) -> None:
        """Measures what has not been measured of a network's seed sets; then the files are up to date."""
        is_teacher = not self.measured
        plan = plan_sampling(network)
        kept = self.compared() if is_teacher else SHOWN
        sets: list[MeasuredSet] = []
        news = False
        for number in range(self.options.eval_sets):
            path = self.outdir / "rungs" / f"steps-{plan.steps}{f'-set-{number + 1}' * (number > 0)}.npz"
            found = self.recall(path, self.key(network, number))
            if found is None:
                if number and self.detector is None:
                    break  # without distances, the first set says all there is to say
                self.tell_why_again(path, self.key(network, number))
                found = self.measure_set(network, number, kept if number == 0 else 0)
                news = True
                if dist.is_main():
                    save_set(path, found)
            sets.append(found)
        if len(sets) < self.options.eval_sets or any(each.fd is None for each in sets):
            sets = [replace(sets[0], fd=None)]
        rung = combine(sets, plan.steps, plan.nfe, kimg, str(network.source))
        rung = replace(rung, images=self.options.eval_num, detector=self.detector_id if rung.fd is not None else None)
        self.measured.append(Measured(rung, sets[0].images))
        if news:
            self.write_files()
        self.say(describe_rung(self.measured[-1].rung))

    def tell_why_again(self, path: Path, key: dict[str, Any]) -> None:
        """One line, the first time, where something was measured before in another way."""
        before = load_set(path) if dist.is_main() and not self.told_why else None
        if before is not None:
            names = {"network", "levels", "solver", "teacher"}  # another network, not another way
            changes = differences(without_detector(before.key), without_detector(key))
            if before.key.get("detector") != key["detector"]:
                changes += differences({"detector": before.key.get("detector")}, {"detector": key["detector"]})
            ways = [change for change in changes if change.split(" ")[0].split(".")[0] not in names]
            if ways:
                self.say(f"Measured before in another way, so all is measured again: {', '.join(ways)}")
                self.told_why = True

    def find_curve(self, students: Sequence[int], measure: bool = True) -> list[CurvePoint]:
        """The first teacher itself at the cost of students of so many steps, on fresh grids and of the first seed set
        alone: what is known of it, and unless told otherwise, the rest."""
        points: list[CurvePoint] = []
        say = self.say if measure else lambda line: None
        for solver, steps in curve_plan(students):
            left_out = f"The teacher itself with {count(steps, f'{solver} step')} is left out:"
            try:
                grid = network_grid(self.teacher.net, steps)
            except ValueError as exc:
                say(f"{left_out} {exc}")
                continue
            network = replace(self.teacher, sampling=Sampling(grid, solver, ratio=1))
            path = self.outdir / "rungs" / f"curve-{solver}-{steps}.npz"
            found = self.recall(path, self.key(network, 0))
            if found is None:
                if not measure:
                    continue
                found = self.measure_set(network, 0, 0, is_curve=True)
                if dist.is_main():
                    save_set(path, found)
            if found.endpoint_rmse is None:
                say(f"{left_out} {found.problem}")
                continue
            points.append(CurvePoint(solver, steps, nfe(steps, solver), found.fd, found.endpoint_rmse))
            say(describe_point(points[-1]))
        return points

    def key(self, network: NetworkFile, number: int) -> dict[str, Any]:
        """What the numbers of a network's seed set `number` depend on. Latents are drawn on the device: each kind of
        device has its own."""
        assert network.sampling is not None
        return {
            "network": network.sha256,
            "levels": list(network.sampling.grid.levels),
            "solver": network.sampling.solver,
            "teacher": [self.teacher.sha256, self.chain[0], self.solver],
            "first_seed": number * self.options.eval_num,
            "images": self.options.eval_num,
            "compared": self.compared(),
            "batch": self.options.eval_batch,
            "device": dist.device().type,
            "detector": self.detector_id,
            "reference": self.reference_id,
        }

    def compared(self) -> int:
        """How many images of each rung are compared with the teacher's: those of the first seeds."""
        net = self.teacher.net
        size = net.img_channels * net.img_resolution**2
        return min(self.options.eval_num, END_POINT_IMAGES, max(END_POINT_VALUES // size, SHOWN))

    def recall(self, path: Path, key: dict[str, Any]) -> MeasuredSet | None:
        """What the file holds, if that was measured in the same way.

        While the detector can't be had, what was measured without it stands, and what was measured with it anyway.
        """
        known: MeasuredSet | None = dist.broadcast_object(load_set(path) if dist.is_main() else None)
        wanted = [key]
        if self.detector is None:
            wanted.append(without_detector(key))
        return known if known is not None and known.key in wanted else None

    def measure_set(self, network: NetworkFile, number: int, kept: int, is_curve: bool = False) -> MeasuredSet:
        """Samples the seeds of set `number`, and compares the images with the data and, those of the first seeds of
        the first set, with the teacher's.

        kept: so many of the first images are part of the result. is_curve: images that no measure can make sense of
        are a result too, a `problem`; otherwise they raise UserError.
        """
        set_precision(replace(self.config, precision="fp32"))  # whatever the training before it has set
        use_cpu_kernels(dist.device().type == "cpu")
        size, plan = self.options.eval_num, plan_sampling(network)
        sets = self.options.eval_sets if self.detector is not None and not is_curve else 1
        who = "the teacher itself" if is_curve else network.source
        which = f" (set {number + 1} of {sets})" if sets > 1 else ""
        calls = count(plan.nfe, "network call")
        self.say(f"Measuring {who}, {count(plan.steps, 'step')}: {size} images{which}, {calls} (NFE) for each...")
        timing, first = Timing(), FirstImages(self.compared() if number == 0 else 0)
        check = Checked(network, tolerant=is_curve)
        seeds = range(number * size, (number + 1) * size)
        batches = iterate_images(network, seeds, max_batch=self.options.eval_batch, device=dist.device())
        seen = first.watch(check.watch(timing.watch(batches)))
        title = f"{count(plan.steps, 'step')}, NFE {plan.nfe}"
        seen = show_progress(seen, lambda batch: len(batch.seeds), size, self.say, title)
        images = (pictures.to_uint8(batch.images) for batch in seen)
        fd, problem = None, None
        if self.detector is not None and self.reference is not None:
            try:
                stats = statistics_of_images(images, self.detector, warn=not self.warned)
                fd = frechet_between(stats, self.reference)
            except UserError as exc:
                if not is_curve:
                    raise
                problem = str(exc)
            self.warned = True
        else:
            for _ in images:
                pass
        network.net.cpu()  # makes room for training
        collected = first.collected()
        error = None
        if number == 0:
            error = rmse(collected, self.measured[0].images) if self.measured else 0.0
        problem = check.problem() or problem
        if is_curve and problem is None and error is not None and error > ABSURD:
            problem = f"its images are absurd (end-point RMSE {error:.3g})"
        if problem is not None:
            fd = error = None
        key = self.key(network, number)
        if self.detector is None:
            key = without_detector(key)
        return MeasuredSet(key, fd, error, *timing.totals(), collected[:kept].clone(), problem)

    # -- files -------------------------------------------------------------------------------------------------------

    def write_files(self) -> None:
        """All that people and programs read of the rungs so far; a file that says the same already is left alone."""
        if not dist.is_main():
            return
        rungs = [measured.rung for measured in self.measured]
        content = (rungs, self.curve, self.floor)
        if content == self.written:
            return
        contents = {"ladder.csv": to_csv(Rung, rungs).encode()}
        if self.curve:
            contents["teacher-curve.csv"] = to_csv(CurvePoint, self.curve).encode()
        figure = io.BytesIO()
        plot_ladder(rungs, figure, self.curve, self.floor)
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
    as many images as are the custom, if it was measured by fewer."""
    outdir, last = ladder.outdir, ladder.measured[-1].rung
    student = f"--network={last.network}"
    images = [*launched("generate.py"), student, f"--outdir={outdir / 'images'}", "--seeds=0-63"]
    picture = [*launched("example.py", alone=True), student, f"--out={outdir / 'grid.png'}"]
    commands = [
        (f"images of the student of {count(last.steps, 'step')}", images),
        ("a picture of them", picture),
        ("all about this ladder on one page", [*launched("report.py", alone=True), str(outdir)]),
    ]
    if last.fd is not None and ladder.options.eval_num < FID_IMAGES:
        distance = [*launched("fid.py"), "gen", student, f"--ref={ladder.reference_source}"]
        if ladder.options.detector != "inception":
            distance.append(f"--detector={ladder.options.detector}")
        commands.append((f"its distance by {FID_IMAGES} images, as is the custom", distance))
    return [(title, shlex.join(words)) for title, words in commands]


def curve_plan(students: Sequence[int]) -> list[tuple[Solver, int]]:
    """How the teacher is run at the cost of students of so many steps: with as many Euler steps, and with the most
    Heun steps (2k - 1 network calls) that cost no more; but for a single one, which is Euler's."""
    heun = dict.fromkeys((steps + 1) // 2 for steps in students if steps > 2)
    return [*(("euler", steps) for steps in dict.fromkeys(students)), *(("heun", steps) for steps in heun)]


def combine(sets: Sequence[MeasuredSet], steps: int, nfe: int, kimg: float, network: str) -> Rung:
    """A rung from its seed sets, the first one first."""
    assert sets[0].endpoint_rmse is not None
    distances = [each.fd for each in sets if each.fd is not None]
    return Rung(
        steps=steps,
        nfe=nfe,
        fd=math.fsum(distances) / len(distances) if distances else None,
        endpoint_rmse=sets[0].endpoint_rmse,
        sec_per_kimg=sum(each.seconds for each in sets) / max(sum(each.timed for each in sets), 1) * 1000,
        kimg=kimg,
        network=network,
        fd_std=statistics.stdev(distances) if len(distances) > 1 else None,
        fd_sets=distances,
    )


def to_json(rows: Sequence[Any]) -> bytes:
    """Dataclass values as a JSON list."""
    return (json.dumps([asdict(row) for row in rows], indent=2, allow_nan=False) + "\n").encode()


def short_hash(text: str) -> str:
    """A few letters for the name of a file."""
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def try_inception() -> str | None:
    """Fetches the Inception weights into the download cache; the reason in words where they can't be had.

    Gives up within seconds where there is no network: a ladder can do without.
    """
    try:
        open_url(detectors.INCEPTION_URL, return_filename=True, timeout=PATIENCE)
    except UserError as exc:
        return f"the Inception weights can't be had ({exc})"
    return None


def read_record(path: Path) -> dict[str, Any] | None:
    """What `write_record` wrote, or None where there is no such file or it can't be read."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        return record if {"options", "teacher", "kimg", "student", "sha256"} <= record.keys() else None
    except (OSError, ValueError, AttributeError):
        return None


def save_set(path: Path, measured: MeasuredSet) -> None:
    """One file for all that belongs together, so that numbers and images are of the same measurement."""
    record = {each.name: getattr(measured, each.name) for each in fields(measured) if each.name != "images"}
    with atomic_write(path) as file:
        np.savez(file, record=np.str_(json.dumps(record, allow_nan=False)), images=measured.images.numpy())


def load_set(path: Path) -> MeasuredSet | None:
    """What `save_set` wrote, or None where there is no such file or it can't be read."""
    try:
        with np.load(path, allow_pickle=False) as content:
            return MeasuredSet(**json.loads(str(content["record"])), images=torch.from_numpy(content["images"]))
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile):
        return None


def load_stats(path: Path) -> Stats | None:
    """Statistics that were computed here, or None where there is no such file or it can't be read."""
    try:
        return Stats.load(path) if path.is_file() else None
    except UserError:
        return None


def load_floor(path: Path) -> Floor | None:
    """What `find_reference` wrote, or None where there is no such file or it can't be read."""
    try:
        return Floor(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def without_detector(key: dict[str, Any]) -> dict[str, Any]:
    """The key of the same measurement without a Fréchet distance."""
    return {**key, "detector": None, "reference": None}


# ---------------------------------------------------------------------------------------------------------------------
# What looks at images as they pass


class Timing:
    """Seconds spent waiting for batches, which is sampling alone, and images got; summed over processes."""

    def __init__(self) -> None:
        self.spent: list[tuple[float, int]] = []

    def watch(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Passes batches on, measuring."""
        while True:
            start = time.perf_counter()
            batch = next(batches, None)
            if batch is None:
                return
            if batch.images.is_cuda:
                torch.cuda.synchronize(batch.images.device)
            self.spent.append((time.perf_counter() - start, len(batch.seeds)))
            yield batch

    def totals(self) -> tuple[float, int]:
        """Of the whole job: the slowest process's seconds and everybody's images, less each one's first batch, in
        which a device warms up, where there are others."""
        counted = self.spent[1:] or self.spent
        parts = dist.gather_objects((sum(seconds for seconds, _ in counted), sum(images for _, images in counted)))
        return max(seconds for seconds, _ in parts), sum(images for _, images in parts)


class FirstImages:
    """Keeps the images of seeds 0 to `count` - 1."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.kept: dict[int, np.ndarray] = {}

    def watch(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Passes batches on, keeping."""
        for batch in batches:
            wanted = [index for index, seed in enumerate(batch.seeds) if seed < self.count]
            if wanted:
                images = batch.images[wanted].cpu().numpy()
                self.kept |= {batch.seeds[index]: image for index, image in zip(wanted, images, strict=True)}
            yield batch

    def collected(self) -> Tensor:
        """Those of all processes, in the order of their seeds: float32 [count, C, H, W] on the CPU."""
        if self.count == 0:
            return torch.empty(0)
        everybodys = {seed: image for part in dist.gather_objects(self.kept) for seed, image in part.items()}
        return torch.from_numpy(np.stack([everybodys[seed] for seed in range(self.count)]))


class Checked:
    """Looks for images that no measure could make sense of."""

    def __init__(self, network: NetworkFile, tolerant: bool = False) -> None:
        self.network, self.tolerant = network, tolerant
        self.bad: list[str] = []

    def watch(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Passes batches on. Raises UserError at the first bad one; if `tolerant`, takes a note and passes zeros on,
        for the other processes wait for this one's share."""
        for batch in batches:
            if not batch.images.isfinite().all():
                what = f"some images of seeds {batch.seeds[0]} to {batch.seeds[-1]} hold NaN or infinities"
                if not self.tolerant:
                    hint = "if it was just trained, a lower --lr in a new --outdir may help"
                    raise UserError(f"{self.network.source}: {what}; {hint}")
                self.bad.append(what)
                batch = replace(batch, images=torch.zeros_like(batch.images))
            yield batch

    def problem(self) -> str | None:
        """The first note that any process has taken."""
        return next((note for part in dist.gather_objects(self.bad[:1]) for note in part), None)


def rmse(images: Tensor, others: Tensor) -> float:
    """Root mean square difference over all values, summed in float64 image by image."""
    squares = [float((a.double() - b.double()).square().mean()) for a, b in zip(images, others, strict=True)]
    return float(np.sqrt(np.mean(squares)))
