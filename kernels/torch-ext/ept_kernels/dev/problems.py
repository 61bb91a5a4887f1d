"""Calls of all operators in one table, for the tuner, the ahead-of-time compiler, tests, opcheck and benchmarks."""

from dataclasses import replace

import torch

from ..four_bit.problems import FourBit
from ..frozen.problems import Activation, RMSNorm, Rotary, frozen_problems
from ..joint_prompt.problems import JointPrompt
from ..problem import Problem
from ..prompted_embedding.problems import PackedEmbedding, PromptedEmbedding
from ..token_update.problems import TokenUpdate

# Training batches without padding, joint prompts and frozen weights (rows, columns) of known models.
T5_BASE = PromptedEmbedding(256, 768, 40, 256, 30, 32, "none", torch.bfloat16, vocabulary=32128)
LLAMA_7B = PromptedEmbedding(512, 4096, 40, 512, 60, 32, "none", torch.bfloat16, vocabulary=32000)
T5_BASE_BY_TOKEN = TokenUpdate(256, 768, 40, 30, 32, "none", torch.bfloat16, vocabulary=32128)
LLAMA_7B_BY_TOKEN = TokenUpdate(512, 4096, 40, 60, 32, "none", torch.bfloat16, vocabulary=32000)
T5_BASE_JOINT = JointPrompt(s=40, d=768, m=256, r=30)
LLAMA_7B_JOINT = JointPrompt(s=100, d=4096, m=512, r=60, K=8, h=4)
WEIGHTS = ((4096, 4096), (14336, 4096), (4096, 14336), (768, 768), (3072, 768))


def opcheck_problems() -> list[Problem]:
    """Lists every operator with every form of its arguments, at sizes that take no time."""
    embedding = PromptedEmbedding(n=5, d=8, s=2, m=6, r=2)
    mixed = replace(embedding, adapters=2)
    joint = JointPrompt(s=3, d=12, r=2)
    product = FourBit(5, 67, (2,), dtype=torch.float32, bias=torch.float32)
    dequantized = FourBit(5, 67, operator="dequantize_4bit")
    return [
        *(x for p in (embedding, mixed, TokenUpdate(n=5, d=8, s=2, r=2), joint) for x in (p, p.backward)),
        PackedEmbedding((5, 0, 3), s=2, d=8, r=2, ids=torch.int32),
        replace(embedding, operator="token_at"),
        *(replace(dequantized, nested=nested) for nested in (False, True)),
        *(replace(product, nested=nested, bias=bias) for nested in (False, True) for bias in (torch.float32, None)),
        *(replace(product, nested=nested, operator="matmul_4bit_backward") for nested in (False, True)),
        *(x for p in (RMSNorm(form="gemma"), RMSNorm(residual=True), Activation()) for x in (p, p.backward)),
        *(Rotary(columns=8, interleaved=interleaved, is_backward=interleaved) for interleaved in (False, True)),
        *(Activation(operator=operator) for operator in ("relu", "relu_backward")),
    ]


def compiled_problems() -> list[Problem]:
    """Lists every kernel in each form that compiles differently, at sizes of known models."""
    bf16, f16, f32, f64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
    embeddings = [
        T5_BASE,
        LLAMA_7B,
        replace(LLAMA_7B, r=30, adapters=2),
        replace(LLAMA_7B, r=0, dtype=f16),
        replace(T5_BASE, dtype=f32, adapters=2, ids=torch.int32),
        replace(LLAMA_7B, dtype=f32),
    ]
    by_token = [
        T5_BASE_BY_TOKEN,
        LLAMA_7B_BY_TOKEN,
        replace(LLAMA_7B_BY_TOKEN, r=3, dtype=f16, ids=torch.int32),
        replace(LLAMA_7B_BY_TOKEN, dtype=f32),
    ]
    joints = [
        *(replace(problem, a=a) for problem in (T5_BASE_JOINT, LLAMA_7B_JOINT) for a in (0, 16)),
        replace(T5_BASE_JOINT, dtype=bf16),
        replace(LLAMA_7B_JOINT, fusion=False, m=0, r=0, dtype=f16),
    ]
    # dtype, block size, nested, shift
    kinds = [(bf16, 64, False, 0), (bf16, 64, True, 0), (bf16, 4096, True, 0), (bf16, 64, True, 1)]
    kinds += [(f16, 64, True, 0), (f32, 32, True, 0), (f32, 64, False, 1), (f64, 64, True, 0)]
    products = [
        FourBit(4096, 4096, dtype=bf16, nested=False),
        FourBit(256, 256, dtype=bf16, bias=bf16),  # not split
        FourBit(4096, 4096, block_size=4096, dtype=bf16),
        FourBit(4096, 4096, block_size=32),
    ]
    products = [replace(problem, tokens=(tokens,)) for problem in products for tokens in (16, 32, 64)]
    return [
        *(x for problem in [*embeddings, *by_token, *joints] for x in (problem.small, problem.small.backward)),
        *products,
        *(problem.packed.small for problem in embeddings if not problem.adapters),
        *frozen_problems(),
        *(
            FourBit(4096, 4096, (), "nf4", size, nested, dtype, shift=shift, operator="dequantize_4bit")
            for dtype, size, nested, shift in kinds
        ),
    ]
