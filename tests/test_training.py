"""The training loop: EDM's arithmetic, exactness, resuming, and what a run leaves behind."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import train
from engine import costs
from engine import loop as course
from engine.options import ALTERING, named_differences
from engine.previews import spread
from engine.setup import prepare
from formats import state
from formats.network_files import load_network, save_network
from helpers import GOLDEN, golden, load_recipe, make_dataset, small_network
from training.config import check_batch, differences, next_run_number
from training.dataset import Dataset, ImageFolderDataset
from training.loader import Batch, Loader, Order
from training.optimizer import clip_gradient, ema_factor, flat_gradients, learning_rate
from training.recipe import DISTILLATION, Options, TrainConfig, entries
from training.training_loop import Trainer

ROOT = Path(__file__).parent.parent
SMALL = ["--cbase=16", "--cres=1,2", "--blocks=1", "--batch=12", "--tick=0.1", "--seed=5", "--lr=5e-4", "--warmup=0"]


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    """The folder and the arguments of a run of 84 steps, ten ticks, to compare with and to copy."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    args = [f"--data={data}", *SMALL, "--nosubdir", "--duration=0.001"]
    assert run(*args, f"--outdir={folder}") == 0
    return folder, args


def run(*args):
    """train.py in this process."""
    return train.main([str(arg) for arg in args])


def launch(processes, *args, launcher=(), **kwargs):
    """train.py under torchrun, on one thread a process so that a small machine isn't swamped."""
    words = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", *launcher]
    command = [sys.executable, *words, str(ROOT / "train.py"), *map(str, args)]
    return subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, start_new_session=True, **kwargs)


def finish(processes, *args, log):
    """train.py under torchrun, to its end. A start that fails is followed by one more, with a warning."""
    for attempt in (1, 2):
        with open(log, "w", encoding="utf-8") as file:
            status = launch(processes, *args, stdout=file, stderr=file).wait(timeout=240)
        if status == 0:
            return
        text = log.read_text(encoding="utf-8")[-3000:]
        assert attempt == 1, text
        warnings.warn(f"{processes} processes ended with status {status} and were started again: {text}", stacklevel=2)


def losses(run_dir):
    return [line["Loss/loss"] for line in stats(run_dir)]


def stats(run_dir):
    return [json.loads(line) for line in Path(run_dir, "stats.jsonl").read_text().splitlines()]


def timeless(run_dir):
    """stats.jsonl without what measures time or memory."""
    return [
        {key: value for key, value in line.items() if not key.startswith(("Timing/", "Resources/", "timestamp"))}
        for line in stats(run_dir)
    ]


def assert_same_state(a, b):
    """Bit for bit: weights, EMA, optimiser, statistics, position but for the time."""
    a, b = state.load_state(a), state.load_state(b)
    for part in ("net", "ema"):
        assert a[part].keys() == b[part].keys()
        for name in a[part]:
            assert torch.equal(a[part][name], b[part][name]), (part, name)
    for part in a["optimizer"]:
        for name in a["optimizer"][part]:
            assert torch.equal(a["optimizer"][part][name], b["optimizer"][part][name]), (part, name)
    assert a["stats"] == b["stats"]
    a["position"].pop("elapsed_sec"), b["position"].pop("elapsed_sec")
    assert a["position"] == b["position"]


# -- EDM's arithmetic ----------------------------------------------------------------------------------------------------


def config(**kwargs):
    """A config with the defaults of training from scratch."""
    base = {"run_dir": "", "dataset_kwargs": {}, "network_kwargs": {}, "loss_kwargs": {}}
    return TrainConfig(**{**vars(Options("", "").filled()), "seed": 0, **base, **kwargs})


def test_golden_learning_rate_and_ema_tables():
    rows = json.loads((GOLDEN / "ema_lr.json").read_text())["rows"]
    assert len(rows) > 5
    for row in rows:
        nimg = row["nimg"]
        for batch, half, ratio in ((512, 500, 0.05), (512, 500, None), (4096, 50000, 0.05), (256, 250, 0.05)):
            name = f"ema_b{batch}_hl{half}_" + ("norampup" if ratio is None else f"r{ratio}")
            settings = config(batch=batch, ema=half / 1000, ema_rampup_ratio=ratio)
            assert ema_factor(nimg, settings) == pytest.approx(row[name], rel=1e-12, abs=1e-300)
        for ramp in (10000, 1, 0):
            rate = learning_rate(nimg, config(lr=1.0, warmup=ramp / 1000))
            if not (ramp == 0 and nimg == 0):  # EDM computes 0 / 0+ = 0 there; without a ramp we start at full rate
                assert rate == pytest.approx(row[f"lr_factor_rampup{ramp}"], rel=1e-12)
        assert learning_rate(nimg, config(lr=1e-3)) == pytest.approx(row["lr_1e-3_rampup10000"], rel=1e-12)


@pytest.mark.parametrize("decay", ["linear", "cosine"])
def test_decay_reaches_zero_at_the_end(decay):
    settings = config(lr=1.0, warmup=0, lr_decay=decay, duration=0.01)
    assert [learning_rate(n, settings) for n in (0, 5000, 10000)] == pytest.approx([1, 0.5, 0], abs=1e-12)


@pytest.mark.parametrize("std", [0.05, 0.1, 0.25])
def test_power_function_average(std):
    """The weights of all steps add up to 1, grow as a power of the step, and have the deviation asked for."""
    steps = 4000
    factors = np.array([ema_factor(k * 64, config(batch=64, ema_std=std)) for k in range(steps)])
    assert factors[0] == 0 and (np.diff(factors) > 0).all()
    weights = (1 - factors) * np.append(np.cumprod(factors[:0:-1])[::-1], 1.0)
    assert weights.sum() == pytest.approx(1)
    time = np.arange(1, steps + 1) / steps
    mean = (weights * time).sum()
    assert np.sqrt((weights * (time - mean) ** 2).sum()) == pytest.approx(std, rel=2e-2)


def test_clipping_shortens_a_gradient_and_keeps_its_direction():
    parameters = [torch.nn.Parameter(torch.zeros(3)), torch.nn.Parameter(torch.zeros(2, 2))]
    flat = flat_gradients(parameters)
    for limit, length in ((10.0, 5.0), (5.0, 5.0), (1.0, 1.0)):
        flat.copy_(torch.tensor([3.0, 0, 0, 4.0, 0, 0, 0]))
        clip_gradient(flat, limit)
        assert parameters[0].grad.tolist() == pytest.approx([3 * length / 5, 0, 0])
        assert parameters[1].grad.flatten().tolist() == pytest.approx([4 * length / 5, 0, 0, 0])
    clip_gradient(flat.zero_(), 1.0)
    assert not flat.any()


