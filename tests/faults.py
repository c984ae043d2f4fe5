"""Faults on purpose: one call among all those that put something on a disk fails, or the process dies before or after it.

    calls = enumerate_calls(save)                     # ["open", "write", ..., "fsync", "replace", ...]
    for at in range(len(calls)):
        with Faults(at, failing(errno.ENOSPC)):       # the call number `at` raises that OSError
            save()
        die_at(at, save, after=False)                 # in a process of its own: SIGKILL instead of that call

Counted are the calls of `os` that files are written with, and every write of a file opened by `os.fdopen`, as
dnnlib.atomic opens all of its own.
"""

import errno
import os
import signal
from collections.abc import Callable
from typing import Any

CALLS = ("open", "fsync", "chmod", "replace", "unlink")  # of os; and "write", "flush"
Fault = Callable[[Callable[[], Any]], Any]  # is given the call
ERRORS = (errno.ENOSPC, errno.EIO)


def failing(number: int) -> Fault:
    """Instead of the call, an OSError; a write gets half-way."""

    def fault(call: Callable[[], Any]) -> Any:
        if isinstance(call, Write):
            call.half()
        raise OSError(number, os.strerror(number))

    return fault


def dying(after: bool) -> Fault:
    """SIGKILL to this process, before or after the call."""

    def fault(call: Callable[[], Any]) -> Any:
        if after:
            call()
        os.kill(os.getpid(), signal.SIGKILL)

    return fault


class Write:
    """A pending write to a file."""

    def __init__(self, file: Any, data: Any) -> None:
        self.file, self.data = file, data

    def __call__(self) -> int:
        written: int = self.file.write(self.data)
        self.file.flush()  # or a killed process would take it along
        return written

    def half(self) -> None:
        data = memoryview(self.data).cast("B")
        self.file.write(data[: len(data) // 2])
        self.file.flush()


class Faults:
    """While entered, the call number `at` (0-based) meets `fault`; `calls` are the names of all so far."""

    def __init__(self, at: int = -1, fault: Fault | None = None) -> None:
        self.at, self.fault = at, fault
        self.calls: list[str] = []
        self.usual: dict[str, Any] = {}

    def __enter__(self) -> "Faults":
        self.usual = {name: getattr(os, name) for name in (*CALLS, "fdopen")}
        for name in CALLS:
            setattr(os, name, self.counted(name))
        os.fdopen = self.fdopen
        return self

    def __exit__(self, *exc: Any) -> None:
        for name, function in self.usual.items():
            setattr(os, name, function)

    def meet(self, name: str, call: Callable[[], Any]) -> Any:
        self.calls.append(name)
        if len(self.calls) - 1 == self.at:
            assert self.fault is not None
            return self.fault(call)
        return call()

    def counted(self, name: str) -> Callable[..., Any]:
        return lambda *args, **kwargs: self.meet(name, lambda: self.usual[name](*args, **kwargs))

    def fdopen(self, *args: Any, **kwargs: Any) -> "File":
        return File(self.usual["fdopen"](*args, **kwargs), self)


class File:
    """An open file whose writes and flushes are counted."""

    def __init__(self, file: Any, faults: Faults) -> None:
        self.file, self.faults = file, faults

    def write(self, data: Any) -> Any:
        return self.faults.meet("write", Write(self.file, data))

    def flush(self) -> Any:
        return self.faults.meet("flush", self.file.flush)

    def __enter__(self) -> "File":
        return self

    def __exit__(self, *exc: Any) -> None:
        self.file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


def enumerate_calls(action: Callable[[], Any]) -> list[str]:
    """The calls that `action` makes when nothing goes wrong."""
    with Faults() as faults:
        action()
    return faults.calls


def die_at(at: int, action: Callable[[], Any], after: bool) -> None:
    """Runs `action` in a process of its own, which is killed before or after its call number `at`."""
    child = os.fork()
    if child == 0:
        try:
            with Faults(at, dying(after)):
                action()
        finally:
            os._exit(0)  # never back into the tests
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, "it was to die"
