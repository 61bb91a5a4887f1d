"""Values from files in error messages: shortened, with control characters escaped."""

from __future__ import annotations

import reprlib
from collections.abc import Iterable, Mapping
from typing import Any

MAX_TEXT = 120
MAX_REASON = 1000
MAX_ITEMS = 8
MAX_DIGITS = 40


class _Repr(reprlib.Repr):
    def repr_int(self, x: int, level: int) -> str:
        # Python refuses to print very long integers, and a reader has no use for them.
        return repr(x) if abs(x) < 10**MAX_DIGITS else f"<an integer of {x.bit_length()} bits>"


_short = _Repr()
_short.maxlevel = 2
_short.maxstring = _short.maxother = MAX_TEXT
_short.maxlist = _short.maxdict = _short.maxset = _short.maxtuple = MAX_ITEMS


def shown(value: Any) -> str:
    """Returns `repr(value)`, at most a few lines long whatever `value` is."""
    return _short.repr(value)


def shown_name(name: str) -> str:
    """Returns `name` as it is if short and printable, else as `shown` does."""
    return name if name.isprintable() and len(name) <= MAX_TEXT else shown(name)


def reason(error: Exception) -> str:
    """Returns a library's message, which may repeat parts of a file, shortened, with control characters escaped."""
    text = "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in str(error)[:MAX_REASON])
    return text + (" ..." if len(str(error)) > MAX_REASON else "")


def listed(items: Iterable[str], separator: str = ", ") -> str:
    """Joins the first few of `items`, and says how many more there are."""
    items = list(items)
    rest = len(items) - MAX_ITEMS
    return separator.join(items[:MAX_ITEMS]) + (f"{separator}and {rest} more" if rest > 0 else "")


def shares(values: Mapping[str, float]) -> str:
    """Formats fractions as percentages, each after its name; only the first few."""
    return listed(f"{name} {share:.1%}" for name, share in values.items())
