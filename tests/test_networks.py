"""Networks and preconditionings against numbers computed by EDM's own code (tests/golden)."""

from __future__ import annotations

import ast
import copy
import inspect
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import helpers
from training import networks
from training.networks import DhariwalUNet, EDMPrecond, SongUNet

GOLDEN = Path(__file__).parent / "golden"
NETS = ["ddpmpp_a", "ddpmpp_b", "ncsnpp_a", "ncsnpp_b", "adm_a", "adm_b", "adm_noattn", "skip_a"]
PRECONDS = ["EDMPrecond", "VPPrecond", "VEPrecond", "iDDPMPrecond"]
ARCHITECTURES = json.loads((GOLDEN / "arch_shapes.json").read_text())
LAYERS = sorted({key.split("/")[0] for key in np.load(GOLDEN / "layers.npz").files} - {"attn"})


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def golden(name: str) -> dict[str, Any]:
    """Arrays as tensors, JSON strings as objects."""
    data = helpers.golden(name)
    return {
        key: json.loads(str(value)) if key.endswith("_json") else torch.from_numpy(np.asarray(value))
        for key, value in data.items()
    }


def part(data: dict[str, Any], prefix: str) -> dict[str, Any]:
    return {key.removeprefix(prefix): value for key, value in data.items() if key.startswith(prefix)}


def fill(net: Any, seed: int) -> Any:
    helpers.load_recipe(net, seed)
    return net


def make(config: dict[str, Any], precond: str = "EDMPrecond", **overrides: Any) -> Any:
    return getattr(networks, precond)(**config["interface"], **{**config["network_kwargs"], **overrides})


def golden_net(data: dict[str, Any], precond: str = "EDMPrecond") -> Any:
    """A network of net_*.npz with its weights, stored or made by the recipe, in eval mode."""
    config = data["config_json"]
    net = make(config, precond).eval()
    if config["weights"] == "recipe":
        fill(net, config["weight_seed"])
    else:
        own = {f"sd_{precond}/{key}": key for key in net.state_dict()}
        missing = net.load_state_dict(
            {key: data.get(long, data.get(f"sd/{key}", net.state_dict()[key])) for long, key in own.items()}
        )
        assert not missing.missing_keys and not missing.unexpected_keys
    return net


def tiny(precond: str = "EDMPrecond", **overrides: Any) -> Any:
    kwargs = {"model_type": "SongUNet", "model_channels": 8, "channel_mult": [1, 2], "num_blocks": 1, "dropout": 0}
    return getattr(networks, precond)(
        img_resolution=8, img_channels=1, **{**kwargs, "attn_resolutions": [4], **overrides}
    )


def unit_weights(net: Any) -> Any:
    """Seeded weights under which every layer matters (initial ones all but switch the residual branches off)."""
    return fill(net, seed=5)


