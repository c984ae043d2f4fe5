"""What all scripts' command lines share: help that runs, --version, --config, completion, colours, bars, what comes next."""

from __future__ import annotations

import inspect
import json
import os
import pty
import re
import shlex
import shutil
import subprocess
import sys
import termios
import time
import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import click
import pytest
import torch

import convert
import dataset_tool
import distill
import example
import fid
import generate
import train
from dnnlib import cli, version
from engine.next_steps import measure_commands
from engine.options import COMMAND_LINE, given, options_of_file
from formats.network_files import save_network
from helpers import GOLDEN, load_recipe, make_dataset, small_network
from test_dataset_tool import cifar
from training.config import ARCHITECTURES
from training.dataset import ImageFolderDataset
from training.grids import Sampling, network_grid
from training.recipe import Options

ROOT = Path(__file__).parent.parent
SCRIPTS = {module.__name__: module for module in (train, distill, generate, fid, example, convert, dataset_tool)}
SMALL = ["--cbase=16", "--cres=1,2", "--blocks=1", "--batch=100", "--tick=0.1", "--warmup=0", "--device=cpu"]


def fails(capsys: pytest.CaptureFixture[str], module: Any, *args: object) -> tuple[int, str]:
    """(exit status, the one line on standard error)."""
    status = module.main([str(arg) for arg in args])
    error = capsys.readouterr().err
    assert status and error.count("\n") == 1, error
    return status, error


# ---------------------------------------------------------------------------------------------------------------------
# Help


def examples(name: str) -> list[list[str]]:
    """The commands that a script's help shows, as words from the script's name on."""
    text = re.sub(r"\\\n\s*", "", inspect.cleandoc(SCRIPTS[name].command.help or ""))
    return [shlex.split(match) for match in re.findall(rf"^\s+(?:python|torchrun .*?) ({name}\.py.*)$", text, re.M)]


COUNTS = {name: len(examples(name)) for name in SCRIPTS}
ALL = [(name, index) for name in SCRIPTS for index in range(COUNTS[name])]


