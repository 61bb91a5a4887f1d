"""Which way a product with a 4-bit weight goes: by tokens, shape, direction and type, and by what each way can take."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from conftest import INTERPRETED
from four_bit_problems import watched_memory

from ept_kernels import launch
from ept_kernels.dev.problems import FourBit
from ept_kernels.four_bit import paths as four_bit_paths
from ept_kernels.four_bit.paths import BITSANDBYTES, COUNTS, FUSED, LIBRARY, chosen_path, path_of
from ept_kernels.four_bit.weight import Weight
from ept_kernels.launch import configured

__all__ = ["watched_memory"]

pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")  # its import registers its product

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
GPU = torch.device("cuda", 0)  # the choice looks at its name alone

TABLE = {
    "matmul_4bit.path/16-bit": {
        "1x4096x4096": {"PATH": BITSANDBYTES},
        "4x4096x4096": {"PATH": FUSED},
        "64x4096x4096": {"PATH": FUSED},
        "96x4096x4096": {"PATH": BITSANDBYTES},
        "128x4096x4096": {"PATH": LIBRARY},
        "1x3072x768": {"PATH": FUSED},
        "128x3072x768": {"PATH": BITSANDBYTES},
    },
    "matmul_4bit.path/32-bit": {"7x4096x4096": {"PATH": LIBRARY}},
}


def weight_of(rows: int, columns: int, device: Any, **options: Any) -> Weight:
    weight = FourBit(rows, columns, **{"nested": False, **options}).weight(device)
    return Weight(*weight.tensors, *weight.sizes)


@pytest.fixture
def table(tmp_path, monkeypatch):
    path = tmp_path / "Some_GPU.json"
    path.write_text(json.dumps({"device": "Some GPU", "kernels": TABLE}), encoding="utf-8")
    monkeypatch.setattr(launch, "config_file", lambda device: path)
    caches = (launch._measured, chosen_path)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


@pytest.mark.parametrize(
    "count, rows, columns, dtype, expected",
    [
        (1, 4096, 4096, BF16, BITSANDBYTES),
        (4, 4096, 4096, F16, FUSED),  # both 16-bit types share what was measured
        (96, 4096, 4096, BF16, BITSANDBYTES),
        (128, 4096, 4096, BF16, LIBRARY),
        (128, 5120, 5120, BF16, LIBRARY),  # the nearest shape
        (1, 2304, 768, BF16, FUSED),
        (128, 2304, 768, BF16, BITSANDBYTES),
        (192, 4096, 4096, BF16, LIBRARY),  # unmeasured: not the way of another number of tokens
        (32, 4096, 4096, BF16, FUSED),
        (96, 256, 768, BF16, LIBRARY),  # nor of another shape
        (7, 4096, 4096, F32, LIBRARY),
        (1, 4096, 4096, F32, BITSANDBYTES),
    ],
)
def test_the_measured_path_of_tokens_shape_and_type(table, count, rows, columns, dtype, expected):
    assert chosen_path(count, rows, columns, dtype, GPU) == expected


def test_unmeasured_on_a_gpu(monkeypatch):
    """bitsandbytes' own product for the fewest tokens, the fused kernel for few of 16 bits."""
    monkeypatch.setattr(launch, "config_for", lambda kernel, size, device, default, exact: default)
    chosen_path.cache_clear()
    counts = (1, 4, 5, 7, 8, 64, 96)
    found = {dtype: [chosen_path(count, 64, 64, dtype, GPU) for count in counts] for dtype in (BF16, F32)}
    chosen_path.cache_clear()
    assert found == {BF16: 2 * [BITSANDBYTES] + 4 * [FUSED] + [LIBRARY], F32: 4 * [BITSANDBYTES] + 3 * [LIBRARY]}


def test_a_number_in_between_goes_the_way_of_the_next_larger(device, monkeypatch):
    asked = []
    monkeypatch.setattr(four_bit_paths, "chosen_path", lambda count, *rest: asked.append(count) or FUSED)
    weight = weight_of(64, 128, device)
    tokens = (1, 2, 4, 5, 6, 7, 8, 9, 33, 64, 65, 1025, 1536)
    assert [path_of(weight, count, F16) for count in tokens] == [FUSED] * len(tokens)
    assert asked == [1, 4, 4, 5, 7, 7, 8, 16, 64, 64, 96, 1536, 1536]
    assert path_of(weight, COUNTS[-1] + 1, F16) == LIBRARY


