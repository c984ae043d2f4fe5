"""Losses against golden numbers (EDM's own), and the random numbers behind them."""

import json

import numpy as np
import pytest
import torch

from helpers import golden, load_recipe, small_network
from training import loss as losses
from training import networks
from training.augment import AugmentPipe
from training.draws import BatchPart, StepDraws

CASES = sorted({key.rsplit("/", 1)[0] for key in golden("losses.npz") if key.endswith("/loss") and "aug" in key})


def golden_net(config, precond, **kwargs):
    interface, args = config["interface"], config["network_kwargs"]
    net = getattr(networks, precond)(**interface, **args, **kwargs)
    load_recipe(net, config["weight_seed"])
    return net.eval()


@pytest.mark.parametrize("case", CASES)
def test_golden_loss_and_gradients(case):
    data = golden("losses.npz")
    config, kwargs = json.loads(str(data["config_json"])), json.loads(str(data[f"{case}/kwargs_json"]))
    net = golden_net(config, kwargs["precond"], **kwargs["precond_kwargs"])
    loss_fn = getattr(losses, case.split("/")[0].split("#")[0])(**kwargs["loss_kwargs"])
    pipe = AugmentPipe(**kwargs["augment"]) if kwargs["augment"] else None
    images, labels = torch.from_numpy(data["images"]), torch.from_numpy(data["labels"])
    torch.manual_seed(kwargs["manual_seed"])
    value = loss_fn(net, images, labels, pipe)
    expected = data[f"{case}/loss"]
    assert np.abs(value.detach().numpy() - expected).max() <= 5e-6 * np.abs(expected).max()
    (value.sum() / len(images)).backward()
    gradients = dict(net.named_parameters())
    # VP's noise label goes up to 999, where one unit in its last place turns the embedding by 6e-5.
    # The resampling of augmentation adds up to 1.8e-5 to an image (see test_augment).
    bound = 5e-6 + 1e-5 * (case.startswith("VPLoss") and data[f"{case}/sigma"].max() > 10) + 1e-5 * ("aug1" in case)
    for name in ("model.map_layer0.weight", "model.dec.16x16_aux_conv.weight", "model.enc.16x16_conv.weight"):
        want = data[f"{case}/grad/{name}"]
        assert np.abs(gradients[name].grad.numpy() - want).max() <= bound * np.abs(want).max(), name
    norms = data[f"{case}/grad_l2"]
    for (name, parameter), norm in zip(net.named_parameters(), norms, strict=True):
        if "qkv.bias" not in name and not np.isnan(norm):
            assert abs(float(parameter.grad.norm()) - norm) <= 2e-5 * max(norm, norms[~np.isnan(norms)].max() * 1e-3), (
                name
            )


def test_golden_dropout_order():
    """Dropout masks are drawn last, inside the network."""
    data = golden("losses.npz")
    config = json.loads(str(data["config_json"]))
    config["network_kwargs"]["dropout"] = 0.13
    net = golden_net(config, "EDMPrecond").train()
    torch.manual_seed(int(data["strict_dropout0.13/seed"]))
    value = losses.EDMLoss()(net, torch.from_numpy(data["images"]), torch.from_numpy(data["labels"]))
    expected = data["strict_dropout0.13/loss"]
    np.testing.assert_allclose(torch.rand(4).numpy(), data["strict_dropout0.13/rand4_after"], atol=1e-7)
    assert np.abs(value.detach().numpy() - expected).max() <= 5e-6 * np.abs(expected).max()


@pytest.mark.parametrize("name", ["EDMLoss", "VPLoss", "VELoss"])
def test_slices_of_a_step_draw_what_the_whole_batch_draws(name):
    """1 x 8 images, 2 x 4 and 4 x 2 get the same noise levels, augmentations and noise."""
    net = small_network(cls=name.replace("Loss", "Precond"), augment_dim=9).eval()
    pipe = AugmentPipe(p=0.5, xflip=1e8, yflip=1, scale=1, rotate_frac=1, aniso=1, translate_frac=1)
    images = torch.rand(8, 1, 8, 8) * 2 - 1
    loss_fn = getattr(losses, name)()
    whole = loss_fn(net, images, None, pipe, StepDraws(3, 5, 8, "cpu").part(0, 8))
    for size in (4, 2):
        draws = StepDraws(3, 5, 8, "cpu")
        starts = list(range(0, 8, size))[::-1]  # in any order
        parts = {i: loss_fn(net, images[i : i + size], None, pipe, draws.part(i, i + size)) for i in starts}
        together = torch.cat([parts[i] for i in sorted(parts)])
        assert torch.allclose(together, whole, rtol=2e-4, atol=1e-4 * float(whole.abs().max()))
    other = loss_fn(net, images, None, pipe, StepDraws(3, 6, 8, "cpu").part(0, 8))
    assert not torch.allclose(other, whole, rtol=0.1)


def test_draws_check_their_use():
    draws = StepDraws(0, 0, 4, "cpu")
    first = draws.part(0, 2).randn(2, 3)
    assert torch.equal(draws.part(0, 4).randn(4, 3)[:2], first)
    with pytest.raises(RuntimeError, match="draw 0"):
        draws.part(2, 4).rand(2, 3)
    with pytest.raises(ValueError, match="does not count"):
        draws.part(2, 4).randn(3, 3)
    with pytest.raises(RuntimeError):
        draws.part(2, 5).randn(3, 3)
    along_second = BatchPart(StepDraws(0, 1, 4, "cpu"), 1, 3).rand(2, 2, 1, batch_dim=1)
    assert torch.equal(StepDraws(0, 1, 4, "cpu").part(0, 4).rand(2, 4, 1, batch_dim=1)[:, 1:3], along_second)
