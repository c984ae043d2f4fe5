"""example.py: a picture of samples, from the bundled student or any other network."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import example
from formats.network_files import load_network, save_network
from helpers import load_recipe, make_dataset, small_network
from test_network_files import Persistent, module_state
from training.grids import Sampling, network_grid
from training.pictures import to_uint8
from training.sampling import iterate_images


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    net = small_network(channels=3, label_dim=3)
    load_recipe(net, 5)
    path = tmp_path_factory.mktemp("networks") / "student.pkl"
    save_network(path, net, sampling=Sampling(network_grid(net, 4).every(2)))
    return path


def test_picture(student, tmp_path, capsys):
    """Seven images in a grid of three by three, each pixel of them enlarged to a square."""
    out = tmp_path / "new" / "grid.png"
    assert example.main([f"--network={student}", "--seeds=5,0-5", f"--out={out}", "--device=cpu"]) == 0
    assert "2 steps of euler, distilled from 4" in capsys.readouterr().out
    batches = list(iterate_images(load_network(student), [5, 0, 1, 2, 3, 4, 5], device="cpu"))
    wanted = to_uint8(batches[0].images.double()).permute(0, 2, 3, 1).numpy()
    with Image.open(out) as picture:
        pixels = np.asarray(picture.convert("RGB"))
    scale = pixels.shape[0] // 24
    assert scale >= 4 and pixels.shape == (24 * scale + 4, 24 * scale + 4, 3)  # a white line between images
    for index, image in enumerate(wanted):
        row, column = divmod(index, 3)
        tile = pixels[row * (8 * scale + 2) :, column * (8 * scale + 2) :][: 8 * scale, : 8 * scale]
        assert np.array_equal(tile, image.repeat(scale, 0).repeat(scale, 1))


def test_one_class(student, tmp_path, capsys):
    arguments = [f"--network={student}", "--seeds=0-5", "--device=cpu"]
    for name, more in (("a", ["--class=1"]), ("b", ["--class=2"]), ("c", [])):
        assert example.main([*arguments, *more, f"--out={tmp_path / name}.png"]) == 0
    assert len({(tmp_path / f"{name}.png").read_bytes() for name in "abc"}) == 3
    assert example.main([*arguments, "--class=3", f"--out={tmp_path}/d.png"]) == 2
    assert "this network's classes are 0 to 2" in capsys.readouterr().err


def test_bundled_network_is_the_default(student, tmp_path, monkeypatch, capsys):
    """`python example.py` alone: the bundled file, `example.png` in the current folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(example, "BUNDLED", student)
    assert example.main([]) == 0
    with Image.open("example.png") as picture:
        assert picture.width == picture.height >= 384
    assert "64 images in example.png" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "status", "message"),
    [
        (["--seeds=3-1"], 2, "names no seed"),
        (["--out=grid.jpg"], 2, "use a name that ends in .png"),
        (["--network=missing.pkl"], 1, "missing.pkl"),
    ],
)
def test_mistakes(options, status, message, capsys):
    assert example.main(options) == status
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_every_script_that_reads_a_network_knows_the_option_that_its_message_names(tmp_path, capsys):
    """A network of an unknown class: the refusal says --trust-network-code, and every script that says so has it."""
    import convert
    import distill
    import fid
    import generate
    import train

    path = tmp_path / "foreign.pkl"
    path.write_bytes(pickle.dumps({"ema": Persistent("Wonder", module_state({}), "x = 1\n")}))
    data = make_dataset(tmp_path / "data.zip", count=8)
    for script, args in (
        (example, [f"--network={path}", f"--out={tmp_path / 'a.png'}"]),
        (generate, [f"--network={path}", f"--outdir={tmp_path / 'out'}"]),
        (fid, ["gen", f"--network={path}", "--ref=none.npz", "--num=10"]),
        (train, [f"--transfer={path}", f"--data={data}", f"--outdir={tmp_path / 'run'}", "--precond=edm_distillation"]),
        (distill, [f"--transfer={path}", f"--data={data}", f"--outdir={tmp_path / 'ladder'}", "--num_steps=4"]),
        (convert, [str(path), str(tmp_path / "b.pkl")]),
    ):
        assert script.main(args) in (1, 2), script
        error = capsys.readouterr().err
        assert "Wonder" in error or "none.npz" in error, error
        assert script.main([args[0], "--help"] if script is fid else ["--help"]) == 0
        assert "--trust-network-code" in capsys.readouterr().out, script
