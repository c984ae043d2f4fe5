"""A fork's changed class under a known name: found in the text that a pickle carries, which is only ever read."""

from __future__ import annotations

import hashlib
import json
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from formats import known_code, network_files
from formats.known_code import hashes, unknown_definitions
from formats.network_files import convert_network, load_network, save_network
from helpers import small_network
from torch_utils import persistence
from training import networks
from training.distillation import Stage
from training.grids import NoiseGrid, network_grid

ROOT = Path(__file__).parent.parent
OWN = networks.EDMPrecond._orig_module_src  # type: ignore[attr-defined]
FORK = OWN.replace("sigma.log() / 4", "250 * sigma.log()")
Capture = pytest.CaptureFixture[str]


def fork_file(path: Path, source: str = FORK) -> Any:
    """A network whose file carries this text. Returns the network."""
    net = small_network()
    with pytest.MonkeyPatch.context() as patch:
        for cls in filter(persistence.is_persistent, list(vars(networks).values())):
            patch.setattr(cls, "_orig_module_src", source)
        save_network(path, net)
    return net.eval()


def test_every_version_that_was_ever_written_is_known() -> None:
    """The present one is known by itself; a past one must be in the table: add what this prints."""
    git = ["git", "-C", str(ROOT)]
    log = subprocess.run([*git, "log", "--format=%H", "--", "training/networks.py"], capture_output=True, text=True)
    shallow = subprocess.run([*git, "rev-parse", "--is-shallow-repository"], capture_output=True, text=True)
    if log.returncode or shallow.stdout.strip() != "false":
        pytest.skip("no history here")
    known = {name: {*found, *hashes(OWN).get(name, ())} for name, found in (hashes(OWN) | known_code.TABLE).items()}
    missing = dict[str, set[str]]()
    for commit in log.stdout.split():
        text = subprocess.run([*git, "show", f"{commit}:training/networks.py"], capture_output=True, text=True).stdout
        for name, found in hashes(text).items():
            if found - known.get(name, set()):
                missing.setdefault(name, set()).update(found - known.get(name, set()))
        assert missing or unknown_definitions(text) == ()
    table = {name: sorted(found) for name, found in missing.items()}
    assert not table, f"add to formats/known_code.json: {json.dumps(table)}"


def test_edms_and_other_projects_versions_are_in_the_table() -> None:
    table = known_code.TABLE
    assert len(table["EDMPrecond"]) >= 3 and {"AttentionOp", "ECMPrecond", "MPConv", "weight_init"} <= table.keys()
    assert all(len(each) == 64 for found in table.values() for each in found)


def test_what_is_hashed() -> None:
    body = 'class A:\n    """Doc # stays."""\n    x = "#1"  # goes\n\n    def f(\n        self,\n    ):\n        return 1\n'
    text = f"# a comment\n@persistence.persistent_class\n{body}\n# the end\nb = 1\n\ndef g(\n    a,\n) -> int:\n    return '''\nclass B:\n'''\n"
    assert hashes(text) == {
        "A": {hashlib.sha256(b'classA:"""Doc#stays."""x="#1"deff(self,):return1').hexdigest()},
        "g": {hashlib.sha256(b"defg(a,)->int:return'''classB:'''").hexdigest()},
    }
    assert hashes(text.replace("\n", "\r\n").replace("    ", "\t")) == hashes(text)
    assert hashes(text.replace("\n", "\r")) == hashes(text)
    assert hashes(text.replace("persistence.persistent_class", "decorated"))["A"] != hashes(text)["A"]
    assert hashes(text.replace("stays", "differs"))["A"] != hashes(text)["A"]


