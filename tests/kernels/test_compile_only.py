"""The driver that only compiles: it refuses what a GPU would refuse, and finds spills."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from packaging.version import Version

pytest.importorskip("triton", reason="Triton is not installed")

import triton
import triton.language as tl
from triton.compiler import CompiledKernel
from triton.errors import TritonError

from ept_kernels import launch
from ept_kernels.dev import aot, compile_only
from ept_kernels.dev.problems import LLAMA_7B, LLAMA_7B_BY_TOKEN, T5_BASE_JOINT, FourBit, JointPrompt
from ept_kernels.frozen import launchers as frozen
from ept_kernels.frozen.problems import Rotary
from ept_kernels.joint_prompt import launchers as joint
from ept_kernels.library import launcher_of
from ept_kernels.problem import Problem
from ept_kernels.prompted_embedding.forward import prompted_embedding_kernel


@triton.jit
def square(x, n, SIZE: tl.constexpr):
    """Adds up products of tiles, of which `num_stages` wait in shared memory."""
    o_x = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    b_sum = tl.zeros([SIZE, SIZE], tl.float32)
    for i in range(n):
        b_x = tl.load(x + i * SIZE * SIZE + o_x)
        b_sum += tl.dot(b_x, b_x)
    tl.store(x + o_x, b_sum.to(tl.float16))


@triton.jit
def hungry(x, n, SIZE: tl.constexpr):
    """Holds `SIZE` elements in registers, whatever the compiler may reorder."""
    b_x = tl.load(x + tl.arange(0, SIZE))
    tl.store(x + tl.arange(0, SIZE), b_x * tl.sum(b_x, axis=0))


FITS = {"SIZE": 64, "num_warps": 4, "num_stages": 2}


@pytest.mark.parametrize(
    "kernel, target, options, grid, message",
    [
        (square, "sm_90", FITS, (1,), None),
        (square, "gfx942", FITS, (1,), None),
        (square, "sm_90", {**FITS, "num_stages": 40}, (1,), "shared memory, Required: 327680, Hardware limit: 232448"),
        (square, "sm_90", FITS, (1, 2**16), "square is launched with a grid of .1, 65536, 1., but the limits are"),
        (hungry, "sm_80", {"SIZE": 2**14, "num_warps": 1}, (1,), "hungry spills [0-9]+ bytes a thread on sm_80"),
        (hungry, "gfx942", {"SIZE": 2**16, "num_warps": 1}, (1,), "hungry spills [0-9]+ bytes a thread on gfx942"),
    ],
    ids=str,
)
def test_a_launch_is_refused_as_by_the_gpu(kernel, target, options, grid, message):
    x = torch.ones(64, dtype=torch.float16)
    with compile_only.driving(target):
        for _ in range(2):  # a refusal stays
            if message is None:
                assert kernel[grid](x, 3, **options).n_regs > 0
            else:
                with pytest.raises(TritonError, match=message):
                    kernel[grid](x, 3, **options)
    assert (x == 1).all()


@pytest.mark.skipif(hasattr(CompiledKernel, "__del__"), reason="Triton would unload it since 3.9: an older one runs it")
def test_a_kernel_is_loaded_once():
    """Loading means running a disassembler, while this driver also measures the host's cost of launching."""
    with compile_only.driving("sm_90") as driver:
        loaded = mock.Mock(side_effect=driver.load_binary)
        driver.load_binary = loaded
        square.device_caches.clear()
        for _ in range(3):
            square[(1,)](torch.ones(64, dtype=torch.float16), 3, **FITS)
    assert loaded.call_count == 1


@pytest.mark.parametrize("declined", [False, True])
def test_products_are_fused_with_sums_whatever_tritons_default(declined):
    """Triton 3.9 warns if the option is not given."""
    meta = {**FITS, "enable_fp_fusion": False} if declined else FITS
    with compile_only.driving("sm_90"), warnings.catch_warnings():
        warnings.simplefilter("error")
        compiled = launch.launch(square, (1,), torch.ones(64, dtype=torch.float16), 3, **meta)
    assert compiled.metadata.enable_fp_fusion is not declined