def test_every_script_shows_examples():
    assert min(COUNTS.values()) >= 2, COUNTS


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all files that the examples speak of, in small."""
    folder = tmp_path_factory.mktemp("place")
    for name in ("datasets", "downloads", "photos/cats", "photos/dogs", "fid-refs", "fid-tmp"):
        (folder / name).mkdir(parents=True)
    data = make_dataset(folder / "datasets/cifar10-32x32.zip", count=40, size=8, channels=3)  # to be quick
    shutil.copy(data, folder / "datasets/my-dataset.zip")
    shutil.unpack_archive(data, folder / "photos/cats")
    shutil.unpack_archive(data, folder / "photos/dogs")
    shutil.unpack_archive(data, folder / "fid-tmp")
    for extra in folder.glob("*/**/dataset.json"):
        extra.unlink()
    cifar(folder / "downloads/cifar-10-python.tar.gz")
    net = small_network(8, 3)
    load_recipe(net, 1)
    save_network(folder / "teacher.pkl", net)
    for name in ("student-16.pkl", "student.pkl", "network-snapshot-020000.pkl"):
        save_network(folder / name, net, sampling=Sampling(network_grid(net, 32).every(2)))
    run = folder / "training-runs/00000-run"
    run.mkdir(parents=True)
    told = {COMMAND_LINE: {"outdir": "training-runs", "data": str(data), "cond": True}, "seed": 3}
    (run / "training_options.json").write_text(json.dumps(told))
    detector = [f"--data={data}", f"--dest={folder}/detector.pt", "--kimg=0.2"]
    assert fid.main(["detector", *detector]) == 0
    ref = ["ref", f"--data={data}", f"--detector={folder}/detector.pt"]
    assert fid.main([*ref, f"--dest={folder}/cifar10-32x32.npz"]) == 0
    return folder


LESS = {  # what makes an example small enough for a test; the last of two options counts
    "train": ["--dry-run", "--device=cpu"],
    "distill": [
        *("--until=16", "--duration=0.001", "--batch=100", "--eval-num=4", "--eval-sets=1", "--curve=0"),
        *("--detector=detector.pt", "--device=cpu"),
    ],
    "generate": ["--seeds=0-2", "--device=cpu"],
    "fid calc": ["--num=3", "--device=cpu"],
    "fid detector": ["--kimg=0.2"],
}


@pytest.mark.parametrize(("name", "index"), ALL, ids=[f"{name}-{index}" for name, index in ALL])
def test_an_example_runs_as_written(name, index, place, tmp_path, monkeypatch):
    words = examples(name)[index][1:]
    if name == "dataset_tool":  # would put its results where the others' data is
        place = shutil.copytree(place, tmp_path / "place")
    monkeypatch.chdir(place)
    with SCRIPTS[name].command.make_context(name, list(words), resilient_parsing=False):
        pass  # every option exists and has a value that it can have
    if name == "fid" and words[0] != "detector" and "--detector=detector.pt" not in words:
        pytest.skip("needs Inception's weights")
    if name == "fid" and words[0] != "detector":
        shutil.copy("cifar10-32x32.npz", "ref.npz")
    monkeypatch.setattr("formats.image_sources.CIFAR10_IMAGES", 20)
    more = LESS.get(name, LESS.get(f"{name} {''.join(words[:1])}", []))
    assert SCRIPTS[name].main([*words, *more]) == 0


def test_help_is_grouped(capsys):
    assert train.main(["--help"]) == 0
    text = capsys.readouterr().out
    titles = re.findall(r"^(\S.*):$", text, re.MULTILINE)
    assert titles == ["Main", "Distillation", "Hyperparameters", "Performance", "Output and resuming", "Help"]
    part = text.partition("Performance:")[2].partition("Output and resuming:")[0]
    assert "--precision" in part and "--lr" not in part and "\x1b" not in text
    for param in train.command.params:
        assert all(option in text for option in param.opts if option.startswith("--")), param.opts


def test_version(capsys):
    for module in (train, fid):
        assert module.main(["--version"]) == 0
        text = capsys.readouterr().out
        for wanted in (f"edm-distill {version.VERSION}", "Python 3.", f"torch {torch.__version__}", "CUDA"):
            assert wanted in text
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"] == version.VERSION


def test_version_names_the_commit_and_copes_without_git(tmp_path, monkeypatch):
    def git(*words: str) -> str:
        command = ["git", "-c", "user.name=a", "-c", "user.email=b", "-C", str(tmp_path), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    monkeypatch.setattr(version, "ROOT", tmp_path)
    assert version.git_revision() is None
    git("init")
    (tmp_path / "file").write_text("1")
    git("add", "file")
    git("commit", "-m", "first")
    assert version.git_revision() == git("rev-parse", "--short=12", "HEAD")
    (tmp_path / "file").write_text("2")
    assert version.git_revision() == git("rev-parse", "--short=12", "HEAD") + "+"
    monkeypatch.setenv("PATH", "")
    assert version.git_revision() is None


def test_contradictions_are_answered_before_torch_is_loaded():
    cases = {
        "--precond=edm_distillation": "needs a teacher",
        "--num_steps=4": "error: --num_steps belongs to --precond=edm_distillation",
        "--precond=edm_distillation --transfer=x --num_steps=5": "not divisible by --ratio=2",
        "--batch=9 --batch-gpu=2": "does not divide",
        "--wandb": "--wandb needs the package wandb: pip install wandb",
    }
    code = (
        "import sys, importlib.util, train\n"
        "sys.modules['wandb'] = None\n"
        "find = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name: None if name == 'wandb' else find(name)\n"
        f"for args in {[*cases]!r}:\n"
        "    assert train.main(['--outdir=o', '--data=d', *args.split()]) in (1, 2)\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for line, words in zip(done.stderr.splitlines(), cases.values(), strict=True):
        assert words in line


# ---------------------------------------------------------------------------------------------------------------------
# --config


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--ratio=4"], "error: --ratio belongs to --precond=edm_distillation"),
        (["--weighting=edm", "--ratio=4"], "error: --ratio, --weighting belong to --precond=edm_distillation"),
        (["--targets=1", "--num_steps=4", "--self-teacher"], "--num_steps, --self-teacher, --targets belong to"),
        (["--precond=vp", "--p-std=1"], "error: --p-std belongs to --precond=edm"),
        (["--precond=vp", "--p-mean=0", "--sigma-data=1"], "error: --sigma-data, --p-mean belong to --precond=edm"),
        (["--precond=edm_distillation", "--transfer=x", "--p-std=1"], "error: --p-std belongs to --precond=edm"),
        (["--tick=1e308"], "Invalid value for '--tick': '1e+308' is too large a number"),
        (["--seed=1" + 30 * "0"], "is too large a number"),
        (["--lr=nan"], "Invalid value for '--lr': 'nan' is not a finite number"),
        (["--duration=1e300"], "'--duration': 1e+300 is not in the range"),
    ],
)
def test_options_are_refused_by_name(args, words, capsys):
    status, error = fails(capsys, train, "--outdir=o", "--data=d", *args)
    assert status == 2 and words in error


def printed_options(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    text = capsys.readouterr().out.partition("Training options:\n")[2]
    options: dict[str, Any] = json.JSONDecoder().raw_decode(text)[0]
    return options


def test_config_repeats_a_run(tmp_path, capsys):
    data = make_dataset(tmp_path / "data.zip")
    first, second = tmp_path / "first", tmp_path / "second"
    args = [f"--data={data}", "--cond=1", "--duration=0.001", "--arch=ncsnpp", *SMALL]
    assert train.main([*args, f"--outdir={first}", "--nosubdir", "--lr=3e-4", "--xflip=1"]) == 0  # a random seed
    config = first / "training_options.json"
    assert train.main([f"--config={config}", f"--outdir={second}", "--device=cpu"]) == 0
    capsys.readouterr()
    a, b = (json.loads((place / "training_options.json").read_text()) for place in (first, second))
    assert a.pop("run_dir") != b.pop("run_dir") and a.pop(COMMAND_LINE) != b.pop(COMMAND_LINE)
    assert a == b and a["optimizer_kwargs"]["lr"] == 3e-4
    weights = [(place / "network-snapshot-000001.pkl").read_bytes() for place in (first, second)]
    assert [len(each) for each in weights] == [len(weights[0])] * 2

    def losses(folder: Path) -> list[Any]:
        return [json.loads(line)["Loss/loss"] for line in (folder / "stats.jsonl").read_text().splitlines()]

    assert losses(first) == losses(second)
    assert train.main([f"--config={config}", f"--outdir={second}-2", "--lr=1e-3", "--seed=9", "-n"]) == 0
    changed = printed_options(capsys)
    assert changed["optimizer_kwargs"]["lr"] == 1e-3 and changed["seed"] == 9 and changed["batch_size"] == 100
    assert train.main([f"--config={config}", "--device=cpu"]) == 0  # in its own place: done already
    assert "This run is done already" in capsys.readouterr().out


def test_given_options_survive_the_file():
    options = Options("out", "data", cres=[1, 2], lr=1e-05, cond=False, nosubdir=True, num_steps=8, wandb="p")
    again = Options(**{**options_of_file({COMMAND_LINE: json.loads(json.dumps(given(options)))})})
    assert again == options


@pytest.mark.parametrize("case", sorted(json.loads((GOLDEN / "train_options.json").read_text())))
def test_config_of_edm_itself(case, tmp_path, capsys):
    """EDM's own training_options.json come to the same options here."""
    spec = json.loads((GOLDEN / "train_options.json").read_text())[case]
    if spec["exit_code"] != 0 or case == "batchgpu":
        pytest.skip("EDM itself refuses these, or would when it trains")
    save_network(tmp_path / "foo.pkl", small_network(16, 3))
    text = json.dumps(spec["options"]).replace("foo.pkl", str(tmp_path / "foo.pkl")).replace("DIR", str(GOLDEN))
    options = json.loads(text)
    config = tmp_path / "training_options.json"
    config.write_text(text)
    args = [f"--config={config}", f"--outdir={tmp_path / 'out'}", "-n"]
    if options.get("resume_state_dump"):
        assert "which is not read here" in fails(capsys, train, *args)[1]
        return
    assert train.main(args) == 0, capsys.readouterr().err
    ours = printed_options(capsys)
    for name, value in options.items():
        assert name in ("run_dir", "seed") or ours[name] == value, name
    assert options.get("seed") in (None, ours["seed"])


