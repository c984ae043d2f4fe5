"""Whether the other processes of a job are alive, and waiting for them for as long as they are.

In a collective the processes wait for each other; where one is gone (killed, its machine lost) or stands still, the
rest may wait for a timeout, which has to be long. So every process counts up a number of its own in the job's store, in
a thread, and looks at that of the next one. Whoever's number stands still is given up, all are told, and the job ends.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from dnnlib import cli

GRACE = 5.0  # seconds for the main thread to meet the same failure, and to speak of it in its own words


def restarts() -> str:
    """How often the launcher has started this job again (torchrun's --max-restarts). Its store outlives the processes,
    so that what they say there must tell their starts apart."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")


@contextlib.contextmanager
def ending_with_launcher() -> Iterator[None]:
    """While the processes meet, which they do with torchrun's help: should it be killed, this process ends too, for no
    other sign would reach it for a long time."""
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.5):
            if _is_orphan() and not over.is_set():
                cli.print_error(os.path.basename(sys.argv[0]), "the launcher has ended; so this process ends")
                os._exit(1)

    if "TORCHELASTIC_RUN_ID" in os.environ:
        threading.Thread(target=watch, name="launcher", daemon=True).start()
    try:
        yield
    finally:
        over.set()


def _is_orphan() -> bool:
    """Whether the process that has started this one is gone, perhaps since before that was asked for."""
    if os.getppid() != cli.PARENT:
        return True
    if cli.PARENT != 1:
        return False
    try:  # in a container the launcher, a Python program by any name, may be the first process of all
        return b"python" not in (first := Path("/proc/1/cmdline").read_bytes()) and b"torch" not in first
    except OSError:
        return False


class Peers:
    """This process's place among `world_size`, from `join` to `leave` or `fail`.

    limit: seconds without a sign of life after which a process is given up. Those in which this process stood still
    itself don't count (a queue may suspend whole jobs).
    """

    def __init__(self, rank: int, world_size: int, limit: float) -> None:
        self.rank, self.world_size = rank, world_size
        self.interval = min(2.0, limit / 10)
        self.patience = limit / self.interval
        launched = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        self.hosts = rank == 0 and not launched  # the store ends with this process
        store = dist.TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=False,
            wait_for_workers=False,
            timeout=timedelta(seconds=30),
        )
        self.store = dist.PrefixStore(f"edm-distill/{restarts()}", store)
        self.meetings = 0
        self.over = threading.Event()
        threading.Thread(target=self._watch, name="peers", daemon=True).start()

    def meet(self) -> None:
        """Returns when every process has called this, however long that takes: the dead are noticed meanwhile."""
        self.meetings += 1
        name, pause = f"meeting/{self.meetings}", 0.001
        self.store.add(name, 1)
        while self.store.add(name, 0) < self.world_size:
            time.sleep(pause)
            pause = min(1.5 * pause, 0.2)
        if self.rank == 0:  # all are here, so all have left the one before
            self.store.delete_key(f"meeting/{self.meetings - 1}")

    def leave(self) -> None:
        """This process has done its work: it is not missed any more."""
        if self.over.is_set():
            return
        self.over.set()
        with contextlib.suppress(RuntimeError):  # the one that keeps the store has left already
            self.store.add(f"done/{self.rank}", 1)
            self.store.add("done", 1)
            end = time.monotonic() + GRACE
            while self.hosts and self.store.add("done", 0) < self.world_size and time.monotonic() < end:
                time.sleep(0.01)

    def fail(self, why: str) -> None:
        """This process ends with an error: all others are to end too."""
        if self.over.is_set():
            return
        self.over.set()
        with contextlib.suppress(RuntimeError):  # the one that keeps the store has left already
            self.store.set("failure", f"rank {self.rank} has failed: {why}")

    def _watch(self) -> None:
        watched, seen, still = (self.rank + 1) % self.world_size, 0, 0
        while not self.over.wait(self.interval):
            try:
                self.store.add(f"alive/{self.rank}", 1)
                now = self.store.add(f"alive/{watched}", 0)
                still = 0 if now != seen or self.store.add(f"done/{watched}", 0) else still + 1
                seen = now
                if still >= self.patience:
                    self.store.set(
                        "failure",
                        f"rank {watched} has given no sign of life for {still * self.interval:.0f} seconds "
                        "(killed, stopped, or its machine lost?)",
                    )
                why = self.store.get("failure").decode() if self.store.check(["failure"]) else None
            except RuntimeError:
                why = "the process that the others meet at (rank 0, or the launcher) has ended or can't be reached"
            if why is not None:
                if not self.over.wait(GRACE):
                    self._end(why)
                return

    def _end(self, why: str) -> None:
        """Ends this process, whose main thread may be waiting where nothing can reach it."""
        cli.print_error(os.path.basename(sys.argv[0]), f"{why}; so this process ends, and what was saved is intact")
        os._exit(1)
