"""Progress without a terminal: a line now and then instead of a bar."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import TypeVar

from rich.console import Console

T = TypeVar("T")

LINE_SECONDS = 30.0
"""Maximum seconds between lines without a terminal."""


def with_lines(items: Sequence[T], what: str, console: Console) -> Iterator[T]:
    """Yields the items, and prints the number done and the remaining time every `LINE_SECONDS`."""
    started = printed = time.monotonic()
    for done, item in enumerate(items):
        now = time.monotonic()
        if done and now - printed > LINE_SECONDS:
            print_line(console, f"{what}  {done}/{len(items)} batches  {time_left(now - started, done, len(items))}")
            printed = now
        yield item


def time_left(seconds: float, done: int, total: int) -> str:
    """Formats the remaining time after `done` of `total` took so many seconds."""
    return f"{timedelta(seconds=round(seconds / done * (total - done)))} left"


def print_line(console: Console, line: str) -> None:
    """Prints a line literally, without wrapping it."""
    console.print(line, markup=False, highlight=False, soft_wrap=True)
