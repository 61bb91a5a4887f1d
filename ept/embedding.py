"""The base model's input embedding: look-up, width, unit of its vectors, positions of the text's tokens."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

ROWS_AT_ONCE = 1 << 14  # rows of the table per step when all of it is read


def lookup(
    embedding: Any,
    input_ids: Tensor | None,
    inputs_embeds: Tensor | None,
    attention_mask: Tensor | None,
    width: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Checks the input and returns ids, the table that they index, and the attention mask.

    A plain look-up gives the ids and the module's weight. A module that does more (scaling as in Gemma, offloaded
    or 4-bit weights, forward hooks) is called, and its output, or the given `inputs_embeds`, becomes the table.

    Returns:
        ids `[batch, n]`, table `[rows, d]`, attention mask `[batch, n]`.
    """
    check_mask(attention_mask)
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("give exactly one of input_ids and inputs_embeds")
    if input_ids is not None and (input_ids.dim() != 2 or input_ids.dtype not in (torch.int32, torch.int64)):
        raise ValueError(
            f"input_ids must be int32 or int64 of shape [batch, length], got {input_ids.dtype} {list(input_ids.shape)}"
        )
    if input_ids is not None:
        check_vocabulary(input_ids, len(embedding.weight) if is_plain_lookup(embedding) else rows_of(embedding))
    if inputs_embeds is not None and (inputs_embeds.dim() != 3 or inputs_embeds.shape[-1] != width):
        raise ValueError(f"inputs_embeds must have shape [batch, length, {width}], got {list(inputs_embeds.shape)}")
    if inputs_embeds is not None and not inputs_embeds.is_floating_point():
        raise ValueError(f"inputs_embeds must be of a floating-point type, got {inputs_embeds.dtype}")
    given: Any = inputs_embeds if input_ids is None else input_ids
    batch, n = given.shape[:2]
    if attention_mask is None:
        attention_mask = torch.ones(batch, n, dtype=torch.int64, device=given.device)
    elif attention_mask.shape != (batch, n):
        raise ValueError(
            f"attention_mask must have the shape of the input, [{batch}, {n}], got {list(attention_mask.shape)}; a "
            "mask with more dimensions cannot be extended by the prompt"
        )
    if input_ids is not None and is_plain_lookup(embedding):
        return input_ids, embedding.weight, attention_mask
    rows = (given if input_ids is None else embedding(input_ids)).reshape(batch * n, width)
    return torch.arange(batch * n, device=rows.device).view(batch, n), rows, attention_mask.to(rows.device)


def check_mask(attention_mask: Any) -> None:
    """Raises `ValueError` if the mask is not a tensor (a dictionary of masks, say), or is one to be added to scores."""
    if attention_mask is not None and not isinstance(attention_mask, Tensor):
        raise ValueError(
            f"attention_mask must be a tensor [batch, length], got {type(attention_mask).__name__}: masks of other "
            "kinds cannot be extended by the prompt"
        )
    if attention_mask is None or not attention_mask.is_floating_point() or torch.compiler.is_compiling():
        return
    if bool((attention_mask < 0).any()):
        raise ValueError(
            "attention_mask holds negative numbers, as masks that are added to scores do: give 1 for real tokens and 0 "
            "for padding"
        )


def check_vocabulary(input_ids: Tensor, rows: int) -> None:
    """Raises `ValueError` for ids on a CPU that are outside the table; torch would read −1 as the last row.

    Ids on an accelerator are not checked, which would wait for it; its kernel makes such rows NaN.
    """
    if input_ids.device.type != "cpu" or type(input_ids) is not Tensor or torch.compiler.is_compiling():
        return
    if input_ids.numel() and (int(input_ids.min()) < 0 or int(input_ids.max()) >= rows):
        strange = int(input_ids[(input_ids < 0) | (input_ids >= rows)][0])
        raise ValueError(
            f"input_ids contain {strange}, but the model's embedding has rows 0 to {rows - 1}: use the model's own "
            "tokenizer, call resize_token_embeddings after adding tokens, and pad with a token of the vocabulary"
        )


