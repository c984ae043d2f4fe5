"""Nothing lost: every call that writes a state or a snapshot fails in turn, bits rot, processes die at any moment."""

import io
import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

import convert
import train
from dnnlib import atomic
from dnnlib.cli import UserError
from faults import ERRORS, Faults, die_at, enumerate_calls, failing
from formats import state
from formats.network_files import load_network, save_network
from helpers import make_dataset, small_network
from torch_utils.misc import load_tensors, save_tensors

# -- every write, flush and rename --------------------------------------------------------------------------------------


def example_state(nimg, seed=0):
    """A state of a network of two tensors, complete enough to be read."""
    generator = torch.Generator().manual_seed(seed + nimg)
    tensors = {"a": torch.randn(40, 50, generator=generator), "b": torch.randn(7, generator=generator)}
    return {
        "position": {**dict.fromkeys(state.POSITION, 0), "nimg": nimg, "elapsed_sec": 1.5},
        "net": tensors,
        "ema": {name: tensor + 1 for name, tensor in tensors.items()},
        "optimizer": {"exp_avg": tensors, "exp_avg_sq": tensors, "step": {"a": torch.ones(()), "b": torch.ones(())}},
        "scaler": {"scale": 1.0, "growth": 0},
        "stats": {"Loss/loss": [1.0, 2.0, 3.0]},
        "losses": [0.5],
        "options": {"seed": 0},
        "world_size": 1,
        "device": "cpu",
    }


def same(a, b):
    """Whether two nests of dicts, lists, numbers and tensors are equal to the last bit."""
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    return a == b


class StateDump:
    """A rolling state is written where two older ones are; the oldest goes."""

    def __init__(self, folder):
        self.folder = folder

    def prepare(self):
        for path in self.folder.iterdir():
            path.unlink()
        for nimg in (100, 200):
            state.save_state(self.folder / state.rolling_name(nimg), example_state(nimg))

    def save(self):
        state.save_state(self.folder / state.rolling_name(300), example_state(300))
        state.remove_old(self.folder)

    def check(self):
        """The state before is whole; the newest that can be read is that one or the new one. Returns which."""
        before = state.load_state(self.folder / state.rolling_name(200))
        assert same(before, {"format": 1, **example_state(200)})
        said = []
        path, newest = state.load_newest(self.folder, said.append)
        nimg = newest["position"]["nimg"]
        assert nimg in (200, 300) and same(newest, {"format": 1, **example_state(nimg)})
        assert not said and path.name == state.rolling_name(nimg)
        return nimg == 300


class Snapshot:
    """A snapshot is written over another network's."""

    def __init__(self, folder):
        self.path = folder / "network-snapshot-000001.pkl"
        self.nets = small_network(), small_network()
        with torch.no_grad():
            for parameter in self.nets[1].parameters():
                parameter += 1

    def prepare(self):
        save_network(self.path, self.nets[0])

    def save(self):
        save_network(self.path, self.nets[1])

    def check(self):
        """The file is the old network or the new one. Returns which."""
        found = dict(load_network(self.path).net.state_dict())
        (which,) = [number for number, net in enumerate(self.nets) if same(found, dict(net.state_dict()))]
        return bool(which)


@pytest.fixture(params=[StateDump, Snapshot])
def case(request, tmp_path):
    return request.param(tmp_path)


def unfinished(folder):
    return [path.name for path in folder.iterdir() if path.name.endswith(".tmp")]


def test_every_call_fails_in_turn(case, tmp_path):
    """A full disk and a failing one, at each of the calls: an OSError says so, and nothing is half written."""
    case.prepare()
    calls = enumerate_calls(case.save)
    assert case.check() and {"open", "write", "flush", "fsync", "replace"} <= set(calls) and calls.count("write") > 5
    assert ("unlink" in calls) == isinstance(case, StateDump)
    done = {}
    for number in ERRORS:
        for at, name in enumerate(calls):
            case.prepare()
            try:
                with Faults(at, failing(number)) as faults:
                    case.save()
                failed = False
            except OSError as exc:
                failed = True
                assert exc.errno == number and (name == "unlink" or exc.filename)
            assert faults.calls[at] == name
            done[at] = case.check()
            assert failed or done[at], "a call that may fail without harm"
            assert not unfinished(tmp_path)
    renamed = calls.index("replace")
    assert not any(done[at] for at in range(renamed + 1)) and all(done[at] for at in range(renamed + 1, len(calls)))


@pytest.mark.parametrize("after", [False, True])
def test_a_process_dies_at_every_call(case, tmp_path, after):
    """By SIGKILL, before and after each call. What it leaves unfinished goes with the next write."""
    case.prepare()
    calls = enumerate_calls(case.save)
    left = 0
    for at in range(len(calls)):
        case.prepare()
        die_at(at, case.save, after)
        assert case.check() == (at + after > calls.index("replace"))
        left += len(unfinished(tmp_path))
        atomic._cleaned.clear()  # as in the next process
        atomic.write_text(tmp_path / "log", "")
        assert not unfinished(tmp_path)
        (tmp_path / "log").unlink()
    assert left >= calls.index("replace") - 1, "there was something to remove"


