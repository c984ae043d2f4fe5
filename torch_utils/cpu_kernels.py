"""Group normalisation, the shift before it and the SiLU behind it in one pass over memory, on the CPU.

Convolutions are fastest with channels last, but there PyTorch's own normalisation is slow, and normalisation with its
activation is a third of a small network's time. `group_norm.c` does both in one go; it is compiled when first used
(less than a second) and forgotten when the process ends. Where there is no C compiler, or under EDM_KERNELS=0, networks
run on PyTorch alone.
"""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SOURCE = Path(__file__).with_name("group_norm.c")
MAX_CHANNELS = 4096  # a handful of numbers per channel lie on the stack
# Sums may be reordered, but NaN stays NaN: training looks for it. Without -fopenmp when linking, OpenMP's functions are
# those that torch has loaded: a second thread pool would get in the way of the first.
COMPILE = ["-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros", "-fassociative-math"]
COMPILE += ["-freciprocal-math", "-std=gnu11", "-fPIC", "-c"]


@functools.lru_cache(maxsize=1)
def library() -> ctypes.CDLL | None:
    """The compiled functions, or None where they can't be had."""
    if os.environ.get("EDM_KERNELS") == "0":
        return None
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        return None
    for threads in (["-fopenmp"], []):  # Apple's compiler has no OpenMP
        with tempfile.TemporaryDirectory(prefix="edm-kernels-") as folder:
            compiled, linked = f"{folder}/kernels.o", f"{folder}/kernels.so"
            try:
                for line in (
                    [*COMPILE, *threads, str(SOURCE), "-o", compiled],
                    ["-shared", compiled, "-lm", "-o", linked],
                ):
                    subprocess.run([compiler, *line], check=True, capture_output=True, timeout=60)
                found = ctypes.CDLL(linked)
            except (OSError, subprocess.SubprocessError):
                continue
        pointer: Any = ctypes.c_void_p
        number: Any = ctypes.c_int64
        found.group_norm_forward.argtypes = [pointer] * 4 + [number] + [pointer] * 3 + [number] * 4
        found.group_norm_forward.argtypes += [ctypes.c_float, number]
        found.group_norm_backward.argtypes = [pointer] * 5 + [number] + [pointer] * 6 + [number] * 5
        found.group_norm_forward.restype = found.group_norm_backward.restype = None
        return found
    return None


class GroupNormAct(torch.autograd.Function):
    """act(gain * normalised(x + shift) + bias), act being SiLU or nothing, with channels last.

    x [N, C, H, W], shift [N, C] or None, gain and bias both [C] or both [N, C]; all float32 on the CPU.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, shift: Tensor | None, gain: Tensor, bias: Tensor, groups: int, eps: float, act: bool
    ) -> Tensor:
        kernels = library()
        assert kernels is not None
        x = x.contiguous(memory_format=torch.channels_last)
        shift = None if shift is None else shift.contiguous()
        gain, bias = gain.contiguous(), bias.contiguous()
        count, channels, height, width = x.shape
        y, mean, rstd = torch.empty_like(x), x.new_empty(count, groups), x.new_empty(count, groups)
        kernels.group_norm_forward(
            *map(_address, (x, shift, gain, bias)),
            channels if gain.ndim == 2 else 0,
            *map(_address, (y, mean, rstd)),
            *(count, height * width, channels, groups, eps, act),
        )
        ctx.save_for_backward(x, shift, gain, bias, mean, rstd)
        ctx.groups, ctx.act = groups, act
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        kernels = library()
        assert kernels is not None
        x, shift, gain, bias, mean, rstd = ctx.saved_tensors
        dy = grads[0].contiguous(memory_format=torch.channels_last)
        count, channels, height, width = x.shape
        dx, dgain, dbias = torch.empty_like(x), x.new_empty(count, channels), x.new_empty(count, channels)
        dshift = None if shift is None else x.new_empty(count, channels)
        kernels.group_norm_backward(
            *map(_address, (dy, x, shift, gain, bias)),
            channels if gain.ndim == 2 else 0,
            *map(_address, (mean, rstd, dx, dshift, dgain, dbias)),
            *(count, height * width, channels, ctx.groups, ctx.act),
        )
        if gain.ndim == 1:
            dgain, dbias = dgain.sum(dim=0), dbias.sum(dim=0)
        return dx, dshift, dgain, dbias, None, None, None


def group_norm(
    x: Tensor,
    gain: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    act: bool = True,
) -> Tensor:
    """What `training.networks.normalize` computes, for a group norm of weights `gain` and `bias` [C]."""
    if scale is not None:
        assert shift is not None
        gain, bias, shift = gain * (scale + 1), torch.addcmul(shift, bias, scale + 1), None
        gain, bias = gain.expand(len(x), -1), bias.expand(len(x), -1)
    result: Tensor = GroupNormAct.apply(
        x, None if shift is None else shift.expand(len(x), -1), gain, bias, groups, eps, act
    )
    return result


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
