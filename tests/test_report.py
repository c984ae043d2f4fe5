"""report.py: one page from whatever a run has left, of any size, whole or torn, and whatever it says."""

from __future__ import annotations

import base64
import json
import math
import os
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
from formats.network_files import save_network
from helpers import make_dataset, small_network
from ladders.charts import BINS, new_figure, plot, scale_y
from metrics.classifier import train_detector
from reporting import run_report
from reporting.run_files import MAX_PROBLEMS, Picture, read, settings_of

VOID = {"meta", "img", "input", "link", "br"}
SVG = "data:image/svg+xml;base64,"
HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>"


class Page(HTMLParser):
    """Tags with their attributes, and the text, with that of figures; fails where a tag is closed that wasn't open."""

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
        source = dict(attrs).get("src") or ""
        if source.startswith(SVG):
            self.text += Page(base64.b64decode(source.removeprefix(SVG)).decode()).text
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

    def pictures(self, figures: bool = False) -> list[dict[str, str | None]]:
        return [image for image in self.all("img") if (image["src"] or "").startswith(SVG) == figures]


def page_of(folder: Path, *options: str) -> Page:
    assert report.main([str(folder), *options]) == 0
    page = Page((folder / "report.html").read_text(encoding="utf-8"))
    check(page)
    return page


def check(page: Page) -> None:
    """What must hold of every page: it stands alone, can be used without a mouse, and says what pictures show."""
    for tag, attributes in page.tags:
        for name in ("src", "href"):
            assert (attributes.get(name) or "#").startswith(("data:image/", "#")), (tag, attributes[name])
        assert not any(name.startswith("on") for name in attributes), (tag, attributes)
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    for link in page.all("a"):
        assert link["href"] in {f"#{name}" for name in ids}
    assert all(image.get("alt") for image in page.all("img"))
    assert all(cell.get("scope") for cell in page.all("th"))
    assert not page.all("script") and not page.all("input"), "nothing runs"
    (policy,) = [meta["content"] for meta in page.all("meta") if "http-equiv" in meta]
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def line(kimg: float, loss: Any = 0.5, **more: Any) -> str:
    values = {"Loss/loss": loss, "Progress/kimg": kimg, "Timing/sec_per_kimg": 2.0, "Timing/total_sec": kimg * 2}
    means = {name: {"num": 1, "mean": value, "std": 0} for name, value in {**values, **more}.items()}
    return json.dumps({**means, "timestamp": 1e9}) + "\n"


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
    train_detector(data, folder / "detector.pt", kimg=1)
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
        assert f"{rung['fd']:.4g}" in page.text and f"{rung['endpoint_rmse']:.4f}" in page.text
    assert "4 → 2 → 1" in page.text and "heun" in page.text
    stages = sorted(climbed.glob("stage-*"))
    shots = sum(len(list(stage.glob(f"{kind}-*.png"))) for stage in stages for kind in ("samples", "targets"))
    assert len(page.pictures()) == shots + 1
    assert page.text.count("earlier, the newest first") == 2 * len(stages), "of each kind and stage, the newest is open"
    assert all(word in page.text for word in ("git_revision", "python", "torch", "processes", "command"))


def test_a_run_records_what_it_stood_on_and_goes_on_elsewhere(tmp_path):
    """The environment is no part of a run's identity."""
    data, run = make_dataset(tmp_path / "data.zip"), tmp_path / "run"
    args = [f"--outdir={run}", "--nosubdir", f"--data={data}", "--cbase=16", "--cres=1", "--blocks=1", "--batch=16"]
    args += ["--tick=0.016", "--dump=1", "--augment=0", "--seed=3", "--device=cpu"]
    assert train.main([*args, "--duration=0.001"]) == 0
    file = run / "training_options.json"
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
    text = page_of(run).text
    assert "finished, 2" in text and told["torch"] in text and "Resuming" in (run / "log.txt").read_text()


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
    for problem in ("1 line of stats.jsonl can't be read", "samples-000002.png can't be shown"):
        assert problem in said and problem in page.text
    assert "2 of 100 kimg so far" in page.text and "0.25" in page.text and "0.125" not in page.text
    assert len(page.pictures()) == 1 and "earlier" not in page.text
    (tmp_path / "stats.jsonl").write_text(whole + line(100))
    assert "finished, 100 kimg" in page_of(tmp_path).text
    (tmp_path / "stats.jsonl").unlink()
    assert "no tick yet" in page_of(tmp_path).text and "stats.jsonl is not there" in capsys.readouterr().out


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


