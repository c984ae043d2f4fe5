"""The training loop, for training from scratch and for distillation alike. `Trainer.step` is a step
on one screen; what a student is asked for is in training.distillation.

data set -> batch on device -> (teacher -> target) -> loss -> gradient -> optimiser -> EMA
every tick: statistics, pictures, files
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import os
import signal
import time
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from torch import Tensor
from tqdm import tqdm

from dnnlib.atomic import append_text, atomic_write
from dnnlib.cli import Stopped, UserError
from dnnlib.errors import printable
from dnnlib.util import format_time, read_file
from torch_utils import distributed as dist
from torch_utils import training_stats

from . import distillation, networks, pictures, state
from . import loss as losses
from .augment import AugmentPipe
from .config import TrainConfig, check_batch
from .dataset import ImageFolderDataset
from .distillation import Stage
from .draws import StepDraws, key
from .health import MOST, WINDOW, Health
from .loader import Batch, Loader
from .loggers import open_loggers
from .network_files import save_network
from .options import named_differences
from .progress import print_above_bars, training_bar
from .samplers import edm_sampler, grid_sampler
from .speed import compute_dtype, maybe_compile, recompute_blocks, set_precision, use_cpu_kernels
from .stopping import StopSignals

MAX_ROWS = 64  # of a sheet of targets
TARGET_IMAGES = 4
TARGET_COLUMNS = 3 * TARGET_IMAGES  # input, target and answer
MAX_SAMPLES = 64  # in a picture of samples
RATE_IS_ZERO = "the learning rate reaches 0 at --duration, so a longer run must start anew"
LARGEST_GRADIENT = 1e18  # Adam adds up squares, which would be infinite soon beyond that
NETWORKS = {name: getattr(networks, name) for name in ("EDMPrecond", "VPPrecond", "VEPrecond", "iDDPMPrecond")}
LOSSES = {name: getattr(losses, name) for name in ("EDMLoss", "VPLoss", "VELoss")}


def run_network(config: TrainConfig, dataset: ImageFolderDataset, stage: Stage | None) -> Any:
    """What a run trains, in training mode: a fresh network, or a copy of a teacher of foreign code as it is."""
    if stage is None or not stage.teacher.own_code:
        return build_network(config.network_kwargs, dataset.resolution, dataset.num_channels, dataset.label_dim)
    net = copy.deepcopy(stage.teacher.net).cpu().train().requires_grad_(True)
    if hasattr(net, "use_fp16"):
        net.use_fp16 = False  # no other precision than fp32 is asked of it
    return net


def build_network(network_kwargs: dict[str, Any], resolution: int, channels: int, label_dim: int) -> Any:
    """A freshly initialised network in training mode. Raises UserError for a size that it cannot have."""
    kwargs = dict(network_kwargs)
    make = NETWORKS[kwargs.pop("class_name").rpartition(".")[2]]
    try:
        return make(img_resolution=resolution, img_channels=channels, label_dim=label_dim, **kwargs)
    except ValueError as exc:
        raise UserError(str(exc)) from exc


# ---------------------------------------------------------------------------------------------------------------------
# Parts of a step, each with its formula


def learning_rate(nimg: int, config: TrainConfig) -> float:
    """Rate for the step that starts after `nimg` images: EDM's linear ramp, then an optional decay to 0 at the end."""
    ramp = min(nimg / (config.lr_rampup_kimg * 1000), 1) if config.lr_rampup_kimg else 1
    progress = min(nimg / max(config.total_nimg, 1), 1)
    decay = {"none": 1.0, "linear": 1 - progress, "cosine": 0.5 * (1 + math.cos(math.pi * progress))}
    return config.lr * ramp * decay[config.lr_decay]


