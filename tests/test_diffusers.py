"""extras/diffusers_pipeline.py against the diffusers that is installed, if it is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers")

from extras.diffusers_pipeline import EDMStudentPipeline
from formats.network_files import load_network, save_network
from helpers import load_recipe, small_network
from training.grids import Sampling, network_grid
from training.pictures import to_uint8
from training.samplers import grid_sampler


@pytest.fixture(params=[("EDMPrecond", 0), ("VPPrecond", 3)], ids=["EDM", "VP with classes"])
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    cls, classes = request.param
    net = small_network(cls=cls, channels=3, label_dim=classes)
    load_recipe(net, 2)
    save_network(tmp_path / "student.pkl", net, sampling=Sampling(network_grid(net, 8).every(2)))
    return tmp_path / "student.pkl"


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(5)


def test_images_are_those_of_our_sampler_also_when_saved_and_loaded(path: Path, tmp_path: Path) -> None:
    network = load_network(path)
    classes, levels = network.net.label_dim, network.sampling.grid.levels
    latents = torch.randn(4, 3, 8, 8, generator=seeded())
    labels = torch.eye(classes)[[1, 1, 1, 1]] if classes else None
    wanted = grid_sampler(network.net, latents, levels, class_labels=labels).float()
    pipe = EDMStudentPipeline.from_network(path)
    given = {"batch_size": 4, "class_labels": 1 if classes else None}
    assert torch.equal(pipe(**given, generator=seeded(), output_type="pt").images, wanted)
    (arrays,) = pipe(**given, generator=seeded(), output_type="np", return_dict=False)
    assert np.allclose(arrays, (wanted.permute(0, 2, 3, 1).numpy() + 1).clip(0, 2) / 2, atol=1e-6)
    for image, expected in zip(pipe(**given, generator=seeded()).images, to_uint8(wanted), strict=True):
        assert np.array_equal(np.asarray(image), expected.permute(1, 2, 0))

    pipe.save_pretrained(tmp_path / "saved")
    again = EDMStudentPipeline.from_pretrained(tmp_path / "saved")
    assert again.student.grid == pipe.student.grid
    weights, theirs = pipe.student.state_dict(), again.student.state_dict()
    assert weights.keys() == theirs.keys() and all(torch.equal(weights[name], theirs[name]) for name in weights)
    images = again(**given, generator=seeded(), output_type="pt").images
    assert (images - wanted).abs().max() < 1e-5  # where weights lie in memory may change how a product is rounded


def test_mistakes(path: Path, tmp_path: Path) -> None:
    pipe = EDMStudentPipeline.from_network(path)
    with pytest.raises(ValueError, match="output_type='jpg'"):
        pipe(output_type="jpg")
    if not pipe.student.net.label_dim:
        with pytest.raises(ValueError, match="no classes"):
            pipe(class_labels=1)
    save_network(tmp_path / "teacher.pkl", small_network())
    with pytest.raises(ValueError, match="undistilled"):
        EDMStudentPipeline.from_network(tmp_path / "teacher.pkl")
    net = small_network(label_dim=2)
    vectors = {"label_kind": "vectors"}
    save_network(tmp_path / "vectors.pkl", net, sampling=Sampling(network_grid(net, 4)), dataset_kwargs=vectors)
    with pytest.raises(ValueError, match="trained with label vectors"):
        EDMStudentPipeline.from_network(tmp_path / "vectors.pkl")
