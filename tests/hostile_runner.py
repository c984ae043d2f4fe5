"""Loads files one after the other in one process and says of each, in a line of JSON, what came of it.

    python hostile_runner.py load    WARM [WARM ...] < paths     as a user does: `example.py --network=PATH`
    python hostile_runner.py pickle  WARM [WARM ...] < paths     as nobody should: `pickle.load`

The WARM files are loaded first, so that all modules are there. Then, for each path of standard input: `status`,
`stderr`, `events` (see watch.py), `peak` and `limit` (bytes of memory above what the process had before; Linux only,
else null), `seconds` of the processor. The limit is enforced: beyond it, memory can't be had.
"""

from __future__ import annotations

import contextlib
import gc
import io
import json
import os
import pickle
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import example
from watch import watch

LINUX = sys.platform.startswith("linux")
if LINUX:
    import resource


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


def attempt(load: Callable[[str], int], path: str) -> dict[str, object]:
    """Loads one file under watch and within 3 times its size and 200 MB."""
    gc.collect()
    size = os.path.getsize(path)
    err, out = io.StringIO(), io.StringIO()
    start = time.process_time()
    with limited(3 * size + 200_000_000) as use, contextlib.redirect_stderr(err), contextlib.redirect_stdout(out):
        try:
            with watch(path) as events:
                status: int | str = load(path)
        except BaseException as exc:
            status = f"{type(exc).__name__}: {str(exc)[:200]}"
    seconds = time.process_time() - start
    return {
        "path": path,
        "size": size,
        "status": status,
        "stderr": err.getvalue(),
        "stdout": out.getvalue(),
        "events": events[:20],
        "seconds": seconds,
        **use,
    }


def main() -> None:
    load = {"load": as_a_user, "pickle": naively}[sys.argv[1]]
    paths = sys.stdin.read().splitlines()
    for path in sys.argv[2:]:
        with contextlib.redirect_stderr(io.StringIO()):
            as_a_user(path)
    gc.collect()
    gc.freeze()
    for path in paths:
        print(json.dumps(attempt(load, path)), flush=True)


if __name__ == "__main__":
    main()
