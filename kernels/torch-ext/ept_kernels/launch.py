"""Launching: entering the device, counting and watching launches, measured configurations.

A configuration is a set of meta-parameters of one kernel (block sizes, `num_warps`, `num_stages`). Measured ones
are data, one file per device, `configs/<device name>.json`, written by `dev/tune.py`:

    {"device": ..., "target": ..., "kernels": {kernel: {size: {meta-parameter: number}}}, "measurements": [...]}

`size` is one or more whole numbers joined by `x` (`"4096"`, `"14336x4096"`) on which the best choice depends smoothly,
such as the embedding width. A property that has to match exactly is part of the kernel's name
(`"prompted_embedding/16-bit"`). The nearest size is used, by the distance of the logarithms, or the heuristic if none
is near. Other numbers measured per device have a name with a dot, such as the path of a product:
`config_for("matmul_4bit.path/16-bit", (tokens, rows, columns), device, {"PATH": 1})["PATH"]`.
"""

import contextlib
import contextvars
import functools
import json
import math
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

CONFIGS = Path(__file__).parent / "configs"
TUNER = "python -m ept_kernels.dev.tune"

Config = dict[str, int]
Size = tuple[int, ...]
Kinds = tuple[bool, tuple[Any, ...], torch.device, tuple[Any, ...]]
_Function = TypeVar("_Function", bound=Callable[..., Any])


