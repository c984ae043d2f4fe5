"""A whole ladder: N -> N/K -> ... -> 1 steps, every rung trained, then measured in the same way as the first teacher.

What a ladder's folder holds besides ladder.json, ladder.csv, ladder.png and samples.png:

    stage-1-32to16/          a run directory as train.py makes it, and stage.json: with what it began, and how it ended
    rungs/steps-16.npz       a measured rung: its numbers, everything they depend on, its first images
    rungs/reference-*.npz    statistics of the data set, good for --ref too

Each is written in one piece as soon as its content is known, so that the same command started again does again only
what was not finished: a stage goes on from its own training state, a finished one and a measured rung are read back.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dnnlib.atomic import atomic_write, write_text
from dnnlib.cli import UsageError, UserError
from dnnlib.util import open_url
from metrics import detectors
from metrics.detectors import Detector
from metrics.statistics import (
    Stats,
    check_reference,
    check_same_detector,
    frechet_between,
    load_reference,
    statistics_of_dataset,
    statistics_of_images,
)
from torch_utils import distributed as dist

from . import pictures
from .config import check_run_dir, differences
from .grids import Sampling
from .network_files import NetworkFile
from .sampling import Batch, iterate_images, plan_sampling, show_progress
from .setup import Options, Run, load_everywhere, prepare, train
from .stage import plan_ladder
from .state import list_states
from .training_loop import set_precision

END_POINT_IMAGES = 2048  # compared with the teacher's: the end-point error has little noise, more would change nothing
END_POINT_VALUES = 1 << 25  # fewer of large images: 128 MiB of them are kept
SHOWN = 16  # images of every rung in samples.png
PATIENCE = 4.0  # seconds of silence after which a try (of three) to download the Inception weights is given up


@dataclass(frozen=True)
class Rung:
    """What is known of one network of a ladder, as a line of `ladder.json`."""

    steps: int
    nfe: int
    fd: float | None  # Fréchet distance to the reference, in the detector's features
    endpoint_rmse: float  # against the first teacher's images from the same latents, values in [-1, 1]
    sec_per_kimg: float  # sampling time per 1000 images
    kimg: float  # images this network was distilled with; 0 for the teacher
    network: str  # file


@dataclass(frozen=True)
class Measured:
    """A rung, what its numbers depend on, and its images for the first seeds: float32 [M, C, H, W] on the CPU.

    Of the teacher as many images as students are compared with, of a student those to be shown.
    """

    key: dict[str, Any]
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


class Ladder:
    """Trains and measures the stages one after the other, and writes the four files of a ladder.

    Construction and the start of `run` refuse all that cannot work, by UsageError or UserError with one helpful line,
    before anything is trained or measured.
    """

    def __init__(
        self, stage_options: Options, options: LadderOptions, say: Callable[[str], None] = dist.print0
    ) -> None:
        assert stage_options.transfer is not None
        self.base, self.options, self.say = stage_options, options, say
        self.outdir = Path(stage_options.outdir)
        self.teacher = load_everywhere(stage_options.transfer, stage_options.trust_network_code)
        num_steps = options.num_steps or (self.teacher.sampling.grid.steps if self.teacher.sampling else None)
        if num_steps is None:
            raise UsageError(
                f"--num_steps is needed: {stage_options.transfer} is undistilled and has no noise grid of its own"
            )
        self.ratios = plan_ladder(num_steps, options.until, options.ratios)
        self.durations = one_per_stage("--duration", options.durations, len(self.ratios))
        self.lrs = one_per_stage("--lr", options.lrs, len(self.ratios))
        self.chain = [num_steps]
        for ratio in self.ratios:
            self.chain.append(self.chain[-1] // ratio)
        self.measured: list[Measured] = []

    def run(self) -> list[Rung]:
        """Everything; returns the rungs, the teacher first."""
        first = prepare(self.stage_options(0, self.teacher))  # bad options and data are found before anything is done
        assert first.stage is not None
        first.dataset.close()
        self.check_stages(first)
        self.config, self.solver = first.config, first.stage.solver
        self.say(f"Ladder:                  {' -> '.join(map(str, self.chain))} steps, {self.solver} teacher")
        self.say(f"Results:                 {self.outdir}/ladder.json, ladder.csv, ladder.png, samples.png")
        self.prepare_measuring(str(self.config.extras["data_fingerprint"]))

        grid = Sampling(first.stage.grid, self.solver, ratio=1)  # an undistilled teacher is sampled as it is distilled
        network = replace(self.teacher, sampling=self.teacher.sampling or grid)
        self.add_rung(network, kimg=0)
        for index in range(len(self.ratios)):
            network, kimg = self.train_stage(index, network)
            self.add_rung(network, kimg)
        self.write_files()
        return [measured.rung for measured in self.measured]

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
        same = "weighting intervals self_teacher lr_decay warmup batch ema ema_std clip dropout augment xflip precision"
        return {
            "--transfer": self.teacher.sha256,
            "--data": first.config.extras["data_fingerprint"],
            "--cond": first.config.dataset_kwargs["use_labels"],
            "--teacher-solver": first.stage.solver,
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
        self.write_files(again=False)  # which a start before this one may not have come to
        self.say(f"{title}: {self.chain[index]} -> {self.chain[index + 1]} steps")
        options = self.stage_options(index, teacher)
        run = prepare(options)
        run.announce(self.say)
        record = {"options": self.recipes[index], "teacher": teacher.sha256, "kimg": run.config.total_kimg}
        self.write_record(folder, {**record, "student": None, "sha256": None})
        path = train(options, run)
        run.dataset.close()
        student = load_everywhere(str(path), self.base.trust_network_code)
        self.write_record(folder, {**record, "student": path.name, "sha256": student.sha256})
        return student, run.config.total_kimg

    def load_finished(self, folder: Path, record: dict[str, Any]) -> NetworkFile | None:
        """The student that a finished stage left; None where it isn't finished, or the file is not the one it left."""
        path = folder / str(record["student"])
        if not dist.broadcast_object(record["student"] is not None and path.is_file()):
            return None
        student = load_everywhere(str(path), self.base.trust_network_code)
        return student if student.sha256 == record["sha256"] else None

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
        if dist.is_main():
            check_run_dir(str(self.outdir / "rungs"))
        self.reference = given
        if self.detector is not None and given is None:
            self.reference = self.reference_of_data(self.detector)

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

    def reference_of_data(self, detector: Detector) -> Stats:
        """Statistics of --data, computed once."""
        name = hashlib.sha256(f"{self.reference_id} {detector.id}".encode()).hexdigest()[:12]
        path = self.outdir / "rungs" / f"reference-{name}.npz"
        known = dist.broadcast_object(Stats.load(path) if dist.is_main() and path.is_file() else None)
        if known is not None:
            return known
        self.say(f"Computing the reference statistics of {self.base.data}...")
        stats = statistics_of_dataset(self.base.data, detector, batch=self.options.eval_batch, progress=True)
        if dist.is_main():
            stats.save(path)
        return stats

    def add_rung(self, network: NetworkFile, kimg: float) -> None:
        """Measures a network, or recalls how it was measured; then the files are up to date."""
        assert network.sampling is not None
        path = self.outdir / "rungs" / f"steps-{network.sampling.grid.steps}.npz"
        known = self.recall(path, network)
        if known is not None:
            rung = replace(known.rung, network=str(network.source), kimg=kimg)
            self.measured.append(replace(known, rung=rung))
        else:
            self.measured.append(self.measure(network, kimg))
            if dist.is_main():
                save_measured(path, self.measured[-1])
            self.write_files()
        self.say(describe_rung(self.measured[-1].rung))

    def key(self, network: NetworkFile) -> dict[str, Any]:
        """What the numbers of a rung depend on. Latents are drawn on the device: each kind of device has its own."""
        assert network.sampling is not None
        return {
            "network": network.sha256,
            "levels": list(network.sampling.grid.levels),
            "solver": network.sampling.solver,
            "teacher": [self.teacher.sha256, self.chain[0], self.solver],
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

    def recall(self, path: Path, network: NetworkFile) -> Measured | None:
        """How `network` was measured before, if that was in the same way.

        While the detector can't be had, what was measured without it stands, and what was measured with it anyway.
        """
        known: Measured | None = dist.broadcast_object(load_measured(path) if dist.is_main() else None)
        wanted = [self.key(network)]
        if self.detector is None:
            wanted.append(without_detector(wanted[0]))
        return known if known is not None and known.key in wanted else None

    def measure(self, network: NetworkFile, kimg: float) -> Measured:
        """Samples `eval_num` images (seeds 0, 1, ...) and compares them with the data and with the teacher's."""
        is_teacher = not self.measured
        set_precision(replace(self.config, precision="fp32"))  # whatever the training before it has set
        plan = plan_sampling(network)
        self.say(
            f"Measuring {network.source}: {self.options.eval_num} images, {plan.nfe} network calls (NFE) for each..."
        )
        timing, first = Timing(), FirstImages(self.compared())
        batches = iterate_images(
            network, range(self.options.eval_num), max_batch=self.options.eval_batch, device=dist.device()
        )
        seen = first.watch(checked(timing.watch(batches), network))
        seen = show_progress(seen, lambda batch: len(batch.seeds), self.options.eval_num, self.say)
        images = (pictures.to_uint8(batch.images) for batch in seen)
        fd = None
        if self.detector is not None and self.reference is not None:
            fd = frechet_between(statistics_of_images(images, self.detector), self.reference)
        else:
            for _ in images:
                pass
        network.net.cpu()  # makes room for training
        kept = first.collected()
        error = 0.0 if is_teacher else rmse(kept, self.measured[0].images)
        rung = Rung(plan.steps, plan.nfe, fd, error, timing.seconds_per_kimg(), kimg, str(network.source))
        key = self.key(network) if fd is not None else without_detector(self.key(network))
        return Measured(key, rung, kept if is_teacher else kept[:SHOWN].clone())

    # -- files -------------------------------------------------------------------------------------------------------

    def write_files(self, again: bool = True) -> None:
        """ladder.json, ladder.csv, ladder.png and samples.png of the rungs so far; unless they are, if not `again`."""
        if not dist.is_main():
            return
        rungs = [measured.rung for measured in self.measured]
        table = [asdict(rung) for rung in rungs]
        listing, path = json.dumps(table, indent=2) + "\n", self.outdir / "ladder.json"
        if not again and path.is_file() and path.read_text(encoding="utf-8") == listing:
            return
        text = io.StringIO()
        writer = csv.DictWriter(text, fieldnames=list(table[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(table)
        write_text(self.outdir / "ladder.csv", text.getvalue())
        with atomic_write(self.outdir / "ladder.png") as file:
            plot_ladder(rungs, file)
        names = [f"{rung.steps} step{'s' * (rung.steps > 1)}, {rung.nfe} NFE" for rung in rungs]
        names[0] = f"teacher: {names[0]}"
        rows = [pictures.to_uint8(measured.images[:SHOWN]) for measured in self.measured]
        title = "A column is one latent, a row is one network"
        pictures.save_png(self.outdir / "samples.png", pictures.labelled_rows(rows, names, title))
        write_text(path, listing)  # last: where it is, the others are


def one_per_stage(name: str, values: list[float], stages: int) -> list[float]:
    """One value for all stages, or one for each. Raises UsageError for any other number of them."""
    if len(values) not in (1, stages):
        raise UsageError(f"{name} has {len(values)} values for {stages} stages; give one, or one for each stage")
    return values * stages if len(values) == 1 else values


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


def save_measured(path: Path, measured: Measured) -> None:
    """One file for all that belongs together, so that numbers and images are of the same measurement."""
    record = json.dumps({"key": measured.key, "rung": asdict(measured.rung)})
    with atomic_write(path) as file:
        np.savez(file, record=np.str_(record), images=measured.images.numpy())


def load_measured(path: Path) -> Measured | None:
    """What `save_measured` wrote, or None where there is no such file or it can't be read."""
    try:
        with np.load(path, allow_pickle=False) as content:
            record = json.loads(str(content["record"]))
            return Measured(record["key"], Rung(**record["rung"]), torch.from_numpy(content["images"]))
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile):
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

    def seconds_per_kimg(self) -> float:
        """Of the whole job: the slowest process's seconds over everybody's images, less each one's first batch, in
        which a device warms up, where there are others."""
        counted = self.spent[1:] or self.spent
        parts = dist.gather_objects((sum(seconds for seconds, _ in counted), sum(images for _, images in counted)))
        return max(seconds for seconds, _ in parts) / max(sum(images for _, images in parts), 1) * 1000


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
        everybodys = {seed: image for part in dist.gather_objects(self.kept) for seed, image in part.items()}
        return torch.from_numpy(np.stack([everybodys[seed] for seed in range(self.count)]))


def checked(batches: Iterator[Batch], network: NetworkFile) -> Iterator[Batch]:
    """Passes batches on. Raises UserError at the first that no measure could make sense of."""
    for batch in batches:
        if not batch.images.isfinite().all():
            raise UserError(
                f"{network.source}: some images of seeds {batch.seeds[0]} to {batch.seeds[-1]} hold NaN or infinities; "
                "if it was just trained, a lower --lr in a new --outdir may help"
            )
        yield batch


def rmse(images: Tensor, others: Tensor) -> float:
    """Root mean square difference over all values, summed in float64 image by image."""
    squares = [float((a.double() - b.double()).square().mean()) for a, b in zip(images, others, strict=True)]
    return float(np.sqrt(np.mean(squares)))


# ---------------------------------------------------------------------------------------------------------------------
# For people


def describe_rung(rung: Rung) -> str:
    """One line."""
    distance = "" if rung.fd is None else f"fd {rung.fd:.4g}, "
    return f"{rung.steps:>4d} steps: {distance}end-point RMSE {rung.endpoint_rmse:.4g}, NFE {rung.nfe}"


def format_table(rungs: Sequence[Rung]) -> str:
    """The ladder as text."""
    lines = [f"{'steps':>6} {'NFE':>5} {'fd':>9} {'endpoint_rmse':>14} {'sec/kimg':>9} {'kimg':>8}  network"]
    for rung in rungs:
        fd = "-" if rung.fd is None else f"{rung.fd:.4g}"
        lines.append(
            f"{rung.steps:>6} {rung.nfe:>5} {fd:>9} {rung.endpoint_rmse:>14.4f} {rung.sec_per_kimg:>9.3g} "
            f"{rung.kimg:>8g}  {rung.network}"
        )
    return "\n".join(lines)


STUDENTS, TEACHER = "#1f5fa8", "#b04a1f"


def plot_ladder(rungs: Sequence[Rung], file: Any) -> None:
    """Quality against network calls per image (log scale): Fréchet distance and end-point error, a panel each."""
    from matplotlib.figure import Figure

    teacher, students = rungs[0], rungs[1:]
    panels = {"End-point RMSE to the teacher's images": [(r.nfe, r.endpoint_rmse) for r in students]}
    distances = [(r.nfe, r.fd) for r in students if r.fd is not None]
    if distances or teacher.fd is not None:
        panels = {"Fréchet distance to the data": distances, **panels}
    figure = Figure(figsize=(5.2 * len(panels), 4.4), layout="constrained", dpi=140)
    figure.suptitle(f"Distilled {' → '.join(str(r.steps) for r in rungs)} steps", fontsize=11)
    for axis, (label, points) in zip(np.atleast_1d(figure.subplots(1, len(panels))), panels.items(), strict=True):
        level = teacher.fd if label.startswith("Fr") else 0.0
        if level is not None:
            name = f"teacher, {teacher.steps} steps: {level:.3g}" + (" by definition" if level == 0 else "")
            axis.axhline(level, color=TEACHER, linestyle="--", linewidth=1)
            axis.plot([teacher.nfe], [level], "s", color=TEACHER, label=name, clip_on=False)
        if points:
            axis.plot(*zip(*points, strict=True), "o-", color=STUDENTS, label="students")
        for nfe, value in points:
            axis.annotate(
                f"{value:.3g}", (nfe, value), xytext=(3, 5), textcoords="offset points", ha="left", fontsize=8
            )
        ticks = sorted({rung.nfe for rung in rungs})
        axis.set_xscale("log", base=2)
        axis.set_xlim(ticks[0] / 1.4, ticks[-1] * 1.4)
        axis.set_xticks(ticks, [str(tick) for tick in ticks])
        axis.minorticks_off()
        axis.set_ylim(0, 1.18 * max([value for _, value in points] + [level or 0.0]) or 1.0)
        axis.set_xlabel("network calls per image (NFE)")
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
        axis.legend(frameon=False, fontsize=9)
    figure.savefig(file, format="png")
