"""Parts of an optimisation step, each with its formula: learning rate, moving average, gradients, loss scale."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torch_utils import distributed as dist

from .recipe import TrainConfig

LARGEST_GRADIENT = 1e18  # Adam adds up squares, which would be infinite soon beyond that


def learning_rate(nimg: int, config: TrainConfig) -> float:
    """Rate for the step that starts after `nimg` images: EDM's linear ramp, then an optional decay to 0 at the end."""
    ramp = min(nimg / (config.lr_rampup_kimg * 1000), 1) if config.lr_rampup_kimg else 1
    progress = min(nimg / max(config.total_nimg, 1), 1)
    decay = {"none": 1.0, "linear": 1 - progress, "cosine": 0.5 * (1 + math.cos(math.pi * progress))}
    return config.lr * ramp * decay[config.lr_decay]


def ema_factor(nimg: int, config: TrainConfig) -> float:
    """How much of the old average stays: 0.5^(batch / half-life), the half-life ramped up with the images seen."""
    if config.ema_std is not None:
        return power_ema_factor(nimg // config.batch + 1, config.ema_std)
    halflife = config.ema_halflife_kimg * 1000
    if config.ema_rampup_ratio is not None:
        halflife = min(halflife, nimg * config.ema_rampup_ratio)
    return float(0.5 ** (config.batch / max(halflife, 1e-8)))


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
