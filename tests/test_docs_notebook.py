"""Every block of Python in docs/ runs, as it stands; and what docs/notebook.md says of `sample` is true."""

from __future__ import annotations

import importlib.util
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import generate
from dnnlib.cli import UsageError, UserError
from formats.network_files import save_network
from helpers import load_recipe, make_dataset, small_network
from metrics.classifier import train_detector
from training.grids import Sampling, network_grid
from training.network_files import load_network
from training.sampling import sample

ROOT = Path(__file__).parent.parent
PAGES = "".join((ROOT / "docs" / name).read_text(encoding="utf-8") for name in ("notebook.md", "your-own-data.md"))
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGES, re.MULTILINE | re.DOTALL)
assert len(BLOCKS) >= 6
BUNDLED = ROOT / "assets" / "digits-student.pkl"
NETWORK = load_network(BUNDLED)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `make demo` leaves, in a small way, and a data set of photographs."""
    import dataset_tool

    place = tmp_path_factory.mktemp("notebook")
    (place / "assets").symlink_to(ROOT / "assets")
    assert dataset_tool.main(["--source=digits", f"--dest={place}/runs/demo/digits.zip", "--max-images=300"]) == 0
    (place / "datasets").mkdir()
    make_dataset(place / "datasets/photos-32x32.zip", size=32, channels=3)
    train_detector(place / "runs/demo/digits.zip", place / "runs/demo/detector.pt", seed=0, kimg=1, device="cpu")
    net = small_network()
    for name, steps in (("stage-2-8to4", 4), ("stage-4-2to1", 1)):
        load_recipe(net, steps)
        path = place / "runs/demo" / name / "network-snapshot-000030.pkl"
        path.parent.mkdir()
        save_network(path, net, sampling=Sampling(network_grid(net, 8).every(8 // steps)))
    return place


@pytest.mark.parametrize("code", BLOCKS, ids=range(len(BLOCKS)))
def test_a_block_runs_as_it_stands(code: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needs = re.search(r"^# needs: (\w+)$", code, re.MULTILINE)
    if needs and importlib.util.find_spec(needs[1]) is None:
        pytest.skip(f"{needs[1]} is not installed")
    monkeypatch.chdir(folder)
    values: dict[str, object] = {}
    exec(compile(code, "docs", "exec"), values)
    for name in re.findall(r'save(?:fig)?\("(.*?)"', code):
        Image.open(name).verify()
    assert 0 < float(values.get("distance", 1)) < 1e6  # type: ignore[arg-type]


def test_sample_gives_what_generate_writes(tmp_path: Path) -> None:
    seeds = [7, *range(3), 7]
    images = sample(NETWORK, seeds, device="cpu")
    assert images.dtype == np.uint8 and images.shape == (5, 8, 8, 1)
    assert generate.main([f"--network={BUNDLED}", f"--outdir={tmp_path}", "--seeds=0-2,7", "--device=cpu"]) == 0
    for seed, image in zip(seeds, images, strict=True):
        with Image.open(tmp_path / f"{seed:06d}.png") as written:
            assert np.array_equal(np.asarray(written.convert("L")), image[..., 0])
    raw = sample(NETWORK, seeds, device="cpu", batch=2, raw=True)
    assert raw.dtype == torch.float32 and raw.shape == (5, 1, 8, 8)
    assert np.abs((raw[:, 0].numpy() * 127.5 + 128).clip(0, 255) - images[..., 0]).max() < 1.01


def test_sample_of_a_class() -> None:
    net = small_network(label_dim=3)
    load_recipe(net, 1)
    network = replace(NETWORK, net=net.eval(), sampling=None)
    a, b = (sample(network, [0, 1], class_idx=index, steps=3, raw=True, device="cpu") for index in (0, 2))
    assert not torch.equal(a, b)
    with pytest.raises(UsageError, match="classes are 0 to 2"):
        sample(network, [0], class_idx=3)


@pytest.mark.parametrize(
    ("network", "seeds", "options", "words"),
    [
        (NETWORK, [0], {"steps": 5}, "distilled for 4"),
        (NETWORK, [], {}, "at least 1"),
        (NETWORK, [0], {"step": 4}, "no sampler has a setting 'step'; did you mean steps"),
        (NETWORK, [0], {"temperature": 1}, "no sampler has a setting 'temperature'$"),
    ],
)
def test_mistakes(network: Any, seeds: Any, options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        sample(network, seeds, **options)


def test_images_that_are_not_finite() -> None:
    network = load_network(BUNDLED)
    with torch.no_grad():
        next(network.net.parameters()).fill_(float("nan"))
    with pytest.raises(UserError, match="seeds 5 to 5 hold NaN"):
        sample(network, [5])
