"""A whole ladder: N -> N/K -> ... -> 1 steps, every rung trained, then measured in the same way as the first teacher.

Everything a ladder finds out goes into files as soon as it is known, so that the same command started again does again
only what was not finished: a stage goes on from its own training state, a measured rung is read back.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import metrics
from dnnlib.atomic import atomic_write, write_text
from dnnlib.cli import UsageError, UserError
from metrics.detectors import Detector, load_detector
from metrics.statistics import Stats, check_same_detector, load_reference, statistics_of_dataset, statistics_of_images
from torch_utils import distributed as dist

from . import pictures
from .network_files import NetworkFile
from .sampling import Batch, iterate_images, plan_sampling
from .setup import Options, load_everywhere, prepare, train
from .stage import plan_ladder

END_POINT_IMAGES = 2048  # the end-point error has little noise: more images would only take longer


@dataclass
class Rung:
    """What is known of one network of a ladder, as a line of `ladder.json`."""

    steps: int
    nfe: int
    fd: float | None  # Fréchet distance to the reference, in the detector's features
    endpoint_rmse: float  # against the first teacher's images from the same latents, values in [-1, 1]
    sec_per_kimg: float  # sampling time per 1000 images
    kimg: float  # images this network was distilled with; 0 for the teacher
    network: str  # file


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
    """Builds the stages, trains and measures them one after the other, and writes the four files of a ladder."""

    def __init__(
        self, stage_options: Options, options: LadderOptions, say: Callable[[str], None] = dist.print0
    ) -> None:
        self.base, self.options, self.say = stage_options, options, say
        self.outdir = Path(stage_options.outdir)
        assert stage_options.transfer is not None
        self.teacher = load_everywhere(stage_options.transfer, stage_options.trust_network_code)
        self.num_steps = options.num_steps or (self.teacher.sampling.grid.steps if self.teacher.sampling else 0)
        if not self.num_steps:
            raise UsageError(
                f"--num_steps is needed: {stage_options.transfer} is undistilled and has no grid of its own"
            )
        self.ratios = plan_ladder(self.num_steps, options.until, options.ratios)
        self.durations = one_per_stage("--duration", options.durations, len(self.ratios))
        self.lrs = one_per_stage("--lr", options.lrs, len(self.ratios))
        if options.eval_num < 2:
            raise UsageError("--eval-num must be at least 2")

    def stage_options(self, index: int, transfer: str, steps: int) -> Options:
        """What `train.py` would be given for stage `index`."""
        ratio = self.ratios[index]
        return replace(
            self.base,
            outdir=str(self.outdir / f"stage-{index + 1}-{steps}to{steps // ratio}"),
            nosubdir=True,
            transfer=transfer,
            num_steps=steps,
            ratio=ratio,
            teacher_solver=self.base.teacher_solver if index == 0 else None,
            duration=self.durations[index],
            lr=self.lrs[index],
        )

    def run(self) -> list[Rung]:
        """Everything; returns the rungs, the teacher first."""
        first = self.stage_options(0, str(self.base.transfer), self.num_steps)
        plan = prepare(first)  # bad options and data are found before anything is written or trained
        assert plan.stage is not None
        chain = [self.num_steps // int(np.prod(self.ratios[:i])) for i in range(len(self.ratios) + 1)]
        self.say(f"Ladder:                  {' -> '.join(map(str, chain))} steps, {plan.stage.solver} teacher")
        self.say(f"Results:                 {self.outdir}/ladder.json, ladder.csv, ladder.png, samples.png")
        if dist.is_main():
            self.outdir.mkdir(parents=True, exist_ok=True)
        dist.barrier()
        self.prepare_measuring()
        solver = plan.stage.solver if self.teacher.sampling is None else None
        rungs = [self.measure(self.teacher, self.num_steps, solver, kimg=0)]
        rows = [self.sample_row(self.teacher, self.num_steps, solver)]
        self.write_files(rungs, rows)
        transfer = str(self.base.transfer)
        for index, steps in enumerate(chain[:-1]):
            self.say("")
            self.say(f"Stage {index + 1} of {len(self.ratios)}: {steps} -> {chain[index + 1]} steps")
            options = self.stage_options(index, transfer, steps)
            run = prepare(options)
            run.announce(self.say)
            transfer = str(train(options, run))
            student = load_everywhere(transfer, self.base.trust_network_code)
            rungs.append(self.measure(student, chain[index + 1], None, run.config.total_kimg))
            rows.append(self.sample_row(student, chain[index + 1], None))
            self.write_files(rungs, rows)
        return rungs

    # -- measuring ---------------------------------------------------------------------------------------------------

    def prepare_measuring(self) -> None:
        """Detector and reference statistics; without a detector that can be had, the end-point error alone judges."""
        self.detector: Detector | None = None
        self.reference: Stats | None = None
        try:
            self.detector = load_detector(self.options.detector, dist.device())
        except metrics.DetectorUnavailable as exc:
            if self.options.ref is not None:
                raise UserError(f"--ref is given, but there is no detector to compare with it: {exc}") from exc
            self.say(f"No Fréchet distances (fd will be null): {exc}")
            return
        if self.options.ref is not None:
            self.reference = load_reference(self.options.ref)
            check_same_detector(self.detector.id, self.reference.detector_id)
            return
        self.say(f"Reference statistics of {self.base.data}...")
        self.reference = statistics_of_dataset(self.base.data, self.detector)

    def measure(self, network: NetworkFile, steps: int, solver: str | None, kimg: float) -> Rung:
        """Samples `eval_num` images (seeds 0, 1, ...) and compares them with the data and with the teacher's."""
        source = str(network.source)
        key = {
            "network": network.sha256,
            "steps": steps,
            "solver": solver,
            "teacher": self.teacher.sha256,
            "eval_num": self.options.eval_num,
            "eval_batch": self.options.eval_batch,
            "detector": self.detector.id if self.detector else None,
            "reference": hashlib.sha256(self.reference.mu.tobytes()).hexdigest() if self.reference else None,
        }
        path = self.outdir / "rungs" / f"steps-{steps}.json"
        known = dist.broadcast_object(read_json(path) if dist.is_main() else None)
        if known is not None and known.get("key") == key and (kimg > 0 or self.load_end_points() is not None):
            return Rung(**known["rung"])
        plan = plan_sampling(network, steps=steps, solver=solver)
        timing = Timing()
        error = EndPointError(None if kimg == 0 else self.load_end_points(), dist.device())
        seeds = range(self.options.eval_num)
        batches = iterate_images(
            network, seeds, steps=steps, solver=solver, max_batch=self.options.eval_batch, device=dist.device()
        )
        images = (pictures.to_uint8(batch.images) for batch in error.watch(timing.watch(batches)))
        fd = None
        if self.detector is not None and self.reference is not None:
            fd = metrics.frechet_between(statistics_of_images(images, self.detector), self.reference)
        else:
            for _ in images:
                pass
        if kimg == 0:
            self.save_end_points(error.collected())
        rung = Rung(steps, plan.nfe, fd, error.rmse(), timing.seconds_per_kimg(), kimg, source)
        if dist.is_main():
            write_text(path, json.dumps({"key": key, "rung": asdict(rung)}, indent=2) + "\n")
        shown = "" if fd is None else f"fd {fd:.4g}, "
        self.say(f"{steps:>4d} steps: {shown}end-point RMSE {rung.endpoint_rmse:.4g}, NFE {plan.nfe}")
        return rung

    def end_point_path(self) -> Path:
        return self.outdir / "rungs" / "teacher-images.npy"

    def save_end_points(self, images: dict[int, Tensor]) -> None:
        """The first teacher's images, float32 [M, C, H, W] in the order of their seeds."""
        if dist.is_main():
            with atomic_write(self.end_point_path()) as file:
                np.save(file, np.stack([images[seed].numpy() for seed in sorted(images)]))
        dist.barrier()

    def load_end_points(self) -> dict[int, Tensor] | None:
        """What `save_end_points` wrote; None where it isn't there or has another number of images."""
        try:
            images = np.load(self.end_point_path(), allow_pickle=False)
        except (OSError, ValueError):
            return None
        if len(images) != min(END_POINT_IMAGES, self.options.eval_num):
            return None
        return dict(enumerate(torch.from_numpy(images)))

    def sample_row(self, network: NetworkFile, steps: int, solver: str | None, count: int = 16) -> Tensor:
        """The same seeds for every rung: uint8 [count, C, H, W], made by every process for itself."""
        from .sampling import sample_batch

        plan = plan_sampling(network, steps=steps, solver=solver)
        batch = sample_batch(network.net.to(dist.device()), range(count), plan, dist.device())
        return pictures.to_uint8(batch.images).cpu()

    # -- files -------------------------------------------------------------------------------------------------------

    def write_files(self, rungs: Sequence[Rung], rows: Sequence[Tensor]) -> None:
        """ladder.json, ladder.csv, ladder.png and samples.png of the rungs so far."""
        if not dist.is_main():
            return
        table = [asdict(rung) for rung in rungs]
        write_text(self.outdir / "ladder.json", json.dumps(table, indent=2) + "\n")
        text = io.StringIO()
        writer = csv.DictWriter(text, fieldnames=list(table[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(table)
        write_text(self.outdir / "ladder.csv", text.getvalue())
        with atomic_write(self.outdir / "ladder.png") as file:
            plot_ladder(rungs, file)
        names = [f"{rung.steps} step{'s' * (rung.steps > 1)} ({rung.nfe} NFE)" for rung in rungs]
        names[0] += ", teacher"
        pictures.save_png(
            self.outdir / "samples.png", pictures.labelled_rows(rows, names, "The same latents on every rung")
        )


def one_per_stage(name: str, values: list[float], stages: int) -> list[float]:
    """One value for all stages, or one for each. Raises UsageError for any other number of them."""
    if len(values) not in (1, stages):
        raise UsageError(f"{name} has {len(values)} values for {stages} stages; give one, or one for each stage")
    return values * stages if len(values) == 1 else values


def read_json(path: Path) -> Any:
    """A JSON file's content, or None where there is no readable one."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


class Timing:
    """Seconds spent waiting for batches, which is sampling alone, and images got; summed over processes."""

    def __init__(self) -> None:
        self.seconds, self.images = 0.0, 0

    def watch(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Passes batches on, measuring."""
        while True:
            start = time.perf_counter()
            batch = next(batches, None)
            if batch is None:
                return
            if batch.images.is_cuda:
                torch.cuda.synchronize(batch.images.device)
            self.seconds += time.perf_counter() - start
            self.images += len(batch.seeds)
            yield batch

    def seconds_per_kimg(self) -> float:
        """Of the whole job: the slowest process's seconds over everybody's images."""
        parts = dist.gather_objects((self.seconds, self.images))
        return max(seconds for seconds, _ in parts) / max(sum(images for _, images in parts), 1) * 1000


class EndPointError:
    """Root mean square difference to the first teacher's images. Without those it collects: this is the teacher."""

    def __init__(self, expected: dict[int, Tensor] | None, device: torch.device) -> None:
        self.expected, self.device = expected, device
        self.kept: dict[int, Tensor] = {}
        self.sums = torch.zeros(2, dtype=torch.float64, device=device)  # squared error, number of values

    def watch(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Passes batches on, comparing."""
        for batch in batches:
            for seed, image in zip(batch.seeds, batch.images, strict=True):
                if seed >= END_POINT_IMAGES:
                    continue
                if self.expected is None:
                    self.kept[seed] = image.cpu()
                else:
                    difference = image.double() - self.expected[seed].to(self.device).double()
                    self.sums += torch.stack([difference.square().sum(), self.sums.new_tensor(difference.numel())])
            yield batch

    def collected(self) -> dict[int, Tensor]:
        """The kept images of all processes."""
        return {seed: image for part in dist.gather_objects(self.kept) for seed, image in part.items()}

    def rmse(self) -> float:
        """0 for the teacher itself."""
        if self.expected is None:
            return 0.0
        dist.all_reduce_sum([self.sums])
        squares, count = self.sums.tolist()
        return float((squares / count) ** 0.5)


def plot_ladder(rungs: Sequence[Rung], file: Any) -> None:
    """Quality against network calls per image (log scale): Fréchet distance and end-point error, a panel each."""
    from matplotlib.figure import Figure

    panels: list[tuple[str, list[tuple[int, float]]]] = []
    distances = [(rung.nfe, rung.fd) for rung in rungs if rung.fd is not None]
    if distances:
        panels.append(("Fréchet distance to the data", distances))
    panels.append(("End-point RMSE to the teacher", [(rung.nfe, rung.endpoint_rmse) for rung in rungs[1:]]))
    figure = Figure(figsize=(5.2 * len(panels), 4.2), layout="constrained", dpi=140)
    for axis, (label, points) in zip(np.atleast_1d(figure.subplots(1, len(panels))), panels, strict=True):
        students = [point for point in points if point[0] != rungs[0].nfe or label.startswith("End")]
        axis.plot(*zip(*students, strict=True), "o-", color="#1f5fa8", label="students") if students else None
        for nfe, value in students:
            axis.annotate(
                f"{value:.3g}", (nfe, value), textcoords="offset points", xytext=(0, 8), ha="center", fontsize=8
            )
        if label.startswith("Fr"):
            axis.axhline(points[0][1], color="#b04a1f", linestyle="--", linewidth=1)
            axis.plot(*points[0], "s", color="#b04a1f", label=f"teacher, {rungs[0].steps} steps: {points[0][1]:.3g}")
        axis.set_xscale("log", base=2)
        axis.set_xticks([rung.nfe for rung in rungs], [str(rung.nfe) for rung in rungs])
        axis.minorticks_off()
        axis.set_ylim(bottom=0)
        axis.margins(y=0.15)
        axis.set_xlabel("network calls per image (NFE)")
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
        if students or label.startswith("Fr"):
            axis.legend(frameon=False)
    figure.savefig(file, format="png")


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
