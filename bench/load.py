"""How long a network file takes to load, beside `torch.load` of the same tensors as a plain state_dict.

    python -m bench.load [--repeats=7]

makes a DDPM++ network of CIFAR-10's published size (55.7 M parameters, a pickle of 223 MB) in a temporary folder, and
loads its pickle, its safetensors file and its bare state_dict by turns, each time in a process of its own, as programs
do: `first` is what a program waits for. `again` is a second load there, once the first network has been let go: its
memory has been touched before, which is half of the work. Files are in the page cache: this is not about disks. Prints
medians, ratios to `torch.load(weights_only=True)`, and how much the process grew at most.
"""

from __future__ import annotations

import hashlib
import json
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
LOAD = """
import json, re, resource, sys, time, torch
from formats.network_files import load_network
import training.training_loop  # as every script has by then
def peak():
    try:  # rusage counts what a parent had before, too
        return int(re.search(r"VmHWM:\\s*(\\d+) kB", open("/proc/self/status").read())[1]) * 1024
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
def load():
    start = time.perf_counter()
    path = sys.argv[1]
    kept = torch.load(path, map_location="cpu", weights_only=True) if path.endswith(".pt") else load_network(path)
    seconds = time.perf_counter() - start
    getattr(kept, "sha256", None)  # waits for the thread that computes it
    return seconds
before = peak()
first = load()
growth = peak() - before
print(json.dumps([first, load(), growth]))
"""


def seconds(action: Callable[[], Any]) -> float:
    """How long it takes."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def load_once(path: Path) -> list[float]:
    """[seconds of the first load, seconds of a second one, bytes of growth] in a process of its own."""
    words = [sys.executable, "-c", LOAD, str(path)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)
    figures: list[float] = json.loads(done.stdout)
    return figures


def sha256(path: Path) -> str:
    """Of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@cli.command(name="load")
@click.option("--repeats", help="Loads of each file", type=cli.Whole(min=1), default=7)
@click.option("--cbase", help="Width of the network", type=cli.Whole(min=8), default=128)
@click.option("--blocks", help="Blocks per resolution", type=cli.Whole(min=1), default=4)
def command(repeats: int, cbase: int, blocks: int) -> None:
    """Time the loading of network files against torch.load of their tensors."""
    import torch

    from formats.network_files import convert_network, load_network, save_network
    from training.config import ARCHITECTURES
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
        found = torch.load(plain, weights_only=True)
        for path in (pickle, safe):  # all three give the same tensors
            weights = load_network(path).net.state_dict()
            assert weights.keys() == found.keys() and all(torch.equal(weights[key], found[key]) for key in found)
        del found, original
        digest = statistics.median(seconds(lambda: sha256(pickle)) for _ in range(repeats))
        rows: dict[Path, list[list[float]]] = {path: [] for path in (plain, pickle, safe)}
        for _ in range(repeats):
            for path, figures in rows.items():
                figures.append(load_once(path))
        print(
            f"{parameters / 1e6:.1f} M parameters, {repeats} processes for each file by turns, torch "
            f"{torch.__version__}, threads: {torch.get_num_threads()}"
        )
        columns = f"{'file':22s} {'MB':>7s} {'first s':>8s} {'range':>15s} {'ratio':>6s} {'again s':>8s} {'ratio':>6s}"
        print(f"{columns} {'peak MB':>8s}")
        base = [statistics.median(column) for column in zip(*rows[plain], strict=True)]
        for path, figures in rows.items():
            first, again, growth = (statistics.median(column) for column in zip(*figures, strict=True))
            spread = f"{min(row[0] for row in figures):.3f} - {max(row[0] for row in figures):.3f}"
            label = f"{path.suffix}{' (torch.load)' if path == plain else ''}"
            print(
                f"{label:22s} {path.stat().st_size / 1e6:7.1f} {first:8.3f} {spread:>15s} {first / base[0]:6.2f} "
                f"{again:8.3f} {again / base[1]:6.2f} {growth / 1e6:8.0f}"
            )
        print(f"The SHA-256 of the pickle, which is part of loading it, takes {digest:.3f} s")


def main(args: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    return cli.run(command, args)


if __name__ == "__main__":
    sys.exit(main())
