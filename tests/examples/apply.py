"""Puts an example's code into a copy of this repository: python tests/examples/apply.py sampler [FOLDER]

An example is a directory whose files have the paths that they have in the repository. `NAME.py` is a new file.
`NAME.py.add` holds pieces for a file that exists, each under a line that says where it goes: before or after the line
that begins with the given text. FOLDER is the root of the copy, by default the current directory.
"""

import re
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parent


def apply(name: str, root: Path) -> None:
    """Raises ValueError where a file has no such line, or several."""
    example = EXAMPLES / name
    for source in (path for path in example.rglob("*.py*") if "__pycache__" not in path.parts):
        target, text = root / source.relative_to(example), source.read_text(encoding="utf-8")
        if source.suffix == ".py":
            target.write_text(text, encoding="utf-8")
            continue
        target = target.with_suffix("")
        for place, anchor, piece in re.findall(r"^>>> (before|after) (.+)\n((?:(?!>>>).*\n)*)", text, re.MULTILINE):
            lines = target.read_text(encoding="utf-8").splitlines(keepends=True)
            found = [index for index, line in enumerate(lines) if line.startswith(anchor)]
            if len(found) != 1:
                raise ValueError(f"{target} has {len(found)} lines that begin with '{anchor}'")
            lines.insert(found[0] + (place == "after"), piece)
            target.write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    apply(sys.argv[1], Path(*sys.argv[2:]))
