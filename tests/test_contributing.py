"""CONTRIBUTING.md: its patches apply to this version, and what they add works with the commands beside them."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"^### (.*?)\n.*?^```diff\n(.*?)^```\n+```sh\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
CODE = ("dnnlib", "engine", "formats", "ladders", "metrics", "reporting", "torch_utils", "training", "assets")
SHIPPED = ("A sampler",)  # is taken out and put in again
LAST_WORDS = {"A metric": r"^\d+(\.\d+)?\n$", "A loss weighting": "weighting late"}


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
@pytest.mark.parametrize(("title", "patch", "commands"), EXAMPLES, ids=[title for title, _, _ in EXAMPLES])
def test_an_addition_works(title: str, patch: str, commands: str, tmp_path: Path) -> None:
    for name in CODE:
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for script in ROOT.glob("*.py"):
        shutil.copy(script, tmp_path)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GIT_CEILING_DIRECTORIES": str(tmp_path.parent)}

    def run(words: list[str], text: str | None = None) -> str:
        done = subprocess.run(words, cwd=tmp_path, input=text, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, f"{shlex.join(words)}: {done.stderr[-2000:]}"
        return done.stdout

    if title in SHIPPED:
        run(["git", "apply", "-R", "-"], patch)
    run(["git", "apply", "-C1", "-"], patch)
    lines = [*re.findall(r"^    (python dataset_tool.py .*)$", PAGE, re.MULTILINE)]
    lines += commands.replace("\\\n", " ").splitlines()
    for line in lines:
        said = run([sys.executable, *shlex.split(line)[1:]])
    assert re.search(LAST_WORDS.get(title, "Done: 4 images"), said), said


def test_all_four_are_found() -> None:
    assert [title for title, _, _ in EXAMPLES] == ["An architecture", "A loss weighting", "A sampler", "A metric"]
