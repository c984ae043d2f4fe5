"""Images read ahead by threads. Image number g of a run is a function of the seed and g alone.

So a resumed run reads what an uninterrupted one would have read, whatever the number of processes, of accumulation
rounds or of workers.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from itertools import count
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from .draws import key

T = TypeVar("T")
_CHUNK = 32  # images decoded by one task


def read_ahead(
    read: Callable[[Sequence[int]], T], batches: Iterable[Sequence[int]], threads: int, ahead: int
) -> Generator[list[T], None, None]:
    """For each batch of indices what `read` gives for its chunks, read by threads, `ahead` batches at a time.

    Whatever goes wrong while reading is raised by `next`. `close()` ends the threads.
    """
    waiting: deque[list[Future[T]]] = deque()
    with ThreadPoolExecutor(threads, thread_name_prefix="loader") as pool:
        try:
            for batch in batches:
                waiting.append([pool.submit(read, batch[i : i + _CHUNK]) for i in range(0, len(batch), _CHUNK)])
                if len(waiting) == ahead:
                    yield [future.result() for future in waiting.popleft()]
            while waiting:
                yield [future.result() for future in waiting.popleft()]
        finally:
            pool.shutdown(cancel_futures=True)


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
        pin: bool = False,
    ) -> None:
        self.dataset, self.pin = dataset, pin
        order, share = Order(len(dataset), seed), batch_size // world_size
        starts = count(step * batch_size + rank * share, batch_size)
        shares = (order.indices(start, start + share) for start in starts)
        self.chunks = read_ahead(self._read, shares, max(workers, 1), ahead=3)

    def __next__(self) -> Batch:
        images, labels = zip(*next(self.chunks), strict=True)
        batch = Batch(torch.from_numpy(np.concatenate(images)), torch.from_numpy(np.concatenate(labels)))
        return Batch(batch.images.pin_memory(), batch.labels.pin_memory()) if self.pin else batch

    def _read(self, indices: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        return self.dataset.images(indices), self.dataset.labels(indices)

    def close(self) -> None:
        self.chunks.close()
