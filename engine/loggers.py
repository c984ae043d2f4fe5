"""Where else the figures of `stats.jsonl` go, if asked: TensorBoard, Weights & Biases. The file stays the truth.

Both packages send in threads of their own, so that a run does not wait for a network. They are imported when the first
figures come; one that fails is left out with one warning.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from dnnlib.atomic import check_no_link, write_text
from dnnlib.errors import printable
from dnnlib.util import read_file
from torch_utils import distributed as dist
from training.recipe import TrainConfig

RUN_ID = "wandb-run-id.txt"  # in the run directory: a resumed run keeps its number

Figures = Mapping[str, float]


class TensorBoard:
    """Event files in the run directory. What an earlier start wrote beyond `begin` images is not shown any more."""

    def __init__(self, config: TrainConfig, begin: int) -> None:
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

    def __init__(self, config: TrainConfig, begin: int) -> None:
        import wandb

        folder = Path(config.run_dir)
        check_no_link(folder / "wandb")  # where it keeps its files
        path = folder / RUN_ID
        known = printable(read_file(path, "a run's JSON").decode(errors="replace"), 100) if path.is_file() else ""
        if not known:
            known = secrets.token_hex(4)
            write_text(path, known + "\n")
        self.run: Any = wandb.init(
            project=config.wandb,
            id=known,
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


# Option -> class(config, nimg) with write(figures, nimg) and close(); nimg: images trained so far.
LOGGERS: dict[str, Callable[[TrainConfig, int], Any]] = {
    "tensorboard": TensorBoard,
    "wandb": Wandb,
}


class Loggers:
    """Those that `config` asks for, on rank 0; none elsewhere. begin: how many images the run has behind it."""

    def __init__(self, config: TrainConfig, log: Callable[[str], None], begin: int) -> None:
        self.asked = [name for name in LOGGERS if getattr(config, name) and dist.is_main()]
        self.made: dict[str, Any] = {}
        self.config, self.log, self.begin = config, log, begin

    def write(self, figures: Figures, nimg: int) -> None:
        """Hands figures, by name, to each logger, after so many images."""
        self._each(self.asked, "write", figures, nimg)

    def close(self) -> None:
        """Has each logger send what is left."""
        self._each(self.made, "close")

    def _each(self, names: Iterable[str], method: str, *args: Any) -> None:
        for name in list(names):
            try:
                if name not in self.made:
                    self.made[name] = LOGGERS[name](self.config, self.begin)
                getattr(self.made[name], method)(*args)
            except Exception as exc:
                self.asked.remove(name)
                self.made.pop(name, None)
                reason = f"{type(exc).__name__}: {printable(exc, 200)}"
                self.log(f"Warning: --{name} is left out from here on ({reason}); stats.jsonl has every figure")
