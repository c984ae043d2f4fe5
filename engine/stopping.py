"""Ending when the machine is wanted back: SIGTERM, SIGUSR1 (Slurm's early warning), SIGHUP and Ctrl-C.

In training (`StopSignals`) the step in hand is finished, the state written, and the same command resumes from there to
the same result. Processes of one run may get the signal at different moments, or only one of them: they agree after
every step. Work that keeps what is finished as it goes (`stopping_at_once`) ends where it is, and prints how to resume.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

from dnnlib.cli import Interrupted
from torch_utils import distributed as dist

SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP") if hasattr(signal, name))


class StopSignals:
    """While this is entered, the first signal is noted, with a line on standard error; a second Ctrl-C stops at once.

    The line comes from a thread, since Python calls handlers only between two operations of a step. A signal that the
    process was started to ignore (nohup, a shell's background job) stays ignored. Only a process's main thread gets
    signals: elsewhere this notes nothing.
    """

    def __init__(self) -> None:
        self.noted = 0
        self.usual: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        self.usual = _set_handlers(self.note)
        if self.usual:
            self.numbers, numbers = socket.socketpair()
            self.numbers.setblocking(False)
            self.wakeup = signal.set_wakeup_fd(self.numbers.fileno(), warn_on_full_buffer=False)
            self.thread = threading.Thread(target=self.announce, args=[numbers], daemon=True)
            self.thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, where: TracebackType | None
    ) -> None:
        if self.usual:
            signal.set_wakeup_fd(self.wakeup)
            self.numbers.close()
            self.thread.join()
        _restore_handlers(self.usual)

    def announce(self, numbers: socket.socket) -> None:
        """Prints a line for the first signal, by the numbers that the system's handler writes at once."""
        with numbers:
            number = next((byte for byte in iter(lambda: numbers.recv(1), b"") if byte[0] in self.usual), b"")
        if number and dist.is_main():
            name = signal.Signals(number[0]).name
            os.write(2, f"{name}: finishing this step, then saving; Ctrl-C again stops at once\n".encode())

    def note(self, number: int, frame: FrameType | None) -> None:
        if self.noted and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.noted = self.noted or number

    def agreed(self) -> int:
        """The signal that any process has noted, on all of them; 0 for none. To be called by all, after every step."""
        return dist.agree_on_largest(self.noted)


@contextmanager
def stopping_at_once(advice: str) -> Iterator[None]:
    """Within this the first signal raises Interrupted, with `advice` on rank 0. Of further ones only a Ctrl-C does
    anything: it ends what tidying up there is. `StopSignals` within it has its own way."""
    stopped = False

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal stopped
        if stopped and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not stopped:
            stopped = True
            text = f"interrupted by {signal.Signals(number).name}"
            raise Interrupted(number, f"{text}; {advice}" if dist.is_main() else text)

    usual = _set_handlers(stop)
    try:
        yield
    finally:
        _restore_handlers(usual)


def _set_handlers(handler: Callable[[int, FrameType | None], None]) -> dict[int, Any]:
    """The handlers that were there, by signal."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    obeyed = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    return {number: signal.signal(number, handler) for number in obeyed}


def _restore_handlers(handlers: dict[int, Any]) -> None:
    for number, handler in handlers.items():
        signal.signal(number, handler if handler is not None else signal.SIG_DFL)
