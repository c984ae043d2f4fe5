"""The pickles of persistent objects: EDM's format to the letter, read without running anything in them."""

from __future__ import annotations

import copy
import inspect
import io
import json
import pickle
import pickletools
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dnnlib.cli import UserError
from torch_utils import persistence
from torch_utils.persistence import is_persistent, persistent_class
from training import networks
from training.networks import EDMPrecond

STRUCTURE = json.loads((Path(__file__).parent / "golden" / "pickle_structure.json").read_text())["network_snapshot"]


@persistent_class
class Base:
    """Says what it is."""

    transient = ("mood",)
    mood = "none"

    def __init__(self, size: int, *, options: dict[str, int] | None = None) -> None:
        self.size, self.options = size, options


@persistent_class
class Derived(Base):
    def __init__(self, size: int) -> None:
        super().__init__(size + 1)


class Undecorated(Base):
    pass


@pytest.fixture
def net() -> Any:
    """The network that EDM's structure was recorded from, but for its weights."""
    torch.manual_seed(0)
    return EDMPrecond(**STRUCTURE["tree_ema"]["scalars"]["_init_kwargs"]).eval().requires_grad_(False)


def answer(net: Any) -> torch.Tensor:
    random = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 16, 16, generator=random)
    with torch.no_grad():
        for value in net.parameters():  # a fresh network's residual branches are all but switched off
            value.copy_(torch.randn(value.shape, generator=random) / max(value[0].numel(), 4) ** 0.5)
        return net(x, torch.tensor([0.3, 4.0]), torch.eye(7)[:2])


def meta_of(obj: Any) -> dict[str, Any]:
    function, (meta,) = obj.__reduce__()
    assert function is persistence._reconstruct_persistent_obj
    return meta


# ---------------------------------------------------------------------------------------------------------------------
# What is written


def check(node: dict[str, Any], obj: Any, path: str = "ema") -> int:
    """Compares an object with EDM's recorded tree; returns the number of nodes. EDM's NumPy scalars must be floats."""

    def plain(value: Any, want: Any) -> Any:
        if want == {"numpy_scalar": "float64"}:
            assert type(value) is float, path
            return want
        if isinstance(value, tuple):
            return {"tuple": list(value)}
        if isinstance(value, dict):
            assert list(value) == list(want), path
            return {key: plain(item, want[key]) for key, item in value.items()}
        assert value is None or type(value) in (bool, int, float, str, list), path
        return value

    if node["kind"] == "persistent":
        meta = meta_of(obj)
        assert list(meta) == STRUCTURE["persistent_object"]["meta_keys_in_order"]
        assert (meta["type"], meta["version"], meta["class_name"]) == ("class", 6, node["class_name"])
        assert meta["module_src"] == inspect.getsource(networks)
        state = meta["state"]
    else:
        assert type(obj) is torch.nn.ModuleDict
        state = vars(obj)
    own = [key for key in state if key not in STRUCTURE["nn_module_keys_in_order"]]
    assert set(STRUCTURE["nn_module_keys_in_order"]) == set(state) - set(own)
    assert sorted(own) == sorted(node["state_keys"][1:]), path
    assert not own or own[-2:] == ["_init_args", "_init_kwargs"]
    for key, want in node["scalars"].items():
        assert plain(state[key], want) == want, f"{path}.{key}"
    for kind in ("parameters", "buffers"):
        want = {key: value and value["shape"] for key, value in node[kind].items()}
        assert {key: None if v is None else list(v.shape) for key, v in state[f"_{kind}"].items()} == want, path
    children = node["children"]
    assert list(state["_modules"]) == [child["name"] for child in children], path
    return 1 + sum(check(child, state["_modules"][child["name"]], f"{path}.{child['name']}") for child in children)


def test_structure_is_that_of_edm(net: Any) -> None:
    assert check(STRUCTURE["tree_ema"], net) > 80


