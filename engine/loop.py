"""The course of a run around `Trainer.step`: ticks, status lines, statistics, snapshots, pictures, states, signals."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import time
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
from torch_utils.progress import print_above_bars, training_bar
from training.loader import Loader
from training.recipe import TrainConfig
from training.training_loop import Trainer

from .health import Health
from .loggers import open_loggers
from .options import named_differences
from .previews import save_samples, save_targets
from .stopping import StopSignals

RATE_IS_ZERO = "the learning rate reaches 0 at --duration, so a longer run must start anew"


class Log:
    """A run's log: lines are printed by rank 0 and kept in `log.txt`."""

    def __init__(self, path: Path | None) -> None:
        self.path = path if dist.is_main() else None

    def __call__(self, text: str = "") -> None:
        print_above_bars(text)
        self.note(text)

    def note(self, text: str) -> None:
        """For `log.txt` alone."""
        if self.path is not None:
            append_text(self.path, text + "\n")


class Loop:
    """Trains to the end of a run. `run` is the loop; `end_tick` is what a tick brings."""

    def __init__(self, trainer: Trainer, log: Log) -> None:
        self.trainer, self.config, self.log = trainer, trainer.config, log
        self.run_dir = Path(trainer.config.run_dir)
        self.health = Health(trainer.config, trainer.dataset, log, log.note)
        self.loggers = open_loggers(trainer.config, log, lambda: self.first_nimg)
        self.bar: Any = tqdm(disable=True)  # until `run`
        self.tick = self.tick_start_nimg = self.tick_start_step = 0
        self.stats_lines = 0
        self.first_nimg = 0  # images seen before this process began
        self.elapsed_before = 0.0  # seconds that earlier processes of this run took
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
        self.log(f"Training for {config.total_nimg / 1000:g} kimg...")
        self.log()
        self.bar = training_bar(self.title(), trainer.nimg, config.total_nimg)
        try:
            with StopSignals() as signals:
                self.train(loader, signals)
        finally:
            loader.close()
            self.bar.close()
            self.loggers.close()
        dist.barrier()
        self.log()
        self.log(f"Done: {self.snapshot_path()}")
        return self.snapshot_path()

    def train(self, loader: Loader, signals: StopSignals) -> None:
        """Step by step, with ticks, states and signals in between."""
        config, trainer = self.config, self.trainer
        start = tick_start = last_save = time.time()
        maintenance = 0.0
        while trainer.nimg < config.total_nimg:
            trainer.step(loader)
            self.health.add(trainer.step_count - 1, trainer.skipped)
            self.bar.update(config.batch)
            done = trainer.nimg >= config.total_nimg
            if done or self.tick == 0 or trainer.nimg >= self.tick_start_nimg + config.tick * 1000:
                tick_end = time.time()
                self.end_tick(done, self.elapsed_before + tick_end - start, tick_end - tick_start, maintenance)
                tick_start = time.time()
                maintenance = tick_start - tick_end
                if self.should_dump(done):
                    elapsed = self.elapsed_before + tick_start - start
                    self.save_state(f"training-state-{trainer.nimg // 1000:06d}.pt", elapsed)
                    last_save = time.time()
            stop = 0 if done else signals.agreed()
            if stop or (not done and time.time() - last_save >= config.save_every * 60):
                self.save_state(state.rolling_name(trainer.nimg), self.elapsed_before + time.time() - start)
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

    def title(self) -> str:
        """What the progress bar is headed."""
        stage = self.trainer.stage
        return "training" if stage is None else f"{stage.grid.steps} -> {stage.sampling.grid.steps} steps"

    def finish_again(self) -> Path:
        """For a state from which nothing is left to do: makes sure that the last snapshot is there."""
        path = self.snapshot_path()
        if dist.is_main() and not path.is_file():
            self.save_snapshot()
        dist.barrier()
        longer = "a longer --duration trains on"
        if self.config.lr_decay != "none":
            longer = f"{RATE_IS_ZERO} (another --outdir)"
        self.log(f"This run is done already: {path}. Its --duration is {self.config.total_kimg / 1000:g}; {longer}")
        return path

    # -- a tick ------------------------------------------------------------------------------------------------------

    def end_tick(self, done: bool, elapsed: float, tick_seconds: float, maintenance: float) -> None:
        """Status line, snapshot, pictures, statistics."""
        config, trainer = self.config, self.trainer
        self.health.check()
        self.report_progress(elapsed, tick_seconds, maintenance)
        if config.snap is not None and (done or self.tick % config.snap == 0):
            check_same_weights(trainer.net, trainer.ema)
            trainer.check_finite()
            if dist.is_main():
                self.save_snapshot()
                save_samples(trainer, self.run_dir / f"samples-{trainer.nimg // 1000:06d}.png")
            dist.barrier()
        due = config.targets and (done or self.tick % config.targets == 0)
        if due and trainer.stage is not None and dist.is_main():
            save_targets(trainer, self.run_dir / f"targets-{trainer.nimg // 1000:06d}.png")
        self.write_stats()
        self.tick += 1
        self.tick_start_nimg, self.tick_start_step = trainer.nimg, trainer.step_count

    def report_progress(self, elapsed: float, tick_seconds: float, maintenance: float) -> None:
        """EDM's status line, and the same figures as statistics."""
        trainer, stats = self.trainer, self.trainer.stats
        images = trainer.nimg - max(self.tick_start_nimg, self.first_nimg)
        gpu = trainer.device if trainer.device.type == "cuda" else None
        figures = {
            "Progress/tick": self.tick,
            "Progress/kimg": trainer.nimg / 1e3,
            "Timing/total_sec": elapsed,
            "Timing/sec_per_tick": tick_seconds,
            "Timing/sec_per_kimg": tick_seconds / max(images, 1) * 1e3,
            "Timing/maintenance_sec": maintenance,
            "Resources/cpu_mem_gb": psutil.Process(os.getpid()).memory_info().rss / 2**30,
            "Resources/peak_gpu_mem_gb": torch.cuda.max_memory_allocated(gpu) / 2**30 if gpu else 0.0,
            "Resources/peak_gpu_mem_reserved_gb": torch.cuda.max_memory_reserved(gpu) / 2**30 if gpu else 0.0,
            "Progress/skipped_steps": float(self.health.skipped),
            "Progress/learning_rate": float(trainer.optimizer.param_groups[0]["lr"]),
        }
        for name, value in figures.items():
            stats.report0(name, value)
        stats.update()
        if gpu:
            torch.cuda.reset_peak_memory_stats(gpu)
        gpu_memory = (
            f"gpumem {figures['Resources/peak_gpu_mem_gb']:<6.2f} "
            f"reserved {figures['Resources/peak_gpu_mem_reserved_gb']:<6.2f} "
        )
        self.log(
            f"tick {self.tick:<5d} kimg {trainer.nimg / 1e3:<9.1f} time {format_time(elapsed):<12s} "
            f"sec/tick {tick_seconds:<7.1f} sec/kimg {figures['Timing/sec_per_kimg']:<7.2f} "
            f"maintenance {maintenance:<6.1f} cpumem {figures['Resources/cpu_mem_gb']:<6.2f} "
            f"{gpu_memory if gpu else ''}loss {stats.mean('Loss/loss'):<.5g}"
        )
        self.bar.set_postfix_str(f"loss {stats.mean('Loss/loss'):.4g}", refresh=False)
        left = self.config.total_nimg - trainer.nimg
        # Half a tick: of the first one, and of what an interruption left of one, the most is warming up.
        enough = max(self.config.batch + 1, self.config.tick * 500)
        if images >= enough and left > 0 and not self.estimated:
            self.log(f"About {format_time(left / images * tick_seconds)} for the {left / 1000:g} kimg that are left")
            self.estimated = True

    def write_stats(self) -> None:
        """One line of `stats.jsonl` (and for the loggers), then the statistics start afresh."""
        values = self.trainer.stats.as_dict()
        self.trainer.stats.reset()
        self.stats_lines += 1
        if not dist.is_main():
            return
        append_text(self.run_dir / "stats.jsonl", json.dumps({**values, "timestamp": time.time()}) + "\n")
        self.loggers.write({name: value["mean"] for name, value in values.items()}, self.trainer.nimg)

    # -- files -------------------------------------------------------------------------------------------------------

    def snapshot_path(self) -> Path:
        """The network after the images seen so far."""
        return self.run_dir / f"network-snapshot-{self.trainer.nimg // 1000:06d}.pkl"

    def save_snapshot(self) -> None:
        """The average network in EDM's format, with its noise grid when it is a student."""
        trainer, config = self.trainer, self.config
        save_network(
            self.snapshot_path(),
            trainer.ema,
            sampling=trainer.stage.sampling if trainer.stage else None,
            loss_fn=dict(config.loss_kwargs),
            augment_pipe=config.augment_kwargs,
            dataset_kwargs={
                "class_name": "training.dataset.ImageFolderDataset",
                **config.dataset_kwargs,
                **({"label_kind": "vectors"} if trainer.dataset.has_label_vectors else {}),
            },
            extra={"training_options": config.to_file(trainer.nimg)},
        )

    def should_dump(self, done: bool) -> bool:
        """EDM's rule for `--dump`, asked after the tick's number has moved on."""
        ticks = self.config.dump
        return ticks is not None and (done or (self.tick > 1 and (self.tick - 1) % ticks == 0))

    def save_state(self, name: str, elapsed: float) -> None:
        """Writes the exact state; every process holds the same one, rank 0 writes. Then older ones may go."""
        self.health.check()
        self.trainer.check_finite()
        if not dist.is_main():
            return
        state.save_state(self.run_dir / name, self.state_dict(elapsed))
        state.remove_old(self.run_dir)

    def state_dict(self, elapsed: float) -> dict[str, Any]:
        """The trainer's state, and where the run is. See formats.state for the layout."""
        saved = self.trainer.state_dict()
        saved["position"] |= {
            "tick": self.tick,
            "tick_start_nimg": self.tick_start_nimg,
            "tick_start_step": self.tick_start_step,
            "skipped": self.health.skipped,
            "stats_lines": self.stats_lines,
            "elapsed_sec": elapsed,
        }
        return {
            **saved,
            "options": json.loads(json.dumps(self.config.identity())),
        }

    def load_state(self, path: Path, saved: dict[str, Any]) -> None:
        """Resumes from a state. Raises UserError naming every option that differs from the run's own."""
        check_same_options(path, saved["options"], self.config)
        try:
            self.trainer.load_state(saved)
        except UserError as exc:
            raise UserError(f"{path}: {exc}") from exc
        position = saved["position"]
        self.tick, self.tick_start_nimg = position["tick"], position["tick_start_nimg"]
        self.tick_start_step, self.elapsed_before = position["tick_start_step"], position["elapsed_sec"]
        self.first_nimg = position["nimg"]
        self.health.skipped = position["skipped"]
        same_place = path.resolve().parent == self.run_dir.resolve()
        self.stats_lines = position["stats_lines"] if same_place else 0
        if dist.is_main():
            cut_lines(self.run_dir / "stats.jsonl", self.stats_lines)
        here = (self.trainer.world_size, self.trainer.device.type)
        if (saved["world_size"], saved["device"]) != here:
            self.log(
                f"Note: this run was on {saved['world_size']} x {printable(saved['device'], 40)} and resumes with "
                f"{here[0]} x {here[1]}: the same images and noise, but sums may round differently"
                f"{', and dropout masks differ' if self.config.network_kwargs.get('dropout', True) else ''}"
            )
        self.log(f"Resuming from {path} at {self.first_nimg / 1000:g} kimg")


