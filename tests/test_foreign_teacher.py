"""Teachers whose classes their files bring along (--trust-network-code): distilled as they are, or refused at once."""

from __future__ import annotations

import pickle
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import distill
import example
import generate
import train
from dnnlib.errors import UserError
from formats.network_files import load_network
from helpers import make_dataset
from training import networks

TRUST = "--trust-network-code"
Capture = pytest.CaptureFixture[str]

# Another name, another structure, dropout elsewhere, no sigma_min, sigma_max, round_sigma; parts of torch's own.
OTHER = """
import torch
from torch_utils import persistence

@persistence.persistent_class
class Body(torch.nn.Module):
    class Note:
        pass

    def __init__(self, channels, width=8):
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Conv2d(channels, width, 3, padding=1), torch.nn.Dropout(0.1))
        self.out = torch.nn.Conv2d(width, channels, 3, padding=1)
        self.table = torch.ones(3)  # neither parameter nor buffer

    def forward(self, x, noise):
        return self.out(torch.relu(self.layers(x) + noise * self.table[0]))

@persistence.persistent_class
class ECMPrecond(torch.nn.Module):
    def __init__(self, img_resolution, img_channels, label_dim=0):
        super().__init__()
        self.img_resolution, self.img_channels, self.label_dim, self.use_fp16 = img_resolution, img_channels, label_dim, True
        self.model = Body(img_channels)

    def forward(self, x, sigma, class_labels=None, **kwargs):
        x, sigma = x.float(), torch.as_tensor(sigma).float().reshape(-1, 1, 1, 1)
        variance = sigma**2 + 0.25
        return 0.25 / variance * x + 0.5 * sigma / variance.sqrt() * self.model(x / variance.sqrt(), sigma.log() / 4)
"""
# A known name, with a buffer that its formula uses.
OWN: str = networks.EDMPrecond._orig_module_src  # type: ignore[attr-defined]
BUFFER = OWN.replace(
    "        self.sigma_data = sigma_data\n",
    '        self.sigma_data = sigma_data\n        self.register_buffer("shift", torch.full([1], 0.25))\n',
).replace("sigma.log() / 4", "sigma.log() / 4 + self.shift")
ARGUMENTS = {
    OTHER: ("ECMPrecond", (8, 1)),
    BUFFER: ("EDMPrecond", (8, 1, 0, False, 0, 80.0, 0.5, "SongUNet")),
}


def forget() -> None:
    """Forgets all code that files have brought, as a new process would."""
    for name in [name for name in sys.modules if name.startswith("_network_code_")]:
        del sys.modules[name]


@pytest.fixture(autouse=True)
def _forgotten() -> Iterator[None]:
    forget()
    yield
    forget()


def foreign_file(path: Path, source: str, name: str, args: tuple[Any, ...], **kwargs: Any) -> Any:
    """Pickles a network of these classes as EDM does."""
    module = ModuleType("fork")
    module.__dict__["__source__"] = source
    sys.modules["fork"] = module
    try:
        exec(source, module.__dict__)
        torch.manual_seed(0)
        net = getattr(module, name)(*args, **kwargs).eval().requires_grad_(False)
        path.write_bytes(pickle.dumps({"ema": net}))
    finally:
        del sys.modules["fork"]
    return net


def teacher_file(folder: Path, source: str) -> Any:
    name, args = ARGUMENTS[source]
    small = {"model_channels": 8, "channel_mult": [1], "num_blocks": 1, "attn_resolutions": []}
    make_dataset(folder / "data.zip", classes=None)
    return foreign_file(folder / "teacher.pkl", source, name, args, **(small if source is BUFFER else {}))


def run(folder: Path, *more: str, outdir: str = "run", transfer: str = "teacher.pkl") -> int:
    files = [f"--outdir={folder / outdir}", f"--data={folder / 'data.zip'}", f"--transfer={folder / transfer}"]
    settings = ["--precond=edm_distillation", "--batch=250", "--seed=1", "--nosubdir", "--duration=0.001", TRUST]
    return train.main([*files, *settings, *more])