class Launch(NamedTuple):
    """One call of `launch`, with the compiled kernel (None under the interpreter)."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    meta: dict[str, Any]
    compiled: Any


class _State:
    launches = 0
    watched: list[Launch] | None = None  # a list while launches are watched
    architecture: int | str | None = None  # of the GPU that CPU tensors stand for: capability (90) or "gfx942"
    tried: dict[str, Config] = {}  # by kernel: the configuration it uses for now


_choices: list[Any] = []  # caches that hold configurations


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **meta: Any) -> Any:
    """Launches `kernel` and returns what Triton has compiled for it; an empty grid launches nothing.

    Fuses products with sums unless `meta` says otherwise: Triton 3.9 warns that its default will no longer do so.
    """
    if not all(grid):
        return None
    _State.launches += 1
    compiled = kernel[grid](*args, **_with_fusion(meta))
    if _State.watched is not None:
        _State.watched.append(Launch(kernel, grid, args, meta, compiled))
    return compiled


def _with_fusion(meta: dict[str, Any]) -> dict[str, Any]:
    return {"enable_fp_fusion": True, **meta}


class Prepared:
    """A launch of `kernel` without its tensors, which are its first arguments and are passed in the call.

    Triton inspects every argument in Python, which takes most of a launch's host time. To do this only once, callers
    cache these objects with `cached_choice`, by the `kinds` of the tensors.
    """

    def __init__(self, kernel: Any, grid: Size, numbers: tuple[float, ...], meta: dict[str, Any], kinds: Kinds):
        self.kernel, self.grid, self.numbers, self.meta = kernel, grid, numbers, meta
        self.is_kept = kinds[0] and all(grid)
        self.is_new = all(grid)  # Triton may have to compile it
        self.run: Callable[..., Any] | None = None
        self.rest: tuple[Any, ...] = ()

    def __call__(self, *tensors: torch.Tensor | None) -> None:
        if self.run is not None and _State.watched is None:
            _State.launches += 1
            self.run(*tensors, *self.rest)
            return
        compiled = launch(self.kernel, self.grid, *tensors, *self.numbers, **self.meta)
        self.is_new = False
        if self.is_kept and hasattr(type(compiled), "__getitem__"):  # the interpreter compiles nothing
            constants = self.kernel.arg_names[len(tensors) + len(self.numbers) :]
            self.rest = (*self.numbers, *(self.meta[name] for name in constants))
            self.run = compiled[(*self.grid, 1, 1)[:3]]


Call = tuple[Prepared, tuple[torch.Tensor | None, ...]]


def in_turn(calls: list[Call]) -> None:
    """Runs launches, each with its tensors; kernels that Triton has to compile first are compiled in parallel."""
    new = [call for call in calls if call[0].is_new]
    if len(new) > 1:
        import triton

        # Triton 3.4 has no such mode, and under the interpreter this would run the kernels.
        has_mode = hasattr(triton, "AsyncCompileMode") and isinstance(new[0][0].kernel, triton.JITFunction)
        if has_mode and not _parses_one_at_a_time(sys.version_info[:3]):
            contextvars.Context().run(_compile, new)  # outside a mode that the caller may be in
    for run, tensors in calls:
        run(*tensors)


def _parses_one_at_a_time(python: tuple[int, ...]) -> bool:
    """Checks whether `ast.parse` in several threads may end in a SystemError (CPython issue 106905)."""
    return (3, 11) <= python < (3, 11, 8) or (3, 12) <= python < (3, 12, 2)


def _compile(calls: list[Call]) -> None:
    import triton

    with ThreadPoolExecutor(len(calls)) as executor, triton.AsyncCompileMode(executor):
        for run, tensors in calls:
            run.kernel.run(*tensors, *run.numbers, grid=run.grid, warmup=True, **_with_fusion(run.meta))


def kinds(first: torch.Tensor, *others: torch.Tensor | None) -> Kinds:
    """Returns what launches depend on: whether all addresses are multiples of 16 bytes, types, the device, shapes.

    Raises:
        ValueError: the tensors are on several devices; a kernel cannot read another device's memory.
    """
    addresses, types, shapes = first.data_ptr(), list[Any]((first.dtype,)), list[Any]((first.shape,))
    index, elsewhere = first.get_device(), 0
    for x in others:
        if x is None:
            types.append(None)
            shapes.append(None)
        else:
            addresses |= x.data_ptr()
            types.append(x.dtype)
            shapes.append(x.shape)
            elsewhere |= x.get_device() ^ index
    if elsewhere:
        devices = {str(x.device) for x in (first, *others) if x is not None}
        raise ValueError(f"tensors are on {' and '.join(sorted(devices))}: move them to one device")
    return addresses % 16 == 0, tuple(types), first.device, tuple(shapes)


def launches() -> int:
    """Counts the kernels launched through `launch` so far in this process."""
    return _State.launches


@contextlib.contextmanager
def _state(name: str, value: Any) -> Iterator[Any]:
    """Changes an attribute of the state within the context, and clears cached choices."""
    before = getattr(_State, name)
    setattr(_State, name, value)
    _forget_choices()
    try:
        yield value
    finally:
        setattr(_State, name, before)
        _forget_choices()


def watched() -> contextlib.AbstractContextManager[list[Launch]]:
    """Collects the launches within the context."""
    return _state("watched", [])


def acting_as(architecture: int | str) -> contextlib.AbstractContextManager[Any]:
    """Makes launchers choose as on a GPU of this compute capability (90) or AMD name, wherever their tensors are."""
    return _state("architecture", architecture)


def configured(configs: dict[str, Config]) -> contextlib.AbstractContextManager[Any]:
    """Makes kernels use `configs`, completed by their defaults, at every size and on every device."""
    return _state("tried", {**_State.tried, **configs})


_device_module = functools.cache(torch.get_device_module)
_HERE = contextlib.nullcontext()


def on_device(tensor: torch.Tensor) -> contextlib.AbstractContextManager[Any]:
    """Enters the device of `tensor`, if it is not the current one, on which Triton launches."""
    device = tensor.device
    if device.type == "cpu" or _device_module(device.type).current_device() == device.index:
        return _HERE
    return _device_module(device.type).device(device)


def config_for(kernel: str, size: int | Size, device: torch.device, default: Config, exact: int = 0) -> Config:
    """Chooses meta-parameters of `kernel` at `size`: the device's nearest measured ones, completed from `default`.

    A measured size is near if its numbers are within a factor of two in the root mean square of the logarithms, and the
    first `exact` ones are equal.
    """
    if (tried := _State.tried.get(kernel)) is not None:
        return {**default, **tried}
    known = {} if device.type == "cpu" else _measured(config_file(device)).get(kernel, {})
    wanted = size if isinstance(size, tuple) else (size,)

    def distance(key: Size) -> float:
        return sum(math.log(a / max(b, 1)) ** 2 for a, b in zip(key, wanted, strict=True))

    alike = [key for key in known if len(key) == len(wanted) and key[:exact] == wanted[:exact]]
    near = [key for key in alike if distance(key) < len(wanted) * math.log(2.001) ** 2]
    return {**default, **known[min(near, key=distance)]} if near else default


def cached_choice(function: _Function) -> _Function:
    """Caches a function whose result depends on `config_for`; the cache is emptied when configurations change."""
    cached = functools.lru_cache(maxsize=4096)(function)  # by shape, new at every length of a decoder
    _choices.append(cached)
    return cached  # type: ignore[return-value]


def key(kernel: str, dtype: torch.dtype) -> str:
    """Names `kernel` in a file of measured configurations, for inputs of `dtype`."""
    return f"{kernel}/{8 * dtype.itemsize}-bit"


def padded(size: int) -> int:
    """Pads `size` to a power of two, at least 16, the minimum for a matrix product."""
    return max(16, 1 << max(size - 1, 0).bit_length())


def architecture(device: torch.device) -> str:
    """Returns the type of `device`, but `"gfx942"` or `"hip"` for AMD GPUs, whose type is also `"cuda"`."""
    if _State.architecture is not None:
        return "cuda" if isinstance(_State.architecture, int) else _State.architecture
    if device.type != "cuda" or not torch.version.hip:
        return device.type
    return "gfx942" if "gfx942" in torch.cuda.get_device_properties(device).gcnArchName else "hip"


def has_tensor_memory(device: torch.device) -> bool:
    """Checks whether products are accumulated in a separate memory of 512 columns, as on sm_100 and sm_103."""
    if isinstance(_State.architecture, int):
        return _State.architecture // 10 == 10
    return architecture(device) == "cuda" and torch.cuda.get_device_capability(device)[0] == 10


def precision(dtype: torch.dtype, device: torch.device) -> str:
    """Chooses the `input_precision` of a product of float32 operands whose result is stored in `dtype`.

    TF32 if available and if the result is rounded to 16 bits anyway; otherwise pieces of bfloat16: three products of
    two pieces or, exact to float32, six of three. On NVIDIA, the plain product would use scalar units, and registers
    overflow.
    """
    found = architecture(device)
    if found not in ("cuda", "gfx942", "hip"):
        return "ieee"
    if dtype != torch.float32 and found != "hip":
        return "tf32"
    if not _has_bfloat16_pieces():
        return "tf32x3" if found == "cuda" else "ieee"
    return "bf16x6" if dtype == torch.float32 else "bf16x3"


@functools.cache
def _has_bfloat16_pieces() -> bool:
    """Checks whether this Triton supports products in pieces of bfloat16; 3.4 does not."""
    from triton.backends.nvidia.compiler import CUDAOptions

    return "bf16x6" in CUDAOptions.allowed_dot_input_precisions


def all_registers(device: torch.device) -> Config:
    """Lets a kernel use all 255 registers of a thread; otherwise the assembler for NVIDIA GPUs spills a few."""
    return {"maxnreg": 255} if architecture(device) == "cuda" else {}


def load_configs(path: Path) -> dict[str, dict[Size, Config]]:
    """Reads the configurations in `path`, by kernel and size.

    Raises:
        ValueError: the file does not have the form in this module's docstring; the message names the place.
    """
    found: dict[str, dict[Size, Config]] = {}
    try:
        for kernel, sizes in json.loads(path.read_text(encoding="utf-8"))["kernels"].items():
            found[kernel] = {}
            for key, config in sizes.items():
                size = tuple(int(number) for number in key.split("x"))
                if min(size) < 1:
                    raise ValueError(f"size {key!r}: its numbers must be 1 or more")
                if not config or any(type(value) is not int or value < 0 for _, value in config.items()):
                    raise ValueError(f"configuration {config}: its values must be whole numbers, 0 or more")
                found[kernel][size] = config
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        detail = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{path} is damaged ({detail}): make it anew with `{TUNER}`, or delete it") from error
    return found


def config_file(device: torch.device) -> Path:
    """Returns the path of the measured configurations of `device`."""
    name = torch.get_device_module(device).get_device_name(device)
    return CONFIGS / (re.sub(r"[^A-Za-z0-9]+", "_", name).strip("_") + ".json")


@functools.cache
def _measured(path: Path) -> dict[str, dict[Size, Config]]:
    """Loads the configurations, with one warning per device model if there are none."""
    try:
        return load_configs(path)
    except FileNotFoundError:
        why = f"no measured launch configurations {path.name}: heuristic ones are used. `{TUNER}` measures them"
    except ValueError as error:
        why = f"heuristic launch configurations are used: {error}"
    warnings.warn(why, stacklevel=2)
    return {}


def forget_measured() -> None:
    """Makes files of measured configurations be read again, after one was written."""
    _measured.cache_clear()
    _forget_choices()


def _forget_choices() -> None:
    for cached in _choices:
        cached.cache_clear()
