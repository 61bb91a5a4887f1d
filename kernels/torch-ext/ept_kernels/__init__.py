"""Operators of Efficient Prompt Tuning: the prompted embedding, the joint prompt, products with 4-bit weights and a
frozen model's element-wise work, each with its plain-PyTorch reference.

Importing this package registers the operators in `torch.ops.ept` (see `library.py`). It needs only torch; the caller
wraps autograd around the operators.
"""

from .four_bit.reference import (
    dequantize_4bit,
    dequantize_4bit_reference,
    matmul_4bit,
    matmul_4bit_backward,
    matmul_4bit_backward_reference,
    matmul_4bit_reference,
)
from .four_bit.weight import FourBitWeight
from .frozen.reference import (
    gated_activation,
    gated_activation_backward,
    gated_activation_backward_reference,
    gated_activation_reference,
    relu,
    relu_backward,
    relu_backward_reference,
    relu_reference,
    rms_norm,
    rms_norm_backward,
    rms_norm_backward_reference,
    rms_norm_reference,
    rotary,
    rotary_reference,
)
from .joint_prompt.reference import (
    joint_prompt,
    joint_prompt_backward,
    joint_prompt_backward_reference,
    joint_prompt_reference,
)
from .library import backend
from .prompted_embedding.reference import (
    prompted_embedding,
    prompted_embedding_backward,
    prompted_embedding_backward_reference,
    prompted_embedding_packed,
    prompted_embedding_packed_reference,
    prompted_embedding_reference,
    token_at,
    token_at_reference,
)
from .token_update.reference import (
    prompted_embedding_by_token,
    prompted_embedding_by_token_backward,
    prompted_embedding_by_token_backward_reference,
    prompted_embedding_by_token_reference,
)

# fmt: off
__all__ = [
    "FourBitWeight", "backend", "dequantize_4bit", "dequantize_4bit_reference", "gated_activation",
    "gated_activation_backward", "gated_activation_backward_reference", "gated_activation_reference", "joint_prompt",
    "joint_prompt_backward", "joint_prompt_backward_reference", "joint_prompt_reference", "matmul_4bit",
    "matmul_4bit_backward", "matmul_4bit_backward_reference", "matmul_4bit_reference", "prompted_embedding",
    "prompted_embedding_backward", "prompted_embedding_backward_reference", "prompted_embedding_by_token",
    "prompted_embedding_by_token_backward", "prompted_embedding_by_token_backward_reference",
    "prompted_embedding_by_token_reference", "prompted_embedding_packed", "prompted_embedding_packed_reference",
    "prompted_embedding_reference", "relu", "relu_backward",
    "relu_backward_reference", "relu_reference", "rms_norm", "rms_norm_backward", "rms_norm_backward_reference",
    "rms_norm_reference", "rotary", "rotary_reference", "token_at", "token_at_reference",
]
# fmt: on
