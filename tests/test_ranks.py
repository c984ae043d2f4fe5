"""Several processes: they compute what one does, one that dies or stands still ends the job, those that disagree never
begin, signals and restarts lose nothing."""

import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from engine.loop import check_same_weights
from helpers import make_dataset
from test_training import SMALL, assert_same_state, finish, launch, losses, newest_nimg, run, stats, timeless, wait_for
from torch_utils import distributed as dist

ROOT = Path(__file__).parent.parent
ARGS = [*SMALL, "--nosubdir", "--duration=0.001", "--tick=0.012", "--dropout=0", "--dump=1000"]

# A job of two processes, of which rank 1 (in one case rank 0) gets into trouble as its argument says.
TROUBLE = """
import os, signal, sys, time
from dnnlib import cli

@cli.command(name="job")
@cli.click.argument("trouble")
def command(trouble):
    import torch
    from torch_utils import distributed as dist

    dist.init("cpu", cli.options_in_use())
    second = dist.get_rank() == (0 if trouble == "first-killed" else 1)
    if trouble == "late":
        time.sleep(9 * second)
    elif trouble == "stuck" and not second:
        dist.all_reduce_sum([torch.zeros(1)])
    elif trouble == "stuck":
        time.sleep(30)
    elif second and trouble == "raises":
        1 / 0
    elif second:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()

sys.argv[0] = "job.py"
sys.exit(cli.run(command))
"""
GONE = "another process has ended, or can't be reached"
TROUBLES = {  # -> status and words of the rank that is left
    "killed": (1, [GONE]),
    "raises": (1, [GONE]),
    "first-killed": (1, [GONE]),
    "stuck": (1, [GONE]),
    "late": (0, []),
}


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """Runs of 84 steps that nothing happens to, by their number of processes."""
    folder = tmp_path_factory.mktemp("whole")
    for n in (1, 2, 3):
        args = [f"--data={data}", *ARGS, f"--outdir={folder / str(n)}"]
        if n > 1:
            finish(n, *args, log=folder / f"{n}.txt")
        else:
            assert run(*args) == 0
    return {n: folder / str(n) for n in (1, 2, 3)}


def assert_near(a, b):
    """Adam makes full-size steps of rounding noise: two runs drift apart at a pace set by the learning rate. At 5e-4 the
    losses of 84 steps differ by less than 1e-6 between 1 and 2 processes, at 2e-3 by 3e-4; a wrong draw differs by 1e-1."""
    for ours, theirs in zip(losses(a), losses(b), strict=True):
        assert ours["num"] == theirs["num"] and ours["mean"] == pytest.approx(theirs["mean"], rel=1e-5)


