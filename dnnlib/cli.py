"""What every script's command line shares: one-line errors, exit status, option spelling. Imports no torch.

A script defines a click command with `@command()` and ends in

    def main(args: Sequence[str] | None = None) -> int:
        return cli.run(command, args)

    if __name__ == "__main__":
        sys.exit(main())

so that tests can call `main([...])` in their own process and look at the exit status.
"""

from __future__ import annotations

import errno
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import click


class UserError(Exception):
    """A user's mistake or a bad file. Its text is one line: what is wrong, where, and what to do. Exit status 1."""


class UsageError(UserError):
    """A wrong option that is only noticed after parsing (it contradicts a file, say). Exit status 2."""


def command(**attrs: Any) -> Callable[[Callable[..., Any]], click.Command]:
    """`click.command` with this project's habits: `-` and `_` are the same in option names, defaults are shown."""
    return click.command(context_settings=_settings(), **attrs)


def group(**attrs: Any) -> Callable[[Callable[..., Any]], click.Group]:
    """`click.group` for a script with subcommands, which are defined by its `command()` and take over its habits."""
    return click.group(context_settings=_settings(), no_args_is_help=False, **attrs)


def _settings() -> dict[str, Any]:
    return {
        "token_normalize_func": lambda token: token.replace("_", "-"),
        "help_option_names": ["-h", "--help"],
        "max_content_width": 120,
        "show_default": True,
    }


def run(cmd: click.Command, args: Sequence[str] | None = None) -> int:
    """Runs `cmd` and returns its exit status: 0, 1 (any failure), 2 (wrong option), 128 + signal (interrupted).

    Every failure is one line on standard error, from the rank that met it. `EDM_DEBUG=1` shows the traceback too.
    """
    prog = os.path.basename(sys.argv[0]) if args is None else f"{cmd.name}.py"
    try:
        result = cmd.main(args=None if args is None else list(args), prog_name=prog, standalone_mode=False)
        return result if isinstance(result, int) else 0
    except click.exceptions.Exit as exc:
        return exc.exit_code
    except (click.Abort, KeyboardInterrupt) as exc:
        return _fail(prog, "interrupted", 130, exc)
    except (click.UsageError, UsageError) as exc:
        return _fail(prog, _message(exc), 2, exc)
    except Exception as exc:
        return _fail(prog, _message(exc), 1, exc)


def _message(exc: BaseException) -> str:
    if isinstance(exc, click.ClickException):
        return exc.format_message()
    if isinstance(exc, UserError):
        return str(exc)
    if isinstance(exc, OSError) and exc.errno in (errno.ENOSPC, errno.EDQUOT):
        where = f" while writing {exc.filename}" if exc.filename else ""
        return f"the disk is full{where}; free some space and start again, what existed before is intact"
    if isinstance(exc, OSError) and exc.strerror:
        return f"{exc.strerror}: {exc.filename}" if exc.filename else exc.strerror
    if isinstance(exc, MemoryError) or type(exc).__name__ == "OutOfMemoryError":
        return f"out of memory: use a smaller --batch-gpu (train.py) or --batch (the others). {exc}".strip()
    return f"unexpected {type(exc).__name__}: {exc} (EDM_DEBUG=1 shows where; please report it)"


def _fail(prog: str, message: str, status: int, exc: BaseException) -> int:
    if os.environ.get("EDM_DEBUG", "0") not in ("", "0"):
        traceback.print_exception(exc)
    rank = f" [rank {os.environ['RANK']}]" if int(os.environ.get("WORLD_SIZE", "1")) > 1 else ""
    sys.stdout.flush()
    print(f"{prog}{rank}: error: {' '.join(message.split())}", file=sys.stderr, flush=True)
    return status


def parse_int_list(text: str | Sequence[int]) -> list[int]:
    """'1,2,5-10' -> [1, 2, 5, 6, 7, 8, 9, 10]. An empty range ('9-7') gives nothing. Raises ValueError."""
    if not isinstance(text, str):
        return [int(value) for value in text]
    values: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)-(\d+)\s*", part)
        values += range(int(match[1]), int(match[2]) + 1) if match else [int(part)]
    return values


class IntList(click.ParamType):
    """A comma-separated list of whole numbers and ranges, such as 0-63 or 1,2,5-10."""

    name = "list"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[int]:
        try:
            return parse_int_list(value)
        except ValueError:
            self.fail(f"'{value}' is not a list of whole numbers such as 0-63 or 1,2,5-10", param, ctx)


class FloatList(click.ParamType):
    """Comma-separated positive numbers, such as 20 or 10,10,20."""

    name = "list"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[float]:
        try:
            values = [float(part) for part in str(value).split(",")] if isinstance(value, str) else list(value)
        except ValueError:
            values = []
        if not values or not all(0 < number < float("inf") for number in values):
            self.fail(f"'{value}' is not a list of positive numbers such as 20 or 10,10,20", param, ctx)
        return values
