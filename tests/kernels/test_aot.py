"""The ahead-of-time compiler finds what it is there to find, and is asked for every kernel."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

import triton
import triton.language as tl

from ept_kernels import launch
from ept_kernels.dev import aot, tune
from ept_kernels.dev.problems import JointPrompt, PackedEmbedding, PromptedEmbedding

FINE = {"kernel": "k", "target": "sm_80", "spilled_bytes": 0, "shared_bytes": 100, "shared_limit": 100}


@triton.jit
def hungry(x, SIZE: tl.constexpr):
    """Holds `SIZE` elements in the registers of one warp, whatever the compiler may reorder."""
    b_x = tl.load(x + tl.arange(0, SIZE))
    tl.store(x + tl.arange(0, SIZE), b_x * tl.sum(b_x, axis=0))


def case(size: int) -> aot.Case:
    return aot.Case(f"hungry {size}", hungry, (1,), (torch.float32,), {"SIZE": size, "num_warps": 1, "num_stages": 1})


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
    (too_much,) = aot.problems({**FINE, "shared_bytes": 101})
    assert "takes 101 bytes of shared memory on sm_80, the limit is 100" in too_much


@pytest.mark.parametrize("row, failed", [(FINE, False), ({**FINE, "spilled_bytes": 4}, True)], ids=["fine", "spill"])
def test_the_command_fails_on_a_problem(row, failed, monkeypatch, capsys):
    row = {**row, "registers": 1, "instructions": 1, "per_weight": ""}
    monkeypatch.setattr(aot, "cases", lambda *arguments: [case(1)])
    monkeypatch.setattr(aot, "compile_all", lambda chosen, jobs: [row] if list(chosen) else [])
    monkeypatch.setattr(sys, "argv", ["aot"])
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(SystemExit) as stopped:
        aot.main()
    assert bool(stopped.value.code) is failed
    assert f"{int(failed)} problems" in capsys.readouterr().out


def forms(*problems):
    """Lists what Triton compiles for the launches of `problems`."""
    return {case.form for problem in problems for case in aot.record(problem, "cuda")}


@pytest.mark.parametrize("change", [{"s": 100}, {"m": 63}, {"r": 60}, {"s": 1, "m": 1, "r": 1}, {"K": 7}], ids=str)
def test_a_compiled_joint_prompt_serves_all_lengths_and_ranks(change):
    """Neither s, m, r nor the number of gates up to 32 makes another kernel to compile."""
    problem = JointPrompt(s=40, m=256, r=30)
    other = replace(problem, **change)
    assert len(forms(problem, problem.backward)) == 7  # six kernels, of which that of the rows differs in the backward
    assert forms(other, other.backward) == forms(problem, problem.backward)


def test_another_batch_or_length_compiles_no_kernel_anew():
    seen = []
    for batch, n in ((3, 9), (1, 9), (16, 9), (3, 1), (3, 16), (3, 33), (2, 160)):
        padded = PromptedEmbedding(n, batch=batch, m=160)
        seen.append(forms(padded, padded.backward, PackedEmbedding((160, *(n,) * batch))))
        assert seen[-1] == seen[0], f"{batch} texts of {n} tokens"
    assert len(seen[0]) == 5


@pytest.mark.parametrize("architecture", ["cuda", "gfx942"])
def test_every_kernel_is_among_the_cases_and_every_name_occurs_once(architecture):
    cases = aot.cases(architecture)
    assert len({c.name for c in cases}) == len({c.form for c in cases}) == len(cases)
    modules = [m for name, m in sorted(sys.modules.items()) if name.startswith("ept_kernels.")]
    kernels = {
        x.fn.__name__
        for m in modules
        for x in vars(m).values()
        if isinstance(x, triton.JITFunction) and x.fn.__name__.endswith("_kernel")
    }
    assert len(kernels) >= 10
    assert kernels == {c.kernel.fn.__name__ for c in cases}
    assert {"sm_80", "sm_90", "sm_100", "gfx942"} == set(aot.TARGETS)
    # Nested absmax is rounded as in a dequantisation, and the assembler may use all registers where it has to.
    four_bit = [c for c in cases if "4bit" in c.name and "reduce" not in c.name]
    assert [c.meta["enable_fp_fusion"] for c in four_bit] == [False] * len(four_bit)
    long = [c for c in cases if c.name.startswith(("joint_prompt", "matmul_4bit "))]
    assert {c.meta.get("maxnreg") for c in long} == {255 if architecture == "cuda" else None}
    assert {c.meta.get("maxnreg") for c in cases if c not in long} == {None}
    assert {c.meta["PRECISION"] for c in cases if "PRECISION" in c.meta} == {"tf32", "bf16x6"}


def test_nothing_runs_and_nothing_is_remembered_while_launches_are_recorded():
    problem = aot.compiled_problems()[-1]
    before = launch.launches()
    (case,) = aot.record(problem, "gfx942", {"dequantize_4bit/64-bit": {"ITERS": 2}}, note=" (x)")
    assert launch.launches() == before + 1
    assert case.name.endswith(" (x)")
    assert (case.meta["UNITS"], case.meta["ITERS"], case.args[0]) == (1024, 2, torch.uint8)
    assert launch.architecture(torch.device("cpu")) == "cpu"


def test_every_kind_of_4_bit_weight_is_compiled_on_request(monkeypatch):
    few, of_weights = aot.compiled_problems()[-3:], aot.every_four_bit_problem()[:20]
    monkeypatch.setattr(aot, "compiled_problems", lambda: few)
    monkeypatch.setattr(aot, "every_four_bit_problem", lambda: of_weights)
    usual, every = aot.cases("cuda"), aot.cases("cuda", every=True)
    assert every[: len(usual)] == usual
    with_bias = [c for c in every[len(usual) :] if "bias" in c.name and c.kernel.fn.__name__ == "matmul_4bit_kernel"]
    assert with_bias
    assert all(c.args[c.kernel.arg_names.index("bias")] is not None for c in with_bias)


def test_candidates_are_launched_as_the_tuner_would(monkeypatch):
    """The launchers take every kernel's configuration from the tuner."""
    kernels = {t.kernel: t for t in tune.tunables() if "." not in t.kernel}
    assert len(kernels) >= 12
    candidates = [replace(t, candidates=[{"num_warps": 2}]) for t in kernels.values()]
    monkeypatch.setattr(aot, "tunables", lambda: candidates)
    found = {c.kernel.fn.__name__ for c in aot.candidate_cases("cuda") if c.meta["num_warps"] == 2}
    assert found == {t.kernel.split("/")[0] + "_kernel" for t in candidates}