def test_golden_training_steps():
    """Six steps of EDM's own loop: loss, learning rate, Adam, EMA."""
    data = golden("train_steps.npz")
    spec = json.loads(str(data["config_json"]))
    dataset = SimpleNamespace(resolution=16, num_channels=3, label_dim=10, has_labels=True)
    settings = config(
        network_kwargs={"class_name": "EDMPrecond", **spec["network_kwargs"]},
        loss_kwargs={"class_name": "EDMLoss"},
        augment_kwargs={"p": spec["p"], **spec["aug"]},
        batch=4,
        lr=spec["lr"],
        warmup=spec["lr_rampup_kimg"] / 1000,
        ema=spec["ema_halflife_kimg"] / 1000,
        ema_rampup_ratio=spec["ema_rampup_ratio"],
    )
    trainer = Trainer(settings, dataset)
    load_recipe(trainer.net, spec["weight_seed"])
    trainer.ema.load_state_dict(trainer.net.state_dict())
    step, sums = 0, []

    class LossInEdmsOrder(type(trainer.loss_fn)):  # type: ignore[misc]
        def __call__(self, net, images, labels, pipe, source):
            torch.manual_seed(1000 + step)
            value = super().__call__(net, images, labels, pipe)
            sums.append(float(value.detach().double().sum() / 4))
            return value

    trainer.loss_fn.__class__ = LossInEdmsOrder
    for step in range(6):
        assert learning_rate(trainer.nimg, settings) == pytest.approx(data["lr"][step], rel=1e-9, abs=1e-12)
        assert ema_factor(trainer.nimg, settings) == pytest.approx(data["ema_beta"][step], rel=1e-9, abs=1e-12)
        images, labels = torch.from_numpy(data["images_u8"][step]), torch.from_numpy(data["labels"][step])
        trainer.step(iter([Batch(images, labels)]))
        assert float(trainer.gradients.double().norm()) == pytest.approx(data["grad_norm"][step], rel=1e-5)
    np.testing.assert_allclose(sums, data["loss_sum_over_batch"], rtol=1e-5)
    names = json.loads(str(data["param_names_json"]))
    for kind, net in (("net", trainer.net), ("ema", trainer.ema)):
        parameters = dict(net.named_parameters())
        for index, name in enumerate(names):
            if "qkv.bias" not in name:  # its key part has a true gradient of zero, and Adam magnifies the rounding
                want = data[f"{kind}_param_l2"][index]
                assert float(parameters[name].double().norm()) == pytest.approx(want, rel=2e-6), (kind, name)
        for name in ("model.map_layer0.weight", "model.dec.16x16_aux_conv.weight", "model.map_augment.weight"):
            want = data[f"{kind}/{name}"]
            assert np.abs(parameters[name].detach().numpy() - want).max() <= 1e-6 * np.abs(want).max(), (kind, name)


@pytest.mark.parametrize("case", sorted(json.loads((GOLDEN / "train_options.json").read_text())))
def test_golden_options(case, tmp_path, capsys):
    """EDM's options mean what they mean in EDM, down to the layout of training_options.json and the directory's name."""
    spec = json.loads((GOLDEN / "train_options.json").read_text())[case]
    out = tmp_path / "OUT"
    (out / "00007-earlier").mkdir(parents=True)
    (tmp_path / "foo.pkl").write_bytes(b"")
    save_network(tmp_path / "foo.pkl", small_network(16, 3))
    place = {"DIR": str(GOLDEN), "OUT": str(out), "foo.pkl": str(tmp_path / "foo.pkl")}

    def local(text):
        for word, path in place.items():
            text = text.replace(word, path)
        return text

    status = run(*[local(arg) for arg in spec["args"]])
    printed = capsys.readouterr()
    if spec["exit_code"] != 0 or case == "batchgpu":  # which EDM notices only when it trains
        assert status in (1, 2) and len(printed.err.strip().splitlines()) == 1
        return
    assert status == 0, printed.err
    text = printed.out.partition("Training options:\n")[2]
    options, _ = json.JSONDecoder().raw_decode(text)
    for key, value in spec["options"].items():
        expected = json.loads(local(json.dumps(value)))
        assert options[key] == expected, key
    assert list(out.iterdir()) == [out / "00007-earlier"], "a dry run leaves nothing behind"


# -- randomness and exactness ----------------------------------------------------------------------------------------------


def test_order_is_addressable_and_visits_everything_once_an_epoch():
    order = Order(10, seed=3)
    positions = order.indices(0, 30)
    assert order.indices(7, 23) == positions[7:23]
    for epoch in range(3):
        assert sorted(positions[epoch * 10 : epoch * 10 + 10]) == list(range(10))
    assert positions[:10] != positions[10:20]
    assert Order(10, seed=4).indices(0, 30) != positions


class Numbers(Dataset):
    """Image i is full of i."""

    def _load_raw_images(self, raw_indices):
        return np.stack([np.full([1, 2, 2], index, np.uint8) for index in raw_indices])


def test_loader_gives_every_rank_its_slice_whatever_the_workers():
    dataset = Numbers("numbers", [10, 1, 2, 2])
    whole = Loader(dataset, seed=1, batch_size=6, step=2, workers=1)
    ranks = [Loader(dataset, seed=1, batch_size=6, rank=r, world_size=3, step=2, workers=3) for r in range(3)]
    try:
        for _ in range(3):
            together = torch.cat([next(loader).images for loader in ranks])
            assert torch.equal(together, next(whole).images)
    finally:
        for loader in (whole, *ranks):
            loader.close()


def test_accumulation_changes_rounding_only(data, tmp_path):
    args = [f"--data={data}", *SMALL, "--cond=1", "--nosubdir", "--duration=0.001", "--dropout=0"]
    for name, extra in (("whole", []), ("rounds", ["--batch-gpu=3"])):
        assert run(*args, f"--outdir={tmp_path / name}", "--tick=0.012", *extra) == 0
    whole, rounds = losses(tmp_path / "whole"), losses(tmp_path / "rounds")
    assert len(whole) > 50
    for a, b in zip(whole, rounds, strict=True):
        assert a["num"] == b["num"] and a["mean"] == pytest.approx(b["mean"], rel=1e-5)


def test_sheets_show_images_of_the_whole_data_set():
    """Classes lie one after another: the first images are of one class."""
    assert spread(40, 4) == [0, 13, 26, 39] and spread(3, 4) == [0, 1, 2]


