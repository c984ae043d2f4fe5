"""Helpers that programs written against EDM import: endless sampling, copying weights, looking at modules.

And `load_tensors` and `save_tensors`, for files that might be anything and disks that might be full."""

from __future__ import annotations

import contextlib
import re
import signal
import threading
import warnings
from collections.abc import Iterator, Sequence, Sized
from typing import IO, Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn


def load_tensors(file: Any) -> Any:
    """`torch.load` of tensors and plain values alone, onto the CPU. Raises whatever it likes for any other content.

    file: path or open binary file.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about formats that it then refuses
        return torch.load(file, map_location="cpu", weights_only=True)


def save_tensors(value: Any, file: IO[bytes]) -> None:
    """`torch.save` that lets an OSError of the file through, instead of one of its own about a wrong position, and
    that a Ctrl-C finds finished: amid its C++ part an exception would abort the process."""
    with interrupts_wait():
        try:
            torch.save(value, file)
        except RuntimeError as exc:
            if isinstance(exc.__context__, OSError):
                raise exc.__context__ from None
            raise


@contextlib.contextmanager
def interrupts_wait() -> Iterator[None]:
    """SIGINT takes effect after the block. In other threads than the main one, which gets the signals, does nothing."""
    usual = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(usual):
        yield
        return
    came: list[Any] = []
    signal.signal(signal.SIGINT, lambda *what: came.append(what))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, usual)
        if came:
            usual(*came[0])


# ----------------------------------------------------------------------------------------------------------------------
# Data order


class InfiniteSampler(torch.utils.data.Sampler[int]):
    """Indices of `dataset` without end; the `num_replicas` processes each take every num_replicas-th of one stream.

    With `shuffle` the stream starts as a random order and goes on changing while it is read: each index that has been
    given is exchanged with one of the `window_size * len(dataset)` before it. EDM's order, index by index. Depends on
    the global position alone, but can only be read from its beginning.
    """

    def __init__(
        self,
        dataset: Sized,
        rank: int = 0,
        num_replicas: int = 1,
        shuffle: bool = True,
        seed: int = 0,
        window_size: float = 0.5,
    ) -> None:
        if len(dataset) < 1:
            raise ValueError("there is nothing to sample: the data set is empty")
        if not 0 <= rank < num_replicas:
            raise ValueError(f"rank {rank} is not one of {num_replicas} replicas")
        if not 0 <= window_size <= 1:
            raise ValueError(f"window_size is a share of the data set, 0 to 1, not {window_size}")
        super().__init__()
        self.dataset = dataset
        self.rank = rank
        self.num_replicas = num_replicas
        self.shuffle = shuffle
        self.seed = seed
        self.window_size = window_size

    def __iter__(self) -> Iterator[int]:
        size = len(self.dataset)
        order = np.arange(size)
        random = np.random.RandomState(self.seed)
        window = 0
        if self.shuffle:
            random.shuffle(order)
            window = round(size * self.window_size)
        position = 0
        while True:
            here = position % size
            if position % self.num_replicas == self.rank:
                yield int(order[here])
            if window >= 2:  # drawn on every process alike, so that all keep the same order
                there = (here - random.randint(window)) % size
                order[here], order[there] = order[there], order[here]
            position += 1


# ----------------------------------------------------------------------------------------------------------------------
# Parameters and buffers


def params_and_buffers(module: nn.Module) -> list[Tensor]:
    """All parameters, then all buffers."""
    return [*module.parameters(), *module.buffers()]


def named_params_and_buffers(module: nn.Module) -> list[tuple[str, Tensor]]:
    """All parameters, then all buffers, with their names."""
    return [*module.named_parameters(), *module.named_buffers()]


@torch.no_grad()
def copy_params_and_buffers(src_module: nn.Module, dst_module: nn.Module, require_all: bool = False) -> None:
    """Copies by name what both modules have; `requires_grad` stays as it is.

    require_all: every parameter and buffer of `dst_module` must come from `src_module`. Raises ValueError for a lacking
    name or another shape, before anything is copied.
    """
    source = dict(named_params_and_buffers(src_module))
    target = dict(named_params_and_buffers(dst_module))
    lacking = [name for name in target if name not in source]
    if lacking and require_all:
        raise ValueError(f"the source lacks {', '.join(lacking[:5])}{' ...' if len(lacking) > 5 else ''}")
    shared = [name for name in target if name in source]
    for name in shared:
        if source[name].shape != target[name].shape:
            raise ValueError(f"{name}: shape {list(source[name].shape)} is not {list(target[name].shape)}")
    for name in shared:
        target[name].copy_(source[name])


@torch.no_grad()
def check_ddp_consistency(module: nn.Module, ignore_regex: str | None = None) -> None:
    """Raises RuntimeError, on every rank and with the names, unless all ranks hold the same bits.

    ignore_regex: names to leave out, as `ClassName.parameter.name` in full. Nothing to do in a single process. Every
    rank must call this.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    class_name = type(module).__name__
    names, differs = [], []
    for name, tensor in named_params_and_buffers(module):
        if ignore_regex is not None and re.fullmatch(ignore_regex, f"{class_name}.{name}"):
            continue
        own = tensor.detach().contiguous()
        others = own.clone()
        dist.broadcast(others, src=0)
        names.append(name)
        differs.append(not torch.equal(_bits(own), _bits(others)))
    if not names:
        return
    device = next(tensor.device for tensor in params_and_buffers(module))
    flags = torch.tensor(differs, dtype=torch.int32, device=device)
    dist.all_reduce(flags, op=dist.ReduceOp.MAX)  # all ranks must come to the same end, or the others would wait
    wrong = [name for name, flag in zip(names, flags.tolist(), strict=True) if flag]
    if wrong:
        shown = ", ".join(wrong[:5]) + (f" and {len(wrong) - 5} more" if len(wrong) > 5 else "")
        raise RuntimeError(f"the processes hold different values of {class_name}: {shown}")


