"""Pictures in the course of training: samples, and what every jump of a student is asked for and answers."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch

from training import pictures
from training.draws import key
from training.samplers import edm_sampler, grid_sampler
from training.training_loop import Trainer

MAX_ROWS = 64  # of a sheet of targets
TARGET_IMAGES = 4
TARGET_COLUMNS = 3 * TARGET_IMAGES  # input, target and answer
MAX_SAMPLES = 64  # in a picture of samples


@torch.no_grad()
def save_samples(trainer: Trainer, path: Path) -> None:
    """Images of the average network: the same latents and labels in every picture of a run."""
    count = MAX_SAMPLES if trainer.device.type == "cuda" else 16
    generator = torch.Generator().manual_seed(key(trainer.config.seed, 0, "samples"))
    shape = [count, trainer.ema.img_channels, trainer.ema.img_resolution, trainer.ema.img_resolution]
    latents = torch.randn(shape, generator=generator).to(trainer.device)
    labels = None
    if trainer.ema.label_dim:
        labels = torch.eye(trainer.ema.label_dim, device=trainer.device)[torch.arange(count) % trainer.ema.label_dim]
    if trainer.dataset.has_label_vectors:  # of images from everywhere in the data set
        chosen = [i * len(trainer.dataset) // count for i in range(count)]
        labels = torch.from_numpy(trainer.dataset.labels(chosen)).to(trainer.device)
    if trainer.stage is not None:
        images = grid_sampler(trainer.ema, latents, trainer.stage.sampling.grid.levels, class_labels=labels)
    else:
        images = edm_sampler(trainer.ema, latents, labels)
    picture = pictures.tile(pictures.to_uint8(images), columns=math.isqrt(count), gap=2)
    pictures.save_png(path, picture)


@torch.no_grad()
def save_targets(trainer: Trainer, path: Path) -> None:
    """Noisy input, the teacher's target and the student's answer, for each jump of a student."""
    items = [trainer.dataset[i] for i in spread(len(trainer.dataset), TARGET_IMAGES)]  # classes lie one after another
    count = len(items)
    clean = torch.from_numpy(np.stack([image for image, _ in items])).to(trainer.device).float() / 127.5 - 1
    labels = None
    if trainer.dataset.has_labels:
        labels = torch.from_numpy(np.stack([label for _, label in items])).to(trainer.device)
    generator = torch.Generator().manual_seed(key(trainer.config.seed, 0, "targets"))
    noise = torch.randn(clean.shape, generator=generator).to(trainer.device)
    rows, names = [], []
    for start in spread(len(trainer.loss_fn.starts), MAX_ROWS):
        interval = torch.full([count], start, device=trainer.device)
        jump = trainer.loss_fn.jumps(clean, interval, noise, labels)
        t, s = float(jump.t[0]), float(jump.s[0])
        answer = trainer.ema(jump.x, jump.t.flatten(), labels)
        shown = jump.x / (1 + jump.t**2).sqrt()  # the noisy image at a scale that can be looked at
        rows.append(torch.cat([pictures.to_uint8(x) for x in (shown, jump.target, answer)]))
        names.append(f"{t:.4g} -> {s:.4g}")
    headings = ["noisy input (scaled)", trainer.loss_fn.target_name, "student's answer"]
    title = f"Every jump of the student after {trainer.nimg / 1000:g} kimg, by its noise levels"
    sheet = pictures.labelled_rows(rows, names, title, headings)
    pictures.save_png(path, sheet)


def spread(count: int, most: int) -> list[int]:
    """All of 0 ... count - 1, or `most` of them from the first to the last."""
    return [round(i * (count - 1) / (most - 1)) for i in range(most)] if count > most else list(range(count))
