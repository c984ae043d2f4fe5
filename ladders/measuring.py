"""How the networks of a ladder are measured, all in the same way, and what of that is remembered.

Each seed set of a network, and each point of the teacher's own curve, is a file in `rungs/`: its numbers, everything
that they depend on, and some images. What was measured before in the same way is read from there; so a ladder that was
killed while measuring measures again what was not finished, and a finished one nothing.
"""

from __future__ import annotations

import hashlib
import json
import math
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

from dnnlib.atomic import atomic_write, write_text
from dnnlib.errors import UsageError, UserError, printable, public_url
from dnnlib.util import cache_path, count, open_file, open_url, parse_json, read_json
from formats.network_files import NetworkFile
from metrics import detectors
from metrics.detectors import Detector
from metrics.statistics import (
    Stats,
    check_reference,
    check_same_detector,
    dataset_against_itself,
    frechet_between,
    load_reference,
    note_if_collapsed,
    statistics_of_images,
)
from torch_utils import distributed as dist
from torch_utils.progress import show_progress
from training import pictures
from training.config import differences
from training.dataset import ImageFolderDataset
from training.grids import Sampling, Solver, network_grid
from training.labels import Labels, vector_labels
from training.recipe import LadderOptions, TrainConfig
from training.samplers import nfe
from training.sampling import Batch, iterate_images, plan_sampling
from training.speed import set_precision, use_cpu_kernels

from .results import CurvePoint, Floor, Rung, describe_point

END_POINT_IMAGES = 2048  # compared with the teacher's: the end-point error has little noise, more would change nothing
END_POINT_VALUES = 1 << 25  # fewer of large images: 128 MiB of them are kept
SHOWN = 16  # images of every rung in samples.png
DRAWS, FEW_DRAWS, WIDE = 10, 3, 512  # from the data set; few where a detector has more than WIDE features
ABSURD = 100.0  # an end-point error of images that have left [-1, 1] for good
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


