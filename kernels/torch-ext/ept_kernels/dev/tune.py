"""Measures the kernels' launch configurations on the GPU at hand and writes them to `configs/<device name>.json`.

    python -m ept_kernels.dev.tune [--kernels NAME,NAME]

A candidate is timed if `refusal` finds nothing wrong with it: the median time of the operator over several sets of
inputs, together larger than the L2 cache, one after another, in a CUDA graph if available. The fastest candidate that
also serves its variants is then measured in alternation with the heuristic's, and wins if faster by more than the
noise. The file is written after each kernel, later kernels are measured with the winners, and entries that are no
longer measured stay in the file.
"""

import argparse
import contextlib
import functools
import json
import platform
import statistics
import sys
import timeit
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from triton import testing
from triton.runtime.errors import TritonError

from .. import launch
from ..four_bit.paths import has_bitsandbytes
from ..launch import Config
from ..library import launcher_of
from ..problem import Problem, Results, as_tuple, largest
from . import compile_only
from .tunables import Tunable, tunables

GAIN = 0.02  # by which a candidate must be faster than the heuristic's choice
UNKNOWN_CACHE = 256 * 2**20  # bytes, if the device does not report the size of its L2 cache
MAX_SETS = 64  # of inputs


def tune(tunable: Tunable, device: torch.device) -> dict[str, Any]:
    """Measures every candidate of `tunable`.

    Returns:
        `kernel`, `size`, `config` (the winner, complete), `median_us` and `default_us` (microseconds per call of the
        whole operator, for the winner and the heuristic), `tried`, and `refused`: reasons by configuration.

    Raises:
        RuntimeError: the heuristic's own configuration is refused.
    """
    problem = tunable.problem
    launcher: Any = launcher_of(problem.operator)
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
        with launch.configured(tunable.trying(config)):
            return _microseconds([functools.partial(launcher, *args) for args in sets], device)

    if reason := refusal(problem, tunable.trying({}), sets[0], expected):
        raise RuntimeError(f"{tunable.kernel} at {tunable.key}: the heuristic's configuration: {reason}")
    times: list[tuple[float, Config]] = []
    refused: dict[str, str] = {}
    for config in tunable.candidates:
        config = {**tunable.default, **config}
        if reason := refusal(problem, tunable.trying(config), sets[0], expected):
            refused[json.dumps(config)] = reason
        else:
            times.append((measure(config), config))
    best = tunable.default
    for _, config in sorted(times, key=lambda timed: timed[0]):
        others = ((variant, variant.inputs(device)) for variant in tunable.variants)
        reasons = (refusal(variant, tunable.trying(config), args, variant.expected(*args)) for variant, args in others)
        if reason := next(filter(None, reasons), None):
            refused[json.dumps(config)] = reason
        else:
            best = config
            break
    rounds = [(measure(tunable.default), measure(best)) for _ in range(1 if best == tunable.default else 3)]
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


def refusal(problem: Problem, configs: dict[str, Config], args: tuple[Any, ...], expected: Results) -> str | None:
    """Runs `problem` once in `configs`; says why they must not win if it fails, spills, or differs from `expected`."""
    launcher: Any = launcher_of(problem.operator)
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
    bounds = problem.errors_allowed(actual, expected, args)
    for index, (a, e, allowed) in enumerate(zip(actual, expected, bounds, strict=True)):
        if a.shape != e.shape:
            return f"result {index} has shape {list(a.shape)}, the reference has {list(e.shape)}"
        worst = largest(a.double() - e.double())
        if not worst <= allowed:
            return f"result {index} differs from the reference by {worst:.3g}, {allowed:.3g} is allowed"
    return None


def write(path: Path, row: dict[str, Any], device: torch.device, command: str) -> None:
    """Adds the winner in `row` to the file at `path`, which holds earlier measurements on this kind of device."""
    content: dict[str, Any] = {"kernels": {}, "measurements": []}
    if path.is_file():
        launch.load_configs(path)  # a damaged file is not overwritten
        content.update(json.loads(path.read_text(encoding="utf-8")))
    kernel, size = row["kernel"], row["size"]
    content["kernels"].setdefault(kernel, {})[size] = row["config"]
    kept = [old for old in content["measurements"] if (old["kernel"], old["size"]) != (kernel, size)]
    with_what: dict[str, Any] = {"command": command, "python": platform.python_version(), "torch": torch.__version__}
    with_what |= {"triton": version("triton"), "runtime": str(torch.version.cuda or torch.version.hip or "")}
    with_what["bitsandbytes"] = version("bitsandbytes") if has_bitsandbytes() else None  # one of the paths, if present
    target = launch.architecture(device)
    content["target"] = "sm_{}{}".format(*torch.cuda.get_device_capability(device)) if target == "cuda" else target
    content["device"] = torch.get_device_module(device).get_device_name(device)
    content |= {"measurements": [*kept, {**row, "measured_with": with_what}]}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    partial.replace(path)
    launch.forget_measured()


def _microseconds(calls: Sequence[Callable[[], Any]], device: torch.device) -> float:
    """Returns the microseconds per call, calling all in turn; on a GPU without Python's time to launch."""

    def run_all() -> None:
        for call in calls:
            call()

    if device.type == "cpu":
        milliseconds = 1e3 * timeit.timeit(run_all, number=1)
    else:
        short = functools.partial(testing.do_bench_cudagraph, rep=5)  # in ms, ten times: many candidates, little time
        measure = short if device.type == "cuda" else testing.do_bench
        milliseconds = measure(run_all, return_mode="median")
    return 1e3 * milliseconds / len(calls)


@contextlib.contextmanager
def _poisoned_memory() -> Iterator[None]:
    """Fills new allocations with NaN or the largest integer: memory may still hold an earlier candidate's result."""
    before = torch.get_deterministic_debug_mode()
    torch.set_deterministic_debug_mode("warn")
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(before)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernels", default="", help="comma-separated: those whose name contains one of these")
    options = parser.parse_args(arguments)
    if (found := torch.accelerator.current_accelerator(check_available=True)) is None:
        raise SystemExit("no accelerator was found to tune for")
    device = torch.device(found.type, torch.accelerator.current_device_index())
    with contextlib.suppress(ImportError):  # without it there is one path fewer to measure
        import bitsandbytes  # noqa: F401
    wanted = options.kernels.split(",")
    known = tunables(device=device)
    chosen = [tunable for tunable in known if any(name in tunable.kernel for name in wanted)]
    if not chosen:
        raise SystemExit(f"--kernels {options.kernels}: known are {', '.join(sorted({t.kernel for t in known}))}")
    command = " ".join([launch.TUNER, *(arguments if arguments is not None else sys.argv[1:])])
    for tunable in chosen:
        row = tune(tunable, device)
        write(launch.config_file(device), row, device, command)
        times = f"{row['median_us']} us ({row['default_us']} us by the heuristic), {row['config']}"
        print(
            f"{row['kernel']} {row['size']}: {times}; {row['tried']} tried, {len(row['refused'])} refused", flush=True
        )
        for config, reason in row["refused"].items():
            print(f"    refused {config}: {reason}", flush=True)
    print(f"written to {launch.config_file(device)}")


if __name__ == "__main__":
    main()
