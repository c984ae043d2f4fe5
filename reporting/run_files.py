"""What a run or a ladder has left in its folder so far, as plain values. Imports no torch.

Any of it may be missing, cut short or damaged, for the run may be unfinished or killed. What can be read is there, and
what can't is named in `problems`. Nothing in a file is trusted to be what it should be.
"""

from __future__ import annotations

import base64
import io
import json
import math
import os
import re
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dnnlib.errors import UserError, printable
from dnnlib.util import count, read_file
from ladders.results import CurvePoint, Floor, Rung
from training.recipe import Options, TrainConfig, entries

MAX_LINE = 1 << 22  # bytes of a line of stats.jsonl
MAX_TICKS = 1_000_000
MAX_ROWS = 64  # stages, rungs and others of a list
MAX_PROBLEMS = 40
MAX_DEPTH = 32  # of JSON: options are five deep
MAX_PIXELS = 1 << 26
LARGEST, SMALLEST = 1e15, 1e-30  # no figure of a run is greater, or nearer to 0: what is, is left out, or is 0
SHOTS = 40  # pictures of a kind
LINES = 24  # jumps in a chart
WIDEST, HEAVIEST = 2000, 1_500_000  # pixels, bytes: a picture beyond is shown smaller
STAGE = re.compile(r"stage-(\d+)-(\d+)to(\d+)")
RUNG, POINT = ([each.name for each in fields(kind)] for kind in (Rung, CurvePoint))
SERIES = {
    "loss": "Loss/loss",
    "sec_per_kimg": "Timing/sec_per_kimg",
    "learning_rate": "Progress/learning_rate",
    "seconds": "Timing/total_sec",
    "maintenance": "Timing/maintenance_sec",
    "cpu_gb": "Resources/cpu_mem_gb",
    "gpu_gb": "Resources/peak_gpu_mem_gb",
    "skipped": "Progress/skipped_steps",
}


# ---------------------------------------------------------------------------------------------------------------------
# Values


@dataclass
class Stats:
    """What `stats.jsonl` holds: a value per tick of each series, NaN where a tick has none."""

    kimg: np.ndarray
    series: dict[str, np.ndarray]
    jumps: dict[int, np.ndarray]  # mean loss of some jumps
    last_jumps: dict[int, tuple[int, float]]  # of all jumps: images and mean loss of the last tick that has them
    written: float | None  # time of the last tick, seconds since 1970

    def last(self, name: str) -> float | None:
        """The newest finite value of a series."""
        values = self.series[name]
        good = values[np.isfinite(values)]
        return float(good[-1]) if len(good) else None


@dataclass
class Shot:
    """One picture, ready for the page."""

    kimg: int
    uri: str
    width: int
    height: int
    note: str = ""


@dataclass
class Film:
    """The pictures of one kind that a run has left, the oldest first."""

    shots: list[Shot]
    found: int  # on disk, more than are shown perhaps


@dataclass
class Run:
    """A run directory."""

    folder: Path
    name: str
    options: dict[str, Any]
    stats: Stats
    samples: Film
    targets: Film
    steps: tuple[int, int] | None = None  # of teacher and student
    saved: float = 0.0  # kimg of the newest training state
    interrupted: bool = False  # a signal ended it, and it has not gone on since
    problems: list[str] = field(default_factory=list)

    @property
    def kimg(self) -> float:
        return float(self.stats.kimg[-1]) if len(self.stats.kimg) else 0.0

    @property
    def total_kimg(self) -> float | None:
        return number(self.options.get("total_kimg"))

    @property
    def done(self) -> bool:
        return self.total_kimg is not None and self.kimg >= self.total_kimg > 0

    @property
    def state(self) -> str:
        """A few words: how far it is."""
        if self.done:
            return f"finished, {show_kimg(self.kimg)} kimg"
        of = f" of {show_kimg(self.total_kimg)}" if self.total_kimg else ""
        if self.interrupted:
            return f"interrupted at {show_kimg(self.saved)}{of} kimg"
        if self.saved > self.kimg:
            return f"{show_kimg(self.saved)}{of} kimg so far, by its newest state"
        return f"{show_kimg(self.kimg)}{of} kimg so far" if len(self.stats.kimg) else "no tick yet"

    @property
    def rate(self) -> float | None:
        """Median seconds per 1000 images of the ticks; the first one, in which things warm up, apart."""
        values = self.stats.series["sec_per_kimg"]
        values = values[1:] if len(values) > 1 else values
        values = values[np.isfinite(values)]
        return float(np.median(values)) if len(values) else None

    @property
    def settings(self) -> list[tuple[str, str]]:
        return settings_of(self.options)

    @property
    def environment(self) -> list[tuple[str, str]]:
        known = list(mapping(self.options.get("environment")).items())[:MAX_ROWS]
        return [(printable(name.replace("_", " "), 60), printable(value)) for name, value in known if value is not None]

    @property
    def lineage(self) -> list[dict[str, Any]]:
        entries = mapping(self.options.get("distillation")).get("lineage")
        return [mapping(entry) for entry in entries[:MAX_ROWS]] if isinstance(entries, list) else []


