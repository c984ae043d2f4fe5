"""docs/formats.md is exact: readers written from it, with none of this project's own, find what was written."""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import re
import struct
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import train
from formats.network_files import load_network, save_network
from formats.pickle_reader import GLOBALS
from helpers import load_recipe, make_dataset, small_network
from ladders.results import Rung
from metrics.classifier import train_detector
from metrics.detectors import load_detector
from training.grids import NoiseGrid, Sampling

PAGE = (Path(__file__).parent.parent / "docs/formats.md").read_text(encoding="utf-8")
GRID = NoiseGrid((80.0, 0.1 + 0.2, 1 / 3e5, 0.0))
SAMPLING = Sampling(GRID, "euler", 2, ({"network": "t.pkl", "sha256": "0" * 64, "steps": 6, "solver": "heun"},))
NUMPY = {"F32": np.float32, "F16": np.float16, "F64": np.float64, "I64": np.int64, "I32": np.int32}


@pytest.fixture(scope="module")
def net() -> Any:
    net = small_network(label_dim=3, augment_dim=9)
    load_recipe(net, 3)
    return net


def words() -> set[str]:
    """Everything that the page sets in type of its own."""
    return {word.strip('"') for text in re.findall(r"`([^`]+)`", PAGE) for word in re.split(r"[\s,:(){}\[\]]+", text)}


# ---------------------------------------------------------------------------------------------------------------------
# Readers, from the page alone


class PickleReader(pickle.Unpickler):
    """Names stand for functions of this class; no other name is taken."""

    def find_class(self, module: str, name: str) -> Any:
        known = {
            ("torch_utils.persistence", "_reconstruct_persistent_obj"): lambda meta: meta,
            ("torch.nn.modules.container", "ModuleDict"): ModuleDict,
            ("torch._utils", "_rebuild_tensor_v2"): rebuild,
            ("torch._utils", "_rebuild_parameter"): lambda tensor, grad, hooks: tensor,
            ("torch.storage", "_load_from_bytes"): storage,
            ("collections", "OrderedDict"): dict,
        }
        return known[module, name]


class ModuleDict:
    """Has the attributes that BUILD sets."""


