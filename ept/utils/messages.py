"""Values from files in error messages: cut short, control characters escaped."""

from __future__ import annotations

import reprlib
from collections.abc import Iterable
from typing import Any

_LONGEST_TEXT = 120
_LONGEST_REASON = 1000
_MOST_ITEMS = 8
_MOST_DIGITS = 40


class _Short(reprlib.Repr):
    def repr_int(self, x: int, level: int) -> str:
        # Python refuses to write out very long integers, and a reader has no use for them.
        return repr(x) if abs(x) < 10**_MOST_DIGITS else f"<an integer of {x.bit_length()} bits>"


_short = _Short()
_short.maxlevel = 2
_short.maxstring = _short.maxother = _LONGEST_TEXT
_short.maxlist = _short.maxdict = _short.maxset = _short.maxtuple = _MOST_ITEMS


def shown(value: Any) -> str:
    """`repr(value)`, at most a few lines long whatever `value` is."""
    return _short.repr(value)


def shown_name(name: str) -> str:
    """`name` as it is where it is short and printable, else as `shown` gives it."""
    return name if name.isprintable() and len(name) <= _LONGEST_TEXT else shown(name)


def reason(error: Exception) -> str:
    """What a library says of a file, which may repeat parts of it: cut short, control characters escaped."""
    text = "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in str(error)[:_LONGEST_REASON])
    return text + (" ..." if len(str(error)) > _LONGEST_REASON else "")


def listed(items: Iterable[str], separator: str = ", ") -> str:
    """The first few of `items` in a line, and how many more there are."""
    items = list(items)
    rest = len(items) - _MOST_ITEMS
    return separator.join(items[:_MOST_ITEMS]) + (f"{separator}and {rest} more" if rest > 0 else "")
