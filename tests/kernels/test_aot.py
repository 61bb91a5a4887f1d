"""The ahead-of-time compiler finds the faults that it is for, and compiles every kernel."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

import triton
import triton.language as tl
from triton import knobs

from ept_kernels import launch
from ept_kernels.dev import aot
from ept_kernels.dev.compile_only import driving
from ept_kernels.dev.problems import JointPrompt, PackedEmbedding, PromptedEmbedding
from ept_kernels.dev.tunables import tunables
from ept_kernels.launch import Launch
from ept_kernels.problem import Problem

ROW = {"kernel": "k", "target": "sm_80", "registers": 1, "shared_bytes": 0, "instructions": 1}
ROW |= {"per_weight": ""}


@triton.jit
def hungry(x, SIZE: tl.constexpr):
    """Holds `SIZE` elements in the registers of one warp, whatever the compiler may reorder."""
    b_x = tl.load(x + tl.arange(0, SIZE))
    tl.store(x + tl.arange(0, SIZE), b_x * tl.sum(b_x, axis=0))


@dataclass(frozen=True)
class Hungry(Problem):
    size: int = 0
    operator: str = field(default="hungry", kw_only=True)

    def inputs(self, device: Any = "cpu", seed: int = 0) -> tuple[Any, ...]:
        return torch.ones(16), self.size


def launch_hungry(x: torch.Tensor, size: int) -> None:
    for _ in range(2):
        launch.launch(hungry, (1,), x, SIZE=size, num_warps=1, num_stages=1)


@pytest.mark.parametrize("target", ["sm_80", "gfx942"])
def test_kernels_are_described_once_and_a_spill_is_found(target, monkeypatch):
    monkeypatch.setattr(aot, "launcher_of", lambda operator: launch_hungry)
    chosen = [aot.Case(Hungry(size), {}, " (x)") for size in (2**7, 2**8, 2**15)]
    rows, refused = aot.compile_all(chosen, [target], "", jobs=1)
    assert [row["kernel"] for row in rows] == ["hungry size=128 (x)", "hungry size=256 (x)"]
    assert all(row["target"] == target for row in rows)
    assert 0 < rows[0]["registers"] <= rows[1]["registers"]
    assert 0 < rows[0]["instructions"] < rows[1]["instructions"]
    (reason,) = refused
    assert reason.startswith(f"hungry size={2**15} (x) on {target}: hungry spills ")


@pytest.mark.parametrize("refused", [[], ["k spills"]], ids=["fine", "spill"])
def test_the_command_fails_on_a_problem(refused, monkeypatch, capsys):
    monkeypatch.setattr(aot, "compile_all", lambda cases, *_: ([ROW], refused) if cases else ([], []))
    monkeypatch.setattr(sys, "argv", ["aot"])
    with pytest.raises(SystemExit) as stopped:
        aot.main()
    assert stopped.value.code == ("\n".join(refused) or 0)
    assert f"{len(refused)} problems" in capsys.readouterr().out


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> set[Any]:
    """The kernels that Triton was asked to compile for a GPU; it compiles none of them."""
    keys: set[Any] = set()

    def hook(*, key: str, fn: Any, **rest: Any) -> bool:
        keys.add((fn.name, key))
        return True

    monkeypatch.setattr(knobs.runtime, "jit_cache_hook", hook)
    return keys


def launches(target: str, cases: Iterable[aot.Case]) -> Iterator[Launch]:
    for case in cases:
        with driving(target), launch.configured(case.configs), launch.watched() as found:
            aot.launcher_of(case.problem.operator)(*case.problem.inputs())
        yield from found


def forms(asked: set[Any], *problems: Problem) -> set[Any]:
    """Lists what Triton compiles for the launches of `problems`."""
    asked.clear()
    assert list(launches("sm_100", [aot.Case(problem, {}) for problem in problems]))
    return set(asked)


@pytest.mark.parametrize("change", [{"s": 100}, {"m": 63}, {"r": 60}, {"s": 1, "m": 1, "r": 1}, {"K": 7}], ids=str)
def test_a_compiled_joint_prompt_serves_all_lengths_and_ranks(change, asked):
    """Neither s, m, r nor up to 32 gates require another compiled kernel."""
    problem = JointPrompt(s=40, m=256, r=30)
    other = replace(problem, **change)
    expected = forms(asked, problem, problem.backward)
    assert len(expected) == 7  # six kernels; the rows' kernel differs in the backward
    assert forms(asked, other, other.backward) == expected


def test_another_batch_or_length_compiles_no_kernel_anew(asked):
    seen = []
    for batch, n in ((3, 9), (1, 9), (16, 9), (3, 1), (3, 16), (3, 33), (2, 160)):
        padded = PromptedEmbedding(n, batch=batch, m=160)
        seen.append(forms(asked, padded, padded.backward, PackedEmbedding((160, *(n,) * batch))))
        assert seen[-1] == seen[0], f"{batch} texts of {n} tokens"
    assert len(seen[0]) == 5


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_every_kernel_is_among_the_cases_and_every_name_occurs_once(target, asked):
    cases = aot.cases()
    assert len({case.problem.name for case in cases}) == len(cases)
    found = list(launches(target, cases))
    modules = [m for name, m in sorted(sys.modules.items()) if name.startswith("ept_kernels.")]
    kernels = {
        x.fn.__name__
        for m in modules
        for x in vars(m).values()
        if isinstance(x, triton.JITFunction) and x.fn.__name__.endswith("_kernel")
    }
    assert len(kernels) >= 10
    assert kernels == {launched.kernel.fn.__name__ for launched in found}
    assert {"sm_80", "sm_90", "sm_100", "gfx942"} == set(aot.TARGETS)
    # Nested absmax is rounded as in a dequantisation, and the assembler may use all registers where it has to.
    large = ("joint", "mat", "by_token")
    metas = {name: [x.meta for x in found if name in x.kernel.fn.__name__] for name in ("_4bit_kernel", *large)}
    assert {meta["enable_fp_fusion"] for meta in metas["_4bit_kernel"]} == {False}
    of_long = [meta for name in large for meta in metas[name] if "BLOCK_E" not in meta]
    assert {meta.get("maxnreg") for meta in of_long} == {None if target == "gfx942" else 255}
    assert {x.meta.get("maxnreg") for x in found if x.meta not in of_long} == {None}
    exact = "tf32x3" if triton.__version__.startswith("3.4.") else "bf16x6"
    assert {x.meta["PRECISION"] for x in found if "PRECISION" in x.meta} == {"tf32", exact}


def test_candidates_are_launched_as_the_tuner_would(monkeypatch, asked):
    """The launchers take every kernel's configuration from the tuner."""
    kernels = {t.kernel: t for t in tunables() if "." not in t.kernel}
    assert len(kernels) >= 12
    candidates = [replace(t, candidates=[{"num_warps": 2}]) for t in kernels.values()]
    monkeypatch.setattr(aot, "tunables", lambda: candidates)
    found = {x.kernel.fn.__name__ for x in launches("sm_90", aot.candidate_cases()) if x.meta["num_warps"] == 2}
    assert found == {t.kernel.split("/")[0] + "_kernel" for t in candidates}
    assert launch.architecture(torch.device("cpu")) == "cpu"
