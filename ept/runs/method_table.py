"""The methods of training, comparisons and profiles: one row each, and one module that builds it.

Imports nothing heavy, so that a configuration is checked instantly.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from ..utils.messages import shown

if TYPE_CHECKING:
    from .config import MethodConfig

Role = Literal["prompt", "map", "head", "other"]

_LOW_RANK = frozenset({"r", "alpha", "lowrank_init", "update_scope"})
_FUSION = frozenset({"fusion", "fusion_dim", "fusion_score_scale", "fusion_weight"})
_SPACES = frozenset({"num_spaces", "space_dim", "space_activation", "space_gate"})
_TOKENS = frozenset({"num_virtual_tokens"})
_OURS = _TOKENS | {"embedding_scale", "base_dropout", "init_from"}
_START = frozenset({"prompt_tuning_init", "prompt_tuning_init_text"})
_PROMPT = _OURS | _START
_EPT = _PROMPT | _LOW_RANK | _FUSION | _SPACES | {"update", "prompt_scale_shift"}
_EPT_ROLES: dict[str, Role] = {
    **dict.fromkeys(("prompt", "U", "Z", "scale", "shift", "gain"), "prompt"),
    **dict.fromkeys(("D", "G", "W_q", "W_k", "W_in", "W_down", "W_up"), "map"),
}


@dataclass(frozen=True)
class Method:
    """A way to adapt a frozen model.

    Attributes:
        name: its name in a configuration.
        title: its name in tables and figures.
        built_by: `module:function` in `ept.runs`. The function makes the adapter's configuration, with the arguments of
            `adapters.ept`; the module's `attach` and `attach_trained` put the adapter on a base model.
        settable: the fields of `MethodConfig` that apply to it; all others are refused.
        usual_tokens: default length of its prompt; 0: it has none.
        fixed: the fields that make an ablation.
        roles: the learning rate of each parameter, by the last part of its name; unlisted ones have the "other" rate.
            None: the whole adapter has the prompt's rate.
        profiled_as: its name in `ept profile`, if that measures it.
    """

    name: str
    title: str
    built_by: str
    settable: frozenset[str]
    usual_tokens: int = 40
    fixed: Mapping[str, Any] = field(default_factory=dict)
    roles: Mapping[str, Role] | None = None
    profiled_as: str | None = None

    @property
    def has_two_rates(self) -> bool:
        """True if the adapter has parameters other than the prompt, with their own learning rate."""
        return self.roles is not None

    def role(self, parameter: str) -> Role:
        """Returns the role of a parameter, which determines its learning rate."""
        if "modules_to_save" in parameter:
            return "head"
        return "prompt" if self.roles is None else self.roles.get(parameter.rpartition(".")[2], "other")


def _ablation(name: str, title: str, without: frozenset[str], **fixed: Any) -> Method:
    return Method(name, title, "adapters:ept", _EPT - without - set(fixed), fixed=fixed, roles=_EPT_ROLES)


_ALL = (
    Method("pt", "prompt tuning", "adapters:ept", _PROMPT, 100, profiled_as="pt"),
    Method("dept", "DePT", "adapters:ept", _PROMPT | _LOW_RANK, 60, roles=_EPT_ROLES, profiled_as="dept"),
    Method("ept", "EPT", "adapters:ept", _EPT, roles=_EPT_ROLES, profiled_as="ept"),
    Method(
        "ulpt",
        "ULPT",
        "adapters:ept",
        _OURS | {"prompt_rank"},
        100,
        roles=_EPT_ROLES,
    ),
    Method("adept", "ADePT", "adapters:ept", _PROMPT | {"r"}, 60, roles=_EPT_ROLES),
    Method("residual", "residual prompt tuning", "adapters:ept", _PROMPT | {"residual_dim"}, 100, roles=_EPT_ROLES),
    Method(
        "prompt-tuning", "PEFT prompt tuning", "peft_models:prompt_tuning", _TOKENS | _START, 100, profiled_as="peft-pt"
    ),
    Method("p-tuning", "PEFT p-tuning", "peft_models:p_tuning", _TOKENS, 20),
    Method("mpt", "PEFT multitask prompt tuning", "peft_models:prompt_tuning", _TOKENS, 100),
    Method("lora", "PEFT LoRA", "peft_models:lora", frozenset({"r", "alpha"}), 0),
    _ablation("ept-no-fusion", "EPT without fusion", _FUSION, fusion=False),
    _ablation("ept-no-spaces", "EPT without spaces", _SPACES, num_spaces=0),
    _ablation("ept-uniform-gate", "EPT, uniform gate", frozenset(), space_gate="uniform"),
    _ablation("ept-fixed-beta", "EPT, β fixed to 1", frozenset(), fusion_weight=1.0),
    _ablation("ept-cosine", "EPT, cosine start", frozenset(), lowrank_init="cosine"),
    replace(
        _ablation("ept-token", "EPT (token-dependent)", frozenset({"alpha", "lowrank_init"}), update="token"),
        profiled_as="ept-token",
    ),
    _ablation("ept-raw-scale", "EPT, raw scale", frozenset(), embedding_scale=1.0),
)
METHODS: dict[str, Method] = {method.name: method for method in _ALL}


def get_method(name: str) -> Method:
    """Looks a method up by its name. Raises ValueError for an unknown one, with the nearest known name."""
    if name not in METHODS:
        near = difflib.get_close_matches(name[:40], METHODS, n=1, cutoff=0.0)[0]
        raise ValueError(f"unknown method {shown(name)}: did you mean {near!r}? Known: {', '.join(METHODS)}")
    return METHODS[name]


def check_settings(config: MethodConfig) -> MethodConfig:
    """Returns `config`; raises ValueError for an unknown method, and for a setting that does not apply to it."""
    method = get_method(config.name)
    for name, value in config.fields_given().items():
        if name in method.fixed and value != method.fixed[name]:
            raise ValueError(f"method.{name} cannot be set for method.name={method.name}, which fixes it")
        if name not in method.settable and name not in method.fixed:
            raise ValueError(f"method.{name} cannot be set for method.name={method.name}, which has no such part")
    return config
