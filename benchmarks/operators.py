"""Operators against their alternatives: every version of a case is first checked against the reference, then timed in
turn with the others and compared with the machine's ceilings.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import NamedTuple

import torch

import ept_kernels
from ept_kernels import launch
from ept_kernels.problem import as_tuple

from .problems import Prepared, prepare
from .record import Row, Work, is_device_broken
from .shapes import COMPILED, COPY, GOAL_CASES, OURS, OURS_AGAIN, PRODUCTS, TABLES, Case
from .timing import Call, Clock, DeviceClock, device_launches, peak_bytes, time_in_turn

CASE_SECONDS = {"gpu": 0.03, "cpu": 0.15, "reduced": 0.01}  # for timing one version of one case
OK: Row = {"status": "ok", "reason": ""}
GOAL_IDS = {case.id for case in GOAL_CASES}


def works_of(table: str, device: str) -> list[Work]:
    """Returns the ceilings and every case of `table` (`gpu`, `cpu` or `reduced`) as units of a record."""
    return [*ceiling_works(table, device), *(_work(case, table, device) for case in TABLES[table]())]


def ceiling_works(table: str, device: str) -> list[Work]:
    return [Work("ceilings", lambda: measure_ceilings(table, device)[1])] if table != "rehearsal" else []


def goal_works(table: str, device: str) -> list[Work]:
    """Returns the cases with goals, with the alternatives that need no compilation."""
    cases = [case for case in TABLES[table]() if _has_goal(case, table)]
    return [_work(case.without(COMPILED), table, device) for case in cases]


def rest_works(table: str, device: str) -> list[Work]:
    """Returns the goals' cases again, with tuned kernels (those that need compilation last), and all other cases."""
    cases = TABLES[table]()
    again = sorted((case for case in cases if _has_goal(case, table)), key=lambda case: COMPILED in case.providers)
    works = [_work(case, table, device, "again") for case in again]
    works += [_work(case, table, device) for case in cases if not _has_goal(case, table)]
    return works if table != "rehearsal" else []


def _has_goal(case: Case, table: str) -> bool:
    """Checks whether there is a goal for the case; among reduced cases the first of each kernel counts as such."""
    if table == "reduced":
        return case == next(other for other in TABLES[table]() if other.kernel == case.kernel)
    return case.id in GOAL_IDS


def _work(case: Case, table: str, device: str, section: str = "kernels") -> Work:
    def measured() -> Iterator[Row]:
        return rehearse(case, device) if table == "rehearsal" else prepare_and_measure(case, table, device)[1]

    return Work(f"{section}/{case.id}", measured, described(case), limit=90)


def rehearse(case: Case, device: str) -> Iterator[Row]:
    """Makes the inputs and launches our version, which is compiled but does not run."""
    prepared, before = prepare(case.only(OURS), device), launch.launches()
    for provider, call in prepared.calls.items():
        call(0)
        yield {"provider": provider, "backend": "triton", "launches": launch.launches() - before}
    yield from ({"provider": p, "status": "skipped", "reason": reason} for p, reason in prepared.skipped.items())


def prepare_and_measure(case: Case, table: str, device: str) -> tuple[Prepared, Iterator[Row]]:
    """Returns a prepared case, and an iterator that measures the rows of its versions."""
    prepared = prepare(case, device, compile_allowed=table != "reduced")
    return prepared, measure(case, prepared, device, CASE_SECONDS[table], measure_ceilings(table, device)[0])


def described(case: Case) -> Row:
    """Returns the fields of all rows of a case."""
    fields = {name: value for name, value in vars(case).items() if name != "providers"}
    return {"section": "kernels", "case": case.id, **fields}


class Ceilings(NamedTuple):
    """Measured ceilings: bytes per second (read plus written) of a copy, and operations per second of a square product
    by data type.
    """

    bytes_per_second: float
    operations_per_second: dict[str, float]

    def floor(self, bytes_moved: int, operations: int, dtype: str) -> tuple[float, str]:
        """Returns the minimum seconds for this much work, and the ceiling that sets them: `memory` or `compute`."""
        memory = bytes_moved / self.bytes_per_second
        compute = operations / self.operations_per_second[dtype]
        return max((memory, "memory"), (compute, "compute"))


# Bytes of the copied tensor, side of the square matrices, their data types, seconds for each.
CEILING_SIZES = {
    "gpu": (4 << 30, 8192, ("bfloat16", "float16", "float32"), 0.4),
    "cpu": (128 << 20, 1024, ("float32",), 0.5),
    "reduced": (1 << 20, 64, ("float32",), 0.01),
}


