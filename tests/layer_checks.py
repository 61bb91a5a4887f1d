"""A small EPT layer, and checks of the whole layer that hold for the references and for the Triton kernels alike."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import ept_kernels
from ept import EPTConfig, EPTLayer
from ept_kernels.dev.problems import (
    Activation,
    JointPrompt,
    PackedEmbedding,
    PromptedEmbedding,
    RMSNorm,
    Rotary,
    TokenUpdate,
    opcheck_problems,
)
from ept_kernels.problem import Problem

MAX_LENGTH = 12
WIDTH = 64
VOCABULARY = 50
EMBEDDING = PromptedEmbedding(n=9)
BY_TOKEN = TokenUpdate(n=9)
TRANSPOSED = [
    EMBEDDING,
    EMBEDDING.backward,
    BY_TOKEN,
    BY_TOKEN.backward,
    JointPrompt(),
    JointPrompt(fusion=False).backward,
]
TRANSPOSED += [problem for problem in opcheck_problems() if problem.operator.startswith(("rms", "gated", "relu"))]
MIXED = PromptedEmbedding(n=5, d=8, s=2, m=6, r=2, adapters=2)
PLAIN = PromptedEmbedding(n=5, d=8, s=2, m=6, r=2)
JOINT = JointPrompt(s=3, d=12, r=2, a=4)

# By the problem: the number of an argument, how much is left of it, and what is named.
WRONG_SHAPES: list[tuple[Problem, Any, Any, str]] = [
    (PLAIN, 1, (slice(1),), "positions"),  # which a reference would repeat for every text
    (PLAIN, 3, (..., slice(7)), "prompt"),
    (PLAIN, 5, (..., slice(7)), "B"),
    (MIXED, 3, (0,), "prompt"),
    (MIXED, 5, (slice(1),), "B"),
    (MIXED, 7, (slice(2),), "adapter_ids"),
    (PLAIN.backward, 1, (slice(2),), "positions"),
    (PLAIN.backward, 3, (..., slice(7)), "B"),
    (MIXED.backward, 5, (slice(2),), "adapter_ids"),
    *((BY_TOKEN, i, (slice(2),), name) for i, name in ((1, "positions"), (5, "b_in"), (6, "W_out"), (7, "b_out"))),
    *((BY_TOKEN, i, (..., slice(7)), name) for i, name in ((2, "prompt"), (3, "prompt"))),
    (BY_TOKEN.backward, 1, (slice(2),), "input_ids"),
    (BY_TOKEN.backward, 2, (slice(2),), "positions"),
    *((BY_TOKEN.backward, i, (..., slice(2)), name) for i, name in ((3, "table"), (4, "W_out"), (5, "hidden"))),
    (PackedEmbedding((3, 4), d=8), 3, (..., slice(7)), "prompt"),
    (PackedEmbedding((3, 4), d=8), 5, (slice(2),), "B"),
    *((JOINT, i, (slice(1),), name) for i, name in enumerate(("B", None, "W_q", "W_k", "D", "U", "G"), 2) if name),
    (JOINT, 6, (..., slice(7)), "U"),
    (JOINT.backward, 0, (slice(2),), "grad_output"),
    (RMSNorm(residual=True), 1, (slice(8),), "weight"),
    (RMSNorm(residual=True), 2, (..., slice(2), slice(None)), "residual"),
    (RMSNorm(residual=True).backward, 0, (..., slice(2), slice(None)), "grad_output"),
    (RMSNorm(residual=True).backward, 3, (..., slice(2), slice(None)), "rstd"),
    (RMSNorm(residual=True).backward, 4, (..., slice(2), slice(None)), "grad_h"),
    (Rotary(), 1, (slice(1),), "k"),
    (Rotary(), 2, (slice(None), slice(2)), "cos"),
    (Rotary(), 3, (slice(None), slice(2)), "sin"),
    (Rotary(), 0, (..., slice(4)), "k"),
    (Rotary(), slice(2, 4), (..., slice(7)), "cos"),
    (Rotary(width=8, columns=8), slice(0, 2), (..., slice(6)), "cos"),
    (Activation(), 1, (slice(1),), "up"),
    (Activation().backward, 1, (slice(1),), "gate"),
    (Activation(operator="relu").backward, 1, (slice(2),), "passes"),
]


def made_wrong(inputs: tuple[Any, ...], index: Any, left: Any) -> list[Any]:
    """Leaves of the inputs at `index`, a number or a slice, what `left` says."""
    wrong = list(inputs)
    where = index if isinstance(index, slice) else slice(index, index + 1)
    wrong[where] = [x[left] for x in wrong[where]]
    return wrong


def make_layer(device: torch.device | str = "cpu", **options: Any) -> EPTLayer:
    """All parts switched on but for `options` of the config, none of them at its neutral start; the same at each
    call.
    """
    generator = torch.Generator().manual_seed(0)
    embedding = torch.nn.Embedding(VOCABULARY, WIDTH)
    config = EPTConfig(**{"num_virtual_tokens": 5, "max_length": MAX_LENGTH, "r": 3, "fusion_dim": 4, **options})
    torch.nn.init.normal_(embedding.weight, generator=generator).requires_grad_(False)
    layer = EPTLayer(config, embedding.to(device))
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return layer


def make_ids(device: torch.device | str = "cpu", batch: int = 3, n: int = 9, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random ids `[batch, n]` and a mask with padding on either side, at most `MAX_LENGTH` real tokens a row."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, VOCABULARY, (batch, n), generator=generator)
    mask = torch.zeros_like(ids)
    for row in range(batch):
        mask[row, row % 3 : row % 3 + MAX_LENGTH - row % 5] = 1
    return ids.to(device), mask.to(device)


def step(layer: torch.nn.Module, ids: Tensor, mask: Tensor) -> list[Tensor]:
    """Output and the gradients of all parameters, of one forward and backward."""
    layer.zero_grad()
    output, _, _ = layer(ids, mask)
    weight = torch.linspace(-1, 1, output.numel(), device=output.device).view_as(output)
    (output * weight).sum().backward()
    return [output.detach(), *(p.grad for p in layer.parameters())]


def check_transposed(problem: Problem, device: torch.device | str) -> None:
    """What an operator's fake says holds where matrices are transposed: dense, so that copies like them are too."""
    inputs = [x.mT.contiguous().mT if isinstance(x, Tensor) and x.dim() > 1 else x for x in problem.inputs(device)]
    results = torch.library.opcheck(getattr(ept_kernels, problem.operator), tuple(inputs))
    assert set(results.values()) == {"SUCCESS"}, results