def start_plainly(commands, **variables):
    """One process for each command, as srun starts them: nobody ends those that are left."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1]), "OMP_NUM_THREADS": "1"}
    place |= {"WORLD_SIZE": str(len(commands)), **variables}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": ROOT}
    return [
        subprocess.Popen([sys.executable, *map(str, words)], env={**os.environ, **place, "RANK": str(rank)}, **pipes)
        for rank, words in enumerate(commands)
    ]


def end(process, seconds=90):
    """Status and lines of standard error of a process that is to end by itself."""
    try:
        said = process.communicate(timeout=seconds)[1]
    finally:
        process.kill()
    return process.returncode, said.splitlines()


def test_whoever_dies_ends_the_job(tmp_path):
    """Without a launcher. All cases at once, for each consists of waiting. Only `stuck` has to wait for a collective's
    timeout; `late` shows that waiting at a barrier has none."""
    limits = {"EDM_COLLECTIVE_TIMEOUT": "8"}
    jobs = {name: start_plainly([["-c", TROUBLE, name]] * 2, **limits) for name in TROUBLES}
    for name, (status, words) in TROUBLES.items():
        left, other = jobs[name][:: -1 if name == "first-killed" else 1]
        found, lines = end(left)
        assert found == status, (name, found, lines)
        assert len(lines) == bool(words), (name, lines)
        assert all(word in line for word in words for line in lines), (name, lines)
        if status:
            assert lines[0].startswith(f"job.py [rank {name == 'first-killed':d}]: error: "), lines
        found, lines = end(other)
        if name == "raises":
            assert lines[0].startswith("job.py [rank 1]: error: unexpected ZeroDivisionError"), lines
        assert len(lines) <= 1 and (name != "late" or found == 0), (name, found, lines)


def test_processes_that_disagree_do_not_begin(data, tmp_path):
    other = make_dataset(tmp_path / "blobs.zip", count=40, seed=1)
    out = tmp_path / "run"
    usual = [ROOT / "train.py", f"--data={data}", *ARGS, f"--outdir={out}"]
    cases = {
        ("--lr=0.1", "--batch=14"): ["--batch is 12 on rank 0, 14 on rank 1", "--lr is 0.0005 on rank 0, 0.1"],
        (f"--data={other}",): ["'data' of the run", "rank 1"],
    }
    jobs = [start_plainly([usual, [*usual, *more]]) for more in cases]
    for (first, second), words in zip(jobs, cases.values(), strict=True):
        status, lines = end(first)
        assert status == 1 and len(lines) == 1 and "the processes do not agree" in lines[0], lines
        assert all(word in lines[0] for word in words), lines
        assert end(second) == (1, []), "rank 0 speaks for all"
    assert not out.exists()


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK=2 must be below WORLD_SIZE=2"),
        ({"RANK": "0", "WORLD_SIZE": "two"}, "WORLD_SIZE=two must be a whole number"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK=-1 must be a whole number"),
        ({"RANK": "0", "WORLD_SIZE": "2", "EDM_COLLECTIVE_TIMEOUT": "nan"}, "EDM_COLLECTIVE_TIMEOUT=nan"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "check MASTER_ADDR"),
    ],
)
def test_a_launch_that_makes_no_sense(variables, words, monkeypatch):
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(dist.UserError, match=words):
        dist.init("cpu")


def test_weights_that_are_swapped_are_noticed(monkeypatch):
    """Their sum is the same."""
    nets = [torch.nn.Linear(2, 2, bias=False) for _ in range(2)]
    with torch.no_grad():
        for net, row in zip(nets, ([1.0, 2.0], [2.0, 1.0]), strict=True):
            net.weight.copy_(torch.tensor([row, row]))
    seen = []
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "gather_objects", lambda value: seen.append(value) or [seen[0], value])
    check_same_weights(nets[0])
    check_same_weights(nets[0])
    with pytest.raises(dist.UserError, match=r"different weights \(rank 1 and rank 0"):
        check_same_weights(nets[1])


# -- results -------------------------------------------------------------------------------------------------------------


def test_two_and_three_processes_change_rounding_only(whole):
    assert_near(whole[1], whole[2])
    assert_near(whole[1], whole[3])


def test_two_processes_distil_a_published_shape(data, teacher, tmp_path):
    args = [f"--data={data}", "--precond=edm_distillation", "--batch=48", "--batch-gpu=12", "--duration=0.001"]
    args += ["--num_steps=4", f"--transfer={teacher}", "--cond=0", "--arch=ddpmpp", "--tick=0.048"]
    args += ["--seed=5", "--lr=1e-4"]
    assert run(*args, f"--outdir={tmp_path / 'one'}", "--nosubdir") == 0
    finish(2, *args, f"--outdir={tmp_path / 'two'}", log=tmp_path / "two.txt")
    (two,) = (tmp_path / "two").iterdir()
    assert two.name == "00000-blobs-uncond-ddpmpp-edm_distillation-gpus2-batch48-fp32"
    assert_near(tmp_path / "one", two)


@pytest.mark.slow
def test_two_processes_have_the_losses_of_one_over_250_steps(data, tmp_path):
    args = [f"--data={data}", *SMALL[:-2], "--lr=1e-4", "--warmup=0", "--nosubdir", "--duration=0.003", "--tick=0.012"]
    args += ["--dropout=0", "--snap=1000"]
    assert run(*args, f"--outdir={tmp_path / 'one'}") == 0
    finish(2, *args, f"--outdir={tmp_path / 'two'}", log=tmp_path / "two.txt")
    rows = list(zip(losses(tmp_path / "one"), losses(tmp_path / "two"), strict=True))
    assert len(rows) == 250 and all(a["num"] == b["num"] for a, b in rows)
    assert max(abs(a["mean"] / b["mean"] - 1) for a, b in rows) < 1e-6  # measured: 1.5e-7


# -- signals and restarts ------------------------------------------------------------------------------------------------


def workers(job):
    """The processes of train.py below torchrun."""
    return [p for p in psutil.Process(job.pid).children(recursive=True) if any("train.py" in w for w in p.cmdline())]


def test_three_processes_start_again_from_the_newest_state(data, whole, tmp_path):
    """torchrun --max-restarts: one process is killed half-way, which ends all three; the second start ends with the bits
    of a run that nothing happened to."""
    folder, log = tmp_path / "killed", tmp_path / "killed.txt"
    args = [f"--data={data}", *ARGS, f"--outdir={folder}", "--save-every=0"]
    with open(log, "w") as file:
        job = launch(3, *args, launcher=["--max-restarts=1"], stdout=file, stderr=file)
        wait_for(lambda: newest_nimg(folder) >= 400, job)
        workers(job)[1].kill()
        assert job.wait(timeout=200) == 0, log.read_text()[-3000:]
    assert "Resuming from" in (folder / "log.txt").read_text()
    assert_same_state(*(place / "training-state-000001.pt" for place in (whole[3], folder)))
    assert timeless(whole[3]) == timeless(folder)


def test_two_processes_stop_when_asked_and_resume_exactly(data, whole, tmp_path, capsys):
    """SIGTERM to the launcher, as a queue sends it; no rolling state had been due for minutes. One process resumes with
    the same images and noise, notes that it may round otherwise, and does no more than that."""
    args, folder = [f"--data={data}", *ARGS], tmp_path / "stopped"
    with open(tmp_path / "stopped.txt", "w") as log:
        job = launch(2, *args, f"--outdir={folder}", stdout=log, stderr=log)
        wait_for(lambda: (folder / "stats.jsonl").exists() and len(stats(folder)) > 20, job)
        job.terminate()
        assert job.wait(timeout=60) != 0
    assert "interrupted by SIGTERM" in (tmp_path / "stopped.txt").read_text()
    assert newest_nimg(folder) >= 20 * 12
    shutil.copytree(folder, tmp_path / "alone")
    finish(2, *args, f"--outdir={folder}", log=tmp_path / "resumed.txt")
    assert_same_state(*(place / "training-state-000001.pt" for place in (whole[2], folder)))
    assert timeless(whole[2]) == timeless(folder)
    assert run(*args, f"--outdir={tmp_path / 'alone'}") == 0
    out = capsys.readouterr().out
    assert "on 2 x cpu and resumes with 1 x cpu" in out and "may round differently\n" in out
    assert_near(whole[2], tmp_path / "alone")


@pytest.mark.slow
def test_four_processes_with_everything_resume_exactly(data, tmp_path):
    """Accumulation, several loader threads, dropout, augmentation; all processes are killed, twice."""
    args = [f"--data={data}", *SMALL, "--batch=24", "--batch-gpu=3", "--workers=3", "--dropout=0.2", "--augment=0.2"]
    args += ["--nosubdir", "--duration=0.003", "--tick=0.1", "--save-every=0", "--cond=1", "--clip=1"]
    finish(4, *args, f"--outdir={tmp_path / 'whole'}", log=tmp_path / "whole.txt")
    for target in (700, 1900):
        job = launch(4, *args, f"--outdir={tmp_path / 'broken'}", stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wait_for(lambda least=target: newest_nimg(tmp_path / "broken") >= least, job)
        for process in [*psutil.Process(job.pid).children(recursive=True), job]:  # workers have sessions of their own
            process.kill()
        job.wait()
    finish(4, *args, f"--outdir={tmp_path / 'broken'}", log=tmp_path / "resumed.txt")
    assert_same_state(*(tmp_path / name / "training-state-000003.pt" for name in ("whole", "broken")))
    assert timeless(tmp_path / "whole") == timeless(tmp_path / "broken")


def test_a_start_does_not_meet_at_the_addresses_of_the_one_before():
    """torchrun's store outlives the processes: of a second start, the first one to come must wait for the other."""
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "OMP_NUM_THREADS": "1", "WORLD_SIZE": "2"}
    place |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "EDM_COLLECTIVE_TIMEOUT": "20"}
    meet = "from torch_utils import distributed as dist; dist.init('cpu'); dist.barrier(); print('met')"
    for start in ("0", "1"):
        jobs = []
        for rank in ("0", "1"):
            env = {**os.environ, **place, "TORCHELASTIC_RESTART_COUNT": start, "RANK": rank}
            jobs.append(subprocess.Popen([sys.executable, "-c", meet], cwd=ROOT, env=env, stdout=subprocess.PIPE))
            time.sleep(3 * int(start))  # so that nobody's address is new yet
        for job in jobs:
            said = job.communicate(timeout=60)[0]
            assert said == b"met\n" and job.returncode == 0, (start, said)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "plain"])