def is_plain_lookup(embedding: nn.Module) -> bool:
    """Returns whether calling `embedding` does nothing but take rows of its weight."""
    return (
        type(embedding) is nn.Embedding
        and embedding.max_norm is None
        # These change the gradient: the first leaves out a row, the second rescales rows.
        and not (embedding.weight.requires_grad and (embedding.padding_idx is not None or embedding.scale_grad_by_freq))
        and not embedding.weight.is_meta
        and "forward" not in embedding.__dict__
        and not embedding._forward_hooks
        and not embedding._forward_pre_hooks
    )


def text_positions(attention_mask: Tensor, text_mask: Tensor | None = None) -> Tensor:
    """Numbers each row's input-text tokens by the real tokens before them; −1 elsewhere: `[batch, n]` int64."""
    real = updated = attention_mask.bool()
    if text_mask is not None:
        if text_mask.shape != attention_mask.shape:
            raise ValueError(f"text_mask must have shape {list(attention_mask.shape)}, got {list(text_mask.shape)}")
        updated = real & text_mask.bool()
    return (real.cumsum(1) - 1).masked_fill(~updated, -1)


def position_ids_of(attention_mask: Tensor) -> Tensor:
    """Counts the real tokens of every row from 0; padding before the first one has 0: `[batch, length]` int64."""
    return (attention_mask.bool().cumsum(1) - 1).clamp(min=0)


@torch.no_grad()
def embedding_rms(embedding: nn.Module) -> float:
    """Computes the root mean square ρ of the vectors that `embedding` gives for its whole vocabulary.

    Raises:
        ValueError: the embeddings have no values yet, are all zero, or are not finite.
    """
    rows, device = rows_of(embedding), device_of(embedding)
    total, count = 0.0, 0
    for start in range(0, rows, ROWS_AT_ONCE):
        vectors = embedding(torch.arange(start, min(start + ROWS_AT_ONCE, rows), device=device))
        if vectors.is_meta:
            raise ValueError("the model is on the meta device: load its weights first")
        total += float(torch.linalg.vector_norm(vectors.float(), dtype=torch.float64)) ** 2
        count += vectors.numel()
    rms = math.sqrt(total / count)
    if not math.isfinite(rms) or rms == 0:
        raise ValueError(
            f"the root mean square of the input embeddings is {rms}: load the model's weights first, or set "
            "embedding_scale to a number"
        )
    return rms


def embedding_width(embedding: Any) -> int:
    """Returns the size d of the vectors that `embedding` gives."""
    return int(embedding.embedding_dim if hasattr(embedding, "embedding_dim") else embedding.weight.shape[1])


def rows_of(embedding: Any) -> int:
    """Returns the number of ids that `embedding` takes."""
    return int(embedding.num_embeddings if hasattr(embedding, "num_embeddings") else embedding.weight.shape[0])


def device_of(embedding: Any) -> torch.device:
    """Returns the device that `embedding` takes ids on; offloaded weights are on the meta device between calls."""
    hook = getattr(embedding, "_hf_hook", None)
    if (device := getattr(hook, "execution_device", None)) is not None:
        return torch.device(device)
    return torch.device("cpu") if embedding.weight.is_meta else embedding.weight.device


def scaled_embedding(embedding: nn.Module, factor: float) -> nn.Module:
    """Returns a module that gives `factor` times the output of `embedding`, or `embedding` itself if that is 1."""
    return embedding if factor == 1.0 else ScaledEmbedding(embedding, factor)


class ScaledEmbedding(nn.Module):
    """Embedding module of a model that scales the embeddings it looks up, but not the `inputs_embeds` it is given."""

    def __init__(self, embedding: Any, factor: float) -> None:
        super().__init__()
        self._embedding, self.factor = (embedding,), factor  # in a tuple: referenced, not owned

    @property
    def weight(self) -> Tensor:
        return self._embedding[0].weight

    @property
    def num_embeddings(self) -> int:
        return rows_of(self._embedding[0])

    def forward(self, input_ids: Tensor) -> Tensor:
        return self._embedding[0](input_ids) * self.factor
