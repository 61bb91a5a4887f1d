"""The methods that a profile compares, each as one training step on a shared base model.

All methods get the same batch, the same logits (at the labels or everywhere), the frozen model without dropout or
cache, gradients clipped to norm 1, and fused AdamW: they differ only in the prompt.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

import ept_kernels

from ..model.ept_model import EPTModel
from ..model.frozen import restore_frozen, swap_frozen
from ..runs.adapters import adapter_config, module_of, share_prompt
from ..runs.method_table import METHODS

# At their default lengths PT, DePT and EPT have one parameter budget, 76,800 at d = 768 and 256 tokens; ept-token,
# with the length and rank of EPT, has 92,959.
_METHODS = {method.profiled_as: method for method in METHODS.values() if method.profiled_as is not None}
PROFILE_METHODS = tuple(_METHODS)
USUAL_METHODS = ("pt", "dept", "ept-token", "ept", "peft-pt")


@dataclass(frozen=True)
class MethodSpec:
    """A method and the length of its prompt."""

    name: str
    num_virtual_tokens: int

    @property
    def label(self) -> str:
        """`name` at the method's default length, else `name:length`."""
        usual = self.num_virtual_tokens == _METHODS[self.name].usual_tokens
        return self.name if usual else f"{self.name}:{self.num_virtual_tokens}"

    @classmethod
    def parse(cls, text: str) -> MethodSpec:
        """Reads `name` or `name:num_virtual_tokens`.

        Raises:
            ValueError: there is no such method, or the length is not a positive whole number.
        """
        name, colon, tokens = text.strip().partition(":")
        if name not in PROFILE_METHODS:
            raise ValueError(f"unknown method {name!r}: choose from {', '.join(PROFILE_METHODS)}, as in pt,ept:20")
        if colon and not (tokens.isdecimal() and int(tokens) > 0):
            raise ValueError(f"{text!r}: the prompt length after the colon must be a positive whole number")
        return cls(name, int(tokens) if colon else _METHODS[name].usual_tokens)


@dataclass(frozen=True)
class _Settings:
    """Settings of an adapter's configuration; a run's `MethodConfig` needs pydantic, which a profile does not."""

    name: str
    num_virtual_tokens: int
    budget: int | None = None

    def fields_given(self) -> dict[str, Any]:
        return {"num_virtual_tokens": self.num_virtual_tokens}


@dataclass
class Method:
    """A method on a base model, ready to take training steps.

    Attributes:
        prompt_of: object and name of the function that makes the prompt.
        fast_4bit: with 4-bit weights, True if its steps use this project's layers and False if bitsandbytes'.
        fast_frozen: its steps use fused norms, rotary embeddings and activations.
    """

    spec: MethodSpec
    model: Any
    prompt_of: tuple[Any, str]
    fast_4bit: bool | None
    fast_frozen: bool
    parameters: list[torch.nn.Parameter]
    optimizer: torch.optim.Optimizer

    def enter(self, base: Any) -> None:
        """Switches the shared model's layers to this method's, in place, before its steps."""
        swap_frozen(base) if self.fast_frozen else restore_frozen(base)
        if self.fast_4bit is not None:
            from ..model.linear4bit import Linear4bit, restore_linear4bit, swap_linear4bit

            swap_linear4bit(base) if self.fast_4bit else restore_linear4bit(base)
            for layer in base.modules():
                # A swapped layer checks its weight once, which waits for the device: in the first step of a run.
                if isinstance(layer, Linear4bit) and ept_kernels.backend(layer.weight.device) == "triton":
                    layer.four_bit_weight()

    def loss(self, batch: dict[str, Any]) -> torch.Tensor:
        """Computes the loss of a batch of `make_batches`, with its graph."""
        self.model.train()  # as Trainer does at every step
        return self.model(**batch, use_cache=False).loss

    def update(self) -> None:
        """Clips the gradients as Trainer does, takes a step, and clears them."""
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


def make_method(
    spec: MethodSpec,
    base: Any,
    task_type: str,
    max_length: int,
    fast_4bit: bool | None = None,
    fast_frozen: bool = True,
    shared_prompt: bool | None = False,
) -> Method:
    """Puts a method on `base`, which does not change until `Method.enter`.

    Args:
        task_type: SEQ_2_SEQ_LM or CAUSAL_LM.
        max_length: maximum text tokens of a row.
        fast_4bit: with a 4-bit base model, use this project's layers for its own methods (PEFT's use bitsandbytes').
            None: the base model is not 4-bit.
        fast_frozen: use fused norms, rotary embeddings and activations for this project's methods (PEFT's use the
            model's own).
        shared_prompt: let this project's methods read a decoder's prompt once per batch, as `training.shared_prompt`.
    """
    method = _METHODS[spec.name]
    settings: Any = _Settings(method.name, spec.num_virtual_tokens)
    config = adapter_config(settings, base, task_type, max_length, seed=0)
    # The base model is shared: see Method.enter.
    model = module_of(method).attach(base, config, fast_4bit=False, fast_frozen=False)
    is_ours = isinstance(model, EPTModel)
    if is_ours:
        share_prompt(model, shared_prompt)
    prompt_of = (model.prompt_encoder["default"], "joint_prompt") if is_ours else (model, "get_prompt")
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
    return Method(spec, model, prompt_of, fast_4bit and is_ours, fast_frozen and is_ours, parameters, optimizer)
