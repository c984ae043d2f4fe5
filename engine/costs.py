"""What a run costs: FLOPs, memory, disk. Printed before the start, and used to choose how many images fit."""

from __future__ import annotations

import math
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch

from dnnlib.cli import UserError
from dnnlib.util import count
from formats import state
from torch_utils import distributed as dist
from training.config import AUTO, check_batch
from training.dataset import ImageFolderDataset
from training.distillation import Stage
from training.networks import UNetBlock
from training.recipe import TrainConfig
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


def network_cost(config: TrainConfig, dataset: ImageFolderDataset, stage: Stage | None = None) -> Cost:
    """Counted on torch's meta device: nothing is computed or allocated. Foreign code runs on the CPU."""
    from torch.utils.flop_counter import FlopCounterMode

    kept, before = 0, 0
    blocks: list[tuple[int, int]] = []  # of each block: bytes of its input, bytes kept within

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal kept
        kept += tensor.numel() * tensor.element_size() if not isinstance(tensor, torch.nn.Parameter) else 0
        return tensor

    def enter(block: Any, inputs: Any) -> None:
        nonlocal before
        before = kept

    def leave(block: Any, inputs: Any, output: Any) -> None:
        blocks.append((inputs[0].numel() * inputs[0].element_size(), kept - before))

    foreign = stage is not None and stage.teacher.own_code
    with torch.device("cpu" if foreign else "meta"):
        net = run_network(config, dataset, stage) if foreign else meta_network(config, dataset)
        for block in net.modules():
            if isinstance(block, UNetBlock):
                block.register_forward_pre_hook(enter)
                block.register_forward_hook(leave)
        images = torch.zeros(1, *dataset.image_shape)
        labels = torch.zeros(1, dataset.label_dim) if dataset.label_dim else None
        counter = FlopCounterMode(display=False)
        with counter, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            net(images, torch.ones(1), labels)
    inner = [within for _, within in blocks]
    recompute = kept - sum(inner) + sum(entering for entering, _ in blocks) + max(inner, default=0)
    return Cost(sum(p.numel() for p in net.parameters()), counter.get_total_flops(), kept, recompute)


def meta_network(config: TrainConfig, dataset: ImageFolderDataset, stage: Stage | None = None) -> Any:
    """The network of a run without its weights. Raises UserError for one that can't be made."""
    if stage is not None and stage.teacher.own_code:
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
    config, cost = run.config, run.cost
    if config.batch_gpu == AUTO:
        size = largest_counted(run)
    else:
        size, _ = check_batch(config.batch, config.batch_gpu, dist.get_world_size())
    memory = fixed_memory(run) + bytes_per_image(run) * size
    return [
        f"Parameters:              {cost.parameters / 1e6:.2f} M",
        f"FLOPs per network call:  {cost.flops / 1e9:.4g} GFLOP an image",
        f"Memory with activations: about {gib(memory)} per process, of {count(size, 'image')} at fp32",
    ]


def describe_memory(run: Run) -> str:
    """What a process needs besides activations, in words."""
    need, free = fixed_memory(run), free_memory()
    parts = f"weights, gradients, Adam, EMA{', teacher' if run.stage else ''}"
    note = f": more than the {gib(free)} that are free, it will not run here" if need > free else ""
    return f"{gib(need)} for {parts}, and activations on top{note}"


def fixed_memory(run: Run) -> int:
    """Bytes that do not depend on the batch: float32 weights, gradients, two averages of Adam's, EMA, teacher."""
    copies = 5 + (run.stage is not None)
    return copies * 4 * run.cost.parameters


def free_memory() -> int:
    """Bytes free on this process's GPU, or in the machine."""
    if dist.device().type == "cuda":
        return int(torch.cuda.mem_get_info(dist.device())[0])
    return int(psutil.virtual_memory().available)


def describe_absurdity(run: Run) -> str | None:
    """A line for a run that takes a CPU a month or more even at CPU_FLOPS a core; None for any other."""
    config = run.config
    if dist.device().type != "cpu":
        return None
    days = run.flops_per_image / (CPU_FLOPS * (os.cpu_count() or 1)) / 86400
    total = days * config.total_nimg
    if total < ABSURD_DAYS:
        return None
    step = days * config.batch * 1440
    shorter = f"--duration={1 / days / 1e6:.2g} is what it does in a day"
    fits = "--cbase=32 --cres=1,2 --blocks=1 --batch=64 fits a CPU (docs/your-own-data.md)"
    smaller = "" if run.stage else f"; {fits}"
    takes = f"{total / 365:.2g} years" if total > 700 else f"{total:.0f} days"
    return (
        f"Note: this takes {takes} at the least on {count(os.cpu_count() or 1, 'CPU core')}, a step of "
        f"--batch={config.batch} {step:.2g} minutes: {shorter}{smaller}"
    )