def test_stream(net: Any) -> None:
    """Only globals that EDM's files have, the source text once, no NumPy."""
    data, found = pickle.dumps(net, protocol=4), set()

    class Recorder(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            found.add((module, name))
            return super().find_class(module, name)

    Recorder(io.BytesIO(data)).load()
    allowed = {tuple(name) for name in STRUCTURE["all_globals_outer_stream"]}
    assert found == {name for name in allowed if "numpy" not in name[0]}
    assert data.count(b"class SongUNet(nn.Module)") == 1
    opcodes = {opcode.name for opcode, _, _ in pickletools.genops(data)}
    assert opcodes <= set(STRUCTURE["files"]["ddpmpp_edm"]["opcode_names"])


def test_a_setting_of_the_moment_is_not_written(net: Any) -> None:
    net.compute_dtype = torch.bfloat16
    assert "compute_dtype" not in meta_of(net)["state"]
    assert pickle.loads(pickle.dumps(net)).compute_dtype is None


def test_undecorated_subclass_is_refused() -> None:
    with pytest.raises(TypeError, match="Undecorated needs @persistent_class"):
        pickle.dumps(Undecorated(1))


# ---------------------------------------------------------------------------------------------------------------------
# What is read


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_round_trip(net: Any, protocol: int) -> None:
    expected = answer(net)
    again = pickle.loads(pickle.dumps(net, protocol=protocol))
    assert type(again) is EDMPrecond and again.init_kwargs == net.init_kwargs and again.init_args == ()
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(again(x, torch.tensor([0.3, 4.0]), torch.eye(7)[:2]), expected)


def test_torch_save_round_trip(net: Any) -> None:
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), again.parameters(), strict=True))


def test_source_text_is_never_run(net: Any, tmp_path: Path) -> None:
    marker = tmp_path / "run"
    meta = meta_of(net) | {"module_src": f"open({str(marker)!r}, 'w')\n" + inspect.getsource(networks)}
    again = persistence._reconstruct_persistent_obj(meta)
    assert type(again) is EDMPrecond and not marker.exists()
    meta["class_name"] = "Path"
    with pytest.raises(UserError, match="class 'Path', which is none of this project's classes"):
        persistence._reconstruct_persistent_obj(meta)
    assert not marker.exists()


@pytest.mark.parametrize("change", [{"version": 5}, {"type": "function"}])
def test_other_formats_are_refused(net: Any, change: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="only type 'class', version 6"):
        persistence._reconstruct_persistent_obj(meta_of(net) | change)


def test_state_of_another_version_of_a_class(net: Any) -> None:
    """EDM's own objects: NumPy scalars, no attribute of ours, attributes that we do not know."""
    expected = answer(net)
    meta = meta_of(net)
    meta["state"] = {**meta["state"], "unknown": 1}
    for block in net.modules():
        if isinstance(block, networks.UNetBlock):
            block.skip_scale = np.float64(block.skip_scale)
    again = persistence._reconstruct_persistent_obj(meta)
    assert again.compute_dtype is None and again.unknown == 1
    assert torch.equal(answer(again), expected)


def test_a_process_that_knows_only_this_module_can_read(net: Any, tmp_path: Path) -> None:
    file = tmp_path / "net.pkl"
    file.write_bytes(pickle.dumps(net))
    code = (
        "import pickle, sys, torch_utils.persistence; net = pickle.load(open(sys.argv[1], 'rb'));"
        "print(type(net).__module__, type(net).__name__)"
    )
    root = Path(networks.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code, file], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["training.networks", "EDMPrecond"]


