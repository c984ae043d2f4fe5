"""SIGKILL at random moments, again and again: nothing is lost, no file is spoilt, and the end is the same.

A few times here; fifty times, or as often as EDM_TEST_KILLS says, among the slow tests. The ladder's is in test_distill.
"""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from formats import state
from formats.network_files import load_network, save_network
from helpers import load_recipe, make_dataset, small_network
from test_dnnlib import BODY, Server
from test_training import SMALL, assert_same_state, newest_nimg, timeless

ROOT = Path(__file__).parent.parent
KILLS = int(os.environ.get("EDM_TEST_KILLS", "50"))
FEW_OR_MANY = pytest.mark.parametrize(
    "kills", [2, pytest.param(KILLS, marks=[pytest.mark.slow, pytest.mark.timeout(60 * KILLS)])]
)
START = 1.0  # second, in which no program has loaded torch and done its work


def start(*words):
    command = [sys.executable, *map(str, words)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )


def kill_again_and_again(words, kills, progress, goal, check):
    """Starts a command and kills it, `kills` times: at a random progress towards `goal` and a random moment later,
    every fifth time while it loads. `check` looks at what it left."""
    random = np.random.default_rng(kills)
    targets = sorted(random.uniform(0, 0.9 * goal, kills))
    for number, target in enumerate(targets):
        with start(*words) as job:
            if number % 5 == 4:
                time.sleep(random.uniform(0, START))
            else:
                end = time.monotonic() + 120
                while progress() < target:
                    assert job.poll() is None and time.monotonic() < end, job.stderr.read()
                    time.sleep(0.001)
                time.sleep(random.uniform(0, 0.05))
            assert job.poll() is None, "it was to be killed, not to end"
            job.kill()
        check()


def finish(*words):
    job = start(*words)
    _, error = job.communicate(timeout=120)
    assert job.returncode == 0, error


def files(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


@FEW_OR_MANY
def test_training(kills, tmp_path):
    """A state is written after every step, so that half of the kills meet one half written."""
    data = make_dataset(tmp_path / "blobs.zip", count=40)
    batch, snap = (50, 1000) if kills < 10 else (12, 6)
    words = [ROOT / "train.py", f"--data={data}", *SMALL, f"--batch={batch}", f"--snap={snap}", "--nosubdir"]
    words += ["--duration=0.002", "--save-every=0", "--device=cpu", "--dropout=0.1"]
    broken = tmp_path / "broken"

    def check():
        found = state.list_states(broken)
        for path in found:
            state.load_state(path)
        assert len(found) <= 3 and len(list(broken.glob(".*.tmp"))) <= 1
        for path in broken.glob("network-snapshot-*.pkl"):
            load_network(path)

    finish(*words, f"--outdir={tmp_path / 'whole'}")
    kill_again_and_again([*words, f"--outdir={broken}"], kills, lambda: newest_nimg(broken), 2000, check)
    finish(*words, f"--outdir={broken}")
    assert_same_state(*(tmp_path / name / "training-state-000002.pt" for name in ("whole", "broken")))
    assert timeless(tmp_path / "whole") == timeless(broken)
    assert files(tmp_path / "whole") == files(broken)
    for name in files(broken):
        if name.endswith((".pkl", ".png")):
            assert (broken / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def generating(tmp_path, kills):
    """A command, but for its --outdir, and how many images it makes."""
    net = small_network()
    load_recipe(net, 3)
    save_network(tmp_path / "net.pkl", net)
    count = 40 if kills < 10 else 300
    words = [ROOT / "generate.py", f"--network={tmp_path / 'net.pkl'}", f"--seeds=0-{count - 1}", "--batch=5"]
    return [*words, "--skip-existing", "--device=cpu"], count


@FEW_OR_MANY
def test_generating(kills, tmp_path):
    words, count = generating(tmp_path, kills)
    words.append("--subdirs")
    whole, broken = tmp_path / "whole", tmp_path / "broken"

    def check():
        for path in broken.rglob("*.png"):
            with Image.open(path) as image:
                image.load()

    finish(*words, f"--outdir={whole}")
    kill_again_and_again(
        [*words, f"--outdir={broken}"], kills, lambda: sum(1 for _ in broken.rglob("*.png")), count, check
    )
    finish(*words, f"--outdir={broken}")
    assert files(whole) == files(broken) and len(files(whole)) == count + 1
    assert all((whole / name).read_bytes() == (broken / name).read_bytes() for name in files(whole))


@FEW_OR_MANY
def test_generating_a_zip(kills, tmp_path):
    """It is made in one go or anew: nothing has its name before, and what a killed process leaves goes."""
    words, count = generating(tmp_path, kills)

    def images():
        return len(list(tmp_path.glob(".broken.zip.*/*.png")))

    def check():
        assert {path.name for path in tmp_path.glob("[!.]*")} == {"net.pkl", "whole.zip"}
        for path in tmp_path.glob(".broken.zip.*/*.png"):  # or they would pass for the next run's
            path.rename(path.with_suffix(".of-a-killed-run"))

    finish(*words, f"--outdir={tmp_path / 'whole.zip'}")
    kill_again_and_again([*words, f"--outdir={tmp_path / 'broken.zip'}"], kills, images, count, check)
    finish(*words, f"--outdir={tmp_path / 'broken.zip'}")
    assert (tmp_path / "whole.zip").read_bytes() == (tmp_path / "broken.zip").read_bytes()
    assert files(tmp_path) == ["broken.zip", "net.pkl", "whole.zip"]


@FEW_OR_MANY
def test_downloading(kills, tmp_path, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setenv("DNNLIB_CACHE_DIR", str(tmp_path))
    folder = tmp_path / "downloads"

    def slowly(handler, count):
        handler.reply(200, BODY, send=0)
        for place in range(0, len(BODY), 1 << 14):
            handler.wfile.write(BODY[place : place + (1 << 14)])
            time.sleep(0.003)

    def come():
        return max((path.stat().st_size for path in folder.glob(".*.tmp")), default=0)

    def check():
        assert not [name for name in files(tmp_path) if not name.endswith(".tmp")], "nothing that a reader would trust"
        assert len(files(tmp_path)) <= 1

    with Server() as server:
        server.answer = slowly
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        code = "import sys; from dnnlib.util import open_url; open_url(sys.argv[1], verbose=False).close()"
        words = ["-c", code, f"{server.url}/net.pkl"]
        monkeypatch.setattr(sys.modules[__name__], "START", 0.3)
        kill_again_and_again(words, kills, come, len(BODY), check)
        finish(*words)
        server.shutdown()
        thread.join()
    (name,) = files(folder)
    assert (folder / name).read_bytes() == BODY
