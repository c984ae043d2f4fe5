"""What every script's command line shares: one-line errors, exit status, option spelling. Imports no torch.

A script defines a click command with `@command()` and ends in

    main = functools.partial(cli.run, command)

    if __name__ == "__main__":
        sys.exit(main())

so that tests can call `main([...])` in their own process and check the exit status.
"""

from __future__ import annotations

import contextlib
import errno
import math
import os
import re
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial
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
    from click.core import ParameterSource
    from click.shell_completion import shell_complete
except ModuleNotFoundError as missing:
    sys.exit(f"{os.path.basename(sys.argv[0])}: error: {missing_package(missing)}")

MAX_CLASSES = 1_000_000  # to choose from
COMMAND_LINE_ONLY = frozenset(("trust_network_code",))  # options that lower a guard: no --config switches them on
LARGEST = 2**63  # a number on the command line stays below it
MAX_RANGE = 10_000_000  # numbers in a list such as 0-49999,60000: they are kept in memory


class _Signalled(BaseException):
    def __init__(self, signal: int, text: str) -> None:
        super().__init__(text)
        self.signal = signal


class Stopped(_Signalled, UserError):
    """A signal asked a run to end, and it has, with its state saved. Exit status 128 + signal."""


class Interrupted(_Signalled, KeyboardInterrupt):
    """A signal asks this program to end, here and now; its text is how to resume. Exit status 128 + signal."""


class FailedElsewhere(UserError):
    """Another process has failed and prints why; this one ends silently."""


def command(**attrs: Any) -> Callable[[Callable[..., Any]], click.Command]:
    """`click.command` with this project's habits: `-` and `_` are the same in option names, defaults are shown, help
    comes in sections, and there is a --version."""
    return click.command(cls=Command, context_settings=SETTINGS, **attrs)


def group(**attrs: Any) -> Callable[[Callable[..., Any]], click.Group]:
    """`click.group` for a script with subcommands, which are defined by its `command()` and take over its habits."""
    return click.group(cls=Group, context_settings=SETTINGS, no_args_is_help=False, **attrs)


