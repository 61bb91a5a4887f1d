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
    """Readers-writer lock: any number of calls, or one change. A waiting change holds up new calls."""

    def __init__(self) -> None:
        self._condition = threading.Condition(threading.RLock())
        self._running_calls = self._waiting_changes = 0
        self._in_call = threading.local()

    @contextmanager
    def shared(self) -> Iterator[None]:
        """Holds the lock for a call; calls may be nested within a thread."""
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
        """Holds the lock for a change. Changes may be nested, but not in a call of this thread (RuntimeError)."""
        if getattr(self._in_call, "value", False):
            raise RuntimeError("adapters cannot be changed from within a call of the model: change them between calls")
        with self._condition:  # held to the end, so that no call can begin
            self._waiting_changes += 1
            try:
                self._condition.wait_for(lambda: not self._running_calls)
            finally:
                self._waiting_changes -= 1
                self._condition.notify_all()
            yield

    def __reduce__(self) -> Any:
        return type(self), ()  # a copy of a model gets its own lock


def _holding(lock: Callable[[AdapterLock], AbstractContextManager[None]], method: Method) -> Method:
    """Decorates a method of a model to hold the model's `adapter_lock`, except in compiled graphs."""

    @wraps(method)
    def locked(self: Any, *args: Any, **kwargs: Any) -> Any:
        with nullcontext() if torch.compiler.is_compiling() else lock(self.adapter_lock):
            return method(self, *args, **kwargs)

    return locked  # type: ignore[return-value]


shared, exclusive = partial(_holding, AdapterLock.shared), partial(_holding, AdapterLock.exclusive)


def transactional(method: Method) -> Method:
    """Decorates a change that may fail half-way to hold the lock exclusively, and to be undone if it raises."""

    @wraps(method)
    def undone(self: Any, *args: Any, **kwargs: Any) -> Any:
        configurations = [given for given in (*args, *kwargs.values()) if isinstance(given, EPTConfig)]
        with undone_if_raised(self, *configurations):
            return method(self, *args, **kwargs)

    return exclusive(undone)  # type: ignore[arg-type, return-value]
