"""In which arithmetic networks compute, and what makes them faster on the device at hand: each can be switched off."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from torch_utils.misc import allow_tf32

from . import networks
from .recipe import TrainConfig


def recompute_blocks(net: Any) -> None:
    """Has each block of a U-Net keep nothing but its input for the backward pass, which computes the rest once more:
    the same numbers, in a fraction of the memory, at the cost of another forward pass."""
    for block in net.modules():
        if isinstance(block, networks.UNetBlock):
            masks = block.dropout > 0  # which are drawn as before
            block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=masks)  # type: ignore[method-assign]


def set_precision(config: TrainConfig) -> None:
    """Process-wide switches. fp32 means fp32: no TF32 in products or convolutions, unless a lesser one is asked for."""
    allow_tf32(config.precision != "fp32")
    torch.backends.cudnn.benchmark = config.bench and not config.deterministic
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(config.deterministic)


def compute_dtype(precision: str, device: torch.device) -> torch.dtype:
    """What the network computes in. fp16 is for CUDA alone, as in EDM: elsewhere it means fp32."""
    if precision == "fp16":
        return torch.float16 if device.type == "cuda" else torch.float32
    return torch.bfloat16 if precision == "bf16" else torch.float32


def maybe_compile(net: Any, wanted: bool, log: Callable[[str], None]) -> Any:
    """`torch.compile(net)` where it was asked for and a C++ compiler can be found; otherwise `net`, with one line."""
    if not wanted:
        return net
    try:
        from torch._inductor.cpp_builder import get_cpp_compiler

        get_cpp_compiler()
    except Exception as exc:
        log(f"Running without --compile: no working C++ compiler ({type(exc).__name__})")
        return net
    return torch.compile(net)
