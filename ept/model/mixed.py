"""Batches in which every row has its own adapter: the adapters' parameters side by side."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from peft.utils import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_layers import GradientCheckpointingLayer

from .. import functional
from ..prompt import EPTLayer
from ..utils.messages import listed
from .base_model import narrowed, wrapped_heads

_names_of_rows: ContextVar[list[str] | None] = ContextVar("names_of_rows", default=None)
BASE = "__base__"  # PEFT's name for a row without an adapter


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
        layers: the loaded adapters.
        names: one per row, or `"__base__"` for none.
        ids, table, attention_mask: as returned by `ept.embedding.lookup`.
        text_mask: as in `EPTLayer.forward`.

    Returns:
        embeddings `[batch, s + n, d]` with `s` the longest prompt, attention mask `[batch, s + n]`.

    Raises:
        ValueError: a text is too long for its adapter.
    """
    used = [name for name in dict.fromkeys(names) if name != BASE]
    chosen = [layers[name] for name in used]
    if not chosen:
        return table[ids], attention_mask
    positions = torch.full(ids.shape, -1, device=attention_mask.device)
    by_token = []  # layers with a token-dependent update, each with its rows
    for name in used:
        layer, rows = layers[name], [row for row, own in enumerate(names) if own == name]
        own_text = None if text_mask is None else text_mask[rows]
        if layer.config.r:  # without an update, a text may be longer than the others' tables
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
    # Scales differ between adapters, so they go into A; ranks are padded with zeros.
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
    """Adds the token-dependent updates of `layers` to their rows, whose `positions` become −1.

    Returns ids and the table of which they are rows, as `lookup` does.
    """
    embeds = table[ids]
    for layer, rows in layers:
        embeds[rows] = layer.embed(ids[rows], positions[rows], table)
        positions[rows] = -1
    return torch.arange(ids.numel(), device=table.device).view(ids.shape), embeds.flatten(0, 1)


def prompt_mask(layers: Mapping[str, EPTLayer], names: Sequence[str], device: torch.device) -> Tensor:
    """Marks the prompts' places in rows with the adapters `names`: `[batch, s]` bool, aligned to the end."""
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
    """Embeds tokens that follow a prompt and a text, `[batch, k, d]`, with the update if its scope covers them.

    Args:
        layers, names: the loaded adapters, and the one of each row or `"__base__"`.
        ids, table: as returned by `ept.embedding.lookup`.
        positions: `[batch, k]`, the number of real tokens before each in its row, including those of the prompt.
        text_mask: `[batch, k]`, nonzero at input text; None: there is none.

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


def check_names(names: Sequence[str], layers: Mapping[str, EPTLayer], rows: int) -> None:
    """Raises `ValueError` unless `names` has a loaded adapter, or `"__base__"`, for each of `rows`."""
    if len(names) != rows:
        raise ValueError(f"adapter_names has {len(names)} names for a batch of {rows} rows: give one per row")
    if unknown := [name for name in dict.fromkeys(names) if name != BASE and name not in layers]:
        raise ValueError(
            f"no adapter is named {', '.join(map(repr, unknown))}: the loaded ones are {', '.join(layers)}"
        )


@contextmanager
def heads_of_rows(names: Sequence[str] | None) -> Iterator[None]:
    """Sends row i through the modules that adapter `names[i]` trained, in this thread and within the context.

    None: all rows go through those of the active adapter.
    """
    token = _names_of_rows.set(None if names is None else list(names))
    try:
        yield
    finally:
        _names_of_rows.reset(token)


class HeadsOfRows(ModulesToSaveWrapper):
    """PEFT's wrapper of a module of which adapters train copies; in mixed batches each row uses its adapter's copy."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the active adapter's copy, or within `heads_of_rows` each row's copy; the original if there is no copy.

        If a name has several rows (beams or tokens), they are consecutive.

        Raises:
            ValueError: in a mixed batch, the rows of arguments or result cannot be told apart.
        """
        names = _names_of_rows.get()
        if names is None or self.disable_adapters:
            return super().forward(*args, **kwargs)
        count = next((len(x) for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.dim()), 0)
        each, rest = divmod(count, len(names))
        if rest or not each:
            raise ValueError(
                f"{type(self.original_module).__name__} is called on {count} rows for {len(names)} texts, so it is "
                "not known which adapter's copy each row needs: give each adapter a batch of its own"
            )
        owners = [name for name in names for _ in range(each)]
        results, order = [], []
        for name in dict.fromkeys(names):
            rows = [row for row, owner in enumerate(owners) if owner == name]
            given, named = tuple(_taken(x, rows, count) for x in args), _taken(kwargs, rows, count)
            if name in self.modules_to_save:
                module = self.modules_to_save[name]
            else:  # the base model's 16-bit head, while other adapters' rows have theirs in float32
                module = self.original_module
                given, named = narrowed(module, given, named)
            results.append(module(*given, **named))
            order += rows
        return self._put_together(results, order)

    def _put_together(self, results: Sequence[Any], order: Sequence[int]) -> Any:
        if all(isinstance(result, Tensor) for result in results):
            place = torch.tensor(order, device=results[0].device).argsort()
            return torch.cat([result.to(place.device) for result in results])[place]
        if all(type(result) is tuple for result in results):
            return tuple(self._put_together(parts, order) for parts in zip(*results))
        raise ValueError(
            f"{type(self.original_module).__name__} returns a {type(results[0]).__name__}, from which the rows of "
            "several adapters cannot be combined: give each adapter a batch of its own"
        )


def _taken(value: Any, rows: Sequence[int], count: int) -> Any:
    """Takes `rows` of a tensor of `count`, or of the values of a dictionary; everything else is unchanged."""
    if isinstance(value, dict):
        return {name: _taken(x, rows, count) for name, x in value.items()}
    return value[rows] if isinstance(value, Tensor) and value.dim() and len(value) == count else value


def follow_rows(model: nn.Module) -> None:
    """Makes PEFT's wrappers in `model`, all of which belong to an EPT model, obey `heads_of_rows`."""
    for wrapper in wrapped_heads(model):
        wrapper.__class__ = HeadsOfRows


