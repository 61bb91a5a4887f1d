"""Measures the kernels' launch configurations on the GPU at hand and writes them to `configs/<device name>.json`.

    python -m ept_kernels.dev.tune [--kernels NAME,NAME] [--output FILE]

What there is to tune the kernels' modules say with a function `tunables(reduced: bool)`, a list of
`ept_kernels.launch.Tunable`: kernel, size, candidate configurations, launcher, inputs, reference. `reduced`
asks for tiny sizes and few candidates. `tunables` below calls them all; a new module adds its line there.

A candidate is refused if it does not compile or fit, if it spills registers, or if its result is not that of the
reference, with uninitialised memory filled with NaN; a winner also if that is so for other kinds of inputs that its
configuration serves. The others are timed: the operator over several sets of inputs,
together larger than the L2 cache, one after another, in a CUDA graph where there are such; the time is the median over
the samples. The fastest is measured again in turn with the heuristic's configuration and wins if it is faster by more
than the noise. Kernels that are no longer measured keep what an existing file says.

`TRITON_INTERPRET=1 python -m ept_kernels.dev.tune --device cpu` runs all of this on tiny sizes without a GPU, to
check the tuner itself. Its times are the interpreter's, and its output never goes to `configs/`.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import launch
from ..launch import Config, Tunable

SAMPLES = 25  # timed runs over all sets of inputs
WARMUP = 3
GAIN = 0.02  # by how much a candidate has to be faster than the heuristic's choice
UNKNOWN_CACHE = 256 * 2**20  # bytes, where the device does not tell the size of its L2 cache
MOST_SETS = 64  # of inputs

Timer = Callable[[Sequence[Callable[[], Any]], int], list[float]]


def tunables(reduced: bool = False) -> list[Tunable]:
    """What every module offers for tuning."""
    from . import four_bit_tunables, joint_prompt_tunables, prompted_embedding_tunables

    modules = (prompted_embedding_tunables, joint_prompt_tunables, four_bit_tunables)
    return [tunable for module in modules for tunable in module.tunables(reduced)]


class Refused(Exception):
    """A candidate that must not win; the message says why."""


def tune(tunable: Tunable, device: torch.device, samples: int = SAMPLES) -> dict[str, Any]:
    """Measures every candidate of `tunable`.

    Returns:
        `kernel`, `size`, `config` (the winner, complete), `median_us` and `default_us` (microseconds a call
        of the whole operator, of the winner and of the heuristic's choice), `tried`, and `refused`: reasons by
        configuration.

    Raises:
        RuntimeError: the heuristic's own configuration is refused.
    """
    sets = _sets(tunable, device)
    expected = _tensors(tunable.reference(*sets[0]))
    timer = _timer(device)

    def measure(config: Config) -> float:
        with launch.trying(tunable.kernel, config):
            calls = [functools.partial(tunable.operator, *args) for args in sets]
            return statistics.median(timer(calls, samples))

    try:
        check(tunable, tunable.default, sets[0], expected)
    except Refused as reason:
        raise RuntimeError(f"{tunable.kernel} at {_key(tunable)}: the heuristic's configuration: {reason}") from reason
    times: list[tuple[float, Config]] = []
    refused: dict[str, str] = {}
    for config in tunable.candidates:
        config = {**tunable.default, **config}
        try:
            check(tunable, config, sets[0], expected)
        except Refused as reason:
            refused[json.dumps(config)] = str(reason)
            continue
        times.append((measure(config), config))
    best = tunable.default
    for _, config in sorted(times, key=lambda timed: timed[0]):
        try:
            _check_variants(tunable, config, device)
        except Refused as reason:
            refused[json.dumps(config)] = str(reason)
            continue
        best = config
        break
    rounds = [(measure(tunable.default), measure(best)) for _ in range(3)]
    default_us, best_us = (statistics.median(column) for column in zip(*rounds, strict=True))
    if best_us > (1 - GAIN) * default_us:
        best, best_us = tunable.default, default_us
    return {
        "kernel": tunable.kernel,
        "size": _key(tunable),
        "config": best,
        "median_us": round(best_us, 2),
        "default_us": round(default_us, 2),
        "tried": len(tunable.candidates),
        "refused": refused,
    }


def check(tunable: Tunable, config: Config, args: tuple[Any, ...], expected: list[Tensor]) -> None:
    """Runs `config` once; raises `Refused` if it fails, spills, or differs from `expected`."""
    from triton.runtime.errors import TritonError

    with launch.trying(tunable.kernel, config), launch.compiled_kernels() as compiled, _poisoned_memory():
        try:
            actual = _tensors(tunable.operator(*args))
        except TritonError as error:  # out of shared memory or registers, or refused by the assembler
            raise Refused(str(error).strip().splitlines()[0]) from error
    for kernel in compiled:
        if kernel is not None and kernel.n_spills:
            raise Refused(f"{kernel.metadata.name} spills {kernel.n_spills} registers")
    for index, (a, e) in enumerate(zip(actual, expected, strict=True)):
        if (problem := _difference(a, e, tunable.tolerance)) is not None:
            raise Refused(f"result {index} {problem}")


def _check_variants(tunable: Tunable, config: Config, device: torch.device) -> None:
    for inputs in tunable.variants:
        args = inputs(device, 0)
        check(tunable, config, args, _tensors(tunable.reference(*args)))


def write(path: Path, rows: list[dict[str, Any]], device: str, command: str) -> None:
    """Adds the winners in `rows` to the file at `path`, which holds what was measured on `device` before."""
    content: dict[str, Any] = {"kernels": {}, "measurements": []}
    if path.is_file():
        launch.load_configs(path)  # a damaged file is not written over
        content.update(json.loads(path.read_text(encoding="utf-8")))
    for row in rows:
        content["kernels"].setdefault(row["kernel"], {})[row["size"]] = row["config"]
    new = {(row["kernel"], row["size"]) for row in rows}
    kept = [row for row in content["measurements"] if (row["kernel"], row["size"]) not in new]
    with_what = {"command": command, **versions()}
    content |= {"device": device, "measurements": [*kept, *({**row, "measured_with": with_what} for row in rows)]}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    partial.replace(path)


def versions() -> dict[str, str]:
    import triton

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "runtime": str(torch.version.cuda or torch.version.hip or ""),
    }


def _sets(tunable: Tunable, device: torch.device) -> list[tuple[Any, ...]]:
    """Sets of inputs that together are larger than twice the L2 cache; two on a CPU."""
    first = tunable.inputs(device, 0)
    size = sum(x.numel() * x.element_size() for x in first if isinstance(x, Tensor))
    count = 2
    if device.type != "cpu":
        properties = torch.get_device_module(device).get_device_properties(device)
        cache = getattr(properties, "L2_cache_size", 0) or UNKNOWN_CACHE
        count = min(MOST_SETS, max(count, -(-2 * cache // max(size, 1))))
    return [first, *(tunable.inputs(device, seed) for seed in range(1, count))]


def _timer(device: torch.device) -> Timer:
    """Microseconds of one call, for every sample over all calls."""
    return _wall_clock if device.type == "cpu" else _device_events


def _wall_clock(calls: Sequence[Callable[[], Any]], samples: int) -> list[float]:
    times = []
    for _ in range(samples):
        start = time.perf_counter()
        for call in calls:
            call()
        times.append(1e6 * (time.perf_counter() - start) / len(calls))
    return times


def _device_events(calls: Sequence[Callable[[], Any]], samples: int) -> list[float]:
    def run_all() -> None:
        for call in calls:
            call()

    module = torch.get_device_module()
    for _ in range(WARMUP):  # also compiles, which a graph cannot record
        run_all()
    module.synchronize()
    replay = run_all
    if hasattr(module, "CUDAGraph"):  # without the time that Python takes to launch
        graph = module.CUDAGraph()
        with module.graph(graph):
            run_all()
        replay = graph.replay
        replay()
    events = [(torch.Event(enable_timing=True), torch.Event(enable_timing=True)) for _ in range(samples)]
    for start, end in events:
        start.record()
        replay()
        end.record()
    module.synchronize()
    return [1e3 * start.elapsed_time(end) / len(calls) for start, end in events]


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


def _difference(actual: Tensor, expected: Tensor, tolerance: float | None) -> str | None:
    """What is wrong with `actual`; None when nothing is."""
    if actual.shape != expected.shape:
        return f"has shape {list(actual.shape)}, the reference has {list(expected.shape)}"
    if not actual.numel():
        return None
    if tolerance is None:
        tolerance = max(1e-5, torch.finfo(actual.dtype).eps)
    allowed = tolerance * float(expected.double().abs().max())
    error = float((actual.double() - expected.double()).abs().max())
    return None if error <= allowed else f"differs from the reference by {error:.3g}, {allowed:.3g} is allowed"


def _tensors(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


def _key(tunable: Tunable) -> str:
    return "x".join(str(number) for number in tunable.size)


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernels", default="", help="comma-separated: those whose name contains one of these")
    parser.add_argument("--output", type=Path, help="the file to write; by default this device's under configs/")
    parser.add_argument("--device", help="by default the accelerator; cpu checks the tuner, under the interpreter")
    parser.add_argument("--samples", type=int, default=SAMPLES, help="timed runs a configuration")
    return parser.parse_args(arguments)


def _device(name: str | None) -> torch.device:
    if name is None and (found := torch.accelerator.current_accelerator(check_available=True)) is not None:
        return torch.device(found.type, torch.accelerator.current_device_index())
    if name is None:
        raise SystemExit(
            "no accelerator was found to tune for; `TRITON_INTERPRET=1 python -m ept_kernels.dev.tune --device cpu` "
            "checks the tuner itself"
        )
    if name == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise SystemExit("--device cpu needs TRITON_INTERPRET=1 in the environment: Triton compiles for GPUs only")
    return torch.device(name)


def main(arguments: list[str] | None = None) -> None:
    options = _parse(arguments)
    device = _device(options.device)
    interpreted = device.type == "cpu"
    if interpreted and options.output and launch.CONFIGS.resolve() in options.output.resolve().parents:
        raise SystemExit(f"--output {options.output}: the interpreter's times do not belong into {launch.CONFIGS}")
    wanted = options.kernels.split(",")
    chosen = [t for t in tunables(reduced=interpreted) if any(name in t.kernel for name in wanted)]
    if not chosen:
        raise SystemExit(f"--kernels {options.kernels}: known are {', '.join(sorted({t.kernel for t in tunables()}))}")
    rows, winners = [], contextlib.ExitStack()
    for tunable in chosen:
        with launch.on_device(torch.empty(0, device=device)):
            row = tune(tunable, device, options.samples)
        rows.append(row)
        # Later ones are measured with what has won: a path of a product with the kernels that it will have.
        winners.enter_context(launch.adopting(tunable.kernel, tunable.size, row["config"]))
        print(
            f"{row['kernel']} {row['size']}: {row['median_us']} us ({row['default_us']} us by the heuristic), "
            f"{row['config']}; {row['tried']} tried, {len(row['refused'])} refused",
            flush=True,
        )
        for config, reason in row["refused"].items():
            print(f"    refused {config}: {reason}", flush=True)
    winners.close()
    name = "cpu, Triton's interpreter: no measurement" if interpreted else _device_name(device)
    output = options.output or (None if interpreted else launch.config_file(device))
    if output is not None:
        command = " ".join(["python -m ept_kernels.dev.tune", *(arguments if arguments is not None else sys.argv[1:])])
        write(output, rows, name, command)
        print(f"written to {output}")
    if interpreted:
        print("these are the interpreter's times: they check the tuner and say nothing about a GPU")


def _device_name(device: torch.device) -> str:
    return torch.get_device_module(device).get_device_name(device)


if __name__ == "__main__":
    main()
