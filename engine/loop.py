"""The course of a run around `Trainer.step`: ticks, status lines, statistics, snapshots, pictures, states, signals."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
from tqdm import tqdm

from dnnlib.atomic import append_text, atomic_write
from dnnlib.cli import Stopped
from dnnlib.errors import UserError, printable
from dnnlib.util import format_time, read_file
from formats import state
from formats.network_files import save_network
from torch_utils import distributed as dist
from torch_utils.progress import training_bar
from training.config import plain
from training.loader import Loader
from training.recipe import TrainConfig
from training.training_loop import Trainer

from .health import Health
from .loggers import Loggers
from .options import named_differences
from .previews import save_samples, save_targets
from .stopping import noting_signals

RATE_IS_ZERO = "the learning rate reaches 0 at --duration, so a longer run must start anew"
COUNTERS = ("tick", "tick_start_nimg", "tick_start_step", "stats_lines")  # of a loop, part of its state


class Log:
    """A run's log: lines are printed by rank 0 and kept in `log.txt`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __call__(self, text: str = "") -> None:
        with tqdm.external_write_mode():  # which takes bars off the terminal for as long
            dist.print0(text)
        self.note(text)

    def note(self, text: str) -> None:
        """For `log.txt` alone."""
        if dist.is_main():
            append_text(self.path, text + "\n")


