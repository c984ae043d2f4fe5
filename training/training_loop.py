"""Training, from data alone and in distillation alike: `Trainer.step` is one optimisation step, on one screen.

    data set -> batch on device -> (teacher -> target) -> loss -> gradients -> Adam -> moving average

What a student is asked for is in `training.distillation`. Ticks, files, pictures and signals are `engine.loop`'s.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from dnnlib.errors import UserError, printable
from torch_utils import distributed as dist
from torch_utils.training_stats import Collector

from . import distillation, networks
from . import loss as losses
from .augment import AugmentPipe
from .config import check_batch
from .dataset import ImageFolderDataset
from .distillation import Stage
from .draws import BatchPart, StepDraws, key
from .loader import Batch, Loader
from .optimizer import LARGEST_GRADIENT, clip_gradient, ema_factor, flat_gradients, learning_rate
from .recipe import TrainConfig
from .speed import compute_dtype, maybe_compile, recompute_blocks, set_precision

NETWORKS = {name: getattr(networks, name) for name in ("EDMPrecond", "VPPrecond", "VEPrecond", "iDDPMPrecond")}
LOSSES = {name: getattr(losses, name) for name in ("EDMLoss", "VPLoss", "VELoss")}


def run_network(config: TrainConfig, dataset: ImageFolderDataset, stage: Stage | None) -> Any:
    """What a run trains, in training mode: a fresh network, or a copy of a teacher of foreign code as it is."""
    if stage is None or not stage.teacher.foreign_code:
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


class Trainer:
    """What a run trains, and one step of it: network, moving average, loss, optimiser, statistics.

    stage: the distillation stage, or None for training from data alone.
    transfer: network to take matching weights from at the start (training from data alone).
    log: prints and logs a line, such as one about a missing compiler.
    """

    def __init__(
        self,
        config: TrainConfig,
        dataset: ImageFolderDataset,
        stage: Stage | None = None,
        transfer: Any = None,
        log: Callable[[str], None] = dist.print0,
    ) -> None:
        self.config, self.dataset, self.stage = config, dataset, stage
        self.device = dist.device()
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.batch_gpu = check_batch(config.batch, config.batch_gpu, self.world_size)
        set_precision(config)

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
        self.loss_fn = self._make_loss(log)
        self.forward = maybe_compile(self.net, config.compile, log)
        self.augment_pipe = AugmentPipe(**config.augment_kwargs) if config.augment_kwargs is not None else None

        self.parameters = list(self.net.parameters())
        self.gradients = flat_gradients(self.parameters)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.net.compute_dtype == torch.float16)
        self.optimizer = torch.optim.Adam(self.parameters, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)
        self.stats = Collector()
        self.skipped = torch.zeros((), device=self.device)  # 1 where the last step was skipped
        self.nimg = self.step_count = 0

    def _make_loss(self, log: Callable[[str], None]) -> Any:
        kwargs = dict(self.config.loss_kwargs)
        name = kwargs.pop("class_name").rpartition(".")[2]
        if self.stage is None:
            return LOSSES[name](**kwargs)
        teacher = self.stage.teacher.net.eval().requires_grad_(False).to(self.device)
        # The teacher's rounding enters the target as it is. What a target amplifies, the states, is float64.
        teacher_dtype = compute_dtype(self.config.teacher_precision, self.device)
        teacher.compute_dtype = teacher_dtype
        teacher = maybe_compile(teacher, self.config.compile, log)
        stage = (self.stage.grid, self.stage.ratio, self.stage.solver)
        settings = {"weighting": kwargs["weighting"], "intervals": kwargs["intervals"], "device": self.device}
        if not self.stage.self_teacher:
            return distillation.EDMDistillationLoss(teacher, *stage, **settings)
        self.ema.compute_dtype = teacher_dtype
        self_teacher = maybe_compile(self.ema, self.config.compile, log)
        return distillation.SelfTeacherLoss(teacher, self_teacher, *stage, **settings)

    def step(self, loader: Loader) -> None:
        """One optimisation step over `config.batch` images. Nothing here waits for the device."""
        batch = next(loader)
        draws = StepDraws(self.config.seed, self.step_count, self.config.batch, self.device)
        torch.manual_seed(key(self.config.seed, self.step_count, "dropout", self.rank))
        self.gradients.zero_()
        for images, labels, source in self.slices(batch, draws):
            loss = self.loss_fn(self.forward, images, labels, self.augment_pipe, source)
            self.stats.report("Loss/loss", loss)
            self.scaler.scale(loss.sum() * (self.config.ls / self.config.batch)).backward()
        dist.all_reduce_sum([self.gradients])
        self.skipped = self.apply_gradients()
        self.update_ema()
        if self.loss_fn.intervals is not None:
            self.stats.report_moments("Loss/interval", self.loss_fn.intervals.end_step())
        self.stats.update()
        self.nimg += self.config.batch
        self.step_count += 1

    def slices(self, batch: Batch, draws: StepDraws) -> Iterator[tuple[Tensor, Tensor | None, BatchPart]]:
        """This process's images, `batch_gpu` at a time: float32 in [-1, 1], labels, and their random numbers."""
        first = self.rank * len(batch.images)
        for start in range(0, len(batch.images), self.batch_gpu):
            stop = start + self.batch_gpu
            images = batch.images[start:stop].to(self.device, non_blocking=True).to(torch.float32) / 127.5 - 1
            labels = batch.labels[start:stop].to(self.device, non_blocking=True) if self.dataset.has_labels else None
            yield images, labels, draws.part(first + start, first + stop)

    def apply_gradients(self) -> Tensor:
        """Adam, unless a gradient is not finite: then nothing moves. Returns 1.0 for such a step, on the device, which
        nothing waits for."""
        scale = self.scaler.scale(torch.ones((), device=self.device))  # without a copy to the host, as get_scale makes
        largest = torch.linalg.vector_norm(self.gradients, math.inf)
        found_inf = (~(largest < LARGEST_GRADIENT * scale)).float()  # NaN too
        self.gradients[:1].masked_fill_(found_inf.bool(), math.nan)  # GradScaler takes any finite gradient for valid
        self.scaler.unscale_(self.optimizer)
        if self.config.clip is not None:
            clip_gradient(self.gradients, self.config.clip)
        self.optimizer.found_inf = found_inf  # type: ignore[attr-defined]  # fused Adam reads it on the device
        self.optimizer.grad_scale = None  # type: ignore[attr-defined]
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.nimg, self.config)
        self.optimizer.step()
        self.scaler.update()
        return found_inf * (scale <= 1)  # a step that lowers fp16's scale does not count as skipped

    @torch.no_grad()
    def update_ema(self) -> None:
        """ema <- factor * ema + (1 - factor) * weights; buffers are constants and were copied at the start."""
        factor = ema_factor(self.nimg, self.config)
        torch._foreach_lerp_(list(self.ema.parameters()), self.parameters, 1 - factor)

    @torch.no_grad()
    def check_finite(self) -> None:
        """Raises UserError, on every process, where something that is about to be saved is not a finite number."""
        adam = [self.optimizer.state[p][name] for p in self.parameters for name in ("exp_avg", "exp_avg_sq")]
        ema = list(self.ema.parameters())
        saved = {"weights": self.parameters, "averaged weights": ema, "optimiser's averages": adam}
        for what, tensors in saved.items():
            if not torch.stack(torch._foreach_norm(tensors, math.inf)).isfinite().all():
                raise UserError(
                    f"the {what} are not finite any more at step {self.step_count}, {self.nimg / 1000:g} kimg; what "
                    "was saved before is intact. Resume from there with a lower --lr, or with --clip"
                )

    def state_dict(self) -> dict[str, Any]:
        """Everything that the following steps depend on (formats.state has the layout)."""
        adam = {name: self.optimizer.state[p] for name, p in self.net.named_parameters()}
        scaler = self.scaler.state_dict()  # empty where it is off
        return {
            "position": {"nimg": self.nimg, "step": self.step_count},
            "net": self.net.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizer": {
                field: {name: values[field] for name, values in adam.items()}
                for field in ("exp_avg", "exp_avg_sq", "step")
            },
            "scaler": {"scale": self.scaler.get_scale(), "growth": scaler.get("_growth_tracker", 0)},
            "stats": self.stats.state_dict(),
            "intervals": self.loss_fn.intervals.state_dict() if self.loss_fn.intervals is not None else {},
            "batch_gpu": self.batch_gpu,
            "world_size": self.world_size,
            "device": self.device.type,
        }

    def load_state(self, saved: dict[str, Any]) -> None:
        """The inverse of `state_dict`. Raises UserError for a state that does not fit the network."""
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
            if scaler := self.scaler.state_dict():
                scale, growth = saved["scaler"]["scale"], saved["scaler"]["growth"]
                self.scaler.load_state_dict({**scaler, "scale": scale, "_growth_tracker": growth})
            self.stats.load_state_dict(saved["stats"])
            if self.loss_fn.intervals is not None:
                self.loss_fn.intervals.load_state_dict(saved["intervals"])
            self.nimg, self.step_count = saved["position"]["nimg"], saved["position"]["step"]
        except (KeyError, RuntimeError, AttributeError, TypeError, ValueError) as exc:
            raise UserError(
                f"the training state does not fit this network ({printable(exc, 200)}); is it damaged?"
            ) from exc


def matching(source: torch.nn.Module, target: torch.nn.Module) -> dict[str, Tensor]:
    """The tensors of `source` that agree in name and shape with one of `target`."""
    have, want = source.state_dict(), target.state_dict()
    return {name: tensor for name, tensor in have.items() if name in want and want[name].shape == tensor.shape}
