"""Every command of README and docs runs as it stands there, in the order of its page, made small by options behind it.

What a test can't have has a stand-in of the same name: networks and statistics from the internet, CIFAR-10, a detector in
place of Inception. What can't run here at all is named in `NOT_HERE`, with the reason.
"""

from __future__ import annotations

import importlib
import json
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import fid
from engine.options import COMMAND_LINE
from formats.network_files import save_network
from helpers import load_recipe, make_dataset, small_network
from test_dataset_tool import cifar
from test_docs import NAMES, SCRIPTS, commands, text_of

NOT_HERE = {
    "make demo": "ten minutes; it is made of these commands",
    "make test": "it would run itself",
    "make env": "needs the internet",
    "python3 -m venv ": "needs the internet",
    "srun ": "needs Slurm",
    "python -m bench.": "test_bench.py runs it",
}
LESS = {  # the last of two options counts
    "train.py": "--duration=0.001 --batch=256 --seed=1 --device=cpu",
    "distill.py": "--until=8 --duration=0.001 --batch=256 --eval-num=8 --eval-sets=1 --curve=0 --device=cpu",
    "generate.py": "--seeds=0-7 --device=cpu",
    "fid.py calc": "--num-images=8 --device=cpu",
    "fid.py gen": "--num-images=8 --device=cpu",
    "fid.py detector": "--kimg=0.2 --device=cpu",
}
FRESH = "--cbase=4 --cres=1,1 --blocks=1 --warmup=0"  # of a network from scratch
STUDENT = Path("distillation_model/network-snapshot-020000.pkl")  # the pages' name for one


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files by the names that the pages use, for what they take from elsewhere."""
    place = tmp_path_factory.mktemp("stand-ins")
    cifar(place / "cifar-10-python.tar.gz")
    for name in ("datasets/photos-16x16.zip", "my-dataset.zip", "datasets/cifar10-32x32.zip"):
        (place / name).parent.mkdir(exist_ok=True)
        data = make_dataset(place / name, count=40, size=32, channels=3)
    net = small_network(32, 3, model_channels=4, channel_mult=[1, 1], attn_resolutions=[])
    load_recipe(net, 1)
    names = ("edm-cifar10-32x32-uncond-vp.pkl", "teacher.pkl", "my-network-snapshot.pkl", "training-runs/teacher.pkl")
    for name in names:
        (place / name).parent.mkdir(exist_ok=True)
        save_network(place / name, net)
    detector = f"--detector={place / 'stand-in.pt'}"
    assert fid.main(["detector", f"--data={data}", f"--dest={place / 'stand-in.pt'}", "--kimg=0.2"]) == 0
    assert fid.main(["ref", f"--data={data}", f"--dest={place / 'cifar10-32x32.npz'}", detector]) == 0
    rng = np.random.default_rng(0)
    for index in range(24):
        folder = place / "photos" / ("cats", "dogs")[index % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (40 + index, 60, 3), dtype=np.uint8)).save(folder / f"{index}.jpg")
    for name, given in {
        "training-runs/00000-run/training_options.json": {"cbase": "4", "cres": "1,1", "blocks": "1", "warmup": "0"},
        "ladder/ladder-options.json": {"transfer": "teacher.pkl", "num_steps": "32"},
    }.items():
        told = {"outdir": name.partition("/")[0], "data": "datasets/cifar10-32x32.zip", **given}
        (place / name).parent.mkdir(exist_ok=True)
        (place / name).write_text(json.dumps({COMMAND_LINE: told}))
    return place


def shown(name: str) -> list[str]:
    return [line for line in commands(text_of(name)) if not line.startswith(tuple(NOT_HERE))]


PAGES = [name for name in NAMES if shown(name) and name not in ("CONTRIBUTING.md", "README.zh-CN.md")]  # see test_docs


@pytest.mark.parametrize("name", PAGES)
def test_the_commands_of_a_page_run(name, stand_ins, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("formats.image_sources.CIFAR10_IMAGES", 20)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    place = tmp_path / "place"
    shutil.copytree(stand_ins, place)
    monkeypatch.chdir(place)
    for line in shown(name):
        words = shlex.split(re.sub(r"https://\S*/", "", line))
        at = next(index for index, word in enumerate(words) if word in SCRIPTS)
        script, args = words[at], words[at + 1 :]
        less = LESS.get(script, LESS.get(f"{script} {''.join(args[:1])}", ""))
        if script == "train.py" and not any(arg.startswith(("--transfer", "--config")) for arg in args):
            less += f" {FRESH}"
        if less and script in ("distill.py", "fid.py") and args[0] != "detector" and "--detector" not in line:
            less += " --detector=stand-in.pt"
        before = {path: path.stat().st_mtime_ns for path in place.rglob("*")}
        status = importlib.import_module(script.removesuffix(".py")).main([*args, *less.split()])
        assert status == 0, (line, capsys.readouterr().err)
        left = [path for path in place.rglob("*") if before.get(path) != path.stat().st_mtime_ns]
        assert left or script == "fid.py", f"{line} has left nothing"
        if "--precond=edm_distillation" in args and not STUDENT.exists():
            STUDENT.parent.mkdir(exist_ok=True)
            (student,) = (path for path in left if path.name == "network-snapshot-000001.pkl")
            shutil.copy(student, STUDENT)
