"""Measures the kernels' launch configurations on the GPU at hand and writes them to `configs/<device name>.json`.

    python -m ept_kernels.dev.tune [--kernels NAME,NAME]

A candidate is timed if `refusal` has nothing against it: the operator over several sets of inputs, together larger than
the L2 cache, one after another, in a CUDA graph where there are such; the time is the median over the samples. The
fastest that serves its variants, too, is measured again in turn with the heuristic's configuration and wins if it is
faster by more than the noise. The file is written after each kernel, and later ones are measured with what has won: a
path of a product with the kernels that it will have. Kernels that are no longer measured keep what the file says.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import json
import platform
import statistics
import sys
import timeit
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from triton import testing

from .. import launch
from ..four_bit import dequantize, matmul, paths
from ..frozen import launchers as frozen
from ..joint_prompt import launchers as joint_prompt
from ..launch import Config, Size, padded
from ..library import launcher_of
from ..problem import Problem, as_tuple, largest
from ..prompted_embedding import launchers as prompted_embedding
from . import compile_only
from .problems import (
    LLAMA_7B,
    LLAMA_7B_JOINT,
    T5_BASE,
    T5_BASE_JOINT,
    WEIGHTS,
    Activation,
    FourBit,
    JointPrompt,
    PromptedEmbedding,
    RMSNorm,
    Rotary,
)

GAIN = 0.02  # by how much a candidate has to be faster than the heuristic's choice
UNKNOWN_CACHE = 256 * 2**20  # bytes, where the device does not tell the size of its L2 cache
MAX_SETS = 64  # of inputs


@dataclass(frozen=True)
class Tunable:
    """One kernel at one size, as the tuner measures it and as its shipped configurations are compiled ahead of time.

    Attributes:
        kernel, size: as the launcher gives them to `config_for`; together unique.
        default: the heuristic's configuration, which is measured first and kept unless another is faster.
        candidates: configurations to try; each replaces the values of `default` that it names. See `grid`.
        problem: whose launcher is timed, as a whole, also where the kernel is one of several in it. It has to take its
            configuration through `config_for`, under a cache made with `cached_choice` if any.
        variants: other problems that the same configuration serves: the winner has to be right for them and not to
            spill, too.
        held: configurations of other kernels meanwhile.
    """

    kernel: str
    size: Size
    default: Config
    candidates: Sequence[Config]
    problem: Problem
    variants: Sequence[Problem] = ()
    held: dict[str, Config] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """Names the size in the file."""
        return "x".join(map(str, self.size))


def grid(**values: Sequence[int]) -> list[Config]:
    """Lists every combination: `grid(BLOCK=(16, 32), num_warps=(4, 8))` are four configurations."""
    return [dict(zip(values, combination, strict=True)) for combination in itertools.product(*values.values())]


def tunables(reduced: bool = False, device: torch.device | str = "cuda") -> list[Tunable]:
    """Lists all that there is to tune on `device`; `reduced`: at tiny sizes, with few candidates."""
    found = [
        *_prompted_embedding(reduced),
        *_joint_prompt(reduced, torch.device(device)),
        *_four_bit(reduced, torch.device(device)),
        *_frozen(reduced, torch.device(device)),
    ]
    most = {"joint": 1} if reduced else {}
    return [replace(t, candidates=t.candidates[: most.get(t.kernel[:5], 2)]) for t in found] if reduced else found


# Kernels of the prompted embedding, by whether the forward or the backward is timed.
_EMBEDDING_GRIDS = {
    "prompted_embedding": grid(
        BLOCK_T=(16, 32), BLOCK_D=(64, 128, 256, 512), PROGRAMS=(256, 512, 1024), num_warps=(4, 8)
    ),
    "prompted_embedding_packed": grid(BLOCK_T=(16, 32), BLOCK_D=(64, 128, 256), ITERS=(1, 4), num_warps=(4, 8)),
    "prompted_embedding_backward": grid(
        BLOCK_M=(32, 64, 128), BLOCK_D=(32, 64, 128), STAGES=(2, 4, 6), num_warps=(4, 8)
    ),
    "prompted_embedding_reduce": grid(BLOCK_E=(64, 256, 1024), BLOCK_P=(4, 16)),
}


def _prompted_embedding(reduced: bool) -> Iterator[Tunable]:
    tiny = PromptedEmbedding(n=5, d=40, s=2, m=5, r=3, batch=2, padding="none", dtype=torch.bfloat16, vocabulary=11)
    for p in [tiny] if reduced else [T5_BASE, replace(T5_BASE, dtype=torch.float32), LLAMA_7B]:
        timed = {"prompted_embedding": p, "prompted_embedding_packed": p.packed}
        for kernel, tried in _EMBEDDING_GRIDS.items():
            default = prompted_embedding.heuristic(kernel, p.d, p.r, p.dtype)
            complete = [{**default, **candidate} for candidate in tried]
            candidates = [c for c in complete if prompted_embedding.bounded(c, p.d, p.r) == c]
            problem = timed.get(kernel, p.backward)
            yield Tunable(launch.key(kernel, p.dtype), (p.d, padded(p.r)), default, candidates, problem)


# Kernels of the joint prompt, all timed within its backward.
_JOINT_GRIDS = {
    "joint_prompt_products": grid(BLOCK_K=(16, 32), PROGRAMS=(132, 264, 528), num_warps=(4, 8)),
    "joint_prompt_rows": grid(num_warps=(4, 8), num_stages=(1, 2)),
    "joint_prompt_sides": grid(num_warps=(4, 8), num_stages=(1, 2)),
    "joint_prompt_expand": grid(BLOCK_D=(32, 64), num_warps=(4, 8), num_stages=(1, 2)),
}


def _joint_prompt(reduced: bool, device: torch.device) -> Iterator[Tunable]:
    for p in [JointPrompt(s=2, d=20, m=5, K=2, h=1)] if reduced else [T5_BASE_JOINT, LLAMA_7B_JOINT]:
        variants = [] if reduced else [p, replace(p, a=16).backward]
        for kernel, candidates in _JOINT_GRIDS.items():
            default = joint_prompt.heuristic(kernel, device)
            yield Tunable(kernel, (p.d,), default, candidates, p.backward, variants)


_DEQUANTIZE_GRID = grid(UNITS=(128, 256, 512), ITERS=(1, 2, 4, 8), num_warps=(4, 8))
_PRODUCT_GRID = grid(BLOCK_N=(64, 128), BLOCK_K=(128, 256), SPLITS=(1, 2, 4, 8), num_warps=(4, 8))
_VARIANTS = ({"block_size": 32}, {"nested": False}, {"nested": False, "block_size": 128})  # share a configuration


def _four_bit(reduced: bool, device: torch.device) -> Iterator[Tunable]:
    """Lists the kernels, then the paths of a product: these are measured with the kernels that have won."""
    # Under the interpreter, which the reduced ones are for, bfloat16 is truncated.
    dtype = torch.float16 if reduced else torch.bfloat16
    weights = [FourBit(*shape, dtype=dtype) for shape in ([(32, 128)] if reduced else WEIGHTS)]
    for p in {p.rows * p.columns: p for p in weights}.values():  # all that a dequantisation depends on
        p = replace(p, tokens=(), operator="dequantize_4bit")
        odd = replace(p, rows=p.rows - 1, columns=p.columns - 1)  # no whole words
        yield Tunable(
            kernel=launch.key("dequantize_4bit", dtype),
            size=(p.rows * p.columns,),
            default=dequantize.heuristic(device),
            candidates=_DEQUANTIZE_GRID,
            problem=p,
            variants=[*(replace(p, **kind) for kind in _VARIANTS), odd],
        )
    for p, tile in itertools.product(weights, matmul.TILES):
        p = replace(p, tokens=(tile,))
        yield Tunable(
            kernel=launch.key(f"matmul_4bit/{tile}", dtype),
            size=(p.rows, p.columns),
            default=matmul.heuristic(f"matmul_4bit/{tile}", p.rows, p.columns),
            candidates=_PRODUCT_GRID,
            problem=p,
            variants=[replace(p, dtype=torch.float16, **kind) for kind in _VARIANTS],
            held={launch.key("matmul_4bit.path", dtype): {"PATH": paths.FUSED}},
        )
    for p, count in itertools.product(weights, paths.COUNTS[: 4 if reduced else None]):
        for of_tokens in (dtype, torch.float32) if count <= 8 and not reduced else (dtype,):
            there = {paths.LIBRARY: True, paths.FUSED: paths.has_fused(of_tokens, device)}
            there[paths.BITSANDBYTES] = paths.has_bitsandbytes()
            yield Tunable(
                kernel=launch.key("matmul_4bit.path", of_tokens),
                size=(count, p.rows, p.columns),
                default={"PATH": paths.heuristic_path(count, of_tokens, device)},
                candidates=[{"PATH": path} for path, is_there in there.items() if is_there],
                problem=replace(p, tokens=(count,), dtype=of_tokens),
            )


_ROWS = grid(TILE=(2048, 4096, 8192), num_warps=(4, 8))
_ELEMENTS = grid(BLOCK=(1024, 2048, 4096), num_warps=(4, 8))


def _frozen(reduced: bool, device: torch.device) -> Iterator[Tunable]:
    """Lists the frozen model's element-wise kernels, at the rows of a training step of known models."""
    # Under the interpreter bfloat16 is truncated.
    tokens, dtype = (3, torch.float16) if reduced else (8 * 296, torch.bfloat16)
    norms = [RMSNorm(tokens, d, dtype=dtype) for d in ((20,) if reduced else (768, 4096))]
    turned = Rotary(1, n=tokens, dtype=dtype) if reduced else Rotary(8, 32, 32, 296, 128, 128, dtype)
    gated, relu = (
        Activation((tokens, 40 if reduced else 11008), dtype=dtype, operator=o) for o in ("gated_activation", "relu")
    )
    of_all = [
        *((p, (p.d,), _ROWS) for norm in norms for p in (norm, norm.backward)),
        (turned, (turned.width,), grid(BLOCK_H=(4, 8, 16, 32), num_warps=(4, 8))),
        *((p, (1,), _ELEMENTS) for problem in (gated, relu) for p in (problem, problem.backward)),
    ]
    for problem, size, candidates in of_all:
        default = frozen.heuristic(problem.operator, size[0], device)
        yield Tunable(launch.key(problem.operator, dtype), size, default, candidates, problem)


