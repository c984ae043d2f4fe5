"""Images of a data set or of an npz of samples, decoded by threads ahead of the device."""

from __future__ import annotations

import math
import os
import struct
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dnnlib.errors import UserError
from dnnlib.util import open_file
from training.dataset import Dataset, ImageFolderDataset
from training.loader import read_ahead

AHEAD = 5  # batches being decoded
THREADS = min(os.cpu_count() or 1, 8)


def read_images(dataset: Any, batches: Iterable[Sequence[int]]) -> Iterator[Tensor]:
    """For each batch of indices its images uint8 [n, C, H, W]. `dataset` must allow reading from any thread."""
    for parts in read_ahead(dataset.images, batches, THREADS, AHEAD):
        yield torch.from_numpy(np.concatenate(parts))


def open_images(path: str | os.PathLike[str], *, max_size: int | None = None, random_seed: int = 0) -> Dataset:
    """The images of a folder, a zip, or an npz of samples (guided-diffusion's `arr_0`, uint8 [N, H, W, C])."""
    kind = SampleArray if os.fspath(path).lower().endswith(".npz") and os.path.isfile(path) else ImageFolderDataset
    return kind(path=os.fspath(path), max_size=max_size, random_seed=random_seed)


class SampleArray(Dataset):
    """The samples of an npz file, mapped into memory. Raises UserError for a file that holds none."""

    def __init__(self, path: str, max_size: int | None = None, random_seed: int = 0) -> None:
        try:
            self.pixels = _map_samples(path)
        except Exception as exc:  # damage shows in many ways: BadZipFile, KeyError, ValueError, struct.error
            raise UserError(
                f"{path}: not an npz of samples ({exc}); those are an uncompressed uint8 array arr_0 of shape "
                "[images, height, width, 1 or 3]"
            ) from exc
        num, height, width, channels = self.pixels.shape
        super().__init__(path, [num, channels, height, width], max_size=max_size, random_seed=random_seed)

    def _load_raw_images(self, raw_indices: list[int]) -> np.ndarray:
        return np.ascontiguousarray(self.pixels[raw_indices].transpose(0, 3, 1, 2))


def _map_samples(path: str) -> np.ndarray:
    with open_file(path) as file:
        with zipfile.ZipFile(file) as archive:
            info = archive.getinfo("arr_0.npy")
            with archive.open(info) as member:
                version = np.lib.format.read_magic(member)
                read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
                shape, by_column, dtype = read(member)
                begin = member.tell()
        is_plain = not (info.compress_type or by_column) and begin + math.prod(shape) == info.file_size
        if not is_plain or dtype != np.uint8 or len(shape) != 4 or shape[3] not in (1, 3) or 0 in shape:
            raise ValueError(f"arr_0 is {'compressed ' * bool(info.compress_type)}{dtype} {list(shape)}")
        file.seek(info.header_offset + 26)
        begin += info.header_offset + 30 + sum(struct.unpack("<HH", file.read(4)))  # name and extra field lie between
        return np.memmap(file, np.uint8, "r", begin, shape)
