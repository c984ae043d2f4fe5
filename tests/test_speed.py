"""The fast paths: the same results as the plain ones, and a way back."""

import shutil
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from torch_utils import cpu_kernels
from training import networks
from training.speed import use_cpu_kernels

needs_compiler = pytest.mark.skipif(cpu_kernels.library() is None, reason="no C compiler")


def results(shape, groups, shift, scale, act, dtype, kernel):
    """Output and gradients of one normalisation."""
    generator = torch.Generator().manual_seed(0)

    def draw(*size):
        return (torch.randn(size, generator=generator) * 2 + 1).to(dtype).requires_grad_(True)

    x, gain, bias = draw(*shape), draw(shape[1]), draw(shape[1])
    shift = draw(shift, shape[1]) if shift else None
    scale = draw(scale, shape[1]) if scale else None
    norm = networks.GroupNorm(shape[1], num_groups=groups, min_channels_per_group=shape[1] // groups)
    if kernel:
        y = cpu_kernels.group_norm(x, gain, bias, groups, norm.eps, shift, scale, act)
    else:
        del norm.weight, norm.bias
        norm.weight, norm.bias = gain, bias
        networks.fused_norm = None
        y = networks.normalize(x, norm, shift, scale, act)
    upstream = torch.arange(y.numel(), dtype=dtype).sin().reshape(y.shape)
    return [y.detach(), *torch.autograd.grad(y, [t for t in (x, gain, bias, shift, scale) if t is not None], upstream)]


@needs_compiler
@pytest.mark.parametrize(("shape", "groups"), [((5, 32, 8, 8), 8), ((2, 12, 7, 5), 3), ((1, 4, 1, 1), 1)])
@pytest.mark.parametrize(("shift", "scale"), [(0, 0), (1, 0), (-1, 0), (1, 1), (-1, -1)])
@pytest.mark.parametrize("act", [True, False])
def test_kernel_is_as_exact_as_pytorch(shape, groups, shift, scale, act):
    """Against float64, the kernel errs no more than float32 does otherwise, but for a unit in the last place or so."""
    size = [shape[0] if n < 0 else n for n in (shift, scale)]
    exact = results(shape, groups, *size, act, torch.float64, kernel=False)
    usual = results(shape, groups, *size, act, torch.float32, kernel=False)
    fast = results(shape, groups, *size, act, torch.float32, kernel=True)
    for a, b, c in zip(exact, usual, fast, strict=True):
        assert c.shape == a.shape and c.dtype == torch.float32
        allowed = 2 * (b - a).abs().max() + 1e-6 * a.abs().max()
        assert (c - a).abs().max() <= allowed


@needs_compiler
def test_activation_at_the_ends_of_its_range():
    x = torch.tensor([-1e30, -200, -88, -87, -20, -1e-3, 0, 1e-30, 1, 30, 88, 1e30]).reshape(1, 12, 1, 1)
    gain, bias = torch.zeros(12), x.flatten()  # what is normalised is gone, the bias is what the activation sees
    y = cpu_kernels.group_norm(torch.randn(1, 12, 2, 2), gain, bias, 3, 1e-5)[0, :, 0, 0]
    torch.testing.assert_close(y, F.silu(bias), rtol=1e-6, atol=2e-8)  # e^87 stands for more


@needs_compiler
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so(bad):
    x = torch.randn(2, 8, 4, 4).requires_grad_(True)
    with torch.no_grad():
        x[0, 0, 0, 0] = bad
    y = cpu_kernels.group_norm(x, torch.ones(8), torch.zeros(8), 2, 1e-5)
    assert not y[0, :4].isfinite().any() and y[0, 4:].isfinite().all() and y[1].isfinite().all()
    (gradient,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert not gradient[0, :4].isfinite().any() and gradient[1].isfinite().all()


@needs_compiler
def test_threads_change_nothing():
    before = torch.get_num_threads()
    try:
        x, w = torch.randn(7, 64, 8, 8), torch.randn(64)
        images = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            images.append(cpu_kernels.group_norm(x, w, w, 16, 1e-5))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(images[0], images[1]) and torch.equal(images[0], images[2])
    alone = cpu_kernels.group_norm(x[3:4], w, w, 16, 1e-5)
    assert torch.equal(alone[0], images[0][3]), "an image depends on its neighbours"


@needs_compiler
@pytest.mark.parametrize("kind", ["SongUNet", "DhariwalUNet"])
def test_networks_give_the_same_with_kernels(kind):
    torch.manual_seed(0)
    net = networks.EDMPrecond(8, 3, 2, model_type=kind, model_channels=64, channel_mult=[1, 2], num_blocks=1)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    x, sigma, labels = torch.randn(3, 3, 8, 8), torch.tensor([0.1, 1.0, 20.0]), torch.eye(2)[[0, 1, 1]]
    found = []
    for wanted in (False, True):
        assert use_cpu_kernels(wanted) is wanted
        net.eval().zero_grad()
        y = net(x, sigma, labels)
        y.square().sum().backward()
        found.append([y.detach(), *(p.grad.clone() for p in net.parameters())])
    for a, b in zip(*found, strict=True):
        assert (a - b).abs().max() <= 2e-5 * a.abs().max().clamp(min=1e-3)


def test_without_a_compiler_or_when_told_so_pytorch_does_it(tmp_path):
    code = "from training.speed import use_cpu_kernels; print(use_cpu_kernels())"
    broken = tmp_path / "cc"
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    for setting in ({"EDM_KERNELS": "0"}, {"CC": str(broken)}, {"CC": "/nowhere/cc"}):
        done = subprocess.run(
            [sys.executable, "-c", code], env={"PATH": "/usr/bin", **setting}, capture_output=True, text=True
        )
        assert done.stdout.strip() == "False", done.stderr
    if shutil.which("cc"):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.stdout.strip() == "True", done.stderr
