"""The methods that a profile compares, each as one training step on a base model that all of them share.

Every method gets the same batch, the same logits (those of the labels, or all), the frozen model without dropout and
without a cache, gradients clipped to norm 1, and fused AdamW: what differs is the prompt.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PromptTuningConfig, get_peft_model

from ..config import EPTConfig
from ..model.base_model import set_mode
from ..model.ept_model import get_ept_model

PROFILE_METHODS = ("pt", "dept", "ept", "peft-pt")
_TOKENS = {"pt": 100, "dept": 60, "ept": 40, "peft-pt": 100}
RANK = 30  # of DePT and EPT: with these lengths one parameter budget, 76,800 at d = 768 and 256 tokens
_CONFIGS: dict[str, Callable[..., EPTConfig]] = {
    "pt": EPTConfig.prompt_tuning,
    "dept": EPTConfig.dept,
    "ept": EPTConfig,
}


@dataclass(frozen=True)
class MethodSpec:
    """A method and the length of its prompt."""

    name: str
    num_virtual_tokens: int

    @property
    def label(self) -> str:
        """`name` at the method's usual length, else `name:length`."""
        usual = self.num_virtual_tokens == _TOKENS[self.name]
        return self.name if usual else f"{self.name}:{self.num_virtual_tokens}"

    @classmethod
    def parse(cls, text: str) -> MethodSpec:
        """From `name` or `name:num_virtual_tokens`.

        Raises:
            ValueError: there is no such method, or the length is no positive whole number.
        """
        name, colon, tokens = text.strip().partition(":")
        if name not in PROFILE_METHODS:
            raise ValueError(f"unknown method {name!r}: choose from {', '.join(PROFILE_METHODS)}, as in pt,ept:20")
        if colon and not (tokens.isdecimal() and int(tokens) > 0):
            raise ValueError(f"{text!r}: the prompt length after the colon must be a positive whole number")
        return cls(name, int(tokens) if colon else _TOKENS[name])


@dataclass
class Method:
    """A method on a base model, ready to take training steps.

    Attributes:
        loss: the loss of a batch (of `profile_data`), with a graph behind it.
        prompt_of: object and name of the function that makes the prompt.
        fast_4bit: with 4-bit weights, whether its steps run on this project's layers or bitsandbytes'; else None.
    """

    spec: MethodSpec
    model: Any
    loss: Callable[[dict[str, Any]], torch.Tensor]
    prompt_of: tuple[Any, str]
    fast_4bit: bool | None = None
    parameters: list[torch.nn.Parameter] = field(init=False)
    optimizer: torch.optim.Optimizer = field(init=False)

    def __post_init__(self) -> None:
        self.parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-4, fused=True)

    @property
    def trainable_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters)

    def enter(self, base: Any) -> None:
        """Before its steps: the 4-bit layers of the shared model become the method's, in place."""
        if self.fast_4bit is not None:
            from ..model.linear4bit import restore_linear4bit, swap_linear4bit

            swap_linear4bit(base) if self.fast_4bit else restore_linear4bit(base)

    def update(self) -> None:
        """Clips the gradients as Trainer does, takes a step, and clears them."""
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


def make_method(spec: MethodSpec, base: Any, task_type: str, max_length: int, fast_4bit: bool | None = None) -> Method:
    """The method on `base`, which it leaves as it is.

    Args:
        task_type: SEQ_2_SEQ_LM or CAUSAL_LM.
        max_length: most text tokens of a row.
        fast_4bit: of a base model in 4 bits: whether this project's methods run on its own layers (PEFT's runs on
            bitsandbytes'). None: the base model is not in 4 bits.
    """
    make = _peft_method if spec.name == "peft-pt" else _ept_method
    method = make(spec, base, task_type, max_length)
    if fast_4bit is not None:
        method.fast_4bit = fast_4bit and spec.name != "peft-pt"
    return method


def _ept_method(spec: MethodSpec, base: Any, task_type: str, max_length: int) -> Method:
    sizes = {} if spec.name == "pt" else {"r": RANK}
    config = _CONFIGS[spec.name](
        num_virtual_tokens=spec.num_virtual_tokens, max_length=max_length, task_type=task_type, **sizes
    )
    model = get_ept_model(base, config, fast_4bit=False)  # the base model is shared: see Method.enter

    def loss(batch: dict[str, Any]) -> torch.Tensor:
        model.train()  # as Trainer does at every step
        return model(**batch).loss

    return Method(spec, model, loss, (model.prompt_encoder["default"], "joint_prompt"))


def _peft_method(spec: MethodSpec, base: Any, task_type: str, max_length: int) -> Method:
    config = PromptTuningConfig(
        task_type=task_type, num_virtual_tokens=spec.num_virtual_tokens, num_transformer_submodules=1
    )
    model = get_peft_model(base, config)

    def loss(batch: dict[str, Any]) -> torch.Tensor:
        model.train()
        set_mode(base, training=True, dropout=False)
        batch = {**batch, "use_cache": False}
        keep = batch.pop("logits_to_keep", 0)
        if not keep:
            return model(**batch).loss
        # PEFT extends the labels by the prompt, which fits all logits only: the loss is taken outside.
        labels = batch.pop("labels")[:, -keep:].contiguous()
        logits = model(**batch, logits_to_keep=keep).logits
        return base.loss_function(logits=logits, labels=labels, vocab_size=base.config.vocab_size)

    return Method(spec, model, loss, (model, "get_prompt"))