@pytest.mark.parametrize("path", [LIBRARY, FUSED, BITSANDBYTES])
def test_the_launchers_go_the_chosen_way(path, device, monkeypatch):
    weight = weight_of(64, 128, device, nested=True)
    taken = []
    ways = {FUSED: "fused_product", LIBRARY: "dequantize_4bit", BITSANDBYTES: "bitsandbytes_product"}
    for way, name in ways.items():
        there = getattr(four_bit_paths, name)
        monkeypatch.setattr(four_bit_paths, name, lambda *a, way=way, there=there: taken.append(way) or there(*a))
    with configured({"matmul_4bit.path/16-bit": {"PATH": path}}):
        four_bit_paths.matmul_4bit(torch.ones(3, 128, dtype=F16, device=device), *weight[:5], None, *weight[5:])
        four_bit_paths.matmul_4bit_backward(torch.ones(3, 64, dtype=F16, device=device), *weight)
    assert taken == [path, LIBRARY]  # the input gradient has no other way


@pytest.mark.parametrize(
    "columns, options, change, expected",
    [
        (128, {}, {}, BITSANDBYTES),
        (128, {"nested": True}, {}, BITSANDBYTES),
        (128, {"nested": True}, {"nested_block_size": 128}, FUSED),  # they insist on 256
        (128, {"shift": 4}, {}, FUSED),  # whole words, no 16 bytes
        (128, {"shift": 1}, {}, LIBRARY),
        (96, {}, {}, LIBRARY),  # blocks straddle rows
        (128, {}, {"rows": 2**25}, FUSED),  # they count in 32 bits
    ],
    ids=str,
)
def test_what_bitsandbytes_cannot_take_goes_another_way(columns, options, change, expected, device):
    weight = weight_of(32, columns, device, **options)._replace(**change)
    with configured({"matmul_4bit.path/16-bit": {"PATH": BITSANDBYTES}}):
        assert path_of(weight, 3, F16) == expected
        if expected == BITSANDBYTES:
            assert path_of(weight, 33, F16) == expected


def test_without_bitsandbytes_the_heuristic_decides(device, monkeypatch):
    weight = weight_of(32, 128, device)
    monkeypatch.setattr(four_bit_paths, "has_bitsandbytes", lambda: False)
    with configured({"matmul_4bit.path/16-bit": {"PATH": BITSANDBYTES}}):
        assert [path_of(weight, count, F16) for count in (1, 64, 65)] == [FUSED, FUSED, LIBRARY]
    with configured({"matmul_4bit.path/32-bit": {"PATH": BITSANDBYTES}}):
        assert path_of(weight, 1, F32) == (FUSED if INTERPRETED else LIBRARY)
    assert path_of(weight, 0, F16) == LIBRARY


def test_float32_is_never_fused_on_a_gpu():
    """There is no such kernel, whatever a file says."""
    packed, absmax = torch.empty(64 * 64, dtype=torch.uint8, device="meta"), torch.empty(128, device="meta")
    weight = Weight(packed, absmax, None, None, None, "nf4", 64, 0, 64, 128)
    for bits, dtype, expected in ((16, F16, FUSED), (32, F32, LIBRARY)):
        with configured({f"matmul_4bit.path/{bits}-bit": {"PATH": FUSED}}):
            assert path_of(weight, 1, dtype) == expected


@pytest.mark.parametrize("bias", [None, F32], ids=["", "bias"])
@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_bitsandbytes_path_is_right(quant_type, nested, bias, device):
    """In float32, where the sums are all the difference there is; offset and bias in the forms that it takes."""
    ours = FourBit(48, 128, (), quant_type, nested=nested).weight(device)
    weight = Weight(*ours.tensors, *ours.sizes)
    if nested:
        weight = weight._replace(nested_offset=weight.nested_offset.view(1))  # type: ignore[union-attr]
    x = torch.randn(2, 3, 128, device=device)
    b = None if bias is None else torch.randn(48, device=device, dtype=torch.float64).to(bias)
    results = []
    for path in (BITSANDBYTES, LIBRARY):
        with configured({"matmul_4bit.path/32-bit": {"PATH": path}}):
            results.append(four_bit_paths.matmul_4bit(x, *weight[:5], b, *weight[5:]))
    assert results[0].shape == (2, 3, 48)
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


def test_bitsandbytes_is_given_what_its_schema_asks_for():
    """Without memory its fake runs, which checks more than the operator does: the offset has to be a scalar."""
    parts = (torch.empty(64 * 64, dtype=torch.uint8), torch.empty(128, dtype=torch.uint8))
    nested = (torch.empty(1), torch.empty(256), torch.empty(1))
    weight = Weight(*(part.to("meta") for part in (*parts, *nested)), "nf4", 64, 256, 64, 128)
    for bias in (None, torch.empty(64, dtype=BF16, device="meta")):
        out = four_bit_paths.bitsandbytes_product(torch.empty(3, 128, dtype=F16, device="meta"), weight, bias)
        assert (out.shape, out.dtype) == ((3, 64), F16)
