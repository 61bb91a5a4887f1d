"""Launches and bytes of a training step, counted on meta tensors, with and without fused modules."""

from __future__ import annotations

import pytest

from benchmarks.record import ROOT
from benchmarks.step_budget import Counted, compare, table
from ept.profile.kinds import ATTENTION, ELEMENT_WISE, PRODUCTS, kind_of

MAX_LAUNCHES = 0.6  # of those without fused modules
STEPS = {"t5-base, 32 × 296": ("t5-base", 32, 296), "llama-2-7b, 8 × 296": ("llama-2-7b", 8, 296)}


@pytest.fixture(scope="module")
def counted() -> dict[str, tuple[Counted, Counted]]:
    return {step: compare(*size) for step, size in STEPS.items()}


def test_the_page_has_what_is_counted(counted):
    assert table(counted) in (ROOT / "docs/frozen.md").read_text(encoding="utf-8"), "python -m benchmarks.step_budget"


@pytest.mark.parametrize("step, gigabytes", list(zip(STEPS, (18, 50))))
def test_fused_modules_keep_a_step_within_its_budget(step, gigabytes, counted):
    before, after = counted[step]
    (launches, moved), (_, moved_before) = (counted.by_kind()[ELEMENT_WISE] for counted in (after, before))
    assert moved <= gigabytes * 1e9 < moved_before
    assert launches > 0
    assert sum(after.launches.values()) <= MAX_LAUNCHES * sum(before.launches.values())
    for kind in (PRODUCTS, ATTENTION):  # nothing else changes
        assert after.by_kind()[kind] == before.by_kind()[kind]
    assert after.operations == before.operations


@pytest.mark.parametrize(
    "operator, kind",
    {
        "aten::mm": "products",
        "aten::addmm": "products",
        "ept::matmul_4bit_backward": "products",
        "bitsandbytes::gemv_4bit": "products",
        "aten::_scaled_dot_product_flash_attention_backward": "attention",
        "bitsandbytes::dequantize_4bit": "dequantisation",
        "ept::dequantize_4bit": "dequantisation",
        "ept::prompted_embedding_backward": "prompt path",
        "ept::joint_prompt": "prompt path",
        "ept::rms_norm": "element-wise",
        "aten::mul": "element-wise",
    }.items(),
)
def test_operators_have_kinds(operator, kind):
    assert kind_of(operator) == kind
