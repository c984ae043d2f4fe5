"""What a run costs: FLOPs, memory, disk. Printed before the start, and used to choose how many images fit."""

from __future__ import annotations

import math
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import psutil
import torch

from dnnlib.util import count
from formats import state
from torch_utils import distributed as dist
from training.config import AUTO, check_batch
from training.networks import UNetBlock
from training.speed import compute_dtype, recompute_blocks
from training.training_loop import build_network, run_network

from .previews import MAX_ROWS, MAX_SAMPLES, TARGET_COLUMNS

if TYPE_CHECKING:
    from .setup import Run

OVERHEAD = 128 << 10  # bytes of a snapshot or a state besides tensors
CPU_FLOPS = 1e11  # a second and core: more than convolutions reach
ABSURD_DAYS = 30
SPARE = 0.1  # part of a GPU's memory that --batch-gpu=auto leaves free
SHARE = 0.5  # part of a machine's free memory that it takes


@dataclass
class Cost:
    """Parameters; FLOPs of one network call for one image (a multiply-add is 2); bytes kept for the backward pass, and
    how many with --recompute."""

    parameters: int
    flops: int
    activation_bytes: int
    recompute_bytes: int


def network_cost(run: Run) -> Cost:
    """Counted on torch's meta device: nothing is computed or allocated. Foreign code runs on the CPU."""
    from torch.utils.flop_counter import FlopCounterMode

    kept: list[int] = []  # bytes of every tensor
    entered: list[int] = []  # of every block: its input's bytes
    inner: list[int] = []  # of every block: bytes kept within

    def size(tensor: torch.Tensor) -> int:
        return 0 if isinstance(tensor, torch.nn.Parameter) else tensor.numel() * tensor.element_size()

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(size(tensor))
        return tensor

    def enter(block: Any, inputs: Any) -> None:
        entered.append(size(inputs[0]))
        inner.append(-sum(kept))

    def leave(*_: Any) -> None:
        inner[-1] += sum(kept)

    foreign = run.stage is not None and run.stage.teacher.foreign_code
    with torch.device("cpu" if foreign else "meta"):
        net = run_network(run.config, run.dataset, run.stage) if foreign else meta_network(run)
        for block in net.modules():
            if isinstance(block, UNetBlock):
                block.register_forward_pre_hook(enter)
                block.register_forward_hook(leave)
        images = torch.zeros(1, *run.dataset.image_shape)
        labels = torch.zeros(1, run.dataset.label_dim) if run.dataset.label_dim else None
        counter = FlopCounterMode(display=False)
        with counter, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            net(images, torch.ones(1), labels)
    recompute = sum(kept) - sum(inner) + sum(entered) + max(inner, default=0)
    return Cost(sum(p.numel() for p in net.parameters()), counter.get_total_flops(), sum(kept), recompute)


def meta_network(run: Run) -> Any:
    """The network of a run without its weights. Raises UserError for one that can't be made."""
    config, dataset, stage = run.config, run.dataset, run.stage
    if stage is not None and stage.teacher.foreign_code:
        return run_network(config, dataset, stage).to("meta")
    own = ("sigma_data", "sigma_min", "sigma_max", "beta_d", "beta_min", "M", "epsilon_t", "C_1", "C_2")
    model = {name: value for name, value in config.network_kwargs.items() if name not in own}
    model["class_name"] = "EDMPrecond"  # the others compute numbers when they are made, which the meta device can't
    with torch.device("meta"):
        return build_network(model, dataset.resolution, dataset.num_channels, dataset.label_dim)


def training_calls(solver: str | None, ratio: int = 1, self_teacher: bool = False) -> float:
    """What training on an image costs, in network calls forward.

    Three for the pass forward and back of what is trained, and those of its teacher, which takes `ratio` steps of
    `solver` (None: no teacher), or with a self-teacher one step, after which the student's average answers once.
    """
    if solver is None:
        return 3.0
    step = 2 if solver == "heun" else 1
    return 3.0 + (step + 1 if self_teacher else ratio * step)


def describe_cost(run: Run) -> list[str]:
    """Lines for `--dry-run`, beyond those of every start: parameters, FLOPs of a network call, memory."""
    config, cost, size = run.config, run.cost, largest_counted(run)
    if config.batch_gpu != AUTO:
        size = check_batch(config.batch, config.batch_gpu, dist.get_world_size())
    memory = fixed_memory(run) + bytes_per_image(run) * size
    return [
        f"Parameters:              {cost.parameters / 1e6:.2f} M",
        f"FLOPs per network call:  {cost.flops / 1e9:.4g} GFLOP an image",
        f"Memory with activations: about {gib(memory)} per process, of {count(size, 'image')} at fp32",
    ]


def describe_memory(run: Run) -> str:
    """What a process needs besides activations, in words."""
    need, free = fixed_memory(run), free_memory()
    note = f": more than the {gib(free)} that are free, it will not run here" if need > free else ""
    return f"{gib(need)} for weights, gradients, Adam, EMA{', teacher' * bool(run.stage)}, and activations on top{note}"


def fixed_memory(run: Run) -> int:
    """Bytes that do not depend on the batch: float32 weights, gradients, two averages of Adam's, EMA, teacher."""
    copies = 5 + (run.stage is not None)
    return copies * 4 * run.cost.parameters


def free_memory() -> int:
    """Bytes free on this process's GPU, or in the machine."""
    if dist.device().type == "cuda":
        return int(torch.cuda.mem_get_info(dist.device())[0])
    return int(psutil.virtual_memory().available)