@pytest.fixture
def uncompiled(tmp_path, monkeypatch):
    """Forgets what has been compiled of the joint prompt."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    for kernel in vars(joint).values():
        if isinstance(kernel, triton.JITFunction):
            kernel.device_caches.clear()


@pytest.mark.skipif(
    not hasattr(triton, "AsyncCompileMode"), reason="Triton 3.4 compiles one after the other: 3.5 or newer runs it"
)
def test_kernels_that_are_launched_in_turn_are_compiled_side_by_side(uncompiled, monkeypatch):
    """Each waits until all four have begun; a second call, and one with other sizes, compile nothing. A mode of the
    caller does not interfere.
    """
    all_begun, compiled = threading.Barrier(4, timeout=60), []

    def compile_with_the_others(source: Any, *arguments: Any, **options: Any) -> Any:
        all_begun.wait()
        compiled.append(source.name)
        return compile_kernel(source, *arguments, **options)

    compile_kernel = triton.compiler.compile
    parse, one_at_a_time = triton.JITFunction.parse, threading.Lock()

    def parse_alone(kernel: Any) -> Any:
        with one_at_a_time:  # as Python 3.11.7 cannot do otherwise
            return parse(kernel)

    monkeypatch.setattr(triton.JITFunction, "parse", parse_alone)
    monkeypatch.setattr(launch, "_parses_one_at_a_time", lambda python: False)
    monkeypatch.setattr(triton.compiler, "compile", compile_with_the_others)
    with ThreadPoolExecutor() as executor, triton.AsyncCompileMode(executor), compile_only.driving("sm_90"):
        for s in (3, 3, 5):
            launcher_of("joint_prompt")(*JointPrompt(s=s, d=12, r=2).inputs())
    assert sorted(compiled) == [f"joint_prompt_{name}_kernel" for name in ("expand", "products", "rows", "sum")]


def test_where_threads_cannot_parse_kernels_are_compiled_one_after_the_other(uncompiled, monkeypatch):
    """Some releases of Python raise a SystemError there, now and then."""
    compiled = []

    def compile_here(source: Any, *arguments: Any, **options: Any) -> Any:
        compiled.append((source.name, threading.current_thread() is threading.main_thread()))
        return compile_kernel(source, *arguments, **options)

    compile_kernel = triton.compiler.compile
    monkeypatch.setattr(launch, "_parses_one_at_a_time", lambda python: True)
    monkeypatch.setattr(triton.compiler, "compile", compile_here)
    with compile_only.driving("sm_90"):
        launcher_of("joint_prompt")(*JointPrompt(s=3, d=12, r=2).inputs())
    names = ("expand", "products", "rows", "sum")
    assert sorted(compiled) == [(f"joint_prompt_{name}_kernel", True) for name in names]


def test_which_releases_of_python_cannot_parse_in_threads():
    cannot = {(3, 11, 0), (3, 11, 7), (3, 12, 0), (3, 12, 1)}
    others = {(3, 10, 14), (3, 11, 8), (3, 12, 2), (3, 13, 0), (3, 14, 0)}
    assert {python for python in cannot | others if launch._parses_one_at_a_time(python)} == cannot


SCRIPT = """
import os
import ept_kernels
from ept_kernels.dev import compile_only
from ept_kernels.dev.problems import PromptedEmbedding
from triton import knobs

asked = []
knobs.compilation.listener = lambda *, src, cache_hit, **rest: asked.append((src.name, cache_hit))
compile_only.activate("sm_90")
knobs.propagate_env = False
knobs.compilation.disable_line_info &= not os.environ.get("WITH_LINES")  # as they are on a GPU
before = ept_kernels.launch.launches()
for n in (5, 5, 6):
    ept_kernels.token_at(*PromptedEmbedding(n, m=6, operator="token_at").inputs())
