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
LAST_LINES = {"metric": r"\d+(\.\d+)?", "weighting": ".*", "logger": r"1000,[\w/]+,[\d.e+-]+"}
NAMES = sorted(path.parent.name for path in EXAMPLES.glob("*/try.sh"))


@pytest.mark.parametrize("name", NAMES)
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
    last = output.strip().splitlines()[-1]
    assert re.fullmatch(LAST_LINES.get(name, ".*"), last) and (name in LAST_LINES or "Done: 4 images" in output), output
    if name == "weighting":
        assert "weighting late" in output


def test_each_example_is_explained() -> None:
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert sorted(re.findall(r"\(tests/examples/(\w+)\)", page)) == NAMES