@dataclass
class Ladder:
    """A ladder's folder."""

    folder: Path
    name: str
    stages: list[Run]
    rungs: list[dict[str, Any]]
    curve: list[dict[str, Any]]
    floor: Floor | None
    plan: list[int]  # steps of all networks that there are to be; empty where unknown
    samples: Shot | None
    problems: list[str] = field(default_factory=list)

    @property
    def chain(self) -> list[Any]:
        """Steps of the teacher and of every student, '?' where unknown: as planned, or as far as begun."""
        begun = [stage.steps or ("?", "?") for stage in self.stages]
        return self.plan or [before for before, _ in begun[:1]] + [after for _, after in begun]

    @property
    def state(self) -> str:
        """A few words: how far it is."""
        last, number, total = self.stages[-1], len(self.stages), len(self.chain) - 1
        return f"stage {number} of {total}: {last.state}" if self.plan else f"stage {number}: {last.state}"

    @property
    def seconds(self) -> float:
        """Of training, all stages together."""
        return sum(stage.stats.last("seconds") or 0.0 for stage in self.stages)


def number(value: Any) -> float | None:
    """A number of a size that occurs, or None for anything else that JSON can hold."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not -LARGEST <= value <= LARGEST:
        return None
    return float(value) if abs(value) >= SMALLEST else 0.0


def mapping(value: Any) -> dict[str, Any]:
    """A dict, an empty one for anything else."""
    return value if isinstance(value, dict) else {}


def settings_of(options: dict[str, Any]) -> list[tuple[str, str]]:
    """What a reader wants to know first: options by their titles in the table, and what follows from data and network.

    What the file does not have is left out."""
    data, net, loss = (mapping(options.get(f"{name}_kwargs")) for name in ("dataset", "network", "loss"))
    found = {}
    for each in entries(Options):
        outer, _, inner = each.place.rpartition(".")
        found[each.heading] = (mapping(options.get(outer)) if outer else options).get(inner)
    part = number(options.get("ema_rampup_ratio", TrainConfig.ema_rampup_ratio))  # EDM's files lack it mostly
    half_life = number(found["EMA half-life, kimg"])
    if found["EMA std"] is not None:
        found["EMA half-life, kimg"] = None
    elif half_life is not None and part:
        found["EMA half-life, kimg"] = f"{half_life:g}, at most {part:.0%} of the images seen"
    if found["augmentation"] is None and ("augment_kwargs" in options or loss):
        found["augmentation"] = 0
    if not options.get("distillation"):
        found["teacher's precision"] = None
    found["teacher"] = options.get("transfer") or found["teacher"]
    found["self-teacher"] = found["self-teacher"] or None
    found["activations"] = "recomputed" if found["activations"] else None
    found["mirror images"] = "yes" if found["mirror images"] else None
    if found["channels"] is not None:
        found["channels"] = f"{found['channels']} x {net.get('channel_mult')}"
    found["labels"] = None if found["labels"] is None else "yes" if found["labels"] else "no"
    size = data.get("resolution")
    rows: list[tuple[str, Any]] = [
        ("data", found.pop("data")),
        ("images", f"{data.get('max_size')}, {size} x {size}" if size else None),
        ("network", " ".join(str(net[key]) for key in ("class_name", "model_type") if key in net)),
        ("loss", loss.get("class_name")),
        *found.items(),
    ]
    return [
        (name, f"{value:g}" if number(value) is not None and abs(value) < 1e6 else printable(value))
        for name, value in rows
        if name and value not in (None, "")
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def read_bytes(path: Path, kind: str, root: Path, problems: list[str]) -> bytes | None:
    """The content of a file that lies in `root`; None, and a line in `problems`, where it can't be read."""
    try:
        return read_file(path, kind, within=root)
    except FileNotFoundError:
        problems.append(f"{path.name} is not there")
    except UserError as exc:
        problems.append(str(exc).replace(str(path), path.name, 1))
    except OSError as exc:
        problems.append(f"{path.name} can't be read ({exc.strerror})")
    return None


