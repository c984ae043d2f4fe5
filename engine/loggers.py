"""Where else the figures of `stats.jsonl` go, if asked: TensorBoard, Weights & Biases. The file stays the truth.

A logger works in a thread of its own. One that is slow (a network, a full disk) never holds a run up, and one that
fails is left out with one warning. Their packages are imported when the first figures come.
"""

from __future__ import annotations

import os
import secrets
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Protocol

from dnnlib.atomic import check_no_link, write_text
from dnnlib.errors import printable
from dnnlib.util import read_file
from torch_utils import distributed as dist
from training.config import TrainConfig

PATIENCE = 30.0  # seconds at the end of a run for what a logger has still to send
RUN_ID = "wandb-run-id.txt"  # in the run directory: a resumed run goes on under the same number

Figures = Mapping[str, float]


class Logger(Protocol):
    """Something that takes figures by name, after so many images."""

    def write(self, figures: Figures, nimg: int) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Event files in the run directory. What an earlier start wrote beyond `begin` images is not shown any more."""

    def __init__(self, config: TrainConfig, begin: int = 0) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer: Any = SummaryWriter(config.run_dir, purge_step=begin + 1)

    def write(self, figures: Figures, nimg: int) -> None:
        for name, value in figures.items():
            self.writer.add_scalar(name, value, global_step=nimg)
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class Wandb:
    """A run of Weights & Biases, named after the run directory; its steps and its x axis are numbers of images, `nimg`.

    Steps only grow there: what a resumed run repeats, to the same figures, is left out.
    """

    def __init__(self, config: TrainConfig) -> None:
        import wandb

        folder = Path(config.run_dir)
        check_no_link(folder / "wandb")  # where it keeps its files
        self.run: Any = wandb.init(
            project=config.wandb,
            id=run_id(folder),
            resume="allow",
            name=folder.name,
            group=folder.resolve().parent.name,  # the stages of a ladder lie side by side
            dir=os.fspath(folder),
            config=config.to_options(),
        )
        self.run.define_metric("*", step_metric="nimg")

    def write(self, figures: Figures, nimg: int) -> None:
        if nimg >= self.run.step:
            self.run.log({**figures, "nimg": nimg}, step=nimg)

    def close(self) -> None:
        self.run.finish()


def run_id(folder: Path) -> str:
    """The number under which a run directory is known to Weights & Biases, made up at the first call."""
    path = folder / RUN_ID
    known = printable(read_file(path, "a run's JSON").decode(errors="replace"), 100) if path.is_file() else ""
    if known:
        return known
    made = secrets.token_hex(4)
    write_text(path, made + "\n")
    return made


class Background:
    """A logger in a thread of its own, made there. Whatever it raises ends it, not the run."""

    def __init__(self, name: str, make: Callable[[], Logger], say: Callable[[str], None]) -> None:
        self.name, self.make, self.say = name, make, say
        self.waiting: SimpleQueue[tuple[Figures, int] | None] = SimpleQueue()
        self.problem: str | None = None
        self.warned = False
        self.thread: threading.Thread | None = None

    def write(self, figures: Figures, nimg: int) -> None:
        """Hands figures over, at once."""
        self._warn()
        if self.warned:
            return
        if self.thread is None:
            self.thread = threading.Thread(target=self._work, name=self.name, daemon=True)
            self.thread.start()
        self.waiting.put((figures, nimg))

    def close(self) -> None:
        """Waits for what is left to be sent, `PATIENCE` seconds at most."""
        if self.thread is None:
            return
        self.waiting.put(None)
        self.thread.join(PATIENCE)
        if self.thread.is_alive() and self.problem is None:
            self.problem = f"it has not sent everything within {PATIENCE:g} seconds"
        self._warn()

    def _work(self) -> None:
        try:
            logger = self.make()
            while (item := self.waiting.get()) is not None:
                logger.write(*item)
            logger.close()
        except Exception as exc:
            self.problem = f"{type(exc).__name__}: {printable(exc, 200)}"

    def _warn(self) -> None:
        """One line in the log, by the thread of the run, when something went wrong."""
        if self.problem is not None and not self.warned:
            self.warned = True
            self.say(f"Warning: --{self.name} is left out from here on ({self.problem}); stats.jsonl has every figure")


class Loggers:
    """All that were asked for."""

    def __init__(self, loggers: list[Background]) -> None:
        self.loggers = loggers

    def write(self, figures: Figures, nimg: int) -> None:
        for logger in self.loggers:
            logger.write(figures, nimg)

    def close(self) -> None:
        for logger in self.loggers:
            logger.close()


def open_loggers(config: TrainConfig, say: Callable[[str], None], begin: Callable[[], int] = lambda: 0) -> Loggers:
    """Those that `config` asks for, on rank 0; none elsewhere. begin: how many images the run has behind it, asked for
    when the first figures come."""
    wanted: list[tuple[str, Callable[[], Logger]]] = []
    if config.tensorboard:
        wanted.append(("tensorboard", lambda: TensorBoard(config, begin())))
    if config.wandb is not None:
        wanted.append(("wandb", lambda: Wandb(config)))
    return Loggers([Background(name, make, say) for name, make in wanted] if dist.is_main() else [])