def test_twenty_signals_at_random_moments_lose_nothing(data, tmp_path, launcher):
    """SIGTERM to torchrun, or to each of two processes without a launcher, at moments up to half a second apart: each
    time the state is written at the step that was reached, and after twenty of them the run ends bit-identical."""
    chance = random.Random(launcher)
    args = [f"--data={data}", *ARGS, "--duration=0.006"]
    finish(2, *args, f"--outdir={tmp_path / 'whole'}", log=tmp_path / "whole.txt")
    run = tmp_path / "broken"
    for count in range(20):
        before = newest_nimg(run)
        if launcher == "torchrun":
            job = launch(2, *args, f"--outdir={run}", stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            ranks = [job]
        else:
            ranks = start_plainly([[ROOT / "train.py", *args, f"--outdir={run}"]] * 2)
        lines = len(timeless(run)) if (run / "stats.jsonl").exists() else 0
        wait_for(lambda: (run / "stats.jsonl").exists() and len(timeless(run)) != lines, ranks[0])  # noqa: B023 (it trains)
        time.sleep(0.6 * chance.random())
        for process in chance.sample(ranks, len(ranks)):
            process.send_signal(signal.SIGTERM)
            time.sleep(0.5 * chance.random())
        assert all(process.wait(timeout=60) != 0 for process in ranks), count
        for process in ranks:
            if process.stdout:
                process.communicate()
        assert before < newest_nimg(run) < 6000, (count, before, newest_nimg(run))
    finish(2, *args, f"--outdir={run}", log=tmp_path / "resumed.txt")
    assert_same_state(*(tmp_path / name / "training-state-000006.pt" for name in ("whole", "broken")))
    assert timeless(tmp_path / "whole") == timeless(run)
