"""Batches by position: image number g of a run is a function of the seed and g alone.

So a resumed run reads what an uninterrupted one would have read, whatever the number of processes, of accumulation
rounds or of workers.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .draws import key

_CHUNK = 32  # images decoded by one task


class Batch(NamedTuple):
    """One process's share of a batch, on the CPU: uint8 [n, C, H, W] and float32 [n, label_dim]."""

    images: Tensor
    labels: Tensor


class Order:
    """The endless order of a data set: every epoch is a permutation of its own, keyed by (seed, epoch)."""

    def __init__(self, size: int, seed: int) -> None:
        self.size, self.seed = size, seed
        self._epoch = lru_cache(maxsize=2)(self._permutation)

    def _permutation(self, epoch: int) -> np.ndarray:
        generator = np.random.Generator(np.random.Philox(key(self.seed, epoch, "order")))
        return generator.permutation(self.size)

    def indices(self, start: int, stop: int) -> list[int]:
        """Indices of the images at global positions start ... stop - 1."""
        return [int(self._epoch(g // self.size)[g % self.size]) for g in range(start, stop)]


class Loader:
    """Yields this process's batches from step `step` on, read ahead by `workers` threads.

    dataset     gives `images(indices)` uint8 [n, C, H, W] and `labels(indices)` float32 [n, label_dim], in any thread
    batch_size  images of a step over all processes, a multiple of `world_size`
    pin         put batches into memory that a GPU fetches from by itself while the program runs
    Whatever goes wrong while reading is raised by `next`.
    """

    def __init__(
        self,
        dataset: Any,
        *,
        seed: int,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        step: int = 0,
        workers: int = 1,
        ahead: int = 3,
        pin: bool = False,
    ) -> None:
        self.dataset, self.order = dataset, Order(len(dataset), seed)
        self.batch_size, self.rank, self.world_size = batch_size, rank, world_size
        self.step, self.ahead, self.pin = step, ahead, pin
        self.pool = ThreadPoolExecutor(max(workers, 1), thread_name_prefix="loader")
        self.waiting: deque[list[Future[tuple[np.ndarray, np.ndarray]]]] = deque()

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        while len(self.waiting) < self.ahead:
            self.waiting.append(self._submit(self.step + len(self.waiting)))
        images, labels = zip(*(future.result() for future in self.waiting.popleft()), strict=True)
        self.step += 1
        batch = Batch(torch.from_numpy(np.concatenate(images)), torch.from_numpy(np.concatenate(labels)))
        return Batch(batch.images.pin_memory(), batch.labels.pin_memory()) if self.pin else batch

    def _submit(self, step: int) -> list[Future[tuple[np.ndarray, np.ndarray]]]:
        share = self.batch_size // self.world_size
        start = step * self.batch_size + self.rank * share
        indices = self.order.indices(start, start + share)
        return [self.pool.submit(self._read, indices[i : i + _CHUNK]) for i in range(0, len(indices), _CHUNK)]

    def _read(self, indices: list[int]) -> tuple[np.ndarray, np.ndarray]:
        return self.dataset.images(indices), self.dataset.labels(indices)

    def close(self) -> None:
        self.pool.shutdown(wait=True, cancel_futures=True)
        self.waiting.clear()
