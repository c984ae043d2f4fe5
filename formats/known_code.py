"""Which definitions of a pickle's source text are known. The text is read as text, and never run.

A pickle stores the text of the module that defines its classes. A network is read as one of this project's own classes,
by name, so a fork's changed class under a known name would give other numbers than its own code does. Here the text's
definitions are compared by SHA-256 with those of training.networks as it is now, and with the table `known_code.json`:
EDM's (all versions, with EDM2's, ECT's and SiD's that compute the same), and those of this project's past.

What is hashed: a definition from `class` or `def` to its last line, without comments and without any white space, in
UTF-8; of decorators, all but `persistent_class`. Other statements at the top level, which may replace a definition or a
part of it, count as a change of each known name in them. tests/test_known_code.py prints what the table lacks.
"""

from __future__ import annotations

import hashlib
import json
import re
from functools import lru_cache
from pathlib import Path

from torch_utils import persistence
from training import networks

CLASSES = frozenset(name for name, value in vars(networks).items() if persistence.is_persistent(value))
TABLE: dict[str, list[str]] = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
MAX_SOURCE = 1 << 18  # characters of a text; EDM's has 34 thousand
MAX_NAMES = 20

_LITERALS = re.compile(  # comments and strings; the quantifiers are possessive: linear time, whatever the text
    r"""\#[^\n]*+
    | \"{3}(?:[^"\\]++|\\.|"(?!""))*+(?:\"{3})?  |  '{3}(?:[^'\\]++|\\.|'(?!''))*+(?:'{3})?
    | "(?:[^"\\\n]++|\\.)*+"?                    |  '(?:[^'\\\n]++|\\.)*+'?""",
    re.DOTALL | re.VERBOSE,
)
_STATEMENT = re.compile(r"\n(?=[^\s)\]}])")
_DEFINITION = re.compile(r"(?:async\s+)?(?:class|def)\s+(\w+)")
_DECORATOR = re.compile(r"@\s*(?:persistence\.)?persistent_class\s*")
_HARMLESS = re.compile(r"(?:import|from)\b|['\"]|if\s+__name__\b|__all__\b")
_NAME = re.compile(r"(?<![\w.])[^\W\d]\w*")


@lru_cache(maxsize=8)
def unknown_definitions(text: str) -> tuple[str, ...]:
    """Names of the definitions in `text` that are known by name, but not in this version.

    A class that a fork has added does not count: what calls it is then changed itself. Of a text above MAX_SOURCE,
    every class of a known name is unknown.
    """
    own_text = str(networks.EDMPrecond._orig_module_src)  # type: ignore[attr-defined]
    if text == own_text:
        return ()
    if len(text) > MAX_SOURCE:
        return tuple(sorted(CLASSES))
    known = {name: set(versions) for name, versions in TABLE.items()}
    for name, versions in hashes(own_text).items():
        known.setdefault(name, set()).update(versions)
    usual = set(map(_hash, _statements(own_text)[1]))
    named = {name for each in _statements(text)[1] if _hash(each) not in usual for name in _NAME.findall(each)}
    found = hashes(text)
    unknown = [name for name in found if name in known.keys() | named and not found[name] <= known.get(name, set())]
    return tuple(dict.fromkeys(name[:100] for name in [*unknown, *sorted(named & known.keys())]))[:MAX_NAMES]


def hashes(text: str) -> dict[str, set[str]]:
    """SHA-256 of every top-level definition of a source text, by name."""
    return {name: set(map(_hash, bodies)) for name, bodies in _statements(text)[0].items()}


def _statements(text: str) -> tuple[dict[str, list[str]], list[str]]:
    """The definitions at the top level of a text by name, and its other statements that may change them."""
    text = text.replace("\r\n", "\n").replace("\r", "\n").replace("\f", " ").replace("\\\n", " ")
    # Without white space in strings either: a line that begins at column 0 then begins a statement.
    plain = _LITERALS.sub(lambda m: "" if m[0].startswith("#") else "".join(m[0].split()), text)
    found: dict[str, list[str]] = {}
    others: list[str] = []
    decorators = ""
    for statement in _STATEMENT.split(plain):
        match = _DEFINITION.match(statement)
        if match:
            found.setdefault(match[1], []).append(decorators + statement)
            decorators = ""
        elif statement.startswith("@"):
            decorators += "" if _DECORATOR.fullmatch(statement) else statement
        elif not _HARMLESS.match(statement):
            others.append(statement)
    return found, others


def _hash(definition: str) -> str:
    return hashlib.sha256("".join(definition.split()).encode("utf-8", "surrogatepass")).hexdigest()
