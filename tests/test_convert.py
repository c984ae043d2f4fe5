"""convert.py: between the formats, exact, and nothing lost without a word."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

import convert
from formats.network_files import load_network, save_network
from helpers import load_recipe, small_network
from test_network_files import SAMPLING, edm_file, foreign_file

EXTRA = {"loss_fn": {"class_name": "EDMLoss", "P_mean": -1.2}, "training_options": {"kimg": 0.5, "lr": [1e-3, [0.9]]}}


def make(path: Path, **changes: Any) -> None:
    net = small_network(**changes)
    load_recipe(net, 3)
    save_network(path, net, sampling=SAMPLING, dataset_kwargs={"path": "x.zip", "max_size": None}, extra=EXTRA)


def test_there_and_back_is_the_same_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b, c = tmp_path / "a.pkl", tmp_path / "b.safetensors", tmp_path / "c.pkl"
    make(a, augment_dim=9, label_dim=3)
    assert convert.main([str(a), str(b)]) == 0
    said = capsys.readouterr().out
    assert "Found EDM pickle" in said and "student of 3 steps" in said and f"Wrote {b}" in said
    assert convert.main([str(b), str(c)]) == 0
    assert a.read_bytes() == c.read_bytes()
    old, new = load_network(a), load_network(b)
    assert new.format == "safetensors" and (old.sampling, old.extra) == (new.sampling, new.extra)
    assert new.extra["training_options"] == EXTRA["training_options"]
    header = b.read_bytes()[8 : 8 + int.from_bytes(b.read_bytes()[:8], "little")]
    told = json.loads(json.loads(header)["__metadata__"]["edm_network"])  # what a reader in another language does
    assert told["class_name"] == "EDMPrecond" and told["entries"]["sampling"]["levels"] == list(SAMPLING.grid.levels)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.pkl", "b.safetensors", "c.pkl"]


def test_a_bare_state_dict(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(tmp_path / "a.pkl")
    assert convert.main([str(tmp_path / "a.pkl"), str(tmp_path / "a.pt")]) == 0
    assert "without its noise grid" in capsys.readouterr().out
    net = load_network(tmp_path / "a.pkl").net
    weights = torch.load(tmp_path / "a.pt", weights_only=True)
    assert list(weights) == list(net.state_dict())
    assert all(torch.equal(weights[name], tensor) for name, tensor in net.state_dict().items())
    fresh = small_network()
    fresh.load_state_dict(weights)


def test_half_precision_is_kept_unless_told_otherwise(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, half, safe, back, whole = (
        tmp_path / f"{name}" for name in ("a.pkl", "b.pkl", "b.safetensors", "c.pkl", "d.pkl")
    )
    make(a)
    for source, target, *more in ((a, half, "--half=1"), (half, safe), (safe, back), (half, whole, "--half=0")):
        assert convert.main([str(source), str(target), *more]) == 0
    assert half.read_bytes() == back.read_bytes() and safe.stat().st_size < 0.7 * a.stat().st_size
    assert [load_network(each).half for each in (a, half, safe, whole)] == [False, True, True, False]
    assert "half precision" in load_network(half).describe()
    pairs = zip(load_network(safe).net.named_parameters(), load_network(a).net.parameters(), strict=True)
    assert all(torch.equal(halved, before.half().float()) for (_, halved), before in pairs)
    net = small_network()
    with torch.no_grad():
        next(net.parameters()).fill_(1e6)
    save_network(a, net)
    assert convert.main([str(a), str(tmp_path / "e.pkl"), "--half=1"]) == 1
    assert "float16" in capsys.readouterr().err and not (tmp_path / "e.pkl").exists()


def test_edms_files_lose_only_what_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edm_file(tmp_path / "a.pkl", entries={"optimizer": [torch.zeros(3)], "notes": {"x": 1}})
    assert convert.main([str(tmp_path / "a.pkl"), str(tmp_path / "b.safetensors")]) == 0
    assert "left out: optimizer" in capsys.readouterr().out
    assert load_network(tmp_path / "b.safetensors").extra["notes"] == {"x": 1}
    assert not (tmp_path / "TRAP").exists()


def test_wrong_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(tmp_path / "a.pkl")
    (tmp_path / "there.pkl").write_bytes(b"precious")
    (tmp_path / "bad.pkl").write_bytes(b"\x80\x04.")
    (tmp_path / "dangling.pkl").symlink_to(tmp_path / "nowhere")
    os.link(tmp_path / "a.pkl", tmp_path / "same.pkl")
    a = str(tmp_path / "a.pkl")
    for args, status, words in (
        ([a, a], 2, "same file"),
        ([a, str(tmp_path / "same.pkl"), "--overwrite"], 2, "same file"),
        ([a, str(tmp_path / "there.pkl")], 1, "--overwrite"),
        ([a, str(tmp_path / "b.onnx")], 2, ".safetensors"),
        ([a, str(tmp_path / "b")], 2, ".safetensors"),
        ([a, str(tmp_path)], 2, "must end in"),
        ([a], 2, "DST"),
        ([str(tmp_path / "none.pkl"), str(tmp_path / "b.pkl")], 1, "no such file"),
        ([str(tmp_path / "bad.pkl"), str(tmp_path / "b.pkl")], 1, "bad.pkl"),
        ([str(tmp_path / "bad.pkl"), str(tmp_path / "there.pkl"), "--overwrite"], 1, "bad.pkl"),
        ([a, str(tmp_path / "there.pkl" / "b.pkl")], 1, "there.pkl"),
        ([a, "/proc/none/b.pkl"], 1, "/proc"),
        ([f"file://{a}", a, "--overwrite"], 2, "same file"),
        ([a, "https://example.org/b.pkl"], 2, "is an address"),
        ([a, f"file://{tmp_path}/b.pkl"], 2, "is an address"),
        ([a, str(tmp_path / "dangling.pkl")], 1, "exists already"),
    ):
        assert convert.main(args) == status, args
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1 and "unexpected" not in error, error
    assert (tmp_path / "there.pkl").read_bytes() == b"precious"
    for source in (a, f"file://{a}"):
        assert convert.main([source, str(tmp_path / "there.pkl"), "--overwrite"]) == 0
        assert (tmp_path / "there.pkl").read_bytes() == (tmp_path / "a.pkl").read_bytes()


def test_a_network_of_foreign_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It can stay a pickle with its own code, or become bare weights; safetensors can't say how it is built."""
    foreign_file(tmp_path / "net.pkl")
    source = str(tmp_path / "net.pkl")
    assert convert.main([source, str(tmp_path / "b.pt")]) == 1 and "--trust-network-code" in capsys.readouterr().err
    assert convert.main([source, str(tmp_path / "b.pt"), "--trust-network-code"]) == 0
    assert torch.load(tmp_path / "b.pt", weights_only=True)["scale"] == 3
    assert convert.main([source, str(tmp_path / "b.safetensors"), "--trust-network-code"]) == 1
    assert "which only a .pkl can carry" in capsys.readouterr().err and not (tmp_path / "b.safetensors").exists()
    capsys.readouterr()
    assert convert.main([source, str(tmp_path / "b.pkl"), "--trust-network-code"]) == 0
    assert "carries the file's code on, so all that load it need --trust-network-code" in capsys.readouterr().out
    assert load_network(tmp_path / "b.pkl", trust_network_code=True).net.scale == 3


