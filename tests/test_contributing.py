"""The examples of CONTRIBUTING.md: each is put into a copy of the repository, and its commands work there."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from examples.apply import EXAMPLES, apply

ROOT = Path(__file__).parent.parent
CODE = [path.parent for path in ROOT.glob("*/__init__.py")]
OUTPUT = {  # of an example's last command
    "architecture": "Done: 4 images",
    "logger": r"^\d+,Loss/loss,[\d.e-]+\n$",
    "metric": r"^\d+(\.\d+)?\n$",
    "sampler": "Done: 4 images",
    "weighting": "weighting late",
}


@pytest.mark.parametrize("name", OUTPUT)
def test_an_example_works(name: str, tmp_path: Path) -> None:
    for folder in (*CODE, ROOT / "assets"):
        shutil.copytree(folder, tmp_path / folder.name, ignore=shutil.ignore_patterns("__pycache__"))
    for script in ROOT.glob("*.py"):
        shutil.copy(script, tmp_path)
    apply(name, tmp_path)
    output = ""
    commands = ["python dataset_tool.py --source=digits --dest=datasets/digits.zip"]
    for line in [*commands, *(EXAMPLES / name / "try.sh").read_text().splitlines()]:
        words = [sys.executable, *shlex.split(line)[1:]]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, f"{line}: {done.stderr[-2000:]}"
        output = done.stdout
    assert re.search(OUTPUT[name], output), output


def test_each_example_is_explained() -> None:
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert sorted(re.findall(r"\(tests/examples/(\w+)\)", page)) == sorted(OUTPUT)
