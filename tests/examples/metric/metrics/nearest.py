"""How far generated images are from the nearest image of a data set: near 0 where a network has memorised it."""

from __future__ import annotations

import torch

from dnnlib.errors import UserError
from training.dataset import ImageFolderDataset


def nearest_rms(images: str, data: str, batch: int = 256) -> float:
    """Mean over `images` of the root mean square difference to the nearest image of `data`, in grey levels (0 to 255).

    Both are folders or zips of images of the same shape. Raises UserError where they are not.
    """
    ours, theirs = ImageFolderDataset(images), ImageFolderDataset(data)
    if ours.image_shape != theirs.image_shape:
        raise UserError(f"{images} holds images of shape {ours.image_shape}, {data} of {theirs.image_shape}")
    pixels = torch.from_numpy(ours.images(range(len(ours)))).flatten(1).double()
    nearest = torch.full([len(pixels)], torch.inf, dtype=torch.float64)
    for start in range(0, len(theirs), batch):
        part = torch.from_numpy(theirs.images(range(start, min(start + batch, len(theirs))))).flatten(1).double()
        nearest = torch.minimum(nearest, torch.cdist(pixels, part).amin(dim=1))
    return float((nearest / pixels.shape[1] ** 0.5).mean())
