"""The ahead-of-time compiler finds what it is there to find, and is asked for every kernel."""

from __future__ import annotations

import sys

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

import triton
import triton.language as tl

from ept_kernels.dev import aot
from ept_kernels.launch import AotCase

FINE = {"kernel": "k", "target": "sm_80", "spilled_bytes": 0, "shared_bytes": 100, "shared_limit": 100}


@triton.jit
def hungry(x, SIZE: tl.constexpr):
    """Holds `SIZE` elements in the registers of one warp, whatever the compiler may reorder."""
    b_x = tl.load(x + tl.arange(0, SIZE))
    tl.store(x + tl.arange(0, SIZE), b_x * tl.sum(b_x, axis=0))


def case(size: int) -> AotCase:
    signature = {"x": "*fp32", "SIZE": "constexpr"}
    return AotCase(f"hungry {size}", hungry, signature, {"SIZE": size}, num_warps=1, num_stages=1)


@pytest.mark.parametrize("target", ["sm_80", "gfx942"])
def test_a_spill_is_found(target):
    spilling, fine = aot.compile_case(case(2**15), target), aot.compile_case(case(2**7), target)
    assert spilling["spilled_bytes"] > 0
    assert f"hungry {2**15} spills" in aot.problems(spilling)[0]
    assert fine["spilled_bytes"] == 0
    assert aot.problems(fine) == []
    assert 0 < fine["registers"] < spilling["registers"]
    assert 0 < fine["instructions"] < spilling["instructions"]


def test_problems_are_spills_and_too_much_shared_memory():
    assert aot.problems(FINE) == []
    assert aot.problems({**FINE, "spilled_bytes": 4}) == ["k spills 4 bytes on sm_80"]
    assert (
        "takes 101 bytes of shared memory on sm_80, the limit is 100" in aot.problems({**FINE, "shared_bytes": 101})[0]
    )


@pytest.mark.parametrize("row, failed", [(FINE, False), ({**FINE, "spilled_bytes": 4}, True)], ids=["fine", "spill"])
def test_the_command_fails_on_a_problem(row, failed, monkeypatch, capsys):
    row = {**row, "registers": 1, "instructions": 1, "per_weight": ""}
    monkeypatch.setattr(aot, "compile_all", lambda chosen, jobs: [row] if list(chosen) else [])
    monkeypatch.setattr(sys, "argv", ["aot"])
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(SystemExit) as stopped:
        aot.main()
    assert bool(stopped.value.code) is failed
    assert f"{int(failed)} problems" in capsys.readouterr().out


def test_every_kernel_is_among_the_cases_and_every_name_occurs_once():
    cases = aot.cases()
    assert len({c.name for c in cases}) == len(cases)
    modules = [m for name, m in sorted(sys.modules.items()) if name.startswith("ept_kernels.")]
    kernels = {
        x.fn.__name__
        for m in modules
        for x in vars(m).values()
        if isinstance(x, triton.JITFunction) and x.fn.__name__.endswith("_kernel")
    }
    assert len(kernels) >= 10
    assert kernels == {c.fn.fn.__name__ for c in cases}
    assert {"sm_80", "sm_90", "sm_100", "gfx942"} == set(aot.TARGETS)