def test_the_figure_of_a_ladder(climbed, tmp_path):
    """That of ladder.png: bars of seed sets, the band of the data's own distance, what is off the scale."""
    folder = shutil.copytree(climbed, tmp_path / "out")
    rows = json.loads((folder / "ladder.json").read_text())
    for row in rows:
        row["fd"], row["fd_std"], row["fd_sets"] = 2.0, 0.5, [1.5, 2.5]
    (folder / "ladder.json").write_text(json.dumps(rows))
    (point, *_) = json.loads((folder / "teacher-curve.json").read_text())
    (folder / "teacher-curve.json").write_text(json.dumps([{**point, "nfe": 1, "endpoint_rmse": 58.05}]))
    (floor,) = folder.glob("rungs/floor-*.json")
    floor.write_text(json.dumps({"images": 16, "distances": [0.5, 1.0, 1.5]}))
    page = page_of(folder)
    for shown in ("2.00 ± 0.50", "1.00 ± 0.50", "↑ 58", "the data itself (16 images", "mean ± std of 2 x 16"):
        assert shown in page.text, shown
    for content in ({"images": 17, "distances": [0.5]}, {"images": "16", "distances": 3}):  # another way; nonsense
        floor.write_text(json.dumps(content))
        assert "the data itself" not in page_of(folder).text
    rows[0]["nfe"] = None
    (folder / "ladder.json").write_text(json.dumps(rows))
    text = page_of(folder).text
    assert "network calls per image" not in text and "holds rows that lack something" in text, "no student as teacher"


FILES = ("training_options.json", "stats.jsonl", "ladder.json", "teacher-curve.json", "samples.png")
OPTIONAL = ("ladder-options.json", "floor-*.json")


