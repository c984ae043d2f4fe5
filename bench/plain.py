"""The straightforward way to do each part of the work: eager, contiguous, fp32, parameter by parameter, PNG by PNG.

What `bench.run` measures this project against, and checks its results with: therefore it states the formulas of the ODE
once more, on purpose, and shares none with `training.solvers`.
"""

from __future__ import annotations

import contextlib
import io
import math
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import scipy.linalg
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from formats.network_files import load_network
from training import networks
from training.draws import StepDraws
from training.grids import NoiseGrid
from training.weighting import WEIGHTINGS


@contextlib.contextmanager
def plain_layers() -> Iterator[None]:
    """Networks resample by grouped convolutions, and attend by two matrix products with a softmax between."""

    def upsample(x: Tensor, kernel: Tensor, padding: int) -> Tensor:
        weight = 4 * kernel.repeat(x.shape[1], 1, 1, 1)
        return F.conv_transpose2d(x, weight, stride=2, padding=padding, groups=x.shape[1])

    def downsample(x: Tensor, kernel: Tensor, padding: int) -> Tensor:
        weight = kernel.repeat(x.shape[1], 1, 1, 1)
        return F.conv2d(x, weight, stride=2, padding=padding, groups=x.shape[1])

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        similarity = (q.float() @ k.float().transpose(-2, -1)) / math.sqrt(q.shape[-1])
        return F.softmax(similarity, dim=-1).to(v.dtype) @ v

    names = ("upsample", "downsample", "attend", "fused_norm")
    usual = [getattr(networks, name) for name in names]
    for name, way in zip(names, (upsample, downsample, attend, None), strict=True):
        setattr(networks, name, way)
    try:
        yield
    finally:
        for name, way in zip(names, usual, strict=True):
            setattr(networks, name, way)


