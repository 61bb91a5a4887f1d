"""Calls of a model and changes of its adapters from several threads: any number of calls at a time, or one change.

A change (adding, loading, deleting, setting, folding an adapter) waits for the calls that are running and holds up new
ones; calls do not hold up each other.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, TypeVar

import torch

Method = TypeVar("Method", bound=Callable[..., Any])


class AdapterLock:
    """Admits calls together and changes alone. A copy of it is a new lock."""

    def __init__(self) -> None:
        self._condition = threading.Condition(threading.RLock())
        self._calls = self._waiting_changes = 0
        self._of_thread = threading.local()  # how many calls this thread is within

    @contextmanager
    def call(self) -> Iterator[None]:
        """A call within: it waits for a change that is running or waiting, unless this thread is in a call already."""
        depth = getattr(self._of_thread, "depth", 0)
        with self._condition:
            self._condition.wait_for(lambda: depth or not self._waiting_changes)
            self._calls += 1
        self._of_thread.depth = depth + 1
        try:
            yield
        finally:
            self._of_thread.depth = depth
            with self._condition:
                self._calls -= 1
                self._condition.notify_all()

    @contextmanager
    def change(self) -> Iterator[None]:
        """A change within; changes may be nested in one thread.

        Raises:
            RuntimeError: this thread is in a call, which would wait for itself.
        """
        if getattr(self._of_thread, "depth", 0):
            raise RuntimeError("adapters cannot be changed from within a call of the model: change them between calls")
        with self._condition:  # held to the end: no call can begin
            self._waiting_changes += 1
            try:
                self._condition.wait_for(lambda: not self._calls)
            finally:
                self._waiting_changes -= 1
                self._condition.notify_all()
            yield

    def __reduce__(self) -> Any:
        return type(self), ()


def a_call(method: Method) -> Method:
    """`method` of a model with `adapter_lock`, as a call. Compiled graphs hold no locks."""

    @wraps(method)
    def locked(self: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return method(self, *args, **kwargs)
        with self.adapter_lock.call():
            return method(self, *args, **kwargs)

    return locked  # type: ignore[return-value]


def a_change(method: Method) -> Method:
    """`method` of a model with `adapter_lock`, as a change."""

    @wraps(method)
    def locked(self: Any, *args: Any, **kwargs: Any) -> Any:
        with self.adapter_lock.change():
            return method(self, *args, **kwargs)

    return locked  # type: ignore[return-value]
