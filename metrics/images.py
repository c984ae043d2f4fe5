"""Images of a data set, decoded by threads ahead of the device."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

CHUNK = 32  # images decoded by one task
AHEAD = 4  # batches being decoded while one is in use
THREADS = min(os.cpu_count() or 1, 8)


def read_images(dataset: Any, batches: Iterable[Sequence[int]]) -> Iterator[Tensor]:
    """For each batch of indices its images uint8 [n, C, H, W]. `dataset` must allow reading from any thread."""
    waiting: deque[list[Future[np.ndarray]]] = deque()

    def take() -> Tensor:
        return torch.from_numpy(np.concatenate([future.result() for future in waiting.popleft()]))

    with ThreadPoolExecutor(THREADS) as pool:
        try:
            for batch in batches:
                waiting.append([pool.submit(dataset.images, batch[i : i + CHUNK]) for i in range(0, len(batch), CHUNK)])
                if len(waiting) > AHEAD:
                    yield take()
            while waiting:
                yield take()
        finally:
            pool.shutdown(cancel_futures=True)
