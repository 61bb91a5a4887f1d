"""Registration of the operators: schema, fake and implementation, once, in the library namespace `ept`.

Uses plain `Library.define` and `impl`, which are the cheapest per call: `triton_op` and `custom_op` cost several times
more. One implementation serves every device, either the plain-PyTorch reference or the Triton kernels' launcher.

CUDA, ROCm and XPU devices use the kernels if triton is installed, CPUs the references. `EPT_KERNELS` is read at import:
`reference` makes every device use the references, `triton` fails without triton. `TRITON_INTERPRET=1`, read at the
first call, sends CPU tensors through the kernels, to test them.
"""

import contextlib
import functools
import importlib
import importlib.util
import itertools
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.library import Library, register_fake

NAMESPACE = "ept"

# Held for the life of the process: dropping a Library removes its registrations.
_library = Library(NAMESPACE, "FRAGMENT")

# By operator: its reference, and the module of its launcher if any.
_registered: dict[str, tuple[Callable[..., Any], str | None]] = {}

_with_kernels = {"cuda", "xpu"}  # device types

_choice = os.environ.get("EPT_KERNELS", "")
if _choice not in ("", "triton", "reference"):
    raise ValueError(f"EPT_KERNELS={_choice!r} is unknown: use 'triton' or 'reference', or leave it unset")


@functools.cache
def backend(device: torch.device | str) -> str:
    """Returns what runs the operators on `device`, `"triton"` or `"reference"`; for float64 it is always the latter."""
    device_type = torch.device(device).type
    takes_kernels = device_type in _with_kernels or (device_type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1")
    if _choice == "reference" or not takes_kernels:
        return "reference"
    if importlib.util.find_spec("triton") is not None:
        return "triton"
    if _choice == "triton":
        raise RuntimeError("EPT_KERNELS=triton, but triton is not installed: pip install triton, or unset the variable")
    return "reference"


def take_kernels(device_type: str) -> None:
    """Sends tensors on devices of this type through the kernels from now on, like those on a GPU."""
    _with_kernels.add(device_type)
    backend.cache_clear()
    _function_of.cache_clear()


def register(
    schema: str, reference: Callable[..., Any], fake: Callable[..., Any], launcher: str | None = None, shapes: str = ""
) -> Callable[..., Any]:
    """Registers one operator and returns its callable overload.

    Args:
        schema: argument of `Library.define`, e.g. `"add_one(Tensor x) -> Tensor"`.
        reference: plain PyTorch. Mixed precision is switched off around it and around the launcher, because the
            operators choose their own accumulation type.
        fake: computes output shapes and dtypes without data, for `torch.compile` and meta tensors.
        launcher: `"folder.module"` of this package with a function of the operator's name that launches Triton
            kernels; it is imported at the first call, so that importing the package needs no Triton.
        shapes: of the arguments, checked with `check_shapes` before the reference runs; a launcher checks by itself.

    A second copy of this package in one process (an installed one and one loaded from a kernel repository) finds the
    operators registered and uses them as they are.
    """
    name = schema.partition("(")[0]
    namespace = getattr(torch.ops, NAMESPACE)
    _registered[name] = reference, launcher
    if not hasattr(namespace, name):
        _library.define(schema)
        # Floating-point tensors come first in every schema, then numbers.
        arguments = schema.partition(")")[0].partition("(")[2].split(", ")
        names = [argument.split()[1].partition("=")[0] for argument in arguments]
        tensors = len(list(itertools.takewhile(lambda argument: argument.startswith("Tensor"), arguments)))
        _library.impl(name, _dispatch(name, reference, tensors, names, shapes), "CompositeExplicitAutograd")
        register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)
    return getattr(namespace, name).default


def reference_of(name: str) -> Callable[..., Any]:
    """Returns the reference of the operator `name`, which takes the operator's arguments."""
    return _registered[name][0]


def launcher_of(name: str) -> Callable[..., Any] | None:
    """Imports and returns the launcher of the operator `name`'s Triton kernels; None if it has no kernels."""
    module = _registered[name][1]
    return None if module is None else getattr(importlib.import_module(f".{module}", __package__), name)


class Choices(dict[str, Any]):
    """Meanings of an operator's `argument` by name; any other name is refused with a `ValueError`."""

    def __init__(self, argument: str, **values: Any) -> None:
        super().__init__(values)
        self.argument = argument

    def __missing__(self, name: str) -> Any:
        raise ValueError(f"{self.argument} is {name!r}, expected one of {', '.join(self)}")


def check_shapes(expected: str, **given: Any) -> None:
    """Raises `ValueError` for tensors (or shapes) that do not fit `expected`, such as `"A {of}m r, B {of}r d"`.

    A number is a size, `*rows` any number of dimensions, `{of}` one more if the tensor `of` is given, not None.
    """
    sizes: dict[str, Any] = {}
    for entry in expected.format(**{name: "" if x is None else f"{name} " for name, x in given.items()}).split(", "):
        name, *names = entry.split()
        if (shape := getattr(given.get(name), "shape", given.get(name))) is None:
            continue
        if names[0][0] == "*":
            names[:1] = sizes.setdefault(names[0], [f"{names[0]}{i}" for i in range(len(shape) - len(names) + 1)])
        right = [int(x) if x.isdigit() else sizes.get(x, x) for x in names]
        if len(right) != len(shape) or any(a != b for a, b in zip(right, shape) if isinstance(a, int)):
            raise ValueError(
                f"{name} has shape {[*shape]}, but the other arguments require [{', '.join(map(str, right))}]"
            )
        sizes.update(zip(names, shape))


def compute_dtype(*tensors: torch.Tensor) -> torch.dtype:
    """Returns the dtype in which references compute: float32, or float64 if any of `tensors` is float64."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


@contextlib.contextmanager
def autograd_inside_operators() -> Iterator[None]:
    """Allows a reference to use autograd: inside an operator called by a dispatch mode, such as PyTorch's FLOP counter
    or `opcheck`, a dispatch key excludes autograd; this removes it.
    """
    excluded = torch._C._dispatch_tls_local_exclude_set().remove(torch._C.DispatchKey.AutogradFunctionality)
    guard = torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), excluded)
    with guard, torch.inference_mode(False), torch.enable_grad():
        yield


@functools.cache
def _function_of(name: str, device_type: str) -> Callable[..., Any]:
    """Returns the function that runs the operator `name`: the launcher of its kernels, or the reference."""
    return (launcher_of(name) if backend(device_type) == "triton" else None) or reference_of(name)


def _dispatch(name: str, reference: Callable[..., Any], tensors: int, names: list[str], shapes: str) -> Any:
    def call(*args: Any) -> Any:
        if torch.is_grad_enabled():  # a kernel would silently give no gradient
            for x in args[:tensors]:
                if x is not None and x.requires_grad:
                    raise RuntimeError(
                        f"ept::{name} has no gradients of its own, but an argument requires them: call it from an "
                        "autograd function, as ept.functional does, or within torch.no_grad()"
                    )
        device_type = args[0].device.type
        function = _function_of(name, device_type)
        if function is not reference:
            for x in args[:tensors]:  # any() would make a generator at every call
                if x is not None and x.dtype is torch.float64:
                    function = reference
        if shapes and function is reference:
            check_shapes(shapes, **{**dict.fromkeys(names), **dict(zip(names, args))})
        if not torch.is_autocast_enabled(device_type):
            return function(*args)
        with torch.autocast(device_type, enabled=False):
            return function(*args)

    return call
