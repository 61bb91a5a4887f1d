"""Operators of Efficient Prompt Tuning: the fused embedding and the joint prompt, each with its plain-PyTorch
reference.

Importing this package registers the operators in ``torch.ops.ept`` (see ``library.py``). It needs torch only; autograd
is wrapped around the operators by the caller.
"""

from .joint_prompt import joint_prompt, joint_prompt_backward, joint_prompt_backward_reference, joint_prompt_reference
from .library import backend
from .prompted_embedding import (
    prompted_embedding,
    prompted_embedding_backward,
    prompted_embedding_backward_reference,
    prompted_embedding_packed,
    prompted_embedding_packed_reference,
    prompted_embedding_reference,
)

__all__ = [
    "backend",
    "joint_prompt",
    "joint_prompt_backward",
    "joint_prompt_backward_reference",
    "joint_prompt_reference",
    "prompted_embedding",
    "prompted_embedding_backward",
    "prompted_embedding_backward_reference",
    "prompted_embedding_packed",
    "prompted_embedding_packed_reference",
    "prompted_embedding_reference",
]
