"""Ending when the machine is wanted back: SIGTERM, SIGUSR1 (Slurm's early warning), SIGHUP and Ctrl-C.

In training (`noting_signals`) the step is finished, the state written, and the same command resumes from there to
the same result. Processes of one run may get the signal at different moments, or only one of them: they agree after
every step. Work that keeps what is finished (`stopping_at_once`) ends where it is, and prints how to resume.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from dnnlib.cli import Interrupted
from torch_utils import distributed as dist

SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP") if hasattr(signal, name))


@contextmanager
def first_signal(act: Callable[[signal.Signals], None]) -> Iterator[None]:
    """Within this `act` is called at the first signal; of further ones only a Ctrl-C does anything: it stops at once.

    A signal that the process was started to ignore (nohup, a shell's background job) stays ignored. Only a process's
    main thread gets signals: elsewhere nothing happens.
    """
    came = False

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal came
        if came and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not came:
            came = True
            act(signal.Signals(number))

    main = threading.current_thread() is threading.main_thread()
    obeyed = [number for number in SIGNALS if main and signal.getsignal(number) is not signal.SIG_IGN]
    usual = {number: signal.signal(number, handle) for number in obeyed}
    try:
        yield
    finally:
        for number, handler in usual.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)


@contextmanager
def noting_signals() -> Iterator[Callable[[], int]]:
    """Within this the first signal is noted, with a line on standard error.

    Yields a function for all processes to call after every step: the signal that any of them has noted, 0 for none.
    """
    noted = [0]

    def note(number: signal.Signals) -> None:
        noted.append(int(number))
        if dist.is_main():
            os.write(2, f"{number.name}: finishing this step, then saving; Ctrl-C again stops at once\n".encode())

    with first_signal(note):
        yield lambda: dist.agree_on_largest(noted[-1])


@contextmanager
def stopping_at_once(advice: str) -> Iterator[None]:
    """Within this the first signal raises Interrupted, with `advice` on rank 0; a Ctrl-C after it ends what tidying up
    there is."""

    def stop(number: signal.Signals) -> None:
        raise Interrupted(number, f"interrupted by {number.name}{f'; {advice}' * dist.is_main()}")

    with first_signal(stop):
        yield
