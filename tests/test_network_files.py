"""Network files: EDM's pickles read as data, written so that EDM's loader opens them, and safetensors.

The EDM pickles are built here from the golden networks, by Python's and torch's own picklers and not by this project's
writer (test_our_pickles_have_edms_structure compares the modules with EDM's). Their "source text" is a trap: it makes a file if anything ever runs it.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import pickletools
import re
import struct
import subprocess
import sys
import types
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from dnnlib import EasyDict
from dnnlib.cli import UserError
from formats import network_files
from formats.network_files import load_network, save_network
from test_dnnlib import Server
from torch_utils import persistence
from training import networks
from training.grids import NoiseGrid, Sampling, network_grid

GOLDEN = Path(__file__).parent / "golden"
PRECONDS = ["EDMPrecond", "VPPrecond", "VEPrecond", "iDDPMPrecond"]
SAMPLING = Sampling(
    NoiseGrid((80.0, 9.700000000000001, 0.1 + 0.2, 0.0)),
    "euler",
    2,
    ({"network": "teacher.pkl", "sha256": "ab" * 32, "steps": 6, "solver": "heun"},),
)

# ---------------------------------------------------------------------------------------------------------------------
# Files as EDM writes them


class Persistent:
    """Pickles as EDM's persistent objects do."""

    def __init__(self, class_name: Any, state: Any, source: str, **changes: Any) -> None:
        self.meta = {"type": "class", "version": 6, "module_src": source, "class_name": class_name, "state": state}
        self.meta |= changes

    def __reduce__(self) -> Any:
        return persistence._reconstruct_persistent_obj, (self.meta,)


def module_state(own: dict[str, Any]) -> dict[str, Any]:
    """What nn.Module keeps in its instances, and `own` attributes."""
    return dict(vars(nn.Module())) | {"training": False} | own


def as_edm(net: nn.Module, source: str, edit: Callable[[dict[str, Any]], Any]) -> Any:
    """The `ema` of an EDM file: a tree of persistent objects with what `net` holds.

    edit: changes the attributes of its modules, which it gets by path; an attribute CLASS is another class's name.
    """
    states = {}
    for where, module in net.named_modules():
        state = module_state({k: v for k, v in vars(module).items() if "_hooks" not in k})
        tables = {table: dict(state[table]) for table in ("_parameters", "_buffers", "_modules")}
        states[where] = {**state, **tables, "_init_args": (), "_init_kwargs": {}}
    states[""]["_init_kwargs"] = net.init_kwargs
    edit(states)

    def stored(where: str, module: nn.Module) -> Any:
        state = states[where]
        if isinstance(state.get("_modules"), dict):
            own = module._modules
            state["_modules"] = {
                name: stored(f"{where}.{name}".lstrip("."), part)
                if part is not None and part is own.get(name)
                else part
                for name, part in state["_modules"].items()
            }
        if type(module) is nn.ModuleDict:
            container = nn.ModuleDict()
            vars(container).update(state)
            return container
        return Persistent(state.pop("CLASS", type(module).__name__), state, source)

    return stored("", net)


def golden_case(case: str, class_name: str) -> tuple[dict[str, torch.Tensor], dict[str, Any], dict[str, Any]]:
    """(state dict, constructor arguments, golden arrays) of a network of EDM's own."""
    data = dict(np.load(GOLDEN / f"net_{case}.npz"))
    config = json.loads(str(data["config_json"]))
    tensors = {k[3:]: torch.from_numpy(v) for k, v in data.items() if k.startswith("sd/")}
    if class_name == "iDDPMPrecond":
        other = {k[16:]: torch.from_numpy(v) for k, v in data.items() if k.startswith("sd_iDDPMPrecond/")}
        tensors = {"u": other.pop("u")} | tensors | other
    return tensors, {**config["network_kwargs"], "use_fp16": False, **config["interface"]}, data


def edm_object(
    case: str,
    class_name: str,
    source: str,
    tensors: dict[str, torch.Tensor] | None = None,
    kwargs: dict[str, Any] | None = None,
    attributes: dict[str, dict[str, Any]] | None = None,
    ordered: bool = False,
) -> Any:
    """A golden network as EDM stores it, with other tensors (by state-dict name), constructor arguments or attributes.

    ordered: tables as old versions of torch have them."""
    golden, init_kwargs, _ = golden_case(case, class_name)
    net = getattr(networks, class_name)(**init_kwargs).eval()
    tensors = tensors or golden

    def edit(states: dict[str, Any]) -> None:
        for name in tensors | golden:
            path, _, leaf = name.rpartition(".")
            if name not in tensors:
                del states[path]["_parameters"][leaf]
            elif leaf in states[path]["_buffers"]:
                states[path]["_buffers"][leaf] = tensors[name]
            else:
                states[path]["_parameters"][leaf] = nn.Parameter(tensors[name], requires_grad=False)
        for path, state in states.items():
            if "skip_scale" in state:
                state |= {"skip_scale": np.float64(state["skip_scale"])}
                state |= {"_init_kwargs": {"init": {"init_weight": np.sqrt(0.2)}}}
            state |= (attributes or {}).get(path, {})
            state |= {table: OrderedDict(state[table]) for table in ("_parameters", "_buffers", "_modules") if ordered}
        states[""]["_init_kwargs"] = kwargs or init_kwargs
        states["model"]["CLASS"] = states[""]["_init_kwargs"]["model_type"]

    return as_edm(net, source, edit)


