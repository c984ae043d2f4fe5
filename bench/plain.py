"""The straightforward way to do each part of the work: eager, contiguous, fp32, parameter by parameter.

What `bench.run` measures this project against, and checks its results with: therefore it states the formulas of the ODE
once more, on purpose, and shares none with `training.solvers`.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from training import networks
from training.draws import StepDraws
from training.grids import NoiseGrid
from training.weighting import WEIGHTINGS


@contextlib.contextmanager
def plain_layers() -> Iterator[None]:
    """Networks resample by grouped convolutions, and attend by two matrix products with a softmax between."""

    def resample(convolve: Any, gain: float, x: Tensor, kernel: Tensor, padding: int) -> Tensor:
        weight = gain * kernel.repeat(x.shape[1], 1, 1, 1)
        return convolve(x, weight, stride=2, padding=padding, groups=x.shape[1])

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        similarity = (q.float() @ k.float().transpose(-2, -1)) / math.sqrt(q.shape[-1])
        return F.softmax(similarity, dim=-1).to(v.dtype) @ v

    up, down = partial(resample, F.conv_transpose2d, 4), partial(resample, F.conv2d, 1)
    ways = {"upsample": up, "downsample": down, "attend": attend}
    usual = {name: getattr(networks, name) for name in ways}
    vars(networks).update(ways)
    try:
        yield
    finally:
        vars(networks).update(usual)


def ode_step(net: Any, x: Tensor, t: Tensor, s: Tensor, solver: str) -> Tensor:
    """From t to s, both [N, 1, 1, 1], in float64: Euler's step, or Heun's where s > 0."""
    slope = (x - net(x, t.flatten()).double()) / t
    ahead = x + (s - t) * slope
    if solver == "heun":
        safe = torch.where(s > 0, s, t)
        other = (ahead - net(ahead, safe.flatten()).double()) / safe
        ahead = torch.where(s > 0, x + (s - t) * (slope + other) / 2, ahead)
    return ahead


@dataclass
class PlainTraining:
    """Training steps with this project's random numbers (seed 0), and EDM's arithmetic, one parameter at a time.

    teacher, grid, solver: for steps of distillation, in which two steps become one; teacher in eval mode.
    """

    net: Any
    ema: Any
    batch: int
    lr: float
    teacher: Any = None
    grid: NoiseGrid | None = None
    solver: str = "heun"
    step_count: int = 0

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.Adam(self.net.parameters(), lr=self.lr, foreach=False, fused=False)
        self.device = next(self.net.parameters()).device

    def step(self, images: Tensor) -> float:
        """One step over uint8 images [N, C, H, W]; returns the mean loss."""
        source = StepDraws(0, self.step_count, self.batch, self.device).part(0, len(images))
        self.optimizer.zero_grad()
        clean = images.to(self.device).to(torch.float32) / 127.5 - 1
        loss = self.denoising(clean, source) if self.grid is None else self.distillation(clean, source, self.grid)
        (loss.sum() / self.batch).backward()
        for parameter in self.net.parameters():
            if parameter.grad is not None:
                parameter.grad.nan_to_num_(0.0, 1e5, -1e5)
        self.optimizer.step()
        beta = 0.5 ** (self.batch / max(min(500e3, self.step_count * self.batch * 0.05), 1e-8))
        for average, parameter in zip(self.ema.parameters(), self.net.parameters(), strict=True):
            average.mul_(beta).add_(parameter.detach(), alpha=1 - beta)
        self.step_count += 1
        return float(loss.detach().mean())

    def denoising(self, clean: Tensor, source: Any) -> Tensor:
        sigma = (source.randn(len(clean), 1, 1, 1) * 1.2 - 1.2).exp()
        noisy = clean + source.randn(*clean.shape) * sigma
        return WEIGHTINGS["edm"](sigma, sigma, 0.5) * (self.net(noisy, sigma) - clean) ** 2

    def distillation(self, clean: Tensor, source: Any, grid: NoiseGrid) -> Tensor:
        interval = source.randint(grid.steps // 2, len(clean))
        noise = source.randn(*clean.shape)
        levels = torch.tensor(grid.levels, dtype=torch.float64, device=self.device)
        t, u, s = (levels[interval * 2 + k][:, None, None, None] for k in range(3))
        start = clean.double() + t * noise.double()
        with torch.no_grad():
            landing = ode_step(self.teacher, ode_step(self.teacher, start, t, u, self.solver), u, s, self.solver)
        target = (landing - s / t * start) / (1 - s / t)
        weight = WEIGHTINGS["geomean"](t, s, self.net.sigma_data)
        return weight.float() * (self.net(start, t.flatten()) - target.float()) ** 2


@torch.no_grad()
def sample(net: Any, seeds: Sequence[int], grid: NoiseGrid, device: torch.device) -> Tensor:
    """A latent for every seed from a generator of its own, then Euler's steps in float64."""
    shape = [net.img_channels, net.img_resolution, net.img_resolution]
    latents = [torch.randn(shape, generator=torch.Generator(device).manual_seed(seed), device=device) for seed in seeds]
    levels = torch.tensor(grid.levels, dtype=torch.float64, device=device)[:, None, None, None, None]
    x = torch.stack(latents).double() * levels[0]
    for t, s in pairwise(levels):
        x = ode_step(net, x, t, s, "euler")
    return x
