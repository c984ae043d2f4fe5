"""What every script's command line shares: one-line errors, exit status, option spelling. Imports no torch.

A script defines a click command with `@command()` and ends in

    def main(args: Sequence[str] | None = None) -> int:
        return cli.run(command, args)

    if __name__ == "__main__":
        sys.exit(main())

so that tests can call `main([...])` in their own process and check the exit status.
"""

from __future__ import annotations

import contextlib
import difflib
import errno
import json
import math
import os
import re
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from .errors import UsageError, UserError, printable, public_url, without_secrets


def missing_package(exc: ImportError) -> str:
    """What to do about a package that isn't there: mostly, it is another Python that was called."""
    return (
        f"the Python package {exc.name} is missing in {sys.executable}; 'make env' puts all that is needed into .venv, "
        "whose Python is .venv/bin/python"
    )


try:
    import click
    from click.shell_completion import shell_complete
except ModuleNotFoundError as missing:
    sys.exit(f"{os.path.basename(sys.argv[0])}: error: {missing_package(missing)}")

MAX_CLASSES = 1_000_000  # to choose from
COMMAND_LINE_ONLY = frozenset(("trust_network_code",))  # options that lower a guard: no --config switches them on
LARGEST = 2**63  # a number on the command line stays below it
MAX_RANGE = 10_000_000  # numbers in a list such as 0-49999,60000: they are kept in memory


class Stopped(UserError):
    """A signal asked a run to end, and it has, with its state saved. Exit status 128 + signal."""

    def __init__(self, signal: int, text: str) -> None:
        super().__init__(text)
        self.signal = signal


class Interrupted(KeyboardInterrupt):
    """A signal asks this program to end, here and now; its text is how to resume. Exit status 128 + signal."""

    def __init__(self, signal: int, text: str) -> None:
        super().__init__(text)
        self.signal = signal


class FailedElsewhere(UserError):
    """Another process has failed and prints why; this one ends silently."""


def command(**attrs: Any) -> Callable[[Callable[..., Any]], click.Command]:
    """`click.command` with this project's habits: `-` and `_` are the same in option names, defaults are shown, help
    comes in sections, and there is a --version."""
    return click.command(cls=Command, context_settings=_settings(), **attrs)


def group(**attrs: Any) -> Callable[[Callable[..., Any]], click.Group]:
    """`click.group` for a script with subcommands, which are defined by its `command()` and take over its habits."""
    return click.group(cls=Group, context_settings=_settings(), no_args_is_help=False, **attrs)


def _settings() -> dict[str, Any]:
    return {
        "token_normalize_func": lambda token: token.replace("_", "-"),
        "help_option_names": ["-h", "--help"],
        "max_content_width": 120,
        "show_default": True,
    }


F = TypeVar("F", bound=Callable[..., Any])


def section(title: str) -> Callable[[F], F]:
    """Decorator above some `click.option`s: in the help, they stand under `title` (down to the next section)."""

    def mark(function: F) -> F:
        for param in getattr(function, "__click_params__", []):  # decorators further down have been applied already
            vars(param).setdefault("section", title)
        return function

    return mark


class Command(click.Command):
    """A command whose help lists the options by `section`, and which knows --version."""

    def __init__(self, *args: Any, **attrs: Any) -> None:
        super().__init__(*args, **attrs)
        self.params.append(_version_option())

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """As click does; then empty text, of a shell's variable that isn't set perhaps, is refused by name, and a URL
        that a --config names is printed, before anything is fetched."""
        rest = super().parse_args(ctx, args)
        values = {} if ctx.resilient_parsing else given(ctx)
        for param in self.params:
            name, value = max(param.opts, key=len), values.get(str(param.name))
            if value == "":
                raise UsageError(f"{name} is empty; write {name}={param.metavar or 'VALUE'}")
            if os.environ.get("RANK", "0") != "0":
                continue
            if value is not None and value != ctx.params[str(param.name)]:
                note = "the rest of the address is neither shown nor kept in files; with --config, give it again"
                print(f"Note: {name}={value}: {note}", file=sys.stderr)
            source = ctx.get_parameter_source(str(param.name))
            if source is click.core.ParameterSource.DEFAULT_MAP and "://" in str(value):
                print(f"From --config: {name}={printable(value)}", flush=True)
        return rest

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        sections: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            if record is not None and not isinstance(param, click.Argument):  # which the text above explains
                sections.setdefault(vars(param).get("section", "Help"), []).append(record)
        if len(sections) == 1:
            sections = {"Options": sections["Help"]}
        names = [name for rows in sections.values() for name, _ in rows]
        width = max(len(name) for name in names if len(name) <= MAX_NAME)
        for title, rows in sections.items():
            with formatter.section(bold(title)):
                formatter.write_dl([(name.ljust(width), text) for name, text in rows], col_max=width)