def assert_same(actual: list[Tensor], expected: list[Tensor], tolerance: float = 0.0) -> None:
    for index, (a, e) in enumerate(zip(actual, expected, strict=True)):
        worst = float((a - e).abs().max())
        allowed = tolerance * float(e.abs().max())
        assert worst <= allowed, f"result {index} of {len(expected)} differs by {worst}, {allowed} is allowed"


def check_compiled(device: torch.device, backend: str, tolerance: float, **options: Any) -> None:
    """`torch.compile(fullgraph=True)` of forward and backward: right, and compiled once for every batch and length.

    Both dimensions are marked as dynamic. Texts padded beyond `max_length` included: there the check of the length, if
    there is a longest one, is part of the graph.
    """
    torch._dynamo.reset()
    layer = make_layer(device, **options)
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    for limits, sizes in (((2, MAX_LENGTH), [(2, 9), (3, 12), (7, 2)]), ((MAX_LENGTH + 1, 99), [(4, 13), (2, 20)])):
        before = counter.frame_count
        for batch, n in sizes:
            ids, mask = make_ids(device, batch, n, seed=n)
            for x in (ids, mask):
                torch._dynamo.mark_dynamic(x, 0)
                torch._dynamo.mark_dynamic(x, 1)
            assert_same(step(compiled, ids, mask), step(layer, ids, mask), tolerance)
        wanted = 0 if layer.config.updates_by_token and before else 1
        found = counter.frame_count - before
        assert found == wanted, f"compiled {found} times for lengths {limits}"


def check_captured(device: torch.device) -> None:
    """Forward and backward captured in one CUDA graph, replayed on other ids and another padding: equal bits."""
    layer = make_layer(device)
    ids, mask = make_ids(device)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # what is compiled or allocated at the first call, before the capture
        for _ in range(3):
            step(layer, ids, mask)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    layer.zero_grad()
    with torch.cuda.graph(graph):
        captured = step(layer, ids, mask)
    for seed in (1, 2):
        new_ids, new_mask = make_ids(device, seed=seed)
        ids.copy_(new_ids)
        mask.copy_(new_mask.flip(1) if seed == 2 else new_mask)
        graph.replay()
        replayed = [x.clone() for x in captured]
        assert_same(replayed, step(make_layer(device), ids, mask))
