"""The kinds of work in a training step, recognised by the names of its operators."""

from __future__ import annotations

PRODUCTS, ELEMENT_WISE, ATTENTION = "products", "element-wise", "attention"
DEQUANTISATION, PROMPT_PATH = "dequantisation", "prompt path"
KINDS = (PRODUCTS, ELEMENT_WISE, ATTENTION, DEQUANTISATION, PROMPT_PATH)
LAUNCHES = "launches"  # the rest of a step: what the processor does between operators, or a device waits for

_PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "linear", "mkldnn_linear"}
_PRODUCTS_4BIT = ("matmul_4bit", "gemm_4bit", "gemv_4bit")
_PROMPT_PATH = ("prompted_embedding", "joint_prompt", "token_at", "_fused_adam", "_foreach")  # and its update


def kind_of(operator: str) -> str:
    """Returns the kind of work that an operator does, such as `aten::mm` or `ept::rms_norm`.

    An attention that is written out counts as the products and the element-wise work that it consists of.
    """
    name = operator.rpartition("::")[2].partition(".")[0]
    if name.startswith(_PROMPT_PATH):
        return PROMPT_PATH
    if "dequantize" in name:
        return DEQUANTISATION
    if "attention" in name:
        return ATTENTION
    return PRODUCTS if name in _PRODUCTS or name.startswith(_PRODUCTS_4BIT) else ELEMENT_WISE