def _bits(tensor: Tensor) -> Tensor:
    """The bytes of a contiguous tensor: NaNs compare equal to themselves, and 0 differs from -0."""
    return tensor.reshape(-1).view(torch.uint8)


# ----------------------------------------------------------------------------------------------------------------------
# Looking at a module


def print_module_summary(
    module: nn.Module, inputs: Sequence[Any], max_nesting: int = 3, skip_redundant: bool = True
) -> Any:
    """Runs `module(*inputs)`, prints a table of its submodules in the order they finish, and returns the outputs.

    A row tells parameters and buffers that no row before it has counted, and shape and type of the output.
    max_nesting: how deep to look. skip_redundant: leave out rows without numbers of their own and with the output of
    the row before. The module is called once, in the mode it is in.
    """
    rows: list[list[str]] = []
    seen: set[int] = set()
    depth = 0
    previous: list[Tensor] = []

    def enter(submodule: nn.Module, _inputs: Any) -> None:
        nonlocal depth
        depth += 1

    def leave(submodule: nn.Module, _inputs: Any, outputs: Any) -> None:
        nonlocal depth, previous
        depth -= 1
        if depth > max_nesting:
            return
        tensors = [t for t in (outputs if isinstance(outputs, (list, tuple)) else [outputs]) if isinstance(t, Tensor)]
        parameters = _count_new(submodule.parameters(), seen)
        buffers = _count_new(submodule.buffers(), seen)
        same = len(tensors) == len(previous) and all(a is b for a, b in zip(tensors, previous, strict=True))
        redundant = parameters == buffers == 0 and (not tensors or same)
        previous = tensors
        if skip_redundant and redundant:
            return
        name = names.get(submodule) or type(module).__name__
        shapes = " ".join(str(list(t.shape)) for t in tensors) or "-"
        types = " ".join(str(t.dtype).removeprefix("torch.") for t in tensors) or "-"
        rows.append([name, str(parameters or "-"), str(buffers or "-"), shapes, types])

    names = {submodule: name for name, submodule in module.named_modules()}
    hooks = [submodule.register_forward_pre_hook(enter) for submodule in module.modules()]
    hooks += [submodule.register_forward_hook(leave) for submodule in module.modules()]
    try:
        outputs = module(*inputs)
    finally:
        for hook in hooks:
            hook.remove()

    header = [type(module).__name__, "Parameters", "Buffers", "Output shape", "Datatype"]
    total = ["Total", *(str(_count_new(t, set())) for t in (module.parameters(), module.buffers())), "-", "-"]
    table = [header, ["---"] * 5, *rows, ["---"] * 5, total]
    widths = [max(len(row[column]) for row in table) for column in range(5)]
    print()
    for row in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    print()
    return outputs


def _count_new(tensors: Iterator[Tensor], seen: set[int]) -> int:
    """Number of elements in those tensors that are not in `seen` yet; adds them to it."""
    fresh = [tensor for tensor in tensors if id(tensor) not in seen]
    seen.update(id(tensor) for tensor in fresh)
    return sum(tensor.numel() for tensor in fresh)


def allow_tf32(allowed: bool) -> None:
    """Whether float32 products and convolutions on CUDA may be rounded to TF32, process-wide. Torch's own default lets
    convolutions: figures and images that are to be fp32 call this first."""
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    torch.backends.cudnn.allow_tf32 = allowed
