"""report.py: one page from whatever a run has left, of any size, whole or torn, and whatever it says."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import distill
import report
import train
from helpers import make_dataset, small_network
from training.network_files import save_network
from training.run_charts import BINS, Curve, Scale, labels, line_chart, short, smooth
from training.run_files import read_run

VOID = {"meta", "img", "input", "link", "br"}
HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>"


class Page(HTMLParser):
    """Tags with their attributes, and the text; fails where a tag is closed that wasn't open."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def page_of(folder: Path, *options: str) -> Page:
    assert report.main([str(folder), *options]) == 0
    page = Page((folder / "report.html").read_text(encoding="utf-8"))
    check(page)
    return page


def check(page: Page) -> None:
    """What must hold of every page: it stands alone, can be used without a mouse, and says what pictures show."""
    for tag, attributes in page.tags:
        for name in ("src", "href"):
            if attributes.get(name) is not None:
                assert attributes[name].startswith(("data:image/", "#")), (tag, attributes[name])  # type: ignore[union-attr]
        assert not any(name.startswith("on") for name in attributes), (tag, attributes)
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    for link in page.all("a"):
        assert link["href"] in {f"#{name}" for name in ids}
    assert all(image.get("alt") for image in page.all("img"))
    assert all(svg.get("aria-label") for svg in page.all("svg"))
    assert all(cell.get("scope") for cell in page.all("th"))
    labelled = {label.get("for") for label in page.all("label")} | {"logx"}
    assert all(field["id"] in labelled for field in page.all("input"))
    assert len(page.all("script")) == 1 and "src" not in page.all("script")[0]


def line(kimg: float, loss: Any = 0.5, **more: Any) -> str:
    values = {
        "Loss/loss": loss,
        "Progress/kimg": kimg,
        "Timing/sec_per_kimg": 2.0,
        "Timing/total_sec": kimg * 2,
        "Progress/learning_rate": 1e-3,
        "Resources/cpu_mem_gb": 1.0,
        **more,
    }
    return (
        json.dumps({name: {"num": 1, "mean": value, "std": 0} for name, value in values.items()} | {"timestamp": 1e9})
        + "\n"
    )


def picture(path: Path, size: tuple[int, int] = (20, 10)) -> None:
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).save(path)


@pytest.fixture(scope="module")
def climbed(tmp_path_factory) -> Path:
    """A real ladder 4 -> 2 -> 1, tiny."""
    folder = tmp_path_factory.mktemp("ladder")
    data = make_dataset(folder / "data.zip", count=32)
    save_network(folder / "teacher.pkl", small_network())
    args = [f"--outdir={folder / 'out'}", f"--data={data}", f"--transfer={folder / 'teacher.pkl'}", "--num_steps=4"]
    args += ["--duration=0.000256", "--batch=32", "--tick=0.064", "--snap=2", "--targets=2", "--seed=0", "--device=cpu"]
    args += ["--eval-num=16", "--eval-sets=1"]
    detector = ["fid.py", "detector", f"--data={data}", f"--dest={folder / 'detector.pt'}"]
    import fid

    assert fid.main(detector[1:]) == 0
    assert distill.main([*args, f"--detector={folder / 'detector.pt'}"]) == 0
    return folder / "out"


# -- a page of a real ladder and a real run ----------------------------------------------------------------------------


def test_a_ladder(climbed, capsys):
    page = page_of(climbed)
    assert "Note:" not in capsys.readouterr().out, "nothing is missing"
    headings = re.findall(r"Results|Samples|Loss|Targets|Speed and memory|Lineage|Settings and environment", page.text)
    assert len(set(headings)) == 7
    rungs = json.loads((climbed / "ladder.json").read_text())
    for rung in rungs:
        assert f"{rung['fd']:.4g}" in page.text and f"{rung['endpoint_rmse']:.4g}" in page.text
    assert "4 → 2 → 1" in page.text and "2 Euler steps" in page.text and "1 Euler step: this student" in page.text
    stages = sorted(climbed.glob("stage-*"))
    shots = sum(len(list(stage.glob(f"{kind}-*.png"))) for stage in stages for kind in ("samples", "targets"))
    assert len(page.all("img")) == shots + 1
    shown = [image for image in page.all("img") if "hidden" not in image]
    assert len(shown) == 2 * len(stages) + 1, "the newest of each kind and stage"
    sliders = [field for field in page.all("input") if field["type"] == "range"]
    assert len(sliders) == 2 and all(int(slider["max"]) >= 1 for slider in sliders)
    for told in (
        "git revision",
        "python",
        "torch",
        "processes",
        "distill.py" if "distill" in sys.argv[0] else "command",
    ):
        assert told in page.text


