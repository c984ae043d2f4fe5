"""How long a network file takes to load, beside `torch.load` of the same tensors as a plain state_dict.

    python -m bench.load [--repeats=7]

makes a DDPM++ network of CIFAR-10's published size (55.7 M parameters, a pickle of 223 MB) in a temporary folder, and
loads its pickle, its safetensors file and its bare state_dict by turns, so that whatever else the machine does hits all
of them alike. Files are in the page cache: this is about work, not about disks. Prints medians, and their ratio to
the plain `torch.load(weights_only=True)`; peak memory is of a process that loads that one file.
"""

from __future__ import annotations

import gc
import hashlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from dnnlib import cli

ROOT = Path(__file__).resolve().parent.parent
PEAK = """
import re, resource, sys, torch
from training.network_files import load_network
def peak():
    try:  # rusage counts what a parent had before, too
        return int(re.search(r"VmHWM:\\s*(\\d+) kB", open("/proc/self/status").read())[1]) * 1024
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
before = peak()
kept = torch.load(sys.argv[1], weights_only=True) if sys.argv[1].endswith(".pt") else load_network(sys.argv[1])
print(peak() - before)
"""


def seconds(action: Callable[[], Any]) -> float:
    """How long it takes; what it returns is let go, and its hash waited for, outside the time."""
    gc.collect()
    start = time.perf_counter()
    result = action()
    duration = time.perf_counter() - start
    getattr(result, "sha256", None)
    del result
    return duration


def sha256(path: Path) -> str:
    """Of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def peak_bytes(path: Path) -> int:
    """How much a process grows at most while it loads this file."""
    words = [sys.executable, "-c", PEAK, str(path)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)
    return int(done.stdout)


@cli.command(name="load")
@click.option("--repeats", help="Loads of each file", type=cli.Whole(min=1), default=7)
@click.option("--cbase", help="Width of the network", type=cli.Whole(min=8), default=128)
@click.option("--blocks", help="Blocks per resolution", type=cli.Whole(min=1), default=4)
def command(repeats: int, cbase: int, blocks: int) -> None:
    """Time the loading of network files against torch.load of their tensors."""
    import torch

    from training.config import ARCHITECTURES
    from training.network_files import convert_network, load_network, save_network
    from training.training_loop import build_network

    with tempfile.TemporaryDirectory() as name:
        kwargs = {**ARCHITECTURES["ddpmpp"], "class_name": "EDMPrecond", "model_channels": cbase, "num_blocks": blocks}
        network = build_network(kwargs, 32, 3, 0).eval()
        parameters = sum(p.numel() for p in network.parameters())
        pickle, safe, plain = (Path(name, f"network{suffix}") for suffix in (".pkl", ".safetensors", ".pt"))
        save_network(pickle, network)
        del network
        original = load_network(pickle)
        convert_network(original, safe)
        convert_network(original, plain)
        actions: dict[Path, Callable[[], Any]] = {
            plain: lambda: torch.load(plain, map_location="cpu", weights_only=True),
            pickle: lambda: load_network(pickle),
            safe: lambda: load_network(safe),
        }
        found = torch.load(plain, weights_only=True)
        for path in (pickle, safe):  # all three give the same tensors
            weights = load_network(path).net.state_dict()
            assert weights.keys() == found.keys() and all(torch.equal(weights[key], found[key]) for key in found)
        del found, original
        digest = statistics.median(seconds(lambda: sha256(pickle)) for _ in range(repeats))
        times: dict[Path, list[float]] = {path: [] for path in actions}
        for _ in range(repeats):
            for path, action in actions.items():
                times[path].append(seconds(action))
        print(
            f"{parameters / 1e6:.1f} M parameters, {repeats} loads of each file by turns, torch {torch.__version__}, "
            f"threads: {torch.get_num_threads()}"
        )
        print(f"{'file':22s} {'MB':>7s} {'median s':>9s} {'range':>15s} {'MB/s':>7s} {'ratio':>6s} {'peak MB':>8s}")
        base = statistics.median(times[plain])
        for path in actions:
            size, median = path.stat().st_size / 1e6, statistics.median(times[path])
            spread = f"{min(times[path]):.3f} - {max(times[path]):.3f}"
            label = f"{path.suffix}{' (torch.load)' if path == plain else ''}"
            row = f"{label:22s} {size:7.1f} {median:9.3f} {spread:>15s} {size / median:7.0f} {median / base:6.2f}"
            print(f"{row} {peak_bytes(path) / 1e6:8.0f}")
        print(f"The SHA-256 of the pickle, computed in a thread once it is loaded, takes {digest:.3f} s")


def main(args: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    return cli.run(command, args)


if __name__ == "__main__":
    sys.exit(main())
