"""What the kernels' launchers share: entering the device, counting launches, measured configurations.

A configuration is a set of meta-parameters of one kernel (block sizes, `num_warps`, `num_stages`). Measured ones
are data, one file a device, `configs/<device name>.json`, written by `python -m ept_kernels.dev.tune`:

    {"device": ..., "kernels": {kernel: {size: {meta-parameter: number}}}, "measurements": [...]}

`size` is one or more whole numbers joined by `x` (`"4096"`, `"14336x4096"`): what the best choice depends on
smoothly, such as the embedding width. What has to match exactly belongs to the name of the kernel
(`"prompted_embedding/16-bit"`). The nearest size is taken, by the distance of the logarithms; where nothing was
measured, the heuristic. Other numbers that are measured a device are kept in the same way under a name with a dot, such
as the path of a product:
`config_for("matmul_4bit.path/16-bit", (tokens, rows, columns), device, {"PATH": 1})["PATH"]`.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch

CONFIGS = Path(__file__).parent / "configs"

Config = dict[str, int]
Size = tuple[int, ...]
_Function = TypeVar("_Function", bound=Callable[..., Any])


class Launch(NamedTuple):
    """One launch of a kernel, as the launcher gives it to Triton."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    meta: dict[str, Any]


class _State:
    launches = 0
    compiled: list[Any] | None = None  # what launch() has run, while someone asks for it
    recorded: list[Launch] | None = None  # what launch() was given, while nothing is to run
    architecture: str | None = None  # that launches are recorded for
    tried: ClassVar[dict[str, Config]] = {}  # kernels and the configurations they take for the time being
    adopted: ClassVar[dict[str, dict[Size, Config]]] = {}  # measured in this process


_choices: list[Any] = []  # caches that hold configurations


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **meta: Any) -> None:
    """Launches `kernel`; nothing is launched for an empty grid."""
    if not all(grid):
        return
    _State.launches += 1
    if _State.recorded is not None:
        _State.recorded.append(Launch(kernel, grid, args, meta))
        return
    compiled = kernel[grid](*args, **meta)
    if _State.compiled is not None:
        _State.compiled.append(compiled)


def launches() -> int:
    """Counts the kernels launched through `launch` so far in this process."""
    return _State.launches


@contextlib.contextmanager
def recording(architecture: str) -> Iterator[list[Launch]]:
    """Collects what launchers launch, as they would on a GPU of `architecture`, and runs none of it: results of
    CPU tensors stay uninitialised.
    """
    _State.recorded, _State.architecture = [], architecture
    _forget_choices()
    try:
        yield _State.recorded
    finally:
        _State.recorded = _State.architecture = None
        _forget_choices()


@contextlib.contextmanager
def compiled_kernels() -> Iterator[list[Any]]:
    """Collects what `launch` runs: Triton's compiled kernels; None for each under the interpreter."""
    _State.compiled = []
    try:
        yield _State.compiled
    finally:
        _State.compiled = None


def on_device(tensor: torch.Tensor) -> contextlib.AbstractContextManager[Any]:
    """Enters the device that `tensor` lies on: Triton launches on the current one."""
    if tensor.device.type == "cpu":
        return contextlib.nullcontext()
    return torch.get_device_module(tensor.device).device(tensor.device)


def config_for(kernel: str, size: int | Size, device: torch.device, default: Config) -> Config:
    """Meta-parameters of `kernel` at `size`: the nearest measured ones of this device, else `default`.

    What the measured ones leave out is taken from `default`.
    """
    if (tried := _State.tried.get(kernel)) is not None:
        return {**default, **tried}
    known = dict(_State.adopted.get(kernel, {}))
    if device.type != "cpu":
        known = {**_measured(device).get(kernel, {}), **known}
    size = size if isinstance(size, tuple) else (size,)
    measured = {key: config for key, config in known.items() if len(key) == len(size)}
    if not measured:
        return default
    return {**default, **measured[min(measured, key=lambda key: _distance(key, size))]}


def cached_choice(function: _Function) -> _Function:
    """`functools.lru_cache` for functions whose result depends on `config_for`: emptied by `trying`."""
    cached = functools.lru_cache(maxsize=512)(function)
    _choices.append(cached)
    return cached  # type: ignore[return-value]


