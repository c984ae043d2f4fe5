"""Meets hostile input in one process, one call after the other, and says of each, in a line of JSON, what came of it.

    python hostile_runner.py load    WARM [WARM ...] < paths     `example.py --network=PATH`, as a user does
    python hostile_runner.py pickle  WARM [WARM ...] < paths     `pickle.load`, as nobody should
    python hostile_runner.py scripts < calls                     a call is a JSON list: a script's name, its arguments

What comes first (the WARM files, the first call) loads all modules. Then, for each line of standard input: `status`
("hangs" after SECONDS), `stdout`, `stderr`, `seconds` of the processor; for files also `path`, `events` (see watch.py),
`peak` and `limit` (bytes of memory above what the process had before; Linux only, else null). The limit is enforced:
beyond it, memory can't be had. For calls it is MEMORY, for all of them together.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import io
import json
import os
import pickle
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import example
from watch import watch

LINUX = sys.platform.startswith("linux")
MEMORY = 900_000_000
SECONDS = 60
if LINUX:
    import resource


class Hangs(BaseException):
    """Not to be taken for an error by anybody."""


def alarm(*_: Any) -> None:
    raise Hangs


def as_a_user(path: str) -> int:
    """Status of example.py. It would write its picture into a folder that doesn't exist."""
    return example.main([f"--network={path}", "--out=never/never.png", "--seeds=0", "--steps=1", "--device=cpu"])


def naively(path: str) -> int:
    """What the file does to Python's own unpickler, failures included (sys.exit too)."""
    try:
        with open(path, "rb") as file:
            pickle.load(file)
    except BaseException as exc:
        print(f"{type(exc).__name__}: {exc}", file=sys.stderr)
        return 1
    return 0


def memory(key: str) -> int:
    """A size of this process, in bytes: VmSize (addresses), VmRSS (memory), VmHWM (most memory so far)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(key)


@contextlib.contextmanager
def limited(size: int) -> Iterator[dict[str, int | None]]:
    """Lets the process have `size` bytes more at most; what it took at its peak is in the dict afterwards."""
    result: dict[str, int | None] = {"peak": None, "limit": size if LINUX else None}
    if not LINUX:
        yield result
        return
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
    before = memory("VmRSS")
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (memory("VmSize") + size, hard))
    try:
        yield result
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        result["peak"] = max(memory("VmHWM") - before, 0)


def attempt(call: Callable[[], object]) -> dict[str, Any]:
    """What came of a call."""
    gc.collect()
    out, err = io.StringIO(), io.StringIO()
    start = time.process_time()
    signal.alarm(SECONDS)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = call()
        except Hangs:
            status = "hangs"
        except BaseException as exc:
            status = f"{type(exc).__name__}: {str(exc)[:200]}"
    signal.alarm(0)
    seconds = time.process_time() - start
    return {"status": status, "stderr": err.getvalue(), "stdout": out.getvalue(), "seconds": seconds}


def meet_file(load: Callable[[str], int], path: str) -> dict[str, Any]:
    """Loads one file under watch and within 3 times its size and 200 MB."""
    with limited(3 * os.path.getsize(path) + 200_000_000) as use, watch(path) as events:
        result = attempt(lambda: load(path))
    return {"path": path, **result, "events": events[:20], **use}


def main() -> None:
    signal.signal(signal.SIGALRM, alarm)
    mode, *warm = sys.argv[1:]
    lines = sys.stdin.read().splitlines()
    if mode == "scripts":
        calls = [(importlib.import_module(script).main, args) for script, args in map(json.loads, lines)]
        attempt(lambda: calls[0][0](calls[0][1]))
        with limited(MEMORY):
            for script, args in calls:
                print(json.dumps(attempt(lambda script=script, args=args: script(args))), flush=True)
        return
    for path in warm:
        attempt(lambda path=path: as_a_user(path))
    gc.collect()
    gc.freeze()
    for path in lines:
        print(json.dumps(meet_file({"load": as_a_user, "pickle": naively}[mode], path)), flush=True)


if __name__ == "__main__":
    main()
