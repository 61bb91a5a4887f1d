"""Launch configurations as data: the nearest size, the heuristic as fallback, one warning, damaged files."""

from __future__ import annotations

import contextlib
import json
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ept_kernels import launch

GPU = torch.device("cuda", 0)
DEFAULT = {"BLOCK": 64, "num_warps": 4}
MEASURED = {
    "one": {"768": {"BLOCK": 16}, "4096": {"BLOCK": 128, "num_warps": 8}},
    "two/16-bit": {"4096x16": {"BLOCK": 1}, "4096x64": {"BLOCK": 2}, "768x16": {"BLOCK": 3}, "768": {"BLOCK": 4}},
    "product.path": {"8x4096x4096": {"PATH": 2}},
}


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The configuration file of a device that this machine need not have."""
    path = tmp_path / "Some_GPU.json"
    monkeypatch.setattr(launch, "config_file", lambda device: path)
    launch._measured.cache_clear()
    yield path
    launch._measured.cache_clear()


@pytest.mark.parametrize(
    "kernel, size, expected",
    [
        ("one", 768, {"BLOCK": 16, "num_warps": 4}),
        ("one", 1500, {"BLOCK": 16, "num_warps": 4}),
        ("one", 2100, {"BLOCK": 128, "num_warps": 8}),  # nearer by the ratio, not by the difference
        ("one", 8192, {"BLOCK": 128, "num_warps": 8}),
        ("one", 8200, DEFAULT),  # measured at less than half of it: too far
        ("one", 380, DEFAULT),
        ("two/16-bit", (5000, 50), {"BLOCK": 2, "num_warps": 4}),
        ("two/16-bit", (700, 24), {"BLOCK": 3, "num_warps": 4}),
        ("two/16-bit", 768, {"BLOCK": 4, "num_warps": 4}),
        ("two/32-bit", (4096, 16), DEFAULT),
        ("one", (768, 16), DEFAULT),  # measured by one number, asked for by two
        ("product.path", (8, 4096, 11008), {**DEFAULT, "PATH": 2}),
        ("product.path", (8, 4096, 4096 * 16), DEFAULT),
        ("product.path", (9, 4096, 4096), DEFAULT),  # another number of tokens
    ],
)
def test_the_nearest_measured_size_is_taken(file, kernel, size, expected):
    file.write_text(json.dumps({"device": "Some GPU", "kernels": MEASURED}), encoding="utf-8")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert launch.config_for(kernel, size, GPU, DEFAULT, exact=int(kernel == "product.path")) == expected


def test_without_a_file_the_heuristic_is_taken_and_one_warning_given(file):
    with pytest.warns(UserWarning, match=r"Some_GPU\.json: heuristic ones are used.*ept_kernels\.dev\.tune") as caught:
        found = [launch.config_for(k, 64, torch.device("cuda", i), DEFAULT) for k in ("one", "two") for i in range(3)]
    assert found == 6 * [DEFAULT]
    assert len(caught) == 1


def test_a_cpu_has_no_file_and_no_warning(file):
    file.write_text(json.dumps({"kernels": MEASURED}), encoding="utf-8")
    assert launch.config_for("one", 768, torch.device("cpu"), DEFAULT) == DEFAULT


@pytest.mark.parametrize(
    "content, detail",
    [
        ("{", "Expecting property name"),
        ("[]", "indices must be integers"),
        ("{}", "no 'kernels'"),
        ('{"kernels": {"one": {"wide": {"BLOCK": 1}}}}', "'wide'"),
        ('{"kernels": {"one": {"0": {"BLOCK": 1}}}}', "size '0'"),
        ('{"kernels": {"one": {"768": {"BLOCK": "16"}}}}', "whole numbers"),
        ('{"kernels": {"one": {"768": {"BLOCK": true}}}}', "whole numbers"),
        ('{"kernels": {"one": {"768": {}}}}', "whole numbers"),
        ('{"kernels": {"one": {"768": [16]}}}', "items"),
        ('{"kernels": {"one": 16}}', "items"),
        (b"\xff\xfe", "utf-8"),
    ],
)
def test_a_damaged_file_is_named_and_not_used(file, content, detail):
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=r"Some_GPU\.json is damaged .*delete it") as error:
        launch.load_configs(file)
    assert detail in str(error.value)
    with pytest.warns(UserWarning, match="damaged") as caught:
        found = [launch.config_for(kernel, 768, GPU, DEFAULT) for kernel in ("one", "one", "two")]
    assert found == 3 * [DEFAULT]
    assert len(caught) == 1


def test_what_is_tried_comes_first_and_the_caches_follow(file):
    file.write_text(json.dumps({"kernels": MEASURED}), encoding="utf-8")

    @launch.cached_choice
    def chosen(kernel: str, size: int = 768, device: torch.device = GPU) -> dict[str, int]:
        return launch.config_for(kernel, size, device, DEFAULT)

    before = chosen("one")
    with launch.configured({"one": {"num_warps": 2}, "two": {"BLOCK": 8}}):
        assert chosen("one") == {"BLOCK": 64, "num_warps": 2}
        assert chosen("two") == {"BLOCK": 8, "num_warps": 4}
        with launch.configured({"one": {"BLOCK": 5}}):
            assert [chosen(name)["BLOCK"] for name in ("one", "two")] == [5, 8]
        assert chosen("one", 4096, torch.device("cpu")) == {"BLOCK": 64, "num_warps": 2}
    assert chosen("one") == before == {"BLOCK": 16, "num_warps": 4}


def test_a_choice_for_every_length_of_a_long_text_is_kept():
    @launch.cached_choice
    def chosen(length: int) -> list[int]:
        return [length]

    first = chosen(0)
    for length in range(1, 2049):
        chosen(length)
    assert chosen(0) is first


def test_every_shipped_file_is_sound_and_known_to_the_tuner():
    from ept_kernels.dev import aot, compile_only

    assert list(aot.shipped_cases()) or not list(launch.CONFIGS.glob("*.json"))
    for path in launch.CONFIGS.glob("*.json"):
        content = json.loads(path.read_text(encoding="utf-8"))
        assert content["device"] not in ("", "cpu"), path
        assert content["target"] in compile_only.TARGETS, path


def test_shipped_configurations_are_compiled_and_unknown_ones_refused(tmp_path, monkeypatch):
    from ept_kernels.dev import aot
    from ept_kernels.dev.tunables import tunables

    tunable = tunables()[0]
    size = "x".join(map(str, tunable.size))
    config = {**tunable.default, "num_warps": 8}
    kernels = {tunable.kernel: {size: config}, "product.path": {"8": {"PATH": 1}}}
    (tmp_path / "Some_GPU.json").write_text(json.dumps({"kernels": kernels, "target": "sm_90"}), encoding="utf-8")
    monkeypatch.setattr(launch, "CONFIGS", tmp_path)
    (case,) = aot.shipped_cases()
    assert case.target == "sm_90"
    compiled = []
    monkeypatch.setattr(aot, "compile_case", lambda case, target, is_counted: compiled.append(target) or ([], None))
    monkeypatch.setattr(aot, "ProcessPoolExecutor", lambda *_, **__: contextlib.nullcontext(SimpleNamespace(map=map)))
    aot.compile_all([case, case._replace(target="")], ["sm_80", "sm_90"], "", 1)
    assert compiled == ["sm_80", "sm_90", "sm_90"]
    assert (case.configs, case.note) == ({tunable.kernel: config}, " (Some_GPU)")
    assert case.problem == tunable.problem.small
    (tmp_path / "Some_GPU.json").write_text(json.dumps({"kernels": {"gone": {size: config}}}), encoding="utf-8")
    with pytest.raises(ValueError, match=r"gone at .* does not know"):
        list(aot.shipped_cases())


@pytest.mark.parametrize("size, expected", [(0, 16), (1, 16), (16, 16), (17, 32), (64, 64), (65, 128)])
def test_padded(size, expected):
    assert launch.padded(size) == expected


@pytest.mark.parametrize(
    "architecture, dtype, known, expected",
    [
        ("cpu", torch.float32, True, "ieee"),
        ("cuda", torch.bfloat16, False, "tf32"),
        ("cuda", torch.float32, True, "bf16x6"),
        ("cuda", torch.float32, False, "tf32x3"),
        ("gfx942", torch.float16, False, "tf32"),
        ("gfx942", torch.float32, False, "ieee"),
        ("hip", torch.float16, True, "bf16x3"),
        ("hip", torch.float16, False, "ieee"),
    ],
)
def test_precision_is_one_that_the_device_and_this_triton_have(architecture, dtype, known, expected, monkeypatch):
    """Triton 3.4 has no products in pieces of bfloat16."""
    monkeypatch.setattr(launch, "architecture", lambda device: architecture)
    monkeypatch.setattr(launch, "_has_bfloat16_pieces", lambda: known)
    assert launch.precision(dtype, torch.device("cpu")) == expected


def test_tensors_on_several_devices_are_refused():
    def on(index: int) -> Any:
        name = "cpu" if index < 0 else f"cuda:{index}"
        return SimpleNamespace(
            data_ptr=lambda: 16,
            get_device=lambda: index,
            device=torch.device(name),
            dtype=torch.float32,
            shape=torch.Size([3]),
        )

    assert launch.kinds(on(1), None, on(1))[2] == torch.device("cuda:1")
    for indices, named in (((0, 1), "cuda:0 and cuda:1"), ((0, 0, -1), "cpu and cuda:0"), ((-1, 0), "cpu and cuda:0")):
        with pytest.raises(ValueError, match=f"tensors are on {named}: move them"):
            launch.kinds(*map(on, indices))


def test_tensor_memory_is_looked_for_on_the_tensors_device_or_the_gpu_that_is_stood_in_for(monkeypatch):
    """Two GPUs of a machine may differ, and the other one may be current."""
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: {0: (9, 0), 1: (10, 3)}[device.index])
    devices = [torch.device(name) for name in ("cpu", "cuda:0", "cuda:1")]
    assert [launch.has_tensor_memory(device) for device in devices] == [False, False, True]
    for architecture in (90, 100, 120, "gfx942"):
        with launch.acting_as(architecture):
            assert launch.has_tensor_memory(devices[0]) == (architecture == 100)
