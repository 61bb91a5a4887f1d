"""One case measured: every version checked against the reference first, then timed in turn; one row a version."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

import ept_kernels
from ept_kernels import launch

from . import four_bit_problems, prompt_problems
from .ceilings import Ceilings
from .problems import Problem
from .shapes import COMPILED, OURS, OURS_AGAIN, Case
from .timing import Call, device_launches, peak_bytes, time_in_turn

PRODUCTS = ("matmul_4bit", "matmul_4bit_backward")


def measure_case(
    case: Case, device: str, seconds: float, ceilings: Ceilings, compile_allowed: bool = True
) -> list[dict[str, Any]]:
    """A row for every version that `case` names.

    `status` is `ok`, `skipped` (it cannot run here) or `failed` (it raised, or its result was wrong: then it is
    not timed), with the `reason`.
    """
    problem = build(case, device, compile_allowed)
    return measure_problem(case, problem, device, seconds, ceilings)


def build(case: Case, device: str, compile_allowed: bool = True) -> Problem | None:
    """The problem of `case` on `device`; None where the operator does not exist."""
    if not hasattr(ept_kernels, case.kernel):
        return None
    torch.manual_seed(0)
    problem = _builder(case.kernel)(case, device)
    if not compile_allowed and COMPILED in problem.calls:
        del problem.calls[COMPILED]
        problem.skipped[COMPILED] = "not compiled in a reduced run"
    return problem


def measure_problem(
    case: Case, problem: Problem | None, device: str, seconds: float, ceilings: Ceilings
) -> list[dict[str, Any]]:
    """The rows of a case that was built; all skipped where there is no problem."""
    rows = {provider: _description(case, provider) for provider in case.providers}
    if problem is None:
        for row in rows.values():
            row.update(status="skipped", reason=f"this version of ept_kernels has no {case.kernel}")
        return list(rows.values())
    for provider in case.providers:
        if provider in problem.skipped:
            rows[provider].update(status="skipped", reason=problem.skipped[provider])
    expected = _outputs(problem.reference())
    right: dict[str, Call] = {}
    for provider, call in problem.calls.items():
        found = _check(provider, call, expected, problem)
        rows[provider].update(found)
        if found["status"] == "ok":
            right[provider] = call
    del expected
    timings = time_in_turn(right, device, problem.sets, seconds) if right else {}
    for provider, timing in timings.items():
        row = rows[provider]
        row.update(timing.as_dict(), **_against_ceilings(problem, timing.median, ceilings, case.dtype))
        row["peak_bytes"] = peak_bytes(right[provider], device)
        if provider in (OURS, OURS_AGAIN):
            row["backend"] = _backend(right[provider], device)
        if provider == OURS and case.kernel not in PRODUCTS:  # a profile costs more than the measurement
            row["launches"] = device_launches(right[provider], device)
    return list(rows.values())


def _builder(operator: str) -> Callable[[Case, str], Problem]:
    return four_bit_problems.build if "4bit" in operator else prompt_problems.build


def _description(case: Case, provider: str) -> dict[str, Any]:
    return {
        "section": "kernels",
        "case": case.id,
        "kernel": case.kernel,
        "model": case.model,
        "size": case.size,
        "dtype": case.dtype,
        "scheme": case.scheme,
        "provider": provider,
    }


def _check(provider: str, call: Call, expected: list[torch.Tensor], problem: Problem) -> dict[str, Any]:
    try:
        outputs = _outputs(call(0))
        error = max(relative_error(out, ref) for out, ref in zip(outputs, expected))
        found: dict[str, Any] = {"status": "ok", "reason": "", "relative_error": error, "tolerance": problem.tolerance}
        if not error <= problem.tolerance:
            limit = f"the tolerance is {problem.tolerance:.1e}"
            found.update(status="failed", reason=f"relative error {error:.1e} against the reference, {limit}")
        if provider == OURS:
            found["repeats_bit_equal"] = _equal(outputs, _outputs(call(0)))
            if problem.must_equal in problem.calls:
                found[f"bit_equal_to_{problem.must_equal}"] = _equal(
                    outputs, _outputs(problem.calls[problem.must_equal](0))
                )
        return found
    except torch.cuda.OutOfMemoryError as error:
        return {"status": "failed", "reason": f"out of memory: {error}"}
    except Exception as error:  # a version that raises is a result; the others are still measured
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()  # raises where the error broke the device's context: then this process must end
        return {
            "status": "failed",
            "reason": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}",
        }


def _against_ceilings(problem: Problem, seconds: float, ceilings: Ceilings, dtype: str) -> dict[str, Any]:
    moved, operations = problem.counted
    floor, bound = ceilings.floor(moved, operations, dtype)
    return {
        "bytes": moved,
        "operations": operations,
        "bytes_per_second": moved / seconds,
        "operations_per_second": operations / seconds,
        "bound": bound,
        "fraction_of_ceiling": floor / seconds,
        "fraction_of_bandwidth": moved / ceilings.bytes_per_second / seconds,
        "ceilings": {
            "bytes_per_second": ceilings.bytes_per_second,
            "operations_per_second": ceilings.operations_per_second[dtype],
        },
    }


def _backend(call: Call, device: str) -> str:
    """What really ran: `triton` when a kernel of this package was launched."""
    if ept_kernels.backend(device) == "reference":
        return "reference"
    before = launch.launches()
    call(0)
    return "triton" if launch.launches() > before else "reference"


def relative_error(out: torch.Tensor, reference: torch.Tensor) -> float:
    """‖out − reference‖ / ‖reference‖ in float64, absolute for a reference of zeros; infinite for another shape."""
    if out.shape != reference.shape:
        return float("inf")
    difference = torch.linalg.vector_norm(out.double() - reference.double()).item()
    norm = torch.linalg.vector_norm(reference.double()).item()
    return difference / norm if norm else difference


def _outputs(result: Any) -> list[torch.Tensor]:
    return list(result) if isinstance(result, Iterable) and not isinstance(result, torch.Tensor) else [result]


def _equal(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