def test_import_hook(net: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(persistence, "_hooks", [])
    data = pickle.dumps(Base(3))

    @persistence.import_hook
    def rename(meta: Any) -> Any:
        if meta.class_name == "Base":
            meta.class_name = "Derived"
            meta.state = {**meta.state, "mood": "new"}
        return meta

    again = pickle.loads(data)
    assert type(again) is Derived and again.size == 3 and again.mood == "new"


def edm_style_loader() -> types.ModuleType:
    """A stand-in for EDM's `torch_utils.persistence`, after the description of the format: it runs the stored text as
    a fresh module, once per text, makes the object without its constructor, and sets its state."""
    module, loaded = types.ModuleType("torch_utils.persistence"), {}

    def persistent_class(cls: type) -> type:
        class Wrapped(cls):  # type: ignore[misc,valid-type]
            def __init__(self, *args: Any, **kwargs: Any) -> None:
                super().__init__(*args, **kwargs)
                self._init_args, self._init_kwargs = copy.deepcopy(args), copy.deepcopy(kwargs)

        Wrapped.__name__, Wrapped.__module__ = cls.__name__, cls.__module__
        return Wrapped

    def reconstruct(meta: dict[str, Any]) -> Any:
        assert meta["version"] == 6 and meta["type"] == "class"
        text = meta["module_src"]
        if text not in loaded:
            fresh = types.ModuleType(f"_imported_module_{len(loaded)}")
            sys.modules[fresh.__name__] = fresh
            loaded[text] = fresh
            exec(text, vars(fresh))
        cls = vars(loaded[text])[meta["class_name"]]
        obj = cls.__new__(cls)
        obj.__setstate__(meta["state"])
        return obj

    module.persistent_class, module._reconstruct_persistent_obj, module.loaded = persistent_class, reconstruct, loaded
    return module


@pytest.mark.parametrize("name", ["VPPrecond", "VEPrecond", "iDDPMPrecond", "EDMPrecond"])
def test_files_open_in_edm(name: str, net: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    net = getattr(networks, name)(**net.init_kwargs).eval()
    expected, data = answer(net), pickle.dumps(net, protocol=4)
    foreign = edm_style_loader()
    monkeypatch.setitem(sys.modules, "torch_utils.persistence", foreign)
    monkeypatch.setattr(sys.modules["torch_utils"], "persistence", foreign)
    again = pickle.loads(data)
    assert len(foreign.loaded) == 1 and type(again).__module__ == "_imported_module_0" and type(again).__name__ == name
    assert type(again) is not type(net)
    assert torch.equal(answer(again), expected)
    fresh = type(again)(**again._init_kwargs)
    assert [k for k, _ in fresh.named_parameters()] == [k for k, _ in net.named_parameters()]
    del sys.modules["_imported_module_0"]


def test_knowingly_run_module_keeps_its_own_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Classes of a module that names its text serve pickles with that text only, and hide none of ours."""
    text = (
        "from torch_utils.persistence import persistent_class\n"
        "@persistent_class\nclass EDMPrecond:\n    def __init__(self, x):\n        self.x = x\n"
    )
    module = types.ModuleType("carried")
    module.__dict__["__source__"] = text
    monkeypatch.setitem(sys.modules, "carried", module)
    exec(text, vars(module))
    data = pickle.dumps(module.EDMPrecond(4))
    assert type(pickle.loads(data)) is module.EDMPrecond and pickle.loads(data).x == 4
    assert persistence.find_class("EDMPrecond") is EDMPrecond


# ---------------------------------------------------------------------------------------------------------------------
# The decorator


def test_decorated_class_looks_like_the_original() -> None:
    assert (Base.__name__, Base.__module__, Base.__doc__) == ("Base", __name__, "Says what it is.")
    assert list(inspect.signature(Base).parameters) == ["size", "options"]
    assert is_persistent(Base) and is_persistent(Base(1)) and persistent_class(Base) is Base
    assert not is_persistent(Undecorated) and not is_persistent(3)


def test_constructor_arguments_are_remembered_as_they_were() -> None:
    options = {"a": 1}
    obj = Base(3, options=options)
    options["a"] = 2
    assert obj.init_args == (3,) and obj.init_kwargs == {"options": {"a": 1}} and obj.options is options
    obj.init_kwargs["options"]["a"] = 3
    assert obj.init_kwargs == {"options": {"a": 1}}


def test_subclass_remembers_its_own_arguments() -> None:
    obj = pickle.loads(pickle.dumps(Derived(3)))
    assert type(obj) is Derived and isinstance(obj, Base) and obj.init_args == (3,) and obj.size == 4


def test_copies_keep_what_pickles_leave_out() -> None:
    obj = Base(3)
    obj.mood = "good"
    obj.options = {"self": obj}
    twin = copy.deepcopy(obj)
    assert twin is not obj and twin.mood == "good" and twin.options["self"] is twin
    assert pickle.loads(pickle.dumps(Base(3))).mood == "none"


def test_two_modules_cannot_share_a_class_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "other", types.ModuleType("other"))
    monkeypatch.setattr(persistence, "_module_source", lambda module: "")
    with pytest.raises(TypeError, match="a persistent class Base exists in"):
        persistent_class(type("Base", (), {"__module__": "other"}))