def test_a_state_that_cannot_be_read_back_is_no_state(tmp_path, monkeypatch):
    """The system alters a byte on the way: the file never gets its name, and the older ones stay."""
    for nimg in (100, 200):
        state.save_state(tmp_path / state.rolling_name(nimg), example_state(nimg))

    def save_altered(value, file):
        torch.save(value, file)
        file.seek(5000)
        byte = file.read(1)
        file.seek(5000)
        file.write(bytes([byte[0] ^ 1]))
        file.seek(0, os.SEEK_END)

    monkeypatch.setattr(state, "save_tensors", save_altered)
    with pytest.raises(UserError, match=r"rolling-0000000300\.pt: what was written can't be read back.*checksum"):
        state.save_state(tmp_path / state.rolling_name(300), example_state(300))
    assert [path.name for path in state.list_states(tmp_path)] == [state.rolling_name(200), state.rolling_name(100)]
    assert len(list(tmp_path.iterdir())) == 2


def test_control_c_waits_for_a_file_being_saved():
    """An exception amid torch.save's C++ part would abort the process ('terminate called ...')."""

    class File(io.BytesIO):
        def write(self, data):
            if not done:
                done.append(os.kill(os.getpid(), signal.SIGINT))
            return super().write(data)

    done = []
    file = File()
    with pytest.raises(KeyboardInterrupt):
        save_tensors({"x": torch.arange(1000.0)}, file)
    assert done and torch.equal(load_tensors(io.BytesIO(file.getvalue()))["x"], torch.arange(1000.0))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


# -- bits that rot -------------------------------------------------------------------------------------------------------


def test_no_altered_bit_and_no_cut_goes_unnoticed(tmp_path):
    """A changed bit anywhere either doesn't matter, or the state is refused: never other numbers than were written.
    torch.load alone reads four of five such files as if nothing were wrong."""
    path, want = tmp_path / state.rolling_name(100), {"format": 1, **example_state(100)}
    state.save_state(path, example_state(100))
    data = path.read_bytes()
    random = np.random.default_rng(0)
    tail = np.arange(len(data) - 1200, len(data))  # the end of the archive's table of contents
    places = [*random.choice(len(data), 800, replace=False), *random.choice(tail, 300, replace=False)]
    refused = 0
    for place in places:
        altered = bytearray(data)
        altered[place] ^= 1 << random.integers(8)
        path.write_bytes(altered)
        try:
            assert same(state.load_state(path), want), place
        except UserError as exc:
            assert path.name in str(exc)
            refused += 1
    assert 500 < refused < len(places), "most of a file is numbers, some of it is padding"
    for length in random.integers(0, len(data), 50):
        path.write_bytes(data[:length])
        with pytest.raises(UserError, match=path.name):
            state.load_state(path)