def test_a_resumed_run_prints_its_own_place_and_time(data, tmp_path, capsys):
    """--resume=latest names the directory that it takes; seconds since the restart are about the images since then."""
    args = [f"--data={data}", *SMALL, "--duration=0.001", "--save-every=0", "--snap=1000", f"--outdir={tmp_path}"]
    assert run(*args) == 0
    (folder,) = tmp_path.iterdir()
    (folder / "training-state-000001.pt").unlink()
    left = 1008 - newest_nimg(folder)
    capsys.readouterr()
    assert run(*args, "--resume=latest") == 0
    out = capsys.readouterr().out
    assert f"Output directory:        {folder}\n" in out and "/00001-" not in out
    last = stats(folder)[-1]
    kimg = [line["Progress/kimg"]["mean"] for line in stats(folder)[-2:]]
    assert 0 < left < 1000 * (kimg[1] - kimg[0]) - 6, "part of the last tick was before the restart"
    each = 1000 * last["Timing/sec_per_tick"]["mean"] / left
    assert last["Timing/sec_per_kimg"]["mean"] == pytest.approx(each)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP])
def test_a_signal_ends_a_run_with_its_state(finished, tmp_path, monkeypatch, capfd, number):
    """Resuming ends as if nothing had been; exit status 128 + signal. A line comes at once: no step has to end first."""
    whole, args = finished
    original, before, seen = Trainer.step, signal.getsignal(number), []

    def step(self, loader):
        if self.step_count == 5:
            signal.raise_signal(number)
            seen.append(capfd.readouterr().err)
        original(self, loader)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", step)
        assert run(*args, f"--outdir={tmp_path}") == 128 + number
    error = capfd.readouterr().err
    assert seen == [f"{number.name}: finishing this step, then saving; Ctrl-C again stops at once\n"]
    assert error.startswith(f"train.py: interrupted by {number.name} at ")
    assert error.endswith(": run the same command to resume\n") and error.count("\n") == 1
    assert newest_nimg(tmp_path) == 6 * 12 and signal.getsignal(number) == before
    assert run(*args, f"--outdir={tmp_path}") == 0
    assert_same_state(*(folder / "training-state-000001.pt" for folder in (whole, tmp_path)))


def test_a_run_killed_before_its_first_state_prints_that_it_begins_anew(finished, tmp_path, monkeypatch, capsys):
    args = [*finished[1], f"--outdir={tmp_path}"]
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", lambda self, loader: 1 / 0)
        assert run(*args) == 1
    words = f"{tmp_path} has no training state to resume from yet: this run starts from the beginning"
    assert words not in capsys.readouterr().out
    for _ in range(2):
        assert run(*args) == 0
    out = capsys.readouterr().out
    assert out.count(words) == 1 and "done already" in out


def test_who_interrupts_a_numbered_run_learns_how_to_resume(data, tmp_path, monkeypatch, capsys):
    original = Trainer.step
    monkeypatch.setattr(Trainer, "step", lambda *args: original(*args) or signal.raise_signal(signal.SIGTERM))
    assert run(f"--data={data}", *SMALL, f"--outdir={tmp_path}", "--duration=0.001") == 128 + signal.SIGTERM
    assert capsys.readouterr().err.endswith(": run the same command with --resume=latest to resume\n")


def test_a_signal_that_was_to_be_ignored_is(finished, tmp_path, monkeypatch):
    """As under nohup."""
    original, before = Trainer.step, signal.signal(signal.SIGHUP, signal.SIG_IGN)
    monkeypatch.setattr(Trainer, "step", lambda *args: signal.raise_signal(signal.SIGHUP) or original(*args))
    try:
        assert run(*finished[1], "--batch=200", f"--outdir={tmp_path}") == 0
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_second_control_c_stops_at_once(data, tmp_path, monkeypatch, capsys):
    def step(self, loader):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("still running")

    monkeypatch.setattr(Trainer, "step", step)
    assert run(f"--data={data}", *SMALL, "--nosubdir", "--duration=0.0002", f"--outdir={tmp_path}") == 130
    assert capsys.readouterr().err.endswith("interrupted\n") and not state.list_states(tmp_path)


def newest_nimg(run_dir):
    rolling = [path for path in state.list_states(run_dir) if "rolling" in path.name]
    return max(map(state.images_seen, rolling), default=0)


def wait_for(condition, job, seconds=200):
    end = time.time() + seconds
    while not condition():
        assert job.poll() is None and time.time() < end, "the run ended or hung before it could be interrupted"
        time.sleep(0.01)


class Interrupted(Exception):
    """Stands for a machine that goes away."""


def interrupt_at(monkeypatch, step):
    """Lets a run stop dead in the middle of the given step."""
    original = Trainer.step

    def dying_step(self, loader):
        if self.step_count == step:
            raise Interrupted
        original(self, loader)

    monkeypatch.setattr(Trainer, "step", dying_step)


@pytest.mark.parametrize(
    "extra",
    [
        ["--augment=0.2", "--dropout=0.2", "--cond=1", "--xflip=1", "--batch-gpu=4"],
        ["--precond=edm_distillation", "--num_steps=4", "--ratio=2"],
        ["--precond=edm_distillation", "--num_steps=4", "--ratio=4", "--self-teacher", "--clip=3", "--ema-std=0.1"],
        pytest.param(["--batch-gpu=3", "--lr-decay=cosine", "--precision=bf16"], marks=pytest.mark.slow),
        pytest.param(["--compile=1", "--dropout=0"], marks=pytest.mark.slow),
    ],
)
def test_a_resumed_run_is_the_same_run(data, teacher, tmp_path, monkeypatch, extra):
    """With dropout, augmentation, accumulation and a tick in mid-flight: weights, EMA, optimiser and statistics, bit for
    bit. The number of loader threads may be another one."""
    args = [f"--data={data}", "--batch=12", "--tick=0.1", "--seed=5", "--nosubdir", "--duration=0.001"]
    args += [*extra, "--save-every=0"] + ([f"--transfer={teacher}"] if "--num_steps=4" in extra else SMALL[:3])
    assert run(*args, f"--outdir={tmp_path / 'straight'}") == 0
    with monkeypatch.context() as patch:
        interrupt_at(patch, 40)  # ticks end with steps 1, 10, 19, 28, 37
        assert run(*args, f"--outdir={tmp_path / 'broken'}") == 1
    assert newest_nimg(tmp_path / "broken") == 40 * 12
    with open(tmp_path / "broken" / "stats.jsonl", "a") as file:  # what a killed run may have written after its state
        file.write('{"Loss/loss": "from a step that never was"}\n')
    assert run(*args, f"--outdir={tmp_path / 'broken'}", "--workers=3") == 0
    assert_same_state(tmp_path / "straight/training-state-000001.pt", tmp_path / "broken/training-state-000001.pt")
    assert timeless(tmp_path / "straight") == timeless(tmp_path / "broken")
    snapshots = [load_network(tmp_path / name / "network-snapshot-000001.pkl").net for name in ("straight", "broken")]
    assert all(torch.equal(a, b) for a, b in zip(snapshots[0].parameters(), snapshots[1].parameters(), strict=True))