def tune(tunable: Tunable, device: torch.device) -> dict[str, Any]:
    """Measures every candidate of `tunable`.

    Returns:
        `kernel`, `size`, `config` (the winner, complete), `median_us` and `default_us` (microseconds a call
        of the whole operator, of the winner and of the heuristic's choice), `tried`, and `refused`: reasons by
        configuration.

    Raises:
        RuntimeError: the heuristic's own configuration is refused.
    """
    problem, launcher = tunable.problem, launcher_of(tunable.problem.operator)
    assert launcher is not None, f"{problem.operator} has no kernels"
    sets = [problem.inputs(device, 0)]
    size = sum(x.numel() * x.element_size() for x in sets[0] if isinstance(x, Tensor))
    count = 2
    if device.type != "cpu":  # together larger than twice the L2 cache
        properties = torch.get_device_module(device).get_device_properties(device)
        cache = getattr(properties, "L2_cache_size", 0) or UNKNOWN_CACHE
        count = min(MAX_SETS, max(count, -(-2 * cache // max(size, 1))))
    sets += [problem.inputs(device, seed) for seed in range(1, count)]
    expected = problem.expected(*sets[0])

    def measure(config: Config) -> float:
        with launch.configured({**tunable.held, tunable.kernel: config}):
            return _microseconds([functools.partial(launcher, *args) for args in sets], device)

    if reason := refusal(tunable, tunable.default, sets[0], expected):
        raise RuntimeError(f"{tunable.kernel} at {tunable.key}: the heuristic's configuration: {reason}")
    times: list[tuple[float, Config]] = []
    refused: dict[str, str] = {}
    for config in tunable.candidates:
        config = {**tunable.default, **config}
        if reason := refusal(tunable, config, sets[0], expected):
            refused[json.dumps(config)] = reason
        else:
            times.append((measure(config), config))
    best = tunable.default
    for _, config in sorted(times, key=lambda timed: timed[0]):
        others = ((variant, variant.inputs(device)) for variant in tunable.variants)
        reasons = (refusal(tunable, config, args, variant.expected(*args)) for variant, args in others)
        if reason := next(filter(None, reasons), None):
            refused[json.dumps(config)] = reason
        else:
            best = config
            break
    rounds = [(measure(tunable.default), measure(best)) for _ in range(3)]
    default_us, best_us = (statistics.median(column) for column in zip(*rounds, strict=True))
    if best_us > (1 - GAIN) * default_us:
        best, best_us = tunable.default, default_us
    return {
        "kernel": tunable.kernel,
        "size": tunable.key,
        "config": best,
        "median_us": round(best_us, 2),
        "default_us": round(default_us, 2),
        "tried": len(tunable.candidates),
        "refused": refused,
    }


def refusal(tunable: Tunable, config: Config, args: tuple[Any, ...], expected: Sequence[Tensor]) -> str | None:
    """Runs `config` once; says why it must not win if it fails, spills, or differs from `expected`."""
    from triton.runtime.errors import TritonError

    launcher: Any = launcher_of(tunable.problem.operator)
    configs = {**tunable.held, tunable.kernel: config}
    with launch.configured(configs), launch.watched() as launches, _poisoned_memory():
        try:
            actual = as_tuple(launcher(*args))
        except TritonError as error:  # out of shared memory or registers, or refused by the assembler
            return str(error).strip().splitlines()[0]
    for compiled in (launched.compiled for launched in launches):
        if compiled is not None and compiled.n_spills:
            return f"{compiled.metadata.name} spills {compiled.n_spills} registers"
    if compile_only.active():
        return None  # no kernel has run
    bounds = tunable.problem.errors_allowed(actual, expected, args)
    for index, (a, e, allowed) in enumerate(zip(actual, expected, bounds, strict=True)):
        if a.shape != e.shape:
            return f"result {index} has shape {list(a.shape)}, the reference has {list(e.shape)}"
        worst = largest(a.double() - e.double())
        if not worst <= allowed:
            return f"result {index} differs from the reference by {worst:.3g}, {allowed:.3g} is allowed"
    return None


def write(path: Path, row: dict[str, Any], device: str, command: str) -> None:
    """Adds the winner in `row` to the file at `path`, which holds what was measured on `device` before."""
    content: dict[str, Any] = {"kernels": {}, "measurements": []}
    if path.is_file():
        launch.load_configs(path)  # a damaged file is not written over
        content.update(json.loads(path.read_text(encoding="utf-8")))
    kernel, size = row["kernel"], row["size"]
    content["kernels"].setdefault(kernel, {})[size] = row["config"]
    kept = [old for old in content["measurements"] if (old["kernel"], old["size"]) != (kernel, size)]
    with_what = {
        "command": command,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": version("triton"),
        "runtime": str(torch.version.cuda or torch.version.hip or ""),
    }
    content |= {"device": device, "measurements": [*kept, {**row, "measured_with": with_what}]}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    partial.replace(path)
    launch.forget_measured()


def _microseconds(calls: Sequence[Callable[[], Any]], device: torch.device) -> float:
    """Measures a call, one after another of all, on a GPU without the time that Python takes to launch."""

    def run_all() -> None:
        for call in calls:
            call()

    if device.type == "cpu":
        milliseconds = 1e3 * timeit.timeit(run_all, number=1)
    else:
        measure = testing.do_bench_cudagraph if device.type == "cuda" else testing.do_bench
        milliseconds = measure(run_all, return_mode="median")
    return 1e3 * milliseconds / len(calls)


@contextlib.contextmanager
def _poisoned_memory() -> Iterator[None]:
    """Fills what is allocated with NaN or the largest integer: memory may still hold an earlier candidate's result."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    deterministic: Any = torch.utils.deterministic
    filled = deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        deterministic.fill_uninitialized_memory = filled


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernels", default="", help="comma-separated: those whose name contains one of these")
    options = parser.parse_args(arguments)
    if (found := torch.accelerator.current_accelerator(check_available=True)) is None:
        raise SystemExit("no accelerator was found to tune for")
    device = torch.device(found.type, torch.accelerator.current_device_index())
    with contextlib.suppress(ImportError):  # without it there is one path less to measure
        import bitsandbytes  # noqa: F401
    wanted = options.kernels.split(",")
    known = tunables(device=device)
    chosen = [tunable for tunable in known if any(name in tunable.kernel for name in wanted)]
    if not chosen:
        raise SystemExit(f"--kernels {options.kernels}: known are {', '.join(sorted({t.kernel for t in known}))}")
    command = " ".join(["python -m ept_kernels.dev.tune", *(arguments if arguments is not None else sys.argv[1:])])
    for tunable in chosen:
        row = tune(tunable, device)
        write(launch.config_file(device), row, torch.get_device_module(device).get_device_name(device), command)
        print(
            f"{row['kernel']} {row['size']}: {row['median_us']} us ({row['default_us']} us by the heuristic), "
            f"{row['config']}; {row['tried']} tried, {len(row['refused'])} refused",
            flush=True,
        )
        for config, reason in row["refused"].items():
            print(f"    refused {config}: {reason}", flush=True)
    print(f"written to {launch.config_file(device)}")


if __name__ == "__main__":
    main()