EDM_FILE = {
    "dataset_kwargs": {"path": "d.zip", "use_labels": False},
    "data_loader_kwargs": {"num_workers": 1},
    "network_kwargs": {**ARCHITECTURES["ddpmpp"], "class_name": "training.networks.EDMPrecond"},
    "loss_kwargs": {"class_name": "training.loss.EDMLoss"},
    "optimizer_kwargs": {"class_name": "torch.optim.Adam", "lr": 1e-3, "betas": [0.9, 0.999], "eps": 1e-8},
}


@pytest.mark.parametrize(
    ("content", "status", "words"),
    [
        ("{", 1, "can't be used: Expecting"),
        ("[1]", 1, "it holds no JSON object"),
        (b"\xff\xfe", 1, "can't be used"),
        ("[" * 100_000, 1, "can't be used"),
        ({}, 1, "no training_options.json"),
        ({COMMAND_LINE: 3}, 1, "'command_line' is no JSON object"),
        ({"identity": {}, "network_kwargs": {}}, 1, "does not list the options"),
        ({COMMAND_LINE: {"lr": "fast"}}, 2, "'--lr': 'fast' is not a valid number"),
        ({COMMAND_LINE: {"lr": {}}}, 2, "'--lr': '{}' is not a valid number"),
        ({COMMAND_LINE: {"batch": True}}, 2, "'--batch': 'True' is not a valid whole number"),
        ({COMMAND_LINE: {"batch": 1.5}}, 2, "'--batch': '1.5' is not a valid whole number"),
        ({COMMAND_LINE: {"cres": [1, [2]]}}, 2, "'--cres': '1,[2]' is not a list of whole"),
        ({COMMAND_LINE: {"data": 5}}, 2, "data should be text, not 5"),
        ({COMMAND_LINE: {"nosubdir": "perhaps"}}, 2, "'--nosubdir': 'perhaps' is not a valid boolean"),
        ({COMMAND_LINE: {"until": 1, "lr": "5e-4"}}, 1, "it is a ladder's; distill.py takes it"),
        ({COMMAND_LINE: {"learning_rat": 1, "ema_sdt": 0.1}}, 2, "there is no option 'learning_rat'"),
        ({COMMAND_LINE: {"ema_sdt": 0.1}}, 2, "'ema_std'"),
        (
            {**EDM_FILE, "loss_kwargs": {"class_name": "x.MyLoss"}},
            1,
            "no options set its network_kwargs, loss_kwargs, optimizer_kwargs so",
        ),
        (
            {**EDM_FILE, "loss_kwargs": {"class_name": "x.EDMLoss", "P_mean": 0}},
            1,
            "no options set its network_kwargs, loss_kwargs, optimizer_kwargs so",
        ),
        ({**EDM_FILE, "optimizer_kwargs": {"class_name": "torch.optim.SGD"}}, 1, "no options set its"),
        (
            {**EDM_FILE, "network_kwargs": {**EDM_FILE["network_kwargs"], "skip": 1}},
            1,
            "no options set its",
        ),
        *[({COMMAND_LINE: {"outdir": f"a{odd}b"}}, 2, "type it on the command line") for odd in "\0\n\x1b\u202e\ud800"],
        ({**EDM_FILE, "total_kimg": "many"}, 1, "'total_kimg' is no number"),
        ({**EDM_FILE, "total_kimg": 10**400}, 2, "'--duration': inf is not in the range"),
        ({**EDM_FILE, "total_kimg": 5}, 2, "Missing option '--outdir'"),
    ],
)
def test_config_files_that_cannot_be_used(content, status, words, tmp_path, capsys):
    path = tmp_path / "options.json"
    text = content if isinstance(content, (bytes, str)) else json.dumps(content)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    place = [] if "Missing" in words else ["--outdir=o", "--data=d"]
    found, error = fails(capsys, train, f"--config={path}", *place)
    assert (found, words in error) == (status, True), error