SETTINGS: dict[str, Any] = {
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


class _Versioned(click.Command):
    """A command that knows --version."""

    def __init__(self, *args: Any, **attrs: Any) -> None:
        super().__init__(*args, **attrs)
        text = "Show the versions of this program, Python, torch and CUDA, and the GPUs."
        flag: dict[str, Any] = {"is_flag": True, "is_eager": True, "expose_value": False, "show_default": False}
        self.params.append(click.Option(["--version"], callback=_show_version, help=text, **flag))


def _show_version(ctx: click.Context, param: click.Parameter, wanted: bool) -> None:
    if wanted and not ctx.resilient_parsing:
        from .version import describe

        click.echo("\n".join(describe()))
        ctx.exit()


class Command(_Versioned):
    """A command whose help lists the options by `section`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """As click does; then empty text, of a shell's variable that isn't set perhaps, is refused by name, and a URL
        that a --config names is printed, before anything is fetched."""
        rest = super().parse_args(ctx, args)
        values = {} if ctx.resilient_parsing else given(ctx)
        for param in self.params:
            name, value = max(param.opts, key=len), values.get(str(param.name))
            if value == "":
                raise UsageError(f"{name} is empty; write {name}={param.metavar or 'VALUE'}")
            if "://" in str(value) and os.environ.get("RANK", "0") == "0":
                if value != ctx.params[str(param.name)]:
                    note = "the rest of the address is neither shown nor kept in files; with --config, give it again"
                    print(f"Note: {name}={value}: {note}", file=sys.stderr)
                if ctx.get_parameter_source(str(param.name)) is ParameterSource.DEFAULT_MAP:
                    print(f"From --config: {name}={printable(value)}", flush=True)
        return rest

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        sections: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            if record is not None and not isinstance(param, click.Argument):  # which the text above explains
                sections.setdefault(vars(param).get("section", "Help"), []).append(record)
        for title, rows in sections.items():
            with formatter.section(bold(title if len(sections) > 1 else "Options")):
                formatter.write_dl(rows)


class Group(_Versioned, click.Group):
    """A script with subcommands."""

    command_class = Command


def config_option(read: Callable[[dict[str, Any]], dict[str, Any]]) -> Callable[[F], F]:
    """`--config FILE`: values of options from a JSON file; what is given on the command line besides comes first.

    read: from the file's content to values by the parameters' names. Raises UsageError, or ValueError with a reason.
    """

    def load(ctx: click.Context, param: click.Parameter, path: str | None) -> None:
        if path is not None and not ctx.resilient_parsing:
            ctx.default_map = {**(ctx.default_map or {}), **_typed(ctx, path, read)}

    return click.option(
        "--config",
        help="Take the options from a run's file; the command line takes precedence",
        metavar="JSON",
        is_eager=True,
        expose_value=False,
        callback=load,
    )


def given(ctx: click.Context) -> dict[str, Any]:
    """The values that the command line or its --config gave, as they may be kept (`public_url`), by the parameters'
    names: no defaults."""
    names = [str(param.name) for param in ctx.command.params if param.expose_value]
    values = {n: ctx.params[n] for n in names if ctx.get_parameter_source(n) is not ParameterSource.DEFAULT}
    return {name: public_url(value) if isinstance(value, str) else value for name, value in values.items()}


def _typed(ctx: click.Context, path: str, read: Callable[[dict[str, Any]], dict[str, Any]]) -> dict[str, str]:
    """The values of a --config file as they would be typed: click converts and checks them like others.

    Raises UserError or UsageError for what is no option, or one of COMMAND_LINE_ONLY.
    """
    from .util import parse_json, read_file

    try:
        content = parse_json(read_file(path, "a run's JSON"))
        if not isinstance(content, dict):
            raise ValueError("it holds no JSON object")
        values = read(content)
    except (ValueError, RecursionError) as exc:  # errors of JSON and UTF-8 are ValueErrors
        raise UserError(f"--config={path}: can't be used: {exc}") from exc
    for name in COMMAND_LINE_ONLY.intersection(values):
        raise UsageError(
            f"--config={path}: it sets '{name}', which only the command line may; remove it from the file, and type "
            f"--{name.replace('_', '-')} if that is what you want"
        )
    params = {str(param.name): param for param in ctx.command.params if param.expose_value}
    typed = {}
    for name, value in values.items():
        if name not in params:
            hint = click.NoSuchOption(name, "", possibilities=params).format_message()
            raise UsageError(f"--config={path}: there is no option '{name}'. {hint}".rstrip(". "))
        if value is None:
            continue
        if isinstance(params[name].type, click.types.StringParamType) and not isinstance(value, str):
            raise UsageError(f"--config={path}: {name} should be text, not {value}")
        typed[name] = ",".join(map(str, value)) if isinstance(value, list) else str(value)
        if not typed[name].isprintable():
            shown = f"{name} is {printable(value, 80)}, with characters that are not printed"
            raise UsageError(f"--config={path}: {shown}; type it on the command line")
    return typed


# ----------------------------------------------------------------------------------------------------------------------
# What is shown on a terminal


def style(text: str, **attributes: Any) -> str:
    """`click.style`, on a terminal that is to show it (https://no-color.org)."""
    shown = sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    return click.style(text, **attributes) if shown else text


bold, green = partial(style, bold=True), partial(style, fg="green")


def program(name: str) -> str:
    """How this Python's `name` ("python", "torchrun") is called from here: by its name where the PATH leads to it, by
    its path where the environment is not activated."""
    own, found = Path(sys.executable).with_name(name), shutil.which(name)
    if not own.exists() or (found is not None and Path(found).parent.resolve() == own.parent.resolve()):
        return name
    return str(own.relative_to(Path.cwd()) if own.is_relative_to(Path.cwd()) else own)


# ----------------------------------------------------------------------------------------------------------------------
# Running a command


leaving_by_exit = False  # this process ends with `run`: nothing needs to be taken down


def run(cmd: click.Command, args: Sequence[str] | None = None) -> int:
    """Runs `cmd` and returns its exit status: 0, 1 (any failure), 2 (wrong option), 128 + signal (interrupted).

    Every failure is one line on standard error, from the rank that met it. `EDM_DEBUG=1` shows the traceback too.

    One of several processes that runs its own command line (args None) ends here, and does not return.
    """
    global leaving_by_exit
    leaving_by_exit = args is None and world_size() > 1
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
    variable = f"_{re.sub('[^0-9A-Za-z]', '_', prog).upper()}_COMPLETE"
    if args is None and variable in os.environ:
        return shell_complete(cmd, {}, prog, variable, os.environ[variable])
    if args is None:  # a file name that the terminal's encoding does not know is no reason to stop
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(AttributeError):
                stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    try:
        with cmd.make_context(prog, list(sys.argv[1:] if args is None else args)) as context:
            cmd.invoke(context)
        sys.stdout.flush()
        return 0
    except click.exceptions.Exit as exc:
        return exc.exit_code
    except (Exception, KeyboardInterrupt) as exc:
        return _fail(prog, exc)


def _fail(prog: str, exc: BaseException) -> int:
    """Prints the one line about a failure; returns the exit status."""
    interrupted = isinstance(exc, (KeyboardInterrupt, click.Abort))
    status = 130 if interrupted else 2 if isinstance(exc, (click.UsageError, UsageError)) else 1
    if isinstance(exc, _Signalled):
        status = 128 + exc.signal
    if isinstance(exc, FailedElsewhere):
        time.sleep(3)  # a launcher kills all processes when the first one ends: let that be the one with the message
    if isinstance(exc, FailedElsewhere) or (isinstance(exc, Stopped) and not str(exc)):
        return status
    if interrupted and sys.stderr.isatty():
        print(file=sys.stderr)  # after the ^C that the terminal shows
    if _debugging():
        sys.stderr.write(without_secrets("".join(traceback.format_exception(exc))))
    try:
        sys.stdout.flush()
    except OSError:  # its reader is gone or its disk full: Python would try again at exit, and print many lines
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    rank = f" [rank {os.environ.get('RANK', '?')}]" if world_size() > 1 else ""
    kind = "" if interrupted or isinstance(exc, Stopped) else "error: "
    sys.stderr.write(f"{prog}{rank}: {kind}{printable(_message(exc))}\n")  # at once: print() would let others between
    sys.stderr.flush()
    return status


def _message(exc: BaseException) -> str:
    """One line about `exc` for people."""
    if isinstance(exc, click.ClickException):
        return exc.format_message()
    if isinstance(exc, (UserError, Interrupted)):
        return str(exc)
    if isinstance(exc, (KeyboardInterrupt, click.Abort)):
        return "interrupted"
    if isinstance(exc, OSError):
        return _system_message(exc)
    text = str(exc)
    if isinstance(exc, MemoryError) or type(exc).__name__ == "OutOfMemoryError" or _OUT_OF_MEMORY.search(text):
        return f"out of memory: train.py takes --batch-gpu=auto and --recompute=1, the others a smaller --batch. {text}"
    if isinstance(exc, ModuleNotFoundError):
        return missing_package(exc)
    if isinstance(exc, RecursionError):
        return "a file holds lists or tables nested too deeply (EDM_DEBUG=1 shows where)"
    if isinstance(exc, RuntimeError) and world_size() > 1 and _LOST_PEER.search(f"{type(exc).__name__} {text}"):
        return "another process has ended, or can't be reached any more; unless it was killed, its own message says why"
    return f"unexpected {type(exc).__name__}: {text} (EDM_DEBUG=1 shows where; please report it)"


_OUT_OF_MEMORY = re.compile(r"can't allocate memory|bad_alloc|out of memory", re.IGNORECASE)
_LOST_PEER = re.compile(  # the words of Gloo, NCCL and torch's rendezvous store
    r"closed by peer|reset by peer|broken pipe|timed out|timeout|remote process|socket|Dist[A-Z][a-z]+Error",
    re.IGNORECASE,
)


def _system_message(exc: OSError) -> str:
    where = f": {exc.filename}" if exc.filename else ""
    if exc.errno in (errno.ENOSPC, errno.EDQUOT):
        where = where.replace(":", " while writing", 1)
        return f"the disk is full{where}; free some space and start again, what existed before is intact"
    if isinstance(exc, (FileExistsError, NotADirectoryError)):
        return f"Not a directory{where} (a part of that path is a file); use another path"
    return f"{exc.strerror or exc}{where}"


def world_size() -> int:
    """How many processes were started, as the launcher's variable has it; 1 without a launcher (or for nonsense)."""
    value = os.environ.get("WORLD_SIZE", "")
    return max(int(value), 1) if value.isascii() and value.isdigit() else 1


def _debugging() -> bool:
    return os.environ.get("EDM_DEBUG", "0") not in ("", "0")


def options_in_use() -> dict[str, Any]:
    """The command's options and their values, for comparing processes: without those that name a file to read, which
    may lie elsewhere on another machine, and are compared by what they hold."""
    return {name: value for name, value in click.get_current_context().params.items() if name not in _FILES}


_FILES = {"data", "transfer", "network", "path", "ref", "images", "detector", "spec"}

# ----------------------------------------------------------------------------------------------------------------------
# Kinds of values. LARGEST bounds every number, so that none overflows in what is computed from it.
# Their names complete the sentence "'abc' is not a valid ...".

Bool = click.types.BoolParamType


class _Bounded(click.ParamType):
    """A number within bounds and below LARGEST; or what is `also` allowed, such as the word auto."""

    def __init__(self, *args: Any, also: Any = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.also = also

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str:
        return "INT" if isinstance(self, click.IntRange) else "FLOAT"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if self.also is not None and str(value) == str(self.also):
            return self.also
        number = super().convert(value, param, ctx)
        if not abs(number) < LARGEST:
            problem = "too large a" if LARGEST <= abs(number) < math.inf else "not a finite"
            self.fail(f"'{number}' is {problem} number", param, ctx)
        return number


class Whole(_Bounded, click.IntRange):
    """A whole number."""

    name = "whole number"


class Number(_Bounded, click.FloatRange):
    """A finite number."""

    name = "number"


class Choice(click.Choice[str]):
    """One of some words, in which `-` and `_` are the same too."""

    def normalize_choice(self, choice: Any, ctx: click.Context | None) -> str:
        """The word as it is shown (click would write all with the same dash)."""
        spellings = {word.replace("_", "-"): word for word in self.choices}
        return spellings.get(str(choice).replace("_", "-"), str(choice))


class Parsed(click.ParamType):
    """Text that `parse` turns into a value, or refuses by a ValueError with the reason."""

    name = "list"

    def parse(self, text: Any) -> Any:
        raise NotImplementedError

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        try:
            return self.parse(value)
        except ValueError as exc:
            self.fail(f"'{value}' {exc}", param, ctx)


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


class IntList(Parsed):
    """A comma-separated list of whole numbers from `min` to `max` and of ranges, such as 1,2,5-10."""

    def __init__(self, min: float = -math.inf, max: float = math.inf) -> None:
        self.min, self.max = min, max

    def parse(self, text: Any) -> list[int]:
        try:
            numbers = parse_int_list(text)
        except ValueError as exc:
            raise ValueError("is not a list of whole numbers and ranges such as 1,2,5-10") from exc
        for number in numbers:
            if not self.min <= number <= self.max:
                raise ValueError(f"holds {number}, which is not from {self.min} to {self.max}")
        return numbers


class Seeds(IntList):
    """A list of seeds, of which no two others are the same random numbers: seeds count modulo 2^32."""

    def parse(self, text: Any) -> list[int]:
        seeds, drawn = super().parse(text), dict[int, int]()
        for seed in seeds:
            same = drawn.setdefault(seed % (1 << 32), seed)
            if same != seed:
                raise ValueError(f"holds {same} and {seed}, the same random numbers (modulo 2^32); drop one")
        if not seeds:
            raise ValueError("names no seed at all; write for example 0-63")
        return seeds


class Condition(Parsed):
    """Classes such as 3 or 1,2,5-10, or a label vector such as 0.2,0.8."""

    def parse(self, text: Any) -> list[Any]:
        values: list[Any] = []
        with contextlib.suppress(ValueError):
            values = [float(part) for part in text.split(",")]
        with contextlib.suppress(ValueError):
            values = parse_int_list(text, MAX_CLASSES)
        if not values or (values[0] < 0 and len(values) == 1):
            raise ValueError("is neither a class (3), nor classes (1,2,5-10), nor a label vector (0.2,0.8)")
        return values


class FloatList(Parsed):
    """Comma-separated positive numbers, such as 20 or 10,10,20."""

    def parse(self, text: Any) -> list[float]:
        with contextlib.suppress(ValueError):
            values = [float(part) for part in text.split(",")] if isinstance(text, str) else list(text)
            if all(0 < number < LARGEST for number in values):
                return values
        raise ValueError("is not a list of positive numbers such as 20 or 10,10,20")


trust_option = click.option(
    "--trust-network-code", help="Run the code in a network file of unknown class or version", is_flag=True
)
class_option = click.option(
    "--class",
    "class_idx",
    help="Class of all images, classes to draw from (1,2,5-10), or a label vector (0.2,0.8)  [default: random class]",
    type=Condition(),
)
labels_option = click.option(
    "--labels", help="Draw from the labels of a data set, or of a .npy file", metavar="ZIP|DIR|NPY"
)
device_option = click.option("--device", help="Where to compute", type=Choice(["auto", "cuda", "cpu"]), default="auto")
