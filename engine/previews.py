"""Pictures in the course of training: samples, and what every jump of a student is asked for and answers."""

from __future__ import annotations

import math
from pathlib import Path

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
    count, ema, device = MAX_SAMPLES if trainer.device.type == "cuda" else 16, trainer.ema, trainer.device
    generator = torch.Generator().manual_seed(key(trainer.config.seed, 0, "samples"))
    shape = [count, ema.img_channels, ema.img_resolution, ema.img_resolution]
    latents = torch.randn(shape, generator=generator).to(device)
    labels = None
    if trainer.dataset.has_label_vectors:  # of images from everywhere in the data set
        chosen = [i * len(trainer.dataset) // count for i in range(count)]
        labels = torch.from_numpy(trainer.dataset.labels(chosen)).to(device)
    elif ema.label_dim:
        labels = torch.eye(ema.label_dim, device=device)[torch.arange(count) % ema.label_dim]
    if trainer.stage is not None:
        images = grid_sampler(ema, latents, trainer.stage.sampling.grid.levels, class_labels=labels)
    else:
        images = edm_sampler(ema, latents, labels)
    pictures.save_png(path, pictures.tile(pictures.to_uint8(images), columns=math.isqrt(count), gap=2))


@torch.no_grad()
def save_targets(trainer: Trainer, path: Path) -> None:
    """Noisy input, the teacher's target and the student's answer, for each jump of a student."""
    chosen, device = spread(len(trainer.dataset), TARGET_IMAGES), trainer.device  # classes lie one after another
    clean = torch.from_numpy(trainer.dataset.images(chosen)).to(device).float() / 127.5 - 1
    labels = torch.from_numpy(trainer.dataset.labels(chosen)).to(device) if trainer.dataset.has_labels else None
    generator = torch.Generator().manual_seed(key(trainer.config.seed, 0, "targets"))
    noise = torch.randn(clean.shape, generator=generator).to(device)
    rows, names = [], []
    for start in spread(len(trainer.loss_fn.starts), MAX_ROWS):
        jump = trainer.loss_fn.jumps(clean, torch.full([len(chosen)], start, device=device), noise, labels)
        answer = trainer.ema(jump.x, jump.t.flatten(), labels)
        shown = jump.x / (1 + jump.t**2).sqrt()  # the noisy image at a scale that can be looked at
        rows.append(torch.cat([pictures.to_uint8(x) for x in (shown, jump.target, answer)]))
        names.append(f"{float(jump.t[0]):.4g} -> {float(jump.s[0]):.4g}")
    headings = ["noisy input (scaled)", trainer.loss_fn.target_name, "student's answer"]
    title = f"Every jump of the student after {trainer.nimg / 1000:g} kimg, by its noise levels"
    pictures.save_png(path, pictures.labelled_rows(rows, names, title, headings))


def spread(count: int, most: int) -> list[int]:
    """All of 0 ... count - 1, or `most` of them from the first to the last."""
    return [round(i * (count - 1) / (most - 1)) for i in range(most)] if count > most else list(range(count))