def test_resuming_a_finished_run_does_nothing_and_a_changed_option_is_named(finished, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(finished[0], folder)
    args = [*finished[1], f"--outdir={folder}"]

    def times():
        return {path.name: path.stat().st_mtime_ns for path in folder.iterdir() if path.suffix in (".pkl", ".pt")}

    before = times()
    assert run(*args, "--sigma-data=0.5", "--p-mean=-1.2", "--p-std=1.2") == 0, "defaults that are spelt out"
    assert "Its --duration is 0.001; a longer --duration trains on" in capsys.readouterr().out
    assert before == times()
    for more, words in (
        (["--lr=1e-3", "--duration=0.002"], "options: --lr (was 0.0005, now 0.001). Use"),
        (["--sigma-data=0.6", "--p-mean=-1.2"], "options: --sigma-data (was not given, now 0.6). Use"),
    ):
        assert run(*args, *more) == 1
        (error,) = capsys.readouterr().err.splitlines()
        assert words in error


def test_a_finished_run_whose_rate_has_decayed_cannot_be_made_longer(data, tmp_path, capsys):
    """The message explains it: the rate is 0 by then, so that neither the old options nor a resume would help."""
    args = [f"--data={data}", *SMALL, f"--outdir={tmp_path / 'run'}", "--lr-decay=linear", "--duration=0.001"]
    words = "the learning rate reaches 0 at --duration, so a longer run must start anew"
    for _ in range(2):
        assert run(*args, "--nosubdir") == 0
    assert f"Its --duration is 0.001; {words} (another --outdir)\n" in capsys.readouterr().out
    assert run(*args, "--nosubdir", "--duration=0.002") == 1
    assert f"--duration (was 0.001, now 0.002). Use those, or another --outdir: {words}\n" in capsys.readouterr().err
    elsewhere = [*args, f"--outdir={tmp_path / 'new'}", f"--resume={tmp_path / 'run/training-state-000001.pt'}"]
    assert run(*elsewhere) == 0
    (folder,) = (tmp_path / "new").iterdir()
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Written to ")]
    named = line.removeprefix(f"Written to {folder}: ").split(", ")
    assert set(named) == {path.name for path in folder.iterdir() if path.is_file() and path.name[0] != "."}


def test_what_is_printed_at_the_start(finished, tmp_path, capsys):
    """The summary once; the JSON in its file, and in a dry run; on a CPU no memory of a GPU."""
    args = [*finished[1], f"--outdir={tmp_path}"]
    assert run(*args, "-n") == 0
    dry = capsys.readouterr().out
    assert dry.count("GFLOP an image (3 ") == 1 and dry.count('"batch_size"') == 1 and "1 dump," in dry
    assert run(*args) == 0
    out = capsys.readouterr().out
    assert "Batch size:" in out and '"batch_size"' not in out and "gpumem" not in out and "reserved" not in out
    assert json.loads((tmp_path / "training_options.json").read_text())["batch_size"] == 12


@pytest.mark.parametrize(("size", "words"), [(1.0, "takes 729 days or more on 2 CPU cores"), (0.001, None)])
def test_a_run_of_years_is_announced(monkeypatch, size, words):
    """EDM's defaults at 32x32 on two cores, and a part of them."""
    monkeypatch.setattr(costs.os, "cpu_count", lambda: 2)
    config = SimpleNamespace(total_nimg=200_000_000)
    lines = costs.describe_absurdity(SimpleNamespace(flops_per_image=size * 6.3e10, config=config))
    assert not lines if words is None else words in lines[0] and "--duration=0.27," in lines[0]


def test_resume_latest_finds_the_newest_run_of_the_same_options(data, tmp_path, capsys, monkeypatch):
    args = [f"--data={data}", *SMALL, f"--outdir={tmp_path}", "--duration=0.001", "--save-every=0"]
    with monkeypatch.context() as patch:
        interrupt_at(patch, 20)
        assert run(*args) == 1
        assert run(*args, "--lr=1e-3") == 1
    (began,) = tmp_path.glob("00000-*")
    began.rename(tmp_path / began.name.replace("-gpus1-", "-gpus8-"))  # of more processes
    capsys.readouterr()
    assert run(*args, "--resume=latest") == 0
    assert "Resuming from" in capsys.readouterr().out
    done = sorted(path.parent.name[:5] for path in tmp_path.glob("*/network-snapshot-000001.pkl"))
    assert done == ["00000"]
    assert run(*args, "--resume=latest", "--lr=3e-3") == 1
    error = capsys.readouterr().err
    assert "no run of these options" in error and "; the newest with one, 00001-" in error
    assert "has other options: --lr (was 0.001, now 0.003). Use those, or leave --resume out" in error
    assert run(*args, "--resume=latest", "--batch=24", "--lr=1e-3") == 1
    assert "has other options: --batch (was 12, now 24). Use those" in capsys.readouterr().err
    unseeded = [arg for arg in args if not arg.startswith("--seed")]
    assert run(*unseeded, "--resume=latest", "--batch=24", "--lr=1e-3") == 1
    assert "has other options: --batch (was 12, now 24). Use those" in capsys.readouterr().err, "a random seed is none"
    (tmp_path / "empty").mkdir()
    assert run(*args[:-3], f"--outdir={tmp_path / 'empty'}", "--duration=0.001", "--resume=latest") == 1
    assert "with a state. Name a state, or leave --resume out" in capsys.readouterr().err


def test_state_files_hold_no_code(finished):
    saved = torch.load(finished[0] / "training-state-000001.pt", weights_only=True)
    assert saved["position"]["nimg"] == 1008 and saved["position"]["step"] == 84


# -- numbers going wrong -----------------------------------------------------------------------------------------------------


def test_steps_without_finite_gradients_are_skipped_counted_and_logged(data, tmp_path, capsys, monkeypatch):
    from training.loss import EDMLoss

    original, calls = EDMLoss.__call__, 0

    def sometimes_infinite(self, *args, **kwargs):
        nonlocal calls
        calls += 1
        return original(self, *args, **kwargs) * (float("inf") if calls % 10 == 5 else 1)

    monkeypatch.setattr(EDMLoss, "__call__", sometimes_infinite)
    assert run(f"--data={data}", *SMALL, "--nosubdir", f"--outdir={tmp_path}", "--duration=0.001") == 0
    assert "Skipped" in capsys.readouterr().out
    saved = state.load_state(tmp_path / "training-state-000001.pt")
    assert saved["position"]["skipped"] == 8
    assert all(torch.isfinite(tensor).all() for tensor in saved["net"].values())
    steps = {int(step) for step in saved["optimizer"]["step"].values()}
    assert steps == {84 - 8}, "Adam must not count skipped steps"


def test_too_many_bad_steps_end_the_run_and_say_of_which_images(data, tmp_path, capsys, monkeypatch):
    """Half of the last hundred; the last good state is there, and the images are those that the loader had given."""
    from training.loss import EDMLoss

    original, batches = EDMLoss.__call__, []

    def infinite_later(self, net, images, *more):
        batches.append(images)
        return original(self, net, images, *more) * (float("nan") if len(batches) > 20 and len(batches) % 3 else 1)

    monkeypatch.setattr(EDMLoss, "__call__", infinite_later)
    args = [f"--data={data}", *SMALL, "--nosubdir", f"--outdir={tmp_path}", "--duration=0.003", "--save-every=0.002"]
    assert run(*args) == 1
    printed = capsys.readouterr()
    (error,) = printed.err.splitlines()
    named = re.search(r"50 of the last 100 steps had .*, the last of them step (\d+), .* images (.*);", error)
    step = int(named[1])
    assert 94 <= step < 94 + 9
    dataset = ImageFolderDataset(str(data))
    images = [torch.from_numpy(dataset[int(i)][0]).float() / 127.5 - 1 for i in named[2].split(";")[0].split(", ")]
    assert torch.equal(torch.stack(images), batches[step])
    assert re.search(r"Skipped \d+ of the last \d+ steps: gradients were not finite", printed.out)
    _, newest = state.load_newest(tmp_path)
    assert all(tensor.isfinite().all() for tensor in newest["net"].values())


def test_weights_that_are_no_numbers_are_not_saved(data, tmp_path, capsys, monkeypatch):
    original = Trainer.step

    def step(self, loader):
        original(self, loader)
        if self.step_count == 30:
            self.parameters[3].data.view(-1)[0] = float("inf")

    monkeypatch.setattr(Trainer, "step", step)
    args = [f"--data={data}", *SMALL, "--nosubdir", f"--outdir={tmp_path}", "--duration=0.001", "--save-every=0"]
    assert run(*args) == 1
    assert "the weights are not finite any more at step 30, 0.36 kimg; what was saved" in capsys.readouterr().err
    assert newest_nimg(tmp_path) == 29 * 12


def test_gradients_whose_squares_overflow_are_skipped(data, tmp_path):
    """Adam's second average would be infinite from then on, and those weights would never move again."""
    dataset = ImageFolderDataset(str(data))
    small = config(
        run_dir=str(tmp_path),
        network_kwargs={"class_name": "EDMPrecond", "model_channels": 8, "channel_mult": [1], "num_blocks": 1},
        loss_kwargs={"class_name": "EDMLoss"},
        batch=4,
        ls=1e25,
    )
    trainer = Trainer(small, dataset)
    before = [parameter.clone() for parameter in trainer.parameters]
    loader = Loader(dataset, seed=0, batch_size=4)
    trainer.step(loader)
    loader.close()
    assert 1e18 < trainer.gradients[1:].abs().max() < math.inf
    assert trainer.skipped == 1
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.parameters, strict=True))