# ---------------------------------------------------------------------------------------------------------------------


def check_same_options(where: object, saved: dict[str, Any], config: TrainConfig) -> None:
    """Raises UserError, naming every option that alters the result and differs from what an earlier run had."""
    wrong = other_options(saved, config)
    if wrong:
        advice = "Use those, or another --outdir"
        if any(each.startswith("--duration ") for each in wrong):
            advice = f"{advice}: {RATE_IS_ZERO}"
        raise UserError(f"{where} belongs to a run with other options: {'; '.join(wrong)}. {advice}")


def other_options(saved: dict[str, Any], config: TrainConfig) -> list[str]:
    """The options that alter the result and differ from an earlier run's identity, with both values."""
    return named_differences(saved, json.loads(json.dumps(config.identity())))


@torch.no_grad()
def check_same_weights(*nets: torch.nn.Module) -> None:
    """Raises UserError, naming a rank, when processes hold other bits (a fault of a machine or of this program)."""
    if dist.get_world_size() == 1:
        return
    digest = hashlib.sha256()
    for net in nets:
        for parameter in net.parameters():
            digest.update(parameter.detach().contiguous().cpu().numpy().data)
    mine = digest.hexdigest()[:16]
    other = [rank for rank, theirs in enumerate(dist.gather_objects(mine)) if theirs != mine]
    if other:
        raise UserError(
            f"the processes hold different weights (rank {dist.get_rank()} and rank {other[0]}, for one), a fault of "
            "a machine or of this program; the last state on disk is from before this was seen"
        )


def cut_lines(path: Path, count: int) -> None:
    """Keeps the first `count` lines of a text file, if it is there."""
    if path.exists():
        lines = read_file(path, "a log").splitlines(keepends=True)
        if len(lines) > count:
            with atomic_write(path) as file:
                file.writelines(lines[:count])