@pytest.mark.parametrize("source", ARGUMENTS, ids=["another class", "a known name"])
def test_a_stage_a_resumed_one_and_the_next(tmp_path: Path, source: str, capsys: Capture) -> None:
    teacher = teacher_file(tmp_path, source)
    name = type(teacher).__name__
    with pytest.raises(UserError, match="--trust-network-code"):
        load_network(tmp_path / "teacher.pkl")
    assert run(tmp_path, "--num_steps=4", "--dry-run") == 0
    said = capsys.readouterr().out
    assert "carries its source text on" in said and "dropout as in the teacher" in said
    assert not (tmp_path / "run").exists()

    long = ["--num_steps=4", "--duration=0.002", "--lr-decay=none"]
    assert run(tmp_path, "--num_steps=4", "--lr-decay=none", "--dump=1") == 0
    forget()
    assert run(tmp_path, *long, outdir="whole") == 0
    forget()
    capsys.readouterr()
    assert run(tmp_path, *long) == 0
    said = capsys.readouterr()
    assert "Resuming from" in said.out and said.err.count("running the source text") == 1
    assert TRUST in said.out.split("generate.py", 1)[1].splitlines()[0]
    students = [
        load_network(tmp_path / each / "network-snapshot-000002.pkl", trust_network_code=True)
        for each in ("run", "whole")
    ]
    resumed, whole = (student.net.state_dict() for student in students)
    assert all(torch.equal(resumed[key], whole[key]) for key in whole) and list(whole) == list(teacher.state_dict())
    assert any(not torch.equal(whole[key], value) for key, value in teacher.state_dict().items())
    assert type(students[0].net).__name__ == name and students[0].sampling is not None
    assert students[0].sampling.lineage[0]["own_code"] is True and "its own code run" in students[0].describe()
    assert (students[0].net.sigma_min, students[0].net.sigma_max) == (0, 80 if source is BUFFER else float("inf"))
    with pytest.raises(UserError, match="--trust-network-code"):
        load_network(tmp_path / "run" / "network-snapshot-000002.pkl")

    forget()
    student = "run/network-snapshot-000002.pkl"
    assert run(tmp_path, outdir="next", transfer=student) == 0
    forget()
    network = f"--network={tmp_path / 'next' / 'network-snapshot-000001.pkl'}"
    assert generate.main([network, f"--outdir={tmp_path / 'images'}", "--seeds=0-1", TRUST]) == 0
    assert (tmp_path / "images" / "000001.png").is_file()


def test_a_ladders_dry_run(tmp_path: Path, capsys: Capture) -> None:
    teacher_file(tmp_path, OTHER)
    files = [f"--data={tmp_path / 'data.zip'}", f"--transfer={tmp_path / 'teacher.pkl'}"]
    settings = [f"--outdir={tmp_path / 'ladder'}", "--num_steps=4", "--duration=0.001", "--batch=16", "--dry-run"]
    assert distill.main([*files, *settings, TRUST]) == 0, capsys.readouterr().err
    assert "4 -> 2" in capsys.readouterr().out and not (tmp_path / "ladder").exists()


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("x, sigma = x.float()", "self.last = lambda: 0; x, sigma = x.float()", "lambda"),
        ("x, sigma = x.float()", "self.last = Body.Note(); x, sigma = x.float()", "no persistent class"),
        ("self.img_channels, ", "self.channels, ", "has no img_channels"),
        ("x, sigma = x.float()", "raise OSError('no such thing'); x, sigma = x.float()", "OSError: no such thing"),
        ("return 0.25", "return torch.zeros(()); 0.25", "can't be distilled"),
    ],
)
def test_what_cannot_be_distilled_is_refused_before_a_folder_is_made(
    tmp_path: Path, old: str, new: str, words: str, capsys: Capture
) -> None:
    make_dataset(tmp_path / "data.zip", classes=None)
    foreign_file(tmp_path / "teacher.pkl", OTHER.replace(old, new), "ECMPrecond", (8, 1))
    for more in ((), ("--dry-run",)):
        assert run(tmp_path, "--num_steps=4", *more) == 1
        error = capsys.readouterr().err.splitlines()[-1]
        assert "ECMPrecond" in error and words in error and "please report" not in error, error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("option", ["--dropout=0.1", "--cbase=8", "--precision=bf16", "--augment=0.1", "--recompute=1"])
def test_options_that_foreign_code_has_no_ear_for(tmp_path: Path, option: str, capsys: Capture) -> None:
    teacher_file(tmp_path, OTHER)
    assert run(tmp_path, "--num_steps=4", option) == 2
    error = capsys.readouterr().err
    assert f"{option.partition('=')[0]}: a network of foreign code (ECMPrecond)" in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("self.img_channels, ", "self.channels, ", "has no img_channels"),
        ("class_labels=None, **kwargs", "", "can't be sampled: TypeError"),
        ("x, sigma = x.float()", "x, sigma = x.no_such_thing()", "can't be sampled: AttributeError"),
    ],
)
def test_what_cannot_be_sampled_ends_in_one_line(
    tmp_path: Path, old: str, new: str, words: str, capsys: Capture
) -> None:
    network = tmp_path / "teacher.pkl"
    foreign_file(network, OTHER.replace(old, new), "ECMPrecond", (8, 1))
    for main, out in ((generate.main, f"--outdir={tmp_path}/out"), (example.main, f"--out={tmp_path}/out.png")):
        assert main([f"--network={network}", out, "--seeds=0-1", TRUST]) == 1
        error = capsys.readouterr().err.splitlines()[-1]
        assert "ECMPrecond" in error and words in error and "report" not in error


def test_a_network_that_does_not_mention_labels_has_none(tmp_path: Path) -> None:
    source = OTHER.replace("self.label_dim, ", "").replace("img_channels, label_dim, True", "img_channels, True")
    foreign_file(tmp_path / "teacher.pkl", source, "ECMPrecond", (8, 1))
    forget()
    assert load_network(tmp_path / "teacher.pkl", trust_network_code=True).net.label_dim == 0