def test_the_scale_of_half_precision(data):
    """Lowering it after an overflow is no bad step until it is 1; it is part of the state, and grows again."""
    settings = config(
        network_kwargs={"class_name": "EDMPrecond", "model_channels": 8, "channel_mult": [1], "num_blocks": 1},
        loss_kwargs={"class_name": "EDMLoss"},
    )
    trainer, again = (Trainer(settings, ImageFolderDataset(str(data))) for _ in range(2))
    for each in (trainer, again):
        each.scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=3)
        each.scaler.scale(torch.ones(()))
    for scale, counted, value in ((4.0, 0.0, math.inf), (2.0, 0.0, 1e20), (1.0, 1.0, 1e20)):  # whose squares overflow
        assert trainer.scaler.get_scale() == scale
        trainer.gradients.fill_(value)
        assert float(trainer.apply_gradients()) == counted
    for _ in range(2):
        trainer.gradients.fill_(0.25)
        assert not trainer.apply_gradients()
        assert trainer.gradients[0] == 0.5
    saved = trainer.state_dict()
    assert saved["scaler"] == {"scale": 0.5, "growth": 2}
    again.load_state(saved)
    for each in (trainer, again):
        assert each.scaler.get_scale() == 0.5
        each.apply_gradients()
        assert each.scaler.get_scale() == 1
    trainer.scaler = torch.amp.GradScaler("cpu", enabled=False)
    assert trainer.state_dict()["scaler"] == {"scale": 1.0, "growth": 0}


def test_a_stage_and_the_next(data, teacher, tmp_path, capsys):
    """4 Heun steps -> 2 -> 1, by train.py alone: grids nest, lineage grows, no teacher in any file or state."""
    common = [f"--data={data}", "--precond=edm_distillation", "--batch=12", "--duration=0.001", "--tick=0.5"]
    common.append("--seed=0")
    first = ["--nosubdir", f"--outdir={tmp_path / 'a'}", f"--transfer={teacher}", "--num_steps=4", "--targets=1"]
    assert run(*common, *first, "--intervals=uniform") == 0  # so that the mean of the jumps' losses is the loss
    student_path = tmp_path / "a/network-snapshot-000001.pkl"
    student = load_network(student_path)
    assert student.sampling.solver == "euler" and student.sampling.teacher_steps == 4
    assert student.sampling.grid.levels[0] == 80 and student.sampling.grid.steps == 2
    assert [entry["steps"] for entry in student.sampling.lineage] == [4]
    assert student.sampling.lineage[0]["sha256"] == load_network(teacher).sha256
    assert student.net.model.map_augment is not None and student.net.init_kwargs["dropout"] == 0
    assert student_path.stat().st_size < 1.5 * teacher.stat().st_size, "the teacher is not in the student's file"
    saved = state.load_state(tmp_path / "a/training-state-000001.pt")
    assert saved["net"].keys() == student.net.state_dict().keys()
    for line in stats(tmp_path / "a"):  # every jump's own loss, and together the loss
        jumps = [line[f"Loss/interval/{i}"] for i in range(2)]
        together = sum(jump["num"] * jump["mean"] for jump in jumps) / sum(jump["num"] for jump in jumps)
        assert together == pytest.approx(line["Loss/loss"]["mean"], rel=1e-5)
        assert sum(jump["num"] for jump in jumps) * 64 == line["Loss/loss"]["num"]
    assert (tmp_path / "a/targets-000001.png").is_file() and (tmp_path / "a/samples-000001.png").is_file()
    assert "4 heun steps -> 2" in capsys.readouterr().out

    assert run(*common, "--nosubdir", f"--outdir={tmp_path / 'b'}", f"--transfer={student_path}") == 0
    last = load_network(tmp_path / "b/network-snapshot-000001.pkl").sampling
    assert last.grid.levels == (80.0, 0.0) and last.ratio == 2
    assert [(entry["steps"], entry["solver"]) for entry in last.lineage] == [(4, "heun"), (2, "euler")]