def test_a_bare_state_dict_and_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All but the weights is as in --like: here another network of the same kind."""
    like, bare, back = tmp_path / "like.pkl", tmp_path / "weights.pt", tmp_path / "back.pkl"
    make(like)
    net = small_network()
    load_recipe(net, 4)
    for half in (False, True):
        torch.save({name: tensor.half() if half else tensor for name, tensor in net.state_dict().items()}, bare)
        assert convert.main([str(bare), str(back), f"--like={like}", "--overwrite"]) == 0
        assert f"such a network in {bare}" in capsys.readouterr().out
        old, new = load_network(like), load_network(back)
        assert (new.sampling, new.dataset_kwargs, new.extra) == (old.sampling, old.dataset_kwargs, old.extra)
        weights = {name: tensor.half().float() if half else tensor for name, tensor in net.state_dict().items()}
        assert all(torch.equal(weights[name], tensor) for name, tensor in new.net.state_dict().items())
        assert new.half is half
    assert convert.main([str(like), str(bare), "--overwrite"]) == 0
    assert convert.main([str(bare), str(back), f"--like={like}", "--overwrite"]) == 0
    assert back.read_bytes() == like.read_bytes()
    safetensors.torch.save_file(load_network(like).net.state_dict(), tmp_path / "bare.safetensors")
    assert convert.main([str(tmp_path / "bare.safetensors"), str(back), f"--like={like}", "--overwrite"]) == 0
    assert back.read_bytes() == like.read_bytes()
    assert convert.main([str(tmp_path / "bare.safetensors"), str(tmp_path / "no.pkl")]) == 1
    assert "(convert.py --like does)" in capsys.readouterr().err
    assert convert.main([str(bare), str(tmp_path / "no.pkl")]) == 1 and "convert.py --like" in capsys.readouterr().err
    weights = net.state_dict()
    name = next(iter(weights))
    for content, words in (
        ({**weights, "odd": torch.zeros(2)}, "has odd, which the network does not"),
        ({**weights, name: torch.zeros(2)}, f"{name}: [2], not ["),
        ({"net": weights, "step": 3}, "is no bare state dict"),
        (small_network, "is no state dict that torch.save wrote"),
    ):
        torch.save(content, bare)
        assert convert.main([str(bare), str(tmp_path / "no.pkl"), f"--like={like}"]) == 1
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1 and str(bare) in error, error
    assert not (tmp_path / "no.pkl").exists()


def test_help_comes_without_torch() -> None:
    code = "import sys, convert; assert convert.main(['--help']) == 0; assert 'torch' not in sys.modules"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(convert.__file__).parent, capture_output=True, text=True
    )
    assert done.returncode == 0 and "safetensors" in done.stdout, done.stderr


def test_settings_that_are_no_numbers_and_entries_that_are_odd(tmp_path: Path, capsys: Any) -> None:
    """NaN is not equal to itself, and yet kept; what can't be kept is named."""
    entries = {"odd": {"x": float("nan"), "y": float("inf")}, "none": None, 7: "seven", "dataset_kwargs": "cifar"}
    edm_file(tmp_path / "a.pkl", entries=entries)
    assert convert.main([str(tmp_path / "a.pkl"), str(tmp_path / "b.safetensors")]) == 0
    assert "left out: 7, dataset_kwargs" in capsys.readouterr().out
    extra = load_network(tmp_path / "b.safetensors").extra
    assert repr(extra["odd"]) == "{'x': nan, 'y': inf}" and extra["none"] is None
    net = small_network()
    with torch.no_grad():
        next(net.parameters()).view(-1)[:3] = torch.tensor([float("nan"), float("inf"), -float("inf")])
    save_network(tmp_path / "c.pkl", net)
    assert convert.main([str(tmp_path / "c.pkl"), str(tmp_path / "d.safetensors")]) == 0
    kept = next(load_network(tmp_path / "d.safetensors").net.parameters()).view(-1)[:3]
    assert kept[0].isnan() and kept[1:].tolist() == [float("inf"), -float("inf")]