class PlainTraining:
    """Training steps with the random numbers of this project's own, and EDM's arithmetic, one parameter at a time.

    teacher: for steps of distillation, a network in eval mode; then `grid`, `ratio`, `solver` and `weighting` count.
    """

    def __init__(
        self,
        net: Any,
        ema: Any,
        *,
        seed: int,
        batch: int,
        lr: float,
        ema_halflife: float,
        teacher: Any = None,
        grid: NoiseGrid | None = None,
        ratio: int = 2,
        solver: str = "heun",
        weighting: str = "geomean",
    ) -> None:
        self.net, self.ema, self.seed, self.batch, self.lr = net, ema, seed, batch, lr
        self.ema_halflife = ema_halflife
        self.teacher, self.grid, self.ratio, self.solver, self.weighting = teacher, grid, ratio, solver, weighting
        self.optimizer = torch.optim.Adam(net.parameters(), lr=lr, foreach=False, fused=False)
        self.step_count = 0
        self.device = next(net.parameters()).device

    def step(self, images: Tensor, labels: Tensor | None) -> float:
        """One step over uint8 images [N, C, H, W]; returns the mean loss."""
        draws = StepDraws(self.seed, self.step_count, self.batch, self.device)
        self.optimizer.zero_grad()
        clean = images.to(self.device).to(torch.float32) / 127.5 - 1
        source = draws.part(0, len(images))
        loss = self.denoising(clean, source) if self.teacher is None else self.distillation(clean, source)
        (loss.sum() / self.batch).backward()
        for parameter in self.net.parameters():
            if parameter.grad is not None:
                parameter.grad.nan_to_num_(0.0, 1e5, -1e5)
        self.optimizer.step()
        nimg = self.step_count * self.batch
        beta = 0.5 ** (self.batch / max(min(self.ema_halflife, nimg * 0.05), 1e-8))
        for average, parameter in zip(self.ema.parameters(), self.net.parameters(), strict=True):
            average.mul_(beta).add_(parameter.detach(), alpha=1 - beta)
        self.step_count += 1
        return float(loss.detach().mean())

    def denoising(self, clean: Tensor, source: Any) -> Tensor:
        sigma = (source.randn(len(clean), 1, 1, 1) * 1.2 - 1.2).exp()
        noisy = clean + source.randn(*clean.shape) * sigma
        return WEIGHTINGS["edm"](sigma, sigma, 0.5) * (self.net(noisy, sigma) - clean) ** 2

    def distillation(self, clean: Tensor, source: Any) -> Tensor:
        assert self.grid is not None
        interval = source.randint(self.grid.steps // self.ratio, len(clean))
        noise = source.randn(*clean.shape)
        levels = torch.tensor(self.grid.levels, dtype=torch.float64, device=self.device)
        t, s = (levels[interval * self.ratio + k][:, None, None, None] for k in (0, self.ratio))
        start = x = clean.double() + t * noise.double()
        with torch.no_grad():
            for k in range(self.ratio):
                a, b = (levels[interval * self.ratio + k + j][:, None, None, None] for j in (0, 1))
                slope = (x - self.teacher(x, a.flatten()).double()) / a
                ahead = x + (b - a) * slope
                if self.solver == "heun":
                    safe = b.clamp(min=levels[-2])
                    other = (ahead - self.teacher(ahead, safe.flatten()).double()) / safe
                    ahead = torch.where(b > 0, x + (b - a) * (slope + other) / 2, ahead)
                x = ahead
        target = (x - s / t * start) / (1 - s / t)
        weight = WEIGHTINGS[self.weighting](t, s, self.net.sigma_data)
        return weight.float() * (self.net(start, t.flatten()) - target.float()) ** 2


@torch.no_grad()
def sample(net: Any, seeds: Sequence[int], grid: NoiseGrid, solver: str, device: torch.device) -> Tensor:
    """A latent for every seed from a generator of its own, then the solver in float64."""
    shape = [net.img_channels, net.img_resolution, net.img_resolution]
    latents = [torch.randn(shape, generator=torch.Generator(device).manual_seed(seed), device=device) for seed in seeds]
    x = torch.stack(latents).double() * grid.levels[0]
    for t, s in zip(grid.levels, grid.levels[1:], strict=False):
        slope = (x - net(x, torch.as_tensor(t, device=device)).double()) / t
        ahead = x + (s - t) * slope
        if solver == "heun" and s > 0:
            ahead = x + (s - t) * (slope + (ahead - net(ahead, torch.as_tensor(s, device=device)).double()) / s) / 2
        x = ahead
    return x


def read_images(archive: Path, batch: int) -> Iterator[Tensor]:
    """All images of a zip by name, one after the other, in batches uint8 [n, C, H, W]."""
    with zipfile.ZipFile(archive) as file:
        names = sorted(name for name in file.namelist() if name.endswith(".png"))
        for start in range(0, len(names), batch):
            arrays = [
                np.array(Image.open(io.BytesIO(file.read(name)), formats=["PNG"]))
                for name in names[start : start + batch]
            ]
            stack = np.stack([array[:, :, None] if array.ndim == 2 else array for array in arrays])
            yield torch.from_numpy(stack.transpose(0, 3, 1, 2))


def generate(network: Path, folder: Path, count: int, device: torch.device, batch: int = 64) -> None:
    """Images of a student's file, one PNG after the other."""
    file = load_network(network)
    assert file.sampling is not None
    net = file.net.to(device)
    folder.mkdir(exist_ok=True)
    for start in range(0, count, batch):
        seeds = range(start, min(start + batch, count))
        images = sample(net, seeds, file.sampling.grid, file.sampling.solver, device)
        pixels = (images * 127.5 + 128).clip(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
        for seed, image in zip(seeds, pixels, strict=True):
            Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image).save(folder / f"{seed:06d}.png")


def measure(archive: Path, net: Any, mu: np.ndarray, sigma: np.ndarray, device: torch.device) -> float:
    """The distance of a zip's images to a reference: decode, features, sums, one batch after the other."""
    total, products, count = np.zeros_like(mu), np.zeros_like(sigma), 0
    for images in read_images(archive, 64):
        with torch.no_grad():
            features = net(images.to(device)).double().cpu().numpy()
        total, products = total + features.sum(axis=0), products + features.T @ features
        count += len(features)
    mean = total / count
    return frechet_distance(mean, (products - np.outer(mean, mean) * count) / (count - 1), mu, sigma)


def frechet_distance(mu1: np.ndarray, sigma1: np.ndarray, mu2: np.ndarray, sigma2: np.ndarray) -> float:
    """By the square root of the product of the covariances."""
    root = scipy.linalg.sqrtm(sigma1 @ sigma2)
    return float(np.real(np.square(mu1 - mu2).sum() + np.trace(sigma1 + sigma2 - 2 * root)))