def read_json(path: Path, kind: type, root: Path, problems: list[str]) -> Any:
    """The content if it is of this kind (dict or list); otherwise an empty one, with a line in `problems`."""
    data = read_bytes(path, "a run's JSON", root, problems)
    if data is not None:
        try:
            content = json.loads(data)
            if isinstance(content, kind) and depth(content) <= MAX_DEPTH:
                return content
            problems.append(f"{path.name} is not what a run writes")
        except (ValueError, RecursionError):
            problems.append(f"{path.name} is damaged or cut short")
    return kind()


def depth(value: Any) -> int:
    """How many lists and dicts lie within each other, at most one more than `MAX_DEPTH`."""
    level, found = [value], 0
    while found <= MAX_DEPTH and (inner := [each for each in level if isinstance(each, (list, dict))]):
        level = [item for each in inner for item in (each.values() if isinstance(each, dict) else each)]
        found += 1
    return found


def read_stats(path: Path, root: Path, problems: list[str]) -> Stats:
    """Line by line; lines that are no statistics are counted. The last one may be half written."""
    kimg = array("d")
    series = {name: array("d") for name in SERIES}
    jumps: dict[int, array[float]] = {}
    last_jumps: dict[int, tuple[int, float]] = {}
    written, bad, cut, before = None, 0, False, len(problems)
    file = io.BytesIO(read_bytes(path, "a log", root, problems) or b"")
    while (line := file.readline(MAX_LINE)) and len(kimg) < MAX_TICKS:
        cut = False
        try:
            values = json.loads(line)
            at = mean_of(values, "Progress/kimg")
        except (ValueError, RecursionError):
            at = math.nan
        if not math.isfinite(at) or (len(kimg) and at <= kimg[-1]):
            bad, cut = bad + 1, not line.endswith(b"\n")
            continue
        kimg.append(at)
        for name, key in SERIES.items():
            series[name].append(mean_of(values, key))
        written = number(values.get("timestamp")) or written
        found = {index: name for name in values if (index := jump_number(name)) is not None}
        if found and not jumps:
            jumps = {index: array("d", [math.nan] * (len(kimg) - 1)) for index in spread(sorted(found), LINES)}
        for index, name in found.items():
            images = number(mapping(values[name]).get("num"))
            if images and images >= 1 and math.isfinite(mean_of(values, name)):
                last_jumps[index] = (int(images), mean_of(values, name))
        for index, column in jumps.items():
            column.append(mean_of(values, found[index]) if index in found else math.nan)
    if line:
        problems.append(f"{path.name} has more than {MAX_TICKS} ticks: the rest is left out")
    if cut:
        problems.append(f"the last line of {path.name} is cut short: left out")
    if bad - cut:
        problems.append(f"{count(bad - cut, 'line')} of {path.name} can't be read: left out")
    if not len(kimg) and len(problems) == before:
        problems.append(f"{path.name} has no tick yet")
    return Stats(
        np.asarray(kimg),
        {name: np.asarray(column) for name, column in series.items()},
        {index: np.asarray(column) for index, column in jumps.items()},
        dict(sorted(last_jumps.items())),
        written,
    )


def mean_of(values: Any, name: str) -> float:
    """NaN where a line has no such number."""
    mean = number(mapping(mapping(values).get(name)).get("mean"))
    return math.nan if mean is None else mean


def jump_number(name: str) -> int | None:
    """3 of 'Loss/interval/03'."""
    match = re.fullmatch(r"Loss/interval/(\d{1,3})", name, re.ASCII)
    return int(match[1]) if match else None


def list_pictures(folder: Path, kind: str) -> list[tuple[int, Path]]:
    """(kimg, file) of `kind`-KKKKKK.png, the oldest first."""
    found = [
        (path, re.fullmatch(rf"{kind}-(\d{{1,12}})\.png", path.name, re.ASCII)) for path in folder.glob(f"{kind}-*.png")
    ]
    return sorted((int(match[1]), path) for path, match in found if match)


def spread(items: Sequence[Any], most: int) -> list[Any]:
    """All, or `most` of them from the first to the last; of one, the last."""
    if len(items) <= most:
        return list(items)
    if most < 2:
        return list(items[-1:])
    return [items[round(index * (len(items) - 1) / (most - 1))] for index in range(most)]


