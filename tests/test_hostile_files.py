"""Hostile and broken network files: each is refused in one line, runs nothing, and takes little memory.

The files come from hostile_cases.py. One process of its own, hostile_runner.py, loads them one after the other through
example.py's command line, under an audit hook and a limit of memory.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from formats.network_files import load_network
from hostile_cases import CHANNELS, GOOD, HEAD, HOSTILE, TRAPS, call, content, network, trap_name, under
from hostile_runner import LINUX

RUNNER = Path(__file__).parent / "hostile_runner.py"
MAX_SECONDS = 20.0  # of the processor, for one file; the slowest takes three
FLIPS = 50  # of one bit each, in either format: half of them between the weights
LOADED = f"makes {CHANNELS} channels; a PNG has 1 (grey) or 3 (RGB)"  # what example.py says of the good networks

Result = dict[str, Any]


def attempt(mode: str, folder: Path, files: dict[str, bytes]) -> dict[str, Result]:
    """What came of each file: see hostile_runner.py. The third file is stored in `folder` as 002, and so on."""
    warm = []
    for name, build in GOOD.items():
        warm.append(str(folder / name))
        (folder / name).write_bytes(build())
    paths = {str(folder / f"{index:03}"): name for index, name in enumerate(files)}
    for path, data in zip(paths, files.values(), strict=True):
        Path(path).write_bytes(data)
    command = [sys.executable, str(RUNNER), mode, *warm]
    env = os.environ | {"MALLOC_ARENA_MAX": "1"}  # else every thread reserves addresses: the limit is one of addresses
    process = subprocess.run(command, input="\n".join(paths), cwd=folder, capture_output=True, text=True, env=env)
    results = {}
    for line in process.stdout.splitlines():
        result = json.loads(line)
        results[paths.pop(result["path"])] = result
    assert not paths, f"'{next(iter(paths.values()))}' ended the process: {process.stderr[-1000:]}"
    assert process.returncode == 0 and process.stderr == "", process.stderr[-1000:]
    return results


def flips(name: str) -> dict[str, tuple[int, int]]:
    """Bits to flip in a good file, as (byte, bit): some within the numbers of its tensors, some outside."""
    good = GOOD[name]()
    weights = set()
    for tensor in network().state_dict().values():
        raw = tensor.numpy().tobytes()
        start = good.index(raw)
        weights |= set(range(start, start + len(raw)))
    chance = random.Random(0)
    inside = chance.sample(sorted(weights), FLIPS // 2)
    outside = chance.sample(sorted(set(range(len(good))) - weights), FLIPS // 2)
    return {
        f"{name}, {what}, bit {index}": (place, chance.randrange(8))
        for what, places in (("weights", inside), ("between", outside))
        for index, place in enumerate(places)
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("hostile")
    yield folder
    shutil.rmtree(folder)  # 150 MB, which pytest would keep for a while


@pytest.fixture(scope="module")
def results(folder: Path) -> dict[str, Result]:
    """What came of all files: hostile ones, good ones cut off at every percent, and with one bit flipped."""
    files = {name: content(build, index) for index, (name, build) in enumerate(HOSTILE.items())}
    for name, build in GOOD.items():
        good = build()
        files |= {f"{name}, cut at {percent}%": good[: len(good) * percent // 100] for percent in range(100)}
        for flip, (place, bit) in flips(name).items():
            changed = bytearray(good)
            changed[place] ^= 1 << bit
            files[flip] = bytes(changed)
        files[name] = good
    return attempt("load", folder, files)


def fault(result: Result) -> str | None:
    """What is wrong with how a file was refused, or found good."""
    line = result["stderr"]
    if result["status"] != 1:
        return f"status {result['status']}, {line!r}"
    if line.count("\n") != 1 or not line.startswith(f"example.py: error: {result['path']}"):
        return f"not one line about the file: {line!r}"
    if len(line) > 1000 or not line[:-1].isprintable():
        return f"a line that no terminal should see: {line!r}"
    if result["stdout"]:
        return f"words on standard output: {result['stdout']!r}"
    if result["events"]:
        return f"it did things: {result['events'][:3]}"
    if result["peak"] is not None and result["peak"] > result["limit"]:
        return f"{result['peak'] >> 20} MiB of memory, where {result['limit'] >> 20} are allowed"
    if result["seconds"] > MAX_SECONDS:
        return f"{result['seconds']} seconds"
    return None


def test_there_are_enough(results: dict[str, Result]) -> None:
    """Far more than sixty, no two the same."""
    contents = {Path(results[name]["path"]).read_bytes() for name in HOSTILE}
    assert len(contents) == len(HOSTILE) > 500


def test_hostile_files_are_refused(results: dict[str, Result], folder: Path) -> None:
    """One line, status 1, nothing done, memory within bounds."""
    faults = {}
    for name in HOSTILE:
        reason = fault(results[name])
        if reason is None and LOADED in results[name]["stderr"]:
            reason = "it was loaded"
        if reason is not None:
            faults[name] = reason
    assert not faults
    assert not list(folder.glob("TRAP*")) and not (folder / "never").exists()


def test_files_that_are_cut_off_are_refused(results: dict[str, Result]) -> None:
    cuts = {name: result for name, result in results.items() if ", cut at " in name}
    assert len(cuts) == 100 * len(GOOD)
    assert not {name: fault(result) for name, result in cuts.items() if fault(result)}
    assert not [name for name, result in cuts.items() if LOADED in result["stderr"]]


@pytest.mark.parametrize("name", GOOD)
def test_flipped_bits(results: dict[str, Result], folder: Path, name: str) -> None:
    """One within a weight changes this weight and no other; one elsewhere is noticed, or harms nothing but what it
    says: the file is loaded or refused like any other."""
    assert fault(results[name]) is None and LOADED in results[name]["stderr"]
    loaded = set()
    for flip in flips(name):
        warning, _, rest = results[flip]["stderr"].partition("\n")
        if warning.startswith("Warning: ") and "is no version known here" in warning:  # a bit of the source text
            results[flip]["stderr"] = rest
        assert fault(results[flip]) is None, (flip, fault(results[flip]))
        if LOADED in results[flip]["stderr"]:
            loaded.add(flip)
    inside = {flip for flip in flips(name) if "weights" in flip}
    assert inside <= loaded and not set(flips(name)) <= loaded
    good = network().state_dict()
    for flip in sorted(inside)[:5]:
        tensors = load_network(results[flip]["path"]).net.state_dict()
        changed = [int((tensors[key].view(torch.int32) != good[key].view(torch.int32)).sum()) for key in good]
        assert sum(changed) == 1


@pytest.fixture(scope="module")
def naive(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Result]]:
    """What Python's own unpickler makes of the traps, and of files that ask for memory."""
    folder = tmp_path_factory.mktemp("naive")
    files = {name: content(build, index) for index, (name, build) in enumerate(TRAPS.items())}
    files |= {
        "a gigabyte": under(call("builtins", "bytearray", 1 << 30)),
        "two million sets": HEAD + b"\x8f" * 2_000_000 + b"0" * 1_999_999 + b".",
        "fifty megabytes": under(call("builtins", "bytearray", 50 << 20)),
    }
    return folder, attempt("pickle", folder, files)