assert compile_only.active() == "sm_90"
print(ept_kernels.backend("cpu"), ept_kernels.launch.launches() - before, *asked)
"""


def run_in_a_process(**variables: str) -> str:
    inherited = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "EPT_KERNELS")}
    command = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(command, env={**inherited, **variables}, capture_output=True, text=True)
    assert done.stderr == ""
    return done.stdout.strip()


def test_a_packed_cache_serves_another_process_in_another_place(tmp_path, monkeypatch):
    """One process runs the operators as on a GPU and compiles without line numbers; another, which would include them,
    finds everything compiled.
    """
    cold = run_in_a_process(TRITON_CACHE_DIR=str(tmp_path / "warm"), TRITON_STORE_BINARY_ONLY="1")
    assert cold == "triton 3 ('token_at_kernel', False)"
    archive = aot.pack(tmp_path / "warm", "sm_90")
    kept = {path.suffix: path.read_bytes() for path in (tmp_path / "warm").glob("*/*")}
    assert set(kept) == {".json", ".cubin"}
    assert b".text.token_at_kernel" in kept[".cubin"]
    assert b"debug_line" not in kept[".cubin"]
    (tmp_path / "warm").rename(tmp_path / "gone")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "elsewhere"))
    assert aot.unpack(archive) == 1
    assert run_in_a_process(WITH_LINES="1") == "triton 3 ('token_at_kernel', True)"


def test_without_line_numbers_the_code_is_the_same(tmp_path, monkeypatch):
    """This kernel would differ, and spill, if they were left out before the assembler."""
    problem, codes, with_lines = LLAMA_7B.small, [], []
    for way in (compile_only._assembling_without_lines, contextlib.nullcontext):
        monkeypatch.setattr(compile_only, "_assembling_without_lines", way)
        monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / way.__name__))
        prompted_embedding_kernel.device_caches.clear()
        with compile_only.driving("sm_90"), launch.watched() as launches:
            launcher_of(problem.operator)(*problem.inputs())
        binary = launches[-1].compiled.kernel
        with_lines.append(b"debug_line" in binary)
        codes.append(re.findall(r"/\*[0-9a-f]{4}\*/.*", compile_only.disassembled(binary, "nvdisasm", "-c")))
    assert with_lines == [False, True]
    assert len(codes[0]) > 500
    assert codes[0] == codes[1]
    prompted_embedding_kernel.device_caches.clear()


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"triton": "1.0"},
            "was made with triton 1.0 for Python .*, but this machine has triton .*: none of its kernels",
        ),
        ({"found_by": "x"}, "this machine has another build of it, or other TRITON_ variables"),
        ({"target": "?"}, "holds no kernels"),
    ],
)
def test_a_cache_that_would_not_be_found_is_refused(change, message, tmp_path, monkeypatch):
    made = {**aot.made_with("sm_90"), **change}
    (tmp_path / "warm").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(aot, "made_with", lambda target: made)
        archive = aot.pack(tmp_path / "warm", "sm_90")
    with pytest.raises(ValueError, match=message):
        aot.unpack(archive)


@pytest.mark.parametrize("width", [1, 768, 2048, 5120, 6144, 7168, 12000, 16384])
def test_norms_of_any_width_ask_for_a_number_of_warps_that_there_is(width):
    """The interpreter takes any number, a compiler only powers of two."""
    for kernel in ("rms_norm", "rms_norm_backward"):
        assert frozen.heuristic(kernel, width, torch.device("cpu"))["num_warps"] in (4, 8, 16, 32)


def compiled(problem: Problem, target: str, which: int = -1) -> Any:
    """Compiles what `problem` launches, and returns one of the kernels, by default the last."""
    with compile_only.driving(target), launch.watched() as launches:
        launcher_of(problem.operator)(*problem.inputs())
    for found in launches:
        found.kernel.device_caches.clear()  # for tests that ask what is compiled
    return launches[which].compiled


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_the_next_tokens_are_loaded_while_the_sums_by_the_token_are_multiplied(target):
    assert "ttg.async_copy_global_to_local" in compiled(LLAMA_7B_BY_TOKEN.small.backward, target, 1).asm["ttgir"]


@pytest.mark.parametrize(
    "problem, which",
    [(FourBit(4096, 4096, (16,), dtype=torch.bfloat16), 1), (T5_BASE_JOINT.small, 0)],
    ids=["splits", "joint prompt"],
)
def test_sums_in_parts_are_read_16_bytes_at_a_time(problem, which):
    assert re.search(r"ld\.global\S*\.v4|cp\.async\.cg", compiled(problem, "sm_90", which).asm["ptx"])


@pytest.mark.parametrize("K, launches", [(joint.MAX_GATES, [4, 5]), (joint.MAX_GATES + 1, [0, 0])])
def test_more_gates_than_registers_hold_take_the_reference(K, launches):
    """The driver refuses a kernel that spills."""
    problem, counts = replace(T5_BASE_JOINT, K=K, h=1), []
    for one in (problem, problem.backward):
        with compile_only.driving("sm_90"), launch.watched() as launched:
            launcher_of(one.operator)(*one.inputs())
        counts.append(len(launched))
    assert counts == launches


@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
def test_rotated_pairs_are_read_and_written_more_than_one_number_at_a_time(interleaved):
    code = compiled(Rotary(2, 16, 16, 16, 256, 64, torch.bfloat16, interleaved=interleaved), "sm_90").asm["ptx"]
    assert re.findall(r"(?:ld|st)\.global", code)
    assert not re.findall(r"(?:ld|st)\.global\S*\.b16", code)


@pytest.mark.parametrize("operator", ["prompted_embedding_by_token", "prompted_embedding_by_token_backward"])
def test_matrices_of_a_rank_that_16_divides_are_read_in_fewer_loads(operator):
    odd, even = (
        compiled(replace(LLAMA_7B_BY_TOKEN.small, r=r, operator=operator), "sm_90", 0).asm["ptx"] for r in (60, 64)
    )
    assert len(re.findall(r"ld\.global|cp\.async\.c", even)) < len(re.findall(r"ld\.global|cp\.async\.c", odd))


@pytest.mark.parametrize("target", compile_only.TARGETS)
@pytest.mark.parametrize("is_packed", [False, True], ids=["padded", "packed"])
def test_threads_exchange_nothing_in_the_loop_over_texts(is_packed, target):
    problem = replace(LLAMA_7B, r=30)
    code = compiled(problem.packed.small if is_packed else problem.small, target).asm["ttgir"]
    after_the_product = code[code.rindex("tt.dot") : code.rindex("ttg.convert_layout")]
    assert "scf.for" not in after_the_product


@pytest.mark.parametrize("target", compile_only.TARGETS)
@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
def test_threads_exchange_nothing_in_a_dequantisation_to_16_bits(nested, target):
    problem = FourBit(4096, 4096, (), nested=nested, dtype=torch.bfloat16, operator="dequantize_4bit")
    kernel = compiled(problem, target)
    assert kernel.metadata.shared == 0
    assert not re.search("shfl|permute|permlane|dpp", kernel.asm["llir"])
    if Version(triton.__version__) < Version("3.9"):  # which has layouts that differ in their names alone
        assert "ttg.convert_layout" not in kernel.asm["ttgir"]