def read_picture(path: Path, kimg: int, root: Path, problems: list[str]) -> Shot | None:
    """A whole PNG as it is, a smaller one of what is too large for a page; None, and a line, where it is neither."""
    data = read_bytes(path, "a picture", root, problems)
    if data is None:
        return None
    try:
        with Image.open(io.BytesIO(data), formats=["PNG"]) as picture:
            width, height = picture.size
            if width * height > MAX_PIXELS:
                raise ValueError("too large")
            picture.load()
            if max(width, height) <= WIDEST and len(data) <= HEAVIEST:
                return Shot(kimg, data_uri(data, "png"), width, height)
            small = picture.convert("RGB")
            small.thumbnail((WIDEST, WIDEST), Image.Resampling.LANCZOS)
            buffer = io.BytesIO()
            small.save(buffer, format="WEBP", quality=85)
            note = f"; {width} x {height} pixels, shown smaller"
            return Shot(kimg, data_uri(buffer.getvalue(), "webp"), *small.size, note)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        problems.append(
            f"{path.name} can't be shown (damaged, cut short, or of more than {MAX_PIXELS >> 20} megapixels)"
        )
    return None


def read_film(folder: Path, kind: str, shots: int, root: Path, problems: list[str]) -> Film:
    """`shots` of the pictures of one kind, the newest among them."""
    found = list_pictures(folder, kind)
    taken = [read_picture(path, kimg, root, problems) for kimg, path in spread(found, shots)]
    return Film([shot for shot in taken if shot is not None], len(found))


