"""Images of a data set, decoded by threads ahead of the device."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

THREADS = 4
AHEAD = 4  # batches being decoded while one is in use


def read_images(dataset: Any, batches: Iterable[Sequence[int]]) -> Iterator[Tensor]:
    """For each batch of indices its images uint8 [n, C, H, W]. `dataset` must allow reading from any thread."""
    waiting: deque[list[Future[np.ndarray]]] = deque()

    def take() -> Tensor:
        return torch.from_numpy(np.stack([future.result() for future in waiting.popleft()]))

    with ThreadPoolExecutor(THREADS) as pool:
        try:
            for batch in batches:
                waiting.append([pool.submit(lambda i: dataset[i][0], int(i)) for i in batch])
                if len(waiting) > AHEAD:
                    yield take()
            while waiting:
                yield take()
        finally:
            pool.shutdown(cancel_futures=True)
