"""Registers the operators: schema, fake and implementation, once, in the library namespace ``ept``.

Plain ``Library.define`` / ``impl`` is the cheapest registration per call; ``triton_op`` and ``custom_op`` cost several
times more. Every operator has one implementation that serves every device: the plain-PyTorch reference. A device kernel
takes its place by registering under that device's own dispatch key.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.library import Library, register_fake

NAMESPACE = "ept"

# Held for the life of the process: dropping a Library removes its registrations.
_library = Library(NAMESPACE, "FRAGMENT")


def backend(device: torch.device | str) -> str:
    """Returns what runs the operators on ``device``: ``"reference"`` (plain PyTorch) on every device so far."""
    torch.device(device)
    return "reference"


def register(schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> Callable[..., Any]:
    """Registers one operator and returns its callable overload.

    Args:
        schema: what ``Library.define`` takes, e.g. ``"add_one(Tensor x) -> Tensor"``.
        implementation: runs on every device without an implementation of its own; mixed precision is switched off
            around it, since the operators choose their own accumulation type.
        fake: computes output shapes and dtypes without data, for ``torch.compile`` and meta tensors.

    A second copy of this package in one process (an installed one and one loaded from a kernel repository) finds the
    operators registered and uses them as they are.
    """
    name = schema.partition("(")[0]
    namespace = getattr(torch.ops, NAMESPACE)
    if not hasattr(namespace, name):
        _library.define(schema)
        _library.impl(name, _without_autocast(implementation), "CompositeExplicitAutograd")
        register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)
    return getattr(namespace, name).default


def _without_autocast(implementation: Callable[..., Any]) -> Callable[..., Any]:
    def call(first: torch.Tensor, *args: Any) -> Any:
        device_type = first.device.type
        if not torch.is_autocast_enabled(device_type):
            return implementation(first, *args)
        with torch.autocast(device_type, enabled=False):
            return implementation(first, *args)

    return call
