"""Starting values of an adapter's parameters, from its seed, the base model's embeddings and a text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .config import EPTConfig
from .embedding import device_of, rows_of

_SVD_SHARE = 0.1  # share of a long prompt in the update at the start: all of it would drown out the text


@torch.no_grad()
def initial_values(config: EPTConfig, embedding: nn.Module, rho: float, tokenizer: Any) -> dict[str, Tensor]:
    """Draws the parameters on the CPU, in units of `rho`, so that they are the same on every device.

    The prompt is drawn first, so that it is the same for prompt tuning, DePT and EPT. U, G, β, W_out, shift, gain, the
    biases and (except with "svd") B start at zero, so that EPT starts as prompt tuning.

    Args:
        embedding: maps ids `[…]` to vectors `[…, d]`. tokenizer: for a start from a text; None loads the one that
            `config` names.
    """
    with torch.device("cpu"):
        generator = torch.Generator().manual_seed(config.seed)
        shapes = config.parameter_shapes(config.token_dim)
        values = {name: torch.zeros(shape, dtype=torch.float32) for name, shape in shapes.items()}
        if "prompt" in values:
            values["prompt"] = _rows(config, len(values["prompt"]), embedding, rho, tokenizer, generator)
        if "A" in values:
            values["A"], values["B"] = _update(config, values["B"], embedding, rho, tokenizer, generator)
        for name in ("Z", "D", "W_q", "W_k", "W_in", "W_down", "W_up"):
            if name in values:  # unit variance after the product with a normalised row; Z's rows are those of the basis
                rows = 1 if name == "Z" else len(values[name])
                values[name] = _randn(values[name].shape, generator) / math.sqrt(rows)
        if "scale" in values:
            values["scale"] += 1
        return values


def _update(
    config: EPTConfig, B: Tensor, embedding: nn.Module, rho: float, tokenizer: Any, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Makes A `[m, r]` and B `[r, d]`, which is zero except with "svd"."""
    m, r = config.max_length, config.r
    bound = 1 / math.sqrt(r)  # as in DePT: kaiming uniform with a = √5
    if config.lowrank_init == "uniform":
        return torch.rand((m, r), generator=generator, dtype=torch.float32) * (2 * bound) - bound, B
    if config.lowrank_init == "cosine":
        A = torch.cos(math.pi / m * (torch.arange(m, dtype=torch.float32)[:, None] + 0.5) * torch.arange(r))
        rms = A.square().mean(0).sqrt().clamp(min=1e-3)  # more waves than positions: some are zero
        return A / rms * (bound / math.sqrt(3)), B
    left, sizes, right = torch.linalg.svd(_rows(config, m, embedding, rho, tokenizer, generator), full_matrices=False)
    root = (sizes[:r] * (_SVD_SHARE / config.lowrank_scale())).sqrt()
    A, found = B.new_zeros(m, r), len(root)  # at most min(m, d)
    A[:, :found], B[:found] = left[:, :r] * root, root[:, None] * right[:r]
    return A, B


def _rows(
    config: EPTConfig, count: int, embedding: nn.Module, rho: float, tokenizer: Any, generator: torch.Generator
) -> Tensor:
    """Makes `count` rows of a prompt as `prompt_tuning_init` says."""
    if config.prompt_tuning_init == "RANDOM":
        return _randn((count, int(config.token_dim)), generator)
    ids = torch.randint(rows_of(embedding), (count,), generator=generator)
    if config.prompt_tuning_init == "TEXT":
        text_ids = _text_ids(config, tokenizer)
        if max(text_ids) >= rows_of(embedding):
            raise ValueError(
                f"prompt_tuning_init_text contains token {max(text_ids)}, but the model's embedding has "
                f"{rows_of(embedding)} rows: use the model's own tokenizer, or call resize_token_embeddings"
            )
        # Rows beyond the text come from the vocabulary: repeated rows would learn the same.
        ids[: len(text_ids)] = torch.tensor(text_ids[:count])
    return embedding(ids.to(device_of(embedding))).float().cpu() / rho


def _randn(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Draws float32 numbers: under another default dtype the values would differ."""
    return torch.randn(tuple(shape), generator=generator, dtype=torch.float32)


def _text_ids(config: EPTConfig, tokenizer: Any) -> list[int]:
    if tokenizer is None:
        source = config.tokenizer_name_or_path or config.base_model_name_or_path
        if not source:
            raise ValueError("prompt_tuning_init='TEXT' needs tokenizer_name_or_path, or a tokenizer passed in")
        from transformers import AutoTokenizer

        options = dict(config.tokenizer_kwargs or {})
        options.pop("trust_remote_code", None)  # the configuration may be untrusted
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
    text_ids = list(tokenizer(config.prompt_tuning_init_text, add_special_tokens=False)["input_ids"])
    if not text_ids:
        raise ValueError(
            f"prompt_tuning_init_text {config.prompt_tuning_init_text!r} has no tokens: give a text with words"
        )
    return text_ids
