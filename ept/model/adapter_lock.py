"""A lock that lets several threads call a model, and one change its adapters between their calls."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial, wraps
from typing import Any, TypeVar

import torch

from ..config import EPTConfig
from .undone import undone_if_raised

Method = TypeVar("Method", bound=Callable[..., Any])


class AdapterLock:
    """Readers-writer lock: any number of calls, or one change. A change that waits holds up new calls."""

    def __init__(self) -> None:
        self._condition = threading.Condition(threading.RLock())
        self._running_calls = self._waiting_changes = 0
        self._in_call = threading.local()

    @contextmanager
    def shared(self) -> Iterator[None]:
        """Holds the lock for a call; calls may be nested in one thread."""
        nested = getattr(self._in_call, "value", False)
        with self._condition:
            self._condition.wait_for(lambda: nested or not self._waiting_changes)
            self._running_calls += 1
        self._in_call.value = True
        try:
            yield
        finally:
            self._in_call.value = nested
            with self._condition:
                self._running_calls -= 1
                self._condition.notify_all()

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Holds the lock for a change. Changes may be nested, but not in a call of this thread: it would never end."""
        if getattr(self._in_call, "value", False):
            raise RuntimeError("adapters cannot be changed from within a call of the model: change them between calls")
        with self._condition:  # held to the end: no call can begin
            self._waiting_changes += 1
            try:
                self._condition.wait_for(lambda: not self._running_calls)
            finally:
                self._waiting_changes -= 1
                self._condition.notify_all()
            yield

    def __reduce__(self) -> Any:
        return type(self), ()  # a copy of a model has a lock of its own


def _holding(lock: Callable[[AdapterLock], AbstractContextManager[None]], method: Method) -> Method:
    """Decorates a method of a model to hold the model's `adapter_lock`; compiled graphs hold no locks."""

    @wraps(method)
    def locked(self: Any, *args: Any, **kwargs: Any) -> Any:
        with nullcontext() if torch.compiler.is_compiling() else lock(self.adapter_lock):
            return method(self, *args, **kwargs)

    return locked  # type: ignore[return-value]


shared = partial(_holding, AdapterLock.shared)


def exclusive(method: Method) -> Method:
    """Decorates a change of a model's adapters: it has the model to itself, and is taken back should it raise."""

    @wraps(method)
    def undone(self: Any, *args: Any, **kwargs: Any) -> Any:
        configurations = [given for given in (*args, *kwargs.values()) if isinstance(given, EPTConfig)]
        with undone_if_raised(self, *configurations):
            return method(self, *args, **kwargs)

    return _holding(AdapterLock.exclusive, undone)  # type: ignore[arg-type, return-value]
