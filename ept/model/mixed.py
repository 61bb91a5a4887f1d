"""Batches in which every row has its own adapter: the adapters' parameters side by side."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import functional
from ..embedding import text_positions
from ..prompt import EPTLayer
from .base_model import wrapped_heads

_names_of_rows: ContextVar[list[str] | None] = ContextVar("names_of_rows", default=None)
BASE = "__base__"  # PEFT's name for a row that no adapter applies to


def embed_mixed(
    layers: Mapping[str, EPTLayer],
    names: Sequence[str],
    ids: Tensor,
    table: Tensor,
    attention_mask: Tensor,
    text_mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Computes `[P; E']` with the adapter `names[i]` for row `i`; shorter prompts are padded in front and masked.

    Args:
        layers: the loaded adapters. names: one a row, or `"__base__"` for none.
        ids, table, attention_mask: as `ept.embedding.lookup` gives them. text_mask: as in `EPTLayer.forward`.

    Returns:
        embeddings `[batch, s + n, d]` with `s` the longest prompt, attention mask `[batch, s + n]`.

    Raises:
        ValueError: names are unknown or not one a row, a text is too long for its adapter, or an adapter's update
            depends on the token.
    """
    if len(names) != ids.shape[0]:
        raise ValueError(f"adapter_names has {len(names)} names for a batch of {ids.shape[0]} rows: give one a row")
    used = [name for name in dict.fromkeys(names) if name != BASE]
    if unknown := [name for name in used if name not in layers]:
        raise ValueError(f"no adapter named {', '.join(map(repr, unknown))}: loaded are {', '.join(layers)}")
    if by_token := [name for name in used if layers[name].config.r and layers[name].config.update == "token"]:
        raise ValueError(f"adapter {by_token[0]!r} has an update that depends on the token: mixed batches take none")
    chosen = [layers[name] for name in used]
    positions = text_positions(attention_mask, text_mask)
    for row, name in enumerate(names):
        if name != BASE:
            layers[name].check_length(positions[row : row + 1])
    if not chosen:
        return table[ids], attention_mask
    configs, d, device = [layer.config for layer in chosen], table.shape[1], table.device
    s, r = max(c.num_virtual_tokens for c in configs), max(c.r for c in configs)
    m = max((c.max_length for c in configs if c.r), default=0)

    def padded(matrix: Tensor, rows: int, columns: int, front: bool = False) -> Tensor:
        missing = rows - matrix.shape[0]
        return F.pad(matrix.to(device), (0, columns - matrix.shape[1], *((missing, 0) if front else (0, missing))))

    prompts = torch.stack([padded(layer.joint_prompt(), s, d, front=True) for layer in chosen])  # [adapters, s, d]
    # Scales differ from adapter to adapter, so they go into A; rank is padded with zeros.
    A = torch.stack([padded(layer.update_scale() * layer.part("A")[:m], m, r) for layer in chosen])
    B = torch.stack([padded(layer.part("B"), r, d) for layer in chosen])
    number = {name: i for i, name in enumerate(used)}
    adapter_ids = torch.tensor([number.get(name, -1) for name in names], device=device)
    embeds = functional.prompted_embedding(ids, positions, table, prompts, A, B, 1.0, adapter_ids)
    lengths = [0 if name == BASE else layers[name].config.num_virtual_tokens for name in names]
    prompt_mask = torch.arange(s, device=device) >= s - torch.tensor(lengths, device=device)[:, None]
    return embeds, torch.cat([prompt_mask.to(attention_mask.dtype), attention_mask], dim=1)


def follow_rows(model: nn.Module) -> None:
    """Makes the trained heads in `model` choose by `heads_of_rows`; once each."""
    for wrapper in wrapped_heads(model):
        if _choose_head not in wrapper._forward_pre_hooks.values():
            wrapper.register_forward_pre_hook(_choose_head, with_kwargs=True)


@contextmanager
def heads_of_rows(names: Sequence[str] | None) -> Iterator[None]:
    """Sends row i through the head of adapter `names[i]`, in this thread and as long as the context lasts.

    None: all rows go through the head of the active adapter.
    """
    if names is None:
        yield
        return
    token = _names_of_rows.set(list(names))
    try:
        yield
    finally:
        _names_of_rows.reset(token)


def _choose_head(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    names = _names_of_rows.get()
    return args, (kwargs if names is None else {**kwargs, "adapter_names": names})
