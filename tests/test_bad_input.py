"""Whatever a user gets wrong: one line on standard error, the right exit status, and nothing damaged.

The scripts are called in this process; what they print besides the one line may only be warnings.
"""

from __future__ import annotations

import errno
import io
import json
import math
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import pytest
import torch
from PIL import Image

import dataset_tool
import distill
import example
import fid
import generate
import train
from dnnlib import atomic, cli, util
from formats import state
from formats.network_files import load_network, save_network
from helpers import make_dataset, small_network
from torch_utils.misc import load_tensors
from training.distillation import plan_stage
from training.loader import Loader
from training.training_loop import Trainer

ROOT = Path(__file__).parent.parent
SMALL = ["--cbase=4", "--cres=1", "--blocks=1", "--batch=100", "--tick=0.1", "--seed=5", "--warmup=0", "--nosubdir"]
SHORT = [*SMALL, "--duration=0.001"]  # 10 steps, each of them a tick
DISTIL = ["--precond=edm_distillation", "--batch=12", "--duration=0.001", "--tick=0.1", "--seed=5", "--nosubdir"]
LADDER = ["--until=2", "--duration=0.001", "--batch=12", "--eval-num=8"]

Fails = Callable[..., str]


def reading_threads() -> list[str]:
    """Those of loaders (a thread that hashes a file may live a moment longer, and is no matter)."""
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("loader")]


def call(script: Any, *args: object) -> int:
    """A script in this process: its exit status."""
    status: int = script.main([str(arg) for arg in args])
    return status


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str]) -> Fails:
    """Calls a script that must fail with this status and one line that holds all these words; gives the line."""

    def check(status: int, words: str | list[str], script: Any, *args: object) -> str:
        capsys.readouterr()
        assert call(script, *args) == status, (words, capsys.readouterr().err)
        lines = [
            line for line in capsys.readouterr().err.splitlines() if not line.startswith(("warning:", "sampling", "  "))
        ]
        assert len(lines) == 1, lines
        (line,) = lines
        kind = "interrupted" if status > 128 else "error: "
        assert line.startswith(f"{script.__name__}.py: {kind}"), line
        assert "please report" not in line and len(line) < 700, line
        for word in [words] if isinstance(words, str) else words:
            assert word in line, (word, line)
        return line

    return check


# ----------------------------------------------------------------------------------------------------------------------
# Files, good and bad


