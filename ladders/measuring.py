"""How the networks of a ladder are measured, all in the same way, and what of that is remembered.

Each seed set of a network, and each point of the teacher's own curve, is a file in `rungs/`: its numbers, everything
that they depend on (the key), and some images. What was measured with the same key is read from there, so that a
ladder that was killed measures again only what was not finished.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from statistics import stdev
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dnnlib.atomic import atomic_write, write_text
from dnnlib.errors import UsageError, UserError, printable
from dnnlib.util import count, open_file, open_url, parse_json, read_json
from formats.network_files import NetworkFile
from metrics import detectors, statistics
from metrics.detectors import Detector
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
from training.speed import set_precision

from .results import CurvePoint, Floor, Rung, describe

END_POINT_IMAGES = 2048  # compared with the teacher's: the end-point error has little noise, more would change nothing
END_POINT_VALUES = 1 << 25  # fewer of large images: 128 MiB of them are kept
SHOWN = 16  # images of every rung in samples.png
DRAWS, FEW_DRAWS, WIDE = 10, 3, 512  # from the data set; few where a detector has more than WIDE features
ABSURD = 100.0  # an end-point error of images that have left [-1, 1] for good
PATIENCE = 4.0  # seconds of silence after which a try (of three) to download the Inception weights is given up
Log = Callable[[str], None]


@dataclass(frozen=True)
class MeasuredSet:
    """What one seed set of a network came to, and what that depends on: a file in `rungs/`."""

    key: dict[str, Any]
    fd: float | None
    endpoint_rmse: float | None  # of a first set
    seconds: float  # spent sampling `timed` images
    timed: int
    images: Tensor  # the first ones of a first set, float32 [M, C, H, W] on the CPU: to be compared with, or shown
    problem: str | None = None  # why there are no numbers


class Measuring:
    """Measures the networks of one ladder, its first teacher first.

    Construction finds detector and reference, and refuses what doesn't fit by UsageError or UserError; nothing is
    written. `open` comes next, once the ladder's folder is locked.

    teacher: the first one, with the grid that it is sampled on. config: of the first stage.
    """

    def __init__(
        self, options: LadderOptions, teacher: NetworkFile, config: TrainConfig, outdir: Path, log: Log = dist.print0
    ) -> None:
        self.options, self.teacher, self.config, self.log = options, teacher, config, log
        self.folder, self.data = outdir / "rungs", str(config.dataset_kwargs["path"])
        self.teacher_images: Tensor | None = None  # what students are compared with, once it is measured
        self.floor: Floor | None = None
        self.news = False  # whether anything has been measured
        values = teacher.net.img_channels * teacher.net.img_resolution**2
        self.compared = min(options.eval_num, END_POINT_IMAGES, max(END_POINT_VALUES // values, SHOWN))
        if options.ref is not None and options.detector == "none":
            raise UsageError("--ref is for Fréchet distances, --detector=none measures none; leave one of them out")
        self.reference = None if options.ref is None else statistics.load_reference(options.ref)
        if self.reference is not None and options.detector == "inception":  # before a download
            statistics.check_same_detector(detectors.INCEPTION, self.reference.detector_id)
        self.detector = self.find_detector()
        self.detector_id = self.detector.id if self.detector else detectors.INCEPTION
        self.reference_id = str(config.data_fingerprint)
        if self.reference is not None:
            statistics.check_same_detector(self.detector_id, self.reference.detector_id)
            if self.detector is not None:
                statistics.check_reference(self.reference, self.detector)
            content = self.reference.mu.tobytes() + self.reference.sigma.tobytes()
            self.reference_id = hashlib.sha256(content).hexdigest()
        self.labels: Labels | None = None  # vectors to draw from, where the data set has no classes
        if config.dataset_kwargs["use_labels"]:
            with closing(ImageFolderDataset(self.data, use_labels=True)) as dataset:
                self.labels = vector_labels(dataset)

    def find_detector(self) -> Detector | None:
        """The detector that --detector names, or None where that is Inception and its weights can't be had."""
        spec, problem = self.options.detector, None
        if spec == "inception":
            problem = dist.broadcast_object(try_inception() if dist.is_main() else None)
        if spec != "none" and problem is None:
            return detectors.load_detector(spec, dist.device())
        known = dist.from_rank0(lambda: load_set(self.set_path(self.teacher)))
        if known is not None and known.key["detector"] not in (None, detectors.INCEPTION):
            raise UserError(
                f"{self.folder.parent} was measured with a --detector ({known.key['detector']}), and would lose its "
                f"distances: give it again, or remove {self.folder} first"
            )
        if problem is not None:
            self.log(
                f"No Fréchet distances (fd will be null), the end-point error alone judges: {problem}. With "
                "--detector=FILE (fid.py detector makes one) the same command adds them later, without training"
            )
        return None

    def open(self) -> None:
        """Without --ref: statistics of --data, and how far images drawn from it are from them, both from one pass."""
        if self.options.ref is not None:
            return
        name, size = f"{self.reference_id} {self.detector_id}", self.options.eval_num
        path = self.folder / f"reference-{short_hash(name)}.npz"
        floor_path = self.folder / f"floor-{short_hash(f'{name} {size}')}.json"
        known, self.floor = dist.from_rank0(lambda: (load_stats(path), load_floor(floor_path)))
        self.reference = known  # where there is one, what is measured stands on it
        if self.detector is None or (known is not None and self.floor is not None):
            return
        what = "the reference statistics of" if known is None else f"how far {size} images drawn are from"
        self.log(f"Computing {what} {self.data}...")
        draws, batch = DRAWS if self.detector.dim <= WIDE else FEW_DRAWS, self.options.eval_batch
        stats, distances = statistics.dataset_against_itself(
            self.data, self.detector, draws=draws, images=size, batch=batch
        )
        self.reference, self.floor = known or stats, Floor(size, distances)
        if dist.is_main():
            if known is None:
                stats.save(path)
            write_text(floor_path, json.dumps(asdict(self.floor)) + "\n")

    def set_path(self, network: NetworkFile, number: int = 0) -> Path:
        """The file of a network's seed set `number`."""
        assert network.sampling is not None
        return self.folder / f"steps-{network.sampling.grid.steps}{f'-set-{number + 1}' * (number > 0)}.npz"

    def measure(self, network: NetworkFile, kimg: float) -> tuple[Rung, Tensor]:
        """A network's rung, and the images of its first seed set. kimg: it was trained for."""
        plan, options, sets = plan_sampling(network), self.options, list[MeasuredSet]()
        kept = self.compared if self.teacher_images is None else min(SHOWN, self.compared)
        for number in range(options.eval_sets):
            path, kept = self.set_path(network, number), kept * (number == 0)
            found = self.recall(path, self.key(network, number), kept)
            if found is None and number and self.detector is None:
                break  # without distances, the first set says all there is to say
            sets.append(found or self.measure_set(path, network, number, kept))
        first, distances = sets[0], [each.fd for each in sets if each.fd is not None]
        if len(distances) < options.eval_sets:
            sets, distances = [first], []
        if self.teacher_images is None:
            self.teacher_images = first.images
        assert first.endpoint_rmse is not None
        rung = Rung(
            steps=plan.steps,
            nfe=plan.nfe,
            fd=math.fsum(distances) / len(distances) if distances else None,
            endpoint_rmse=first.endpoint_rmse,
            sec_per_kimg=sum(each.seconds for each in sets) / max(sum(each.timed for each in sets), 1) * 1000,
            kimg=kimg,
            network=str(network.source),
            fd_std=stdev(distances) if len(distances) > 1 else None,
            fd_sets=distances,
            images=options.eval_num,
            detector=self.detector_id if distances else None,
        )
        return rung, first.images

    def curve(self, students: Sequence[int]) -> list[CurvePoint]:
        """The first teacher itself at the cost of students of so many steps, on fresh grids and of the first seed set
        alone."""
        points: list[CurvePoint] = []
        for solver, steps in curve_plan(students):
            left_out = f"The teacher itself with {count(steps, f'{solver} step')} is left out:"
            try:
                grid = network_grid(self.teacher.net, steps)
            except ValueError as exc:
                self.log(f"{left_out} {exc}")
                continue
            network = replace(self.teacher, sampling=Sampling(grid, solver, ratio=1))
            path = self.folder / f"curve-{solver}-{steps}.npz"
            found = self.recall(path, self.key(network, 0)) or self.measure_set(path, network, is_curve=True)
            if found.endpoint_rmse is None:
                self.log(f"{left_out} {printable(found.problem)}")
                continue
            points.append(CurvePoint(solver, steps, nfe(steps, solver), found.fd, found.endpoint_rmse))
            self.log(describe(points[-1]))
        return points

    def key(self, network: NetworkFile, number: int) -> dict[str, Any]:
        """What the numbers of a network's seed set `number` depend on. Latents are drawn on the device: each kind of
        device has its own."""
        own, first = network.sampling, self.teacher.sampling
        assert own is not None and first is not None
        return {
            "network": network.sha256,
            "levels": list(own.grid.levels),
            "solver": own.solver,
            "teacher": [self.teacher.sha256, first.grid.steps, first.solver],
            "first_seed": number * self.options.eval_num,
            "images": self.options.eval_num,
            "compared": self.compared,
            "batch": self.options.eval_batch,
            "device": dist.device().type,
            "detector": self.detector_id,
            "reference": self.reference_id,
            **({} if self.labels is None else {"labels": self.labels.digest()}),
        }

    def recall(self, path: Path, key: dict[str, Any], kept: int = 0) -> MeasuredSet | None:
        """What the file holds, if that was measured in the same way, with `kept` images; the first time that it was
        not, one line says how.

        While the detector is unavailable, results with and without a Fréchet distance are accepted.
        """
        known, net = dist.from_rank0(lambda: load_set(path)), self.teacher.net
        if known is None or known.key in (key, without_detector(key) if self.detector is None else key):
            shape = (kept, net.img_channels, net.img_resolution, net.img_resolution)
            is_whole = not kept or (known and known.endpoint_rmse is not None and known.images.shape == shape)
            return known if is_whole else None
        own = {"network", "levels", "solver", "teacher"}  # another network, not another way
        ways = differences(*({name: each[name] for name in each.keys() - own} for each in (known.key, key)))
        if ways and not self.news:
            self.log(f"Measured before in another way, so all is measured again: {', '.join(ways)}")
        return None

    def measure_set(
        self, path: Path, network: NetworkFile, number: int = 0, kept: int = 0, is_curve: bool = False
    ) -> MeasuredSet:
        """Samples the seeds of set `number`, and compares the images with the data and, those of the first seeds of
        the first set, with the teacher's. Writes the result to `path`.

        kept: so many of the first images are part of the result. is_curve: images that no measure can make sense of
        are a result too, a `problem`; otherwise they raise UserError.
        """
        key, plan = self.key(network, number), plan_sampling(network)
        options, detector, size = self.options, self.detector, self.options.eval_num
        set_precision(replace(self.config, precision="fp32"))  # whatever the training before it has set
        sets = options.eval_sets if detector is not None and not is_curve else 1
        who = "the teacher itself" if is_curve else network.source
        which = f" (set {number + 1} of {sets})" if sets > 1 else ""
        steps, calls = count(plan.steps, "step"), count(plan.nfe, "network call")
        self.log(f"Measuring {who}, {steps}: {size} images{which}, {calls} (NFE) for each...")
        seeds = range(number * size, (number + 1) * size)
        batches = iterate_images(network, seeds, max_batch=options.eval_batch, device=dist.device(), labels=self.labels)
        watch = Watch(0 if number else self.compared)
        passed = watch.pass_on(batches)
        seen = show_progress(passed, lambda batch: len(batch.seeds), size, self.log, f"{steps}, NFE {plan.nfe}")
        images = (pictures.to_uint8(batch.images) for batch in seen)
        fd = error = stats = None
        if detector is not None:
            stats = statistics.statistics_of_images(images, detector, warn=not self.news)
        else:
            key = without_detector(key)
            deque(images, maxlen=0)
        network.net.cpu()  # makes room for training
        seconds, timed, first, problem = watch.totals()
        if problem is not None and not is_curve:
            hint = "if it was just trained, a lower --lr in a new --outdir may help"
            raise UserError(f"{network.source}: {problem}; {hint}")
        if stats is not None and self.reference is not None:
            fd = statistics.frechet_between(stats, self.reference)
            if not is_curve and number == 0:
                statistics.note_if_collapsed(stats, self.reference, who)
        if number == 0:
            error = 0.0 if self.teacher_images is None else rmse(first, self.teacher_images)
        if is_curve and error is not None and error > ABSURD:
            problem = problem or f"its images are absurd (end-point RMSE {error:.3g})"
        if problem is not None:
            fd = error = None
        found = MeasuredSet(key, fd, error, seconds, timed, first[:kept].clone(), problem)
        if dist.is_main():
            save_set(path, found)
        self.news = True
        return found