def test_config_lowers_no_guard(tmp_path, capsys, monkeypatch):
    """Nor does this program write a file that would; and what a file has fetched is printed first."""
    data = make_dataset(tmp_path / "data.zip")
    config = tmp_path / "options.json"
    for module in (train, distill):
        for value in (True, "yes", False):
            config.write_text(json.dumps({COMMAND_LINE: {"data": str(data), "trust_network_code": value}}))
            status, error = fails(capsys, module, f"--config={config}", "--outdir=o", "--trust-network-code", "-n")
            assert status == 2 and "it sets 'trust_network_code', which only the command line may" in error
        url = "http://127.0.0.1:1/net.pkl"
        monkeypatch.setattr("engine.setup.load_network", lambda *_, **__: print("fetched") or 1 / 0)
        config.write_text(json.dumps({COMMAND_LINE: {"data": str(data), "transfer": url}}))
        args = [f"--config={config}", f"--outdir={tmp_path / 'o'}", "--num_steps=2", "--device=cpu", "-n"]
        assert module.main([*args, *["--precond=edm_distillation"] * (module is train)]) == 1
        out = capsys.readouterr().out
        assert out.index(f"From --config: --transfer={url}\n") < out.index("fetched")
    args = [f"--data={data}", f"--outdir={tmp_path / 'run'}", "--nosubdir", "--trust-network-code", *SMALL]
    assert train.main([*args, "--duration=0.001"]) == 0
    written = json.loads((tmp_path / "run/training_options.json").read_text())
    assert written["trust_network_code"] and "trust_network_code" not in written[COMMAND_LINE]


