"""Bars for people in front of a terminal. Files and pipes get plain lines instead: a bar is never written to either."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, TypeVar

from tqdm import tqdm

from dnnlib.util import format_time
from torch_utils import distributed as dist

T = TypeVar("T")
LOG_EVERY = 10.0  # seconds between lines of progress where there is no terminal for a bar


def training_bar(title: str, done: int, total: int) -> Any:
    """A tqdm bar over images of which `done` are behind us: images a second, time left, and what a tick sets besides.

    The status lines go to standard output, so both streams must be terminals, or lines and bar would mix.
    """
    shown = dist.is_main() and sys.stderr.isatty() and sys.stdout.isatty()
    bar: Any = partial(tqdm, unit="img", unit_scale=True, dynamic_ncols=True, smoothing=0.05, leave=False)
    return bar(total=total, initial=done, desc=title, disable=not shown)


def show_progress(
    batches: Iterable[T], size: Callable[[T], int], total: int, log: Callable[[str], None], title: str | None = None
) -> Iterator[T]:
    """Passes this process's batches on; rank 0 shows how far all processes are, of `total` images.

    size: images in a batch. The other processes are taken to be as far as this one. A bar on a terminal, with `title`
    before it; elsewhere `log` gets a line every ten seconds.
    """
    on_terminal = dist.is_main() and sys.stderr.isatty()
    start = logged = time.monotonic()
    done = 0
    with tqdm(total=total, desc=title, unit="img", dynamic_ncols=True, leave=False, disable=not on_terminal) as bar:
        for batch in batches:
            yield batch
            made = min(size(batch) * dist.get_world_size(), total - done)
            done += made
            bar.update(made)
            now = time.monotonic()
            if now - logged >= LOG_EVERY and done < total and not on_terminal:
                logged = now
                log(f"  {done} of {total} images, {format_time((now - start) / done * (total - done))} to go")