def off(actual: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


class Spy(torch.nn.Module):
    """Between a network and its raw model: keeps what is asked and answered, or gives an answer of its own."""

    def __init__(self, net: Any, answer: torch.Tensor | None = None) -> None:
        super().__init__()
        self.model, self.answer = net.model, answer
        net.model = self

    def forward(self, x: torch.Tensor, c_noise: torch.Tensor, **labels: Any) -> torch.Tensor:
        self.x, self.c_noise = x, c_noise
        self.F = self.model(x, c_noise, **labels) if self.answer is None else self.answer
        return self.F


# ---------------------------------------------------------------------------------------------------------------------
# Against EDM's numbers


@pytest.mark.parametrize("precond", PRECONDS)
@pytest.mark.parametrize("name", NETS)
def test_network_outputs(name: str, precond: str) -> None:
    data = golden(f"net_{name}.npz")
    net = golden_net(data, precond)
    spy = Spy(net)
    labels = {key: data[f"in/{key}"] for key in ("class_labels", "augment_labels") if f"in/{key}" in data}
    with torch.no_grad():
        D = net(data["in/x"], data["in/sigma"], **labels)
    sigma = data["in/sigma"].reshape(-1, 1, 1, 1)
    off(spy.F, data[f"{precond}/F"], 1e-5)
    off(spy.c_noise, data[f"{precond}/c_noise"], 1e-3 if precond == "VPPrecond" else 1e-6)
    off(D / (1 + sigma), data[f"{precond}/D"] / (1 + sigma), 1e-5)
    if f"{precond}/model_in" in data:
        off(spy.x, data[f"{precond}/model_in"], 2e-6)

    with torch.no_grad():  # one noise level for the batch, float64, no labels: classes are zeros, shared by the batch
        D = net(data["in/x_scalar_f64"], data["in/sigma_scalar_f64"])
    off(spy.c_noise, data[f"{precond}/c_noise_scalar"], 1e-3 if precond == "VPPrecond" else 1e-6)
    off(D, data[f"{precond}/D_scalar_nolabels"], 2e-5)
    assert D.dtype == torch.float32


@pytest.mark.parametrize("name", NETS)
def test_network_gradients(name: str) -> None:
    data = golden(f"net_{name}.npz")
    net = golden_net(data).train()
    x = (0.5 * data["in/x"]).requires_grad_()
    out = net.model(x, data["in/sigma"].log() / 4, data.get("in/class_labels"), data.get("in/augment_labels"))
    (out * data["in/R"]).sum().backward()
    off(out, data["grad/F"], 1e-5)
    off(x.grad, data["grad/x"], 1e-5 * data["grad/x"].abs().max().item())
    parameters = dict(net.named_parameters())
    assert [[key, list(value.shape)] for key, value in parameters.items()] == data["param_names_json"]
    grads = [value.grad.double() for value in parameters.values()]
    for key, value in (("l2", [g.norm() for g in grads]), ("sum", [g.sum() for g in grads])):
        off(torch.stack(value), data[f"grad/param_{key}"], 2e-5 * data[f"grad/param_{key}"].abs().max().item())
    buffers = [[key, list(value.shape)] for key, value in net.named_buffers()]
    assert buffers == data["buffer_names_json"]


@pytest.mark.parametrize("name", LAYERS)
def test_layers(name: str) -> None:
    data = part(golden("layers.npz"), f"{name}/")
    kinds = ("Linear", "Conv2d", "GroupNorm", "PositionalEmbedding", "FourierEmbedding")
    kind = getattr(networks, next(filter(name.startswith, kinds), "UNetBlock"))
    kwargs = data["kwargs_json"]
    layer = kind(**{key: value for key, value in kwargs.items() if not key.startswith("_")})
    layer.load_state_dict(part(data, "sd/"))
    inputs = [data[key] for key in ("in0", "in1") if key in data]
    off(layer.eval()(*inputs), data["out"], 1e-5)
    for key in ("_num_groups", "_eps", "_num_heads"):
        if key in kwargs:
            assert getattr(layer, key[1:]) == kwargs[key]
    if "_num_groups0" in kwargs:
        assert layer.norm0.num_groups == kwargs["_num_groups0"]


@pytest.mark.parametrize("fused_kernel", [True, False])
def test_attention_weights_and_gradients(fused_kernel: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the identity as values, attention returns its weights. Without the fused kernel: as under torch 1."""
    if not fused_kernel:
        monkeypatch.delattr(F, "scaled_dot_product_attention")
    data = part(golden("layers.npz"), "attn/")
    q, k = (data[key].transpose(1, 2).requires_grad_() for key in "qk")
    weights = networks.attend(q, k, torch.eye(12).expand(3, 12, 12))
    weights.backward(data["dw"])
    off(weights, data["w"], 1e-6)
    off(q.grad.transpose(1, 2), data["dq"], 1e-6)
    off(k.grad.transpose(1, 2), data["dk"], 1e-6)


@pytest.mark.parametrize("variant", ["", "#b"])
@pytest.mark.parametrize("precond", PRECONDS)
def test_preconditioning(precond: str, variant: str) -> None:
    """39 noise levels around a stand-in for the raw model that gives EDM's answers."""
    data = golden("precond.npz")
    facts, want = data["facts_json"][precond + variant], part(data, f"{precond}{variant}/")
    net = tiny(precond, **facts["kwargs"])
    assert (net.sigma_min, net.sigma_max) == pytest.approx((facts["sigma_min"], facts["sigma_max"]), rel=1e-6)
    assert type(net.sigma_min).__name__ == facts["sigma_min_type"]

    spy = Spy(net, answer=want["F"])
    D = net(want["x"], want["sigma"])
    torch.testing.assert_close(spy.c_noise, want["c_noise"], rtol=3e-6, atol=1e-6)
    torch.testing.assert_close(spy.x, want["model_in"], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(D, want["D"], rtol=1e-6, atol=1e-6)

    for dtype in (torch.float32, torch.float64):
        name = str(dtype).removeprefix("torch.")
        sigmas = data["sigmas_f64"].to(dtype)
        torch.testing.assert_close(net.round_sigma(sigmas), want[f"round_sigma_{name}"], rtol=1e-6, atol=0)
        if precond == "iDDPMPrecond":
            assert torch.equal(net.round_sigma(sigmas, return_index=True), want[f"round_index_{name}"])
        if precond == "VPPrecond":
            close = {"rtol": 1e-5, "atol": 1e-7} if dtype == torch.float32 else {"rtol": 1e-12, "atol": 1e-15}
            torch.testing.assert_close(net.sigma_inv(sigmas), want[f"sigma_inv_{name}"], **close)
            torch.testing.assert_close(net.sigma(want[f"t_{name}"]), want[f"sigma_of_t_{name}"], **close)
    if precond == "iDDPMPrecond":
        torch.testing.assert_close(net.u, want["u"], rtol=1e-6, atol=0)


def test_iddpm_rounding_is_exact() -> None:
    net = tiny("iDDPMPrecond")
    assert torch.equal(net.round_sigma(net.u), net.u)
    sigma = torch.logspace(-3, 5, 4001, dtype=torch.float64).reshape(1, -1, 1)
    nearest = (sigma[..., None] - net.u.double()).abs().argmin(dim=-1)
    assert torch.equal(net.round_sigma(sigma, return_index=True), nearest)
    assert net.round_sigma(0.5).shape == () and net.round_sigma(0.5).item() == pytest.approx(0.5, abs=1e-3)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_names_and_shapes_of_published_architectures(name: str) -> None:
    want = ARCHITECTURES[name]
    with torch.device("meta"):
        net = make(want)
    assert [[key, list(value.shape)] for key, value in net.named_parameters()] == want["params"]
    assert [[key, list(value.shape)] for key, value in net.named_buffers()] == want["buffers"]
    assert sum(value.numel() for value in net.parameters()) == want["num_params"]
    if name == "cifar10-32-uncond-ddpmpp":
        assert want["num_params"] == 55_733_891


@pytest.mark.parametrize("name", ["ddpmpp", "ncsnpp", "adm"])
def test_initial_weights(name: str) -> None:
    """The same draws in the same order as EDM, so a seed gives the same fresh network."""
    want = json.loads((GOLDEN / "init_stats.json").read_text())[name]
    torch.manual_seed(want["manual_seed"])
    tensors = make(want).state_dict()
    for key, shape, stats in want["stats"]:
        value = tensors[key].double()
        assert list(value.shape) == shape
        assert value.flatten()[0].item() == pytest.approx(stats["first"], rel=1e-6)
        for stat in ("mean", "min", "max", "sum"):
            scale = max(stats["std"], abs(stats["mean"])) * (value.numel() if stat == "sum" else 1)
            assert getattr(value, stat)().item() == pytest.approx(stats[stat], abs=1e-6 * scale + 1e-30), (key, stat)


FULL_SIZE = ["cifar10-32-cond-ddpmpp", "cifar10-32-uncond-ncsnpp", "imagenet-64-cond-adm"]


@pytest.mark.parametrize("name", [FULL_SIZE[0], *(pytest.param(x, marks=pytest.mark.slow) for x in FULL_SIZE[1:])])
def test_full_size(name: str) -> None:
    data = part(golden("fullsize.npz"), f"{name}/")
    config = data["config_json"]
    net = fill(make(config), config["weight_seed"]).eval()
    spy = Spy(net)
    labels = {key: data[key] for key in ("class_labels", "augment_labels") if key in data}
    with torch.no_grad():
        D = net(data["x"], data["sigma"], **labels)
    off(spy.F, data["F"], 2e-5)
    off(D, data["D"], 2e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Properties


@pytest.mark.parametrize("model", ["SongUNet", "DhariwalUNet"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_compute_dtype(dtype: torch.dtype, model: str) -> None:
    """Half precision, wherever it runs, is close to float32 and comes back as float32."""
    net = unit_weights(tiny(model_type=model, model_channels=64))
    spy, x, sigma = Spy(net), torch.randn(4, 1, 8, 8), torch.tensor([0.01, 0.3, 2.0, 60.0])
    x *= sigma.reshape(-1, 1, 1, 1)
    with torch.no_grad():
        exact = net(x, sigma)
        net.compute_dtype = dtype
        rough = net(x, sigma)
        assert spy.x.dtype == spy.F.dtype == dtype and rough.dtype == torch.float32
        assert torch.equal(net(x, sigma, force_fp32=True), exact)
        net.compute_dtype, net.use_fp16 = None, True  # which means nothing on a CPU
        assert torch.equal(net(x, sigma), exact)
    error = ((rough - exact) / (1 + sigma.reshape(-1, 1, 1, 1))).square().mean().sqrt().item()
    assert 1e-6 < error < 16 * torch.finfo(dtype).eps


def test_half_precision_attention_does_not_overflow() -> None:
    """Logits beyond the range of float16 (65504) that differ by little: the softmax must see the difference."""
    q = torch.full([1, 1, 2, 64], 120.0, dtype=torch.float16)
    k = torch.full([1, 1, 2, 64], 120.0, dtype=torch.float16)
    k[0, 0, 1, 0] = 119.875  # logits 115200 and 115198
    out = networks.attend(q, k, torch.eye(2, dtype=torch.float16)[None, None])
    off(out[0, 0, 0], torch.tensor([15 / 8, 0]).softmax(0).half(), 2e-3)


@pytest.mark.parametrize("model", ["SongUNet", "DhariwalUNet"])
def test_class_labels(model: str) -> None:
    net = unit_weights(tiny(model_type=model, label_dim=3))
    x, sigma = torch.randn(2, 1, 8, 8), torch.tensor([0.5, 2.0])
    with torch.no_grad():
        none, labels = net(x, sigma), torch.eye(3)[:2]
        off(net(x, sigma, torch.zeros(2, 3)), none, 1e-6)
        off(net(x, sigma, labels.double())[1], net(x[1:], sigma[1:], labels[1:])[0], 1e-5)
        assert (net(x, sigma, labels) - none).abs().amax(dim=(1, 2, 3)).min() > 1e-3
        with pytest.raises(ValueError, match="4 entries, the network takes 3"):
            net(x, sigma, torch.zeros(2, 4))
        unconditional = tiny(model_type=model)
        assert torch.equal(unconditional(x, sigma, torch.zeros(2, 4)), unconditional(x, sigma))


@pytest.mark.parametrize("model", ["SongUNet", "DhariwalUNet"])
def test_label_dropout_and_dropout_act_in_training_only(model: str) -> None:
    x, sigma, labels = torch.randn(64, 1, 8, 8), torch.ones(64), torch.eye(3)[:1].expand(64, 3)
    net = unit_weights(tiny(model_type=model, label_dim=3, label_dropout=0.5))
    with torch.no_grad():
        x = x[:1].expand_as(x)
        kept, dropped = net.eval()(x, sigma, labels)[0], net(x, sigma)[0]
        trained = net.train()(x, sigma, labels)
        is_kept = [(image - kept).abs().max().item() < 1e-4 for image in trained]
        is_dropped = [(image - dropped).abs().max().item() < 1e-4 for image in trained]
        assert all(a != b for a, b in zip(is_kept, is_dropped, strict=True)) and 16 < sum(is_kept) < 48
        net = unit_weights(tiny(model_type=model, dropout=0.5))
        assert torch.equal(net.eval()(x, sigma), net(x, sigma))
        assert not torch.allclose(net.train()(x, sigma), net(x, sigma))


@pytest.mark.parametrize("model", ["SongUNet", "DhariwalUNet"])
def test_zero_augment_labels_mean_none_and_leave_no_parameter_unused(model: str) -> None:
    net = unit_weights(tiny(model_type=model, augment_dim=9)).train()
    x, sigma = torch.randn(2, 1, 8, 8), torch.tensor([0.5, 2.0])
    out = net(x, sigma, augment_labels=torch.zeros(2, 9))
    assert torch.equal(out, net(x, sigma))
    out.sum().backward()
    assert all(value.grad is not None for value in net.parameters())
    assert not torch.allclose(out, net(x, sigma, augment_labels=torch.ones(2, 9)))


@pytest.mark.parametrize("kwargs", [{"adaptive_scale": False, "resample_proj": True}, {"channels_per_head": 4}])
def test_block_gradients_by_finite_differences(kwargs: dict[str, Any]) -> None:
    block = networks.UNetBlock(8, 8, 4, attention=True, down=True, resample_filter=[1, 3, 3, 1], **kwargs).double()
    fill(block, 1)
    x = torch.randn(1, 8, 4, 4, dtype=torch.float64, requires_grad=True)
    emb = torch.randn(1, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(block, (x, emb), eps=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("resolution", "mult", "words"),
    [
        (
            10,
            [2, 2, 2],
            r"10 cannot be halved 2 times by channel_mult=\[2,2,2\]; use a multiple of 4, such as 8 or 12, or",
        ),
        (2, [1, 1, 1], "use a multiple of 4"),
        (100, [1, 2, 2, 2], "use a multiple of 8"),
    ],
)
def test_resolution_that_cannot_be_halved(resolution: int, mult: list[int], words: str) -> None:
    """It need not be a power of two."""
    for model in (SongUNet, DhariwalUNet):
        net = EDMPrecond(12, 1, model_type=model.__name__, model_channels=8, channel_mult=[1, 1, 1], num_blocks=1)
        assert net(torch.randn(1, 1, 12, 12), torch.ones(1)).shape == (1, 1, 12, 12)
        with pytest.raises(ValueError, match=words):
            model(resolution, 1, 1, model_channels=8, channel_mult=mult)


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"model_type": "UNet"}, "unknown model_type 'UNet'; there are SongUNet, DhariwalUNet"),
        ({"encoder_type": "other"}, "unknown encoder_type 'other'"),
        ({"decoder_type": "residual"}, "unknown decoder_type 'residual'"),
        ({"embedding_type": "none"}, "unknown embedding_type 'none'"),
        ({"model_channels": 130}, "130 channels cannot be normalised in equal groups"),
        ({"model_channels": 2}, "2 channels cannot be normalised"),
        ({"resample_filter": [1, 2]}, "shifts the image"),
        ({"resample_filter": [1, 2, 1]}, "shifts the image"),
    ],
)
def test_wrong_arguments(kwargs: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        tiny(**kwargs)


@pytest.mark.parametrize("precond", PRECONDS)
def test_compiles_into_one_graph(precond: str) -> None:
    """Nothing in a network waits for data or leaves the graph: a graph break is an error here."""
    net = unit_weights(tiny(precond, label_dim=3, augment_dim=9, encoder_type="residual", resample_filter=[1, 3, 3, 1]))
    inputs = (torch.randn(2, 1, 8, 8), torch.tensor([0.5, 2.0]), torch.eye(3)[:2])
    labels = {"augment_labels": torch.ones(2, 9)}
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    with torch.no_grad():
        off(compiled(*inputs, **labels), net(*inputs, **labels), 1e-6)


@pytest.mark.parametrize("model", ["SongUNet", "DhariwalUNet"])
def test_channels_last(model: str) -> None:
    net = unit_weights(tiny(model_type=model))
    x, sigma = torch.randn(2, 1, 8, 8), torch.tensor([0.5, 2.0])
    with torch.no_grad():
        plain = net(x, sigma)
        last = net.to(memory_format=torch.channels_last)(x.contiguous(memory_format=torch.channels_last), sigma)
    off(last, plain, 2e-5)


def test_module_text_stands_alone() -> None:
    """It is run by EDM's loader: under Python 3.8, with torch and persistence alone."""
    tree = ast.parse(inspect.getsource(networks), feature_version=(3, 8))
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    modules = {node.module if isinstance(node, ast.ImportFrom) else node.names[0].name for node in imports}
    standard = {"__future__", "collections.abc", "math", "typing"}
    assert modules == standard | {"torch", "torch.nn.functional", "torch_utils.persistence"}


def test_copies_are_independent_and_keep_settings() -> None:
    net = unit_weights(tiny(augment_dim=9))
    net.compute_dtype = torch.bfloat16
    twin = copy.deepcopy(net)
    assert type(twin) is EDMPrecond and twin.compute_dtype == torch.bfloat16 and twin.init_kwargs == net.init_kwargs
    x, sigma = torch.randn(2, 1, 8, 8), torch.tensor([0.5, 2.0])
    with torch.no_grad():
        before = net(x, sigma)
        assert torch.equal(twin(x, sigma), before)
        for value in twin.parameters():
            value.zero_()
        assert torch.equal(net(x, sigma), before)
