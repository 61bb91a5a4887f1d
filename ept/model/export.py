"""Adapters for other engines: folded into one prompt and the update, and the embeddings of given texts.

An engine can use them without this package: the model's input for a text of n tokens is the prompt `[s, d]`,
then the embedding of token i, scaled where the model scales it (Gemma, Pegasus), plus row i of the table, for
i = 0 … n − 1. A token-dependent update has no table but a bottleneck network, applied to the token's embedding.
Generated tokens get neither, unless the adapter was trained with `update_scope="all"`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..embedding import device_of, embedding_width
from ..prompt import EPTLayer
from ..utils.files import json_record, write_atomically
from ..version import __version__
from .adapter_files import read_config, read_weights, weight_shapes, write_tensors

TENSORS_NAME = "folded.safetensors"
INFO_NAME = "folded.json"
EMBEDS_NAME = "prompt_embeds.safetensors"
FORMAT = "ept-folded"
VERSIONS = {("position", "text"): 1, ("position", "all"): 2, ("token", "text"): 3, ("token", "all"): 3}
_BY_POSITION = "[prompt; embedding(id_i), scaled as the model scales it, + table[i]], i from 0 over "
_BY_TOKEN = (
    "[prompt; e_i + relu(e_i @ W_in + b_in) @ W_out + b_out], e_i = embedding(id_i), scaled as the model scales it, in "
    "float32, for all "
)
_INPUTS = {
    ("position", "text"): f"{_BY_POSITION}the input text's real tokens",
    ("position", "all"): f"{_BY_POSITION}all real tokens, generated ones too; none beyond table",
    ("token", "text"): f"{_BY_TOKEN}real tokens of the input text",
    ("token", "all"): f"{_BY_TOKEN}real tokens, generated ones too",
}
_HEADS = "base_model."  # PEFT's prefix for trained modules of the base model


@dataclass
class FoldedAdapter:
    """An adapter in inference form."""

    layer: EPTLayer  # folded, on the CPU; it can embed texts once it has the base model's embedding
    heads: dict[str, Tensor]  # trained with it, such as a classification head, by name in the base model

    @classmethod
    def read(cls, folder: str | os.PathLike[str]) -> FoldedAdapter:
        """Reads and folds the adapter that `save_pretrained` wrote to `folder`; needs no base model."""
        config, shapes = read_config(folder), weight_shapes(folder)
        of_width = ("prompt", "folded_prompt", "B", "W_out", "shift", "gain", "U")
        widths = {shapes[name][-1] for name in of_width if shapes.get(name)}
        if not widths and "Z" in shapes:
            raise ValueError(
                f"{folder} holds only the weights of a random basis (prompt_rank), which do not show the width of "
                "the embeddings: load it with its base model, call fold() and save_pretrained(), and export the "
                "result"
            )
        if len(widths) != 1:
            raise ValueError(f"{folder} has neither prompt nor low-rank update of one width: there is nothing to fold")
        d = widths.pop()
        heads = {name: shape for name, shape in shapes.items() if name.startswith(_HEADS)}
        state = read_weights(folder, {**config.parameter_shapes(d), **heads})
        layer = EPTLayer(config, nn.Embedding(1, d), initialise=False)
        layer._load_adapter_state_dict(state)
        layer.fold()
        return cls(layer, {name.removeprefix(_HEADS): state[name] for name in heads})

    def tensors(self) -> dict[str, Tensor]:
        """Returns `prompt` `[s, d]` and `table` `[m, d]`, float32 in the units of the embeddings, and `head.<name>`.

        A token-dependent update has `W_in` `[d, r]`, `b_in` `[r]`, `W_out` `[r, d]` and `b_out` `[d]` instead of the
        table. Parts that the adapter lacks are absent.
        """
        layer, config = self.layer, self.layer.config
        parts = {"prompt": layer.part("folded_prompt")} if config.num_virtual_tokens else {}
        if config.updates_by_token:
            parts |= layer.token_update()
        elif config.r:
            parts["table"] = layer.position_table()
        heads = {f"head.{name}": tensor for name, tensor in self.heads.items()}
        return {name: tensor.detach() for name, tensor in parts.items()} | heads

    def info(self) -> dict[str, Any]:
        """Returns what an engine needs to know in addition to the tensors."""
        config, tensors = self.layer.config, self.tensors()
        kind = (config.update, config.update_scope) if config.r else ("position", "text")
        return {
            "format": FORMAT,
            "format_version": VERSIONS[kind],
            "ept_version": __version__,
            "task_type": config.task_type,
            "base_model_name_or_path": config.base_model_name_or_path,
            "template": config.template,
            "label_words": config.label_words,
            "hidden_size": self.layer.d,
            "num_virtual_tokens": config.num_virtual_tokens,
            "max_length": config.max_length if "table" in tensors else None,
            "tensors": {name: list(tensor.shape) for name, tensor in tensors.items()},
            "update_scope": kind[1],
            "inputs_embeds": _INPUTS[kind],
        }

    @torch.no_grad()
    def embed(self, encoded: Sequence[Sequence[int]], embedding: nn.Module) -> list[Tensor]:
        """Makes the model's input for each text, `[s + n, d]` on the CPU in the embedding's dtype.

        Args:
            encoded: token ids of each text.
            embedding: embeds ids as the base model does, including any scale.

        Raises:
            ValueError: the embedding has another width, a text has no tokens or more than `max_length`, or the adapter
                also updates generated tokens, which an engine that is given a text's embeddings embeds itself.
        """
        config = self.layer.config
        if config.update_scope == "all" and config.r and config.task_type == "CAUSAL_LM":
            raise ValueError(
                'the adapter was trained with update_scope="all": generated tokens get the update too, but an '
                "engine that embeds them itself leaves it out: serve it with this package, or train with "
                'update_scope="text"'
            )
        found = embedding_width(embedding)
        if found != self.layer.d:
            raise ValueError(f"the adapter is for embeddings of width {self.layer.d}, but the model has {found}")
        device = device_of(embedding)
        self.layer.to(device)
        embeds = []
        for number, ids in enumerate(encoded, start=1):
            try:
                if not ids:
                    raise ValueError("it has no tokens")
                embeds.append(self.layer(torch.tensor([ids], device=device), embedding=embedding)[0][0].cpu())
            except ValueError as error:
                raise ValueError(f"text {number}: {error}") from error
        return embeds


def write_folded(adapter: FoldedAdapter, folder: str | os.PathLike[str]) -> list[Path]:
    """Writes `folded.safetensors` and `folded.json`; returns their paths. Each file appears whole or not at all."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / TENSORS_NAME, adapter.tensors())
    write_atomically(folder / INFO_NAME, json_record(adapter.info(), indent=2))
    return [folder / TENSORS_NAME, folder / INFO_NAME]


def write_embeds(embeds: Sequence[Tensor], folder: str | os.PathLike[str]) -> Path:
    """Writes the embeddings of each text as `text.000000`, `text.000001`, … into `prompt_embeds.safetensors`."""
    path = Path(folder) / EMBEDS_NAME
    write_tensors(path, {f"text.{number:06}": tensor for number, tensor in enumerate(embeds)})
    return path
