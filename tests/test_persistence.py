"""The pickles of persistent objects: EDM's format to the letter, read without running anything in them."""

from __future__ import annotations

import copy
import inspect
import io
import json
import pickle
import subprocess
import sys
import types
from functools import partial
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


def test_a_setting_of_the_moment_is_not_written_but_copied(net: Any) -> None:
    net.compute_dtype = torch.bfloat16
    assert "compute_dtype" not in meta_of(net)["state"] and pickle.loads(pickle.dumps(net)).compute_dtype is None
    obj = Base(3)
    obj.mood, obj.options = "good", {"self": obj}  # type: ignore[dict-item]
    twin = copy.deepcopy(obj)
    assert twin is not obj and twin.mood == "good" and twin.options["self"] is twin


def test_undecorated_subclass_is_refused() -> None:
    with pytest.raises(TypeError, match="Undecorated needs @persistent_class"):
        pickle.dumps(Undecorated(1))


# ---------------------------------------------------------------------------------------------------------------------
# What is read


@pytest.mark.parametrize("write", [*(partial(pickle.dump, protocol=p) for p in (2, 4, 5)), torch.save])
def test_round_trip(net: Any, write: Any) -> None:
    expected, file = answer(net), io.BytesIO()
    write(net, file)
    file.seek(0)
    again = torch.load(file, weights_only=False) if write is torch.save else pickle.load(file)
    assert type(again) is EDMPrecond and again.init_kwargs == net.init_kwargs and again.init_args == ()
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(again(x, torch.tensor([0.3, 4.0]), torch.eye(7)[:2]), expected)


def test_source_text_is_never_run(net: Any, tmp_path: Path) -> None:
    marker = tmp_path / "run"
    meta = meta_of(net) | {"module_src": f"open({str(marker)!r}, 'w')\n" + inspect.getsource(networks)}
    again = persistence._reconstruct_persistent_obj(meta)
    assert type(again) is EDMPrecond and not marker.exists()
    meta["class_name"] = "Path"
    with pytest.raises(UserError, match="class 'Path', which is none of this project's classes"):
        persistence._reconstruct_persistent_obj(meta)
    assert not marker.exists()
    for change in ({"version": 5}, {"type": "function"}):
        with pytest.raises(UserError, match="only type 'class', version 6"):
            persistence._reconstruct_persistent_obj(meta | change)


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
    (tmp_path / "net.pkl").write_bytes(pickle.dumps(net))
    code = "import pickle, sys, torch_utils.persistence; print(type(pickle.load(open(sys.argv[1], 'rb'))))"
    command = [sys.executable, "-c", code, tmp_path / "net.pkl"]
    done = subprocess.run(command, cwd=Path(networks.__file__).parents[1], capture_output=True, text=True, check=True)
    assert "training.networks.EDMPrecond" in done.stdout


def test_knowingly_run_module_keeps_its_own_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Classes of a module that names its text hide none of ours."""
    text = (
        "from torch_utils.persistence import persistent_class\n"
        "@persistent_class\nclass EDMPrecond:\n    def __init__(self, x):\n        self.x = x\n"
    )
    module = types.ModuleType("carried")
    module.__dict__["__source__"] = text
    monkeypatch.setitem(sys.modules, "carried", module)
    exec(text, vars(module))
    again = persistence._reconstruct_persistent_obj(meta_of(module.EDMPrecond(4)), vars(module))
    assert type(again) is module.EDMPrecond and again.x == 4 and again._orig_module_src == text
    assert type(pickle.loads(pickle.dumps(EDMPrecond(8, 1, model_channels=8, channel_mult=[1])))) is EDMPrecond


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
