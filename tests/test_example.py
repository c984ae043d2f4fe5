"""example.py: a picture of samples, from the bundled student or any other network."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import example
from helpers import load_recipe, small_network
from training.grids import Sampling, network_grid
from training.network_files import load_network, save_network
from training.pictures import to_uint8
from training.sampling import iterate_images


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """These networks are so small that threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    net = small_network(channels=3, label_dim=3)
    load_recipe(net, 5)
    path = tmp_path_factory.mktemp("networks") / "student.pkl"
    save_network(path, net, sampling=Sampling(network_grid(net, 4).every(2)))
    return path


def test_picture(student: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
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


def test_steps(student: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [f"--network={student}", "--seeds=0", f"--out={tmp_path / 'a.png'}", "--device=cpu"]
    assert example.main([*arguments, "--steps=4"]) == 0
    assert example.main([*arguments, "--steps=3"]) == 2
    assert "--steps=3: this network was distilled for 2; use --steps=2" in capsys.readouterr().err


def test_bundled_network_is_the_default(
    student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
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
        (["--seeds=3-1"], 2, "--seeds names no seed"),
        (["--out=grid.jpg"], 2, "use a name that ends in .png"),
        (["--network=missing.pkl"], 1, "missing.pkl"),
    ],
)
def test_mistakes(options: list[str], status: int, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert example.main(options) == status
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