class Watch:
    """Notes the time, the images of the first seeds, and those that are no numbers; they become zeros, for other
    processes wait for this one's share of the statistics."""

    def __init__(self, first: int) -> None:
        self.first = first
        self.spent: list[tuple[float, int]] = []  # seconds spent waiting for a batch, and its images
        self.kept: dict[int, np.ndarray] = {}  # images of seeds below `first`
        self.bad: str | None = None

    def pass_on(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        start = time.perf_counter()
        for batch in batches:
            if batch.images.is_cuda:
                torch.cuda.synchronize(batch.images.device)
            self.spent.append((time.perf_counter() - start, len(batch.seeds)))
            if not batch.images.isfinite().all():
                what = f"some images of seeds {batch.seeds[0]} to {batch.seeds[-1]} hold NaN or infinities"
                self.bad = self.bad or what
                batch = replace(batch, images=torch.zeros_like(batch.images))
            if batch.seeds[0] < self.first:
                pairs = zip(batch.seeds, batch.images.cpu().numpy(), strict=True)
                self.kept |= {seed: image for seed, image in pairs if seed < self.first}
            yield batch
            start = time.perf_counter()

    def totals(self) -> tuple[float, int, Tensor, str | None]:
        """Of all processes: the slowest one's seconds and everybody's images, less each one's first batch, in which a
        device warms up, where there are others; the first images float32 [first, C, H, W]; a note of bad images."""
        counted = self.spent[1:] or self.spent
        own = (sum(seconds for seconds, _ in counted), sum(images for _, images in counted), self.kept, self.bad)
        seconds, timed, kept, bad = zip(*dist.gather_objects(own), strict=True)
        images = {seed: image for part in kept for seed, image in part.items()}
        first = torch.from_numpy(np.stack([images[seed] for seed in range(self.first)])) if images else torch.empty(0)
        return max(seconds), sum(timed), first, next(filter(None, bad), None)


def rmse(images: Tensor, others: Tensor) -> float:
    """Root mean square difference over all values, summed in float64 image by image."""
    squares = [float((a.double() - b.double()).square().mean()) for a, b in zip(images, others, strict=True)]
    return float(np.sqrt(np.mean(squares)))


def curve_plan(students: Sequence[int]) -> list[tuple[Solver, int]]:
    """How the teacher is run at the cost of students of so many steps: with as many Euler steps, and with the most
    Heun steps (2k - 1 network calls) that cost no more; but for a single one, which is Euler's."""
    heun = dict.fromkeys((steps + 1) // 2 for steps in students if steps > 2)
    return [*(("euler", steps) for steps in dict.fromkeys(students)), *(("heun", steps) for steps in heun)]


def try_inception() -> str | None:
    """Fetches the Inception weights into the download cache, or gives up within seconds and returns the reason."""
    try:
        open_url(detectors.INCEPTION_URL, num_attempts=3, return_filename=True, timeout=PATIENCE, kind="a detector")
    except UserError as exc:
        return f"the Inception weights can't be had ({exc})"
    return None


# ---------------------------------------------------------------------------------------------------------------------
# Files in rungs/


def short_hash(text: str) -> str:
    """A few letters for the name of a file."""
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def without_detector(key: dict[str, Any]) -> dict[str, Any]:
    """The key of the same measurement without a Fréchet distance."""
    return {**key, "detector": None, "reference": None}


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
        numbers = [found.seconds, found.timed, *(each for each in (found.fd, found.endpoint_rmse) if each is not None)]
        is_whole = (
            {"network", "detector", "reference"} <= found.key.keys()
            and all(isinstance(each, (int, float)) and 0 <= each < math.inf for each in numbers)
            and isinstance(found.timed, int)
            and isinstance(found.problem or "", str)
            and found.images.dtype == torch.float32
        )
        return found if is_whole else None
    except Exception:  # damage shows in many ways: OSError, ValueError, BadZipFile, EOFError, TypeError, MemoryError
        return None


def load_floor(path: Path) -> Floor | None:
    """What `Measuring.open` wrote, or None where there is no such file or it can't be read."""
    match read_json(path):
        case {"images": int(images), "distances": [_, *_] as distances}:
            return Floor(images, distances) if all(isinstance(each, float) for each in distances) else None
    return None


def load_stats(path: Path) -> statistics.Stats | None:
    """The same for statistics of the data set."""
    with suppress(UserError):
        return statistics.Stats.load(path) if path.is_file() else None
    return None
