"""Errors that are a user's to mend, and text from files made fit to be shown. Imports nothing of this project."""

from __future__ import annotations

import re

MAX_SHOWN = 1000  # characters of a message, an error or a log line that quote files


class UserError(Exception):
    """A user's mistake or a bad file. Its text is one line: what is wrong, where, and what to do. Exit status 1."""


class UsageError(UserError):
    """A wrong option that is only noticed after parsing (it contradicts a file, say). Exit status 2."""


def printable(text: object, limit: int = MAX_SHOWN) -> str:
    """`text` on one line of at most `limit` (>= 9) characters, its middle left out where it is longer, without what a
    terminal would obey (names in files and archives may hold anything), and with every URL as by `public_url`.

    Every string from a file passes through here on its way to a terminal, a log or an error.
    """
    line = " ".join(_shortened(without_secrets(str(text)), limit).split())
    if not line.isprintable():
        line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)
    return _shortened(line, limit)


def _shortened(text: str, limit: int) -> str:
    end = limit // 3
    return text if len(text) <= limit else f"{text[: limit - end - 5]} ... {text[-end:]}"


def public_url(source: str) -> str:
    """A path or URL, or an argument that ends in one, as it may be shown and kept: a URL without user name, password,
    query and fragment, which may be secrets."""
    return _ADDRESS.sub(r"\1\2", source)


def without_secrets(text: str) -> str:
    """Lines of text with every URL as by `public_url`."""
    return _ADDRESS_IN_TEXT.sub(lambda match: public_url(url := match[0].rstrip(".:;,)]")) + match[0][len(url) :], text)


_ADDRESS = re.compile(r"\b((?!file:)[a-z][a-z0-9+.-]{0,20}://)(?:[^/?#]*@)?([^?#]*).*", re.IGNORECASE | re.DOTALL)
_ADDRESS_IN_TEXT = re.compile(r"""\b[a-z][a-z0-9+.-]{0,20}://[^\s"'<>]+""", re.IGNORECASE)