def rebuild(values: np.ndarray, offset: int, shape: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> np.ndarray:
    strides = [step * values.itemsize for step in stride]
    return np.lib.stride_tricks.as_strided(values[offset:], shape, strides)


def storage(data: bytes) -> np.ndarray:
    stream = io.BytesIO(data)

    class Inner(pickle.Unpickler):
        def persistent_load(self, pid: Any) -> Any:
            return pid

        def find_class(self, module: str, name: str) -> Any:
            return f"{module}.{name}"

    assert Inner(stream).load() == 0x1950A86A20F9469CFC6C and Inner(stream).load() == 1001
    assert Inner(stream).load()["little_endian"] is True
    kind, element, key, place, count, view = Inner(stream).load()
    assert (kind, place, view) == ("storage", "cpu", None) and Inner(stream).load() == [key]
    assert struct.unpack("<q", stream.read(8)) == (count,)
    return np.frombuffer(stream.read(), {"torch.FloatStorage": "<f4", "torch.HalfStorage": "<f2"}[element])


def tensors_of(part: Any, path: str = "") -> dict[str, np.ndarray]:
    state = part["state"] if isinstance(part, dict) else vars(part)
    if isinstance(part, dict):
        assert (part["type"], part["version"]) == ("class", 6) and isinstance(part["module_src"], str)
    found = {}
    for table in ("_parameters", "_buffers"):
        found |= {f"{path}{name}": value for name, value in state[table].items() if value is not None}
    for name, child in state["_modules"].items():
        found |= tensors_of(child, f"{path}{name}.") if child is not None else {}
    return found


def assert_same(found: dict[str, np.ndarray], net: Any) -> None:
    expected = net.state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert np.array_equal(found[name], tensor.numpy()), name


# ---------------------------------------------------------------------------------------------------------------------


def test_a_pickle(tmp_path: Path, net: Any) -> None:
    save_network(tmp_path / "a.pkl", net, sampling=SAMPLING, dataset_kwargs={"path": "x"}, extra={"mine": [1, None]})
    content = PickleReader(io.BytesIO((tmp_path / "a.pkl").read_bytes())).load()
    assert_same(tensors_of(content["ema"]), net)
    assert content["ema"]["class_name"] == "EDMPrecond" and content["ema"]["state"]["_init_kwargs"] == net.init_kwargs
    assert content["sampling"] == SAMPLING.to_dict() and content["mine"] == [1, None] and content["loss_fn"] is None
    assert content["sampling"].keys() <= words()
    assert {"network", "sha256", "steps", "solver"} <= words()
    save_network(tmp_path / "half.pkl", net, half=True)
    found = tensors_of(PickleReader(io.BytesIO((tmp_path / "half.pkl").read_bytes())).load()["ema"])
    assert all((found[name].dtype == np.float16) == (name in dict(net.named_parameters())) for name in found)


def test_safetensors(tmp_path: Path, net: Any) -> None:
    save_network(tmp_path / "a.safetensors", net, sampling=SAMPLING, extra={"mine": [1, None]})
    data = (tmp_path / "a.safetensors").read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    told = json.loads(header.pop("__metadata__")["edm_network"])
    found = {}
    for name, entry in header.items():
        start, stop = entry["data_offsets"]
        values = np.frombuffer(data[8 + size + start : 8 + size + stop], NUMPY[entry["dtype"]])
        found[name] = values.reshape(entry["shape"])
    assert_same(found, net)
    assert told["class_name"] == "EDMPrecond" and told["init_kwargs"] == json.loads(json.dumps(net.init_kwargs))
    assert told["init_args"] == [8, 1, 3] and told["attributes"] == {}  # as it was made
    assert told["entries"]["sampling"] == SAMPLING.to_dict() and told["entries"]["mine"] == [1, None]
    assert told.keys() <= words()


def test_a_runs_files(tmp_path: Path, net: Any) -> None:
    """State, snapshot and statistics of a stage: what the page says is all that is there."""
    data = make_dataset(tmp_path / "data.zip", count=24)
    teacher = small_network()
    load_recipe(teacher, 3)
    save_network(tmp_path / "teacher.pkl", teacher)
    args = [f"--data={data}", f"--transfer={tmp_path / 'teacher.pkl'}", "--precond=edm_distillation", "--num_steps=4"]
    args += ["--batch=24", "--duration=0.001", "--nosubdir", f"--outdir={tmp_path / 'run'}", "--seed=3"]
    assert train.main(args) == 0

    state = torch.load(tmp_path / "run/training-state-000001.pt", weights_only=True)
    assert state["format"] == 1 and state.keys() <= words()
    for part in ("position", "optimizer", "scaler", "intervals"):
        assert state[part].keys() <= words(), part
    assert state["intervals"]["seen"].shape == (2, 2)

    student = load_network(tmp_path / "run/network-snapshot-000001.pkl")
    told = student.extra["training_options"]
    assert told.keys() <= words() and told["seed"] == 3 and told["batch"] == 24
    assert told["kimg"] == pytest.approx(1.008) and told["transfer"] == load_network(tmp_path / "teacher.pkl").sha256
    assert student.sampling is not None and student.sampling.grid.steps == 2

    line = json.loads((tmp_path / "run/stats.jsonl").read_text().splitlines()[-1])
    assert line.pop("timestamp") and all(value.keys() == {"num", "mean", "std"} for value in line.values())
    assert {"num", "mean", "std", "timestamp"} <= words()


def test_detectors(tmp_path: Path) -> None:
    train_detector(make_dataset(tmp_path / "data.zip", count=30), tmp_path / "detector.pt", kimg=0.1)
    content = torch.load(tmp_path / "detector.pt", weights_only=True)
    facts = json.loads(content["facts"])
    assert f'"{content["format"]}"' in PAGE and content.keys() | set(list(facts)[:4]) <= words()
    assert content["state"]["head.weight"].shape == (facts["classes"], facts["dim"])
    digest = hashlib.sha256((tmp_path / "detector.pt").read_bytes()).hexdigest()
    assert load_detector(tmp_path / "detector.pt").id == f"classifier:{digest[:16]}"


def test_the_page_counts_right() -> None:
    assert {field.name for field in fields(Rung)} <= words()
    assert f"{len(GLOBALS)} names" in PAGE.replace("\n", " ")
