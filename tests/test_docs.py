"""README and docs are true: links lead somewhere, commands parse, quoted messages are the program's own."""

from __future__ import annotations

import ast
import importlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
SCRIPTS = [path.name for path in ROOT.glob("*.py")]
PACKAGES = ["training", "formats", "metrics", "engine", "ladders", "reporting", "torch_utils", "dnnlib"]
COMMAND = re.compile(r"(?:make|python3?|\.venv/bin/python|torchrun|srun|bash)(?:\s|$)|.*(?:python|torchrun) .*\.py\b")


def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def without_code(text: str) -> str:
    """Prose and tables: fenced and indented blocks, and code within lines, blanked."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    text = re.sub(r"(?m)^    .*$", "", text)
    return re.sub(r"`[^`\n]*`", "", text)


def blocks(text: str) -> Iterator[str]:
    """Shell blocks: indented by four after an empty line, or fenced as sh, bash, console or without a language."""
    for match in re.finditer(r"^```(\w*)\n(.*?)^```", text, flags=re.M | re.S):
        if match[1] in ("", "sh", "bash", "console"):
            yield match[2]
    plain = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    for match in re.finditer(r"(?:\A|\n\n)((?:    .*\n?|\n(?=    ))+)", plain):
        yield re.sub(r"(?m)^    ", "", match[1])


def commands(text: str) -> list[str]:
    """Every command of a page, continued lines joined."""
    found = []
    for block in blocks(text):
        for line in re.sub(r"\\\n\s*", "", block).splitlines():
            line = re.sub(r"\s#\s.*$|\s+&$|^\$ ", "", line.strip())
            parts = re.split(r"\s&&\s|;\s", line)
            if any(part.count("'") % 2 or part.count('"') % 2 for part in parts):
                parts = [line]  # what is between quotes is not for the shell to divide
            found += [part.strip() for part in parts if COMMAND.match(part.strip())]
    return found


def slug(heading: str) -> str:
    """GitHub's anchor of a heading."""
    heading = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").strip().lower()
    return re.sub(r"[^\w\- ]", "", heading).replace(" ", "-")


def anchors(path: Path) -> set[str]:
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.M | re.S)
    return {slug(match[1]) for match in re.finditer(r"^#{1,6} (.+)$", text, flags=re.M)}


# -- links -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_links(name):
    page, text = ROOT / name, without_code(text_of(name))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            assert re.fullmatch(r"https://[\w.-]+\.[a-z]+(/[\w.,~%/#?=&+-]*)?", target), target
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists() and ROOT in [file, *file.parents], f"{name} leads to {target}"
        assert not anchor or anchor in anchors(file), f"{name} leads to {target}; there are {sorted(anchors(file))}"
    assert not re.findall(r"\]\([^)]*$", text, flags=re.M), "open-ended"


@pytest.mark.parametrize("name", NAMES)
def test_files_named_in_prose_exist(name):
    folders = "|".join([*PACKAGES, "docs", "tests", "bench", "assets"])
    for path in re.findall(rf"`((?:{folders})/[\w/.-]+\.\w+)`", text_of(name)):
        assert (ROOT / path).exists(), f"{name} names {path}"


# -- commands ----------------------------------------------------------------------------------------------------------


def parse(line: str) -> None:
    """Fails unless our script has the options and takes their values; nothing is run."""
    words = shlex.split(line, comments=True)
    if words[0] == "make":
        targets = set(re.findall(r"^([\w-]+):", text_of("Makefile"), flags=re.M))
        assert all(word in targets or "=" in word for word in words[1:]), line
        return
    at = next((index for index, word in enumerate(words) if word in SCRIPTS or word.startswith("bench.")), None)
    if at is None:
        assert "-c" in words or importlib.util.find_spec(words[words.index("-m") + 1]) is not None, line
        return
    args = words[at + 1 :]
    if "torchrun" in words:
        assert "--num" not in [arg.partition("=")[0] for arg in args], f"torchrun takes --num: {line}"
    parse_click(importlib.import_module(words[at].removesuffix(".py")).command, args, line)


