"""What a call of an operator costs beside what it runs: the calling thread's time on the processor, in microseconds.

    python benchmarks/operator_overhead.py                      on the GPU if there is one, else on the CPU
    python benchmarks/operator_overhead.py --output FILE.json   the record as JSON too

Every case is called in up to three ways, in turn, on tensors of a few elements: through `torch.ops` (`operator`);
its Python implementation itself (`implementation`: the reference on a CPU, the launcher on a GPU); and, on a GPU, the
kernels alone with their arguments at hand (`launch`). The overhead is the difference, taken round by round; what
other processes take is not in it. `nothing` is an operator with the signature of `prompted_embedding` that runs
nothing, and `nothing, custom_op` the same registered by `torch.library.custom_op`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import ept_kernels
from ept.runs.loading import default_device
from ept.utils.environment import hardware, versions
from ept_kernels import library

CALLS = 20  # calls timed together
Ways = dict[str, Callable[[], Any]]


def arguments_of(name: str, device: torch.device) -> tuple[Any, ...]:
    """The smallest training batch that has every part: one text of one token."""
    ids, positions = torch.zeros(1, 1, dtype=torch.int64, device=device), torch.zeros(1, 1, dtype=torch.int64)
    positions = positions.to(device)
    table, prompt, A, B = (torch.ones(shape, device=device) for shape in ((2, 16), (1, 16), (1, 1), (1, 16)))
    parts = [prompt, A, B, *(torch.ones(shape, device=device) for shape in ((1,), (16, 0), (16, 0)))]
    parts += [torch.ones(shape, device=device) for shape in ((16, 2), (2, 16), (16, 2))]
    embedding = (ids, positions, table, prompt, A, B, 1.0)
    return {
        "nothing": embedding,
        "prompted_embedding": embedding,
        "prompted_embedding_backward": (torch.ones(1, 2, 16, device=device), positions, A, B, 1.0),
        "joint_prompt": (*parts, 1.0, 1.0, 1.0, "gelu"),
        "joint_prompt_backward": (prompt, *parts, 1.0, 1.0, 1.0, "gelu"),
    }[name]


def ways_of(name: str, device: torch.device) -> Ways:
    """How the operator `name` can be called on `device`."""
    args = arguments_of(name, device)
    launcher = library.launcher_of(name) if ept_kernels.backend(device) == "triton" else None
    implementation = launcher or getattr(ept_kernels, f"{name}_reference")
    operator = getattr(ept_kernels, name)
    ways: Ways = {"operator": lambda: operator(*args), "implementation": lambda: implementation(*args)}
    if launcher is not None and device.type != "cpu":
        launched = recorded_launches(launcher, args)
        ways["launch"] = lambda: [kernel[grid](*given, **meta) for kernel, grid, given, meta in launched]
    return ways


def recorded_launches(launcher: Callable[..., Any], args: tuple[Any, ...]) -> list[tuple[Any, ...]]:
    """Kernel, grid, arguments and meta-parameters of every launch of one call."""
    found: list[tuple[Any, ...]] = []
    namespace = launcher.__globals__  # type: ignore[attr-defined]
    original = namespace["launch"]

    def record(kernel: Any, grid: tuple[int, ...], *given: Any, **meta: Any) -> None:
        found.append((kernel, grid, given, meta))
        original(kernel, grid, *given, **meta)

    namespace["launch"] = record
    try:
        launcher(*args)
    finally:
        namespace["launch"] = original
    return found


def ways_of_nothing(device: torch.device) -> dict[str, Ways]:
    """The operator that runs nothing, registered in both ways, beside the plain function."""
    args = arguments_of("nothing", device)
    out = torch.empty(1, device=device)

    def nothing(
        input_ids: Tensor,
        positions: Tensor,
        table: Tensor,
        prompt: Tensor,
        A: Tensor,
        B: Tensor,
        scale: float,
        adapter_ids: Tensor | None = None,
    ) -> Tensor:
        return out

    schema = torch.library.infer_schema(nothing, mutates_args=())
    plain = library.register(f"benchmark_nothing{schema}", nothing, nothing)
    custom = torch.library.custom_op("ept_benchmark::nothing", nothing, mutates_args=(), schema=schema)
    function: Callable[[], Any] = lambda: nothing(*args)  # noqa: E731
    return {
        "nothing": {"operator": lambda: plain(*args), "implementation": function},
        "nothing, custom_op": {"operator": lambda: custom(*args), "implementation": function},
    }


def measure(ways: Ways, rounds: int, synchronize: Callable[[], None]) -> dict[str, list[float]]:
    """Microseconds of this thread a call of every way, in turn, `CALLS` calls at a time. A GPU's queue is empty at
    each start.
    """
    times: dict[str, list[float]] = {name: [] for name in ways}
    for index in range(rounds + 2):  # two rounds of warm-up
        for name in list(ways) if index % 2 else list(reversed(ways)):
            call = ways[name]
            synchronize()
            start = time.thread_time()
            for _ in range(CALLS):
                call()
            elapsed = time.thread_time() - start
            if index >= 2:
                times[name].append(1e6 * elapsed / CALLS)
    synchronize()
    return times


def summary(values: list[float]) -> dict[str, float]:
    quintiles = statistics.quantiles(values, n=5)
    return {"median": statistics.median(values), "p20": quintiles[0], "p80": quintiles[3]}


def row(name: str, times: dict[str, list[float]]) -> dict[str, Any]:
    """One case: every way's time, and what each costs beyond the next barer one."""
    found: dict[str, Any] = {"case": name, "us": {way: summary(values) for way, values in times.items()}}
    names = list(times)
    found["overhead_us"] = {
        f"{outer} - {inner}": summary([a - b for a, b in zip(times[outer], times[inner], strict=True)])
        for outer, inner in itertools.pairwise(names)
    }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=200, help=f"measured rounds of {CALLS} calls a way")
    parser.add_argument("--output", type=Path, help="write the record here as JSON")
    options = parser.parse_args()

    device = default_device()
    synchronize = torch.accelerator.synchronize if device.type != "cpu" else (lambda: None)
    names = ("prompted_embedding", "prompted_embedding_backward", "joint_prompt", "joint_prompt_backward")
    cases = ways_of_nothing(device) | {name: ways_of(name, device) for name in names}
    rows = []
    with torch.no_grad():
        for name, ways in cases.items():
            rows.append(row(name, measure(ways, options.rounds, synchronize)))
            for what, value in rows[-1]["overhead_us"].items():
                print(
                    f"{name}: {what}: {value['median']:.2f} us ({value['p20']:.2f} to {value['p80']:.2f})", flush=True
                )
    record = {
        "command": f"python benchmarks/operator_overhead.py --rounds {options.rounds}",
        "device": device.type,
        "runs": ept_kernels.backend(device),
        "calls_a_sample": CALLS,
        "rounds": options.rounds,
        "rows": rows,
        "hardware": hardware(),
        "versions": versions(),
    }
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
