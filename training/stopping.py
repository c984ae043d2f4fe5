"""Ending a run when the machine is wanted back: SIGTERM, SIGUSR1 (Slurm's early warning), SIGHUP and Ctrl-C.

The step in hand is finished, the state written, and the same command goes on from there to the same result. Processes
of one run may get the signal at different moments, or only one of them: they agree after every step.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

from torch_utils import distributed as dist

SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP") if hasattr(signal, name))


class StopSignals:
    """While this is entered, the first signal is only noted; a second Ctrl-C stops at once.

    A signal that the process was started to ignore (nohup, a shell's background job) stays ignored. Only a process's
    main thread gets signals: elsewhere this notes nothing.
    """

    def __init__(self) -> None:
        self.noted = 0
        self.usual: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            obeyed = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
            self.usual = {number: signal.signal(number, self.note) for number in obeyed}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, where: TracebackType | None
    ) -> None:
        for number, handler in self.usual.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)

    def note(self, number: int, frame: FrameType | None) -> None:
        if self.noted and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.noted = self.noted or number

    def agreed(self) -> int:
        """The signal that any process has noted, on all of them; 0 for none. To be called by all, after every step."""
        return dist.agree_on_largest(self.noted)
