"""Each package imports only packages below it, at the top of a file or inside a function."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAYERS = ["dnnlib", "torch_utils", "training", "formats", "metrics", "engine", "ladders", "reporting"]
ALIASES = {"training/network_files.py": "formats"}  # the name under which other programs import it


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Line and top-level package of every absolute import that is executed: not those for type checkers alone."""
    waiting: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            waiting += node.orelse
            continue
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.lineno, str(node.module).partition(".")[0]
        if isinstance(node, ast.Import):
            yield from ((node.lineno, name.name.partition(".")[0]) for name in node.names)
        waiting += ast.iter_child_nodes(node)


def upward(path: Path, layer: int) -> list[str]:
    """Imports of `path`, which lies in LAYERS[layer], from layers above it."""
    alias = ALIASES.get(path.relative_to(ROOT).as_posix()) if path.is_relative_to(ROOT) else None
    above = set(LAYERS[layer + 1 :]) - {alias}
    return [f"{path.name}:{line} imports {package}" for line, package in imports(path) if package in above]


@pytest.mark.parametrize("layer", range(len(LAYERS)), ids=LAYERS)
def test_no_package_imports_one_above_it(layer: int) -> None:
    files = sorted((ROOT / LAYERS[layer]).glob("*.py"))
    assert files and not [problem for path in files for problem in upward(path, layer)]


def test_an_upward_import_is_found(tmp_path: Path) -> None:
    path = tmp_path / "grids.py"
    path.write_text("import torch\n\n\ndef f():\n    from engine.setup import train\n    return train\n")
    assert upward(path, LAYERS.index("training")) == ["grids.py:5 imports engine"]
