"""What a run or a ladder has left in its folder so far, as plain values. Imports no torch.

Any file may be missing, cut short or damaged, for the run may be unfinished or killed, and may hold anything. What can
be read is there; what can't is named in `problems`.
"""

from __future__ import annotations

import base64
import io
import json
import math
import os
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields
from itertools import accumulate
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from PIL import Image

from dnnlib.errors import UserError, printable
from dnnlib.util import count, read_file
from ladders.results import CurvePoint, Floor, Rung
from training.recipe import Options, entries

MAX_LINE, MAX_TICKS = 1 << 22, 100_000  # bytes of a line of stats.jsonl, and lines
MAX_ROWS, MAX_PROBLEMS = 64, 40  # of a list: stages, rungs and others
MAX_DEPTH = 32  # of JSON: options are five deep
MAX_PIXELS = 1 << 26
LARGEST, SMALLEST = 1e15, 1e-30  # a number beyond is left out, one nearer to 0 is 0
SHOTS = 40  # pictures of a kind
WIDEST, HEAVIEST = 2000, 1_500_000  # pixels, bytes: a picture beyond is shown smaller
KINDS = {"samples": "snapshots, --snap", "targets": "--targets"}  # pictures, and what makes them
JUMP = re.compile(r"Loss/interval/(\d{1,3})", re.ASCII)
SERIES = LOSS, SPEED, TIME, KIMG, SKIPPED, HOST, GPU = (
    *("Loss/loss", "Timing/sec_per_kimg", "Timing/total_sec", "Progress/kimg"),
    *("Progress/skipped_steps", "Resources/cpu_mem_gb", "Resources/peak_gpu_mem_gb"),
)


@dataclass
class Picture:
    """A picture for the page. uri: its file, as a data URI."""

    caption: str
    uri: str
    width: int
    height: int