@contextlib.contextmanager
def trying(kernel: str, config: Config) -> Iterator[None]:
    """Within, `kernel` takes `config` (its defaults where it names nothing) at every size, on every device."""
    _State.tried[kernel] = config
    _forget_choices()
    try:
        yield
    finally:
        del _State.tried[kernel]
        _forget_choices()


@contextlib.contextmanager
def adopting(kernel: str, size: Size, config: Config) -> Iterator[None]:
    """Within, `config` counts as measured for `kernel` at `size`, before what the device's file says."""
    _State.adopted.setdefault(kernel, {})[size] = config
    _forget_choices()
    try:
        yield
    finally:
        del _State.adopted[kernel][size]
        _forget_choices()


def padded(size: int) -> int:
    """The power of two from 16 up that holds `size`: the least that a matrix product takes."""
    return max(16, 1 << max(size - 1, 0).bit_length())


def architecture(device: torch.device) -> str:
    """Names what launch choices depend on: the type of `device`, but `"gfx942"` or `"hip"` for AMD GPUs, whose type is
    `"cuda"`, too.
    """
    if _State.architecture is not None:
        return _State.architecture
    if device.type != "cuda" or not torch.version.hip:
        return device.type
    return "gfx942" if "gfx942" in torch.cuda.get_device_properties(device).gcnArchName else "hip"


def precision(dtype: torch.dtype, device: torch.device) -> str:
    """Chooses the `input_precision` of a product of float32 operands whose result is stored in `dtype`.

    TF32 where the matrix units have it and the result is rounded to 16 bits anyway. Otherwise the operands in pieces of
    bfloat16, which all matrix units take: three products of two pieces, or, exact to float32, six of three. The plain
    float32 product would run on the scalar units of an NVIDIA GPU, and its operands overflow the registers.
    """
    found = architecture(device)
    if found not in ("cuda", "gfx942", "hip"):
        return "ieee"
    if dtype == torch.float32:
        return "bf16x6"
    return "bf16x3" if found == "hip" else "tf32"


def all_registers(device: torch.device) -> Config:
    """Returns the launch option that lets a kernel take all 255 registers of a thread: the assembler for NVIDIA GPUs
    otherwise spills a few of a long one, to fit more programs at a time. Other compilers do not know it and need none.
    """
    return {"maxnreg": 255} if architecture(device) == "cuda" else {}


def load_configs(path: Path) -> dict[str, dict[Size, Config]]:
    """The configurations in `path`, by kernel and size.

    Raises:
        ValueError: the file is not as this module's docstring says; the message names the place.
    """
    try:
        kernels = json.loads(path.read_text(encoding="utf-8"))["kernels"]
        return {kernel: {_size(key): _config(c) for key, c in sizes.items()} for kernel, sizes in kernels.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        detail = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(
            f"{path} is damaged ({detail}): write it again with `python -m ept_kernels.dev.tune`, or delete it"
        ) from error


def config_file(device: torch.device) -> Path:
    """Where the measured configurations of `device` are kept."""
    name = torch.get_device_module(device).get_device_name(device)
    return CONFIGS / (re.sub(r"[^A-Za-z0-9]+", "_", name).strip("_") + ".json")


@functools.cache
def _measured(device: torch.device) -> dict[str, dict[Size, Config]]:
    return _read_once(config_file(device))


@functools.cache
def _read_once(path: Path) -> dict[str, dict[Size, Config]]:
    """Of one device model; the warning comes once, however many such devices and kernels there are."""
    if not path.is_file():
        warnings.warn(
            f"no measured launch configurations {path.name}: heuristic ones are used. `python -m ept_kernels.dev.tune` "
            "measures them",
            stacklevel=2,
        )
        return {}
    try:
        return load_configs(path)
    except ValueError as error:
        warnings.warn(f"heuristic launch configurations are used: {error}", stacklevel=2)
        return {}


def _forget_choices() -> None:
    for cached in _choices:
        cached.cache_clear()


def _size(key: str) -> Size:
    size = tuple(int(number) for number in key.split("x"))
    if min(size) < 1:
        raise ValueError(f"size {key!r}: its numbers have to be 1 or more")
    return size


def _config(config: Any) -> Config:
    wrong = {name: value for name, value in config.items() if type(value) is not int or value < 0}
    if wrong or not config:
        raise ValueError(f"configuration {config}: its values have to be whole numbers from 0 up")
    return config


def _distance(key: Size, size: Size) -> float:
    return sum(math.log(a / max(b, 1)) ** 2 for a, b in zip(key, size, strict=True))