def ema_factor(nimg: int, config: TrainConfig) -> float:
    """How much of the old average stays: 0.5^(batch / half-life), the half-life ramped up with the images seen."""
    if config.ema_std is not None:
        return power_ema_factor(nimg // config.batch_size + 1, config.ema_std)
    halflife = config.ema_halflife_kimg * 1000
    if config.ema_rampup_ratio is not None:
        halflife = min(halflife, nimg * config.ema_rampup_ratio)
    return float(0.5 ** (config.batch_size / max(halflife, 1e-8)))


def power_ema_factor(step: int, std: float) -> float:
    """Of a power-function average at step 1, 2, ...: (1 - 1 / step)^(gamma + 1), eq. 2 of Karras et al. 2024 (EDM2).

    The average's weights grow as a power of training time; `std`, EDM2's sigma_rel, is their deviation as a part of
    it, and gamma the largest root of (gamma + 1) = std^2 (gamma + 2)^2 (gamma + 3) (eq. 3).
    """
    return float((1 - 1 / step) ** (ema_exponent(std) + 1))


@lru_cache(maxsize=8)
def ema_exponent(std: float) -> float:
    """gamma of `power_ema_factor`, 0 < std < 0.288 or so (the deviation of equal weights)."""
    square = std**-2
    return float(np.roots([1, 7, 16 - square, 12 - square]).real.max())


class Gradients:
    """All gradients in one flat float32 buffer whose layout never changes.

    Processes sum it in one exchange, so the order of additions is the same in every step and after every resume.
    (torch's DistributedDataParallel regroups its buckets after the first step; with three processes or more that alters
    the last bits of a resumed run.)
    """

    def __init__(self, parameters: list[torch.nn.Parameter]) -> None:
        self.flat = torch.zeros(sum(p.numel() for p in parameters), device=parameters[0].device)
        offset = 0
        for parameter in parameters:
            parameter.grad = self.flat[offset : offset + parameter.numel()].view_as(parameter)
            offset += parameter.numel()

    def zero(self) -> None:
        """Before the first round of a step."""
        self.flat.zero_()

    def sum_over_processes(self) -> None:
        """After the last round of a step."""
        dist.all_reduce_sum([self.flat])

    def clip(self, limit: float) -> None:
        """Shortens the gradient to Euclidean length `limit` where it is longer, without waiting for the device."""
        self.flat.mul_((limit / torch.linalg.vector_norm(self.flat).clamp(min=limit)).clamp(max=1))


class LossScale:
    """Dynamic loss scale for fp16 gradients (torch.amp's rule), 1 and inert for every other precision."""

    def __init__(self, active: bool, device: torch.device) -> None:
        self.active = active
        self.scale = torch.tensor(2.0**16 if active else 1.0, device=device)
        self.growth = torch.zeros((), dtype=torch.int32, device=device)

    def unscale(self, gradients: Tensor) -> None:
        """Divides the scale out again."""
        if self.active:
            gradients.div_(self.scale)

    def update(self, found_inf: Tensor) -> None:
        """Halves the scale after an overflow, doubles it after 2000 steps without one."""
        if self.active:
            torch._amp_update_scale_(self.scale, self.growth, found_inf, 2.0, 0.5, 2000)

    def state_dict(self) -> dict[str, Any]:
        return {"scale": self.scale.item(), "growth": int(self.growth.item())}

    def load_state_dict(self, values: dict[str, Any]) -> None:
        self.scale.fill_(values["scale"])
        self.growth.fill_(values["growth"])


class Log:
    """What a person reads: printed by rank 0 and kept in `log.txt`."""

    def __init__(self, path: Path | None) -> None:
        self.path = path if dist.is_main() else None

    def __call__(self, text: str = "") -> None:
        print_above_bars(text)
        self.note(text)

    def note(self, text: str) -> None:
        """For `log.txt` alone."""
        if self.path is not None:
            append_text(self.path, text + "\n")


# ---------------------------------------------------------------------------------------------------------------------


class Trainer:
    """One run: builds everything from a TrainConfig, goes on from a state, trains, and writes what it promises.

    stage: the distillation stage, or None for training from data alone.
    transfer: network to take matching weights from at the start (training from data alone).
    """

    distillation_loss = distillation.EDMDistillationLoss

    def __init__(
        self,
        config: TrainConfig,
        dataset: ImageFolderDataset,
        stage: Stage | None = None,
        transfer: Any = None,
    ) -> None:
        self.config, self.dataset, self.stage = config, dataset, stage
        self.device = dist.device()
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.batch_gpu, self.rounds = check_batch(config.batch_size, config.batch_gpu, self.world_size)
        self.run_dir = Path(config.run_dir)
        self.say = Log(self.run_dir / "log.txt")
        set_precision(config)
        use_cpu_kernels(self.device.type == "cpu")
        training_stats.clear()

        torch.manual_seed(key(config.seed, 0, "init"))
        self.net = run_network(config, dataset, stage)
        if stage is not None:
            self.net.load_state_dict(stage.teacher.net.state_dict())
        elif transfer is not None:
            self.net.load_state_dict(matching(transfer.net, self.net), strict=False)
        self.net.train().requires_grad_(True).to(self.device)
        self.net.compute_dtype = compute_dtype(config.precision, self.device)
        self.ema = copy.deepcopy(self.net).eval().requires_grad_(False)
        if config.recompute:
            recompute_blocks(self.net)
        self.loss_fn = self._make_loss()
        self.forward = maybe_compile(self.net, config.compile, self.say)
        self.augment_pipe = AugmentPipe(**config.augment_kwargs) if config.augment_kwargs is not None else None

        self.parameters = list(self.net.parameters())
        self.gradients = Gradients(self.parameters)
        self.scale = LossScale(config.precision == "fp16" and self.device.type == "cuda", self.device)
        self.optimizer = torch.optim.Adam(self.parameters, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)
        self.collector = training_stats.Collector()
        self.health = Health(config, dataset, self.say, self.say.note)

        self.nimg = self.step_count = self.tick = self.tick_start_nimg = self.tick_start_step = 0
        self.timed_from = 0  # images that were seen when this process began
        self.stats_lines = 0
        self.elapsed_before = 0.0
        self.told_duration = False
        self.bar: Any = tqdm(disable=True)  # until `run`
        self.loggers = open_loggers(config, self.say, lambda: self.timed_from)

    def _make_loss(self) -> Any:
        kwargs = dict(self.config.loss_kwargs)
        name = kwargs.pop("class_name").rpartition(".")[2]
        if self.stage is None:
            return LOSSES[name](**kwargs)
        teacher = self.stage.teacher.net.eval().requires_grad_(False).to(self.device)
        # The teacher's rounding enters the target as it is. What a target amplifies, the states, is float64.
        teacher_dtype = compute_dtype(self.config.teacher_precision, self.device)
        teacher.compute_dtype = teacher_dtype
        teacher = maybe_compile(teacher, self.config.compile, self.say)
        stage = (self.stage.grid, self.stage.ratio, self.stage.solver)
        settings = {"weighting": kwargs["weighting"], "intervals": kwargs["intervals"], "device": self.device}
        if not self.stage.self_teacher:
            return self.distillation_loss(teacher, *stage, **settings)
        self.ema.compute_dtype = teacher_dtype
        self_teacher = maybe_compile(self.ema, self.config.compile, self.say)
        return distillation.SelfTeacherLoss(teacher, self_teacher, *stage, **settings)

    # -- the method ------------------------------------------------------------------------------------------------

    def step(self, loader: Loader) -> None:
        """One optimisation step over `batch_size` images."""
        batch = next(loader)
        draws = StepDraws(self.config.seed, self.step_count, self.config.batch_size, self.device)
        torch.manual_seed(key(self.config.seed, self.step_count, "dropout", self.rank))
        self.gradients.zero()
        for images, labels, source in self.slices(batch, draws):
            loss = self.loss_fn(self.forward, images, labels, self.augment_pipe, source)
            training_stats.report("Loss/loss", loss)
            (loss.sum() * (self.config.loss_scaling / self.config.batch_size) * self.scale.scale).backward()
        self.gradients.sum_over_processes()
        skipped = self.apply_gradients()
        self.update_ema()
        by_interval = self.loss_fn.end_step()
        if by_interval is not None:
            training_stats.report_moments("Loss/interval", by_interval)
        self.collector.update()
        self.health.add(self.step_count, self.collector.latest["Loss/loss"], skipped)
        self.nimg += self.config.batch_size
        self.step_count += 1

    def slices(self, batch: Batch, draws: StepDraws) -> Iterator[tuple[Tensor, Tensor | None, Any]]:
        """This process's images in rounds of `batch_gpu`: float32 in [-1, 1], labels, and their random numbers."""
        first = self.rank * len(batch.images)
        for start in range(0, len(batch.images), self.batch_gpu):
            stop = start + self.batch_gpu
            images = batch.images[start:stop].to(self.device, non_blocking=True).to(torch.float32) / 127.5 - 1
            labels = batch.labels[start:stop].to(self.device, non_blocking=True) if self.dataset.has_labels else None
            yield images, labels, draws.part(first + start, first + stop)

    def apply_gradients(self) -> Tensor:
        """Adam, unless a gradient is not finite: then nothing moves. Returns 1.0 for such a step, on the device, which
        nothing waits for."""
        self.scale.unscale(self.gradients.flat)
        largest = torch.linalg.vector_norm(self.gradients.flat, math.inf)
        found_inf = (~(largest < LARGEST_GRADIENT)).float()  # NaN too
        if self.config.clip is not None:
            self.gradients.clip(self.config.clip)
        self.optimizer.found_inf = found_inf  # type: ignore[attr-defined]  # fused Adam looks at it on the device
        self.optimizer.grad_scale = None  # type: ignore[attr-defined]
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.nimg, self.config)
        self.optimizer.step()
        skipped = found_inf * (self.scale.scale <= 1)  # lowering the scale of fp16 is no bad step
        self.scale.update(found_inf)
        return skipped

    @torch.no_grad()
    def update_ema(self) -> None:
        """ema <- factor * ema + (1 - factor) * weights; buffers are constants and were copied at the start."""
        factor = ema_factor(self.nimg, self.config)
        torch._foreach_lerp_(list(self.ema.parameters()), self.parameters, 1 - factor)

    # -- the run ---------------------------------------------------------------------------------------------------

    def run(self) -> Path:
        """Trains to the end and returns the path of the last snapshot."""
        config = self.config
        if self.nimg >= config.total_nimg:
            return self.finish_again()
        loader = Loader(
            self.dataset,
            seed=config.seed,
            batch_size=config.batch_size,
            rank=self.rank,
            world_size=self.world_size,
            step=self.step_count,
            workers=config.workers,
            pin=self.device.type == "cuda",
        )
        self.say(f"Training for {config.total_nimg / 1000:g} kimg...")
        self.say()
        self.bar = training_bar(self.title(), self.nimg, config.total_nimg)
        try:
            with StopSignals() as signals:
                self.train(loader, signals)
        finally:
            loader.close()
            self.bar.close()
            self.loggers.close()
        dist.barrier()
        self.say()
        self.say(f"Done: {self.snapshot_path()}")
        return self.snapshot_path()

    def train(self, loader: Loader, signals: StopSignals) -> None:
        """Step by step to the end, with what ticks and time bring; raises Stopped when a signal has come."""
        config = self.config
        start = tick_start = last_save = time.time()
        maintenance = 0.0
        while self.nimg < config.total_nimg:
            self.step(loader)
            self.bar.update(config.batch_size)
            done = self.nimg >= config.total_nimg
            if done or self.tick == 0 or self.nimg >= self.tick_start_nimg + config.kimg_per_tick * 1000:
                tick_end = time.time()
                self.maintain(done, self.elapsed_before + tick_end - start, tick_end - tick_start, maintenance)
                self.tick += 1
                self.tick_start_nimg, self.tick_start_step = self.nimg, self.step_count
                tick_start = time.time()
                maintenance = tick_start - tick_end
                if self.should_dump(done):
                    elapsed = self.elapsed_before + tick_start - start
                    self.save_state(f"training-state-{self.nimg // 1000:06d}.pt", elapsed)
                    last_save = time.time()
            stop = 0 if done else signals.agreed()
            if stop or (not done and time.time() - last_save >= config.save_every_min * 60):
                self.save_state(state.rolling_name(self.nimg), self.elapsed_before + time.time() - start)
                last_save = time.time()
            if stop:
                dist.barrier()  # whoever ended first would have the launcher kill the one that writes
                text = f"interrupted by {signal.Signals(stop).name} at {self.nimg / 1000:g} kimg"
                self.say(f"Wrote {self.run_dir / state.rolling_name(self.nimg)}")
                self.say.note(f"{text[:1].upper()}{text[1:]}")
                raise Stopped(
                    stop, f"{text}; what is needed to go on is saved, {self.how_to_go_on()}" if dist.is_main() else ""
                )

    def how_to_go_on(self) -> str:
        """In words, for who has interrupted a run."""
        nosubdir = self.config.extras.get("command_line", {}).get("nosubdir", False)
        return "the same command goes on" if nosubdir else "the same command with --resume=latest goes on"

    def title(self) -> str:
        """What the bar says it is."""
        if self.stage is None:
            return "training"
        return f"{self.stage.grid.steps} -> {self.stage.sampling.grid.steps} steps"

    def finish_again(self) -> Path:
        """For a state from which nothing is left to do: makes sure that the last snapshot is there."""
        path = self.snapshot_path()
        if dist.is_main() and not path.is_file():
            self.save_snapshot()
        dist.barrier()
        longer = "a longer --duration trains on"
        if self.config.lr_decay != "none":
            longer = f"{RATE_IS_ZERO} (another --outdir)"
        self.say(f"This run is done already: {path}. Its --duration is {self.config.total_kimg / 1000:g}; {longer}")
        return path

    def snapshot_path(self) -> Path:
        """The network after the images seen so far."""
        return self.run_dir / f"network-snapshot-{self.nimg // 1000:06d}.pkl"

    def should_dump(self, done: bool) -> bool:
        """EDM's rule for `--dump`, asked after the tick's number has moved on."""
        ticks = self.config.state_dump_ticks
        return ticks is not None and (done or (self.tick > 1 and (self.tick - 1) % ticks == 0))

    def maintain(self, done: bool, elapsed: float, tick_seconds: float, maintenance: float) -> None:
        """The end of a tick: status line, snapshot, pictures, statistics."""
        config = self.config
        self.check_numbers()
        self.report_progress(elapsed, tick_seconds, maintenance)
        if config.snapshot_ticks is not None and (done or self.tick % config.snapshot_ticks == 0):
            check_same_weights(self.net, self.ema)
            self.check_finite()
            if dist.is_main():
                self.save_snapshot()
                self.save_samples()
            dist.barrier()
        if config.targets_ticks and self.stage is not None and (done or self.tick % config.targets_ticks == 0):
            self.save_targets()
        self.write_stats()

    def report_progress(self, elapsed: float, tick_seconds: float, maintenance: float) -> None:
        """EDM's status line, and the same figures as statistics."""
        images = self.nimg - max(self.tick_start_nimg, self.timed_from)
        gpu = self.device.type == "cuda"
        figures = {
            "Progress/tick": self.tick,
            "Progress/kimg": self.nimg / 1e3,
            "Timing/total_sec": elapsed,
            "Timing/sec_per_tick": tick_seconds,
            "Timing/sec_per_kimg": tick_seconds / max(images, 1) * 1e3,
            "Timing/maintenance_sec": maintenance,
            "Resources/cpu_mem_gb": psutil.Process(os.getpid()).memory_info().rss / 2**30,
            "Resources/peak_gpu_mem_gb": torch.cuda.max_memory_allocated(self.device) / 2**30 if gpu else 0.0,
            "Resources/peak_gpu_mem_reserved_gb": torch.cuda.max_memory_reserved(self.device) / 2**30 if gpu else 0.0,
            "Progress/skipped_steps": float(self.health.skipped),
            "Progress/learning_rate": float(self.optimizer.param_groups[0]["lr"]),
        }
        for name, value in figures.items():
            training_stats.report0(name, value)
        self.collector.update()
        if gpu:
            torch.cuda.reset_peak_memory_stats(self.device)
        gpu_memory = (
            f"gpumem {figures['Resources/peak_gpu_mem_gb']:<6.2f} "
            f"reserved {figures['Resources/peak_gpu_mem_reserved_gb']:<6.2f} "
        )
        self.say(
            f"tick {self.tick:<5d} kimg {self.nimg / 1e3:<9.1f} time {format_time(elapsed):<12s} "
            f"sec/tick {tick_seconds:<7.1f} sec/kimg {figures['Timing/sec_per_kimg']:<7.2f} "
            f"maintenance {maintenance:<6.1f} cpumem {figures['Resources/cpu_mem_gb']:<6.2f} "
            f"{gpu_memory if gpu else ''}loss {self.collector['Loss/loss']:<.5g}"
        )
        self.bar.set_postfix_str(f"loss {self.collector['Loss/loss']:.4g}", refresh=False)
        left = self.config.total_nimg - self.nimg
        # Half a tick: of the first one, and of what an interruption left of one, the most is warming up.
        enough = max(self.config.batch_size + 1, self.config.kimg_per_tick * 500)
        if images >= enough and left > 0 and not self.told_duration:
            self.say(f"About {format_time(left / images * tick_seconds)} for the {left / 1000:g} kimg that are left")
            self.told_duration = True

    def check_numbers(self) -> None:
        """Speaks of what went wrong since it was last asked, and ends the run where that is too much."""
        totals = self.collector
        in_tick = self.step_count - self.tick_start_step
        spread = f"{totals.mean('Loss/loss'):.5g} ± {totals.std('Loss/loss'):.5g}"
        last_skipped = self.health.look(f"this tick so far: loss {spread} in {in_tick} steps")
        if last_skipped is not None:
            precision = ", --precision=fp32" if self.config.precision != "fp32" else ""
            raise UserError(
                f"{MOST} of the last {WINDOW} steps had no finite gradients, the last of them "
                f"{self.health.describe(last_skipped)}; what was saved before is intact. Try a lower --lr{precision}, "
                "or look at the data"
            )

    @torch.no_grad()
    def check_finite(self) -> None:
        """Raises UserError, on every process, where something that is about to be saved is no number any more."""
        adam = [self.optimizer.state[p][name] for p in self.parameters for name in ("exp_avg", "exp_avg_sq")]
        for what, tensors in (
            ("weights", self.parameters),
            ("averaged weights", list(self.ema.parameters())),
            ("optimiser's averages", adam),
        ):
            if not torch.stack(torch._foreach_norm(tensors, math.inf)).isfinite().all():
                raise UserError(
                    f"the {what} are not finite any more at step {self.step_count}, {self.nimg / 1000:g} kimg; what "
                    "was saved before is intact. Go on from there with a lower --lr, or with --clip"
                )

    # -- files -----------------------------------------------------------------------------------------------------

    def save_snapshot(self) -> None:
        """The EMA network in EDM's format, with its noise grid when it is a student."""
        save_network(
            self.snapshot_path(),
            self.ema,
            sampling=self.stage.sampling if self.stage else None,
            loss_fn=dict(self.config.loss_kwargs),
            augment_pipe=self.config.augment_kwargs,
            dataset_kwargs={
                "class_name": "training.dataset.ImageFolderDataset",
                **self.config.dataset_kwargs,
                **({"label_kind": "vectors"} if self.dataset.has_label_vectors else {}),
            },
            extra={"training_options": self.config.to_file(self.nimg)},
        )

    @torch.no_grad()
    def save_samples(self) -> None:
        """`samples-KKKKKK.png`: the same latents and labels in every picture of a run."""
        count = MAX_SAMPLES if self.device.type == "cuda" else 16
        generator = torch.Generator().manual_seed(key(self.config.seed, 0, "samples"))
        shape = [count, self.ema.img_channels, self.ema.img_resolution, self.ema.img_resolution]
        latents = torch.randn(shape, generator=generator).to(self.device)
        labels = None
        if self.ema.label_dim:
            labels = torch.eye(self.ema.label_dim, device=self.device)[torch.arange(count) % self.ema.label_dim]
        if self.dataset.has_label_vectors:  # of images from everywhere in the data set
            chosen = [i * len(self.dataset) // count for i in range(count)]
            labels = torch.from_numpy(self.dataset.labels(chosen)).to(self.device)
        if self.stage is not None:
            images = grid_sampler(self.ema, latents, self.stage.sampling.grid, class_labels=labels)
        else:
            images = edm_sampler(self.ema, latents, labels)
        picture = pictures.tile(pictures.to_uint8(images), columns=math.isqrt(count), gap=2)
        pictures.save_png(self.run_dir / f"samples-{self.nimg // 1000:06d}.png", picture)

    @torch.no_grad()
    def save_targets(self) -> None:
        """`targets-KKKKKK.png`: noisy input, the teacher's target and the student's answer, for each student step."""
        if not dist.is_main():
            return
        items = [self.dataset[i] for i in spread(len(self.dataset), TARGET_IMAGES)]  # classes lie one after another
        count = len(items)
        clean = torch.from_numpy(np.stack([image for image, _ in items])).to(self.device).float() / 127.5 - 1
        labels = None
        if self.dataset.has_labels:
            labels = torch.from_numpy(np.stack([label for _, label in items])).to(self.device)
        generator = torch.Generator().manual_seed(key(self.config.seed, 0, "targets"))
        noise = torch.randn(clean.shape, generator=generator).to(self.device)
        rows, names = [], []
        for start in spread(len(self.loss_fn.starts), MAX_ROWS):
            interval = torch.full([count], start, device=self.device)
            jump = self.loss_fn.jumps(clean, interval, noise, labels)
            t, s = float(jump.t[0]), float(jump.s[0])
            answer = self.ema(jump.x, jump.t.flatten(), labels)
            shown = jump.x / (1 + jump.t**2).sqrt()  # the noisy image at a scale that can be looked at
            rows.append(torch.cat([pictures.to_uint8(x) for x in (shown, jump.target, answer)]))
            names.append(f"{t:.4g} -> {s:.4g}")
        headings = ["noisy input (scaled)", self.loss_fn.target_name, "student's answer"]
        title = f"Every jump of the student after {self.nimg / 1000:g} kimg, by its noise levels"
        sheet = pictures.labelled_rows(rows, names, title, headings)
        pictures.save_png(self.run_dir / f"targets-{self.nimg // 1000:06d}.png", sheet)

    def write_stats(self) -> None:
        """One line of `stats.jsonl` (and for the loggers), then the statistics start afresh."""
        values = self.collector.as_dict()
        self.collector.reset()
        self.stats_lines += 1
        if not dist.is_main():
            return
        append_text(self.run_dir / "stats.jsonl", json.dumps({**values, "timestamp": time.time()}) + "\n")
        self.loggers.write({name: value["mean"] for name, value in values.items()}, self.nimg)

    # -- going on --------------------------------------------------------------------------------------------------

    def save_state(self, name: str, elapsed: float) -> None:
        """Writes the exact state; every process holds the same one, rank 0 writes. Then older ones may go."""
        self.check_numbers()
        self.check_finite()
        if not dist.is_main():
            return
        state.save_state(self.run_dir / name, self.state_dict(elapsed))
        state.remove_old(self.run_dir)

    def state_dict(self, elapsed: float) -> dict[str, Any]:
        """See training.state for the layout."""
        names = [name for name, _ in self.net.named_parameters()]
        per_parameter = [self.optimizer.state[p] for p in self.parameters]
        return {
            "position": {
                "nimg": self.nimg,
                "step": self.step_count,
                "tick": self.tick,
                "tick_start_nimg": self.tick_start_nimg,
                "tick_start_step": self.tick_start_step,
                "skipped": self.health.skipped,
                "stats_lines": self.stats_lines,
                "elapsed_sec": elapsed,
            },
            "net": self.net.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizer": {
                field: {name: values[field] for name, values in zip(names, per_parameter, strict=True)}
                for field in ("exp_avg", "exp_avg_sq", "step")
            },
            "scaler": self.scale.state_dict(),
            "stats": self.collector.state_dict(),
            "intervals": self.loss_fn.state_dict(),
            "losses": list(self.health.losses),
            "options": json.loads(json.dumps(self.config.identity())),
            "batch_gpu": self.batch_gpu,
            "world_size": self.world_size,
            "device": self.device.type,
        }

    def load_state(self, path: Path, saved: dict[str, Any]) -> None:
        """Goes on from a state. Raises UserError naming every option that differs from the run's own."""
        check_same_options(path, saved["options"], self.config)
        try:
            self.net.load_state_dict(saved["net"])
            self.ema.load_state_dict(saved["ema"])
            optimizer = saved["optimizer"]
            for name, parameter in self.net.named_parameters():
                like = {"step": torch.zeros(()), "exp_avg": parameter, "exp_avg_sq": parameter}
                for field, tensor in like.items():  # Adam itself would write beyond the end of a short one
                    if optimizer[field][name].shape != tensor.shape or optimizer[field][name].dtype != tensor.dtype:
                        raise KeyError(f"{field} of {name}")
                self.optimizer.state[parameter] = {
                    field: optimizer[field][name].clone().to(self.device) for field in like
                }
            position = saved["position"]
            self.scale.load_state_dict(saved["scaler"])
            self.collector.load_state_dict(saved["stats"])
            self.loss_fn.load_state_dict(saved["intervals"])
            self.nimg, self.step_count, self.tick = position["nimg"], position["step"], position["tick"]
            self.tick_start_nimg, self.tick_start_step = position["tick_start_nimg"], position["tick_start_step"]
            self.timed_from = self.nimg
            self.health.skipped = position["skipped"]
            self.health.losses.extend(saved.get("losses", []))
            self.elapsed_before = position["elapsed_sec"]
        except (KeyError, RuntimeError, AttributeError, TypeError, ValueError) as exc:
            raise UserError(
                f"{path}: the training state does not fit this network ({printable(exc, 200)}); is it damaged?"
            ) from exc
        same_place = path.resolve().parent == self.run_dir.resolve()
        self.stats_lines = position["stats_lines"] if same_place else 0
        if dist.is_main():
            cut_lines(self.run_dir / "stats.jsonl", self.stats_lines)
        if (saved["world_size"], saved["device"]) != (self.world_size, self.device.type):
            self.say(
                f"Note: this run was on {saved['world_size']} x {printable(saved['device'], 40)} and goes on with "
                f"{self.world_size} x {self.device.type}: the same images and noise, but sums may round differently"
                f"{', and dropout masks differ' if self.config.network_kwargs.get('dropout', True) else ''}"
            )
        self.say(f"Going on from {path} at {self.nimg / 1000:g} kimg")


