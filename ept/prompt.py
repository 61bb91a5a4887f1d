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

_ROWS_AT_ONCE = 1 << 14  # rows of the table looked at together when its root mean square is taken


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


def lookup(
    embedding: nn.Module,
    input_ids: Tensor | None,
    inputs_embeds: Tensor | None,
    attention_mask: Tensor | None,
    width: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Ids and the table they are rows of, and the attention mask, checked.

    A plain look-up gives the ids and the module's weight. A module that does more (Gemma scales inside, offloaded or
    4-bit weights, forward hooks) is called, and its output, or the given `inputs_embeds`, becomes the table.

    Returns:
        ids `[batch, n]`, table `[rows, d]`, attention mask `[batch, n]`.
    """
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("give exactly one of input_ids and inputs_embeds")
    given = input_ids if input_ids is not None else inputs_embeds
    assert given is not None
    if input_ids is not None and (input_ids.dim() != 2 or input_ids.is_floating_point()):
        raise ValueError(
            f"input_ids must be integers of shape [batch, length], got {input_ids.dtype} {list(input_ids.shape)}"
        )
    if inputs_embeds is not None and (inputs_embeds.dim() != 3 or inputs_embeds.shape[-1] != width):
        raise ValueError(f"inputs_embeds must have shape [batch, length, {width}], got {list(inputs_embeds.shape)}")
    batch, n = given.shape[:2]
    if attention_mask is None:
        attention_mask = torch.ones(batch, n, dtype=torch.int64, device=given.device)
    elif attention_mask.shape != (batch, n):
        raise ValueError(
            f"attention_mask must have the shape of the input, [{batch}, {n}], got {list(attention_mask.shape)}; "
            "masks of more dimensions cannot be extended by the prompt"
        )
    if inputs_embeds is None and input_ids is not None:
        if is_plain_lookup(embedding):
            return input_ids, _weight(embedding), attention_mask
        inputs_embeds = embedding(input_ids)
    assert inputs_embeds is not None
    rows = inputs_embeds.reshape(batch * n, width)
    return torch.arange(batch * n, device=rows.device).view(batch, n), rows, attention_mask.to(rows.device)


def is_plain_lookup(embedding: nn.Module) -> bool:
    """Whether calling `embedding` is no more than taking rows of its weight."""
    return (
        type(embedding) is nn.Embedding
        and embedding.max_norm is None
        and not embedding.weight.is_meta
        and "forward" not in embedding.__dict__
        and not embedding._forward_hooks
        and not embedding._forward_pre_hooks
    )


def text_positions(attention_mask: Tensor, text_mask: Tensor | None = None) -> Tensor:
    """Index of every input-text token among those of its row, −1 elsewhere: `[batch, n]` int64."""
    updated = attention_mask.bool()
    if text_mask is not None:
        if text_mask.shape != attention_mask.shape:
            raise ValueError(f"text_mask must have shape {list(attention_mask.shape)}, got {list(text_mask.shape)}")
        updated = updated & text_mask.bool()
    return (updated.cumsum(1) - 1).masked_fill(~updated, -1)


def position_ids_of(attention_mask: Tensor) -> Tensor:
    """Position of every real token counted from 0; padding before the first one has 0: `[batch, length]` int64."""
    return (attention_mask.bool().cumsum(1) - 1).clamp(min=0)


@torch.no_grad()
def embedding_rms(embedding: nn.Module) -> float:
    """Root mean square ρ of the vectors that `embedding` gives for its whole vocabulary.

    Raises:
        ValueError: the embeddings are all zero or not finite, which no unit can be taken from.
    """
    rows, device = _rows(embedding), _device_of(embedding)
    total, count = 0.0, 0
    for start in range(0, rows, _ROWS_AT_ONCE):
        vectors = embedding(torch.arange(start, min(start + _ROWS_AT_ONCE, rows), device=device))
        total += float(torch.linalg.vector_norm(vectors.float(), dtype=torch.float64)) ** 2
        count += vectors.numel()
    rms = math.sqrt(total / count)
    if not math.isfinite(rms) or rms == 0:
        raise ValueError(
            f"the root mean square of the input embeddings is {rms}: load the model's weights first, or set "
            "embedding_scale to a number"
        )
    return rms


def embedding_width(embedding: nn.Module) -> int:
    """Size d of the vectors that `embedding` gives."""
    width = getattr(embedding, "embedding_dim", None)
    return int(width if width is not None else _weight(embedding).shape[1])


def _weight(embedding: nn.Module) -> Tensor:
    weight = embedding.weight
    assert isinstance(weight, Tensor)
    return weight


def _rows(embedding: nn.Module) -> int:
    rows = getattr(embedding, "num_embeddings", None)
    return int(rows if rows is not None else _weight(embedding).shape[0])


def _device_of(embedding: nn.Module) -> torch.device:
    """Where ids for `embedding` belong; offloaded weights are brought from the meta device at each call."""
    hook = getattr(embedding, "_hf_hook", None)
    if (device := getattr(hook, "execution_device", None)) is not None:
        return torch.device(device)
    weight = _weight(embedding)
    return torch.device("cpu") if weight.is_meta else weight.device
