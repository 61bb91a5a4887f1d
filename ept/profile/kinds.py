"""Kinds of work in a training step, recognised by operator name."""

from __future__ import annotations

PRODUCTS, ELEMENT_WISE, ATTENTION = "products", "element-wise", "attention"
DEQUANTISATION, PROMPT_PATH = "dequantisation", "prompt path"
KINDS = (PRODUCTS, ELEMENT_WISE, ATTENTION, DEQUANTISATION, PROMPT_PATH)
LAUNCHES = "launches"  # the rest of a step: work of the processor between operators, or waiting of a device

_PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "linear", "mkldnn_linear"}
_PRODUCTS_4BIT = ("matmul_4bit", "gemm_4bit", "gemv_4bit")
_PROMPT_PATH = ("prompted_embedding", "joint_prompt", "token_at", "_fused_adam", "_foreach")  # and the prompt's update


def kind_of(operator: str) -> str:
    """Returns the kind of work that an operator does, such as `aten::mm` or `ept::rms_norm`.

    Eager attention counts as the products and element-wise work of which it consists.
    """
    name = operator.rpartition("::")[2].partition(".")[0]
    if name.startswith(_PROMPT_PATH):
        return PROMPT_PATH
    if "dequantize" in name:
        return DEQUANTISATION
    if "attention" in name:
        return ATTENTION
    return PRODUCTS if name in _PRODUCTS or name.startswith(_PRODUCTS_4BIT) else ELEMENT_WISE