def test_ema_lags_behind_the_weights(finished):
    folder, name = finished[0], "model.dec.8x8_aux_conv.weight"
    saved = state.load_state(folder / "training-state-000001.pt")
    moved = (saved["net"][name] - saved["ema"][name]).abs().max()
    assert 0 < moved < 0.1
    start, end = (load_network(folder / f"network-snapshot-00000{n}.pkl").net.state_dict()[name] for n in (0, 1))
    assert (saved["ema"][name] - start).abs().max() > 0.1 * moved, "the average follows the weights"
    assert torch.equal(end, saved["ema"][name]), "a snapshot holds the EMA"


def test_conditional_teacher(data, tmp_path, capsys):
    path = tmp_path / "teacher.pkl"
    save_network(path, small_network(label_dim=4))
    args = ["--precond=edm_distillation", "--batch=12", "--duration=0.001", "--num_steps=2", f"--transfer={path}"]
    assert run(*args, f"--data={data}", f"--outdir={tmp_path / 'run'}", "--nosubdir") == 0
    assert load_network(tmp_path / "run/network-snapshot-000001.pkl").net.label_dim == 4
    for other, extra, words in (
        (make_dataset(tmp_path / "three.zip", classes=3), [], "4 classes"),
        (make_dataset(tmp_path / "none.zip", classes=None), [], "labels"),
        (data, ["--cond=0"], "has 4 classes, and so has its student; leave it out"),
    ):
        capsys.readouterr()
        assert run(*args, f"--data={other}", f"--outdir={tmp_path / 'bad'}", *extra) == 1
        assert words in capsys.readouterr().err
    assert not (tmp_path / "bad").exists()


# -- bad input -----------------------------------------------------------------------------------------------------------------


def test_bad_options_are_answered_in_one_line(data, teacher, tmp_path, capsys):
    """What a run's data and teacher contradict; test_bad_input and test_stage have more."""
    rgb = make_dataset(tmp_path / "rgb.zip", channels=3)
    big = make_dataset(tmp_path / "big.zip", size=16)
    odd = make_dataset(tmp_path / "odd.zip", size=9)
    distil = ["--precond=edm_distillation", "--batch=12", f"--transfer={teacher}"]
    for status, words, args in (
        (2, "--cbase=128", [f"--data={data}", *distil, "--num_steps=4", "--cbase=128"]),
        (2, "--arch=adm", [f"--data={data}", *distil, "--num_steps=4", "--arch=adm"]),
        (1, "16x16", [f"--data={big}", *distil, "--num_steps=4"]),
        (1, "with 3", [f"--data={rgb}", *distil, "--num_steps=4"]),
        (1, "halved", [f"--data={odd}", *SMALL]),
        (2, "batch", [f"--data={data}", *SMALL, "--batch-gpu=5"]),
        (2, "contradicts", [f"--data={data}", *SMALL, "--fp16=1", "--precision=bf16"]),
    ):
        assert run(*args, f"--outdir={tmp_path / 'out'}", "-n") == status, words
        (error,) = capsys.readouterr().err.splitlines()
        assert words in error
    assert not (tmp_path / "out").exists()


def test_check_batch():
    assert check_batch(512, 128, 2) == 128
    assert check_batch(100, None, 1) == 100
    assert check_batch(12, 50, 2) == 6
    with pytest.raises(Exception, match="25, 50"):
        check_batch(100, 33, 1)
    with pytest.raises(Exception, match="multiple of 3"):
        check_batch(100, None, 3)


def test_differences_are_short_and_printable_and_ignore_tuples():
    (line,) = differences({"a": {"\x1b[2J": "\x1b]0;x\x07"}}, {"a": {"\x1b[2J": "y" * 500}})
    assert line.isprintable() and len(line) < 250
    assert differences({"a": [1, 2], "b": 1}, {"a": (1, 2), "b": 1}) == []
    assert differences({"a": 1}, {"a": 2}) == ["a (was 1, now 2)"]


STAGE = {"num_steps": 8, "ratio": 2, "self_teacher": False, "teacher_levels": [80.0, 1.0, 0.0]}
IDENTITY = {
    "data": ["a" * 64, True, False, 32, 100],
    "network": {"model_channels": 4, "num_blocks": 2, "dropout": 0.1},
    "loss": {"num_steps": 8, "ratio": 2, "weighting": "geomean"},
    "augment": {"p": 0.12, "scale": 1, "xflip": 1e8},
    "lr": [1e-3, [0.9, 0.999], 1e-8],
    **{"warmup": 10000, "lr-decay": "linear", "duration": 30000, "ema": [500, 0.05], "teacher-precision": None},
    **{"transfer": "b" * 64, "distillation": STAGE},
}


EMA = ("--ema (was 0.5", "EMA ramp-up ratio (was 0.05")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({}, []),
        ({"data": ["d" * 64, True, False, 32, 100]}, ["the content of --data (was aaaaaaaa..., now dddddddd...)"]),
        ({"data": ["a" * 64, True, True, 32, 100]}, ["--xflip (was False, now True)"]),
        ({"data": ["a" * 64, True, False, 32, 99]}, ["number of images (was 100, now 99)"]),
        ({"network": {"model_channels": 4, "dropout": 0.1}}, ["--blocks (was 2, now not given)"]),
        ({"loss": {**IDENTITY["loss"], "weighting": "edm"}}, ["--weighting (was geomean, now edm)"]),
        ({"augment": None}, ["--augment (was 0.12, now 0.0)"]),
        ({"augment": {**IDENTITY["augment"], "p": 0.2}}, ["--augment (was 0.12, now 0.2)"]),
        ({"lr": [1e-3, [0.9, 0.99], 1e-8]}, ["betas (was 0.9,0.999, now 0.9,0.99)"]),
        ({"warmup": 0}, ["--warmup (was 10.0, now 0.0)"]),
        ({"lr-decay": "none", "duration": None}, ["--lr-decay (was linear, now none)"]),
        ({"lr-decay": "cosine", "duration": 30000}, ["--lr-decay (was linear, now cosine)"]),
        ({"duration": 20000}, ["--duration (was 0.03, now 0.02)"]),
        ({"ema": [200, 0.05]}, ["--ema (was 0.5, now 0.2)"]),
        ({"ema": ["std", 0.1]}, ["--ema-std (was not given, now 0.1)", *(f"{x}, now not given)" for x in EMA)]),
        ({"teacher-precision": "bf16"}, ["--teacher-precision (was fp32, now bf16)"]),
        ({"transfer": None}, ["the content of --transfer (was bbbbbbbb..., now not given)"]),
        ({"distillation": {**STAGE, "self_teacher": True}}, ["--self-teacher (was False, now True)"]),
        (  # what follows from another difference is left out
            {
                "loss": {**IDENTITY["loss"], "num_steps": 16},
                "distillation": {**STAGE, "num_steps": 16, "teacher_levels": [80.0, 2.0, 1.0, 0.0]},
            },
            ["--num_steps (was 8, now 16)"],
        ),
        (
            {"network": {**IDENTITY["network"], "augment_dim": 9, "channel_mult": [1, 1]}, "augment": None},
            ["--cres (was not given, now 1,1)", "--augment (was 0.12, now 0.0)"],
        ),
    ],
)
def test_differences_by_the_names_of_options(change, words):
    """In both directions: what is not there any more differs too."""
    assert named_differences(IDENTITY, {**IDENTITY, **change}) == words
    assert len(named_differences({**IDENTITY, **change}, IDENTITY)) == len(words)