@pytest.mark.parametrize("name", FILES + OPTIONAL)
@pytest.mark.parametrize("how", ["gone", "empty", "cut", "binary", "folder", "other", "odd"])
def test_any_file_may_be_missing_or_damaged(climbed, tmp_path, name, how, monkeypatch):
    monkeypatch.setattr(run_report, "picture_of", lambda figure, caption: Picture(caption, "data:image/", 1, 1))  # slow
    folder = tmp_path / "out"
    shutil.copytree(climbed, folder)
    odd = '[{"steps": 1e999, "nfe": true, "fd": "x", "network": [1]}, 3, {}]\n{"Progress/kimg": {"mean": "x"}}\n'
    for path in list(folder.rglob(name)):
        data = path.read_bytes()
        path.unlink()
        if how == "folder":
            path.mkdir()
        elif how != "gone":
            content = {"empty": b"", "cut": data[: len(data) // 2], "binary": b"\xff\x00" * 99, "other": b"[[[1]]]"}
            path.write_bytes({**content, "odd": odd.encode()}[how])
    page = page_of(folder)
    if name not in OPTIONAL and (name, how) != ("teacher-curve.json", "gone"):
        assert "Not in this page" in page.text


def test_any_line_of_the_statistics_may_be_nonsense(tmp_path):
    bad = ["[]", "3", '{"Progress/kimg": 3}', "{", "\x00", '{"Progress/kimg": {"mean": NaN}}', "[" * 100_000]
    odd = [line(9, loss="x"), line(8), line(10, loss=math.inf), line(11, loss=10**400), line(12, loss=0.75)]
    (tmp_path / "stats.jsonl").write_text("\n".join([*bad, *map(str.strip, odd)]) + "\n")
    page = page_of(tmp_path)
    assert "8 lines of stats.jsonl can't be read" in page.text and "0.75" in page.text


def test_settings_in_words():
    options = {
        "ema_halflife_kimg": 500,
        "lr_rampup_kimg": 0.0,
        "seed": 0,
        "clip": 1.0,
        "dataset_kwargs": {"xflip": False},
    }
    rows = dict(settings_of(options))
    assert rows["EMA half-life, kimg"] == "500" and rows["seed"] == rows["warm-up, kimg"] == "0"
    assert rows["mirror images"] == "no" and rows["gradient clip"] == "1"


def test_what_files_say_is_text(tmp_path):
    folder = tmp_path / HOSTILE.replace("/", "")
    stage = folder / "stage-1-4to2"
    stage.mkdir(parents=True)
    levels, lineage = [3, HOSTILE, 1, 0.5, 0], [{"network": HOSTILE}]
    distillation = {"num_steps": 4, "ratio": 2, "teacher_levels": levels, "lineage": lineage}
    options = {"desc": HOSTILE, "transfer": HOSTILE, "environment": {HOSTILE: HOSTILE + "\ud800"}}
    (stage / "training_options.json").write_text(json.dumps({**options, "distillation": distillation}))
    (stage / "stats.jsonl").write_text(line(1, **{"Loss/interval/0": 1.0, "Loss/interval/1": 2.0}))
    (stage / f"samples-{'9' * 12}.png").write_text(HOSTILE)
    (stage / "samples-1<script>.png").write_text(HOSTILE)
    (folder / "ladder.json").write_text(json.dumps([{"steps": HOSTILE, "network": HOSTILE, "fd": 1, "nfe": 3}]))
    page = page_of(folder)
    assert page.text.count("<script>alert(1)</script>") >= 6, "it is all there, as text"


# -- sizes -------------------------------------------------------------------------------------------------------------


def test_few_ticks(tmp_path):
    (tmp_path / "stats.jsonl").write_text(line(0.5))
    assert len(page_of(tmp_path).pictures(figures=True)) == 2
    (tmp_path / "stats.jsonl").write_text(line(0.5, loss=0.0))
    assert "−0" not in page_of(tmp_path).text, "an axis of nothing but 0 begins there"
    places = 1e5 + np.spacing(1e5) * np.arange(6)  # they differ in the last bits
    (tmp_path / "stats.jsonl").write_text("".join(map(line, places)))
    page_of(tmp_path)
    assert (tmp_path / "report.html").stat().st_size < 200_000


def test_very_many_ticks_and_jumps_are_thinned(tmp_path):
    count, jumps = 5000, 100
    with (tmp_path / "stats.jsonl").open("w") as file:
        for tick in range(count):
            shown = {f"Loss/interval/{jump:02d}": 1.0 + jump for jump in range(jumps)} if tick % 50 == 0 else {}
            file.write(line(tick + 1.0, loss=5.0 if tick == 3333 else 1.0 + 0.001 * (tick % 2), **shown))
    text = page_of(tmp_path).text
    assert (tmp_path / "report.html").stat().st_size < 700_000
    assert "20 of 100" in text and "jump 99" in text and "5,000 kimg so far" in text


def test_many_and_large_pictures(tmp_path):
    (tmp_path / "log.txt").write_text("Training for 1 kimg...\n")
    for kimg in range(1, 101):
        picture(tmp_path / f"samples-{kimg:06d}.png", (64, 64))
    page = page_of(tmp_path)
    notes = [image["alt"].split(" after ")[1] for image in page.pictures()]
    assert (len(notes), notes[0], notes[-1]) == (34, "100 kimg", "1 kimg")
    assert "34 of 100 samples-*.png are shown" in page.text
    few = page_of(tmp_path, "--max-mb=0.05")
    assert 1 < len(few.pictures()) < 10 and few.pictures()[0]["alt"].endswith(" after 100 kimg")
    Image.new("RGB", (5000, 3000)).save(tmp_path / "samples-000101.png")
    page = page_of(tmp_path, "--max-mb=0.001")
    assert [image["width"] for image in page.pictures()] == ["2000"] and "5000 x 3000 pixels" in page.text


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
    (run,) = read(tmp_path).runs
    assert run.series("Progress/kimg").tolist() == [1, 2, 3] and run.series("Loss/loss").tolist() == [4, 2, 1]
    assert run.rate == 2.0 and run.last("Timing/total_sec") == 6.0
    assert math.isnan(run.series("Progress/skipped_steps")[0])


def test_curves_keep_their_values_where_they_are_thinned():
    _, (axis,) = new_figure(4, 3)
    x = np.arange(1.0, 10_001)
    plot(axis, x, np.where(x == 3333, 5.0, x / 1e4), "thinned", "#000000", band=True)
    (line,), (band,) = axis.get_lines(), axis.collections
    assert len(line.get_xdata()) <= BINS and abs(np.corrcoef(line.get_xdata(), line.get_ydata())[0, 1]) > 0.99
    assert band.get_paths()[0].vertices[:, 1].max() == 5.0, "nothing that stands out is lost"
    plot(axis, np.array([1.0, 2.0, 3.0]), np.array([1.0, math.nan, 3.0]), "holes", "#000000")
    assert axis.get_lines()[1].get_xdata().tolist() == [1.0, 3.0]


@pytest.mark.parametrize(
    ("values", "log"), [([1, 7], False), ([1, 9], True), ([0, -1, math.nan], False), ([1e-30, 1e15], True)]
)
def test_an_axis_is_logarithmic_where_values_are_far_apart(values, log):
    _, (axis,) = new_figure(4, 3)
    axis.plot(values)
    scale_y(axis)
    assert (axis.get_yscale() == "log") is log and len(axis.get_yticks()) < 40


# -- folders made to do harm -------------------------------------------------------------------------------------------

HUGE = ["1e308", "-1e308", "5e-324", "1e999", "NaN", "-1", "0", "null", "[]", "true"]
HUGE += ['"x"', str(2**70), "1" + "0" * 400, "1" + "0" * 5000]


@pytest.mark.parametrize("value", HUGE, ids=lambda value: value[:8])
def test_numbers_of_any_size(tmp_path, value, capsys):
    """In every place of every file. Two ticks are whole, so that there is something to draw."""
    stage = tmp_path / "stage-1-4to2"
    (tmp_path / "rungs").mkdir()
    stage.mkdir()

    def write(path: Path, content: Any) -> None:
        path.write_text(json.dumps(content).replace('"HERE"', value))

    here = "HERE"
    distillation = {
        "num_steps": here,
        "ratio": here,
        "teacher_levels": [here, here, 1, 0],
        "lineage": [{"steps": here}],
    }
    names = ("total_kimg", "seed", "clip", "ema_halflife_kimg", "ema_rampup_ratio")
    options = {**dict.fromkeys(names, here), "distillation": distillation, "environment": {"n": here}}
    write(stage / "training_options.json", options)
    series = ("Loss/loss", "Progress/kimg", "Timing/sec_per_kimg", "Timing/total_sec", "Loss/interval/0")
    ticks = [line(1), line(2), *(line(3 + index, **{name: here}) for index, name in enumerate(series))]
    ticks.append(line(9, **{"Loss/interval/0": 1.0}).replace('"num": 1', '"num": "HERE"'))
    ticks.append(line(10).replace("1000000000.0", '"HERE"'))
    (stage / "stats.jsonl").write_text("".join(ticks).replace('"HERE"', value))
    sound = {"steps": 4, "nfe": 7, "fd": 2.0, "fd_std": 0.1, "fd_sets": [2.0], "endpoint_rmse": 0.1}
    sound |= {"sec_per_kimg": 1.0, "kimg": 1.0, "images": 16, "solver": "heun", "network": "n"}
    for name in ("ladder.json", "teacher-curve.json"):
        write(tmp_path / name, [sound, *({**sound, name: here} for name in sound)])
    write(tmp_path / "rungs" / "floor-1.json", {"images": 16, "distances": [here, 1.0]})
    write(tmp_path / "ladder-options.json", {"steps": [4, here]})
    page_of(tmp_path)
    assert "unexpected" not in capsys.readouterr().err
    for path in (stage / "training_options.json", tmp_path / "ladder.json", tmp_path / "teacher-curve.json"):
        path.write_text(path.read_text().replace(value, "1"))  # and without what makes a whole file unreadable
    page_of(tmp_path)


def nested(depth: int) -> str:
    return '{"a": ' * depth + "1" + "}" * depth


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("training_options.json", nested(40), "training_options.json is not what a run writes"),
        ("training_options.json", nested(10**5), "training_options.json is not what a run writes"),
        ("training_options.json", json.dumps({"a": ["\U0001f600"] * 10**5}), "(too long to be shown)"),
        (
            "training_options.json",
            json.dumps({"a": {"x" * 10**6: "y" * 10**6}, "desc": "z" * 10**6}),
            "(too long to be",
        ),
        ("training_options.json", " " * (1 << 22) + "{}", "larger than 4 MiB"),
        ("ladder.json", json.dumps([{"steps": 1}] * 10**4), "or more than 64"),
    ],
)
def test_pages_stay_small(tmp_path, name, content, words):
    (tmp_path / "stats.jsonl").write_text(line(1))
    (tmp_path / name).write_text(content)
    assert words in page_of(tmp_path).text
    assert (tmp_path / "report.html").stat().st_size < 1_000_000


