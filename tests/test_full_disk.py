"""A full disk ends a run in one line; what existed before is intact, and the same command goes on."""

import errno
import os

import pytest

import train
from helpers import make_dataset
from training.network_files import load_network
from training.state import list_states, load_state

ARGS = ["--cbase=16", "--cres=1,2", "--blocks=1", "--batch=50", "--tick=0.2", "--seed=5", "--nosubdir", "--snap=1"]


def run(data, outdir, duration):
    return train.main([f"--data={data}", f"--outdir={outdir}", f"--duration={duration}", *ARGS])


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_full_disk(tmp_path, capsys, monkeypatch, call):
    data, out = make_dataset(tmp_path / "blobs.zip"), tmp_path / "run"
    assert run(data, out, 0.001) == 0
    before = {path.name for path in out.iterdir()}
    original, left = getattr(os, call), 3

    def full(*args, **kwargs):
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(os, call, full)
        capsys.readouterr()
        assert run(data, out, 0.002) == 1
    error = capsys.readouterr().err.strip()
    assert "disk is full" in error and len(error.splitlines()) == 1
    assert not list(out.glob(".*")), "no half file is left"
    assert before <= {path.name for path in out.iterdir()}
    for path in out.glob("*.pkl"):
        load_network(path)
    for path in list_states(out):
        load_state(path)
    assert run(data, out, 0.002) == 0
    load_network(out / "network-snapshot-000002.pkl")
