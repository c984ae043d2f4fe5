"""Parts of an optimisation step, each with its formula: learning rate, moving average, gradients."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from .recipe import TrainConfig

LARGEST_GRADIENT = 1e18  # Adam adds up squares, which would be infinite soon beyond that


def learning_rate(nimg: int, config: TrainConfig) -> float:
    """Rate for the step that starts after `nimg` images: EDM's linear ramp, then an optional decay to 0 at the end."""
    ramp = min(nimg / (config.lr_rampup_kimg * 1000), 1) if config.lr_rampup_kimg else 1
    progress = min(nimg / max(config.total_nimg, 1), 1)
    decay = {"none": 1.0, "linear": 1 - progress, "cosine": 0.5 * (1 + math.cos(math.pi * progress))}
    return config.lr * ramp * decay[config.lr_decay]


def ema_factor(nimg: int, config: TrainConfig) -> float:
    """How much of the old average stays: 0.5^(batch / half-life), the half-life ramped up with the images seen; of a
    power-function average (1 - 1 / step)^(gamma + 1), eq. 2 of EDM2."""
    if config.ema_std is not None:
        step = nimg // config.batch + 1
        return float((1 - 1 / step) ** (ema_exponent(config.ema_std) + 1))
    halflife = config.ema_halflife_kimg * 1000
    if config.ema_rampup_ratio is not None:
        halflife = min(halflife, nimg * config.ema_rampup_ratio)
    return float(0.5 ** (config.batch / max(halflife, 1e-8)))


@lru_cache(maxsize=8)
def ema_exponent(std: float) -> float:
    """gamma of a power-function average, whose weights grow as a power of training time (Karras et al. 2024, EDM2).

    `std`, EDM2's sigma_rel, is the weights' deviation as a part of that time, below 0.288 or so (equal weights); gamma
    is the largest root of (gamma + 1) = std^2 (gamma + 2)^2 (gamma + 3) (eq. 3).
    """
    square = std**-2
    return float(np.roots([1, 7, 16 - square, 12 - square]).real.max())


def flat_gradients(parameters: list[torch.nn.Parameter]) -> Tensor:
    """Gives the parameters gradients that lie in one flat float32 buffer, which is returned.

    Its layout never changes and processes sum it in one exchange, so the order of additions is the same in every step
    and after every resume. (torch's DistributedDataParallel regroups its buckets after the first step; with three
    processes or more that alters the last bits of a resumed run.)
    """
    flat = torch.zeros(sum(p.numel() for p in parameters), device=parameters[0].device)
    for parameter, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        parameter.grad = part.view_as(parameter)
    return flat


def clip_gradient(flat: Tensor, limit: float) -> None:
    """Shortens the gradient to Euclidean length `limit` where it is longer, without waiting for the device."""
    flat.mul_((limit / torch.linalg.vector_norm(flat).clamp(min=limit)).clamp(max=1))