OTHER_VALUES = {  # of every option, another than in the test below
    **{"outdir": "b", "data": "other.zip", "precond": "vp", "cond": True, "arch": "ncsnpp", "cbase": 8, "cres": [1, 1]},
    **{"blocks": 2, "sigma_data": 0.4, "p_mean": -1.0, "p_std": 1.1, "num_steps": 8, "ratio": 4},
    **{"teacher_solver": "euler", "weighting": "edm", "intervals": "uniform", "self_teacher": True, "duration": 0.002},
    **{"batch": 16, "batch_gpu": 4, "lr": 1e-4, "lr_decay": "cosine", "warmup": 0.1, "ema": 0.1, "ema_std": 0.1},
    **{"clip": 1.0, "dropout": 0.5, "augment": 0.5, "xflip": True, "precision": "bf16", "teacher_precision": "bf16"},
    **{"recompute": True, "fp16": True, "compile": True, "ls": 2.0, "bench": False, "cache": False, "workers": 2},
    **{"deterministic": True, "desc": "x", "nosubdir": True, "tick": 1, "snap": 1, "dump": 1, "targets": 1},
    **{"save_every": 1, "seed": 1, "transfer": "other.pkl", "resume": "latest", "tensorboard": True},
    **{"wandb": "x", "trust_network_code": True, "grid": ",".join([str(80 * 0.6**i) for i in range(16)] + ["0"])},
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Options of a training from scratch and of a distillation, each with its run's identity."""
    folder = tmp_path_factory.mktemp("bases")
    for seed, name in enumerate(("data", "other")):
        make_dataset(folder / f"{name}.zip", count=20, seed=seed)
        net = small_network(model_channels=4, channel_mult=[1], augment_dim=9)
        load_recipe(net, seed)
        save_network(folder / f"{name}.pkl", net)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setitem(sys.modules, "wandb", SimpleNamespace(__spec__=True))
        plain = Options("a", "data.zip", cond=False, seed=0, batch=8, duration=0.001, lr_decay="linear")
        distils = replace(plain, precond="edm_distillation", num_steps=16, transfer="data.pkl")
        plain = replace(plain, cbase=4, cres=[1])
        yield [(each, prepare(each).config.identity()) for each in (plain, distils)]


@pytest.mark.parametrize("each", entries(Options), ids=lambda each: each.name)
def test_every_option_either_alters_the_result_or_does_not(each, bases):
    """The table says which; resuming (the identity) and a ladder's recipe follow it."""
    options, identity = bases[each.only == DISTILLATION or each.name in ("transfer", "trust_network_code")]
    other = prepare(replace(options, **{each.name: OTHER_VALUES[each.name]})).config.identity()
    assert bool(differences(identity, other)) == bool(each.parts) == (each.name in ALTERING)
    if each.name in ALTERING and each.name not in ("arch", "precond"):
        assert (each.flag if each.name != "fp16" else "--precision") in " ".join(named_differences(identity, other))


EARLIER = {  # of a state of the version before the table of options
    "data": ["d", False, False, 8, 20],
    "network": {"class_name": "training.networks.EDMPrecond", "model_channels": 4, "dropout": 0.0, "use_fp16": False},
    "loss": {
        **{"class_name": "training.loss.EDMDistillationLoss", "num_steps": 8, "ratio": 2, "teacher_solver": "heun"},
        **{"weighting": "geomean", "intervals": "loss"},
    },
    **{"augment": None, "seed": 1, "batch": 512, "lr": [0.0005, [0.9, 0.999], 1e-08], "warmup": 0.0},
    **{"lr-decay": "linear", "duration": 20000000, "ls": 1.0, "ema": [500, 0.05], "clip": None, "precision": "fp32"},
    **{"teacher-precision": None, "transfer": "t"},
    "distillation": {"num_steps": 8, "ratio": 2, "teacher_solver": "heun", "self_teacher": False, "teacher_levels": []},
}


def test_a_state_from_before_the_table_has_the_same_identity():
    parts = {name: EARLIER[name] for name in ("network", "loss")}
    options = Options("", "", precond=DISTILLATION, transfer="x", seed=1)
    now = TrainConfig(
        **vars(options.filled()),
        **{f"{name}_kwargs": value for name, value in parts.items()},
        dataset_kwargs={"use_labels": False, "xflip": False, "resolution": 8, "max_size": 20},
        distillation={**EARLIER["distillation"], "lineage": [1]},
        run_dir="",
        data_fingerprint="d",
        transfer_sha256="t",
    )
    assert json.loads(json.dumps(now.identity())) == EARLIER
    assert named_differences(EARLIER, replace(now, clip=1.0).identity()) == ["--clip (was not given, now 1.0)"]


ENTRY = '    glow: float = hyper(("0.25", "0.5"), "Glow", PROBABILITY)\n'
SEES_IT = """
import click
from engine.options import named_differences
from engine.setup import prepare
from ladders.ladder import Ladder
from reporting.run_files import settings_of
from training.recipe import LadderOptions, Options
import distill, train

for script, words in ((train, "Glow: default 0.25, distillation 0.5"), (distill, "Glow [default: 0.5; 0<=x<=1]")):
    assert words in " ".join(script.command.get_help(click.Context(script.command, show_default=True)).split()), script
options = Options("out", "data.zip", precond="edm_distillation", num_steps=4, transfer="data.pkl", cond=False, seed=0)
usual, other = (prepare(Options(**{**vars(options), "glow": value})).config for value in (None, 1.0))
assert usual.glow == usual.identity()["glow"] == usual.to_options()["glow"] == 0.5
assert ("glow", "1") in settings_of(other.to_options()) and other.command_line["glow"] == 1.0
before = {name: value for name, value in usual.identity().items() if name != "glow"}  # of a state without the option
assert named_differences(before, usual.identity()) == []
for earlier in (before, usual.identity()):
    assert named_differences(earlier, other.identity()) == ["--glow (was 0.5, now 1.0)"]
ladder = Ladder(Options(**{**vars(options), "glow": 1.0}), LadderOptions(ratio=[2], duration=[1], lr=[1], num_steps=4))
ladder.check()
assert [recipe["--glow"] for recipe in ladder.recipes] == [1.0, 1.0]
"""


def test_an_option_is_one_entry(tmp_path):
    """Added to the table alone, it is on both command lines, in files, identity, recipe and report."""
    for path in ROOT.glob("*/__init__.py"):
        shutil.copytree(path.parent, tmp_path / path.parent.name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in ROOT.glob("[a-z]*.py"):
        shutil.copy(path, tmp_path)
    table = tmp_path / "training/recipe.py"
    text = table.read_text()
    table.write_text(text.replace("    xflip: bool", f"{ENTRY}    xflip: bool", 1))
    assert table.read_text() != text
    make_dataset(tmp_path / "data.zip", count=20)
    net = small_network(model_channels=4, channel_mult=[1])
    load_recipe(net, 0)
    save_network(tmp_path / "data.pkl", net)
    done = subprocess.run([sys.executable, "-c", SEES_IT], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_run_numbers(tmp_path):
    assert next_run_number(str(tmp_path / "new")) == 0
    for name in ("00003-x", "00012", "notes"):
        (tmp_path / name).mkdir()
    (tmp_path / "00099-a-file").write_text("")
    assert next_run_number(str(tmp_path)) == 13


def test_dry_run_prints_the_cost(data, finished, tmp_path, capsys):
    folder, args = finished
    shutil.copytree(folder, tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    for outdir, duration, words in (
        ("new", "0.001", ["Would start from the beginning", "Parameters:", "Work:", "Disk:"]),
        ("out", "0.001", ["Would have nothing to train"]),
        ("out", "0.002", ["Would resume from"]),
    ):
        assert run(*args, f"--outdir={tmp_path / outdir}", f"--duration={duration}", "-n") == 0
        out = capsys.readouterr().out
        assert all(word in out for word in words)
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}, "nothing is written"
    for more in ([], ["--cbase=4"]):
        file = folder / "network-snapshot-000001.pkl"
        assert run(f"--data={data}", *SMALL, f"--outdir={tmp_path / 'new'}", f"--transfer={file}", *more, "-n") == 0
        words = capsys.readouterr().out
        fit, count = map(int, re.search(r"(\d+) of its tensors fit this network, which has (\d+)", words).groups())
        assert (0 < fit < count) == bool(more)


@pytest.mark.parametrize(
    "extra",
    [
        ["--snap=3", "--dump=2", "--save-every=0"],
        ["--snap=1", "--dump=1", "--tick=0.05", "--save-every=0"],
        ["--batch=1000"],
        ["--precond=edm_distillation", "--num_steps=4", "--targets=2", "--snap=4", "--save-every=0"],
    ],
)
def test_the_disk_that_a_run_was_said_to_need(data, teacher, tmp_path, extra, monkeypatch):
    """Files are counted exactly, and their sizes estimated from above."""
    monkeypatch.setattr(course, "save_samples", lambda *_: None)  # takes long
    distils = "--num_steps=4" in extra
    own = [f"--transfer={teacher}", "--batch=50", "--tick=0.1", "--seed=0"] if distils else [*SMALL, "--batch=50"]
    assert run(f"--data={data}", *own, "--nosubdir", f"--outdir={tmp_path}", "--duration=0.002", *extra) == 0
    (said,) = [line for line in (tmp_path / "log.txt").read_text().splitlines() if line.startswith("Disk:")]
    pattern = r"at most (\S+) MiB \((\d+) snapshots? of .*; (\d+) dumps?, 2 rolling"
    most, snapshots, dumps = re.search(pattern, said).groups()
    found = [path for path in tmp_path.iterdir() if path.name.startswith(("network-snapshot", "training-state"))]
    states = [path for path in found if path.suffix == ".pt"]
    assert len([path for path in found if path.suffix == ".pkl"]) == int(snapshots)
    assert len([path for path in states if "rolling" not in path.name]) == int(dumps)
    missing = 3 - len([path for path in states if "rolling" in path.name])  # one being written, and what was not due
    need = sum(path.stat().st_size for path in found) + missing * states[0].stat().st_size
    assert need <= float(most) * 2**20 <= 1.35 * need


def test_a_disk_too_small_is_warned_of(data, tmp_path, capsys, monkeypatch):
    """What a run has written already is no need any more."""
    args = [f"--data={data}", *SMALL, "--nosubdir", f"--outdir={tmp_path / 'run'}", "--duration=0.001"]
    monkeypatch.setattr(costs.shutil, "disk_usage", lambda place: SimpleNamespace(free=12 << 20))
    for warned in (True, False):
        assert run(*args, "-n") == 0
        assert ("The disk may fill before the run ends" in capsys.readouterr().out) == warned
        assert run(*args) == 0
        capsys.readouterr()


def test_memory_that_is_not_there(data, capsys, monkeypatch):
    monkeypatch.setattr(costs, "free_memory", lambda: 1 << 20)
    assert run(f"--data={data}", *SMALL, "--outdir=out", "-n") == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Memory per process")]
    assert line.endswith("more than the 1.0 MiB that are free, it will not run here")


@pytest.mark.parametrize(
    ("precond", "kwargs"),
    [
        ("VPPrecond", {}),
        ("VEPrecond", {"embedding_type": "fourier", "encoder_type": "residual", "resample_filter": [1, 3, 3, 1]}),
        ("iDDPMPrecond", {}),
        ("EDMPrecond", {"augment_dim": 9, "dropout": 0.13}),
        ("EDMPrecond", {"model_type": "DhariwalUNet", "model_channels": 32, "augment_dim": 9}),
    ],
)
def test_every_kind_of_teacher_can_be_distilled(precond, kwargs, data, tmp_path):
    """The student of a vanishing learning rate still is its teacher; its grid is within the teacher's range."""
    net = small_network(cls=precond, **kwargs)
    load_recipe(net, 1)
    save_network(tmp_path / "teacher.pkl", net)
    args = [f"--data={data}", "--precond=edm_distillation", "--num_steps=6", "--ratio=3", "--batch=100", "--lr=1e-30"]
    args += [f"--transfer={tmp_path / 'teacher.pkl'}", f"--outdir={tmp_path / 'run'}", "--nosubdir", "--duration=0.001"]
    assert run(*args, "--seed=0") == 0
    student = load_network(tmp_path / "run/network-snapshot-000001.pkl")
    levels = student.sampling.grid.levels
    assert type(student.net).__name__ == precond and len(levels) == 3
    assert levels[0] <= float(net.sigma_max) and levels[-2] >= float(net.sigma_min)
    for (name, a), (_, b) in zip(student.net.state_dict().items(), net.state_dict().items(), strict=True):
        assert torch.equal(a, b), name
    assert np.isfinite(losses(tmp_path / "run")[-1]["mean"])
