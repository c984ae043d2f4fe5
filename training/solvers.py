"""The steps of the probability-flow ODE dx/dsigma = (x - D(x; sigma)) / sigma.

The samplers and the distillation loss both call them, so that training and sampling cannot disagree. All functions are
pure; noise levels broadcast against images, and the caller chooses the precision (float64 for anything that lands in a
target: errors there are amplified by t / (t - s)).
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

Denoiser = Callable[[Tensor, Tensor], Tensor]
"""Maps x [N, C, H, W] and sigma (broadcastable to [N, 1, 1, 1]) to an estimate of the clean image, like x."""


def slope(x: Tensor, denoised: Tensor, t: Tensor) -> Tensor:
    """dx/dsigma at noise level t > 0: eq. 1 of Karras et al. 2022 with sigma(t) = t, s(t) = 1."""
    return (x - denoised) / t


def euler_jump(x: Tensor, denoised: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """From level t to s < t along the straight line through `denoised`; s = 0 lands on `denoised` exactly."""
    s_over_t = s / t
    return s_over_t * x + (1 - s_over_t) * denoised


def jump_target(x: Tensor, landing: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """The denoiser output that makes `euler_jump(x, ., t, s)` end at `landing`: its exact inverse in `denoised`."""
    s_over_t = s / t
    return (landing - s_over_t * x) / (1 - s_over_t)


def heun_step(denoise: Denoiser, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """One second-order step from t to s (Alg. 1 of the paper, without churn): two calls of `denoise`.

    Where s = 0 there is no second slope, and the Euler jump stands, as in the paper; this is decided image by image, so
    that a batch may mix intervals. A caller who knows that s is 0 for all images makes the Euler jump itself.
    """
    first = slope(x, denoise(x, t), t)
    guess = x + (s - t) * first
    level = torch.where(s > 0, s, t)  # any level will do where the second slope is not used
    second = slope(guess, denoise(guess, level), level)
    return x + (s - t) * torch.where(s > 0, (first + second) / 2, first)


def teacher_landing(denoise: Denoiser, x: Tensor, levels: Tensor, solver: str) -> Tensor:
    """Runs the teacher over its sub-steps: from x at levels[0] to x-hat at levels[-1].

    levels: [K + 1, N, 1, 1, 1], decreasing along the first axis, each image's own; only the last row may hold zeros.
    """
    for t, s in pairwise(levels):
        x = heun_step(denoise, x, t, s) if solver == "heun" else euler_jump(x, denoise(x, t), t, s)
    return x


def segment_landing(denoise: Denoiser, rest: Denoiser, x: Tensor, levels: Tensor, solver: str) -> Tensor:
    """One step of the teacher, then one Euler jump of the student's own average to the end of the segment.

    levels: [3, N, 1, 1, 1]: t, u, s of each image, t > u >= s. Where u = s the teacher's step alone arrives.
    """
    t, u, s = levels
    x = teacher_landing(denoise, x, levels[:2], solver)
    level = torch.where(u > s, u, t)  # any level will do where no jump is left
    return torch.where(u > s, euler_jump(x, rest(x, level), level, s), x)
