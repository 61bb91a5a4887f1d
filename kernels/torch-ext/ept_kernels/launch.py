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
import itertools
import json
import math
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch

CONFIGS = Path(__file__).parent / "configs"

Config = dict[str, int]
Size = tuple[int, ...]
_Function = TypeVar("_Function", bound=Callable[..., Any])


class AotCase(NamedTuple):
    """One kernel as it is compiled ahead of time, without a GPU.

    Attributes:
        name: of the case, unique. fn: the `@triton.jit` function.
        signature: type of every run-time argument by name, as `triton.compiler.ASTSource` takes it, constants
            included as `"constexpr"`. constexprs: value of every constant by name.
        enable_fp_fusion: as the launcher gives it to Triton; False rounds a product before it is added to.
        weights: quantised weights that a program decodes where its code is run through once; 0: it has none.
        all_registers: whether the launcher adds `all_registers`.
    """

    name: str
    fn: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]
    num_warps: int
    num_stages: int
    enable_fp_fusion: bool = True
    weights: int = 0
    all_registers: bool = False


# A thread of an NVIDIA GPU may have so many registers.
REGISTERS = 255


@dataclass(frozen=True)
class Tunable:
    """One kernel at one size, as the tuner measures it and as its shipped configurations are compiled ahead of time.

    Attributes:
        kernel, size: as the launcher gives them to `config_for`; together unique.
        default: the heuristic's configuration, which is measured first and kept unless another is faster.
        candidates: configurations to try; each replaces the values of `default` that it names. See `grid`.
        operator: the launcher. It has to take its configuration through `config_for`, under a cache made with
            `cached_choice` if any. The whole operator is timed, also where the kernel is one of several in it.
        inputs: `inputs(device, seed)` makes one set of arguments for `operator`, of realistic content.
        reference: the right result for the same arguments, a tensor or several; in float64 wherever `operator`
            rounds (see `in_float64`).
        aot: `aot(config)` is the kernel at this size in that configuration.
        tolerance: largest error allowed, in units of the largest magnitude of a result; None: 1e-5 for a result in
            float32, one unit in the last place for 16 bits; 0: every bit equal.
        variants: as `inputs`, of other kinds that the same configuration serves: the winner has to be right for them
            and not to spill, too.
    """

    kernel: str
    size: Size
    default: Config
    candidates: Sequence[Config]
    operator: Callable[..., Any]
    inputs: Callable[[torch.device, int], tuple[Any, ...]]
    reference: Callable[..., Any]
    aot: Callable[[Config], AotCase]
    tolerance: float | None = None
    variants: Sequence[Callable[[torch.device, int], tuple[Any, ...]]] = ()


def grid(**values: Sequence[int]) -> list[Config]:
    """Every combination of the values: `grid(BLOCK=(16, 32), num_warps=(4, 8))` are four configurations."""
    return [dict(zip(values, combination, strict=True)) for combination in itertools.product(*values.values())]


def in_float64(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` with its floating-point tensor arguments in float64."""

    @functools.wraps(function)
    def wide(*args: Any) -> Any:
        return function(*(x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in args))

    return wide


class _State:
    launches = 0
    compiled: list[Any] | None = None  # what launch() has run, while someone asks for it
    tried: ClassVar[dict[str, Config]] = {}  # kernels and the configurations they take for the time being
    adopted: ClassVar[dict[str, dict[Size, Config]]] = {}  # measured in this process


_choices: list[Any] = []  # caches that hold configurations


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **meta: Any) -> None:
    """Launches `kernel`; nothing is launched for an empty grid."""
    if not all(grid):
        return
    _State.launches += 1
    compiled = kernel[grid](*args, **meta)
    if _State.compiled is not None:
        _State.compiled.append(compiled)


def launches() -> int:
    """Number of kernels launched through `launch` so far in this process."""
    return _State.launches


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


def precision(dtype: torch.dtype, device: torch.device) -> str:
    """`input_precision` of a product of float32 operands whose result is stored in `dtype`.

    TF32 where the matrix units have it and the result is rounded to 16 bits anyway. Otherwise the operands in pieces of
    bfloat16, which all matrix units take: three products of two pieces, or, exact to float32, six of three. The plain
    float32 product would run on the scalar units of an NVIDIA GPU, and its operands overflow the registers.
    """
    if device.type != "cuda":  # ROCm's device type is cuda, too
        return "ieee"
    if dtype == torch.float32:
        return "bf16x6"
    if torch.version.hip and "gfx942" not in torch.cuda.get_device_properties(device).gcnArchName:
        return "bf16x3"
    return "tf32"


def all_registers(device: torch.device) -> Config:
    """The launch option that lets a kernel take all registers of a thread: the assembler for NVIDIA GPUs otherwise
    spills a few of a long one, to fit more programs at a time. Other compilers do not know it and need none.
    """
    return {"maxnreg": REGISTERS} if device.type == "cuda" and not torch.version.hip else {}


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