def test_a_run_records_what_it_stood_on_and_goes_on_elsewhere(tmp_path):
    """The environment is no part of a run's identity."""
    make_dataset(tmp_path / "data.zip")
    args = [f"--outdir={tmp_path / 'run'}", "--nosubdir", f"--data={tmp_path / 'data.zip'}", "--cbase=16", "--cres=1"]
    args += ["--blocks=1", "--batch=16", "--tick=0.016", "--dump=1", "--augment=0", "--seed=3", "--device=cpu"]
    assert train.main([*args, "--duration=0.001"]) == 0
    file = tmp_path / "run" / "training_options.json"
    options = json.loads(file.read_text())
    told = options["environment"]
    assert told["torch"].split(".")[0].isdigit() and told["processes"] == 1 and "identity" in options
    root = Path(report.__file__).parent
    if shutil.which("git") and (root / ".git").exists():
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=True).stdout
        assert head.startswith(told["git_revision"].rstrip("+"))
    file.write_text(json.dumps({**options, "environment": {"torch": "0.1", "git_revision": "elsewhere"}}))
    assert train.main([*args, "--duration=0.002"]) == 0
    assert json.loads(file.read_text())["environment"] == told
    text = page_of(tmp_path / "run").text
    assert "finished, 2" in text and told["torch"] in text and "Going on" in (tmp_path / "run" / "log.txt").read_text()


# -- going on, torn, damaged -------------------------------------------------------------------------------------------