@pytest.mark.parametrize("option", ["config", "outdir"])
def test_a_pipe_is_refused(option, tmp_path, capsys):
    data = make_dataset(tmp_path / "data.zip")
    save_network(tmp_path / "net.pkl", small_network())
    os.mkfifo(tmp_path / "pipe")
    for module in (train, distill):
        args = [f"--data={data}", f"--outdir={tmp_path / 'o'}", f"--{option}={tmp_path / 'pipe'}", "--device=cpu"]
        args += [f"--transfer={tmp_path / 'net.pkl'}", "--num_steps=2"] if module is distill else SMALL
        assert "pipe" in fails(capsys, module, *args)[1]


def test_config_that_is_not_there(tmp_path, capsys):
    assert "No such file or directory" in fails(capsys, train, f"--config={tmp_path / 'no.json'}")[1]
    (tmp_path / "run.json").write_text(json.dumps({COMMAND_LINE: {}, "run_dir": "x"}))
    assert "no ladder-options.json" in fails(capsys, distill, f"--config={tmp_path / 'run.json'}")[1]


# ---------------------------------------------------------------------------------------------------------------------
# Completion, colours


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["PYTHON", "train.py", "--num"], ["--num_steps"]),
        (["PYTHON", "train.py", "--arch", "=", "nc"], ["ncsnpp"]),
        (["PYTHON", "train.py", "--cond", "=", "1", "--preco"], ["--precond"]),
        (["PYTHON", "fid.py", "calc", "--de"], ["--detector", "--device"]),
        (
            ["torchrun", "--standalone", "--nproc_per_node", "=", "2", "generate.py", "--sigma"],
            ["--sigma_min", "--sigma_max"],
        ),
        (["PYTHON", "setup.py", "--num"], []),
    ],
)
def test_completion(words, wanted):
    words = [sys.executable if word == "PYTHON" else word for word in words]
    script = (
        f"source extras/completion.bash; COMP_WORDS=({shlex.join(words)}); COMP_CWORD={len(words) - 1}; "
        'COMP_WORDBREAKS="=:"; _edm_distill; printf "%s\\n" "${COMPREPLY[@]}"'
    )
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-c", script], cwd=ROOT, capture_output=True, text=True, check=True, env=env)
    assert done.stdout.split() == wanted, done.stderr


