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
        ValueError: names are unknown or not one a row, or a text is too long for its adapter.
    """
    if len(names) != ids.shape[0]:
        raise ValueError(f"adapter_names has {len(names)} names for a batch of {ids.shape[0]} rows: give one a row")
    used = [name for name in dict.fromkeys(names) if name != BASE]
    if unknown := [name for name in used if name not in layers]:
        raise ValueError(f"no adapter named {', '.join(map(repr, unknown))}: loaded are {', '.join(layers)}")
    chosen = [layers[name] for name in used]
    if not chosen:
        return table[ids], attention_mask
    positions = torch.full(ids.shape, -1, device=attention_mask.device)
    by_token = []  # layers whose updates depend on the token, each with its rows
    for name in used:
        layer, rows = layers[name], [row for row, own in enumerate(names) if own == name]
        own_text = None if text_mask is None else text_mask[rows]
        positions[rows] = layer.positions(attention_mask[rows], own_text)
        if layer.config.updates_by_token:
            by_token.append((layer, rows))
    if by_token:
        ids, table = _updated_by_token(by_token, ids, positions, table)
    configs, d, device = [layer.config for layer in chosen], table.shape[1], table.device
    by_position = [c for c in configs if c.r and c.update == "position"]
    s, r = max(c.num_virtual_tokens for c in configs), max((c.r for c in by_position), default=0)
    m = max((c.max_length for c in by_position), default=0)

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
    in_front = prompt_mask(layers, names, device).to(attention_mask.dtype)
    return embeds, torch.cat([in_front, attention_mask], dim=1)


def _updated_by_token(
    layers: Sequence[tuple[EPTLayer, list[int]]], ids: Tensor, positions: Tensor, table: Tensor
) -> tuple[Tensor, Tensor]:
    """Adds the updates of `layers`, which depend on the token, to their rows, whose `positions` become −1.

    Returns ids and the table they are rows of, as `lookup` does.
    """
    embeds = table[ids]
    for layer, rows in layers:
        embeds[rows] = layer.updated_tokens(ids[rows], positions[rows], table)[1].view_as(embeds[rows])
        positions[rows] = -1
    return torch.arange(ids.numel(), device=table.device).view(ids.shape), embeds.flatten(0, 1)


def prompt_mask(layers: Mapping[str, EPTLayer], names: Sequence[str], device: torch.device) -> Tensor:
    """Marks the prompts' places in rows with the adapters `names`: `[batch, s]` bool, shorter ones behind."""
    lengths = [0 if name == BASE else layers[name].config.num_virtual_tokens for name in names]
    s = max(lengths, default=0)
    return torch.arange(s, device=device) >= s - torch.tensor(lengths, device=device)[:, None]


def embed_following(
    layers: Mapping[str, EPTLayer],
    names: Sequence[str],
    ids: Tensor,
    table: Tensor,
    positions: Tensor,
    text_mask: Tensor | None = None,
) -> Tensor:
    """Embeds tokens that follow a prompt and a text, `[batch, k, d]`; those that the scope of the update covers get it.

    Args:
        layers, names: the loaded adapters, and that of each row or `"__base__"`.
        ids, table: as `ept.embedding.lookup` gives them. positions: `[batch, k]`, the real tokens before each in its
            row, those of the prompt included. text_mask: `[batch, k]`, nonzero at input text; None: there is none.

    Raises:
        ValueError: a text is longer than its adapter's `max_length`.
    """
    embeds = table[ids]
    for name in dict.fromkeys(names):
        if name == BASE or not layers[name].config.r:
            continue
        config, rows = layers[name].config, [row for row, own in enumerate(names) if own == name]
        own = positions[rows].to(table.device) - config.num_virtual_tokens
        if config.update_scope == "all":
            own = layers[name].within_table(own)
        elif text_mask is None:
            continue
        else:
            own = own.masked_fill(~text_mask[rows].bool().to(own.device), -1)
            layers[name].check_length(own, int(own.max()) + 1)
        embeds[rows] = layers[name].embed(ids[rows], own, table)
    return embeds


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
