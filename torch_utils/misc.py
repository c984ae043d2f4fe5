"""Tensors in files that might be anything, on disks that might be full; and the arithmetic of float32 on CUDA."""

from __future__ import annotations

import contextlib
import signal
import threading
import warnings
from collections.abc import Iterator
from typing import IO, Any

import torch


def load_tensors(file: Any) -> Any:
    """`torch.load` of tensors and plain values alone, onto the CPU. Raises whatever it likes for any other content.

    file: path or open binary file.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about formats that it then refuses
        return torch.load(file, map_location="cpu", weights_only=True)


def save_tensors(value: Any, file: IO[bytes]) -> None:
    """`torch.save` that lets an OSError of the file through, instead of one of its own about a wrong position, and
    that a Ctrl-C finds finished: amid its C++ part an exception would abort the process."""
    with interrupts_wait():
        try:
            torch.save(value, file)
        except RuntimeError as exc:
            if isinstance(exc.__context__, OSError):
                raise exc.__context__ from None
            raise


@contextlib.contextmanager
def interrupts_wait() -> Iterator[None]:
    """SIGINT takes effect after the block. In other threads than the main one, which gets the signals, does nothing."""
    usual = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(usual):
        yield
        return
    came: list[Any] = []
    signal.signal(signal.SIGINT, lambda *what: came.append(what))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, usual)
        if came:
            usual(*came[0])


def allow_tf32(allowed: bool) -> None:
    """Whether float32 products and convolutions on CUDA may be rounded to TF32, process-wide. Torch's own default lets
    convolutions: figures and images that are to be fp32 call this first."""
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    torch.backends.cudnn.allow_tf32 = allowed