def test_the_newest_states_that_can_be_read(tmp_path):
    """Dumps and rolling states together, damaged ones among them; which is newer is inside, where names don't say it."""

    def newest():
        said = []
        path, saved = state.load_newest(tmp_path, said.append)
        return path.name, saved["position"]["nimg"], len(said)

    def damage(name):
        data = bytearray((tmp_path / name).read_bytes())
        data[len(data) // 3] ^= 4
        (tmp_path / name).write_bytes(data)

    dump, rolling = "training-state-000002.pt", state.rolling_name
    for name, nimg in ((rolling(1900), 1900), (rolling(2048), 2048), (dump, 2560)):
        state.save_state(tmp_path / name, example_state(nimg))
    assert newest() == (dump, 2560, 0)
    state.save_state(tmp_path / rolling(2816), example_state(2816))
    assert newest() == (rolling(2816), 2816, 0)
    damage(rolling(2816))
    assert newest() == (dump, 2560, 1)
    damage(dump)
    assert newest() == (rolling(2048), 2048, 2)
    for name in (rolling(2048), rolling(1900)):
        damage(name)
    with pytest.raises(UserError, match="none of its 4 training states can be read"):
        state.load_newest(tmp_path, str)


def test_how_many_states_are_kept(tmp_path):
    for kimg in range(1, 14):
        (tmp_path / f"training-state-{kimg:06d}.pt").touch()
        (tmp_path / state.rolling_name(kimg * 1000 + 500)).touch()
        state.remove_old(tmp_path)
    names = [path.name for path in state.list_states(tmp_path)]
    assert [name for name in names if "rolling" in name] == [state.rolling_name(n) for n in (13500, 12500)]
    assert [name for name in names if "rolling" not in name] == [f"training-state-{n:06d}.pt" for n in range(13, 3, -1)]


@pytest.mark.parametrize("way", ["--nosubdir", "--resume=latest"])
def test_a_run_goes_on_from_the_state_before_a_rotten_one(tmp_path, capsys, way):
    """One bit of the newest state's numbers has changed: one line says so, and the run ends as it would have."""
    data = make_dataset(tmp_path / "blobs.zip", count=40)
    args = [f"--data={data}", "--cbase=8", "--cres=1", "--blocks=1", "--batch=50", "--seed=0", "--save-every=0"]
    args += ["--duration=0.001", "--tick=0.1", "--warmup=0"]
    place = [f"--outdir={tmp_path / 'runs'}", *(["--nosubdir"] if way == "--nosubdir" else [])]
    assert train.main([*args, *place]) == 0
    dump = next(tmp_path.glob("runs/**/training-state-000001.pt"))
    want = state.load_state(dump)
    dump.unlink()  # as if the run had been killed before its end
    newest = state.list_states(dump.parent)[0]
    altered = bytearray(newest.read_bytes())
    with zipfile.ZipFile(newest) as archive:  # between the numbers are paddings, which nothing reads
        largest = max(archive.infolist(), key=lambda entry: entry.file_size)
        with archive.open(largest) as numbers:
            start = altered.index(numbers.read())
    altered[start + largest.file_size // 2] ^= 1
    newest.write_bytes(altered)
    capsys.readouterr()
    assert train.main([*args, *place, *([way] if way != "--nosubdir" else [])]) == 0
    said = capsys.readouterr().out.splitlines()
    (line,) = [line for line in said if line.startswith("Passing over")]
    assert newest.name in line and "checksum" in line
    assert any(line.startswith("Resuming from") and "at 0.9 kimg" in line for line in said)
    again = state.load_state(dump)
    assert same(again["net"], want["net"]) and same(again["ema"], want["ema"])


# -- what killed processes leave behind ----------------------------------------------------------------------------------


def test_files_left_unfinished_are_removed_unless_somebody_writes_them(tmp_path):
    """Those of this machine that nobody holds, and day-old ones of others; whatever else has such a name stays."""
    ours = f".image.png.k2j3h4g5{atomic.SUFFIX}"
    theirs, old = ".x.png.abcdefgh.edm-00000000.tmp", ".y.png.abcdefgh.edm-00000000.tmp"
    for name in (ours, theirs, old, ".image.png.k2j3h4g5.tmp", f"image{atomic.SUFFIX}"):
        (tmp_path / name).touch()
    long_ago = time.time() - 2 * atomic.DAY
    os.utime(tmp_path / old, (long_ago, long_ago))
    with atomic.atomic_write(tmp_path / "long.bin") as file:
        file.write(b"begun")
        (held,) = tmp_path.glob(f".long.bin.*{atomic.SUFFIX}")
        atomic.remove_unfinished(tmp_path)
        assert held.exists() and not (tmp_path / ours).exists()
    kept = {".image.png.k2j3h4g5.tmp", f"image{atomic.SUFFIX}", theirs, "long.bin"}
    assert {path.name for path in tmp_path.iterdir()} == kept


CONVERT = """
import os, signal, sys
import convert, torch_utils.misc
from formats import network_files

def write(stream, *rest):
    stream.write(b"half of it")
    stream.flush()
    os.kill(os.getpid(), signal.SIGTERM)

network_files._write = write
convert.main(sys.argv[1:])
"""


def test_sigterm_outside_training_spoils_nothing(tmp_path):
    """convert.py stands for all that write a file in one piece: the old target stays, the next start cleans up."""
    old, new, target = tmp_path / "old.pkl", tmp_path / "new.pkl", tmp_path / "target.safetensors"
    save_network(old, small_network())
    save_network(new, small_network(model_channels=8))
    assert convert.main([str(old), str(target)]) == 0
    before = target.read_bytes()
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    words = [sys.executable, "-c", CONVERT, str(new), str(target), "--overwrite"]
    assert subprocess.run(words, env=environment).returncode == -signal.SIGTERM
    assert target.read_bytes() == before and len(unfinished(tmp_path)) == 1
    atomic._cleaned.clear()
    assert convert.main([str(new), str(target), "--overwrite"]) == 0
    assert target.read_bytes() != before and not unfinished(tmp_path)


def test_a_file_that_is_taken_before_it_is_locked_is_made_again(tmp_path, monkeypatch):
    """Another process cleans up just between the making of a file and its locking."""
    original, made = atomic._try_lock, []

    def try_lock(fd):
        made.append(fd)
        if len(made) == 1:
            next(tmp_path.iterdir()).unlink()
        return original(fd)

    monkeypatch.setattr(atomic, "_try_lock", try_lock)
    atomic.write_text(tmp_path / "a.txt", "text")
    assert (tmp_path / "a.txt").read_text() == "text" and len(made) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_without_locks_nothing_is_removed(tmp_path, monkeypatch):
    (tmp_path / f".a.k2j3h4g5{atomic.SUFFIX}").touch()
    monkeypatch.setattr(atomic, "_try_lock", lambda fd: None)
    atomic.write_text(tmp_path / "a.txt", "text")
    assert len(list(tmp_path.iterdir())) == 2
