"""The user's mistakes, each with one line that says where, what rule, what was found and what to do.

`main.py` prints a `UserError` as a single line on stderr and exits with 2. Anything else that escapes is a
fault of the program: it keeps its traceback and exits with 1. Inner invariants use `assert`, never these.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Something the user can put right; its text is one line, ready to print."""


class ConfigError(UserError):
    """A setting, flag or YAML key that is unknown, out of range or contradicts another."""


class DataError(UserError):
    """Films, manifests or prediction tables that cannot be used as they stand."""


class CheckpointError(UserError):
    """A checkpoint or weights file that is missing, damaged, of another model or of a newer format."""


class CollectiveError(Exception):
    """Processes of one run that no longer answer one another: no mistake of the user, and another start may go well."""


class ServingError(UserError):
    """A request or a server setting that cannot be honoured."""


class RequestError(ServingError):
    """One request that is refused: its HTTP status, and the seconds after which to try again."""

    def __init__(self, status: int, message: str, *, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.status, self.retry_after = status, retry_after


def nearest(name: str, known: Iterable[str], *, count: int = 1) -> str:
    """'; did you mean X?' for the known names closest to `name`, or '' where none is close."""
    close = difflib.get_close_matches(name, list(known), n=count, cutoff=0.5)
    return f"; did you mean {' or '.join(map(repr, close))}?" if close else ""


def first_line(error: BaseException) -> str:
    """The first line of a library's error, shortened; its type where it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0][:120] if lines else type(error).__name__


def examples(items: Iterable[object], *, count: int = 3) -> str:
    """The first few items for an error line: 'a, b, c and 4 more'."""
    listed = list(items)
    shown = ", ".join(str(item) for item in listed[:count])
    return f"{shown} and {len(listed) - count} more" if len(listed) > count else shown