def check_heads_are_ours(model: nn.Module) -> None:
    """Raises `ValueError` if another adapter trains modules of `model`, which EPT's copies would get mixed up with."""
    named = ((name, module) for name, module in model.named_modules() if isinstance(module, AuxiliaryTrainingWrapper))
    if found := [name for name, wrapper in named if not isinstance(wrapper, HeadsOfRows)]:
        raise ValueError(
            f"another adapter has trained {listed(found)} of {type(model).__name__} itself: merge it first "
            "(merge_and_unload), or train it without modules_to_save and trainable_token_indices"
        )
    taken = {name: m for name, m in model.named_modules() if isinstance(m, HeadsOfRows) and m.modules_to_save}
    if trained := [name for name, wrapper in taken.items() if not _is_as_loaded(wrapper)]:
        raise ValueError(
            f"another EPT model has trained {listed(trained)} of this {type(model).__name__}, and both would answer "
            "through it: use that model's add_adapter or load_adapter, or load the base model anew"
        )
    if taken:
        warnings.warn(
            f"another EPT model has {listed(taken)} of this {type(model).__name__} too, and training either trains it "
            "for both: use that model's add_adapter, or load the base model anew",
            stacklevel=4,
        )


def _is_as_loaded(wrapper: Any) -> bool:
    """Checks whether all copies of a head equal the base model's, in whatever dtype."""
    own = wrapper.original_module.state_dict()
    return all(
        tensor.is_meta or (name in own and torch.equal(tensor.to(own[name]), own[name]))
        for copy in wrapper.modules_to_save.values()
        for name, tensor in copy.state_dict().items()
    )


def check_recomputed(model: nn.Module) -> None:
    """Raises `ValueError` if a mixed batch's backward pass would recompute trained modules, whose rows are unknown."""
    for layer in model.modules():
        recomputed = isinstance(layer, GradientCheckpointingLayer) and layer.gradient_checkpointing and layer.training
        if recomputed and any(True for _ in wrapped_heads(layer)):
            raise ValueError(
                f"gradient checkpointing computes {type(layer).__name__} again in the backward pass, when its rows' "
                "adapters are no longer known: turn it off for batches of several adapters that train its modules"
            )