def parse_click(command: click.Command, args: list[str], line: str) -> None:
    complete = [arg for arg in args if arg != "..." and not arg.startswith("--config=")]
    if complete != args:  # an excerpt, or a file has the rest: what is there must fit
        given = {arg.partition("=")[0].replace("_", "-") for arg in complete if arg.startswith("--")}
        assert given <= {name.replace("_", "-") for parameter in command.params for name in parameter.opts}, line
        return
    try:
        context = command.make_context(command.name, list(args))
        if isinstance(command, click.Group):
            name, sub, rest = command.resolve_command(context, [*context._protected_args, *context.args])
            sub.make_context(name, rest, parent=context)
    except click.exceptions.Exit:
        pass  # --help, --version
    except click.ClickException as exc:
        pytest.fail(f"{line}: {exc.format_message()}")


@pytest.mark.parametrize("name", [name for name in NAMES if name != "CONTRIBUTING.md"])  # test_contributing runs those
def test_commands_parse(name):
    for line in commands(text_of(name)):
        parse(line)


def test_the_parser_of_this_file_finds_mistakes():
    second, first = commands(
        "Words:\n\n    python train.py --no-such=1\n\n```sh\ntorchrun fid.py calc \\\n  --num=3\n```\n"
    )
    with pytest.raises(pytest.fail.Exception, match="no-such"):
        parse(first)
    with pytest.raises(AssertionError, match="torchrun takes"):
        parse(second)


def test_the_contracts_commands_are_in_the_readme():
    assert len(commands(text_of("README.md"))) >= 12 and len(commands(text_of("docs/your-own-data.md"))) >= 6
    words = " ".join(text_of("README.md").split())
    for script, options in {
        "train.py": "--precond=edm_distillation --batch-gpu=128 --duration=20 --num_steps=32",
        "generate.py": "--outdir=fid-tmp-edm-distillation-32-16 --seeds=0-49999 --subdirs",
        "fid.py": "calc --images=fid-tmp-edm-16",
    }.items():
        assert options in words.replace("\\ ", ""), script


# -- translations ------------------------------------------------------------------------------------------------------


def test_both_readmes_hold_the_same_commands_pictures_and_sections():
    english, chinese = text_of("README.md"), text_of("README.zh-CN.md")
    assert commands(english) == commands(chinese)
    assert re.findall(r"!\[[^\]]*\]\(([^)]+)\)", english) == re.findall(r"!\[[^\]]*\]\(([^)]+)\)", chinese)
    assert len(re.findall(r"^## ", english, flags=re.M)) == len(re.findall(r"^## ", chinese, flags=re.M))
    numbers = [set(re.findall(r"\d+\.\d+", text)) for text in (english, chinese)]
    assert numbers[0] == numbers[1], "figures differ"
    assert "README.zh-CN.md" in english and "README.md" in chinese


# -- what pages say of the program -------------------------------------------------------------------------------------

EDM_OPTIONS = {
    "train.py": "outdir data cond arch precond duration batch batch-gpu cbase cres lr ema dropout augment xflip fp16 ls bench "
    "cache workers desc nosubdir tick snap dump seed transfer resume dry-run",
    "generate.py": "network outdir seeds subdirs class batch steps sigma_min sigma_max rho S_churn S_min S_max S_noise solver "
    "disc schedule scaling",
    "fid.py": "images ref num seed batch data dest",
    "dataset_tool.py": "source dest max-images transform resolution",
}


def options_of(command: click.Command) -> set[str]:
    names = {name.replace("_", "-") for parameter in command.params for name in parameter.opts}
    for sub in getattr(command, "commands", {}).values():
        names |= options_of(sub)
    return names


@pytest.mark.parametrize("script", EDM_OPTIONS)
def test_from_edm_speaks_of_every_option_of_edms(script):
    section = text_of("docs/from-edm.md").partition(f"## {script}")[2].partition("\n## ")[0]
    mentioned = set(re.findall(r"--([A-Za-z][\w-]*)", section))
    known = options_of(importlib.import_module(script.removesuffix(".py")).command)
    assert set(EDM_OPTIONS[script].split()) <= mentioned
    assert {f"--{name.replace('_', '-')}" for name in mentioned} <= known


def templates() -> str:
    """Every text in the program, one a line, with an ellipsis where a value is put in."""
    found = []
    for path in [*ROOT.glob("*.py"), *(file for package in PACKAGES for file in (ROOT / package).rglob("*.py"))]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n".join(" ".join(text.split()) for text in found)


def test_messages_in_troubleshooting_are_the_programs():
    known = templates()
    page = text_of("docs/troubleshooting.md")
    messages = [" ".join(text.split()) for text in re.findall(r"\*\*`([^`]+)`", page)]
    ours = [message for message in messages if "torch_utils" not in message]  # that one is Python's
    assert len(ours) > 20
    for message in ours:
        assert message in known, message