def describe_absurdity(run: Run) -> list[str]:
    """A remark on a run that takes a CPU a month or more even at CPU_FLOPS a core; none for any other."""
    cores = os.cpu_count() or 1
    seconds = run.flops_per_image / (CPU_FLOPS * cores)
    days = seconds * run.config.total_nimg / 86400
    remark = (
        f"this takes {days:.0f} days or more on {count(cores, 'CPU core')}; a day is enough for "
        f"--duration={86400 / seconds / 1e6:.2g}, or for a smaller network (docs/your-own-data.md)"
    )
    return [remark] if dist.device().type == "cpu" and days >= ABSURD_DAYS else []


# ---------------------------------------------------------------------------------------------------------------------
# --batch-gpu=auto


def bytes_per_image(run: Run) -> int:
    """What an image adds to a process's memory while the network is trained, counted for float32."""
    return run.cost.recompute_bytes if run.config.recompute else run.cost.activation_bytes


def largest_batch(run: Run) -> int:
    """How many images a process can take at once: the largest divisor of its share of the batch that fits, on every
    process. On a GPU by trying; elsewhere, where too much would end the process, by counting."""
    if dist.device().type == "cuda":
        size = next(size for size in divisors(run) if _fits(run, size) or size == 1)
        torch.cuda.empty_cache()
    else:
        size = largest_counted(run)
    return int(min(dist.gather_objects(size)))


def largest_counted(run: Run) -> int:
    """The same by counting alone, from the memory that is free now."""
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if dist.device().type == "cpu" else 1
    room = SHARE * free_memory() / processes - fixed_memory(run)
    return next((n for n in divisors(run) if n * bytes_per_image(run) <= room), 1)


def divisors(run: Run) -> list[int]:
    """What --batch-gpu may be, the largest first."""
    share = check_batch(run.config.batch, None, dist.get_world_size())
    return [n for n in range(share, 0, -1) if share % n == 0]


def _fits(run: Run, images: int) -> bool:
    """Whether a forward and a backward pass over so many images go through, beside all else that a run takes."""
    config, dataset, device = run.config, run.dataset, dist.device()
    own = 2 * 4 * run.cost.parameters  # the weights and gradients of the trial itself
    spare = SPARE * torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 0
    torch.cuda.empty_cache()
    try:
        everything_else = torch.empty(int(fixed_memory(run) - own + spare), dtype=torch.uint8, device=device)
        net = run_network(config, dataset, run.stage)
        net.train().requires_grad_(True).to(device)
        net.compute_dtype = compute_dtype(config.precision, device)
        if config.recompute:
            recompute_blocks(net)
        x = torch.zeros(images, *dataset.image_shape, device=device)
        labels = torch.zeros(images, dataset.label_dim, device=device) if dataset.label_dim else None
        net(x, torch.ones(images, device=device), labels).square().mean().backward()
        del everything_else
        return True
    except torch.OutOfMemoryError:
        return False


# ---------------------------------------------------------------------------------------------------------------------
# Disk


class DiskNeed(NamedTuple):
    """What a run writes at most. Sizes in bytes."""

    snapshots: int
    dumps: int
    snapshot: int  # the size of one
    state: int
    total: int


def disk_need(run: Run) -> DiskNeed:
    """Counts what the rules of `engine.loop` write in a run from its beginning."""
    config, parameters = run.config, list(run.meta.parameters())
    weights = 4 * sum(p.numel() for p in parameters)
    steps = math.ceil(config.total_nimg / config.batch)
    last_tick = math.ceil((steps - 1) / math.ceil(config.tick * 1000 / config.batch))  # the first is 0

    def times(ticks: int | None, first: int) -> int:
        """Ticks first ... last_tick that are multiples of `ticks`, and the last one; names differ by thousands."""
        if ticks is None:
            return 0
        number = last_tick // ticks + 1 - first + (last_tick % ticks > 0 or last_tick < first)
        return min(number, config.total_kimg + 1)

    snapshots, dumps = times(config.snap, 0), min(times(config.dump, 1), state.KEPT_DUMPS)
    snapshot = weights + OVERHEAD + 1024 * len(parameters)  # the classes' source, names and shapes
    full = 4 * weights + OVERHEAD + 2048 * len(parameters)  # weights, EMA, two averages of Adam's
    states = dumps + state.KEPT_ROLLING + 1  # a new one is whole before an old one goes
    pictures = snapshots * MAX_SAMPLES + times(config.targets, 0) * MAX_ROWS * TARGET_COLUMNS
    image = math.prod(run.dataset.image_shape)  # of one byte a value, as a PNG has at most
    return DiskNeed(snapshots, dumps, snapshot, full, snapshots * snapshot + states * full + pictures * image)


def describe_disk(run: Run) -> str:
    """What a run needs beside what is free, in words, and a warning where it can't end."""
    need, free = disk_need(run), free_disk(run.config.run_dir)
    fills = need.total - written_before(run.config.run_dir) > free
    return (
        f"at most {gib(need.total)} ({count(need.snapshots, 'snapshot')} of {gib(need.snapshot)}; "
        f"{count(need.dumps, 'dump')}, {state.KEPT_ROLLING} rolling states and one being written, of "
        f"{gib(need.state)}), {gib(free)} free"
    ) + ". The disk may fill before the run ends: free some, or use a larger --snap or --dump" * fills


def free_disk(place: str) -> int:
    """Bytes free for a user's files where a folder is, or is to be made."""
    folder = Path(place).absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def written_before(run_dir: str) -> int:
    """Bytes that a run's snapshots, states and pictures take already."""
    kinds = ("network-snapshot-*.pkl", "training-state-*.pt", "samples-*.png", "targets-*.png")
    return sum(path.stat().st_size for kind in kinds for path in Path(run_dir).glob(kind))


def gib(size: float) -> str:
    """Bytes for people."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**28 else f"{size / 2**20:.1f} MiB"
