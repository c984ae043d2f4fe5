"""Notices whatever a stretch of code does besides computing: Python's own audit events, as PEP 578 raises them.

An audit hook can't be taken away again, so there is one for the process, which sleeps until somebody watches.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

HARMLESS = frozenset(
    [
        "builtins.id",  # these two: `inspect` looking at our own functions
        "object.__getattr__",
        "_thread.start_new_thread",  # these two: threads of our own code
        "_thread.start_joinable_thread",
        "mmap.__new__",  # a map of a file that must have been opened first
    ]
)
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

_events: list[str] | None = None
_readable = ""
_installed = False


def _hook(event: str, args: tuple[Any, ...]) -> None:
    if _events is None or event in HARMLESS:
        return
    if event == "open" and (args[0] == _readable or isinstance(args[0], int)) and not _writes(args[1], args[2]):
        return  # (a number is a file that is open already)
    shown = [str(arg)[:80] for arg in args if isinstance(arg, (str, bytes, int))]
    _events.append(" ".join([event, *shown]))


def _writes(mode: Any, flags: Any) -> bool:
    return bool(set(mode or "") & set("wax+")) or bool(isinstance(flags, int) and flags & WRITING)


@contextmanager
def watch(readable: str) -> Iterator[list[str]]:
    """Yields the list of events to come: code compiled or run, modules imported, processes, sockets, files opened or
    changed, and every other kind that Python reports. The one thing allowed is to read the file `readable`."""
    global _events, _readable, _installed
    if not _installed:
        sys.addaudithook(_hook)
        _installed = True
    events: list[str] = []
    _events, _readable = events, readable
    try:
        yield events
    finally:
        _events = None