class Loop:
    """Trains to the end of a run. `run` is the loop; `end_tick` is what a tick brings."""

    def __init__(self, trainer: Trainer, log: Log) -> None:
        self.trainer, self.config, self.log = trainer, trainer.config, log
        self.run_dir = Path(trainer.config.run_dir)
        self.health = Health(trainer.config, trainer.dataset, log)
        self.bar: Any = tqdm(disable=True)  # until `run`
        self.tick = self.tick_start_nimg = self.tick_start_step = self.stats_lines = 0
        self.first_nimg = 0  # images seen before this process began
        self.start = time.time()  # of the run, without the time between its processes
        self.estimated = False  # whether the remaining time has been printed

    # -- the loop ----------------------------------------------------------------------------------------------------

    def run(self) -> Path:
        """Trains to the end and returns the path of the last snapshot. Raises Stopped when a signal has come."""
        config, trainer = self.config, self.trainer
        if trainer.nimg >= config.total_nimg:
            return self.finish_again()
        loader = Loader(
            trainer.dataset,
            seed=config.seed,
            batch_size=config.batch,
            rank=trainer.rank,
            world_size=trainer.world_size,
            step=trainer.step_count,
            workers=config.workers,
            pin=trainer.device.type == "cuda",
        )
        self.log(f"Training for {config.total_nimg / 1000:g} kimg...\n")
        stage = trainer.stage
        title = "training" if stage is None else f"{stage.grid.steps} -> {stage.sampling.grid.steps} steps"
        self.bar = training_bar(title, trainer.nimg, config.total_nimg)
        self.loggers = Loggers(config, self.log, begin=trainer.nimg)
        try:
            with noting_signals() as noted:
                self.train(loader, noted)
        finally:
            loader.close()
            self.bar.close()
            self.loggers.close()
        dist.barrier()
        self.log(f"\nDone: {self.snapshot_path()}")
        return self.snapshot_path()

    def train(self, loader: Loader, noted: Callable[[], int]) -> None:
        """Step by step, with ticks, states and signals in between."""
        config, trainer = self.config, self.trainer
        tick_start = last_save = time.time()
        maintenance, done = 0.0, False
        while not done:
            trainer.step(loader)
            self.health.add(trainer.step_count - 1, trainer.skipped)
            self.bar.update(config.batch)
            done = trainer.nimg >= config.total_nimg
            if done or self.tick == 0 or trainer.nimg >= self.tick_start_nimg + config.tick * 1000:
                tick_end = time.time()
                self.end_tick(done, tick_end - tick_start, maintenance)
                tick_start = time.time()
                maintenance = tick_start - tick_end
                # EDM's rule for --dump, by the number of the tick that has just ended.
                if config.dump is not None and (done or (self.tick > 1 and (self.tick - 1) % config.dump == 0)):
                    self.save_state(f"training-state-{trainer.nimg // 1000:06d}.pt")
                    last_save = time.time()
            stop = 0 if done else noted()
            if stop or (not done and time.time() - last_save >= config.save_every * 60):
                self.save_state(state.rolling_name(trainer.nimg))
                last_save = time.time()
            if stop:
                self.stop(stop)

    def stop(self, number: int) -> None:
        """Raises Stopped, once the state is written."""
        dist.barrier()  # whoever ended first would have the launcher kill the one that writes
        resume = "the same command" if self.config.nosubdir else "the same command with --resume=latest"
        text = f"interrupted by {signal.Signals(number).name} at {self.trainer.nimg / 1000:g} kimg"
        self.log(f"Wrote {self.run_dir / state.rolling_name(self.trainer.nimg)}")
        self.log.note(f"{text[:1].upper()}{text[1:]}")
        raise Stopped(number, f"{text}; state saved: run {resume} to resume" if dist.is_main() else "")

    def finish_again(self) -> Path:
        """For a state from which nothing is left to do: makes sure that the last snapshot is there."""
        path = self.snapshot_path()
        if dist.is_main() and not path.is_file():
            self.save_snapshot()
        dist.barrier()
        decays = self.config.lr_decay != "none"
        longer = f"{RATE_IS_ZERO} (another --outdir)" if decays else "a longer --duration trains on"
        self.log(f"This run is done already: {path}. Its --duration is {self.config.total_kimg / 1000:g}; {longer}")
        return path

    # -- a tick ------------------------------------------------------------------------------------------------------

    def end_tick(self, done: bool, seconds: float, maintenance: float) -> None:
        """Status line, snapshot, pictures, statistics. seconds: of the tick; maintenance: between it and the last."""
        trainer, name = self.trainer, f"{self.trainer.nimg // 1000:06d}.png"

        def due(ticks: int | None) -> bool:
            return ticks is not None and (done or self.tick % ticks == 0)

        self.health.check()
        self.report_progress(seconds, maintenance)
        if due(self.config.snap):
            check_same_weights(trainer.net, trainer.ema)
            trainer.check_finite()
            if dist.is_main():
                self.save_snapshot()
                save_samples(trainer, self.run_dir / f"samples-{name}")
            dist.barrier()
        if due(self.config.targets) and trainer.stage is not None and dist.is_main():
            save_targets(trainer, self.run_dir / f"targets-{name}")
        self.write_stats()
        self.tick += 1
        self.tick_start_nimg, self.tick_start_step = trainer.nimg, trainer.step_count

    def report_progress(self, seconds: float, maintenance: float) -> None:
        """EDM's status line, and the same figures as statistics."""
        trainer, stats, kimg = self.trainer, self.trainer.stats, self.trainer.nimg / 1e3
        images = trainer.nimg - max(self.tick_start_nimg, self.first_nimg)
        gpu = trainer.device if trainer.device.type == "cuda" else None
        elapsed, per_kimg = time.time() - self.start, seconds / max(images, 1) * 1e3
        memory = psutil.Process(os.getpid()).memory_info().rss / 2**30
        peak = torch.cuda.max_memory_allocated(gpu) / 2**30 if gpu else 0.0
        reserved = torch.cuda.max_memory_reserved(gpu) / 2**30 if gpu else 0.0
        figures = {
            "Progress/tick": self.tick,
            "Progress/kimg": kimg,
            "Timing/total_sec": elapsed,
            "Timing/sec_per_tick": seconds,
            "Timing/sec_per_kimg": per_kimg,
            "Timing/maintenance_sec": maintenance,
            "Resources/cpu_mem_gb": memory,
            "Resources/peak_gpu_mem_gb": peak,
            "Resources/peak_gpu_mem_reserved_gb": reserved,
            "Progress/skipped_steps": float(self.health.skipped),
            "Progress/learning_rate": float(trainer.optimizer.param_groups[0]["lr"]),
        }
        for name, value in figures.items():
            stats.report(name, value if dist.is_main() else [])
        stats.update()
        if gpu:
            torch.cuda.reset_peak_memory_stats(gpu)
        loss = stats.mean("Loss/loss")
        self.log(
            f"tick {self.tick:<5d} kimg {kimg:<9.1f} time {format_time(elapsed):<12s} sec/tick {seconds:<7.1f} "
            f"sec/kimg {per_kimg:<7.2f} maintenance {maintenance:<6.1f} cpumem {memory:<6.2f} "
            f"{f'gpumem {peak:<6.2f} reserved {reserved:<6.2f} ' if gpu else ''}loss {loss:<.5g}"
        )
        self.bar.set_postfix_str(f"loss {loss:.4g}", refresh=False)
        left = self.config.total_nimg - trainer.nimg
        # Not before half a tick: the first tick, and a short one after a resume, are mostly warm-up.
        if images >= max(self.config.batch + 1, self.config.tick * 500) and left > 0 and not self.estimated:
            self.log(f"About {format_time(left / images * seconds)} for the {left / 1000:g} kimg that are left")
            self.estimated = True

    def write_stats(self) -> None:
        """One line of `stats.jsonl` (and for the loggers), then the statistics start afresh."""
        values = self.trainer.stats.as_dict()
        self.trainer.stats.reset()
        self.stats_lines += 1
        if dist.is_main():
            append_text(self.run_dir / "stats.jsonl", json.dumps({**values, "timestamp": time.time()}) + "\n")
            self.loggers.write({name: value["mean"] for name, value in values.items()}, self.trainer.nimg)

    # -- files -------------------------------------------------------------------------------------------------------

    def snapshot_path(self) -> Path:
        """The network after the images seen so far."""
        return self.run_dir / f"network-snapshot-{self.trainer.nimg // 1000:06d}.pkl"

    def save_snapshot(self) -> None:
        """The average network in EDM's format, with its noise grid when it is a student."""
        trainer, config = self.trainer, self.config
        dataset = {"class_name": "training.dataset.ImageFolderDataset", **config.dataset_kwargs}
        save_network(
            self.snapshot_path(),
            trainer.ema,
            sampling=trainer.stage.sampling if trainer.stage else None,
            loss_fn=dict(config.loss_kwargs),
            augment_pipe=config.augment_kwargs,
            dataset_kwargs=dataset | ({"label_kind": "vectors"} if trainer.dataset.has_label_vectors else {}),
            extra={"training_options": config.to_file(trainer.nimg)},
        )

    def save_state(self, name: str) -> None:
        """Writes the exact state; every process has the same one, rank 0 writes. Then older ones may go."""
        self.health.check()
        self.trainer.check_finite()
        if dist.is_main():
            state.save_state(self.run_dir / name, self.state_dict())
            state.remove_old(self.run_dir)

    def state_dict(self) -> dict[str, Any]:
        """The trainer's state, and where the run is. See formats.state for the layout."""
        saved = self.trainer.state_dict()
        saved["position"] |= {name: getattr(self, name) for name in COUNTERS}
        saved["position"] |= {"skipped": self.health.skipped, "elapsed_sec": time.time() - self.start}
        return {**saved, "options": plain(self.config.identity())}

    def load_state(self, path: Path, saved: dict[str, Any]) -> None:
        """Resumes from a state. Raises UserError naming every option that differs from the run's own."""
        check_same_options(path, saved["options"], self.config)
        try:
            self.trainer.load_state(saved)
        except UserError as exc:
            raise UserError(f"{path}: {exc}") from exc
        position = saved["position"]
        for name in COUNTERS:
            setattr(self, name, position[name])
        self.start -= position["elapsed_sec"]
        self.first_nimg, self.health.skipped = position["nimg"], position["skipped"]
        stats = self.run_dir / "stats.jsonl"
        if path.resolve().parent != self.run_dir.resolve():
            self.stats_lines = 0
        if dist.is_main() and stats.is_file():  # what a killed run has written after its state goes
            lines = read_file(stats, "a log").splitlines(keepends=True)
            with atomic_write(stats) as file:
                file.writelines(lines[: self.stats_lines])
        here = (self.trainer.world_size, self.trainer.device.type)
        if (saved["world_size"], saved["device"]) != here:
            self.log(
                f"Note: this run was on {saved['world_size']} x {printable(saved['device'], 40)} and resumes with "
                f"{here[0]} x {here[1]}: the same images and noise, but sums may round differently"
                f"{', and dropout masks differ' if self.config.network_kwargs.get('dropout', True) else ''}"
            )
        self.log(f"Resuming from {path} at {self.first_nimg / 1000:g} kimg")


def check_same_options(where: object, saved: dict[str, Any], config: TrainConfig) -> None:
    """Raises UserError, naming every option that alters the result and differs from what an earlier run had."""
    if wrong := named_differences(saved, config.identity()):
        more = f": {RATE_IS_ZERO}" if any(each.startswith("--duration ") for each in wrong) else ""
        raise UserError(
            f"{where} belongs to a run with other options: {'; '.join(wrong)}. Use those, or another --outdir{more}"
        )


@torch.no_grad()
def check_same_weights(*nets: torch.nn.Module) -> None:
    """Raises UserError when processes have other bits (a fault of a machine or of this program)."""
    if dist.get_world_size() == 1:
        return
    digest = hashlib.sha256()
    for net in nets:
        for parameter in net.parameters():
            digest.update(parameter.detach().contiguous().cpu().numpy().data)
    digests = dist.gather_objects(digest.hexdigest())
    if other := [rank for rank, theirs in enumerate(digests) if theirs != digests[0]]:
        raise UserError(
            f"the processes have different weights (rank {other[0]} and rank 0, for one), a fault of a machine or of "
            "this program; the last state on disk is from before this was noticed"
        )
