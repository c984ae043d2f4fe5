"""Processes and devices: one process alone, or several under torchrun (or plain RANK/WORLD_SIZE variables).

Every function works before `init` and without it: then there is one process, rank 0 of 1, on the CPU.
"""

from __future__ import annotations

import atexit
import json
import os
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from dnnlib import cli
from dnnlib.cli import FailedElsewhere, UsageError, UserError

T = TypeVar("T")

COLLECTIVE_TIMEOUT = 600  # seconds of a training step's exchange; EDM_COLLECTIVE_TIMEOUT sets another
PATIENCE = timedelta(days=30)  # of a barrier: shares of work may end hours apart, and a lost process breaks it at once

_device = torch.device("cpu")
_control_group: dist.ProcessGroup | None = None  # Gloo, also beside NCCL: decisions among hosts never wait for a GPU


def init(device: str = "auto", options: Mapping[str, Any] | None = None) -> torch.device:
    """Sets up this process and returns its device: 'auto' (CUDA where present), 'cuda' or 'cpu'. Under a launcher
    (WORLD_SIZE > 1) joins the process group: NCCL with one GPU a process, or Gloo on the CPU.

    Raises UsageError for a device that isn't there, UserError for more processes than GPUs, for a rendezvous that
    doesn't come about, and for processes with other `options` (by name, as the user knows them).
    """
    global _device, _control_group
    if device not in ("auto", "cuda", "cpu"):
        raise UsageError(f"--device={device} is unknown; use auto, cuda or cpu")
    use_cuda = device != "cpu" and torch.cuda.is_available()
    if device == "cuda" and not use_cuda:
        raise UsageError(
            "--device=cuda, but PyTorch finds no CUDA device; use --device=cpu, or another build of PyTorch"
        )
    world_size, rank = _whole("WORLD_SIZE", 1), _whole("RANK", 0)
    if rank >= max(world_size, 1):
        raise UserError(f"RANK={rank} must be below WORLD_SIZE={world_size}: ranks begin with 0")
    _device = torch.device("cpu")
    if use_cuda:
        local_rank = _whole("LOCAL_RANK", _whole("SLURM_LOCALID", 0)) if world_size > 1 else 0
        if local_rank >= torch.cuda.device_count():
            raise UserError(
                f"process {local_rank} of this machine has no GPU: there are {torch.cuda.device_count()}; "
                "start at most one process per GPU (--nproc_per_node), or use --device=cpu"
            )
        _device = torch.device("cuda", local_rank)
        torch.cuda.set_device(_device)
    if world_size > 1 and not dist.is_initialized():
        limit = timedelta(seconds=_whole("EDM_COLLECTIVE_TIMEOUT", COLLECTIVE_TIMEOUT))
        try:
            store, rank, world_size = next(rendezvous("env://", timeout=limit))
            # Processes that torchrun has restarted meet in the store of those before, and must not find their
            # addresses there: each start has keys of its own.
            store = dist.PrefixStore(f"edm-distill/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
            group: dict[str, Any] = {"store": store, "rank": rank, "world_size": world_size, "timeout": limit}
            group |= {"device_id": _device} if use_cuda else {}
            dist.init_process_group("nccl" if use_cuda else "gloo", **group)
            _control_group = dist.new_group(backend="gloo", timeout=PATIENCE)
        except (ValueError, RuntimeError) as exc:
            raise UserError(
                f"the processes could not meet (check MASTER_ADDR, MASTER_PORT, RANK, WORLD_SIZE): {exc}"
            ) from exc
        atexit.register(shutdown)  # for programs of others: our own scripts end by os._exit (dnnlib.cli.run)
        check_agreement({f"--{name}": value for name, value in (options or {}).items()})
    return _device


def _whole(variable: str, default: int) -> int:
    """A whole number, 0 or more, in the environment. Raises UserError for anything else."""
    text = os.environ.get(variable) or str(default)
    if not (text.isascii() and text.isdigit()):
        raise UserError(f"{variable}={text} must be a whole number, 0 or more")
    return int(text)


def shutdown() -> None:
    """Leaves the process group, if there is one. A process that ends by os._exit leaves it anyway."""
    global _control_group
    if dist.is_initialized() and not cli.leaving_by_exit:
        dist.destroy_process_group()
        _control_group = None


def device() -> torch.device:
    return _device


def get_rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def get_world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    return get_rank() == 0


def print0(*args: Any, **kwargs: Any) -> None:
    """`print`, by rank 0 alone, at once."""
    if is_main():
        print(*args, **{"flush": True, **kwargs})


def barrier() -> None:
    """Waits until every process is here, for hours if need be."""
    if dist.is_initialized():
        dist.barrier(group=_control_group)


def broadcast_object(value: Any) -> Any:
    """Rank 0's `value` (a plain picklable object), on every rank. Waits as `barrier` does."""
    if not dist.is_initialized():
        return value
    box: list[Any] = [value]
    dist.broadcast_object_list(box, src=0, group=_control_group)
    return box[0]


def gather_objects(value: Any) -> list[Any]:
    """Every rank's `value`, on every rank, in the order of ranks. Waits as `barrier` does."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * get_world_size()
    dist.all_gather_object(values, value, group=_control_group)
    return values


def from_rank0(action: Callable[[], T]) -> T:
    """What `action` returns on rank 0 (a plain picklable object), on every rank.

    What fails there fails everywhere, since the others would wait; rank 0 alone prints why.
    """
    answer: Any = None
    failure: Exception | None = None
    try:
        answer = action() if is_main() else None
    except Exception as exc:
        failure = exc
    answer, failed = broadcast_object((answer, failure is not None))
    if failed:
        raise failure or FailedElsewhere("rank 0 has failed, and prints why")
    return answer


def rank0_first(fetch: Callable[[], T]) -> T:
    """`fetch()` on every rank, on rank 0 before the others, so that they find its download in the cache."""
    fetched: list[T] = []
    from_rank0(lambda: fetched.append(fetch()))
    return fetched[0] if fetched else fetch()


def check_agreement(facts: Mapping[str, Any]) -> None:
    """Raises UserError, on every rank, naming what differs between a process and rank 0, which alone prints it.

    facts: plain values that JSON knows, by the names that they have for people. To be called by all.
    """
    everybody = gather_objects({name: json.dumps(value, sort_keys=True) for name, value in facts.items()})
    wrong = [
        f"{name} is {value:.80} on rank 0, {theirs.get(name, 'nothing'):.80} on rank {rank}"
        for name, value in everybody[0].items()
        for rank, theirs in enumerate(everybody)
        if theirs.get(name) != value
    ]
    if wrong and not is_main():
        raise FailedElsewhere("rank 0 prints what differs")
    if wrong:
        more = f" (and {len(wrong) - 3} more)" if len(wrong) > 3 else ""
        raise UserError(f"the processes do not agree: {'; '.join(wrong[:3])}{more}. Start all of them alike")


def agree_on_largest(value: int) -> int:
    """The largest of every rank's whole number, on every rank. Among hosts: no GPU is waited for."""
    if not dist.is_initialized():
        return value
    box = torch.tensor(value, dtype=torch.int64)
    dist.all_reduce(box, op=dist.ReduceOp.MAX, group=_control_group)
    return int(box)


def all_reduce_sum(tensors: Sequence[torch.Tensor]) -> None:
    """Sums each tensor over all processes, in place."""
    if dist.is_initialized():
        for tensor in tensors:
            dist.all_reduce(tensor)