def test_the_page_of_a_run_that_is_going_on(tmp_path, capsys):
    (tmp_path / "training_options.json").write_text(json.dumps({"total_kimg": 100, "batch_size": 64}))
    whole = line(1.0) + line(2.0, loss=0.25)
    (tmp_path / "stats.jsonl").write_text(whole + line(3.0, loss=0.125)[:50])
    picture(tmp_path / "samples-000001.png")
    picture(tmp_path / "samples-000002.png")
    torn = (tmp_path / "samples-000002.png").read_bytes()
    (tmp_path / "samples-000002.png").write_bytes(torn[: len(torn) // 2])
    page = page_of(tmp_path)
    said = capsys.readouterr().out
    for problem in ("the last line of stats.jsonl is cut short", "samples-000002.png can't be shown"):
        assert problem in said and problem in page.text
    assert "2 of 100 kimg so far" in page.text and "0.25" in page.text and "0.125" not in page.text
    assert len(page.all("img")) == 1 and not [field for field in page.all("input") if field["type"] == "range"]


def test_the_page_of_a_ladder_that_is_going_on(climbed, tmp_path):
    """What there is to be is told from what there is, by the files as they are after the first student."""
    folder = shutil.copytree(climbed, tmp_path / "out")
    shutil.rmtree(next(folder.glob("stage-2-*")))
    rows = json.loads((folder / "ladder.json").read_text())
    (folder / "ladder.json").write_text(json.dumps(rows[:2]))
    text = page_of(folder).text
    assert "a ladder of 2 stages" in text and "4 → 2 → 1" in text and "stage 1 of 2: finished" in text
    (folder / "ladder.json").write_text(json.dumps(rows[:1]))
    (folder / "ladder-options.json").unlink()  # of a version that did not tell the steps
    text = page_of(folder).text
    assert "a ladder of 1 stage" in text and "4 → 2 →" not in text and "stage 1: finished" in text


def test_what_the_charts_of_a_ladder_show(climbed, tmp_path):
    """Bars of seed sets, the band of the data's own distance, the teacher's point, and what is off the scale."""
    folder = shutil.copytree(climbed, tmp_path / "out")
    rows = json.loads((folder / "ladder.json").read_text())
    for row in rows:
        row["fd"], row["fd_std"] = 2.0, 0.5
    (folder / "ladder.json").write_text(json.dumps(rows))
    (point, *_) = json.loads((folder / "teacher-curve.json").read_text())
    (folder / "teacher-curve.json").write_text(json.dumps([{**point, "nfe": 1, "endpoint_rmse": 58.05}]))
    next(folder.glob("rungs/floor-*.json")).write_text(json.dumps({"images": 16, "distances": [0.5, 1.0, 1.5]}))
    page = page_of(folder)
    paths = [attributes["class"].split()[0] for attributes in page.all("path")]
    assert paths.count("bar") == 3 and paths.count("band") == 1
    for told in ("2.00 ± 0.50", "1.00 ± 0.50", "↑ 58", "the data itself (16 images drawn from it)"):
        assert told in page.text, told
    next(folder.glob("rungs/floor-*.json")).write_text(json.dumps({"images": 17, "distances": [0.5, 1.0, 1.5]}))
    assert "the data itself" not in page_of(folder).text, "that is of another way to measure"
    next(folder.glob("rungs/floor-*.json")).write_text(json.dumps({"images": "16", "distances": 3}))
    assert "the data itself" not in page_of(folder).text


@pytest.mark.parametrize(
    "name",
    [
        "training_options.json",
        "stats.jsonl",
        "ladder.json",
        "teacher-curve.json",
        "samples.png",
        "ladder-options.json",
        "floor-*.json",
    ],
)
@pytest.mark.parametrize("how", ["gone", "empty", "cut", "binary", "folder", "other", "odd"])
def test_any_file_may_be_missing_or_damaged(climbed, tmp_path, name, how):
    folder = tmp_path / "out"
    shutil.copytree(climbed, folder)
    for path in list(folder.rglob(name)):
        data = path.read_bytes()
        path.unlink()
        if how == "folder":
            path.mkdir()
        elif how != "gone":
            odd = (
                '[{"steps": 1e999, "nfe": true, "fd": "x", "network": [1]}, 3, {}]\n{"Progress/kimg": {"mean": "x"}}\n'
            )
            content = {"empty": b"", "cut": data[: len(data) // 2], "binary": b"\xff\x00" * 99, "other": b"[[[1]]]"}
            path.write_bytes({**content, "odd": odd.encode()}[how])
    page = page_of(folder)
    optional = name in ("ladder-options.json", "floor-*.json") or (name == "teacher-curve.json" and how == "gone")
    if not optional:
        assert "Not in this page" in page.text


def test_any_line_of_the_statistics_may_be_nonsense(tmp_path):
    lines = [
        "[]",
        "3",
        '{"Progress/kimg": 3}',
        "{",
        "\x00",
        '{"Progress/kimg": {"mean": NaN}}',
        "[" * 100_000,
        line(9, loss="x").strip(),
    ]
    lines += [
        line(8).strip(),
        line(10, loss=math.inf).strip(),
        line(11, loss=10**400).strip(),
        line(12, loss=0.75).strip(),
    ]
    (tmp_path / "stats.jsonl").write_text("\n".join(lines) + "\n")
    page = page_of(tmp_path)
    assert "8 lines of stats.jsonl can't be read" in page.text and "0.75" in page.text


def test_how_far_an_interrupted_run_is(tmp_path):
    """Its last tick may be long ago: states and the log say more."""
    (tmp_path / "training_options.json").write_text(json.dumps({"total_kimg": 30}))
    (tmp_path / "stats.jsonl").write_text(line(0.064))
    (tmp_path / "log.txt").write_text("Training for 30 kimg...\n")
    for name in ("rolling-0000003200", "rolling-0000001600", "000001", "rolling-x", "rolling-9"):
        (tmp_path / f"training-state-{name}.pt").write_bytes(b"")
    assert "3.2 of 30 kimg so far, by its newest state" in page_of(tmp_path).text
    with (tmp_path / "log.txt").open("a") as log:
        log.write("Interrupted by SIGTERM at 3.2 kimg\n")
    assert "interrupted at 3.2 of 30 kimg" in page_of(tmp_path).text
    with (tmp_path / "log.txt").open("a") as log:
        log.write("Going on from training-state-rolling-0000003200.pt at 3.2 kimg\n")
    assert "interrupted at" not in page_of(tmp_path).text
    (tmp_path / "stats.jsonl").write_text(line(0.064) + line(30))
    assert "finished, 30 kimg" in page_of(tmp_path).text


def test_settings_in_words(tmp_path):
    options = {"ema_halflife_kimg": 500, "ema_rampup_ratio": 0.05, "lr_rampup_kimg": 0.0, "seed": 0, "clip": 1.0}
    (tmp_path / "training_options.json").write_text(json.dumps(options))
    (tmp_path / "stats.jsonl").write_text(line(1, **{"Progress/learning_rate": 0.0}))
    page = page_of(tmp_path)
    rows = dict(read_run(tmp_path).settings)
    assert rows["EMA half-life, kimg"] == "500, at most 5% of the images seen" and rows["seed"] == "0"
    assert rows["warm-up, kimg"] == "0" and rows["gradient clip"] == "1"
    (chart,) = re.findall(r'aria-label="Learning rate of .*?</svg>', (tmp_path / "report.html").read_text(), re.DOTALL)
    assert ">1.0<" in chart and "-0" not in chart.replace("−", "-"), "an axis of nothing but 0 begins there"
    (tmp_path / "training_options.json").write_text(json.dumps({**options, "ema_std": 0.1}))
    rows = dict(read_run(tmp_path).settings)
    assert rows["EMA std"] == "0.1" and "EMA half-life, kimg" not in rows and page.text


def test_nothing_but_a_log(tmp_path, capsys):
    (tmp_path / "log.txt").write_text("Training for 1 kimg...\n")
    assert "no tick yet" in page_of(tmp_path).text
    assert "stats.jsonl is not there" in capsys.readouterr().out


def test_what_files_say_is_text(tmp_path):
    folder = tmp_path / HOSTILE.replace("/", "")
    stage = folder / "stage-1-4to2"
    stage.mkdir(parents=True)
    distillation = {
        "num_steps": 4,
        "ratio": 2,
        "teacher_levels": [3, HOSTILE, 1, 0.5, 0],
        "lineage": [{"network": HOSTILE}],
    }
    options = {
        "desc": HOSTILE,
        "transfer": HOSTILE,
        "distillation": distillation,
        "environment": {HOSTILE: HOSTILE + "\ud800"},
    }
    (stage / "training_options.json").write_text(json.dumps(options))
    (stage / "stats.jsonl").write_text(line(1, **{"Loss/interval/0": 1.0, "Loss/interval/1": 2.0}))
    (stage / f"samples-{'9' * 12}.png").write_text(HOSTILE)
    (stage / "samples-1<script>.png").write_text(HOSTILE)
    (folder / "ladder.json").write_text(json.dumps([{"steps": HOSTILE, "network": HOSTILE, "fd": 1, "nfe": 3}]))
    page = page_of(folder)
    assert page.text.count("<script>alert(1)</script>") >= 6, "it is all there, as text"


# -- sizes -------------------------------------------------------------------------------------------------------------


def test_one_tick(tmp_path):
    (tmp_path / "stats.jsonl").write_text(line(0.5))
    page = page_of(tmp_path)
    assert len(page.all("circle")) >= 3, "a point where there is no line"


def test_very_many_ticks_and_jumps_are_thinned(tmp_path):
    count, jumps = 5000, 100
    with (tmp_path / "stats.jsonl").open("w") as file:
        for tick in range(count):
            shown = {f"Loss/interval/{jump:02d}": 1.0 + jump for jump in range(jumps)} if tick % 50 == 0 else {}
            file.write(line(tick + 1.0, loss=5.0 if tick == 3333 else 1.0 + 0.001 * (tick % 2), **shown))
    page = page_of(tmp_path)
    size = (tmp_path / "report.html").stat().st_size
    assert size < 400_000
    assert "24 of 100" in page.text and page.text.count("jump 99") == 4, "two charts, their legend, and the table"
    bands = [attributes for attributes in page.all("path") if "band" in (attributes["class"] or "")]
    assert bands and all((band["d"] or "").count("L") <= 2 * BINS for band in bands)
    assert "5,000 kimg so far" in page.text


def test_many_and_large_pictures(tmp_path):
    for kimg in range(1, 101):
        picture(tmp_path / f"samples-{kimg:06d}.png", (64, 64))
    page = page_of(tmp_path)
    notes = [image["data-note"] for image in page.all("img")]
    assert len(notes) == 40 and notes[0] == "1 kimg" and notes[-1] == "100 kimg" and "40 of 100 pictures" in page.text
    few = page_of(tmp_path, "--max-mb=0.05")
    assert 1 < len(few.all("img")) < 10 and few.all("img")[-1]["data-note"] == "100 kimg"
    Image.new("RGB", (5000, 3000)).save(tmp_path / "samples-000101.png")
    newest = page_of(tmp_path, "--max-mb=0.001").all("img")
    assert len(newest) == 1 and newest[0]["width"] == "2000" and "5000 x 3000 pixels" in (newest[0]["data-note"] or "")


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "args", "status", "words"),
    [
        (None, ["{}/absent"], 1, "there is no such folder"),
        (None, ["{}"], 1, "neither a run of train.py nor a ladder"),
        ("00000-x/training_options.json", ["{}"], 1, "did you mean {}/00000-x?"),
        ("log.txt", ["{}", "--out={}/page.txt"], 2, "ends in .html"),
        ("log.txt", ["{}", "--out={}/log.txt/page.html"], 1, "Not a directory"),
        ("log.txt", ["{}", "--max-mb=0"], 2, "--max-mb"),
    ],
)
def test_refusals(make, args, status, words, tmp_path, capsys):
    if make:
        (tmp_path / make).parent.mkdir(exist_ok=True)
        (tmp_path / make).write_text("{}")
    before = sorted(tmp_path.rglob("*"))
    assert report.main([each.format(tmp_path) for each in args]) == status
    error = capsys.readouterr().err
    assert len(error.strip().splitlines()) == 1 and words.format(tmp_path) in error
    assert sorted(tmp_path.rglob("*")) == before


def test_another_file_is_not_written_over(tmp_path, capsys):
    (tmp_path / "log.txt").write_text("")
    (tmp_path / "mine.html").write_text("<!DOCTYPE html>\nmy notes")
    out = f"--out={tmp_path / 'mine.html'}"
    assert report.main([str(tmp_path), out]) == 1
    assert "--overwrite" in capsys.readouterr().err and "my notes" in (tmp_path / "mine.html").read_text()
    assert report.main([str(tmp_path), out, "--overwrite"]) == 0
    assert report.main([str(tmp_path), out]) == 0, "a report is made anew"


def test_reading_a_run_needs_no_torch(tmp_path):
    (tmp_path / "stats.jsonl").write_text(line(1))
    code = "import sys, report; assert report.main([sys.argv[1]]) == 0; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, cwd=Path(report.__file__).parent)


# -- numbers -----------------------------------------------------------------------------------------------------------


def test_values_are_read_as_they_are(tmp_path):
    (tmp_path / "stats.jsonl").write_text(line(1, loss=4.0) + line(2, loss=2.0) + line(2, loss=9.0) + line(3, loss=1.0))
    run = read_run(tmp_path)
    assert run.stats.kimg.tolist() == [1, 2, 3] and run.stats.series["loss"].tolist() == [4, 2, 1]
    assert run.rate == 2.0 and run.stats.last("seconds") == 6.0 and math.isnan(run.stats.series["skipped"][0])


def test_smoothing():
    x = np.arange(1.0, 1001)
    assert np.allclose(smooth(x, np.full(1000, 3.0)), 3.0)
    step = smooth(x, np.where(x > 500, 1.0, 0.0), part=0.02)
    assert step[499] == 0 and abs(step[519] - 0.5) < 0.03, "half of a step is made up after the half-life"
    hole = smooth(x, np.where(x == 500, np.nan, 2.0))
    assert np.allclose(hole, 2.0)
    once, twice = smooth(x, np.sin(x)), smooth(np.repeat(x, 1), np.sin(x))
    assert np.array_equal(once, twice)
    assert np.array_equal(smooth(x[:2], x[:2]), x[:2])


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize(
    ("low", "high"), [(1e-9, 1e-8), (0.0009, 0.0011), (1, 1), (3, 7000), (1e-12, 1e12), (0.2, 0.9)]
)
def test_ticks_are_few_and_within(low, high, log):
    scale = Scale.around([np.array([low, high], dtype=float)], log, 0, 100, margin=0.05)
    ticks = scale.ticks()
    assert 2 <= len(ticks) <= 12 and all(scale.low <= tick <= scale.high for tick in ticks)
    places = [scale(tick) for tick in ticks]
    assert places == sorted(places) and places[0] >= -1e-9 and places[-1] <= 100 + 1e-9
    assert len({short(tick) for tick in ticks}) == len(ticks)
    assert len(set(labels(ticks))) == len(ticks) and max(map(len, labels(ticks))) <= 7, "so wide is the room for them"


def test_numbers_on_an_axis_are_alike():
    assert labels([0, 0.0005, 0.001, 0.0015, 0.002]) == ["0.0000", "0.0005", "0.0010", "0.0015", "0.0020"]
    assert labels([0, 2e-6, 4e-6]) == ["0", "2e-6", "4e-6"] and labels([1, 2, 5]) == ["1", "2", "5"]
    assert labels([5e-4, 1e-3, 2e-3]) == ["0.0005", "0.001", "0.002"]
    assert labels([1e-5, 1e-3, 0.1, 10]) == ["1e-5", "1e-3", "1e-1", "10"]
    assert labels([0, 20000, 40000]) == ["0", "20k", "40k"]


def test_points_have_the_place_of_their_values():
    curve = Curve("c", np.array([1.0, 10.0, 100.0]), np.array([1.0, 10.0, 100.0]), "s0 dots")
    svg = line_chart([curve], "x", "title", log_x=True, log_y=True)
    points = [(float(x), float(y)) for x, y in re.findall(r'cx="([\d.]+)" cy="([\d.]+)"', str(svg))]
    (x0, y0), (x1, y1), (x2, y2) = points
    assert abs(x1 - (x0 + x2) / 2) < 0.2 and abs(y1 - (y0 + y2) / 2) < 0.2 and x2 > x0 and y2 < y0
    spread = Curve("c", curve.x, curve.y, "s0 dots", spread=np.array([0.5, math.nan, 50.0]))
    svg = str(line_chart([spread], "x", "title", log_x=True, log_y=True))
    tops, bottoms = (
        [float(y) for y in re.findall(p, svg)] for p in (r'class="bar[^>]*d="M[\d.]+ ([\d.]+)h', r"V([\d.]+)m")
    )
    dots = [float(y) for y in re.findall(r'cy="([\d.]+)"', svg)]
    ten = (dots[1] - dots[2]) / 1.0  # a factor of ten, on this axis
    for top, bottom, dot, part in zip(tops, bottoms, dots, (0.5, 0.0, 0.5), strict=True):
        assert dot - top == pytest.approx(ten * math.log10(1 + part), abs=0.05)
        assert dot - bottom == pytest.approx(ten * math.log10(1 - part), abs=0.05)
    far = str(line_chart([curve], "x", "title", log_x=True, log_y=True, y_limit=10.0))
    heights = [float(y) for y in re.findall(r'cy="([\d.]+)"', far)]
    assert heights[1] == heights[2] < heights[0] and "↑ 100" in far and "↑ 10<" not in far
    assert line_chart([Curve("c", np.array([1.0]), np.array([-1.0]))], "x", "title") is None
    assert line_chart([], "x", "title") is None
