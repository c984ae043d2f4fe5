"""What makes networks faster on the device at hand, each part of which can be switched off."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch.utils.checkpoint import checkpoint

from torch_utils import cpu_kernels

from . import networks


def use_cpu_kernels(wanted: bool = True) -> bool:
    """Lets all networks of this process normalise by torch_utils.cpu_kernels, or no longer. Returns whether they do:
    not without a C compiler, nor under EDM_KERNELS=0. Takes part of a second the first time."""
    networks.fused_norm = cpu_kernels.group_norm if wanted and cpu_kernels.library() is not None else None
    return networks.fused_norm is not None


def recompute_blocks(net: Any) -> None:
    """Has each block of a U-Net keep nothing but its input for the backward pass, which computes the rest once more:
    the same numbers, in a fraction of the memory, at the cost of another forward pass."""
    for block in net.modules():
        if isinstance(block, networks.UNetBlock):
            masks = block.dropout > 0  # which are drawn as before
            block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=masks)  # type: ignore[method-assign]
