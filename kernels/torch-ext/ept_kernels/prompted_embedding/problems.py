"""Calls of the prompted embedding's operators: padded batches, and texts without padding."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..problem import Device, InTF32, low_rank_prompt, normal


@dataclass(frozen=True)
class PromptedEmbedding(InTF32):
    """A padded batch.

    Attributes:
        padding: `none`, `left`, `right`, or `shuffled`: on the right, with positions in random order. It grows from row
            to row, from none to nothing but padding.
        dtype: of table and gradient.
        parameters: dtype of prompt, A and B.
        ids: dtype of ids and positions.
        adapters: number of adapters, mixed, with some rows without one; 0: a single one, without `adapter_ids`.
    """

    n: int = 63
    d: int = 64
    s: int = 5
    m: int = 70
    r: int = 3
    batch: int = 3
    padding: str = "right"
    dtype: torch.dtype = torch.float32
    parameters: torch.dtype = torch.float32
    ids: torch.dtype = torch.int64
    adapters: int = 0
    vocabulary: int = 37
    scale: float = 1.7
    operator: str = field(default="prompted_embedding", kw_only=True)

    @property
    def packed(self) -> PackedEmbedding:
        """The same number of texts of this length without padding."""
        sizes = {name: getattr(self, name) for name in ("s", "d", "r", "dtype", "ids", "vocabulary", "scale")}
        return PackedEmbedding((self.n,) * self.batch, **sizes)

    @property
    def small(self) -> PromptedEmbedding:
        return replace(self, n=min(self.n, 32), batch=min(self.batch, 2), vocabulary=min(self.vocabulary, 64))

    def inputs(self, device: Device = "cpu", seed: int = 0, table: Tensor | None = None) -> tuple[Any, ...]:
        """Makes arguments; `table` is used instead of a new one, so that many sets of inputs can share a large one."""
        g = torch.Generator(device).manual_seed(seed)
        positions = self.positions().to(device, self.ids)
        if self.operator == "token_at":
            return positions, self.m
        prompt, A, B = low_rank_prompt(g, self.s, self.m, self.r, self.d, self.parameters, self.adapters)
        adapter_ids = None
        if self.adapters:  # none, the last one, …, the first, none, …
            adapter_ids = (-torch.arange(self.batch) % (self.adapters + 1) - 1).to(device, self.ids)
        if self.operator == "prompted_embedding_backward":
            grad = normal(g, self.batch, self.s + self.n, self.d).to(self.dtype)
            return *self.laid_out(grad, positions, A, B), self.scale, adapter_ids
        ids = random_ids(g, self.batch * self.n, self.vocabulary).view(self.batch, self.n).to(self.ids)
        table = normal(g, self.vocabulary, self.d).to(self.dtype) if table is None else table
        return *self.laid_out(ids, positions, table, prompt, A, B), self.scale, adapter_ids

    def positions(self) -> Tensor:
        """Counts the real tokens of each text: `[batch, n]`."""
        rows = torch.full((self.batch, self.n), -1)
        for b in range(self.batch):
            padding = 0 if self.padding == "none" else min(b * (self.n + 1) // max(self.batch - 1, 1), self.n)
            text = torch.arange(min(self.n - padding, self.m))
            if self.padding == "shuffled":
                text = torch.randperm(self.m, generator=torch.Generator().manual_seed(b))[: text.numel()]
            start = self.n - text.numel() if self.padding == "left" else 0
            rows[b, start : start + text.numel()] = text
        return rows


@dataclass(frozen=True)
class PackedEmbedding(InTF32):
    """Texts with these numbers of tokens, one after another; other fields as in `PromptedEmbedding`."""

    lengths: tuple[int, ...] = (3, 1, 70)
    s: int = 5
    d: int = 64
    r: int = 3
    dtype: torch.dtype = torch.float32
    ids: torch.dtype = torch.int64
    vocabulary: int = 37
    scale: float = 1.7
    operator: str = field(default="prompted_embedding_packed", kw_only=True)

    @property
    def small(self) -> PackedEmbedding:
        return replace(self, lengths=self.lengths[:2], vocabulary=min(self.vocabulary, 64))

    def inputs(self, device: Device = "cpu", seed: int = 0, table: Tensor | None = None) -> tuple[Any, ...]:
        g = torch.Generator(device).manual_seed(seed)
        ids = random_ids(g, sum(self.lengths), self.vocabulary).to(self.ids)
        cu_seqlens = torch.tensor([0, *self.lengths]).cumsum(0).to(device, self.ids)
        table = normal(g, self.vocabulary, self.d).to(self.dtype) if table is None else table
        parameters = low_rank_prompt(g, self.s, max(self.lengths, default=0), self.r, self.d)
        return *self.laid_out(ids, cu_seqlens, table, *parameters), self.scale


def random_ids(g: torch.Generator, count: int, vocabulary: int) -> Tensor:
    """Draws rows of the table, each at most once if there are enough."""
    if count <= vocabulary:
        return torch.randperm(vocabulary, generator=g, device=g.device)[:count]
    return torch.randint(vocabulary, (count,), generator=g, device=g.device)
