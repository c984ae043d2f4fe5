import os
import signal
import sys
import threading
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent.parent))
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the networks here are tiny: threads would wait for each other


if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as for a job in the background of a script
    signal.signal(signal.SIGINT, signal.default_int_handler)
for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
    signal.signal(number, signal.SIG_DFL)


@pytest.fixture(autouse=True)
def _private_cache(tmp_path_factory, monkeypatch):
    """No test reads or fills the user's own download cache."""
    monkeypatch.setenv("DNNLIB_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture
def server(monkeypatch, tmp_path):
    """A local HTTP server whose `answer` a test sets, and an empty download cache in tmp_path / "cache"."""
    from test_dnnlib import Server

    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setenv("DNNLIB_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr("dnnlib.util.PAUSE", 0.001)
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield running
        running.shutdown()
        thread.join()


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A zip of 40 images of 8x8 in 4 classes."""
    from helpers import make_dataset

    return make_dataset(tmp_path_factory.mktemp("data") / "blobs.zip", count=40)


@pytest.fixture(scope="session")
def teacher(tmp_path_factory):
    """A teacher of the published CIFAR networks' shape: augmentation labels, dropout, no gradients, EDM preconditioning."""
    from formats.network_files import save_network
    from helpers import load_recipe, small_network

    path = tmp_path_factory.mktemp("teacher") / "teacher.pkl"
    net = small_network(augment_dim=9, dropout=0.13, use_fp16=True)
    load_recipe(net, 3)
    save_network(path, net)
    return path
