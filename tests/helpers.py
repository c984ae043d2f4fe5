"""Shared by the tests: golden numbers, denoisers with a closed form, small networks and data sets."""

from __future__ import annotations

import io
import json
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

GOLDEN = Path(__file__).parent / "golden"


def golden(name: str) -> Any:
    """A golden npz file as a dict of arrays."""
    with np.load(GOLDEN / name) as data:
        return dict(data)


def recipe_weights(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """Golden weights: section 2 of the golden README (names and seeds make the numbers)."""
    rng = np.random.RandomState((zlib.crc32(name.encode()) + 7919 * seed) % 2**32)
    z = rng.standard_normal(shape)
    if len(shape) >= 2:
        z = z / np.sqrt(np.prod(shape[1:]))
    elif name.endswith(".weight"):
        z = 1 + 0.2 * z
    elif name.endswith("freqs"):
        z = 16 * z
    else:
        z = 0.2 * z
    return torch.from_numpy(z.astype(np.float16).astype(np.float32))


def load_recipe(net: torch.nn.Module, seed: int) -> None:
    """Fills a network with golden weights."""
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            parameter.copy_(recipe_weights(name, tuple(parameter.shape), seed))
        for name, buffer in net.named_buffers():
            if name.endswith("freqs"):
                buffer.copy_(recipe_weights(name, tuple(buffer.shape), seed))


class GaussianDenoiser(torch.nn.Module):
    """The ideal denoiser of data N(mean, var) per pixel, in float64: D = (var x + sigma^2 mean) / (var + sigma^2)."""

    sigma_min, sigma_max = 0.0, float("inf")
    label_dim = 0

    def __init__(self, mean: Tensor, var: Tensor) -> None:
        super().__init__()
        self.mean, self.var = mean.double(), var.double()
        self.img_channels, self.img_resolution = mean.shape[0], mean.shape[-1]
        self.calls = 0

    def forward(self, x: Tensor, sigma: Tensor, class_labels: Any = None, **_: Any) -> Tensor:
        self.calls += 1
        sigma = torch.as_tensor(sigma, dtype=torch.float64).reshape(-1, 1, 1, 1)
        return (self.var * x.double() + sigma**2 * self.mean) / (self.var + sigma**2)

    def round_sigma(self, sigma: Any) -> Tensor:
        return torch.as_tensor(sigma)

    def decay(self, t: float, s: float, solver: str) -> Tensor:
        """Factor by which one step from t to s shrinks x - mean. From dx/dsigma = sigma (x - mean) / (var + sigma^2):
        written out for this problem, independently of training.solvers."""
        k_t, h = t / (self.var + t**2), s - t
        euler = 1 + h * k_t
        if solver == "euler" or s == 0:
            return euler
        return 1 + h / 2 * (k_t + s / (self.var + s**2) * euler)


def gaussian(channels: int = 2, size: int = 4, seed: int = 0) -> GaussianDenoiser:
    rng = torch.Generator().manual_seed(seed)
    shape = (channels, size, size)
    mean = torch.randn(shape, generator=rng, dtype=torch.float64) * 0.3
    return GaussianDenoiser(mean, 0.05 + torch.rand(shape, generator=rng, dtype=torch.float64))


def small_network(
    resolution: int = 8, channels: int = 1, label_dim: int = 0, cls: str = "EDMPrecond", **kwargs: Any
) -> Any:
    """A SongUNet of a few thousand weights, freshly initialised with a fixed seed."""
    from training import networks

    torch.manual_seed(0)
    settings = {
        "model_type": "SongUNet",
        "model_channels": 16,
        "channel_mult": [1, 2],
        "num_blocks": 1,
        "attn_resolutions": [4],
        "dropout": 0.0,
    }
    return getattr(networks, cls)(resolution, channels, label_dim, **{**settings, **kwargs})


def make_dataset(
    path: Path, count: int = 32, size: int = 8, channels: int = 1, classes: int | None = 4, seed: int = 0
) -> Path:
    """A zip of PNGs: smooth random blobs, and labels i % classes (no labels with classes=None)."""
    rng = np.random.default_rng(seed)
    labels = []
    with zipfile.ZipFile(path, "w") as archive:
        for index in range(count):
            small = rng.integers(0, 256, [max(size // 4, 2), max(size // 4, 2), 3], dtype=np.uint8)
            image = Image.fromarray(small).resize((size, size), Image.Resampling.BILINEAR)
            buffer = io.BytesIO()
            (image if channels == 3 else image.convert("L")).save(buffer, format="PNG")
            name = f"00000/img{index:08d}.png"
            archive.writestr(name, buffer.getvalue())
            labels.append([name, index % (classes or 1)])
        archive.writestr("dataset.json", json.dumps({"labels": labels if classes else None}))
    return path
