"""Processes and devices: one process alone, or several under torchrun (or plain RANK/WORLD_SIZE variables).

Every function works before `init` and without it: then there is one process, rank 0 of 1, on the CPU.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from dnnlib import cli
from dnnlib.cli import FailedElsewhere, UsageError, UserError

T = TypeVar("T")

_device = torch.device("cpu")
_control_group: dist.ProcessGroup | None = None  # Gloo beside NCCL: decisions among hosts never wait for a GPU


def init(device: str = "auto", timeout_minutes: float = 10) -> torch.device:
    """Sets up this process and returns its device.

    device: 'auto' (CUDA where present), 'cuda' or 'cpu'. Under a launcher (WORLD_SIZE > 1) joins the process group:
    NCCL on CUDA with one GPU a process, Gloo on the CPU. Raises UsageError for a device that isn't there, UserError for
    more processes than GPUs and for a rendezvous that doesn't come about.
    """
    global _device, _control_group
    if device not in ("auto", "cuda", "cpu"):
        raise UsageError(f"--device={device} is unknown; use auto, cuda or cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError(
            "--device=cuda, but PyTorch finds no CUDA device; use --device=cpu, or a CUDA build of PyTorch"
        )
    use_cuda = device != "cpu" and torch.cuda.is_available()
    local_rank = _local_rank()
    if use_cuda:
        if local_rank >= torch.cuda.device_count():
            raise UserError(
                f"process {local_rank} of this machine has no GPU: there are {torch.cuda.device_count()}; "
                "start at most one process per GPU (--nproc_per_node), or use --device=cpu"
            )
        _device = torch.device("cuda", local_rank)
        torch.cuda.set_device(_device)
    else:
        _device = torch.device("cpu")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        timeout = timedelta(minutes=timeout_minutes)
        try:
            if use_cuda:
                dist.init_process_group("nccl", timeout=timeout, device_id=_device)
                _control_group = dist.new_group(backend="gloo", timeout=timeout)
            else:
                dist.init_process_group("gloo", timeout=timeout)
        except (ValueError, RuntimeError) as exc:
            raise UserError(
                f"the processes could not meet (check MASTER_ADDR, MASTER_PORT, RANK, WORLD_SIZE): {exc}"
            ) from exc
        atexit.register(shutdown)  # for programs of others: our own scripts end by os._exit (dnnlib.cli.run)
    return _device


def _local_rank() -> int:
    """This process's number on its machine: torchrun's variable, Slurm's, or the rank itself."""
    for name in ("LOCAL_RANK", "SLURM_LOCALID"):
        if name in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            return int(os.environ[name])
    return 0


def shutdown() -> None:
    """Leaves the process group, if there is one (unless the whole process is about to end, which does)."""
    global _control_group
    if cli.leaving_by_exit:
        return
    if dist.is_initialized():
        dist.destroy_process_group()
    _control_group = None


def device() -> torch.device:
    """The device that `init` chose."""
    return _device


def get_rank() -> int:
    """This process's number, 0-based."""
    return dist.get_rank() if dist.is_initialized() else 0


def get_world_size() -> int:
    """How many processes work together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this is the process that speaks and writes files."""
    return get_rank() == 0


def print0(*args: Any, **kwargs: Any) -> None:
    """`print`, by rank 0 alone, at once."""
    if is_main():
        print(*args, **{"flush": True, **kwargs})


def barrier() -> None:
    """Waits until every process is here."""
    if dist.is_initialized():
        dist.barrier(group=_control_group)


def broadcast_object(value: Any) -> Any:
    """Rank 0's `value` (a plain picklable object), on every rank."""
    if not dist.is_initialized():
        return value
    box: list[Any] = [value]
    dist.broadcast_object_list(box, src=0, group=_control_group)
    return box[0]


def gather_objects(value: Any) -> list[Any]:
    """Every rank's `value`, on every rank, in the order of ranks."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * get_world_size()
    dist.all_gather_object(values, value, group=_control_group)
    return values


def from_rank0(action: Callable[[], T]) -> T:
    """What `action` returns on rank 0 (a plain picklable object), on every rank.

    What fails there fails everywhere, for the others would wait for one that is gone; rank 0 alone says why.
    """
    answer: Any = None
    failure: Exception | None = None
    if is_main():
        try:
            answer = action()
        except Exception as exc:
            failure = exc
    answer, failed = broadcast_object((answer, failure is not None))
    if failure is not None:
        raise failure
    if failed:
        raise FailedElsewhere("rank 0 has failed, and says why")
    return answer


def rank0_first(fetch: Callable[[], T]) -> T:
    """`fetch()` on every rank, on rank 0 before the others, so that they find its download in the cache."""
    fetched: list[T] = []
    from_rank0(lambda: fetched.append(fetch()))
    return fetched[0] if fetched else fetch()


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


def should_stop() -> bool:
    """Kept for programs written against EDM: nothing here asks a run to stop this way."""
    return False


def update_progress(cur: int, total: int) -> None:
    """Kept for programs written against EDM: progress is printed by the tasks themselves."""