# ---------------------------------------------------------------------------------------------------------------------
# --batch-gpu=auto


def bytes_per_image(run: Run) -> int:
    """What an image adds to a process's memory while the network is trained, counted for float32."""
    return run.cost.recompute_bytes if run.config.recompute else run.cost.activation_bytes


def largest_batch(run: Run) -> int:
    """How many images a process can take at once: the largest divisor of its share of the batch that fits, on every
    process. On a GPU by trying; elsewhere, where too much would end the process, by counting."""
    if dist.device().type == "cuda":
        size = next((n for n in divisors(run) if _fits(run, n)), 1)
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
    share, _ = check_batch(run.config.batch, None, dist.get_world_size())
    return [n for n in range(share, 0, -1) if share % n == 0]


def _fits(run: Run, images: int) -> bool:
    """Whether a forward and a backward pass over so many images go through, beside what else a run holds."""
    try:
        _try_out(run, images)
        return True
    except torch.OutOfMemoryError:
        return False
    finally:
        if dist.device().type == "cuda":
            torch.cuda.empty_cache()


def _try_out(run: Run, images: int) -> None:
    """One forward and backward pass, with as much memory taken besides as a run takes. Raises OutOfMemoryError."""
    config, dataset, device = run.config, run.dataset, dist.device()
    own = 2 * 4 * run.cost.parameters  # the weights and gradients of the trial itself
    spare = SPARE * torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 0
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


# ---------------------------------------------------------------------------------------------------------------------
# Disk


@dataclass(frozen=True)
class DiskNeed:
    """What a run writes at most. Sizes in bytes; `pictures` are all of them together."""

    snapshots: int
    dumps: int
    snapshot_bytes: int
    state_bytes: int
    picture_bytes: int

    @property
    def total(self) -> int:
        """While the last state is written: the new one is whole before an old one goes."""
        states = self.dumps + state.KEPT_ROLLING + 1
        return self.snapshots * self.snapshot_bytes + states * self.state_bytes + self.picture_bytes

    @property
    def least(self) -> int:
        """A snapshot and two states: with less, a run can't save its first state and then a second one."""
        return self.snapshot_bytes + 2 * self.state_bytes

    def describe(self, run_dir: str) -> str:
        """In words, beside what is free there, and a warning where the run can't end."""
        text = (
            f"at most {gib(self.total)} ({count(self.snapshots, 'snapshot')} of {gib(self.snapshot_bytes)}; "
            f"{count(self.dumps, 'dump')}, {state.KEPT_ROLLING} rolling states and one being written, of "
            f"{gib(self.state_bytes)}), "
            f"{gib(free_disk(run_dir))} free"
        )
        if self.total - written_before(run_dir) > free_disk(run_dir):
            text += ". The disk may fill before the run ends: free some, or use a larger --snap or --dump"
        return text


def disk_need(config: TrainConfig, dataset: ImageFolderDataset, stage: Stage | None = None) -> DiskNeed:
    """Counts what the rules of `Trainer` write in a run from its beginning."""
    parameters = list(meta_network(config, dataset, stage).parameters())
    weights = 4 * sum(p.numel() for p in parameters)
    steps = math.ceil(config.total_nimg / config.batch)
    last_tick = math.ceil((steps - 1) / math.ceil(config.tick * 1000 / config.batch))  # the first is 0

    def times(ticks: int | None, first: int) -> int:
        """Ticks first ... last_tick that are multiples of `ticks`, and the last one; names differ by thousands."""
        if ticks is None:
            return 0
        number = last_tick // ticks + 1 - first + (last_tick % ticks > 0 or last_tick < first)
        return min(number, config.total_kimg + 1)

    snapshots, sheets = times(config.snap, 0), times(config.targets, 0)
    image = math.prod(dataset.image_shape)  # of one byte a value, as a PNG has at most
    return DiskNeed(
        snapshots=snapshots,
        dumps=min(times(config.dump, 1), state.KEPT_DUMPS),
        snapshot_bytes=weights + OVERHEAD + 1024 * len(parameters),  # the classes' source, names and shapes
        state_bytes=4 * weights + OVERHEAD + 2048 * len(parameters),  # weights, EMA, two averages of Adam's
        picture_bytes=image * (snapshots * MAX_SAMPLES + sheets * MAX_ROWS * TARGET_COLUMNS),
    )


def check_disk(run: Run) -> None:
    """Raises UserError where a run that has nothing there yet can't even save a state and then a second one."""
    need, run_dir = disk_need(run.config, run.dataset, run.stage), run.config.run_dir
    free = free_disk(run_dir)
    if need.least > free + written_before(run_dir):
        raise UserError(
            f"{run_dir}: the disk has {gib(free)} free, but a snapshot and two training states take {gib(need.least)}; "
            "free some space, or use an --outdir on another disk"
        )


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