def rebuilt(source: Path, target: Path, changes: dict[str, bytes]) -> Path:
    """A copy of a zip with other content in some entries, named by the end of their names."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            content = next((data for end, data in changes.items() if name.endswith(end)), old.read(name))
            new.writestr(name, content)
    return target


def png(size: int, mode: str) -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, (size, size)).save(buffer, format="PNG")
    return buffer.getvalue()


class Explosive:
    """What a hostile pickle holds: a call of its own choice."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("exploded",)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a bit of everything; `run` in it is a finished training run."""
    folder = tmp_path_factory.mktemp("files")
    data = make_dataset(folder / "good.zip", count=40)
    make_dataset(folder / "rgb.zip", count=40, channels=3)
    make_dataset(folder / "big.zip", size=16)
    make_dataset(folder / "odd.zip", size=9)
    make_dataset(folder / "unlabelled.zip", classes=None)
    raw = data.read_bytes()
    (folder / "empty").write_bytes(b"")
    (folder / "text").write_text("hello")
    (folder / "cut.zip").write_bytes(raw[: len(raw) // 2])
    zipfile.ZipFile(folder / "hollow.zip", "w").close()
    flipped = bytearray(raw)
    flipped[raw.find(b"IDAT") + 10] ^= 0xFF
    (folder / "flipped.zip").write_bytes(flipped)
    with zipfile.ZipFile(data) as archive:
        image = archive.read("00000/img00000017.png")
    rebuilt(data, folder / "first-cut.zip", {"00000000.png": image[:40]})
    rebuilt(data, folder / "mid-cut.zip", {"00000017.png": image[:60]})
    rebuilt(data, folder / "mid-rgb.zip", {"00000017.png": png(8, "RGB")})
    rebuilt(data, folder / "mid-size.zip", {"00000017.png": png(16, "L")})

    teacher = small_network(augment_dim=9, dropout=0.13)
    save_network(folder / "teacher.pkl", teacher)
    loaded = load_network(folder / "teacher.pkl")
    save_network(folder / "student.pkl", teacher, sampling=plan_stage(loaded, 8).sampling)
    save_network(folder / "one-step.pkl", teacher, sampling=plan_stage(loaded, 2).sampling)
    save_network(folder / "size16.pkl", small_network(16))
    save_network(folder / "rgb.pkl", small_network(8, 3))
    save_network(folder / "four.pkl", small_network(8, 4))
    save_network(folder / "classes.pkl", small_network(label_dim=4))
    broken = small_network()
    torch.nn.init.constant_(next(broken.parameters()), float("nan"))
    save_network(folder / "nan.pkl", broken)
    whole = (folder / "teacher.pkl").read_bytes()
    (folder / "cut.pkl").write_bytes(whole[: len(whole) // 2])
    (folder / "page.pkl").write_text("<!DOCTYPE html><html></html>")
    (folder / "hostile.pkl").write_bytes(pickle.dumps({"ema": Explosive()}))

    assert call(train, f"--data={data}", *SMALL, f"--outdir={folder / 'run'}", "--duration=0.001", "--dump=1") == 0
    (folder / "run" / "training-state-000001.pt").rename(folder / "run" / "state.pt")
    return folder


# ----------------------------------------------------------------------------------------------------------------------
# Options


def test_values_of_the_wrong_kind(fails, tmp_path):
    """Each is refused by name and before anything is read: none of the files exists."""
    needed = {
        train: ["--outdir=o", "--data=d"],
        distill: ["--outdir=o", "--data=d", "--transfer=t", "--num_steps=4"],
        generate: ["--outdir=o", "--network=n"],
        fid: ["calc", "--images=i", "--ref=r"],
        dataset_tool: ["--source=s", "--dest=d"],
        example: [],
    }
    cases = [
        (train, "--lr", "nan inf 0 -1 abc"),
        (train, "--duration", "nan inf 0 -1 1e300 1,2"),
        (train, "--p-mean", "nan inf 1e9"),
        (train, "--dropout", "nan 1.5 -0.1"),
        (train, "--batch", "0 -3 1.5 99999999999999999999 abc"),
        (train, "--batch-gpu", "0 1.5"),
        (train, "--seed", "-1 x 1.5"),
        (train, "--cres", "abc 1,0 -1,2 1..2"),
        (train, "--cond", "maybe 2 -1"),
        (train, "--precond", "EDM distillation"),
        (distill, "--warmup", "nan"),
        (distill, "--duration", "nan 0 abc 1,inf"),
        (distill, "--ratio", "abc 1.5"),
        (distill, "--num_steps", "0 999999999"),
        (generate, "--seeds", "abc 1.5 0- 1,,2 0-999999999999"),
        (generate, "--steps", "0 -1 x"),
        (generate, "--sigma_max", "nan inf 0 -1"),
        (generate, "--S_max", "nan -1"),
        (generate, "--class", "-1 cat"),
        (generate, "--disc", "foo"),
        (fid, "--num", "1 abc"),
        (dataset_tool, "--resolution", "0 8x 0x0 -8x8 axb"),
        (dataset_tool, "--max-images", "0 x"),
        (example, "--seeds", "abc"),
    ]
    for script, option, values in cases:
        for value in values.split():
            line = fails(2, option, script, *needed[script], f"{option}={value}")
            assert "Invalid value" in line, line
    assert list(tmp_path.iterdir()) == []


def test_option_names(fails):
    place = ["--outdir=o", "--data=d"]
    for words, script, *args in (
        ("'--transfr'. Did you mean '--transfer'?", train, *place, "--transfr=x"),
        ("No such option '--zzzzzzz'", train, *place, "--zzzzzzz=3"),
        ("Did you mean '--steps'?", generate, "--num_steps=18"),
        ("Did you mean 'calc'?", fid, "cacl"),
        ("'ddpmp' is not one of 'ddpmpp', 'ncsnpp', 'adm'", train, "--arch=ddpmp"),
        ("not one of 'center-crop', 'center-crop-wide'", dataset_tool, "--source=x", "--dest=y", "--transform=x"),
        ("Missing option '--data'", train, "--outdir=o"),
        ("--seed", train, *place, "--seed"),
        ("extra", train, *place, "extra"),
        ("--nosubdir", train, *place, "--nosubdir=1"),
    ):
        fails(2, words, script, *args)


def test_help_is_quick_and_shows_words_as_they_are_written():
    program = (
        "import sys, train, distill, generate, fid, example, dataset_tool\n"
        "for script in (train, distill, generate, fid, example, dataset_tool):\n"
        "    assert script.main(['--help']) == 0\n"
        "assert not {'torch', 'numpy', 'scipy', 'PIL'} & set(sys.modules), 'loaded for a page of help'\n"
    )
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "edm_distillation]" in result.stdout and "edm-distillation" not in result.stdout


def test_steps_and_levels_that_no_sampler_takes(files, fails, tmp_path):
    args = [f"--network={files / 'teacher.pkl'}", f"--outdir={tmp_path / 'out'}", "--seeds=0"]
    fails(2, ["1000000000 steps", "at most"], generate, *args, "--steps=1000000000")
    fails(2, ["1000000000 steps", "at most"], generate, *args, "--grid=1000000000/2")
    distil = [f"--data={files / 'good.zip'}", *DISTIL, f"--transfer={files / 'teacher.pkl'}", f"--outdir={tmp_path}/o"]
    for steps, words in (
        (0, "takes 2 to"),
        (-4, "takes 2 to"),
        (9, "3, 9"),
        (1, "is the end"),
        (999999999, "takes 2 to"),
    ):
        fails(2, [f"--num_steps={steps}", words], train, *distil, f"--num_steps={steps}")
    fails(2, "is needed", train, *distil)
    fails(2, "--ratio", train, *distil, "--num_steps=4", "--ratio=3")
    student = [*distil, f"--transfer={files / 'student.pkl'}"]
    fails(2, "use --num_steps=4", train, *student, "--num_steps=8")
    fails(2, "use euler", train, *student, "--teacher-solver=heun")
    fails(2, "is the end", train, *distil, f"--transfer={files / 'one-step.pkl'}")
    fails(2, "--num_steps belongs to --precond=edm_distillation", train, distil[0], *SHORT, distil[-1], "--num_steps=4")
    assert list(tmp_path.iterdir()) == []


# ----------------------------------------------------------------------------------------------------------------------
# Data sets

NO_DATA = {
    "nowhere.zip": "no such file or folder",
    "empty": "whole zip",
    "text": "whole zip",
    "cut.zip": "whole zip",
    "hollow.zip": "no image files",
    "flipped.zip": "img00000000.png",
    "first-cut.zip": "img00000000.png",
}
BAD_IMAGE = {"mid-cut.zip": "can't be decoded", "mid-rgb.zip": "RGB", "mid-size.zip": "16x16"}


@pytest.mark.parametrize("name", NO_DATA)
def test_what_is_no_data_set(name, files, fails, tmp_path):
    words = [name, NO_DATA[name]]
    fails(1, words, train, f"--data={files / name}", *SHORT, f"--outdir={tmp_path / 'run'}")
    fails(1, words, dataset_tool, f"--source={files / name}", f"--dest={tmp_path / 'out.zip'}")
    fails(1, words, fid, "detector", f"--data={files / name}", f"--dest={tmp_path / 'detector.pt'}")
    teacher = [f"--transfer={files / 'teacher.pkl'}", "--num_steps=4"]
    fails(1, words, distill, f"--data={files / name}", *teacher, *LADDER, f"--outdir={tmp_path / 'ladder'}")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", BAD_IMAGE)
def test_a_bad_image_ends_a_run_by_name(name, files, fails, tmp_path):
    """It comes up in a thread that reads ahead, in the middle of the run; what was saved before stays good."""
    words = ["img00000017.png", BAD_IMAGE[name]]
    fails(1, [*words, name], train, f"--data={files / name}", *SHORT, "--batch=4", f"--outdir={tmp_path / 'run'}")
    assert not reading_threads(), "they have ended"
    assert load_network(tmp_path / "run" / "network-snapshot-000000.pkl").net.img_resolution == 8
    for dest in ("out.zip", "out"):
        if name == "mid-rgb.zip":  # which makes all of them RGB
            assert call(dataset_tool, f"--source={files / name}", f"--dest={tmp_path / dest}") == 0
            continue
        fails(1, words, dataset_tool, f"--source={files / name}", f"--dest={tmp_path / dest}")
        assert not (tmp_path / dest).exists()


def test_sizes_that_do_not_fit(files, fails, tmp_path):
    out = f"--outdir={tmp_path / 'run'}"
    fails(1, ["9", "halved", "8 or 10"], train, f"--data={files / 'odd.zip'}", *SHORT, "--cres=1,1", out)
    fails(1, "halved", train, f"--data={files / 'good.zip'}", *SHORT, "--cres=1,1,1,1,1", out)
    fails(1, "multiples of 4", train, f"--data={files / 'good.zip'}", *SHORT, "--cbase=7", out)
    fails(
        2, ["--batch-gpu=5", "4, 6"], train, f"--data={files / 'good.zip'}", *SHORT, "--batch=12", "--batch-gpu=5", out
    )
    assert list(tmp_path.iterdir()) == []


def test_labels_that_are_not_there(files, fails, tmp_path):
    rows = json.dumps({"labels": [["00000/img00000000.png", 1]]})
    data = rebuilt(files / "good.zip", tmp_path / "data.zip", {"dataset.json": rows.encode()})
    run = [f"--data={data}", *SHORT, f"--outdir={tmp_path / 'run'}"]
    fails(1, ["dataset.json", "39 of 40"], train, *run, "--cond=1")
    assert call(train, *run, "-n") == 0, "without --cond labels don't matter"
    args = [f"--data={files / 'unlabelled.zip'}", f"--outdir={tmp_path / 'run'}"]
    fails(1, "--cond=1", train, *args, *SHORT, "--cond=1")
    fails(1, "4 classes", train, *args, *DISTIL, "--num_steps=4", f"--transfer={files / 'classes.pkl'}")
    fails(1, "no class labels", fid, "detector", args[0], f"--dest={tmp_path / 'detector.pt'}")
    assert [path.name for path in tmp_path.iterdir()] == ["data.zip"]


# ----------------------------------------------------------------------------------------------------------------------
# Networks

NO_NETWORK = {
    "nowhere.pkl": "no such file",
    "empty": "is empty",
    "text": "not a pickle",
    "cut.pkl": "cut off",
    "page.pkl": "web page",
    "hostile.pkl": "--trust-network-code",
    "run/state.pt": "training state",
    "run": "is a folder, a file is needed; the newest network in it is ",
}


@pytest.mark.parametrize("name", NO_NETWORK)
def test_what_is_no_network(name, files, fails, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = files / name
    out, data = f"--outdir={tmp_path / 'out'}", f"--data={files / 'good.zip'}"
    words = [name, NO_NETWORK[name]]
    fails(1, words, train, data, *DISTIL, out, "--num_steps=4", f"--transfer={path}")
    fails(1, words, train, data, *SHORT, out, f"--transfer={path}")
    fails(1, words, distill, data, *LADDER, out, "--num_steps=4", f"--transfer={path}")
    fails(1, words, generate, f"--network={path}", out)
    fails(1, words, example, f"--network={path}")
    assert list(tmp_path.iterdir()) == [], "nothing written, and nothing in the file was run"


def test_text_that_is_empty_is_refused_by_the_options_name(files, fails, tmp_path):
    """What `--transfer=$TEACHER` comes to where no such variable is set."""
    data = f"--data={files / 'good.zip'}"
    for script, args in (
        (train, [data, "--outdir=x", "--transfer="]),
        (train, [data, "--outdir=x", "--resume="]),
        (distill, [data, "--outdir=x", "--transfer=t.pkl", "--detector="]),
        (generate, ["--outdir=x", "--network="]),
        (fid, ["ref", data, "--dest="]),
        (fid, ["calc", "--images=", "--ref=r.npz"]),
        (dataset_tool, ["--dest=x.zip", "--source="]),
        (example, ["--out="]),
    ):
        name = next(arg for arg in args if arg.endswith("="))[:-1]
        fails(2, f"{name} is empty", script, *args)


def test_runs_and_ladders_have_folders_of_their_own(files, fails, tmp_path):
    data, teacher = f"--data={files / 'good.zip'}", f"--transfer={files / 'teacher.pkl'}"
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "training_options.json").write_text("{}")
    words = "run holds a run of train.py"
    fails(1, words, distill, data, teacher, *LADDER, "--num_steps=4", f"--outdir={tmp_path / 'run'}")
    (tmp_path / "ladder").mkdir()
    (tmp_path / "ladder" / "ladder.json").write_text("[]")
    fails(1, "ladder holds a ladder of distill.py", train, data, *SHORT, f"--outdir={tmp_path / 'ladder'}")


def test_teachers_that_do_not_fit(files, fails, tmp_path):
    args = [f"--data={files / 'good.zip'}", *DISTIL, "--num_steps=4", f"--outdir={tmp_path / 'run'}"]
    fails(1, ["16x16", "8x8"], train, *args, f"--transfer={files / 'size16.pkl'}")
    fails(1, "3 channels", train, *args, f"--transfer={files / 'rgb.pkl'}")
    fails(1, "no classes", train, *args, f"--transfer={files / 'teacher.pkl'}", "--cond=1")
    fails(1, ["nan.pkl", "NaN"], train, *args, f"--transfer={files / 'nan.pkl'}")
    fails(2, "--cbase=32", train, *args, f"--transfer={files / 'teacher.pkl'}", "--cbase=32")
    plain = [f"--data={files / 'good.zip'}", *SHORT, f"--outdir={tmp_path / 'run'}"]
    fails(2, "distilled", train, *plain, f"--transfer={files / 'student.pkl'}")
    assert list(tmp_path.iterdir()) == []


def test_networks_that_make_no_pictures(files, fails, tmp_path):
    for name, words in (("nan.pkl", "NaN"), ("four.pkl", "4 channels")):
        args = [f"--network={files / name}", "--seeds=0-1", "--steps=1"]
        fails(1, words, generate, *args, f"--outdir={tmp_path / 'out.zip'}")
        fails(1, words, example, *args, f"--out={tmp_path / 'out.png'}")
    assert list(tmp_path.iterdir()) == []


# ----------------------------------------------------------------------------------------------------------------------
# Addresses


def test_addresses_that_give_no_network(server, files, fails, tmp_path):
    server.answer = lambda handler, count: (
        handler.whole(body=b"<html>Please sign in</html>") if handler.path == "/page.pkl" else handler.reply(404)
    )
    addresses = {
        f"{server.url}/missing.pkl": "HTTP 404",
        f"{server.url}/page.pkl": "web page",
        "ftp://host/a.pkl": "http(s)://",
    }
    for address, words in addresses.items():
        with pytest.MonkeyPatch.context() as patch:  # a line that shows what is being downloaded is no error
            patch.setattr(util, "print", lambda *args, **kwargs: None, raising=False)
            fails(1, [address, words], generate, f"--network={address}", f"--outdir={tmp_path / 'out'}")
            args = [f"--data={files / 'good.zip'}", *DISTIL, "--num_steps=4", f"--outdir={tmp_path / 'run'}"]
            fails(1, [address, words], train, *args, f"--transfer={address}")
    assert not any(path.is_file() for path in tmp_path.rglob("*")), "nothing of it is kept"


# ----------------------------------------------------------------------------------------------------------------------
# Training states and run directories


def test_what_is_no_training_state(files, fails, tmp_path):
    good = load_tensors(files / "run/state.pt")
    run = [f"--data={files / 'good.zip'}", *SHORT, f"--outdir={tmp_path / 'run'}"]
    for name in ("text", "empty", "teacher.pkl", "good.zip", "hostile.pkl"):
        fails(1, [name, "not a training state"], train, *run, f"--resume={files / name}")
    (tmp_path / "weights.safetensors").touch()
    for name in (str(files / "run"), str(tmp_path / "weights.safetensors"), "lastest"):
        words = f"--resume={name} is not a training state (training-state-*.pt, or latest)"
        fails(1, words, train, *run, f"--resume={name}")

    whole = (files / "run/state.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[: len(whole) // 2])
    fails(1, ["cut.pt", "damaged"], train, *run, f"--resume={tmp_path / 'cut.pt'}")

    def short(table: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: tensor[:1] if tensor.ndim else tensor for name, tensor in table.items()}

    moments, position, options = good["optimizer"], good["position"], good["options"]
    wrong = [("nimg", "many"), ("step", -1), ("nimg", 10**30), ("tick", 2**70), ("skipped", 10**400)]
    wrong += [("tick_start_nimg", position["nimg"] + 1), ("elapsed_sec", 1e308), ("elapsed_sec", math.nan)]
    lacking: list[dict[str, Any]] = [{"position": {**position, name: value}} for name, value in wrong]
    lacking += [{"scaler": {"scale": a, "growth": b}} for a, b in ((math.inf, 0), (1.0, 2**70), (10**400, 0))]
    lacking += [{"position": {}}, {"position": 3}, {"options": {}}, {"options": {**options, "seed": 2**63}}]
    lacking += [{"world_size": 0}, {"batch_gpu": 2**70}, {"net": {"a": 1}}]
    for change, words in (
        *[({**good, **each}, "lacks something") for each in lacking],
        ([1, 2], "not a training state"),
        ({"a": 1}, "not a training state"),
        ({**good, "format": 9}, "format 9"),
        ({**good, "options": {**options, "ema": 1}}, "--ema"),
        ({**good, "options": {**options, "lr-decay": [], "duration": None}}, "--lr-decay"),
        ({**good, "options": {**options, "lr": 10**400}}, "lr (was inf"),
        ({**good, "format": "\x1b[2J" + "9" * 10**6}, "format \\x1b[2J9"),
        ({**good, "net": {**good["net"], "\x1b[2J" * 10**5: torch.zeros(1)}}, "does not fit"),
        ({**good, "net": short(good["net"])}, "does not fit"),
        ({**good, "optimizer": {**moments, "exp_avg": short(moments["exp_avg"])}}, "does not fit"),
        ({**good, "optimizer": {**moments, "exp_avg_sq": {}}}, "does not fit"),
        ({**good, "options": {**options, "lr": 1}}, "--lr (was not given, now 0.001)"),
    ):
        torch.save(change, tmp_path / "bad.pt")
        fails(1, ["bad.pt", words], train, *run, f"--resume={tmp_path / 'bad.pt'}")
    assert call(train, *run, f"--resume={files / 'run/state.pt'}", "-n") == 0
    os.mkfifo(tmp_path / "pipe.pt")
    os.mkfifo(tmp_path / "pipe.pkl")
    fails(1, ["pipe.pkl", "not a file but a pipe"], train, *run, f"--transfer={tmp_path / 'pipe.pkl'}")
    fails(1, ["pipe.pt", "is not a training state"], train, *run, f"--resume={tmp_path / 'pipe.pt'}")


def test_a_state_reaches_the_terminal_as_text(files, tmp_path, capsys):
    good = load_tensors(files / "run/state.pt")
    torch.save({**good, "device": "\x1b[2J" * 1000}, tmp_path / "odd.pt")
    run = [f"--data={files / 'good.zip'}", *SHORT, f"--outdir={tmp_path / 'run'}"]
    assert call(train, *run, f"--resume={tmp_path / 'odd.pt'}") == 0
    (note,) = [text for text in capsys.readouterr().out.splitlines() if "this run was on" in text]
    assert note.isprintable() and len(note) < 300


def test_a_run_writes_through_no_link(files, fails, tmp_path):
    """Nor does it wait for pipes in the place of files that it reads."""
    run = [f"--data={files / 'good.zip'}", *SMALL, f"--outdir={tmp_path / 'run'}", "--duration=0.001"]
    assert call(train, *run) == 0
    outside = tmp_path / "outside"
    for step, name in enumerate(("log.txt", "stats.jsonl")):
        (tmp_path / "run" / name).rename(outside)
        (tmp_path / "run" / name).symlink_to(outside)
        before = outside.read_bytes()
        assert call(train, *run, f"--duration=0.00{2 + step}") == 0
        assert outside.read_bytes() == before and not (tmp_path / "run" / name).is_symlink()
    (tmp_path / "ladder").mkdir()
    (tmp_path / "ladder/rungs").symlink_to(tmp_path / "run")
    ladder = [f"--transfer={files / 'teacher.pkl'}", "--num_steps=4", *LADDER, f"--outdir={tmp_path / 'ladder'}"]
    fails(1, "rungs: is a link", distill, f"--data={files / 'good.zip'}", *ladder)
    (tmp_path / "run/training_options.json").unlink()
    os.mkfifo(tmp_path / "run/training_options.json")
    assert call(train, *run, "--duration=0.004") == 0
    assert json.loads((tmp_path / "run/training_options.json").read_text())["seed"] == 5


def test_a_refused_option_leaves_the_run_as_it_was(files, fails, tmp_path):
    """Refused before anything is written: the right command still goes on (its seed is read from the options there)."""
    run = [f"--data={files / 'good.zip'}", *SHORT, f"--outdir={tmp_path}"]
    assert call(train, *run) == 0
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    fails(1, "seed (was 5, now 6)", train, *run, "--seed=6")
    fails(1, "lr (was 0.001, now 0.01)", train, *run, "--lr=1e-2")
    fails(1, "other options: --cbase (was 4, now 32)", train, *run, "--cbase=32")
    fails(1, "lr (was", train, *run, "--lr=1e-2", "-n")
    more = ["--ema=0.2", "--warmup=0.003", "--clip=1", "--lr-decay=cosine", "--duration=0.002"]
    told = "--lr-decay (was none, now cosine); --warmup (was 0.0, now 0.003); --ema (was 0.5, now 0.2); --clip (was not"
    fails(1, [f"other options: {told} given, now 1.0). Use"], train, *run, *more)
    other = [f"--data={make_dataset(tmp_path.parent / f'{tmp_path.name}.zip', count=41)}", *run[1:]]
    fails(1, ["the content of --data (was ", "...); number of images (was 40, now 41)"], train, *other)
    (tmp_path / "training-state-000001.pt").unlink()
    fails(1, "lr (was", train, *run, "--lr=1e-2")  # without a state too: it would write over the snapshots
    (tmp_path / "training_options.json").rename(tmp_path / "options")
    fails(1, "another --outdir", train, *run)
    (tmp_path / "options").rename(tmp_path / "training_options.json")
    del before["training-state-000001.pt"]
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_results_among_the_data_are_refused(files, fails, tmp_path):
    """They would be data on the next start."""
    with zipfile.ZipFile(files / "good.zip") as archive:
        archive.extractall(tmp_path / "photos")
    for out in ("photos", "photos/out", "photos/../photos/00000/x"):
        run = [f"--data={tmp_path / 'photos'}", f"--outdir={tmp_path / out}"]
        fails(2, ["lies in --data=", "become part of the data"], train, *run, *SHORT)
        fails(2, "lies in --data=", distill, *run, *LADDER, f"--transfer={files / 'four.pkl'}", "--num_steps=4")
    assert not list((tmp_path / "photos").rglob("*.pkl"))
    assert call(train, f"--data={tmp_path / 'photos'}", *SHORT, f"--outdir={tmp_path / 'photos2'}", "-n") == 0


def test_a_finished_run_elsewhere_is_completed(files, tmp_path, capsys):
    run = [f"--data={files / 'good.zip'}", *SHORT, f"--outdir={tmp_path / 'new'}"]
    assert call(train, *run, f"--resume={files / 'run/state.pt'}") == 0
    said = capsys.readouterr().out
    assert "done already" in said and "stats.jsonl" not in said
    original = load_network(files / "run/network-snapshot-000001.pkl").net.state_dict()
    for name, tensor in load_network(tmp_path / "new/network-snapshot-000001.pkl").net.state_dict().items():
        assert torch.equal(tensor, original[name])


def test_places_that_cannot_be_written(files, fails, tmp_path):
    """A path under a plain file: found before the work, whatever the option is called."""
    file = tmp_path / "file"
    file.write_text("here first")
    data, student = files / "good.zip", f"--network={files / 'student.pkl'}"
    for place in (file, file / "in it"):
        fails(1, str(place), train, f"--data={data}", *SHORT, f"--outdir={place}")
        fails(1, str(place), train, f"--data={data}", *SHORT, f"--outdir={place}", "-n")
        teacher = [f"--transfer={files / 'teacher.pkl'}", "--num_steps=4", *LADDER]
        fails(1, str(place), distill, f"--data={data}", *teacher, f"--outdir={place}")
        fails(1, str(file), generate, student, f"--outdir={place}", "--seeds=0")
        fails(1, str(file), dataset_tool, f"--source={data}", f"--dest={place}")
    for deep in (file / "out.zip", file / "in it" / "out.zip"):
        fails(1, str(file), generate, student, f"--outdir={deep}", "--seeds=0")
        fails(1, str(file), dataset_tool, f"--source={data}", f"--dest={deep}")
        fails(1, str(file), fid, "detector", f"--data={data}", f"--dest={deep}")
        fails(1, str(file), fid, "ref", f"--data={data}", f"--dest={deep}", f"--detector={files / 'nowhere.pt'}")
        fails(1, str(file), example, student, f"--out={deep.with_suffix('.png')}")
    fails(2, "--desc", train, f"--data={data}", *SHORT, f"--outdir={tmp_path / 'run'}", "--desc=a/b")
    fails(2, "--outdir is empty", train, f"--data={data}", *SHORT, "--outdir=")
    fails(1, "directory", fid, "detector", f"--data={data}", f"--dest={tmp_path}")
    assert file.read_text() == "here first" and list(tmp_path.iterdir()) == [file]


def test_other_peoples_files_are_not_replaced(files, fails, tmp_path):
    data = rebuilt(files / "good.zip", tmp_path / "data.zip", {})
    before = data.read_bytes()
    fails(1, ["data.zip", "manifest.json"], generate, f"--network={files / 'student.pkl'}", f"--outdir={data}")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "diary.txt").write_text("dear diary")
    fails(1, "not empty", dataset_tool, f"--source={data}", f"--dest={tmp_path / 'full'}")
    broken = rebuilt(files / "mid-cut.zip", tmp_path / "broken.zip", {})
    content = broken.read_bytes()
    fails(1, "img00000017", dataset_tool, f"--source={broken}", f"--dest={broken}")
    assert broken.read_bytes() == content and data.read_bytes() == before
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["diary.txt"]


# ----------------------------------------------------------------------------------------------------------------------
# Disks and interruptions


class FullDisk:
    """A file on a disk with room for so many bytes."""

    def __init__(self, file: Any, room: int) -> None:
        self.file, self.room = file, room

    def write(self, data: Any) -> int:
        size = memoryview(data).nbytes
        if size > self.room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.room -= size
        return int(self.file.write(data))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def __enter__(self) -> FullDisk:
        return self

    def __exit__(self, *exc: object) -> None:
        self.file.close()


@pytest.mark.parametrize("moment", ["at the first byte", "in the middle", "at the flush"])
def test_a_full_disk_ends_a_run_and_costs_nothing(moment, files, fails, tmp_path, monkeypatch, capsys):
    """The disk fills while the third rolling state is written; the two before are whole, and the next start goes on."""
    run = [f"--data={files / 'good.zip'}", *SMALL, f"--outdir={tmp_path}", "--duration=0.001", "--save-every=0"]
    written = 0

    def fdopen(fd: int, *args: Any) -> Any:
        file = os.fdopen(fd, *args)
        full = written == 3 and moment != "at the flush"
        return FullDisk(file, 0 if moment == "at the first byte" else 10_000) if full else file

    def fsync(fd: int) -> None:
        if written == 3 and moment == "at the flush":
            raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    original = state.save_state

    def count(*args: Any) -> None:
        nonlocal written
        written += 1
        original(*args)

    with monkeypatch.context() as patch:
        proxy = SimpleNamespace(**{**vars(os), "fdopen": fdopen, "fsync": fsync})
        patch.setattr(atomic, "os", proxy)
        patch.setattr(state, "save_state", count)
        fails(1, ["disk is full", state.rolling_name(300)], train, *run)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert [name for name in names if "state" in name] == [state.rolling_name(100), state.rolling_name(200)]
    assert not any("tmp" in name for name in names)
    for path in state.list_states(tmp_path):
        state.load_state(path)
    assert call(train, *run) == 0
    assert "Resuming from" in capsys.readouterr().out
    assert load_network(tmp_path / "network-snapshot-000001.pkl").net.img_resolution == 8


@pytest.mark.parametrize("name", ["stats.jsonl", "training_options.json"])
def test_every_file_of_a_run_meets_a_full_disk(name, files, fails, tmp_path, monkeypatch):
    run = [f"--data={files / 'good.zip'}", *SMALL, f"--outdir={tmp_path}", "--duration=0.001"]

    def full_open(path: Any) -> Any:
        file = original_open(path)
        return FullDisk(file, 0) if Path(path).name == name and len(seen) > 3 else file

    seen: list[str] = []
    original_append, original_write = atomic.append_text, atomic.atomic_write
    original_open = atomic.open_for_append

    def append(path: Any, text: str) -> None:
        seen.append(name)
        original_append(path, text)

    def write(path: Any) -> Any:
        if Path(path).name == name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return original_write(path)

    with monkeypatch.context() as patch:
        patch.setattr(atomic, "open_for_append", full_open)
        patch.setattr("engine.loop.append_text", append)
        patch.setattr(atomic, "atomic_write", write)
        patch.setattr("formats.network_files.atomic_write", write)
        fails(1, ["disk is full", name], train, *run)
    if (tmp_path / "stats.jsonl").exists():
        for line in (tmp_path / "stats.jsonl").read_text().splitlines():
            json.loads(line)
    assert call(train, *run) == 0
    lines = (tmp_path / "stats.jsonl").read_text().splitlines()
    assert [json.loads(line)["Progress/tick"]["mean"] for line in lines] == list(range(len(lines)))


def test_appending_is_all_or_nothing(tmp_path, monkeypatch):
    path = tmp_path / "log.txt"
    atomic.append_text(path, "first ü\n")

    class Filling(io.FileIO):
        def write(self, data: Any) -> int:
            if len(data) <= 3:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return super().write(data[:3])

    monkeypatch.setattr(atomic, "open_for_append", lambda path: Filling(path, "a"))
    with pytest.raises(OSError, match=r"log\.txt"):
        atomic.append_text(path, "second, which does not fit\n")
    assert path.read_text(encoding="utf-8") == "first ü\n"


def test_a_full_disk_under_the_other_scripts(files, fails, tmp_path, monkeypatch):
    def fsync(fd: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    student = [f"--network={files / 'student.pkl'}", "--seeds=0-3"]
    (tmp_path / "old.zip").write_bytes((files / "rgb.zip").read_bytes())
    monkeypatch.setattr(atomic.os, "fsync", fsync)
    fails(1, ["disk is full", "out.zip"], generate, *student, f"--outdir={tmp_path / 'out.zip'}")
    fails(1, ["disk is full", "old.zip"], dataset_tool, f"--source={files / 'good.zip'}", f"--dest={tmp_path}/old.zip")
    fails(1, ["disk is full", "a.png"], example, *student, f"--out={tmp_path / 'a.png'}")
    detector = [f"--data={files / 'good.zip'}", f"--dest={tmp_path / 'detector.pt'}", "--kimg=0.1"]
    fails(1, ["disk is full", "detector.pt"], fid, "detector", *detector)
    assert [path.name for path in tmp_path.iterdir()] == ["old.zip"], "no parts, no temporary files"
    assert (tmp_path / "old.zip").read_bytes() == (files / "rgb.zip").read_bytes()


def test_control_c_ends_a_run_in_one_line(files, fails, tmp_path, monkeypatch):
    run = [f"--data={files / 'good.zip'}", *SMALL, f"--outdir={tmp_path}", "--duration=0.001", "--save-every=0"]
    original = Trainer.step

    def step(self: Trainer, loader: Loader) -> None:
        if self.step_count == 3:
            signal.raise_signal(signal.SIGINT)
        original(self, loader)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", step)
        fails(130, "interrupted", train, *run)
    assert not reading_threads()
    assert call(train, *run) == 0


# ----------------------------------------------------------------------------------------------------------------------
# Fréchet distances


@pytest.fixture(scope="module")
def detector(files: Path) -> Path:
    path = files / "detector.pt"
    assert call(fid, "detector", f"--data={files / 'good.zip'}", f"--dest={path}", "--kimg=0.2") == 0
    assert call(fid, "ref", f"--data={files / 'good.zip'}", f"--dest={files / 'ref.npz'}", f"--detector={path}") == 0
    return path


def test_images_and_detectors_that_cannot_be_measured(files, detector, fails, tmp_path, capsys):
    ref, ours = f"--ref={files / 'ref.npz'}", f"--detector={detector}"
    good = f"--images={files / 'good.zip'}"
    fails(1, ["40 images", "50000", "--num-images=40"], fid, "calc", good, ref, ours)
    fails(1, "set --num-images=40", fid, "calc", good, ref, ours, "--num=41")
    for name, words in {**NO_DATA, **BAD_IMAGE, "rgb.zip": "3 channels"}.items():
        fails(1, words, fid, "calc", f"--images={files / name}", ref, ours, "--num-images=40")
        assert capsys.readouterr().out == "", "no number"
    for name in ("text", "empty", "teacher.pkl", "run/state.pt", "good.zip"):
        fails(1, [name, "not a detector file"], fid, "calc", good, ref, f"--detector={files / name}", "--num-images=40")
    for name, words in (("nan.pkl", "NaN"), ("rgb.pkl", "3 channels"), ("size16.pkl", "16x16"), ("cut.pkl", "cut off")):
        fails(1, words, fid, "gen", f"--network={files / name}", ref, ours, "--num=2", "--steps=1")
    student = f"--network={files / 'student.pkl'}"
    fails(2, "--steps=4", fid, "gen", student, ref, ours, "--num=4", "--steps=5")
    fails(2, "no classes", fid, "gen", student, ref, ours, "--num=4", "--class=0")
    fails(2, "two different seeds", fid, "gen", student, ref, ours, "--seeds=7,7")
    fails(2, "--seed", fid, "detector", f"--data={files / 'good.zip'}", f"--dest={tmp_path}/d", "--seed=1" + "0" * 30)
    fails(1, "img00000017", fid, "ref", f"--data={files / 'mid-cut.zip'}", ours, f"--dest={tmp_path / 'new.npz'}")
    assert list(tmp_path.iterdir()) == []


# ----------------------------------------------------------------------------------------------------------------------
# Names, and the helpers behind all this


def test_names_with_spaces_and_letters_of_the_world(files, tmp_path):
    folder = tmp_path / "Œuvre № 1 数字"
    folder.mkdir()
    data = folder / "смайлы ☺.zip"
    assert call(dataset_tool, f"--source={files / 'good.zip'}", f"--dest={data}") == 0
    assert call(train, f"--data={data}", *SMALL, f"--outdir={folder / 'a run'}", "--duration=0.001") == 0
    network = folder / "a run" / "network-snapshot-000000.pkl"
    assert call(generate, f"--network={network}", "--steps=1", "--seeds=0-3", f"--outdir={folder / 'bild er.zip'}") == 0
    assert call(fid, "detector", f"--data={data}", f"--dest={folder / 'détecteur'}", "--kimg=0.1") == 0
    with zipfile.ZipFile(folder / "bild er.zip") as archive:
        assert "000003.png" in archive.namelist()


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere file names are text")
def test_a_name_that_is_no_text(files, tmp_path):
    """Bytes that are not UTF-8, on a terminal that knows ASCII alone."""
    data = os.fsdecode(os.fsencode(tmp_path) + b"/\xff.zip")
    Path(data).write_bytes((files / "good.zip").read_bytes())
    command = [sys.executable, ROOT / "train.py", f"--data={data}", *SHORT, "--outdir=o", "-n"]
    env = {**os.environ, "PYTHONIOENCODING": "ascii"}
    result = subprocess.run(command, env=env, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "\\udcff.zip, 40 images" in result.stdout


def test_messages_for_what_happens_to_a_process(monkeypatch):
    gloo = RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]")
    assert "please report" in cli._message(gloo), "alone there is no peer"
    monkeypatch.setenv("WORLD_SIZE", "2")
    lost = "another process has ended"
    assert cli._message(gloo).startswith(lost)
    assert cli._message(RuntimeError("Timed out waiting 600000ms for recv operation to complete")).startswith(lost)
    assert cli._message(type("DistBackendError", (RuntimeError,), {})("NCCL error")).startswith(lost)
    assert "please report" in cli._message(ValueError("socket"))
    for text in ("DefaultCPUAllocator: can't allocate memory: you tried ...", "std::bad_alloc", "CUDA out of memory."):
        assert cli._message(RuntimeError(text)).startswith("out of memory")
    assert "nested too deeply" in cli._message(RecursionError("maximum recursion depth exceeded"))
    assert "is a file" in cli._message(FileExistsError(errno.EEXIST, "File exists", "some/file"))


def test_a_failure_of_another_process_needs_no_words(capsys, monkeypatch):
    @cli.command(name="script")
    def command() -> None:
        raise cli.FailedElsewhere("rank 0 has failed")

    monkeypatch.setattr(cli.time, "sleep", lambda seconds: None)
    assert cli.run(command, []) == 1
    assert capsys.readouterr().err == ""


def test_kinds_of_values():
    def convert(kind: click.ParamType, value: str) -> Any:
        return kind.convert(value, None, None)

    assert convert(cli.Number(min=0, also=math.inf), "inf") == float("inf")
    assert convert(cli.Bool(), "Yes") is True and convert(cli.Bool(), "0") is False
    assert convert(cli.Choice(["edm_a", "b"]), "edm-a") == "edm_a"
    assert convert(cli.IntList(min=1), "1-3,7") == [1, 2, 3, 7]
    for kind, value in ((cli.Number(also=math.inf), "nan"), (cli.Choice(["b"]), "B"), (cli.IntList(min=1), "0-3")):
        with pytest.raises(click.BadParameter):
            convert(kind, value)


# ----------------------------------------------------------------------------------------------------------------------
# Several processes


def test_under_a_launcher_every_rank_says_what_is_wrong(files, tmp_path):
    """And the job ends at once: nobody waits for a process that is gone."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", ROOT / "train.py"]
    run = [f"--data={files / 'good.zip'}", *SHORT, "--batch=13", f"--outdir={tmp_path / 'run'}"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    start = time.monotonic()
    result = subprocess.run([*command, *run], env=env, capture_output=True, text=True, timeout=120)
    assert result.returncode != 0 and time.monotonic() - start < 60
    lines = [line for line in result.stderr.splitlines() if line.startswith("train.py")]
    assert any(
        line.endswith("error: --batch=13 cannot be shared by 2 processes; use a multiple of 2") for line in lines
    )
    assert len(lines) <= 2 and all("]: error: " in line for line in lines), result.stderr
    assert 'train.py", line' not in result.stderr, "no traceback of ours"
    assert not (tmp_path / "run").exists()