@functools.cache
def measure_ceilings(table: str, device: str) -> tuple[Ceilings, list[Row]]:
    """Measures the ceilings of `device` at the sizes of `table`, with a row for each."""
    size, edge, dtypes, seconds = CEILING_SIZES[table]
    source = torch.randint(256, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    calls: dict[str, tuple[Call, str, int]] = {"copy": (lambda _: target.copy_(source), "bytes", 2 * size)}
    for name in dtypes:
        # Random: products of zeros can run faster than real ones.
        a, b = (torch.randn(edge, edge, device=device).to(getattr(torch, name)) for _ in range(2))
        calls[f"{name} product"] = functools.partial(_product, a, b), "operations", 2 * edge**3
    rows = []
    for ceiling, (call, unit, amount) in calls.items():
        timing = time_in_turn({"only": call}, clock_of(device), seconds=seconds)["only"]
        rate = {unit: amount, f"{unit}_per_second": amount / timing.median}
        rows.append({"ceiling": ceiling, **rate, **timing.as_dict()})
    rates = {name: row["operations_per_second"] for name, row in zip(dtypes, rows[1:])}
    return Ceilings(rows[0]["bytes_per_second"], rates), rows


def _product(a: torch.Tensor, b: torch.Tensor, _: int) -> torch.Tensor:
    return a @ b


def clock_of(device: str) -> Clock:
    return DeviceClock(device) if device == "cuda" else Clock(device)


def measure(case: Case, prepared: Prepared, device: str, seconds: float, ceilings: Ceilings) -> Iterator[Row]:
    """Yields a row for every version that `case` names.

    `status` is `ok`, `skipped` (it cannot run here) or `failed` (it raised, or its result was wrong: then it is
    not timed), with the `reason`.
    """
    rows: dict[str, Row] = {provider: {"provider": provider, "status": "skipped"} for provider in case.providers}
    for provider, reason in prepared.skipped.items():
        rows[provider]["reason"] = reason
    expected = as_tuple(prepared.reference())
    for provider, call in prepared.calls.items():
        rows[provider].update(OK if provider == COPY else _check(provider, call, expected, prepared))
    del expected
    right = {name: call for name, call in prepared.calls.items() if rows[name]["status"] == "ok"}
    timings = time_in_turn(right, clock_of(device), sets=prepared.sets, seconds=seconds) if right else {}
    moved, operations = prepared.counted
    floor, bound = ceilings.floor(moved, operations, case.dtype)
    for provider, timing in timings.items():
        row, call = rows[provider], right[provider]
        row |= {
            **timing.as_dict(),
            "bytes": moved,
            "operations": operations,
            "bytes_per_second": moved / timing.median,
            "operations_per_second": operations / timing.median,
            "bound": bound,
            "fraction_of_ceiling": floor / timing.median,
            "fraction_of_bandwidth": moved / ceilings.bytes_per_second / timing.median,
            "ceilings": {
                "bytes_per_second": ceilings.bytes_per_second,
                "operations_per_second": ceilings.operations_per_second[case.dtype],
            },
            "peak_bytes": peak_bytes(call, device) if provider != COPY else 0,
        }
        if COPY in timings:
            row["fraction_of_own_copy"] = timings[COPY].median / timing.median
        if provider in (OURS, OURS_AGAIN):  # the backend that really ran
            before = launch.launches()
            call(0)
            row["backend"] = backend_of(case, device, launched=launch.launches() > before)
        if provider == OURS and case.kernel not in PRODUCTS:  # profiling costs more than the measurement
            row["launches"] = device_launches(call, device)
    yield from rows.values()


def backend_of(case: Case, device: str, launched: bool) -> str:
    """Returns what ran: our kernels, whatever a product of few tokens is passed on to by them, or the reference."""
    if launched:
        return "triton"
    return "library" if case.kernel in PRODUCTS and ept_kernels.backend(device) == "triton" else "reference"


def _check(provider: str, call: Call, expected: tuple[torch.Tensor, ...], prepared: Prepared) -> Row:
    def equal(a: tuple[torch.Tensor, ...], b: tuple[torch.Tensor, ...]) -> bool:
        return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))

    try:
        outputs = as_tuple(call(0))
        error = max(relative_error(out, ref) for out, ref in zip(outputs, expected))
        found: Row = {**OK, "relative_error": error, "tolerance": prepared.tolerance}
        if not error <= prepared.tolerance:
            limit = f"the tolerance is {prepared.tolerance:.1e}"
            found.update(status="failed", reason=f"relative error {error:.1e} against the reference, {limit}")
        if provider == OURS:
            found["repeats_bit_equal"] = equal(outputs, as_tuple(call(0)))
            peer = prepared.must_equal
            if peer in prepared.calls:
                found[f"bit_equal_to_{peer}"] = equal(outputs, as_tuple(prepared.calls[peer](0)))
        return found
    except Exception as error:  # a version that raises is a result; the others are still measured
        if is_device_broken():
            raise
        first = str(error).partition("\n")[0]
        return {"status": "failed", "reason": f"{type(error).__name__}: {first}"}


def relative_error(out: torch.Tensor, reference: torch.Tensor) -> float:
    """Returns ‖out − reference‖ / ‖reference‖ in float64, absolute if the reference is zero; infinite for another
    shape.
    """
    if out.shape != reference.shape:
        return float("inf")
    difference = torch.linalg.vector_norm(out.double() - reference.double()).item()
    norm = torch.linalg.vector_norm(reference.double()).item()
    return difference / norm if norm else difference
