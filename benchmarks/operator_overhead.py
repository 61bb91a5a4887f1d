"""Overhead of calling an operator: the calling thread's CPU time.

Every case is called in up to three ways on tensors of a few elements: through `torch.ops` (`operator`); as its Python
implementation (`implementation`: the reference on a CPU, the launcher on a GPU); and, on a GPU, the kernels
alone with prepared arguments (`launch`). `nothing` is an operator with the signature of `prompted_embedding` that
runs nothing, and `nothing, custom_op` the same registered by `torch.library.custom_op`.

    python -m benchmarks.operator_overhead      the host's cost of launching, without a GPU

measures the launchers on CPU tensors, with a driver that compiles for sm_90 and launches nothing: everything that
Python does up to the driver's launch, except that launch and entering a device.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import ept_kernels
from ept.runs.loading import default_device
from ept_kernels import launch, library
from ept_kernels.dev import compile_only
from ept_kernels.dev.problems import FourBit, JointPrompt, PromptedEmbedding
from ept_kernels.problem import Problem

from .record import Row
from .timing import Call, ThreadClock, summary, time_in_turn

CALLS = 20  # calls timed together

# The smallest training batch that has every part: one text of one token.
EMBEDDING = PromptedEmbedding(n=1, d=16, s=1, m=1, r=1, batch=1, vocabulary=2)
JOINT = JointPrompt(s=1, d=16, m=1, r=1, K=2, h=1)
PRODUCT = FourBit(128, 128, tokens=(16,), dtype=torch.bfloat16)
DEQUANTIZED = FourBit(128, 128, tokens=(), dtype=torch.bfloat16, operator="dequantize_4bit")
PROBLEMS: tuple[Problem, ...] = (EMBEDDING, EMBEDDING.backward, JOINT, JOINT.backward, DEQUANTIZED, PRODUCT)


@torch.no_grad()
def measure(*, rounds: int) -> Iterator[Row]:
    """Yields a row per way; `overhead` is its time beyond the next barer way's, round by round."""
    device = default_device()
    args, out = EMBEDDING.inputs(device), torch.empty(1, device=device)
    operator: Any = ept_kernels.prompted_embedding
    signature = "(" + str(operator._schema).partition("(")[2]

    def nothing(*_: Any) -> Tensor:
        return out

    plain = library.register(f"benchmark_nothing{signature}", nothing, nothing)
    custom = torch.library.custom_op("ept_benchmark::nothing", nothing, mutates_args=(), schema=signature)
    cases: dict[str, dict[str, Call]] = {
        "nothing": {"operator": lambda _: plain(*args), "implementation": lambda _: nothing(*args)},
        "nothing, custom_op": {"operator": lambda _: custom(*args), "implementation": lambda _: nothing(*args)},
    }
    cases |= {problem.operator: _ways(problem, device) for problem in PROBLEMS}
    for name, ways in cases.items():
        times = time_in_turn(ways, ThreadClock(device.type, CALLS), rounds=rounds, warmup=2 * CALLS)
        for way, barer in itertools.zip_longest(ways, list(ways)[1:]):
            row = {"case": f"steps/call of {name}", "provider": way, **times[way].as_dict(), "calls_a_sample": CALLS}
            if barer is not None:
                pairs = zip(times[way].samples, times[barer].samples, strict=True)
                row["overhead"] = summary([a - b for a, b in pairs])
            yield {**row, "backend": ept_kernels.backend(device)}


def _ways(problem: Problem, device: torch.device) -> dict[str, Call]:
    name, args = problem.operator, problem.inputs(device)
    launcher = library.launcher_of(name) if ept_kernels.backend(device) == "triton" else None
    implementation, operator = launcher or library.reference_of(name), getattr(torch.ops.ept, name).default
    ways: dict[str, Call] = {"operator": lambda _: operator(*args), "implementation": lambda _: implementation(*args)}
    if launcher is not None and device.type != "cpu":
        with launch.watched() as launched:
            launcher(*args)
        ways["launch"] = lambda _: [kernel[grid](*given, **meta) for kernel, grid, given, meta, _ in launched]
    return ways


if __name__ == "__main__":
    compile_only.activate("sm_90")
    for row in measure(rounds=50):
        print(f"{row['case']}, {row['provider']}: {1e6 * row['median']:.1f} us")
