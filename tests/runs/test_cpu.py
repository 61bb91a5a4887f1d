"""The dtype, the attention and the memory of a run on a CPU."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest
import torch
from tiny_models import make_model

from ept.runs import cpu
from ept.runs.config import ModelConfig
from ept.runs.loading import load_base_model

CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path):
    make_model("llama").save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("settings", "max_length", "expected"),
    [
        ({"dtype": "bfloat16"}, cpu.MAX_EAGER_TEXT, "eager"),
        ({"dtype": "bfloat16"}, cpu.MAX_EAGER_TEXT + 1, "sdpa"),
        ({"dtype": "bfloat16"}, None, "sdpa"),
        ({"dtype": "bfloat16", "attn_implementation": "sdpa"}, 8, "sdpa"),
        ({"dtype": "float32"}, 8, "sdpa"),
        ({"dtype": "float32", "attn_implementation": "eager"}, 8, "eager"),
        ({"dtype": "auto"}, 8, "sdpa"),
    ],
)
def test_attention_is_written_out_where_that_is_faster(folder, settings, max_length, expected):
    model = ModelConfig(name_or_path=str(folder), **settings)
    base = load_base_model(model, "CAUSAL_LM", 0, 0, device=CPU, max_length=max_length)
    assert base.config._attn_implementation == expected


@pytest.mark.parametrize(("avx512", "amx"), [(True, False), (False, True), (False, False)])
def test_the_fastest_dtype_is_what_the_processor_multiplies(folder, avx512, amx, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    base = load_base_model(ModelConfig(name_or_path=str(folder), dtype="fastest"), "CAUSAL_LM", 0, 0, device=CPU)
    assert base.dtype == (torch.bfloat16 if avx512 or amx else torch.float32)


def test_other_accelerators_stay_at_float32():
    assert cpu.fastest_dtype(torch.device("mps")) == torch.float32


FAULTS = """
import importlib.util, resource, sys, torch
spec = importlib.util.spec_from_file_location("cpu", sys.argv[1])  # alone: the package takes seconds to import
spec.loader.exec_module(cpu := importlib.util.module_from_spec(spec))
def faults():
    torch.zeros(1 << 24).sum()  # 64 MiB
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.zeros(1 << 24).sum()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
# Once is no proof against it: where the heap lies otherwise, or its pages were taken for others, a first time is slow.
print(faults(), cpu.keep_freed_memory(), min(faults() for _ in range(5)))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's malloc")
def test_memory_is_kept_from_step_to_step():
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_", "LD_PRELOAD"))}
    command = [sys.executable, "-c", FAULTS, cpu.__file__]
    found = []
    for _ in range(5):  # where the heap has no room to grow, which is drawn anew for each process, nothing is kept
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=clean)
        before, kept, after = done.stdout.split()
        assert kept == "True"
        found.append((int(before), int(after)))  # of 16,384 pages
        if found[-1][1] < 100:
            break
    assert found[-1][1] < 100 < 1000 < found[-1][0], found


def test_an_environment_that_sets_malloc_is_left_alone(monkeypatch):
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "1000000")
    assert not cpu.keep_freed_memory()