@pytest.mark.parametrize(
    ("source", "names"),
    [
        (OWN, ()),
        (OWN + "\n# a comment\n\n\nclass Another:\n    pass\n", ()),
        (FORK, ("EDMPrecond",)),
        (OWN.replace("self.sigma_data = sigma_data", "self.sigma_data, self.shift = sigma_data, 1"), ("EDMPrecond",)),
        (OWN.replace("* math.sqrt(0.5)", "* 0.7"), ("SongUNet",)),
        (OWN.replace("return F.silu(x) if act else x", "return F.relu(x) if act else x"), ("normalize",)),
        (OWN.replace("return torch.as_tensor(sigma)\n", "return sigma\n"), ("Precond",)),
        (OWN + "\nif True:\n    class VPPrecond:\n        pass\n", ("VPPrecond",)),
        (OWN + "\nclass Linear:\n    pass\n", ("Linear",)),
        (OWN + "\nEDMPrecond.forward = lambda self, x, sigma: x\n", ("EDMPrecond",)),
        (OWN + "\nsetattr(EDMPrecond, 'forward', None)\n", ("EDMPrecond",)),
        (OWN + "\ndef patch():\n    EDMPrecond.forward = None\n\npatch()\n", ("patch",)),
        (OWN.replace("class EDMPrecond(", "class Mine(") + "\nEDMPrecond = Mine\n", ("Mine", "EDMPrecond")),
        (OWN.replace("class EDMPrecond", "@changed\nclass EDMPrecond"), ("EDMPrecond",)),
        (OWN + "\nif __name__ == '__main__':\n    EDMPrecond(8, 1)\n", ()),
        (FORK.replace("\n", "\r"), ("EDMPrecond",)),
        (OWN + "\nclass \\\nLinear:\n    pass\n", ("Linear",)),
        ("raise SystemExit('run')", ()),
        ("", ()),
        (OWN + "#" * known_code.MAX_SOURCE, tuple(sorted(known_code.CLASSES))),
        ("class Linear(\n" + "'\ud800\0", ("Linear",)),
    ],
)
def test_unknown_definitions(source: str, names: tuple[str, ...]) -> None:
    assert unknown_definitions(source) == names


@pytest.mark.parametrize(
    "piece", ['"', "'\\\n", '"""\n\\', "class Linear:\n", "def f():\n ", "\\", " class ", "é\n", "#"]
)
def test_hostile_texts_take_little_time(piece: str) -> None:
    start = time.process_time()
    unknown_definitions((piece * known_code.MAX_SOURCE)[: known_code.MAX_SOURCE])
    assert time.process_time() - start < 2


def test_a_changed_class_is_read_as_ours_with_a_warning(tmp_path: Path, capsys: Capture) -> None:
    path = tmp_path / "net.pkl"
    net = fork_file(path)
    for _ in range(2):
        file = load_network(path)
        said = capsys.readouterr().err
        assert said.startswith(f"Warning: {path}: its text of EDMPrecond is no version known") and said.count("\n") == 1
    assert "--trust-network-code" in said and file.describe().endswith("an unknown variant of EDMPrecond")
    x, sigma = torch.randn(2, net.img_channels, net.img_resolution, net.img_resolution), torch.tensor([0.5, 20.0])
    assert type(file.net) is networks.EDMPrecond and torch.equal(file.net(x, sigma), net(x, sigma))
    lineage = Stage(file, NoiseGrid((80.0, 1.0, 0.0)), 2, "heun").sampling.lineage
    assert lineage[-1]["unknown_variants"] == ["EDMPrecond"]

    for name in ("a.pkl", "a.safetensors", "b.pkl"):  # this program's own text is in these, and the mark is kept
        convert_network(file, tmp_path / name)
        file = load_network(tmp_path / name)
        said = capsys.readouterr().err
        assert said.startswith(f"Warning: {tmp_path / name}: ") and "EDMPrecond" in said and said.count("\n") == 1
        assert file.variants == ("EDMPrecond",) and file.describe().endswith("an unknown variant of EDMPrecond")
    assert load_network(tmp_path / "b.pkl", trust_network_code=True).variants == ("EDMPrecond",)
    assert "running" not in capsys.readouterr().err

    trusted = load_network(path, trust_network_code=True)
    said = capsys.readouterr().err
    assert "running the source text" in said and hashlib.sha256(FORK.encode()).hexdigest() in said
    assert "Warning" not in said and "its own code run" in trusted.describe() and not trusted.variants
    c_skip, c_out, c_in, _ = net.scalings(sigma[:, None, None, None])
    expected = c_skip * x + c_out * net.model(c_in * x, 250 * sigma.log(), None)
    assert type(trusted.net) is not networks.EDMPrecond and torch.equal(trusted.net(x, sigma), expected)


def test_files_of_this_project_are_silent(tmp_path: Path, capsys: Capture) -> None:
    save_network(tmp_path / "a.pkl", small_network())
    save_network(tmp_path / "a.safetensors", small_network())
    for path in (tmp_path / "a.pkl", tmp_path / "a.safetensors", ROOT / "assets" / "digits-student.pkl"):
        file = load_network(path, trust_network_code=True)
        assert file.variants == () and "unknown" not in file.describe()
        entry = Stage(file, network_grid(file.net, 4), 2, "heun").sampling.lineage[-1]
        assert set(entry) == {"network", "sha256", "steps", "solver"}
    assert capsys.readouterr().err == ""


def test_more_texts_than_a_network_has_are_not_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network_files, "MAX_TEXTS", 0)
    save_network(tmp_path / "a.pkl", small_network())
    assert load_network(tmp_path / "a.pkl").variants == ("EDMPrecond",)