class Group(click.Group):
    """A script with subcommands."""

    command_class = Command

    def __init__(self, *args: Any, **attrs: Any) -> None:
        super().__init__(*args, **attrs)
        self.params.append(_version_option())


def _version_option() -> click.Option:
    def show(ctx: click.Context, param: click.Parameter, wanted: bool) -> None:
        if wanted and not ctx.resilient_parsing:
            from .version import describe

            click.echo("\n".join(describe()))
            ctx.exit()

    return click.Option(
        ["--version"],
        is_flag=True,
        is_eager=True,
        expose_value=False,
        callback=show,
        help="Show the versions of this program, Python, torch and CUDA, and the GPUs.",
        show_default=False,
    )


def config_option(read: Callable[[dict[str, Any]], dict[str, Any]]) -> Callable[[F], F]:
    """`--config FILE`: values of options from a JSON file; what is given on the command line besides comes first.

    read: from the file's content to values by the parameters' names. Raises UsageError, or ValueError with a reason.
    """

    def load(ctx: click.Context, param: click.Parameter, path: str | None) -> None:
        if path is not None and not ctx.resilient_parsing:
            ctx.default_map = {**(ctx.default_map or {}), **_typed(ctx, path, read)}

    option: Callable[[F], F] = click.option(
        "--config",
        help="Take the options from a run's file; what is given besides counts more",
        metavar="JSON",
        is_eager=True,
        expose_value=False,
        callback=load,
    )
    return option


def given(ctx: click.Context) -> dict[str, Any]:
    """The values that the command line or its --config gave, as they may be kept (`public_url`), by the parameters'
    names: no defaults."""
    default = click.core.ParameterSource.DEFAULT
    names = [str(param.name) for param in ctx.command.params if param.expose_value]
    values = {name: ctx.params[name] for name in names if ctx.get_parameter_source(name) is not default}
    return {name: public_url(value) if isinstance(value, str) else value for name, value in values.items()}


def _typed(ctx: click.Context, path: str, read: Callable[[dict[str, Any]], dict[str, Any]]) -> dict[str, str]:
    """The values of a --config file as they would be typed. Raises UserError or UsageError for what is no option, or
    one of COMMAND_LINE_ONLY."""
    from .util import parse_json, read_file

    try:
        content = parse_json(read_file(path, "a run's JSON"))
        if not isinstance(content, dict):
            raise ValueError("it holds no JSON object")
        values = read(content)
    except UnicodeDecodeError as exc:
        raise UserError(f"--config={path}: can't be used: it is no JSON file") from exc
    except (ValueError, RecursionError) as exc:  # JSONDecodeError is a ValueError too
        raise UserError(f"--config={path}: can't be used: {exc}") from exc
    except OSError as exc:
        raise UserError(f"--config={path}: {exc.strerror or exc}") from exc
    except UserError as exc:
        raise UserError(f"--config={exc}") from exc
    for name in COMMAND_LINE_ONLY.intersection(values):
        typed_as = f"--{name.replace('_', '-')}"
        raise UsageError(
            f"--config={path}: it sets '{name}', which only the command line may; remove it from the file, and type "
            f"{typed_as} if that is what you want"
        )
    params = {str(param.name): param for param in ctx.command.params if param.expose_value}
    typed = {}
    for name, value in values.items():
        param = params.get(name)
        if param is None:
            raise UsageError(f"--config={path}: there is no option '{name}'{_suggestion(name, list(params))}")
        if value is None:
            continue
        text = _spelled(value)
        if text is None or (isinstance(param.type, click.types.StringParamType) and not isinstance(value, str)):
            kind = "text" if isinstance(param.type, click.types.StringParamType) else f"a {param.type.name}"
            raise UsageError(f"--config={path}: {name} should be {kind}, not {json.dumps(value)[:80]}")
        if not text.isprintable():
            shown = f"{name} is {printable(text, 80)}, with characters that are not printed"
            raise UsageError(f"--config={path}: {shown}; type it on the command line")
        try:
            param.type_cast_value(ctx, text)
        except click.BadParameter as exc:
            raise UsageError(f"--config={path}: {name}: {exc.message}") from exc
        typed[name] = text
    return typed