@pytest.mark.parametrize(
    ("terminal", "env", "coloured"),
    [(True, {}, True), (False, {}, False), (True, {"NO_COLOR": "1"}, False), (True, {"TERM": "dumb"}, False)],
)
def test_colour(terminal, env, coloured, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    assert (cli.bold("x"), cli.green("x")) == (("\x1b[1mx\x1b[0m", "\x1b[32mx\x1b[0m") if coloured else ("x", "x"))


# ---------------------------------------------------------------------------------------------------------------------
# While it works, and afterwards


def on_a_terminal(*command: object, timeout: float = 100) -> str:
    """What a command shows on a terminal."""
    main, side = pty.openpty()
    termios.tcsetwinsize(side, (50, 150))
    env = {**os.environ, "TERM": "xterm", "OMP_NUM_THREADS": "1"}
    env.pop("NO_COLOR", None)
    process = subprocess.Popen(
        [sys.executable, *map(str, command)], cwd=ROOT, stdin=side, stdout=side, stderr=side, env=env
    )
    os.close(side)
    shown = b""
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        try:
            part = os.read(main, 65536)
        except OSError:  # the other side is closed
            break
        if not part:
            break
        shown += part
    os.close(main)
    assert process.wait(timeout=10) == 0, shown[-2000:]
    return shown.decode()


def test_bars_are_for_terminals_alone(tmp_path, capsys):
    data = make_dataset(tmp_path / "data.zip")
    args = [f"--data={data}", "--nosubdir", "--duration=0.002", "--seed=1", *SMALL, "--tick=0.2"]
    shown = on_a_terminal("train.py", f"--outdir={tmp_path / 'a'}", *args)
    assert re.search(r"training: +\d+%.*img/s, loss 0\.\d+", shown), shown[-3000:]
    assert "\x1b[32mWritten to " in shown
    log = (tmp_path / "a" / "log.txt").read_text()
    assert "img/s" not in log and "\r" not in log and "\x1b" not in log
    assert len(re.findall(r"^About .* for the .* kimg that are left$", log, re.MULTILINE)) == 1
    for line in log.splitlines():
        assert line in shown, line  # a line is never broken by the bar
    assert train.main([f"--outdir={tmp_path / 'b'}", *args]) == 0
    piped = capsys.readouterr()
    assert piped.err == "" and "img/s" not in piped.out and "\x1b" not in piped.out

    network = tmp_path / "a" / "network-snapshot-000002.pkl"
    shown = on_a_terminal(
        *("generate.py", f"--network={network}", f"--outdir={tmp_path / 'images'}", "--seeds=0-9", "--steps=3"),
        *("--batch=2", "--device=cpu"),
    )
    assert re.search(r"NFE 5: +\d+%.*/10 ", shown), shown


def test_the_next_commands_run_as_they_are_printed(tmp_path, capsys, monkeypatch):
    """From scratch, then down to a single step, with nothing but what the run before has proposed."""
    data = make_dataset(tmp_path / "my data.zip", size=8)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("engine.next_steps.FIRST_STEPS", 2)
    less = ["--batch=100", "--tick=1", "--device=cpu"]
    small = [*SMALL, "--duration=0.001", *less]
    assert train.main([f"--data={data}", "--outdir=runs", "--desc=a b", "--seed=0", *small]) == 0
    stages = []
    for _ in range(3):
        text = capsys.readouterr().out
        commands = [shlex.split(line) for line in re.findall(r"^    (\S*python .*)$", text, re.MULTILINE)]
        by_script = {(Path(words[1]).stem, words[2]): words for words in commands}
        assert all(Path(words[1]).is_file() for words in commands)
        generated = next(words for (name, _), words in by_script.items() if name == "generate")
        assert generate.main([*generated[2:], "--seeds=0-1", "--device=cpu"]) == 0
        assert [first for name, first in by_script if name == "fid"] == ["detector", "ref", "gen"], "grey and tiny"
        for name, first in by_script:
            if name == "distill":
                assert distill.main([*by_script[name, first][2:], "--detector=none", "-n"]) == 0
                assert "2 -> 1 steps, heun teacher" in capsys.readouterr().out
            if name == "fid":
                words = by_script[name, first][2:]
                with fid.command.make_context("fid.py", list(words)):
                    pass
                assert fid.command.commands[words[0]].make_context(words[0], words[1:])
        stage = next((words for (name, _), words in by_script.items() if name == "train"), None)
        assert ("distill" in {name for name, _ in by_script}) == (not stages)
        if stage is None:
            break
        stages.append(re.findall(r"^  (.* steps)$", text, re.MULTILINE)[-1])
        capsys.readouterr()
        assert train.main([*stage[2:], *less]) == 0
    assert stages == ["2 -> 1 steps"]
    assert len(list((tmp_path / "runs").iterdir())) == 2


@pytest.mark.parametrize(
    ("shape", "wanted"),
    [
        ({"size": 32, "channels": 3}, ["ref", "gen"]),
        ({"size": 16, "channels": 3}, ["detector", "ref", "gen"]),
        ({"size": 16, "channels": 3, "classes": None}, ["ref", "gen"]),
        ({"size": 16, "channels": 3, "count": 9}, ["ref", "gen"]),  # too few for a detector
    ],
)
def test_the_proposed_measurement_fits_the_images(tmp_path, shape, wanted):
    data = str(make_dataset(tmp_path / "data.zip", **{"count": 10, **shape}))
    run = SimpleNamespace(dataset=ImageFolderDataset(data))
    title, commands = measure_commands(cast(Any, run), tmp_path, data, "--network=n.pkl")
    assert [words[2] for words in commands] == wanted
    assert all((f"--detector={tmp_path / 'detector.pt'}" in words) == (len(wanted) == 3) for words in commands[-2:])
    doubtful = len(wanted) == 2 and shape["size"] < 32
    assert ("Inception was made for photographs" in title) == doubtful
    assert "--num-images=2000" in commands[-1] and "over 2000 images; 50000 is customary" in title


def test_a_nosubdir_run_proposes_another_folder(tmp_path, capsys, monkeypatch):
    data = make_dataset(tmp_path / "data.zip")
    assert train.main([f"--data={data}", f"--outdir={tmp_path / 'a'}", "--nosubdir", "--duration=0.001", *SMALL]) == 0
    text = capsys.readouterr().out
    assert f"--outdir={tmp_path / 'a-32to16'} " in text and "--nosubdir" in text
    monkeypatch.chdir(ROOT)
    from engine.next_steps import launched

    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    assert launched("train.py") == ["python", "train.py"]
    monkeypatch.setattr("torch_utils.distributed.get_world_size", lambda: 4)
    assert launched("train.py") == ["torchrun", "--standalone", "--nproc_per_node=4", "train.py"]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert launched("train.py") == ["torchrun", "--nnodes=2", "--nproc_per_node=2", "train.py"]


def test_programs_are_named_so_that_they_are_found(tmp_path, monkeypatch):
    """By name in an environment that is active, by path in one that is not, and by name where there is no other way."""
    own, other = tmp_path / ".venv" / "bin", tmp_path / "elsewhere"
    for folder in (own, other):
        folder.mkdir(parents=True)
        (folder / "python").write_text("")
        (folder / "python").chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(own / "python"))
    monkeypatch.chdir(tmp_path)
    for path, wanted in (([own, other], "python"), ([other, own], ".venv/bin/python"), ([], ".venv/bin/python")):
        monkeypatch.setenv("PATH", os.pathsep.join(map(str, path)))
        assert cli.program("python") == wanted
    assert cli.program("torchrun") == "torchrun"
    monkeypatch.chdir(other)
    assert cli.program("python") == str(own / "python")


def test_sections_name_only_what_follows():
    @cli.command(name="x")
    @cli.section("First")
    @click.option("--a")
    @cli.section("Second")
    @click.option("--b", help="a very long name is put on a line of its own", metavar="X" * 40)
    def command(a: str, b: str) -> None:
        """Nothing."""

    text = command.get_help(click.Context(command))
    assert re.search(r"First:\n +--a TEXT\s*\n\nSecond:\n +--b X+\n", text), text


def test_a_python_without_the_packages_is_answered():
    """The commonest first mistake: another Python than .venv's. Without site-packages none of them is there."""
    for script in ROOT.glob("*.py"):
        done = subprocess.run([sys.executable, "-S", script, "--help"], capture_output=True, text=True)
        (line,) = done.stderr.splitlines()
        assert done.returncode == 1 and "the Python package click is missing in" in line and "make env" in line


def test_a_package_that_is_missing_later_is_answered():
    assert "the Python package scipy is missing" in cli._message(ModuleNotFoundError("No module", name="scipy"))
