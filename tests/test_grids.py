import numpy as np
import pytest
import torch

from helpers import gaussian, golden
from training.grids import NoiseGrid, Sampling, karras_levels, network_grid


def test_karras_levels_match_golden():
    data = golden("sigma_grids.npz")
    checked = 0
    for key, levels in data.items():
        if key.startswith("edm/N"):
            steps, rho = key.removeprefix("edm/N").split("_rho")
            if int(steps) > 1:
                np.testing.assert_allclose(karras_levels(int(steps), rho=float(rho)), levels, rtol=1e-12)
                checked += 1
    assert checked >= 3


def test_known_strided_levels():
    """The levels that a 32 -> 8 -> 4 -> 2 ladder keeps."""
    grid = network_grid(gaussian(), 32)
    shown = [float(f"{level:.3g}") for level in grid.every(4).levels]
    assert shown == [80, 38.1, 16.6, 6.46, 2.17, 0.598, 0.123, 0.0158, 0]
    assert grid.every(4).every(2) == grid.every(8)
    assert grid.every(32).levels == (80.0, 0.0)


@pytest.mark.parametrize(
    "levels", [(1.0,), (1.0, 0.5), (1.0, 1.0, 0.0), (0.5, 1.0, 0.0), (float("nan"), 0.0), (float("inf"), 0.0)]
)
def test_bad_grids_are_refused(levels):
    with pytest.raises(ValueError):
        NoiseGrid(levels)


def test_grid_is_clamped_and_rounded():
    class Net:
        sigma_min, sigma_max = 0.02, 50.0

        @staticmethod
        def round_sigma(sigma):
            return torch.round(torch.as_tensor(sigma) * 100) / 100

    grid = network_grid(Net(), 8)
    assert grid.levels[0] == 50.0 and grid.levels[-2] == 0.02 and grid.levels[-1] == 0.0
    with pytest.raises(ValueError, match=r"at most \d+ work") as caught:
        network_grid(Net(), 400)
    most = int(str(caught.value).rsplit("most ")[1].split()[0])
    network_grid(Net(), most)


def test_sampling_survives_a_dict():
    sampling = Sampling(
        network_grid(gaussian(), 6).every(3), "euler", 3, ({"network": "a", "sha256": "b", "steps": 6},)
    )
    assert Sampling.from_dict(sampling.to_dict()) == sampling
    assert sampling.teacher_steps == 6
    for broken in (
        None,
        {},
        {"levels": [1, 2], "solver": "euler", "ratio": 2},
        {**sampling.to_dict(), "solver": "rk4"},
    ):
        with pytest.raises(ValueError):
            Sampling.from_dict(broken)
