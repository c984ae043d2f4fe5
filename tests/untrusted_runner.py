"""Calls scripts one after the other in one process and says of each call, in a line of JSON, what came of it.

    python untrusted_runner.py < calls

A call is a line of JSON: a list of the script's name and its arguments. Of each: `status`, `stderr`, `seconds`. On Linux
the process may take `MEMORY` bytes more than it has after loading everything; beyond that, memory can't be had. What
takes longer than `SECONDS` is ended, and its status is "hangs".
"""

from __future__ import annotations

import contextlib
import gc
import io
import json
import signal
import sys
import time
from pathlib import Path
from types import FrameType

sys.path.insert(0, str(Path(__file__).parent.parent))

import dataset_tool
import distill
import example
import fid
import generate
import train
from hostile_runner import LINUX, limited

MEMORY = 900_000_000
SECONDS = 15
SCRIPTS = {module.__name__: module for module in (dataset_tool, distill, example, fid, generate, train)}


class Hangs(BaseException):
    """Not to be taken for an error by anybody."""


def alarm(number: int, frame: FrameType | None) -> None:
    raise Hangs


def attempt(script: str, args: list[str]) -> dict[str, object]:
    gc.collect()
    out, err = io.StringIO(), io.StringIO()
    start = time.monotonic()
    signal.alarm(SECONDS)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status: object = SCRIPTS[script].main(args)
        except Hangs:
            status = "hangs"
        except BaseException as exc:
            status = f"{type(exc).__name__}: {str(exc)[:200]}"
    signal.alarm(0)
    return {"status": status, "stderr": err.getvalue(), "stdout": out.getvalue(), "seconds": time.monotonic() - start}


def main() -> None:
    signal.signal(signal.SIGALRM, alarm)
    calls = [json.loads(line) for line in sys.stdin]
    attempt(*calls[0])  # which loads most of what there is
    with limited(MEMORY) if LINUX else contextlib.nullcontext():
        for script, args in calls:
            print(json.dumps(attempt(script, args)), flush=True)


if __name__ == "__main__":
    main()
