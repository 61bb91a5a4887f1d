"""The methods a run may name, and the adapter configuration of each: ours, their ablations, and PEFT's own.

Imports nothing heavy, so that a configuration is checked in an instant.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from ..utils.messages import shown

if TYPE_CHECKING:
    from .config import MethodConfig

_LOW_RANK = frozenset({"r", "alpha"})
_FUSION = frozenset({"fusion", "fusion_dim", "fusion_score_scale", "fusion_weight"})
_SPACES = frozenset({"num_spaces", "space_dim", "space_activation", "space_gate"})
_PROMPT = frozenset(
    {"num_virtual_tokens", "embedding_scale", "prompt_tuning_init", "prompt_tuning_init_text", "base_dropout"}
)
_EPT = _PROMPT | _LOW_RANK | _FUSION | _SPACES


@dataclass(frozen=True)
class Method:
    """A way to adapt a frozen model.

    `family` says who builds it: `EPTConfig` ("ept", "dept", "pt") or PEFT ("peft"). `fixed` are the fields that make an
    ablation, `settable` those of `MethodConfig` that have a meaning for it; all others are refused.
    """

    name: str
    title: str
    family: Literal["ept", "dept", "pt", "peft"]
    settable: frozenset[str]
    fixed: Mapping[str, Any] = field(default_factory=dict)

    @property
    def two_rates(self) -> bool:
        """Whether there are parameters beside the prompt, which have their own learning rate."""
        return self.family in ("ept", "dept")


def _ablation(name: str, title: str, without: frozenset[str], **fixed: Any) -> Method:
    return Method(name, title, "ept", _EPT - without - set(fixed), fixed)


_ALL = (
    Method("pt", "prompt tuning", "pt", _PROMPT),
    Method("dept", "DePT", "dept", _PROMPT | _LOW_RANK),
    Method("ept", "EPT", "ept", _EPT),
    Method("prompt-tuning", "PEFT prompt tuning", "peft", frozenset({"num_virtual_tokens"})),
    Method("p-tuning", "PEFT p-tuning", "peft", frozenset({"num_virtual_tokens"})),
    Method("mpt", "PEFT multitask prompt tuning", "peft", frozenset({"num_virtual_tokens"})),
    Method("lora", "PEFT LoRA", "peft", _LOW_RANK),
    _ablation("ept-no-fusion", "EPT without fusion", _FUSION, fusion=False),
    _ablation("ept-no-spaces", "EPT without spaces", _SPACES, num_spaces=0),
    _ablation("ept-uniform-gate", "EPT, uniform gate", frozenset(), space_gate="uniform"),
    _ablation("ept-fixed-beta", "EPT, β fixed to 1", frozenset(), fusion_weight=1.0),
    _ablation("ept-raw-scale", "EPT, raw scale", frozenset(), embedding_scale=1.0),
)
METHODS: dict[str, Method] = {method.name: method for method in _ALL}


def get_method(name: str) -> Method:
    """The method of that name. Raises ValueError for an unknown one, with the nearest known name."""
    if name not in METHODS:
        near = difflib.get_close_matches(name[:40], METHODS, n=1, cutoff=0.0)[0]
        raise ValueError(f"unknown method {shown(name)}: did you mean {near!r}? Known: {', '.join(METHODS)}")
    return METHODS[name]


def check_settings(config: MethodConfig) -> Method:
    """The method of a run. Raises ValueError for an unknown one, and for a setting that it has no part for."""
    method = get_method(config.name)
    for name, value in config.fields_given().items():
        if name in method.fixed and value != method.fixed[name]:
            raise ValueError(f"method.{name} cannot be set for method.name={method.name}, which fixes it")
        if name not in method.settable and name not in method.fixed:
            raise ValueError(f"method.{name} cannot be set for method.name={method.name}, which has no such part")
    return method


def adapter_config(config: MethodConfig, base: Any, task_type: str, max_length: int, seed: int) -> Any:
    """The adapter's configuration, an `EPTConfig` or one of PEFT's, for the frozen model `base`.

    With `config.budget` the sizes that are not set are chosen so that the trainable parameters (heads apart) come as
    near to it as they can without exceeding it.

    Raises:
        ValueError: the method has no such part, or nothing fits the budget.
    """
    method = check_settings(config)
    if method.family == "peft":
        from .peft_models import peft_config

        return peft_config(method.name, config, base, task_type)
    from ..config import EPTConfig

    fields = {"task_type": task_type, "seed": seed, **config.fields_given(), **method.fixed}
    if config.budget is not None:
        return EPTConfig.for_budget(base, max_length, config.budget, method=method.family, **fields)
    make: Any = {"ept": EPTConfig, "dept": EPTConfig.dept, "pt": EPTConfig.prompt_tuning}[method.family]
    return make(max_length=max_length, **fields)