def _spelled(value: Any) -> str | None:
    """A JSON value as one would type it; None for what can't be typed."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (str, int, float)):
        return str(value)
    if isinstance(value, list) and all(isinstance(item, (int, float)) and not isinstance(item, bool) for item in value):
        return ",".join(map(str, value))
    return None


# ----------------------------------------------------------------------------------------------------------------------
# What is shown on a terminal


MAX_NAME = 32  # columns of an option's name in the help


def has_colour() -> bool:
    """Whether standard output is a terminal that is to show bold and colours (https://no-color.org)."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def bold(text: str) -> str:
    """`text` in bold type, on a terminal."""
    return f"\033[1m{text}\033[0m" if has_colour() else text


def green(text: str) -> str:
    """`text` in green, on a terminal."""
    return f"\033[32m{text}\033[0m" if has_colour() else text


# ----------------------------------------------------------------------------------------------------------------------
# Running a command


def program(name: str) -> str:
    """How this Python's `name` ("python", "torchrun") is called from here: by its name where the PATH leads to it, by
    its path where the environment is not activated."""
    own, found = Path(sys.executable).with_name(name), shutil.which(name)
    if not own.exists() or (found is not None and Path(found).parent.resolve() == own.parent.resolve()):
        return name
    with contextlib.suppress(ValueError):
        return str(own.relative_to(Path.cwd()))
    return str(own)


leaving_by_exit = False  # this process ends with `run`: nothing needs to be taken down


def run(cmd: click.Command, args: Sequence[str] | None = None) -> int:
    """Runs `cmd` and returns its exit status: 0, 1 (any failure), 2 (wrong option), 128 + signal (interrupted).

    Every failure is one line on standard error, from the rank that met it. `EDM_DEBUG=1` shows the traceback too.

    One of several processes that runs its own command line (args None) ends here, and does not return.
    """
    global leaving_by_exit
    leaving_by_exit = args is None and _launched()
    if leaving_by_exit and not _debugging():
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # else C++ shows its stack when a connection breaks
    status = _run(cmd, args)
    if leaving_by_exit:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        # Threads of the process group may still be there when C++ takes its globals down, which then aborts the process
        # ("terminate called without an active exception"), and the launcher calls a finished job failed.
        os._exit(status)
    return status


def _run(cmd: click.Command, args: Sequence[str] | None) -> int:
    prog = os.path.basename(sys.argv[0]) if args is None else f"{cmd.name}.py"
    variable = f"_{re.sub(r'[^0-9A-Za-z]', '_', prog).upper()}_COMPLETE"
    if args is None and variable in os.environ:
        return shell_complete(cmd, {}, prog, variable, os.environ[variable])
    if args is None:  # a file name that the terminal's encoding does not know is no reason to stop
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(AttributeError):
                stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    try:
        with cmd.make_context(prog, list(sys.argv[1:] if args is None else args)) as context:
            result = cmd.invoke(context)
        sys.stdout.flush()
        return result if isinstance(result, int) else 0
    except click.exceptions.Exit as exc:
        return exc.exit_code
    except (click.Abort, KeyboardInterrupt) as exc:
        if sys.stderr.isatty():
            print(file=sys.stderr)  # after the ^C that the terminal shows
        if isinstance(exc, Interrupted):
            return _fail(prog, str(exc), 128 + exc.signal, exc)
        return _fail(prog, "interrupted", 130, exc)
    except (click.UsageError, UsageError) as exc:
        return _fail(prog, _message(exc), 2, exc)
    except Stopped as exc:
        return _fail(prog, _message(exc), 128 + exc.signal, exc) if str(exc) else 128 + exc.signal
    except Exception as exc:
        return _fail(prog, _message(exc), 1, exc)


def _message(exc: BaseException) -> str:
    """One line about `exc` for people."""
    if isinstance(exc, click.NoSuchOption):
        script = str(exc.ctx.find_root().info_name) if exc.ctx is not None else ""
        hint = HABITS.get((script, exc.option_name)) or _suggestion(exc.option_name, exc.possibilities or [])
        return f"No such option '{exc.option_name}'{hint}"
    if isinstance(exc, click.ClickException):
        return exc.format_message()
    if isinstance(exc, UserError):
        return str(exc)
    text = str(exc)
    if isinstance(exc, OSError):
        return _system_message(exc)
    if isinstance(exc, MemoryError) or type(exc).__name__ == "OutOfMemoryError" or _OUT_OF_MEMORY.search(text):
        advice = "out of memory: train.py takes --batch-gpu=auto and --recompute=1, the others a smaller --batch"
        return f"{advice}. {text}".strip()
    if isinstance(exc, ModuleNotFoundError):
        return missing_package(exc)
    if isinstance(exc, RecursionError):
        return "a file holds lists or tables nested too deeply (EDM_DEBUG=1 shows where)"
    if isinstance(exc, RuntimeError) and _launched() and _LOST_PEER.search(f"{type(exc).__name__} {text}"):
        return "another process has ended, or can't be reached any more; unless it was killed, its own message says why"
    return f"unexpected {type(exc).__name__}: {text} (EDM_DEBUG=1 shows where; please report it)"


def world_size() -> int:
    """How many processes were started, as the launcher's variable has it; 1 without a launcher (or for nonsense)."""
    value = os.environ.get("WORLD_SIZE", "")
    return max(int(value), 1) if value.isascii() and value.isdigit() else 1


def _launched() -> bool:
    """Whether this is one of several processes."""
    return os.environ.get("WORLD_SIZE", "1") not in ("", "0", "1")


_OUT_OF_MEMORY = re.compile(r"can't allocate memory|bad_alloc|out of memory", re.IGNORECASE)
_LOST_PEER = re.compile(  # the words of Gloo, NCCL and torch's rendezvous store
    r"closed by peer|reset by peer|broken pipe|timed out|timeout|remote process|socket|Dist[A-Z][a-z]+Error",
    re.IGNORECASE,
)


def _system_message(exc: OSError) -> str:
    if exc.errno in (errno.ENOSPC, errno.EDQUOT):
        where = f" while writing {exc.filename}" if exc.filename else ""
        return f"the disk is full{where}; free some space and start again, what existed before is intact"
    if isinstance(exc, BrokenPipeError):
        return "the program that read the output has ended (broken pipe)"
    if isinstance(exc, (FileExistsError, NotADirectoryError)):
        return f"Not a directory: {exc.filename} (a part of that path is a file); use another path"
    if exc.strerror:
        return f"{exc.strerror}: {exc.filename}" if exc.filename else exc.strerror
    return f"{type(exc).__name__}: {exc}"


_TEACHERS = "; a student has its teacher's architecture, which is read from --transfer"
HABITS = {  # what one types from another script, and no spelling is near
    ("generate.py", "--num-steps"): "; did you mean '--steps'?",
    ("fid.py", "--num-steps"): "; did you mean '--steps'?",
    **{(name, "--learning-rate"): "; did you mean '--lr'?" for name in ("train.py", "distill.py")},
    **{("distill.py", f"--{name}"): _TEACHERS for name in ("arch", "cbase", "cres", "blocks")},
    ("distill.py", "--precond"): "; distill.py does nothing but --precond=edm_distillation, stage after stage",
    ("distill.py", "--nosubdir"): "; a ladder always resumes in its --outdir",
    ("distill.py", "--resume"): "; the same command resumes in its --outdir",
}


def _suggestion(name: str, known: Sequence[str]) -> str:
    """'; did you mean ...?' with the nearest of the options known, if one is near."""
    bare = {option.lstrip("-"): option for option in known}
    near = difflib.get_close_matches(name.lstrip("-"), bare, n=1)
    return f"; did you mean '{bare[near[0]]}'?" if near else ""


def _fail(prog: str, message: str, status: int, exc: BaseException) -> int:
    if isinstance(exc, FailedElsewhere):
        time.sleep(3)  # a launcher kills all processes when the first one ends: let that be the one with the message
        return status
    if _debugging():
        sys.stderr.write(without_secrets("".join(traceback.format_exception(exc))))
    try:
        sys.stdout.flush()
    except OSError:  # its reader is gone or its disk full: Python would try again at exit, and print many lines
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    print_error(prog, message, "" if isinstance(exc, (Stopped, KeyboardInterrupt)) else "error: ")
    return status


def print_error(prog: str, message: str, kind: str = "error: ") -> None:
    """The one line on standard error, with the rank of a process that isn't alone."""
    rank = f" [rank {os.environ.get('RANK', '?')}]" if _launched() else ""
    sys.stderr.write(f"{prog}{rank}: {kind}{printable(message)}\n")  # at once: print() would let others between
    sys.stderr.flush()


def options_in_use() -> dict[str, Any]:
    """The command's options and their values, for comparing processes: without those that name a file to read, which
    may lie elsewhere on another machine, and are compared by what they hold."""
    context = click.get_current_context()
    return {name: value for name, value in context.params.items() if name not in _FILES}


_FILES = {"data", "transfer", "network", "path", "ref", "images", "detector", "spec"}


def _debugging() -> bool:
    return os.environ.get("EDM_DEBUG", "0") not in ("", "0")


# ----------------------------------------------------------------------------------------------------------------------
# Kinds of values. LARGEST bounds every number, so that none overflows in what is computed from it.
# Their names complete the sentence "'abc' is not a valid ...".


class Whole(click.IntRange):
    """A whole number within bounds, of 64 bits at most."""

    name = "whole number"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        number = super().convert(value, param, ctx)
        if number is not None and abs(number) >= LARGEST:
            self.fail(f"'{value}' is too large a number", param, ctx)
        return number


class WholeOrAuto(Whole):
    """A whole number from 1, or the word auto."""

    name = "whole number, or auto"

    def __init__(self) -> None:
        super().__init__(min=1)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return value if value == "auto" else super().convert(value, param, ctx)


class Number(click.FloatRange):
    """A finite number within bounds, below LARGEST; with `infinite`, 'inf' is one too."""

    name = "number"

    def __init__(self, *args: Any, infinite: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.infinite = infinite

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number = float(super().convert(value, param, ctx))
        if math.isnan(number) or (math.isinf(number) and not self.infinite):
            self.fail(f"'{value}' is not a finite number", param, ctx)
        if LARGEST <= abs(number) < math.inf:
            self.fail(f"'{value}' is too large a number", param, ctx)
        return number


class Choice(click.Choice):
    """One of some words, in which `-` and `_` are the same too."""

    def __init__(self, choices: Sequence[str]) -> None:
        super().__init__(choices)

    def normalize_choice(self, choice: Any, ctx: click.Context | None) -> str:
        """How a word is shown: as it was given (click would take token_normalize_func to it)."""
        return str(choice)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        for choice in self.choices:
            if str(value).replace("_", "-") == choice.replace("_", "-"):
                return str(choice)
        near = _suggestion(str(value).lower(), [choice for choice in self.choices if _end_alike(str(value), choice)])
        self.fail(f"'{value}' is not one of {', '.join(self.choices)}{near}", param, ctx)


def _end_alike(word: str, other: str) -> bool:
    """Whether what differs is near: center-crop-dhariwal is no misspelling of center-crop-wide."""
    import difflib

    first, second = (text.lower().replace("_", "-").split("-") for text in (word, other))
    while first and second and first[0] == second[0]:
        first, second = first[1:], second[1:]
    return difflib.SequenceMatcher(None, "-".join(first), "-".join(second)).ratio() >= 0.6


class Bool(click.ParamType):
    """0 or 1, or the words for them."""

    name = "boolean"
    WORDS = {  # noqa: RUF012
        **dict.fromkeys(("1", "true", "yes", "on", "t", "y"), True),
        **dict.fromkeys(("0", "false", "no", "off", "f", "n"), False),
    }

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> bool:
        known = self.WORDS.get(str(value).strip().lower())
        if known is None:
            self.fail(f"'{value}' is neither 0 nor 1 (nor yes, no, true, false)", param, ctx)
        return known


def parse_int_list(text: str | Sequence[int], most: int = MAX_RANGE) -> list[int]:
    """'1,2,5-10' -> [1, 2, 5, 6, 7, 8, 9, 10]. An empty range ('9-7') gives nothing. Raises ValueError, also for more
    than `most` numbers, before they take memory."""
    if not isinstance(text, str):
        return [int(value) for value in text]
    ranges = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)-(\d+)\s*", part)
        first, last = (int(match[1]), int(match[2])) if match else (int(part), int(part))
        ranges.append(range(first, last + 1))
    if sum(max(numbers.stop - numbers.start, 0) for numbers in ranges) > most:
        raise ValueError(f"more than {most} numbers")
    return [number for numbers in ranges for number in numbers]


class IntList(click.ParamType):
    """A comma-separated list of whole numbers from `min` to `max` and of ranges, such as 1,2,5-10."""

    name = "list"

    def __init__(self, min: int | None = None, max: int | None = None) -> None:
        self.min, self.max = min, max

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[int]:
        try:
            numbers = parse_int_list(value)
        except ValueError as exc:
            more = f" ({exc})" if "more than" in str(exc) else ""
            self.fail(f"'{value}' is not a list of whole numbers and ranges such as 1,2,5-10{more}", param, ctx)
        if self.min is not None and numbers and min(numbers) < self.min:
            self.fail(f"'{value}' holds {min(numbers)}, but the least is {self.min}", param, ctx)
        if self.max is not None and numbers and max(numbers) > self.max:
            self.fail(f"'{value}' holds {max(numbers)}, but the most is {self.max}", param, ctx)
        return numbers


class Seeds(IntList):
    """A list of seeds, of which no two are the same random numbers: seeds count modulo 2^32."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[int]:
        seeds = super().convert(value, param, ctx)
        if not seeds or (min(seeds) >= 0 and max(seeds) < 1 << 32):
            return seeds
        drawn: dict[int, int] = {}
        for seed in seeds:
            same = drawn.setdefault(seed % (1 << 32), seed)
            if same != seed:
                self.fail(f"seeds {same} and {seed} are the same random numbers (modulo 2^32); drop one", param, ctx)
        return seeds


class Condition(click.ParamType):
    """Classes such as 3 or 1,2,5-10, or a label vector such as 0.2,0.8."""

    name = "list"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[Any]:
        try:
            values: list[Any] = parse_int_list(value, MAX_CLASSES)
        except ValueError:
            with contextlib.suppress(ValueError):
                return [float(part) for part in value.split(",")]
            values = []
        if not values or (values[0] < 0 and len(values) == 1):
            self.fail(
                f"'{value}' is neither a class (3), nor classes (1,2,5-10), nor a label vector (0.2,0.8)", param, ctx
            )
        return values


class FloatList(click.ParamType):
    """Comma-separated positive numbers, such as 20 or 10,10,20."""

    name = "list"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[float]:
        try:
            values = [float(part) for part in str(value).split(",")] if isinstance(value, str) else list(value)
        except ValueError:
            values = []
        if not values or not all(0 < number < LARGEST for number in values):
            self.fail(f"'{value}' is not a list of positive numbers such as 20 or 10,10,20", param, ctx)
        return values


device_option = click.option("--device", help="Where to compute", type=Choice(["auto", "cuda", "cpu"]), default="auto")