# ---------------------------------------------------------------------------------------------------------------------


def spread(count: int, most: int) -> list[int]:
    """All of 0 ... count - 1, or `most` of them from the first to the last."""
    return [round(i * (count - 1) / (most - 1)) for i in range(most)] if count > most else list(range(count))


def check_same_options(where: object, saved: dict[str, Any], config: TrainConfig) -> None:
    """Raises UserError, naming every option that alters the result and differs from what an earlier run had."""
    wrong = other_options(saved, config)
    if wrong:
        advice = "Use those, or another --outdir"
        if any(each.startswith("--duration ") for each in wrong):
            advice = f"{advice}: {RATE_IS_ZERO}"
        raise UserError(f"{where} belongs to a run with other options: {'; '.join(wrong)}. {advice}")


def other_options(saved: dict[str, Any], config: TrainConfig) -> list[str]:
    """The options that alter the result and differ from an earlier run's identity, with both values."""
    return named_differences(saved, json.loads(json.dumps(config.identity())))


def matching(source: torch.nn.Module, target: torch.nn.Module) -> dict[str, Tensor]:
    """The tensors of `source` that agree in name and shape with one of `target`."""
    have, want = source.state_dict(), target.state_dict()
    return {name: tensor for name, tensor in have.items() if name in want and want[name].shape == tensor.shape}


@torch.no_grad()
def check_same_weights(*nets: torch.nn.Module) -> None:
    """Raises UserError, naming a rank, when processes hold other bits (a fault of a machine or of this program)."""
    if dist.get_world_size() == 1:
        return
    digest = hashlib.sha256()
    for net in nets:
        for parameter in net.parameters():
            digest.update(parameter.detach().contiguous().cpu().numpy().data)
    mine = digest.hexdigest()[:16]
    other = [rank for rank, theirs in enumerate(dist.gather_objects(mine)) if theirs != mine]
    if other:
        raise UserError(
            f"the processes hold different weights (rank {dist.get_rank()} and rank {other[0]}, for one), a fault of "
            "a machine or of this program; the last state on disk is from before this was seen"
        )


def cut_lines(path: Path, count: int) -> None:
    """Keeps the first `count` lines of a text file, if it is there."""
    if path.exists():
        lines = read_file(path, "a log").splitlines(keepends=True)
        if len(lines) > count:
            with atomic_write(path) as file:
                file.writelines(lines[:count])