class Measuring:
    """Measures the networks of one ladder, its first teacher first.

    Construction finds detector and reference, and refuses what doesn't fit by UsageError or UserError; nothing is
    written. `open` comes next, once the ladder's folder is held.

    teacher, steps, solver: the first teacher, and how it is run. config: of the first stage.
    """

    def __init__(
        self,
        options: LadderOptions,
        teacher: NetworkFile,
        steps: int,
        solver: Solver,
        config: TrainConfig,
        outdir: Path,
        say: Callable[[str], None],
    ) -> None:
        self.options, self.teacher, self.steps, self.solver, self.config = options, teacher, steps, solver, config
        self.folder, self.data, self.say = outdir / "rungs", str(config.dataset_kwargs["path"]), say
        self.teacher_images: Tensor | None = None  # what students are compared with, once it is measured
        self.floor: Floor | None = None
        self.told_why = False  # that it was measured in another way before
        self.warned = False  # that there are few images for the detector's features
        spec, ref = options.detector, options.ref
        if ref is not None and spec == "none":
            raise UsageError("--ref is for Fréchet distances, --detector=none measures none; leave one of them out")
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
            self.reference_id = str(config.data_fingerprint)
        self.reference, self.reference_source = given, ref and public_url(ref)
        self.labels: Labels | None = None  # vectors to draw from, where the data set has no classes
        if config.dataset_kwargs["use_labels"]:
            dataset = ImageFolderDataset(self.data, use_labels=True)
            self.labels = vector_labels(dataset)
            dataset.close()

    def find_detector(self) -> Detector | None:
        """The detector that --detector names, or None where that is Inception and its weights can't be had."""
        if self.options.detector == "none":
            dist.from_rank0(self.check_nothing_is_lost)
            return None
        if self.options.detector == "inception":
            problem = dist.broadcast_object(try_inception() if dist.is_main() else None)
            if problem is not None:
                dist.from_rank0(self.check_nothing_is_lost)
                self.say(
                    f"No Fréchet distances (fd will be null), the end-point error alone judges: {problem}. With "
                    "--detector=FILE (fid.py detector makes one) the same command adds them later, without training"
                )
                return None
        return detectors.load_detector(self.options.detector, dist.device())

    def check_nothing_is_lost(self) -> None:
        """Raises UserError where a ladder that was measured with a detector would be measured again without one."""
        known = load_set(set_path(self.folder, self.steps, 0))
        before = known.key["detector"] if known is not None else None
        if before not in (None, detectors.INCEPTION):
            raise UserError(
                f"{self.folder.parent} was measured with a --detector ({before}), and would lose its distances: give "
                f"it again, or remove {self.folder} first"
            )

    def open(self) -> None:
        """Reads or computes what comes from the data set, where no --ref was given."""
        if self.reference is None:
            self.find_reference()

    def find_reference(self) -> None:
        """Statistics of --data, and how far images drawn from it are from them: both from one pass, made once."""
        name, size = f"{self.reference_id} {self.detector_id}", self.options.eval_num
        path = self.folder / f"reference-{short_hash(name)}.npz"
        self.reference_source = str(path)
        floor_path = self.folder / f"floor-{short_hash(f'{name} {size}')}.json"
        known = (load_stats(path), load_floor(floor_path)) if dist.is_main() else None
        self.reference, self.floor = dist.broadcast_object(known)
        if self.detector is not None and (self.reference is None or self.floor is None):
            what = "the reference statistics of" if self.reference is None else f"how far {size} images drawn are from"
            self.say(f"Computing {what} {self.data}...")
            stats, distances = dataset_against_itself(
                self.data,
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

    def measure(self, network: NetworkFile, kimg: float) -> tuple[Measured, bool]:
        """A network's rung, and whether any of its seed sets had to be measured for it. kimg: it was trained for."""
        is_teacher = self.teacher_images is None
        plan = plan_sampling(network)
        kept = self.compared() if is_teacher else SHOWN
        net = network.net
        shape = (min(kept, self.compared()), net.img_channels, net.img_resolution, net.img_resolution)
        sets: list[MeasuredSet] = []
        news = False
        for number in range(self.options.eval_sets):
            path = set_path(self.folder, plan.steps, number)
            found = self.recall(path, self.key(network, number))
            if found is not None and number == 0 and (found.endpoint_rmse is None or found.images.shape != shape):
                found = None
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
        if is_teacher:
            self.teacher_images = sets[0].images
        return Measured(rung, sets[0].images), news

    def tell_why_again(self, path: Path, key: dict[str, Any]) -> None:
        """One line, the first time, where something was measured before in another way."""
        before = load_set(path) if dist.is_main() and not self.told_why else None
        if before is not None:
            names = {"network", "levels", "solver", "teacher"}  # another network, not another way
            ways = differences(*({n: each[n] for n in each.keys() - names} for each in (before.key, key)))
            if ways:
                self.say(f"Measured before in another way, so all is measured again: {', '.join(ways)}")
                self.told_why = True

    def curve(self, students: Sequence[int], measure: bool = True) -> list[CurvePoint]:
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
            path = curve_path(self.folder, solver, steps)
            found = self.recall(path, self.key(network, 0))
            if found is None:
                if not measure:
                    continue
                found = self.measure_set(network, 0, 0, is_curve=True)
                if dist.is_main():
                    save_set(path, found)
            if found.endpoint_rmse is None:
                say(f"{left_out} {printable(found.problem)}")
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
            "teacher": [self.teacher.sha256, self.steps, self.solver],
            "first_seed": number * self.options.eval_num,
            "images": self.options.eval_num,
            "compared": self.compared(),
            "batch": self.options.eval_batch,
            "device": dist.device().type,
            "detector": self.detector_id,
            "reference": self.reference_id,
            **({} if self.labels is None else {"labels": self.labels.digest()}),
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
        batches = iterate_images(
            network, seeds, max_batch=self.options.eval_batch, device=dist.device(), labels=self.labels
        )
        seen = first.watch(check.watch(timing.watch(batches)))
        title = f"{count(plan.steps, 'step')}, NFE {plan.nfe}"
        seen = show_progress(seen, lambda batch: len(batch.seeds), size, self.say, title)
        images = (pictures.to_uint8(batch.images) for batch in seen)
        fd, problem = None, None
        if self.detector is not None and self.reference is not None:
            try:
                stats = statistics_of_images(images, self.detector, warn=not self.warned)
                fd = frechet_between(stats, self.reference)
                if not is_curve and number == 0:
                    note_if_collapsed(stats, self.reference, who)
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
            error = rmse(collected, self.teacher_images) if self.teacher_images is not None else 0.0
        problem = check.problem() or problem
        if is_curve and problem is None and error is not None and error > ABSURD:
            problem = f"its images are absurd (end-point RMSE {error:.3g})"
        if problem is not None:
            fd = error = None
        key = self.key(network, number)
        if self.detector is None:
            key = without_detector(key)
        return MeasuredSet(key, fd, error, *timing.totals(), collected[:kept].clone(), problem)


def curve_plan(students: Sequence[int]) -> list[tuple[Solver, int]]:
    """How the teacher is run at the cost of students of so many steps: with as many Euler steps, and with the most
    Heun steps (2k - 1 network calls) that cost no more; but for a single one, which is Euler's."""
    heun = dict.fromkeys((steps + 1) // 2 for steps in students if steps > 2)
    return [*(("euler", steps) for steps in dict.fromkeys(students)), *(("heun", steps) for steps in heun)]


class Past:
    """What a ladder's folder holds of earlier measurements, as far as that can be said without the reference.

    Raises UserError for a --detector that is none, or that does not fit --ref; downloads no Inception weights.
    """

    def __init__(self, outdir: Path, options: LadderOptions) -> None:
        self.folder, self.options = outdir / "rungs", options
        inception, none = options.detector == "inception", options.detector == "none"
        own = detectors.INCEPTION if inception or none else detectors.load_detector(options.detector, dist.device()).id
        self.detectors: list[str | None] = [own]
        cached = Path(cache_path(detectors.INCEPTION_URL)).exists()
        if none or (inception and not cached):  # distances may be lacking
            self.detectors.append(None)
        if options.ref is not None:
            check_same_detector(own, load_reference(options.ref).detector_id)

    def sets(self, steps: int, sha256: str | None) -> int:
        """How many seed sets of a network have been measured; those are all, where there are no distances."""
        found = [load_set(set_path(self.folder, steps, number)) for number in range(self.options.eval_sets)]
        held = sum(self.holds(each, sha256) for each in found)
        return self.options.eval_sets if held and found[0] is not None and found[0].fd is None else held

    def curve(self, sha256: str, points: Sequence[tuple[Solver, int]]) -> list[tuple[Solver, int]]:
        """Those of the teacher's points that have not been measured."""
        return [each for each in points if not self.holds(load_set(curve_path(self.folder, *each)), sha256)]

    def holds(self, measured: MeasuredSet | None, sha256: str | None) -> bool:
        """Whether it is of this network, by as many images, in such batches, by the detector of now."""
        options = self.options
        now = {"network": sha256, "images": options.eval_num, "batch": options.eval_batch}
        return (
            measured is not None and measured.key.items() >= now.items() and measured.key["detector"] in self.detectors
        )


def curve_path(folder: Path, solver: Solver, steps: int) -> Path:
    """The file of a point of the teacher's own curve."""
    return folder / f"curve-{solver}-{steps}.npz"


def set_path(folder: Path, steps: int, number: int) -> Path:
    """The file of a network's seed set `number`."""
    return folder / f"steps-{steps}{f'-set-{number + 1}' * (number > 0)}.npz"


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


def short_hash(text: str) -> str:
    """A few letters for the name of a file."""
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def try_inception() -> str | None:
    """Fetches the Inception weights into the download cache; the reason in words where they can't be had.

    Gives up within seconds where there is no network: a ladder can do without.
    """
    try:
        open_url(detectors.INCEPTION_URL, return_filename=True, timeout=PATIENCE, kind="a detector")
    except UserError as exc:
        return f"the Inception weights can't be had ({exc})"
    return None


def save_set(path: Path, measured: MeasuredSet) -> None:
    """One file for all that belongs together, so that numbers and images are of the same measurement."""
    record = {each.name: getattr(measured, each.name) for each in fields(measured) if each.name != "images"}
    with atomic_write(path) as file:
        np.savez(file, record=np.str_(json.dumps(record, allow_nan=False)), images=measured.images.numpy())


def load_set(path: Path) -> MeasuredSet | None:
    """What `save_set` wrote, or None where there is no such file, it can't be read, or holds something else."""
    try:
        with open_file(path, "statistics") as file, np.load(file, allow_pickle=False) as content:
            if any(part.compress_type for part in content.zip.infolist()):  # it may unpack to any size
                return None
            found = MeasuredSet(**parse_json(str(content["record"])), images=torch.from_numpy(content["images"]))
        return found if _is_whole(found) else None
    except (UserError, OSError, ValueError, AttributeError, KeyError, TypeError, RecursionError, EOFError):
        return None
    except (zipfile.BadZipFile, MemoryError):
        return None


def _is_whole(found: MeasuredSet) -> bool:
    """Whether all values are of their kind."""
    numbers = [found.seconds, *(each for each in (found.fd, found.endpoint_rmse) if each is not None)]
    return (
        {"network", "detector", "reference"} <= found.key.keys()
        and all(isinstance(each, (int, float)) and 0 <= each < math.inf for each in numbers)
        and isinstance(found.timed, int)
        and 0 <= found.timed <= SEEDS
        and isinstance(found.problem or "", str)
        and found.images.dtype == torch.float32
    )


def load_stats(path: Path) -> Stats | None:
    """Statistics that were computed here, or None where there is no such file or it can't be read."""
    try:
        return Stats.load(path) if path.is_file() else None
    except UserError:
        return None


def load_floor(path: Path) -> Floor | None:
    """What `find_reference` wrote, or None where there is no such file or it can't be read."""
    match read_json(path):
        case {"images": int(images), "distances": [_, *_] as distances}:
            return Floor(images, distances) if all(isinstance(each, float) for each in distances) else None
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
