"""The EPT layer: its parameters, the joint prompt, and the model's input embeddings made from both.

P = joint prompt [s, d]        E' = W[id] + C[pos]        inputs_embeds = [P; E']
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from peft.tuners.tuners_utils import BasePromptEncoder
from torch import Tensor, nn

from . import functional, reparameterization
from .config import EPTConfig
from .embedding import device_of, embedding_rms, embedding_width, lookup, position_ids_of, text_positions
from .initialisation import initial_values

_PARTS = ("prompt", "A", "B", "beta", "W_q", "W_k", "D", "U", "G")
_BY_TOKEN = ("W_in", "b_in", "W_out", "b_out")


class EPTLayer(BasePromptEncoder):
    """Prompt, low-rank update, fusion and gated spaces for one embedding module.

    Args:
        config: what the layer consists of; a copy is kept.
        embedding: the base model's input embedding, any module that maps ids `[…]` to vectors `[…, d]`. It is
            referenced, not owned: its weights belong to neither the layer's parameters nor its state.
        initialise: `False` leaves the parameters at zero, for a state that is about to be loaded.
        tokenizer: for `prompt_tuning_init="TEXT"`; None loads the one that the configuration names.

    Parameters, in float32 and units of ρ, the root mean square of the embeddings: `prompt` [s, d], `A` [m, r], `B`
    [r, d], `beta` [1], `W_q` and `W_k` [d, a], `D` [d, K·h], `U` [K·h, d], `G` [d, K], and those of
    `EPTConfig.parameter_shapes` that stand in for the prompt or the update. Parts that are switched off have none.
    A folded layer has `folded_prompt` [s, d], in the units of the embeddings, and the update.

    Example:
        >>> embedding = torch.nn.Embedding(100, 16)
        >>> layer = EPTLayer(EPTConfig(num_virtual_tokens=4, max_length=8, r=2), embedding)
        >>> inputs_embeds, attention_mask, position_ids = layer(torch.tensor([[5, 6, 7]]))
        >>> inputs_embeds.shape, position_ids.tolist()
        (torch.Size([1, 7, 16]), [[0, 1, 2, 3, 4, 5, 6]])
    """

    uses_shared_state = True  # for PEFT: not a layer to inject into a model

    def __init__(
        self, config: EPTConfig, embedding: nn.Module, *, initialise: bool = True, tokenizer: Any = None
    ) -> None:
        super().__init__()
        self.config = copy.deepcopy(config)
        self.d = self.config.token_dim = embedding_width(embedding)
        self._embedding = (embedding,)  # in a tuple, so that it is not registered as a part of this module
        if isinstance(config.embedding_scale, str):
            self.embedding_scale = embedding_rms(embedding) if initialise else 1.0
        else:
            self.embedding_scale = float(config.embedding_scale)
        # Not a buffer: it follows from the seed, and stays float32 whatever the layer is cast to.
        self._basis = None if config.folded else reparameterization.frozen_basis(self.config, self.d)
        for name, shape in self.config.parameter_shapes(self.d).items():
            zeros = torch.zeros(shape, device=device_of(embedding), dtype=torch.float32)
            self.register_parameter(name, nn.Parameter(zeros, requires_grad=not config.folded))
        if initialise and not config.folded:
            with torch.no_grad():
                for name, value in initial_values(self.config, embedding, self.embedding_scale, tokenizer).items():
                    self._parameters[name].copy_(value)
        self._place_basis()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        inputs_embeds: Tensor | None = None,
        text_mask: Tensor | None = None,
        embedding: nn.Module | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Builds the frozen model's input.

        Args:
            input_ids: `[batch, n]` token ids, padded on either side.
            attention_mask: `[batch, n]`, nonzero at real tokens; None: all are real.
            inputs_embeds: `[batch, n, d]` instead of `input_ids`.
            text_mask: `[batch, n]`, nonzero at the tokens that belong to the input text and get the low-rank update;
                None: all real tokens. Labels and generated tokens of a decoder-only model do not belong to the text.
                With `update_scope="all"` it makes no difference.
            embedding: used instead of the embedding given at construction.

        Returns:
            `inputs_embeds` `[batch, s + n, d]` in the embedding's dtype, `attention_mask` `[batch, s + n]` in
            the given mask's dtype (int64 without one), `position_ids` `[batch, s + n]` int64 that count real
            tokens from 0 whatever the padding.

        Raises:
            ValueError: a text has more than `max_length` tokens, or shapes do not fit.
        """
        ids, table, attention_mask = lookup(
            self._embedding[0] if embedding is None else embedding,
            input_ids,
            inputs_embeds,
            attention_mask,
            width=self.d,
        )
        batch, s = ids.shape[0], self.config.num_virtual_tokens
        embeds = self.embed(ids, self.positions(attention_mask, text_mask), table, self.joint_prompt())
        attention_mask = torch.cat([attention_mask.new_ones(batch, s), attention_mask], dim=1)
        return embeds, attention_mask, position_ids_of(attention_mask)

    def positions(self, attention_mask: Tensor, text_mask: Tensor | None = None) -> Tensor:
        """Numbers the tokens that get the update from 0, `[batch, n]` int64; −1 at all others.

        A token's number is the count of real tokens before it. Masks and errors as in `forward`.
        """
        if self.config.update_scope == "all":
            return self.within_table(text_positions(attention_mask))
        positions = text_positions(attention_mask, text_mask)
        self.check_length(positions)
        return positions

    def within_table(self, positions: Tensor) -> Tensor:
        """Drops positions beyond `max_length`, for which A has no row; a token-dependent update has no such limit."""
        return (
            positions
            if self.config.update == "token"
            else positions.masked_fill(positions >= self.config.max_length, -1)
        )

    def embed(self, ids: Tensor, positions: Tensor, table: Tensor, prompt: Tensor | None = None) -> Tensor:
        """Computes `[P; E']`, or `E'` alone without a `prompt` `[s, d]`: `[batch, s + n, d]` in the table's dtype.

        Args:
            ids, table: as `ept.embedding.lookup` returns them. positions: `[batch, n]`, −1 at tokens without an update.
        """
        prompt = table.new_zeros(0, self.d, dtype=torch.float32) if prompt is None else prompt
        if self.config.updates_by_token:
            parts = (part.to(table.device) for part in (prompt, *map(self.part, _BY_TOKEN)))
            return functional.prompted_embedding_by_token(ids, positions, table, *parts, scale=self.embedding_scale)
        prompt, A, B = (part.to(table.device) for part in (prompt, self.part("A"), self.part("B")))
        return functional.prompted_embedding(ids, positions, table, prompt, A, B, self.update_scale())

    def joint_prompt(self) -> Tensor:
        """Computes the prompt that the model sees, `[s, d]` float32, in the units of the embedding table."""
        config = self.config
        if config.folded or not config.num_virtual_tokens:
            return self.part("folded_prompt")
        short = reparameterization.short_prompt(self.part, self._basis_here(), self._parameters)
        return functional.joint_prompt(
            short,
            *map(self.part, _PARTS[1:]),
            lowrank_scale=config.lowrank_scale(),
            embedding_scale=self.embedding_scale,
            score_scale=config.score_scale(self.d),
            activation=config.space_activation,
        )

    def part(self, name: str) -> Tensor:
        """Returns the parameter `name`, or an empty or constant stand-in if that part is switched off."""
        if name in self._parameters:
            return getattr(self, name)
        config, d, device = self.config, self.d, device_of(self._embedding[0])
        if name == "beta" and config.fusion and config.fusion_weight is not None:
            return torch.full((1,), config.fusion_weight, device=device, dtype=torch.float32)
        shapes: dict[str, tuple[int, ...]] = {
            **dict.fromkeys(("prompt", "folded_prompt", "B", "U"), (0, d)),
            **dict.fromkeys(("W_q", "W_k", "D"), (d, 0)),
            "A": (config.max_length, 0),
            "beta": (0,),
            # A gate of zeros weighs all spaces alike; a single space needs none.
            "G": (d, config.num_spaces if config.num_spaces > 1 else 0),
        }
        return torch.zeros(shapes[name], device=device, dtype=torch.float32)

    def update_scale(self) -> float:
        """Returns the factor of `A·B` in the embeddings, `ρ·α/√r`."""
        return self.embedding_scale * self.config.lowrank_scale()

    def fold(self) -> None:
        """Turns the layer into its inference form, in place: the joint prompt `[s, d]`, and the update as it is.

        Outputs stay the same, bit for bit. This cannot be undone: first save an adapter that is to be trained further.
        """
        if self.config.folded:
            return
        with torch.no_grad():
            folded = {**self._parameters, "folded_prompt": self.joint_prompt()}
        self.config.folded, self._basis = True, None
        for name in list(self._parameters):
            delattr(self, name)
        for name in self.config.parameter_shapes(self.d):
            self.register_parameter(name, nn.Parameter(folded[name].detach(), requires_grad=False))
        self._place_basis()

    def token_update(self) -> dict[str, Tensor]:
        """Returns the parts of the token-dependent update, `relu(e·W_in + b_in)·W_out + b_out` in the table's units."""
        scale = self.embedding_scale
        W_in, b_in, W_out, b_out = map(self.part, _BY_TOKEN)
        return {"W_in": W_in / scale, "b_in": b_in, "W_out": scale * W_out, "b_out": scale * b_out}

    def position_table(self) -> Tensor:
        """Multiplies the update out: `C = ρ·c·A·B` `[m, d]`, in the units of the embedding table."""
        return self.update_scale() * (self.part("A") @ self.part("B"))

    def check_length(self, positions: Tensor, longest: int | None = None) -> None:
        """Raises `ValueError` for a text with more tokens than A has rows; a compiled graph raises `RuntimeError`.

        On a GPU the graph's error is a device assertion, after which the process cannot use that GPU any more.

        `longest` is the text's length, if known; otherwise the width of `positions` bounds it.
        """
        limit = self.config.max_length
        most = positions.shape[1] if longest is None else longest
        if not self.config.r or self.config.updates_by_token or most <= limit:
            return  # nothing to wait for on an accelerator in the usual case
        remedy = f"the adapter was made for max_length={limit}: truncate to {limit} or train with a larger max_length"
        if torch.compiler.is_compiling():  # a compiled graph cannot wait for the number
            torch._assert_async(positions.max() < limit, f"input has more than {limit} tokens, {remedy}")
            return
        found = int(positions.max()) + 1
        if found > limit:
            raise ValueError(f"input has {found} tokens, {remedy}")

    def _apply(self, fn: Any, recurse: bool = True) -> EPTLayer:
        super()._apply(fn, recurse)
        self._place_basis()
        return self

    def _place_basis(self) -> None:
        """Copies the prompt's frozen basis to the layer's device, once per move, so that no step waits for it."""
        Z = self._parameters.get("Z")
        self._placed_basis = self._basis if self._basis is None or Z is None else self._basis.to(Z.device)

    def _basis_here(self) -> Tensor | None:
        placed = self._placed_basis
        # Parameters may also be moved without `_apply`, as by accelerate's hooks and loaders.
        is_here = placed is not None and placed.device == self.part("Z").device
        return placed if is_here else self._basis

    def extra_repr(self) -> str:
        names = ("num_virtual_tokens", "r", "num_spaces", "space_dim", "fusion")
        sizes = ", ".join(f"{name}={getattr(self.config, name)}" for name in names)
        return f"d={self.d}, {sizes}, embedding_scale={self.embedding_scale:.4g}, folded={self.config.folded}"

    def get_extra_state(self) -> Tensor:
        """Adds ρ to the state: without it the parameters have no unit."""
        return torch.tensor(self.embedding_scale, dtype=torch.float64)

    def set_extra_state(self, state: Tensor) -> None:
        self.embedding_scale = float(state)

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: Any,
        config: Any,
        adapter_name: str,
        state_dict: Mapping[str, Any],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        layer, prefix = model.prompt_encoder[adapter_name], f"prompt_encoder.{adapter_name}."
        # From the given state if it has them: a sharded model's own parameters are incomplete.
        state = {name: state_dict.get(prefix + name, value) for name, value in layer._parameters.items()}
        return {**state, "embedding_scale": layer.get_extra_state()}

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        """Leaves the key as it is: no key contains the name, and a head's key may contain the same word."""
        return key

    @torch.no_grad()
    def _load_adapter_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        wanted: dict[str, Tensor] = {**dict(self.named_parameters()), "embedding_scale": self.get_extra_state()}
        # Heads' names have dots.
        others = [name for name in state_dict if "." not in name and name not in wanted]
        if others:
            raise ValueError(
                f"the state holds {', '.join(others)}, which the adapter does not have: load the adapter's own weights"
            )
        for name, own in wanted.items():  # check all before writing any
            given = state_dict.get(name)
            if given is None or given.shape != own.shape:
                found = "missing" if given is None else list(given.shape)
                raise ValueError(
                    f"{name} is {found} in the state, but {list(own.shape)} in the adapter: load the adapter's own "
                    "weights"
                )
        for name, parameter in self.named_parameters():
            parameter.copy_(state_dict[name])
        self.set_extra_state(state_dict["embedding_scale"])