@pytest.mark.parametrize("how", ["pipe", "device", "outside", "loop"])
def test_only_files_inside_the_folder_are_read(climbed, tmp_path, how, capsys):
    secret = tmp_path / "secret"
    secret.write_text('{"desc": "SECRET", "environment": {"SECRET": "SECRET"}}')
    folder = shutil.copytree(climbed, tmp_path / "out")
    stage = next(folder.glob("stage-1-*"))
    files = [stage / name for name in ("training_options.json", "stats.jsonl", "log.txt", "samples-000000.png")]
    files += [folder / name for name in ("ladder.json", "teacher-curve.json", "samples.png", "ladder-options.json")]
    for path in [*files, *folder.glob("rungs/floor-*.json"), folder / "report.html"]:
        path.unlink(missing_ok=True)
        target = {"device": Path("/dev/zero"), "outside": secret, "loop": path}.get(how)
        os.mkfifo(path) if target is None else path.symlink_to(target)
    shutil.move(next(folder.glob("stage-2-*")), tmp_path / "elsewhere")
    (folder / "stage-2-2to1").symlink_to(tmp_path / "elsewhere")
    assert report.main([str(folder)]) == 1 and "is no report" in capsys.readouterr().err
    page = page_of(folder, "--overwrite")
    assert "SECRET" not in (folder / "report.html").read_text() and secret.read_text().count("SECRET") == 3
    assert "links to other folders, are left out" in page.text and "training_options.json" in page.text


def test_names_reach_the_terminal_as_text(tmp_path, capsys):
    folder = tmp_path / "run\x1b[2J\udcff\n"
    for index in range(100):
        (folder / f"stage-{index}-4to2").mkdir(parents=True)
    page = page_of(folder)
    out = capsys.readouterr().out
    assert all(line.isprintable() for line in out.splitlines()) and len(out.splitlines()) == MAX_PROBLEMS + 2
    assert "run\\x1b[2J\\udcff" in page.text and "more of that kind" in out