def edm_file(
    path: Path,
    case: str = "ddpmpp_a",
    class_name: str = "EDMPrecond",
    protocol: int = 4,
    entries: dict[str, Any] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Writes an EDM pickle of a golden network; returns the golden arrays."""
    source = f"open({str(path.parent / 'TRAP')!r}, 'w').write('somebody ran the text in the file')\n"
    loss = Persistent("EDMLoss", {"P_mean": -1.2, "P_std": 1.2, "_init_args": (), "_init_kwargs": {}}, source + "#")
    content = {
        "ema": edm_object(case, class_name, source, **options),
        "loss_fn": loss,
        "augment_pipe": None,
        "dataset_kwargs": {"class_name": "training.dataset.ImageFolderDataset", "path": "x.zip", "max_size": 12},
    }
    path.write_bytes(pickle.dumps({**content, **(entries or {})}, protocol))
    return golden_case(case, class_name)[2]


def run(net: Any, data: dict[str, Any]) -> torch.Tensor:
    """D for the inputs of a golden file."""
    given = {k: torch.from_numpy(data[f"in/{k}"]) for k in ("class_labels", "augment_labels") if f"in/{k}" in data}
    with torch.no_grad():
        result: torch.Tensor = net(torch.from_numpy(data["in/x"]), torch.from_numpy(data["in/sigma"]), **given)
    return result


def assert_golden(net: Any, data: dict[str, Any], class_name: str) -> None:
    """Within a few times the drift of another convolution back end: 2e-6 for EDM, 3e-6 * sigma for the others."""
    error = np.abs(run(net, data).numpy() - data[f"{class_name}/D"]).reshape(len(data["in/sigma"]), -1).max(axis=1)
    bound = 1e-5 if class_name == "EDMPrecond" else 1e-5 + 1e-5 * data["in/sigma"]
    assert (error < bound).all(), error


def refused(path: Path, words: str) -> None:
    """Loading ends in one line that names the file and holds `words` (a regular expression)."""
    with pytest.raises(UserError, match=words) as caught:
        load_network(path)
    text = str(caught.value)
    assert text.startswith(str(path)) and "\n" not in text and len(text) < 1000
    assert not (path.parent / "TRAP").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Reading


@pytest.mark.parametrize("class_name", PRECONDS)
@pytest.mark.parametrize("case", ["ddpmpp_a", "ncsnpp_a", "adm_a"])
def test_edm_files_load_and_give_edms_numbers(tmp_path: Path, case: str, class_name: str) -> None:
    path = tmp_path / "net.pkl"
    data = edm_file(path, case, class_name)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    file = load_network(path)
    assert torch.equal(torch.get_rng_state(), before), "random numbers were drawn"
    assert type(file.net).__name__ == class_name
    assert_golden(file.net, data, class_name)
    assert not (tmp_path / "TRAP").exists()
    assert not file.net.training and not any(p.requires_grad for p in file.net.parameters())
    assert all(p.dtype == torch.float32 and p.device.type == "cpu" for p in file.net.parameters())


def test_what_a_file_says_besides(tmp_path: Path) -> None:
    path = tmp_path / "net.pkl"
    notes = {"a": (1, 2.5), "b": np.float64(0.1)}
    edm_file(path, entries={"notes": notes, "weights": torch.zeros(3), "sampling": SAMPLING.to_dict()})
    file = load_network(str(path))
    assert file.source == str(path) and file.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert file.dataset_kwargs == {
        "class_name": "training.dataset.ImageFolderDataset",
        "path": "x.zip",
        "max_size": 12,
    }
    assert file.sampling == SAMPLING
    assert file.extra == {
        "loss_fn": {"class_name": "EDMLoss", "P_mean": -1.2, "P_std": 1.2},
        "notes": {"a": [1, 2.5], "b": 0.1},
    }
    assert file.net.label_dim == 10 and file.net.init_kwargs["augment_dim"] == 9


def test_what_was_found_in_words(tmp_path: Path) -> None:
    edm_file(tmp_path / "a.pkl", entries={"optimizer": [torch.zeros(3)], "step": 7})
    file = load_network(tmp_path / "a.pkl")
    assert file.format == "EDM pickle" and file.ignored == ("optimizer",)
    words = file.describe()
    assert re.match(
        r"EDM pickle, EDMPrecond of SongUNet, 0\.\d\d M parameters, 3x16x16, 10 classes, undistilled", words
    )
    assert words.endswith("also holds step, left aside: optimizer")
    save_network(tmp_path / "b.safetensors", file.net, sampling=SAMPLING)
    assert load_network(tmp_path / "b.safetensors").describe().endswith("10 classes, student of 3 steps")


def earlier_fork(**state: Any) -> Persistent:
    """The loss of an earlier fork's student, its whole teacher inside."""
    teacher = edm_object("ddpmpp_a", "EDMPrecond", "raise SystemExit('the text has been run')")
    own = {"sigma_data": 0.5, "net": teacher, "_init_args": (), "_init_kwargs": {"net": teacher}, **state}
    return Persistent("EDMDistillationLoss", own, "raise SystemExit('the text has been run')")


def test_students_of_an_earlier_fork(tmp_path: Path) -> None:
    """Their grid is every ratio-th of the levels that their loss counts; the teacher in the file is not kept."""
    for ratio in (2, 4):
        edm_file(tmp_path / "net.pkl", entries={"loss_fn": earlier_fork(num_steps=np.int64(16), ratio=ratio)})
        file = load_network(tmp_path / "net.pkl")
        assert file.sampling is not None
        assert file.sampling.grid == network_grid(file.net, 16).every(ratio) and file.sampling.grid.levels[0] == 80
        assert file.sampling.solver == "euler" and file.sampling.teacher_steps == 16 and not file.sampling.lineage
        assert file.ignored == ("loss_fn.net",) and file.extra["loss_fn"]["num_steps"] == 16
        save_network(tmp_path / "ours.pkl", file.net, sampling=file.sampling, extra=file.extra)
        assert (tmp_path / "ours.pkl").stat().st_size < 0.6 * (tmp_path / "net.pkl").stat().st_size
        assert load_network(tmp_path / "ours.pkl").sampling == file.sampling
    for state, words in (
        ({"num_steps": 16, "ratio": 3}, "16 steps cannot be taken 3 at a time"),
        ({"num_steps": 0, "ratio": 2}, "at least one step"),
        ({"num_steps": 10**9, "ratio": 2}, "too many"),
        ({"num_steps": "16", "ratio": 2}, "does not say num_steps and ratio"),
        ({}, "does not say num_steps and ratio"),
    ):
        edm_file(tmp_path / "net.pkl", entries={"loss_fn": earlier_fork(**state)})
        refused(tmp_path / "net.pkl", words)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("old", [False, True])
def test_every_protocol_and_the_names_of_old_libraries(
    tmp_path: Path, protocol: int, old: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "net.pkl"
    if old:  # numpy 1's name of its scalars, and EasyDict where some forks have it

        def scalar(*args: Any) -> Any:
            raise AssertionError("called")

        scalar.__module__, scalar.__qualname__ = "numpy.core.multiarray", "scalar"
        monkeypatch.setitem(sys.modules, "numpy.core.multiarray", types.SimpleNamespace(scalar=scalar))
        number: Any = types.new_class("Number", exec_body=lambda body: body.update(
            __reduce__=lambda self: (scalar, (np.dtype("f8"), struct.pack("<d", 0.25)))
        ))()  # fmt: skip
    else:
        number = np.float64(0.25)
    entries = {"mine": EasyDict(x=number, inner=EasyDict(y=[np.int64(-7), np.bool_(True), 2**70, None, ""]))}
    data = edm_file(path, protocol=protocol, ordered=old, entries=entries)
    assert pickle.loads(b"\x80\x02N.") is None and path.read_bytes()[1] == protocol
    names = {arg for op, arg, _ in pickletools.genops(path.read_bytes()) if op.name == "GLOBAL"}
    if protocol == 2:
        assert "_codecs encode" in names and ("numpy.core.multiarray scalar" in names) is old
    file = load_network(path)
    assert file.extra["mine"] == {"x": 0.25, "inner": {"y": [-7, True, 2**70, None, ""]}}
    assert type(file.extra["mine"]["x"]) is float and type(file.extra["mine"]["inner"]["y"][0]) is int
    assert_golden(file.net, data, "EDMPrecond")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_load_as_float32(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors, _, _ = golden_case("ddpmpp_a", "EDMPrecond")
    edm_file(tmp_path / "net.pkl", tensors={k: v.to(dtype) for k, v in tensors.items()})
    for name, value in load_network(tmp_path / "net.pkl").net.state_dict().items():
        assert value.dtype == torch.float32 and torch.equal(value, tensors[name].to(dtype).float())


def test_tensors_that_are_views(tmp_path: Path) -> None:
    """Parts of one storage, and other strides, as a fork that loaded its weights from elsewhere may have them."""
    tensors, _, data = golden_case("ddpmpp_a", "EDMPrecond")
    for name, value in tensors.items():
        if value.ndim == 4:
            padded = torch.full((value.numel() + 7,), torch.nan)
            tensors[name] = padded[5:-2].view(value.shape).copy_(value)
    name = "model.map_layer0.weight"
    tensors[name] = tensors[name].t().contiguous().t()
    edm_file(tmp_path / "net.pkl", tensors=tensors)
    assert_golden(load_network(tmp_path / "net.pkl").net, data, "EDMPrecond")


def test_attributes_win_over_constructor_arguments(tmp_path: Path) -> None:
    """EDM's loader restores attributes; a network changed after it was made must stay changed."""
    changed = {"": {"sigma_data": 0.25, "sigma_max": 40.0, "use_fp16": True}, "model": {"label_dropout": 0.5}}
    edm_file(tmp_path / "net.pkl", attributes=changed)
    net = load_network(tmp_path / "net.pkl").net
    assert (net.sigma_data, net.sigma_max, net.use_fp16, net.model.label_dropout) == (0.25, 40.0, True, 0.5)
    assert net.init_kwargs["sigma_data"] == 0.25  # a student made from these arguments is changed likewise
    for name in ("again.pkl", "again.safetensors"):
        save_network(tmp_path / name, net)
        again = load_network(tmp_path / name).net
        assert (again.sigma_data, again.sigma_max, again.use_fp16) == (0.25, 40.0, True)
        assert again.model.label_dropout == 0.5


def test_a_url(tmp_path: Path, server: Server) -> None:
    data = edm_file(tmp_path / "net.pkl")
    pages = {"/net.pkl?a=SECRET": (tmp_path / "net.pkl").read_bytes(), "/page.pkl": b"<!DOCTYPE html><p>please log in"}
    pages["/set.zip"] = b"PK\x03\x04" + bytes(1000)
    server.answer = lambda handler, count: handler.reply(
        200 if handler.path in pages else 404, pages.get(handler.path, b"")
    )
    file = load_network(server.url + "/net.pkl?a=SECRET")
    assert file.source == server.url + "/net.pkl"
    assert_golden(file.net, data, "EDMPrecond")
    for name, words in (("/none.pkl", "HTTP 404"), ("/page.pkl", "web page"), ("/set.zip", "is an archive")):
        with pytest.raises(UserError, match=rf"http.*{name}: .*{words}"):
            load_network(server.url + name)
    assert server.asked == 4 and len(list((tmp_path / "cache/downloads").iterdir())) == 1
    assert_golden(load_network(server.url + "/net.pkl?a=SECRET").net, data, "EDMPrecond")  # from the cache
    assert server.asked == 4


def test_a_download_that_was_cut_off_unnoticed_is_not_kept(tmp_path: Path, server: Server) -> None:
    """A server that gives no length can break off without anybody seeing: the content tells, and the next try fetches."""
    edm_file(tmp_path / "net.pkl")
    whole = (tmp_path / "net.pkl").read_bytes()
    server.answer = lambda handler, count: handler.whole(len(whole) // count, whole, Content_Length="")
    server.asked = 1  # so that half of it comes first
    url = f"{server.url}/net.pkl"
    with pytest.raises(UserError, match="is cut off"):
        load_network(url)
    assert not list((tmp_path / "cache").rglob("*.pkl"))
    server.asked = 0
    assert load_network(url).sha256 == hashlib.sha256(whole).hexdigest() == load_network(url).sha256
    assert server.asked == 1


# ---------------------------------------------------------------------------------------------------------------------
# Files that are no networks


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty"),
        (b"\x89PNG\r\n\x1a\n" + bytes(50), "is not a pickle"),
        (b"\n <html><body>404", "is a web page"),
        (b"PK\x03\x04" + bytes(50), "one as torch.save writes it"),
        (pickle.dumps([1, 2]), "no network under 'ema'"),
        (pickle.dumps({"G_ema": 1, "D": 2}), "no network under 'ema'.*G_ema, D"),
        (pickle.dumps({"ema": Persistent("EDMPrecond", {}, "", version=7)}), "format version 7"),
        (pickle.dumps({"ema": Persistent("SongUNet", {}, "")}), "is of class SongUNet; a network is one of EDMPrecond"),
        (pickle.dumps({"ema": Persistent("Odd", {}, "")}), "a network of class 'Odd', unknown here; only if you trust"),
        (
            pickle.dumps({"ema": Persistent("Odd", {"act": print}, "")}),
            "refers to 'builtins.print', unknown here; only if",
        ),
        (b"\x80\x04", "is cut off"),
        (b"\x80\x04\x8c\x02os\x8c\x06system\x93.", "refers to 'os.system'.*--trust-network-code"),
        (b"\x80\x04\x8c\x02\x1b\n\x8c\x01x\x93.", r"refers to '\\x1b \.x'"),  # nothing a terminal would obey
        (b"\x80\x02(ios\nsystem\n.", "instruction INST"),
        (b"\x80\x02ctorch\nFloatStorage\n.", "refers to 'torch.FloatStorage'"),  # allowed inside tensors only
        (None, "no such file"),
    ],
)
def test_no_network_at_all(tmp_path: Path, content: bytes | None, words: str) -> None:
    path = tmp_path / "net.pkl"
    if content is not None:
        path.write_bytes(content)
    refused(path, words)
    refused(tmp_path, "is a folder")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "Mystery"}, "a part of class 'Mystery', unknown here"),
        ({"model_type": "DhariwalUNet"}, "can't be made.*embedding_type"),
        ({"channel_mult": [1, 2, 2]}, "does not fit the network it describes: that has no part model.dec"),
        ({"model_channels": 32}, "does not fit the network it describes: model.map_noise.num_channels is 16, not 32"),
        ({"model_channels": 1 << 30}, "its constructor arguments hold a size above"),
        ({"num_blocks": 50_000}, "its constructor arguments make a larger network"),
        ({"label_dim": 7}, "model.map_label.in_features is 10, not 7"),
        ({"unheard_of": 1}, "can't be made from its own constructor arguments.*unheard_of"),
        ({"img_resolution": 15}, "can't be made.*15 cannot be halved"),
        ({"resample_filter": {"a": [torch.nn.Parameter(torch.zeros(1))]}}, "among its constructor arguments"),
    ],
)
def test_a_network_that_does_not_fit_its_description(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    _, kwargs, _ = golden_case("ddpmpp_a", "EDMPrecond")
    own = {k: v for k, v in change.items() if k in ("label_dim", "img_resolution")}
    edm_file(tmp_path / "net.pkl", kwargs={**kwargs, **change}, attributes={"": own})
    refused(tmp_path / "net.pkl", words)


def test_every_tensor_is_accounted_for(tmp_path: Path) -> None:
    tensors, _, _ = golden_case("ddpmpp_a", "EDMPrecond")
    for name in ("model.map_layer0.bias", "model.map_augment.weight"):
        edm_file(tmp_path / "net.pkl", tensors={key: value for key, value in tensors.items() if key != name})
        refused(tmp_path / "net.pkl", "lacks model.")
    edm_file(tmp_path / "net.pkl", tensors={**tensors, "model.map_layer0.spare": torch.zeros(2)})
    refused(tmp_path / "net.pkl", r"has .*\.spare, which the network does not")
    edm_file(tmp_path / "net.pkl", tensors={key: torch.stack([value, value]) for key, value in tensors.items()})
    refused(tmp_path / "net.pkl", r"tensor by tensor: .*weight: \[2, 16, 10\], not \[16, 10\].*\(and \d+ more\)")


class Call:
    """Pickles as a call."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.call = (function, args)

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("function", [os.system, eval, getattr, __import__, torch.load, np.load, print])
def test_functions_are_refused_by_name(tmp_path: Path, function: Any, protocol: int) -> None:
    path, evil = tmp_path / "net.pkl", Call(function, f"touch {tmp_path / 'TRAP'}")
    words = rf"refers to '({function.__module__}|__builtin__)\.{function.__qualname__}'"
    for content in ({"ema": evil}, {"ema": None, "loss_fn": [evil]}, evil):
        path.write_bytes(pickle.dumps(content, protocol))
        refused(path, words)
    edm_file(path, protocol=protocol, entries={"extra": {"deep": [evil]}})
    refused(path, words)


# ---------------------------------------------------------------------------------------------------------------------
# Code that the user trusts


FOREIGN = """
import torch
from torch_utils import persistence

@persistence.persistent_class
class Wonder(torch.nn.Module):
    def __init__(self, img_resolution, scale):
        super().__init__()
        self.img_resolution = img_resolution
        self.scale = torch.nn.Parameter(torch.tensor(float(scale)))

    def forward(self, x, sigma, class_labels=None, **kwargs):
        return x * self.scale
"""


def foreign_file(path: Path, source: str = FOREIGN, name: str = "Wonder", scale: Any = None, **entries: Any) -> str:
    """A network of a class that its file brings along, scaling by 3. Returns the text of the class."""
    source += f"\n# {path}\n"  # another text in every test: each runs once
    own = {"img_resolution": 8, "img_channels": 1, "_init_args": (), "_init_kwargs": {"img_resolution": 8, "scale": 3}}
    own["_parameters"] = {"scale": nn.Parameter(torch.tensor(3.0)) if scale is None else scale}
    path.write_bytes(pickle.dumps({"ema": Persistent(name, module_state(own), source), **entries}))
    return source


def test_unknown_networks_run_only_when_trusted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "net.pkl"
    source = foreign_file(path, FOREIGN + f"\nopen({str(tmp_path / 'RAN')!r}, 'a').write('x')\n", notes=5)
    refused(path, "holds a network of class 'Wonder', unknown here; .*--trust-network-code")
    assert not (tmp_path / "RAN").exists() and capsys.readouterr().err == ""
    file = load_network(path, trust_network_code=True)
    said = capsys.readouterr().err
    assert "for its Wonder" in said and f"{len(source)} bytes" in said
    assert hashlib.sha256(source.encode()).hexdigest() in said and (tmp_path / "RAN").read_text() == "x"
    assert torch.equal(file.net(torch.ones(2), None), torch.full((2,), 3.0))
    assert not file.net.scale.requires_grad and file.extra == {"notes": 5}
    save_network(tmp_path / "again.pkl", file.net)
    assert load_network(tmp_path / "again.pkl", trust_network_code=True).net.scale == 3
    assert (tmp_path / "RAN").read_text() == "x"  # the same text runs once


def test_an_announcement_keeps_its_hash(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever the length of the names beside it, and with nothing that a terminal would obey."""
    source = foreign_file(tmp_path / "net.pkl", name="Wonder\x1b[2J" * 60)
    with pytest.raises(UserError):
        load_network(tmp_path / "net.pkl", trust_network_code=True)
    said = capsys.readouterr().err
    assert hashlib.sha256(source.encode()).hexdigest() in said and said.count("\n") == 1 and said[:-1].isprintable()


def test_a_fork_under_a_known_name(tmp_path: Path) -> None:
    """EDM's class names on another structure: it does not fit, and its own code is the way to load it."""
    path = tmp_path / "net.pkl"
    foreign_file(path, FOREIGN.replace("Wonder", "EDMPrecond"), "EDMPrecond")
    refused(path, "its constructor arguments make a larger network than it holds.*--trust-network-code")
    file = load_network(path, trust_network_code=True)
    assert type(file.net) is not networks.EDMPrecond and file.net.scale == 3
    data = edm_file(path)  # which never runs its text, and stays what it was
    assert_golden(load_network(path, trust_network_code=True).net, data, "EDMPrecond")
    assert not (tmp_path / "TRAP").exists()


def test_trusted_files_hide_nothing_in_their_tensors(tmp_path: Path) -> None:
    """torch's own reader of stored tensors would unpickle whatever they hold, without a word."""
    hidden = pickle.dumps(Call(os.mkdir, str(tmp_path / "RAN")))
    foreign_file(tmp_path / "net.pkl", scale=Call(torch.storage._load_from_bytes, hidden))
    with pytest.raises(UserError, match="running its code failed"):
        load_network(tmp_path / "net.pkl", trust_network_code=True)
    assert not (tmp_path / "RAN").exists()
    pickle.loads(hidden)
    assert (tmp_path / "RAN").exists(), "the trap works"


def test_trusted_code_that_fails_is_the_users_problem(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "net.pkl"
    for ema, words in (
        (Persistent("Wonder", {}, "raise OSError('no')"), r"net\.pkl: running its code failed: OSError: no"),
        (Persistent("Wonder", {}, "raise SystemExit(0)"), "running its code failed: SystemExit"),
        (Call(os.getcwd), "no network under 'ema'"),
    ):
        path.write_bytes(pickle.dumps({"ema": ema}))
        with pytest.raises(UserError, match=words):
            load_network(path, trust_network_code=True)
    assert "the file uses posix.getcwd" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------------
# Writing


def small(class_name: str = "EDMPrecond", **changes: Any) -> Any:
    """A tiny network with every kind of label."""
    kwargs: dict[str, Any] = {
        "img_resolution": 8,
        "img_channels": 1,
        "label_dim": 3,
        "model_type": "SongUNet",
        "embedding_type": "fourier",
        "encoder_type": "residual",
        "resample_filter": [1, 3, 3, 1],
        "model_channels": 8,
        "channel_mult": [1, 2],
        "num_blocks": 1,
        "attn_resolutions": [4],
        "augment_dim": 9,
    }
    torch.manual_seed(0)
    return getattr(networks, class_name)(**{**kwargs, **changes})


ENTRIES: dict[str, Any] = {
    "loss_fn": {"class_name": "training.loss.EDMLoss", "P_mean": -1.2},
    "augment_pipe": {"p": 0.12, "xflip": 1e8},
    "dataset_kwargs": {"path": "x.zip", "use_labels": True, "max_size": None},
}


@pytest.mark.parametrize("suffix", [".pkl", ".safetensors"])
@pytest.mark.parametrize("class_name", PRECONDS)
def test_round_trip_is_exact(tmp_path: Path, class_name: str, suffix: str) -> None:
    net = small(class_name).train()
    path = tmp_path / f"net{suffix}"
    save_network(path, net, sampling=SAMPLING, **ENTRIES, extra={"training": {"kimg": 3, "lr": np.float32(0.5)}})
    assert net.training and all(p.requires_grad for p in net.parameters())
    file = load_network(path)
    assert file.sampling == SAMPLING and file.dataset_kwargs == ENTRIES["dataset_kwargs"]
    entries = {name: ENTRIES[name] for name in ("loss_fn", "augment_pipe")}
    assert file.extra == {**entries, "training": {"kimg": 3, "lr": 0.5}}
    assert type(file.net) is type(net) and file.net.init_kwargs == net.init_kwargs and not file.net.training
    old, new = net.state_dict(), file.net.state_dict()
    assert list(old) == list(new) and all(torch.equal(old[name], new[name]) for name in old)
    x, sigma, labels = torch.randn(2, 1, 8, 8), torch.tensor([0.5, 20.0]), torch.eye(3)[:2]
    assert torch.equal(net.eval()(x, sigma, labels), file.net(x, sigma, labels))

    misnamed = path.rename(tmp_path / f"misnamed{'.safetensors' if suffix == '.pkl' else '.pkl'}")
    assert load_network(misnamed).format == file.format  # by its content
    misnamed.rename(path)

    # The same network is the same file, wherever it comes from, and one format turns into the other and back.
    for target in (path, tmp_path / "other.safetensors", tmp_path / "other.pkl", path):
        entries = {"sampling": file.sampling, "dataset_kwargs": file.dataset_kwargs, "extra": file.extra}
        save_network(tmp_path / f"again{target.suffix}", file.net, **entries)
        file = load_network(tmp_path / f"again{target.suffix}")
    assert (tmp_path / f"again{suffix}").read_bytes() == path.read_bytes()


def test_what_is_in_our_pickles(tmp_path: Path) -> None:
    """Nothing but the names that EDM's own files refer to; no numpy; tensors in torch's legacy form."""
    structure = json.loads((GOLDEN / "pickle_structure.json").read_text())["network_snapshot"]
    net = small()
    net.model.enc["8x8_block0"].skip_scale = np.float64(0.5)  # what EDM's own networks have
    net.register_forward_hook(lambda *args: None)
    net.compute_dtype = torch.bfloat16
    net.compile()
    save_network(tmp_path / "net.pkl", net, sampling=SAMPLING, **ENTRIES)
    data = (tmp_path / "net.pkl").read_bytes()
    names = set()

    class Recorder(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            names.add((module, name))
            return super().find_class(module, name)

    Recorder(io.BytesIO(data)).load()
    assert data[:2] == b"\x80\x04"
    assert names == {tuple(name) for name in structure["all_globals_outer_stream"] if not name[0].startswith("numpy")}
    assert {op.name for op, _, _ in pickletools.genops(data)} <= set(structure["files"]["ddpmpp_edm"]["opcode_names"])
    content = pickle.loads(data)  # our own `persistence` runs no text either
    assert list(content) == ["ema", "loss_fn", "augment_pipe", "dataset_kwargs", "sampling"]
    assert content["ema"].model.enc["8x8_block0"].skip_scale == 0.5 and content["ema"].compute_dtype is None
    assert not content["ema"]._forward_hooks and type(content["sampling"]["levels"][0]) is float
    json.dumps({name: value for name, value in content.items() if name != "ema"})  # plain throughout


def test_our_pickles_have_edms_structure(tmp_path: Path) -> None:
    """The tree of a golden EDM file, part by part: class, attributes, parameters, buffers, order."""
    structure = json.loads((GOLDEN / "pickle_structure.json").read_text())["network_snapshot"]
    tree = structure["tree_ema"]
    kwargs = tree["scalars"]["_init_kwargs"]
    save_network(tmp_path / "net.pkl", networks.EDMPrecond(**kwargs))
    from formats.pickle_reader import StoredObject, read_pickle

    def compare(stored: StoredObject, node: dict[str, Any]) -> int:
        state = stored.state
        assert stored.class_name == node["class_name"].rpartition(".")[2]
        own = set(state) - set(structure["nn_module_keys_in_order"])
        assert own == set(node["state_keys"][1:]) and state.keys() >= set(structure["nn_module_keys_in_order"])
        for name, value in node["scalars"].items():
            if name in ("_init_args", "_init_kwargs"):
                continue
            if isinstance(value, dict):  # a numpy scalar in EDM's file
                assert type(state[name]) is float
            else:
                assert state[name] == value and type(state[name]) in (type(value), int, float)
        for table in ("parameters", "buffers"):
            found = {k: None if v is None else list(v.shape) for k, v in state[f"_{table}"].items()}
            assert found == {k: v and v["shape"] for k, v in node[table].items()}
        assert list(state["_modules"]) == [child["name"] for child in node["children"]]
        return 1 + sum(compare(state["_modules"][child["name"]], child) for child in node["children"])

    stored = read_pickle((tmp_path / "net.pkl").read_bytes())["ema"]
    assert compare(stored, tree) > 80
    assert stored.state["_init_kwargs"] == kwargs and stored.state["_init_args"] == ()


EDM_PERSISTENCE = '''
"""What EDM's loader does, in few words: runs the text it finds and applies the state."""
import types, sys, dnnlib, torch

_modules = {}

def persistent_class(cls):
    class Decorated(cls):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self._init_args, self._init_kwargs = args, kwargs
    Decorated.__name__ = cls.__name__
    return Decorated

def _reconstruct_persistent_obj(meta):
    meta = dnnlib.EasyDict(meta)
    meta.state = dnnlib.EasyDict(meta.state)
    assert meta.version == 6 and meta.type == "class"
    if meta.module_src not in _modules:
        module = types.ModuleType(f"_imported_module_{len(_modules)}")
        sys.modules[module.__name__] = module
        _modules[meta.module_src] = module
        exec(meta.module_src, module.__dict__)
    cls = persistent_class(getattr(_modules[meta.module_src], meta.class_name))
    obj = cls.__new__(cls)
    setstate = getattr(obj, "__setstate__", None)
    setstate(meta.state) if callable(setstate) else obj.__dict__.update(meta.state)
    return obj
'''
EDM_DNNLIB = """
class EasyDict(dict):
    def __getattr__(self, name):
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name)
    def __setattr__(self, name, value):
        self[name] = value
"""
EDM_SCRIPT = """
import pickle, sys
import numpy as np, torch
folder, data_file, *names = sys.argv[1:]
data = np.load(data_file)
given = {k: torch.from_numpy(data[f"in/{k}"]) for k in ("class_labels", "augment_labels") if f"in/{k}" in data}
for name in names:
    with open(f"{folder}/{name}.pkl", "rb") as file:
        content = pickle.load(file)
    assert sorted(content) == ["augment_pipe", "dataset_kwargs", "ema", "loss_fn", "sampling"]
    net = content["ema"]
    assert type(net).__module__ != "training.networks" and "training" not in sys.modules
    with torch.no_grad():
        D = net(torch.from_numpy(data["in/x"]), torch.from_numpy(data["in/sigma"]), **given)
    np.save(f"{folder}/{name}.npy", D.numpy())
"""


def test_edms_own_loader_opens_our_files(tmp_path: Path) -> None:
    """A process that has EDM's loader and nothing of this project."""
    edm = tmp_path / "edm"
    for name, text in {
        "torch_utils/__init__.py": "",
        "torch_utils/persistence.py": EDM_PERSISTENCE,
        "dnnlib/__init__.py": "from .util import EasyDict",
        "dnnlib/util.py": EDM_DNNLIB,
        "script.py": EDM_SCRIPT,
    }.items():
        (edm / name).parent.mkdir(parents=True, exist_ok=True)
        (edm / name).write_text(text)
    data: dict[str, Any] = {}
    for class_name in PRECONDS:
        data = edm_file(tmp_path / "in.pkl", "ncsnpp_a", class_name)
        net = load_network(tmp_path / "in.pkl").net
        save_network(tmp_path / f"{class_name}.pkl", net, sampling=SAMPLING, **ENTRIES)
    save_network(tmp_path / "half.pkl", net, sampling=SAMPLING, half=True, **ENTRIES)
    names = [*PRECONDS, "half"]
    subprocess.run(
        [sys.executable, "script.py", str(tmp_path), str(GOLDEN / "net_ncsnpp_a.npz"), *names],
        cwd=edm,
        env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
        check=True,
    )
    for name in names:
        ours = run(load_network(tmp_path / f"{name}.pkl").net, data).numpy()
        assert np.array_equal(np.load(tmp_path / f"{name}.npy"), ours)


@pytest.mark.parametrize("suffix", [".pkl", ".safetensors"])
def test_half_precision_files(tmp_path: Path, suffix: str) -> None:
    net, half = small("iDDPMPrecond"), tmp_path / f"half{suffix}"
    save_network(half, net, half=True)
    parameters = dict(net.named_parameters())
    for name, value in load_network(half).net.state_dict().items():
        before = net.state_dict()[name]
        assert torch.equal(value, before.half().float() if name in parameters else before)  # buffers stay exact


def test_networks_in_half_precision_are_written_as_float32(tmp_path: Path) -> None:
    save_network(tmp_path / "net.pkl", small().to(torch.bfloat16))
    assert pickle.loads((tmp_path / "net.pkl").read_bytes())["ema"].model.map_layer0.weight.dtype == torch.float32


@pytest.mark.parametrize("suffix", [".pkl", ".safetensors"])
def test_bytes_do_not_depend_on_where_and_how_a_network_lies(tmp_path: Path, suffix: str) -> None:
    plain, other = tmp_path / f"plain{suffix}", tmp_path / f"other{suffix}"
    save_network(plain, small())
    save_network(other, small().to(memory_format=torch.channels_last).requires_grad_(False))
    assert other.read_bytes() == plain.read_bytes()
    if torch.cuda.is_available():
        save_network(other, small().cuda())
        assert other.read_bytes() == plain.read_bytes()


@pytest.mark.parametrize("suffix", [".pkl", ".safetensors"])
def test_a_failed_save_leaves_the_old_file(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"net{suffix}"
    net = small()
    save_network(path, net)
    before = path.read_bytes()
    with pytest.raises(TypeError, match="Tensor is not plain data"):
        save_network(path, net, extra={"x": [torch.zeros(1)]})
    with pytest.raises(TypeError, match="no network of this project"):
        save_network(path, nn.Linear(1, 1))
    with pytest.raises(ValueError, match="'ema' is the network itself"):
        save_network(path, net, extra={"ema": 1})
    with torch.no_grad():
        net.model.map_layer0.weight[0, 0] = 1e6
    with pytest.raises(ValueError, match="float16"):
        save_network(path, net, half=True)
    assert path.read_bytes() == before and os.listdir(tmp_path) == [path.name]


def test_a_header_that_nobody_would_read_is_not_written(tmp_path: Path) -> None:
    extra = {"notes": "x" * network_files.MAX_HEADER}
    save_network(tmp_path / "net.pkl", small(), extra=extra)
    assert load_network(tmp_path / "net.pkl").extra == extra
    with pytest.raises(TypeError, match="too large for the header"):
        save_network(tmp_path / "net.safetensors", small(), extra=extra)
    assert not (tmp_path / "net.safetensors").exists()


def test_the_list_of_names_is_as_short_as_documented() -> None:
    from formats.pickle_reader import GLOBALS

    structure = json.loads((GOLDEN / "pickle_structure.json").read_text())
    snapshot = structure["network_snapshot"]
    known = {tuple(n) for n in snapshot["all_globals_outer_stream"] + snapshot["all_globals_when_numpy_older_than_2"]}
    assert known <= set(GLOBALS)
    assert {f"{module}.{name}" for module, name in set(GLOBALS) - known} == {
        "dnnlib.util.EasyDict",
        "dnnlib.EasyDict",
        "builtins.set",
        "__builtin__.set",
        "builtins.bytes",
        "__builtin__.bytes",
        "_codecs.encode",
    }
    assert {"EDMPrecond", "UNetBlock", "Conv2d", "ModuleDict"} <= network_files.KNOWN_CLASSES