def data_uri(data: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def read_run(folder: Path, shots: int = SHOTS, name: str | None = None, root: Path | None = None) -> Run:
    """A run directory as it is now. shots: how many pictures of a kind. root: the folder that all files lie in, links
    followed; `folder` itself by default."""
    problems: list[str] = []
    root = root or folder
    options = read_json(folder / "training_options.json", dict, root, problems)
    samples, targets = (read_film(folder, kind, shots, root, problems) for kind in ("samples", "targets"))
    stats = read_stats(folder / "stats.jsonl", root, problems)
    if not samples.found:
        problems.append("no samples-*.png yet (they come with snapshots, --snap)")
    distillation = mapping(options.get("distillation"))
    if distillation and not targets.found:
        problems.append("no targets-*.png (they come with --targets)")
    steps, ratio = number(distillation.get("num_steps")), number(distillation.get("ratio"))
    return Run(
        folder,
        name or printable(folder.resolve().name),
        options,
        stats,
        samples,
        targets,
        steps=(int(steps), int(steps // ratio)) if steps and ratio and steps >= ratio >= 1 else None,
        saved=newest_state(folder),
        interrupted=last_line(folder / "log.txt", root).startswith(b"Interrupted by "),
        problems=problems,
    )


def newest_state(folder: Path) -> float:
    """kimg of the newest training state, by its name; 0 without one."""
    names = [path.name for path in folder.glob("training-state-*.pt")]
    found = [re.fullmatch(r"training-state-(rolling-)?(\d{1,12})\.pt", name, re.ASCII) for name in names]
    return max((int(match[2]) / (1000 if match[1] else 1) for match in found if match), default=0.0)


def last_line(path: Path, root: Path) -> bytes:
    """Of a text file; empty where there is none."""
    return (read_bytes(path, "a log", root, []) or b"").rstrip(b"\n").rpartition(b"\n")[2]


def read_ladder(folder: Path, shots: int = SHOTS) -> Ladder:
    """A ladder's folder as it is now."""
    problems: list[str] = []
    stages = [read_run(path, shots, f"Stage {index}", folder) for index, path in stage_folders(folder, problems)]
    rungs = read_rows(folder / "ladder.json", RUNG, folder, problems)
    has_curve = os.path.lexists(folder / "teacher-curve.json")  # a distilled teacher has none
    curve = read_rows(folder / "teacher-curve.json", POINT, folder, problems) if has_curve else []
    samples = read_picture(folder / "samples.png", 0, folder, problems)
    if not stages:
        problems.append("no stage has begun yet")
    if rungs and all(rung["fd"] is None for rung in rungs):
        problems.append("no Fréchet distances: the same distill.py command with --detector=FILE adds them")
    problems += [f"{stage.folder.name}: {problem}" for stage in stages for problem in stage.problems]
    floor, plan = read_floor(folder, number(rungs[0].get("images")) if rungs else None), read_plan(folder)
    return Ladder(folder, printable(folder.resolve().name), stages, rungs, curve, floor, plan, samples, problems)


def stage_folders(folder: Path, problems: list[str]) -> list[tuple[int, Path]]:
    """The stages in their order; one that is a link to elsewhere is left out."""
    found = [(int(match[1]), path) for path in folder.glob("stage-*") if (match := STAGE.fullmatch(path.name))]
    inside, root = [], folder.resolve()
    for index, path in sorted(found):
        if not Path(os.path.realpath(path)).is_relative_to(root):
            problems.append(f"{path.name} is a link to another folder: left out")
        elif path.is_dir():
            inside.append((index, path))
    if len(inside) > MAX_ROWS:
        problems.append(f"more than {MAX_ROWS} stages: the others are left out")
    return inside[:MAX_ROWS]


def read_rows(path: Path, names: Sequence[str], root: Path, problems: list[str]) -> list[dict[str, Any]]:
    """The values of these names of every row, None where it has none."""
    content = read_json(path, list, root, problems)
    rows = [{name: row.get(name) for name in names} for row in content[:MAX_ROWS] if isinstance(row, dict)]
    if len(rows) < len(content):
        problems.append(f"{path.name} holds something other than rows, or more than {MAX_ROWS}: left out")
    return rows


def read_floor(folder: Path, measured: float | None) -> Floor | None:
    """How far as many images drawn from the data set as have `measured` the rungs are from all of it; the newest file
    that holds it counts."""
    for path in sorted(folder.glob("rungs/floor-*.json"), key=lambda p: p.lstat().st_mtime, reverse=True)[:MAX_ROWS]:
        content = read_json(path, dict, folder, [])
        images, distances = number(content.get("images")), numbers(content.get("distances"))
        if distances and images and measured in (None, images):
            return Floor(int(images), distances)
    return None


def numbers(value: Any) -> list[float]:
    """Those of a list; none of anything else."""
    found = map(number, value[:MAX_ROWS]) if isinstance(value, list) else []
    return [each for each in found if each is not None]


def read_plan(folder: Path) -> list[int]:
    """The steps of all networks of a ladder, the teacher's first, as it wrote them down when it began."""
    given = read_json(folder / "ladder-options.json", dict, folder, []).get("steps")
    steps = numbers(given)
    return [int(each) for each in steps] if isinstance(given, list) and len(steps) == len(given) else []


def show_kimg(kimg: float) -> str:
    """12.35, or 4,096,000."""
    return f"{kimg:,.0f}" if kimg >= 1000 else f"{kimg:.4g}"


# ---------------------------------------------------------------------------------------------------------------------
# Which of the two a folder is


def read(folder: Path, megabytes: float) -> Run | Ladder:
    """What `folder` holds, with as many pictures as `megabytes` of a page have room for.

    Raises UserError for a folder that is neither a run nor a ladder.
    """
    if folder.is_file():
        raise UserError(f"{folder} is a file; name the folder of a run of train.py, or of a ladder of distill.py")
    if not folder.is_dir():
        raise UserError(
            f"{folder}: there is no such folder; name a run directory of train.py, or a ladder of distill.py"
        )
    subject = _read(folder, megabytes)
    problems = [printable(problem) for problem in subject.problems[:MAX_PROBLEMS]]
    if left := len(subject.problems) - len(problems):
        problems.append(f"and {left} more of that kind")
    subject.problems = problems
    return subject


def _read(folder: Path, megabytes: float) -> Run | Ladder:
    names = {path.name for path in folder.iterdir()}
    stages = [path for _, path in stage_folders(folder, [])]
    if "ladder.json" in names or "rungs" in names or stages:
        return read_ladder(folder, shots_within(stages, megabytes))
    if names & {"training_options.json", "stats.jsonl", "log.txt"} or list_pictures(folder, "samples"):
        return read_run(folder, shots_within([folder], megabytes))
    inside = newest_within(folder)
    hint = f"did you mean {inside}?" if inside else "it has neither training_options.json nor ladder.json"
    raise UserError(f"{folder} is neither a run of train.py nor a ladder of distill.py; {hint}")


def newest_within(folder: Path) -> Path | None:
    runs = [path.parent for name in ("training_options.json", "ladder.json") for path in folder.glob(f"*/{name}")]
    return max(runs, key=lambda path: path.lstat().st_mtime, default=None)


def shots_within(folders: Iterable[Path], megabytes: float) -> int:
    """How many pictures of each kind and run fit, as they are on disk; 1 at least: the newest."""
    films = [[path for _, path in list_pictures(folder, kind)] for folder in folders for kind in ("samples", "targets")]
    for shots in range(SHOTS, 1, -1):
        chosen = [path for film in films for path in spread(film, shots)]
        if sum(min(path.lstat().st_size, HEAVIEST) for path in chosen) * 4 / 3 <= megabytes * 1e6:
            return shots
    return 1