def test_the_traps_spring_under_pickle(naive: tuple[Path, dict[str, Result]]) -> None:
    """These very files run code when Python's own unpickler reads them, and the audit hook sees it: a loader that ran
    one of them could not pass the tests above."""
    folder, results = naive
    asleep = [name for index, name in enumerate(TRAPS) if not (folder / trap_name(index)).exists()]
    assert not asleep
    looked_up = "pickle.find_class"  # that alone is an event, too
    unseen = [name for name in TRAPS if all(event.startswith(looked_up) for event in results[name]["events"])]
    assert not unseen
    assert all(fault(results[name]) for name in TRAPS)


@pytest.mark.skipif(not LINUX, reason="memory is limited on Linux only")
def test_the_limit_of_memory_holds(naive: tuple[Path, dict[str, Result]]) -> None:
    """Python's own unpickler takes what these ask for, until there is no memory left for it."""
    _, results = naive
    assert results["a gigabyte"]["stderr"].startswith("MemoryError")
    assert results["two million sets"]["stderr"].startswith("MemoryError")
    assert results["fifty megabytes"]["status"] == 0
    assert 200_000_000 < results["a gigabyte"]["limit"] < 200_001_000
    assert 45 << 20 < results["fifty megabytes"]["peak"] < 60 << 20
