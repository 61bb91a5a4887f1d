"""Registers the operators: schema, fake and implementation, once, in the library namespace ``ept``.

Plain ``Library.define`` / ``impl`` is the cheapest registration per call; ``triton_op`` and ``custom_op`` cost several
times more. Every operator has one implementation for every device: the plain-PyTorch reference, or the launcher of the
Triton kernels.

The kernels are checked under Triton's interpreter and compiled ahead of time, and have not run on a GPU yet, so they
are to be asked for: ``EPT_KERNELS=triton`` takes them on CUDA, ROCm and XPU devices. ``TRITON_INTERPRET=1`` sends CPU
    tensors through
them, which is how they are tested. Otherwise, and with ``EPT_KERNELS=reference``, every device takes the reference.
Both variables are read when this package is imported.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable
from typing import Any

import torch
from torch.library import Library, register_fake

NAMESPACE = "ept"

# Held for the life of the process: dropping a Library removes its registrations.
_library = Library(NAMESPACE, "FRAGMENT")

_CHOICES = ("", "triton", "reference")
_choice = os.environ.get("EPT_KERNELS", "")
if _choice not in _CHOICES:
    raise ValueError(f"EPT_KERNELS={_choice!r} is unknown: use 'triton' or 'reference', or leave it unset")


def backend(device: torch.device | str) -> str:
    """What runs the operators on ``device``: ``"triton"`` or ``"reference"``. float64 tensors always take the
    reference.
    """
    return _backend(torch.device(device).type)


@functools.cache
def _backend(device_type: str) -> str:
    if _choice == "reference" or importlib.util.find_spec("triton") is None:
        return "reference"
    interpreting = device_type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
    asked_for = device_type in ("cuda", "xpu") and _choice == "triton"
    return "triton" if interpreting or asked_for else "reference"


def register(
    schema: str, reference: Callable[..., Any], fake: Callable[..., Any], launcher: str | None = None
) -> Callable[..., Any]:
    """Registers one operator and returns its callable overload.

    Args:
        schema: what ``Library.define`` takes, e.g. ``"add_one(Tensor x) -> Tensor"``.
        reference: plain PyTorch; mixed precision is switched off around it, since the operators choose their own
            accumulation type.
        fake: computes output shapes and dtypes without data, for ``torch.compile`` and meta tensors.
        launcher: ``"module"`` of this package with a function of the operator's name that launches Triton kernels; it
            is imported at the first call, so that importing the package needs no Triton.

    A second copy of this package in one process (an installed one and one loaded from a kernel repository) finds the
    operators registered and uses them as they are.
    """
    name = schema.partition("(")[0]
    namespace = getattr(torch.ops, NAMESPACE)
    if not hasattr(namespace, name):
        _library.define(schema)
        _library.impl(name, _dispatch(name, reference, launcher), "CompositeExplicitAutograd")
        register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)
    return getattr(namespace, name).default


def _dispatch(name: str, reference: Callable[..., Any], launcher: str | None) -> Callable[..., Any]:
    @functools.cache
    def launch() -> Callable[..., Any]:
        return getattr(importlib.import_module(f".{launcher}", __package__), name)

    def call(first: torch.Tensor, *args: Any) -> Any:
        if launcher is not None and _backend(first.device.type) == "triton" and not _has_float64(first, args):
            return launch()(first, *args)
        device_type = first.device.type
        if not torch.is_autocast_enabled(device_type):
            return reference(first, *args)
        with torch.autocast(device_type, enabled=False):
            return reference(first, *args)

    return call


def _has_float64(first: torch.Tensor, rest: tuple[Any, ...]) -> bool:
    return first.dtype == torch.float64 or any(isinstance(x, torch.Tensor) and x.dtype == torch.float64 for x in rest)