@dataclass
class Run:
    """A run directory. ticks: the means that each line of stats.jsonl holds, by their names."""

    folder: Path
    name: str
    options: dict[str, Any]
    ticks: list[dict[str, float]]
    written: float  # time of the last tick, seconds since 1970; 0 where unknown
    pictures: dict[str, list[Picture]]  # of each kind, the oldest first

    def __post_init__(self) -> None:
        self.distillation = mapping(self.options.get("distillation"))
        steps, ratio = (number(self.distillation.get(name), least=1) for name in ("num_steps", "ratio"))
        self.ratio = int(ratio or 0)
        self.steps = (int(steps), int(steps // ratio)) if steps and ratio and steps >= ratio else None  # teacher's, own
        found = self.distillation.get("lineage")
        self.lineage = [mapping(entry) for entry in found[:MAX_ROWS]] if isinstance(found, list) else []
        names = {name for tick in self.ticks for name in tick}
        self.jumps = dict(sorted((int(match[1]), name) for name in names if (match := JUMP.fullmatch(name))))

    def series(self, name: str) -> np.ndarray:
        """A value per tick, NaN where one has none."""
        return np.array([tick.get(name, math.nan) for tick in self.ticks])

    def last(self, name: str) -> float | None:
        """The newest value of a series."""
        return next((tick[name] for tick in reversed(self.ticks) if name in tick), None)

    @property
    def state(self) -> str:
        """A few words: how far it is."""
        kimg, total = self.last(KIMG), number(self.options.get("total_kimg"))
        if kimg is None:
            return "no tick yet"
        if total and kimg >= total:
            return f"finished, {show_kimg(kimg)} kimg"
        return f"{show_kimg(kimg)}{f' of {show_kimg(total)}' if total else ''} kimg so far"

    @property
    def rate(self) -> float | None:
        """Median seconds per 1000 images of the ticks; the first one, in which things warm up, apart."""
        values = [tick[SPEED] for tick in self.ticks[1:] or self.ticks if SPEED in tick]
        return median(values) if values else None


@dataclass
class Subject:
    """A ladder's folder, or a single run's. plan: steps of all networks that there are to be, empty where unknown."""

    folder: Path
    name: str
    is_ladder: bool
    problems: list[str]
    runs: list[Run]
    rungs: list[Rung] = field(default_factory=list)
    curve: list[CurvePoint] = field(default_factory=list)
    floor: Floor | None = None
    plan: list[int] = field(default_factory=list)
    samples: Picture | None = None


# ---------------------------------------------------------------------------------------------------------------------
# Values


def number(value: Any, least: float = -LARGEST) -> float | None:
    """A number of a size that occurs, or None for anything else that JSON can hold."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value <= LARGEST:
        return None
    return float(value) if abs(value) >= SMALLEST else 0.0


def numbers(value: Any) -> list[float]:
    """Those of a list; none of anything else."""
    found = map(number, value[:MAX_ROWS]) if isinstance(value, list) else []
    return [each for each in found if each is not None]


def mapping(value: Any) -> dict[str, Any]:
    """A dict, an empty one for anything else."""
    return value if isinstance(value, dict) else {}


READERS: dict[str, Callable[[Any], Any]] = {  # of the fields of Rung and CurvePoint, by their types
    "int": lambda value: None if number(value, least=1) is None else int(value),
    "float": lambda value: number(value, least=0),
    "str": lambda value: printable(value) if isinstance(value, str) else None,
    "list[float]": numbers,
}


def row_of(kind: type, row: Any) -> Any:
    """A row of ladder.json or teacher-curve.json as a Rung or CurvePoint; None where a value is none of its kind."""
    values = {each.name: READERS[str(each.type).split(" |")[0]](mapping(row).get(each.name)) for each in fields(kind)}
    needed = [each.name for each in fields(kind) if "None" not in str(each.type)]
    return None if any(values[name] is None for name in needed) else kind(**values)


def settings_of(options: dict[str, Any]) -> list[tuple[str, str]]:
    """What the file has of the options of a run, by their titles in the table, and of data and network."""
    data, net, loss = (mapping(options.get(f"{name}_kwargs")) for name in ("dataset", "network", "loss"))
    found = {}
    for each in entries(Options):
        outer, _, inner = each.place.rpartition(".")
        found[each.heading] = (mapping(options.get(outer)) if outer else options).get(inner)
    found["teacher"] = options.get("transfer") or found["teacher"]
    size = data.get("resolution")
    rows = {
        "data": found.pop("data"),
        "images": f"{data.get('max_size')}, {size} x {size}" if size else None,
        "network": " ".join(str(net[key]) for key in ("class_name", "model_type") if key in net),
        "loss": loss.get("class_name"),
        **found,
    }
    return [(name, show_setting(value)) for name, value in rows.items() if name and value not in (None, "")]


def show_setting(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if number(value) is not None and abs(value) < 1e6 else printable(value)


def show_kimg(kimg: float) -> str:
    """12.35, or 4,096,000."""
    return f"{kimg:,.0f}" if kimg >= 1000 else f"{kimg:.4g}"


def every(items: Sequence[Any], most: int) -> list[Any]:
    """At most so many of them at equal distances, the last one among them."""
    return list(items[::-1][:: max(-(-len(items) // most), 1)][::-1])


def picture_of(caption: str, data: bytes, kind: str, size: tuple[int, int]) -> Picture:
    return Picture(caption, f"data:image/{kind};base64,{base64.b64encode(data).decode()}", *size)


# ---------------------------------------------------------------------------------------------------------------------
# Reading


@dataclass
class Reader:
    """Reads files that lie in `root`, links followed; what can't be read is a line in `problems`."""

    root: Path
    problems: list[str] = field(default_factory=list)
    prefix: str = ""

    def note(self, problem: str) -> None:
        self.problems.append(f"{self.prefix}{problem}")

    def bytes(self, path: Path, kind: str) -> bytes:
        """The content; empty where it can't be read."""
        try:
            if data := read_file(path, kind, within=self.root):
                return data
            self.note(f"{path.name} is empty")
        except UserError as exc:
            self.note(str(exc).replace(str(path), path.name, 1))
        except OSError as exc:
            missing = isinstance(exc, FileNotFoundError)
            self.note(f"{path.name} is not there" if missing else f"{path.name} can't be read ({exc.strerror})")
        return b""

    def json(self, path: Path, kind: type) -> Any:
        """The content if it is of this kind (dict or list); otherwise an empty one."""
        data, content = self.bytes(path, "a run's JSON"), None
        depth = max(accumulate((each in b"[{") - (each in b"]}") for each in data), default=0)
        with suppress(ValueError):
            content = json.loads(data) if depth <= MAX_DEPTH else None
        if data and not isinstance(content, kind):
            self.note(f"{path.name} is not what a run writes: damaged, cut short or of something else")
        return content if isinstance(content, kind) else kind()

    def rows(self, path: Path, kind: type) -> list[Any]:
        """The whole rows of ladder.json or teacher-curve.json; none where the first, which is the teacher's, is not."""
        content = self.json(path, list)
        found = [row_of(kind, row) for row in content[:MAX_ROWS]]
        whole = [row for row in found if row is not None and found[0] is not None]
        if len(whole) < len(content):
            self.note(f"{path.name} holds rows that lack something, or more than {MAX_ROWS}: left out")
        return whole

    def picture(self, path: Path, caption: str) -> Picture | None:
        """A whole PNG as it is, a smaller one of what is too large for a page; None for anything else."""
        data = self.bytes(path, "a picture")
        try:
            with Image.open(io.BytesIO(data), formats=["PNG"]) as picture:
                width, height = picture.size
                if width * height > MAX_PIXELS:
                    raise ValueError("too large")
                picture.load()
                if max(width, height) <= WIDEST and len(data) <= HEAVIEST:
                    return picture_of(caption, data, "png", picture.size)
                small, buffer = picture.convert("RGB"), io.BytesIO()
            small.thumbnail((WIDEST, WIDEST), Image.Resampling.LANCZOS)
            small.save(buffer, format="WEBP", quality=85)
            caption += f"; {width} x {height} pixels, shown smaller"
            return picture_of(caption, buffer.getvalue(), "webp", small.size)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
            if data:
                self.note(f"{path.name} can't be shown: damaged, or of more than {MAX_PIXELS >> 20} megapixels")
        return None

    def ticks(self, path: Path) -> tuple[list[dict[str, float]], float]:
        """The means that each line of stats.jsonl holds, and when the last one was written; it may be half written."""
        rows: list[dict[str, float]] = []
        written, lines = 0.0, self.bytes(path, "a log").splitlines()
        for line in lines[:MAX_TICKS]:
            try:
                values = mapping(json.loads(line[:MAX_LINE]))
            except (ValueError, RecursionError):
                continue
            names = [name for name in values if name in SERIES or JUMP.fullmatch(name)]
            means = {name: number(mapping(values[name]).get("mean")) for name in names}
            row = {name: mean for name, mean in means.items() if mean is not None}
            if KIMG in row and (not rows or row[KIMG] > rows[-1][KIMG]):
                rows.append(row)
                written = number(values.get("timestamp")) or written
        if left := len(lines) - len(rows):
            self.note(f"{count(left, 'line')} of {path.name} can't be read, or {MAX_TICKS} are read: left out")
        return rows, written

    def run(self, folder: Path, name: str, room: float) -> Run:
        """A run directory. room: bytes for the pictures of a kind, of which the newest is there anyway."""
        options, pictures = self.json(folder / "training_options.json", dict), {}
        ticks, written = self.ticks(folder / "stats.jsonl")
        for kind, why in KINDS.items():
            found = list_pictures(folder, kind)
            size = sum(min(path.lstat().st_size, HEAVIEST) for _, path in found) / max(len(found), 1)
            chosen = every(found, max(min(int(room / (size + 1)), SHOTS), 1))
            taken = [self.picture(path, f"{kimg} kimg") for kimg, path in chosen]
            pictures[kind] = [picture for picture in taken if picture is not None]
            if len(chosen) < len(found):
                self.note(f"{len(chosen)} of {len(found)} {kind}-*.png are shown")
            if not found and (kind == "samples" or "distillation" in options):
                self.note(f"no {kind}-*.png yet (they come with {why})")
        return Run(folder, name, options, ticks, written, pictures)

    def floor(self, measured: int | None) -> Floor | None:
        """How far as many images drawn from the data set as have `measured` the rungs are from all of it; the newest
        file that holds it counts."""
        paths = sorted(self.root.glob("rungs/floor-*.json"), key=lambda path: path.lstat().st_mtime, reverse=True)
        for content in [Reader(self.root).json(path, dict) for path in paths[:MAX_ROWS]]:
            distances = numbers(content.get("distances"))
            if distances and measured and content.get("images") == measured:
                return Floor(measured, distances)
        return None


def numbered(folder: Path, pattern: str) -> list[tuple[int, Path]]:
    """(number, path) of what has a name of this kind in `folder`, in the order of the numbers."""
    name = re.compile(pattern, re.ASCII)
    return sorted((int(match[1]), path) for path in folder.iterdir() if (match := name.fullmatch(path.name)))


def list_pictures(folder: Path, kind: str) -> list[tuple[int, Path]]:
    return numbered(folder, rf"{kind}-(\d{{1,12}})\.png")


def read(folder: Path, megabytes: float = 20) -> Subject:
    """What `folder` holds, with as many pictures as `megabytes` of a page have room for.

    Raises UserError for a folder that is neither a run nor a ladder.
    """
    if not folder.is_dir():
        what = "is a file" if folder.is_file() else "there is no such folder"
        raise UserError(f"{folder}: {what}; name a run directory of train.py, or a ladder of distill.py")
    names, reader = {path.name for path in folder.iterdir()}, Reader(folder)
    stages = numbered(folder, r"stage-(\d{1,9})-\d+to\d+")
    is_ladder = bool({"ladder.json", "rungs"} & names or stages)
    if not is_ladder and not names & {"training_options.json", "stats.jsonl", "log.txt"}:
        run = next(folder.glob("*/training_options.json"), None)
        hint = f"did you mean {run.parent}?" if run else "it has neither training_options.json nor ladder.json"
        raise UserError(f"{folder} is neither a run of train.py nor a ladder of distill.py; {hint}")
    name, inside = (
        printable(folder.resolve().name),
        [each for each in stages if each[1].is_dir() and not each[1].is_symlink()][:MAX_ROWS],
    )
    if len(inside) < len(stages):
        reader.note(f"stages beyond {MAX_ROWS}, and links to other folders, are left out")
    runs = [(path, f"Stage {index}", f"{path.name}: ") for index, path in inside] if is_ladder else [(folder, name, "")]
    films = sum(bool(list_pictures(path, kind)) for path, *_ in runs for kind in KINDS)
    room = megabytes * 1e6 * 3 / 4 / max(films, 1)  # base64 takes a third more
    found = [Reader(folder, reader.problems, prefix).run(path, title, room) for path, title, prefix in runs]
    subject = Subject(folder, name, is_ladder, reader.problems, found)
    if is_ladder:
        subject.rungs = reader.rows(folder / "ladder.json", Rung)
        if os.path.lexists(folder / "teacher-curve.json"):  # a distilled teacher has none
            subject.curve = reader.rows(folder / "teacher-curve.json", CurvePoint)
        caption = "A row for every network of the ladder, from the same latents"
        subject.samples = reader.picture(folder / "samples.png", caption)
        subject.floor = reader.floor(subject.rungs[0].images if subject.rungs else None)
        plan = Reader(folder).json(folder / "ladder-options.json", dict).get("steps")
        subject.plan = [int(each) for each in numbers(plan)]
        if not runs:
            reader.note("no stage has begun yet")
        if subject.rungs and all(rung.fd is None for rung in subject.rungs):
            reader.note("no Fréchet distances: the same distill.py command with --detector=FILE adds them")
    if (more := len(subject.problems) - MAX_PROBLEMS) > 0:
        subject.problems[MAX_PROBLEMS:] = [f"and {more} more of that kind"]
    subject.problems = [printable(problem) for problem in subject.problems]
    return subject
