"""The EPT layer: its parameters, the joint prompt, and the model's input embeddings made from both.

    P = joint prompt [s, d]        E' = W[id] + C[pos]        inputs_embeds = [P; E']

Parameters are kept in units of ρ, the root mean square of the base model's embeddings. Everything but the autograd
wrappers it calls is plain module code; PEFT's part is limited to how the state is named on disk.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

import torch
from peft.tuners.tuners_utils import BasePromptEncoder
from torch import Tensor, nn

from . import functional
from .config import EPTConfig
from .embedding import (
    _device_of,
    _rows,
    embedding_rms,
    embedding_width,
    lookup,
    position_ids_of,
    text_positions,
)


class EPTLayer(BasePromptEncoder):
    """Prompt, low-rank update, fusion and gated spaces for one embedding module.

    Args:
        config: what the layer consists of; a copy is kept.
        embedding: the base model's input embedding, any module that maps ids `[…]` to vectors `[…, d]`. It is
            referred to, not owned: its weights are no part of the layer's parameters or state.
        initialise: `False` leaves the parameters at zero, for a state that is about to be loaded.
        tokenizer: for `prompt_tuning_init="TEXT"`; None loads the one that the configuration names.

    Parameters, in float32 and units of ρ: `prompt` [s, d], `A` [m, r], `B` [r, d], `beta` [1], `W_q` and
        `W_k` [d, a],
    `D` [d, K·h], `U` [K·h, d], `G` [d, K]. Parts that are switched off have none.

    Example:
        >>> embedding = torch.nn.Embedding(100, 16)
        >>> layer = EPTLayer(EPTConfig(num_virtual_tokens=4, max_length=8, r=2), embedding)
        >>> inputs_embeds, attention_mask, position_ids = layer(torch.tensor([[5, 6, 7]]))
        >>> inputs_embeds.shape, position_ids.tolist()
        (torch.Size([1, 7, 16]), [[0, 1, 2, 3, 4, 5, 6]])
    """

    def __init__(
        self, config: EPTConfig, embedding: nn.Module, *, initialise: bool = True, tokenizer: Any = None
    ) -> None:
        super().__init__()
        self.config = copy.deepcopy(config)
        self.d = embedding_width(embedding)
        self.config.token_dim = self.d
        # In a tuple, so that the embedding is not registered as a part of this module.
        self._embedding = (embedding,)
        if isinstance(config.embedding_scale, str):
            self.embedding_scale = embedding_rms(embedding) if initialise else 1.0
        else:
            self.embedding_scale = float(config.embedding_scale)
        device = _device_of(embedding)
        for name, shape in self.config.parameter_shapes(self.d).items():
            trainable = not self.config.folded
            self.register_parameter(name, nn.Parameter(torch.zeros(shape, device=device), requires_grad=trainable))
        if initialise and not self.config.folded:
            self._initialise(embedding, tokenizer)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        inputs_embeds: Tensor | None = None,
        text_mask: Tensor | None = None,
        embedding: nn.Module | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What the frozen model is called with.

        Args:
            input_ids: `[batch, n]` token ids, padded on either side.
            attention_mask: `[batch, n]`, nonzero at real tokens; None: all are real.
            inputs_embeds: `[batch, n, d]` instead of `input_ids`.
            text_mask: `[batch, n]`, nonzero at the tokens that belong to the input text and get the low-rank update;
                None: all real tokens. Labels and generated tokens of a decoder-only model do not belong to it.
            embedding: in place of the embedding given at construction.

        Returns:
            `inputs_embeds` `[batch, s + n, d]` in the embedding's dtype, `attention_mask` `[batch, s + n]` in
            the given mask's dtype (int64 without one), `position_ids` `[batch, s + n]` int64 that count real
            tokens from 0 whatever the padding.

        Raises:
            ValueError: a text has more than `max_length` tokens, or shapes do not fit.
        """
        ids, table, attention_mask = lookup(
            embedding or self._embedding[0], input_ids, inputs_embeds, attention_mask, width=self.d
        )
        positions = text_positions(attention_mask, text_mask)
        self.check_length(positions)
        batch, s = ids.shape[0], self.config.num_virtual_tokens
        embeds = self._embed(ids, positions, table)
        attention_mask = torch.cat([attention_mask.new_ones(batch, s), attention_mask], dim=1)
        return embeds, attention_mask, position_ids_of(attention_mask)

    def joint_prompt(self) -> Tensor:
        """The prompt that the model sees, `[s, d]` float32, in the units of the embedding table."""
        config = self.config
        prompt = self.part("prompt", (0, self.d))
        if config.folded or not prompt.shape[0]:
            return prompt
        empty = (self.d, 0)
        return functional.joint_prompt(
            prompt,
            self.part("A", (config.max_length, 0)),
            self.part("B", (0, self.d)),
            self._beta(),
            self.part("W_q", empty),
            self.part("W_k", empty),
            self.part("D", empty),
            self.part("U", (0, self.d)),
            self.part("G", self._fixed_gate_shape()),
            lowrank_scale=config.lowrank_scale(),
            embedding_scale=self.embedding_scale,
            score_scale=config.score_scale(self.d),
            activation=config.space_activation,
        )

    def fold(self) -> None:
        """Turns the layer into its inference form, in place: one prompt `[s, d]` and one table `C = ρ·c·A·B` `[m,
        d]`.

        Outputs stay the same up to rounding. There is no way back: save first what is to be trained further.
        """
        if self.config.folded:
            return
        with torch.no_grad():
            folded = {"prompt": self.joint_prompt()}
            if self.config.r:
                folded["table"] = self.update_scale() * (self.part("A", ()) @ self.part("B", ()))
        self.config.folded = True
        for name in list(self._parameters):
            delattr(self, name)
        for name in self.config.parameter_shapes(self.d):
            self.register_parameter(name, nn.Parameter(folded[name], requires_grad=False))

    def _beta(self) -> Tensor:
        """The fusion's weight: learned, fixed, or none at all."""
        fixed = self.config.fusion_weight
        if self.config.fusion and fixed is not None:
            return torch.full((1,), fixed, device=_device_of(self._embedding[0]))
        return self.part("beta", (0,))

    def _fixed_gate_shape(self) -> tuple[int, int]:
        """Of the zeros that stand for a missing gate: logits of zero weigh all spaces alike; one space needs none."""
        K = self.config.num_spaces
        return (self.d, K if K > 1 else 0)

    def part(self, name: str, empty_shape: tuple[int, ...]) -> Tensor:
        """The parameter `name`, or an empty tensor of `empty_shape` where that part is switched off."""
        parameter = self._parameters.get(name)
        if parameter is not None:
            return parameter
        return torch.zeros(empty_shape, device=_device_of(self._embedding[0]))

    def update_scale(self) -> float:
        """Factor of `A·B` in the embeddings: `ρ·α/√r`."""
        return self.embedding_scale * self.config.lowrank_scale()

    def check_length(self, positions: Tensor) -> None:
        """Raises `ValueError` if a text is longer than the low-rank update has rows for; a compiled graph raises
        `RuntimeError`.
        """
        limit = self.config.max_length
        if not self.config.r or positions.shape[1] <= limit:
            return  # nothing to wait for on an accelerator in the usual case
        remedy = f"the adapter was made for max_length={limit}: truncate to {limit} or train with a larger max_length"
        if torch.compiler.is_compiling():  # a compiled graph cannot wait for the number
            torch._assert_async(positions.max() < limit, f"input has more than {limit} tokens, {remedy}")
            return
        longest = int(positions.max()) + 1
        if longest > limit:
            raise ValueError(f"input has {longest} tokens, {remedy}")

    def extra_repr(self) -> str:
        c = self.config
        return (
            f"d={self.d}, num_virtual_tokens={c.num_virtual_tokens}, r={c.r}, num_spaces={c.num_spaces}, "
            f"space_dim={c.space_dim}, fusion={c.fusion}, embedding_scale={self.embedding_scale:.4g}, folded={c.folded}"
        )

    def get_extra_state(self) -> Tensor:
        """ρ belongs to the state: without it the parameters have no unit."""
        return torch.tensor(self.embedding_scale, dtype=torch.float64)

    def set_extra_state(self, state: Tensor) -> None:
        self.embedding_scale = float(state)

    def _embed(self, ids: Tensor, positions: Tensor, table: Tensor) -> Tensor:
        prompt = self.joint_prompt().to(table.device)
        if not self.config.folded:
            A, B = self.part("A", (self.config.max_length, 0)), self.part("B", (0, self.d))
            return functional.prompted_embedding(
                ids, positions, table, prompt, A.to(table.device), B.to(table.device), self.update_scale()
            )
        tokens = table[ids].float()
        if self.config.r:
            update = self.part("table", ()).to(table.device)[positions.clamp(min=0)]
            tokens = tokens + update * (positions >= 0)[..., None]
        return torch.cat([prompt.expand(ids.shape[0], -1, -1), tokens], dim=1).to(table.dtype)

    @torch.no_grad()
    def _initialise(self, embedding: nn.Module, tokenizer: Any) -> None:
        # Drawn on the CPU, the prompt first: the same on every device, and the same prompt for PT, DePT and EPT.
        generator = torch.Generator().manual_seed(self.config.seed)
        parameters = self._parameters
        if (prompt := parameters.get("prompt")) is not None:
            prompt.copy_(self._initial_prompt(embedding, tokenizer, generator))
        if (A := parameters.get("A")) is not None:  # as DePT: kaiming uniform with a = √5; B starts at zero
            bound = 1 / math.sqrt(A.shape[1])
            A.copy_(torch.rand(A.shape, generator=generator) * (2 * bound) - bound)
        for name in (
            "D",
            "W_q",
            "W_k",
        ):  # unit variance after the product with a normalised row; beta, U, G start at zero
            if (parameter := parameters.get(name)) is not None:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / math.sqrt(self.d))

    def _initial_prompt(self, embedding: nn.Module, tokenizer: Any, generator: torch.Generator) -> Tensor:
        s, init = self.config.num_virtual_tokens, self.config.prompt_tuning_init
        if init == "RANDOM":
            return torch.randn((s, self.d), generator=generator)
        if init == "TEXT":
            ids = self._text_ids(tokenizer)
            ids = (ids * math.ceil(s / len(ids)))[:s]
        else:
            ids = torch.randint(_rows(embedding), (s,), generator=generator).tolist()
        rows = embedding(torch.tensor(ids, device=_device_of(embedding)))
        return rows.float().cpu() / self.embedding_scale

    def _text_ids(self, tokenizer: Any) -> list[int]:
        text = self.config.prompt_tuning_init_text
        if tokenizer is None:
            source = self.config.tokenizer_name_or_path or self.config.base_model_name_or_path
            if not source:
                raise ValueError("prompt_tuning_init='TEXT' needs tokenizer_name_or_path, or a tokenizer passed in")
            from transformers import AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(source)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        if not ids:
            raise ValueError(f"prompt_tuning_init_text {text!r} has no tokens")
        return list(ids)

    # How PEFT names the state on disk.

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: Any,
        config: Any,
        adapter_name: str,
        state_dict: Mapping[str, Any],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        layer = model.prompt_encoder[adapter_name]
        prefix = f"prompt_encoder.{adapter_name}."
        # From the given state where it has them: a sharded model's own parameters are not whole.
        state = {name: state_dict.get(prefix + name, value) for name, value in layer._parameters.items()}
        return {**state, "embedding_scale": layer.get_extra_state()}

    @torch.no_grad()
    def _load_adapter_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        for name, parameter in self._parameters.items():
            if parameter is not None:
                parameter.copy_(state_dict[name])
        self.set_extra_state(state_dict["embedding_scale"])
