"""EPTConfig: every choice of the method is a field; prompt tuning and DePT are settings of it."""

from __future__ import annotations

import copy
import math
import operator
import sys
import warnings
from dataclasses import dataclass, field, fields
from enum import Enum
from typing import Any

from peft.config import PromptLearningConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from ept_kernels.joint_prompt.reference import ACTIVATIONS

from .budget import RESIDUAL_DIM, best_config
from .embedding import embedding_width
from .utils.messages import shown


class _Type(str, Enum):
    """The adapter's type as an enumeration member, like PEFT's own types; PEFT's enumeration cannot be extended."""

    EPT = "EPT"

    __str__ = str.__str__


PEFT_TYPE = _Type.EPT
# No real adapter exceeds these; they keep sizes computed from an untrusted configuration finite.
MAX_SIZE, MAX_SEED = 2**31 - 1, 2**63 - 1

TASK_TYPES = ("SEQ_2_SEQ_LM", "CAUSAL_LM", "SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")

# The fields' values, for `__post_init__`.
_CHOICES = {
    "task_type": TASK_TYPES,
    "space_activation": tuple(ACTIVATIONS),
    "space_gate": ("learned", "uniform"),
    "update": ("position", "token"),
    "lowrank_init": ("uniform", "cosine", "svd"),
    "update_scope": ("text", "all"),
    "prompt_tuning_init": ("SAMPLE_VOCAB", "RANDOM", "TEXT"),
}
_INTEGERS = {
    **dict.fromkeys(
        ("num_virtual_tokens", "r", "num_spaces", "fusion_dim", "prompt_rank", "residual_dim"), (0, MAX_SIZE)
    ),
    **dict.fromkeys(("max_length", "space_dim"), (1, MAX_SIZE)),
    "seed": (0, MAX_SEED),
}
_FLAGS = ("fusion", "prompt_scale_shift", "base_dropout", "folded")
_NUMBERS = ("alpha", "fusion_score_scale", "fusion_weight", "embedding_scale")


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class EPTConfig(PromptLearningConfig):
    """Configuration of an EPT adapter; also of prompt tuning and DePT, which are EPT with parts switched off.

    `docs/method.md` has the formulas. The choices that the paper leaves open are this project's reconstruction; each is
    a field here. Raises a `ValueError` or `TypeError` that names the field, its value and what is allowed.
    """

    num_virtual_tokens: int = _option(40, "Length s of the short prompt; 0 for none.")
    max_length: int = _option(
        256,
        "Longest input text m, in real tokens: the rows of A. Longer texts are refused if A has no row for them.",
    )
    r: int = _option(30, "Rank of the update A·B of the input embeddings; 0 for none (prompt tuning).")
    alpha: float = _option(8.0, "The update is scaled by alpha/sqrt(r), as in DePT's code.")
    update: str = _option(
        "position",
        "What a token's update depends on: its 'position' (A·B, DePT and EPT) or the 'token' itself (a bottleneck of "
        "width r with biases on its embedding, ADePT).",
    )
    lowrank_init: str = _option(
        "uniform",
        "How A·B starts: at zero, with A random ('uniform', as in DePT) or made of cosine waves over the positions, "
        "the first one constant ('cosine'); or at a tenth of a long prompt's best rank-r approximation ('svd').",
    )
    update_scope: str = _option(
        "text",
        "Tokens that get the update: those of the input 'text', or 'all' (a position-dependent update stops at "
        "max_length), including generated ones, which an engine that embeds tokens itself cannot update.",
    )
    prompt_rank: int = _option(
        0,
        "Builds the prompt as a learned mixture of this many frozen random rows (ULPT); 0 for off.",
    )
    prompt_scale_shift: bool = _option(False, "Multiplies the prompt by a learned row and adds another (ULPT).")
    residual_dim: int = _option(
        0, "Adds a network of this width, with a LayerNorm, to the prompt (residual prompt tuning); 0 for none."
    )
    num_spaces: int = _option(4, "Number K of gated spaces; 0 for none.")
    space_dim: int = _option(2, "Width h of each space's bottleneck.")
    space_activation: str = _option("gelu", f"Activation inside a space, one of {', '.join(ACTIVATIONS)}.")
    space_gate: str = _option("learned", "Weights of the spaces: 'learned', by a gate, or 'uniform'.")
    fusion: bool = _option(True, "Adds an attention over the low-rank update and the prompt to the prompt.")
    fusion_dim: int = _option(0, "Width a of the learned query and key maps of the fusion; 0 for no maps.")
    fusion_score_scale: float | None = _option(
        None, "Factor of the fusion's scores; None for 1/sqrt(a), with a = d when there are no maps."
    )
    fusion_weight: float | None = _option(None, "The fusion's weight beta: None learns it from 0, a number fixes it.")
    embedding_scale: float | str = _option(
        "auto",
        "Unit rho of the parameters, in the table's units: 'auto' takes the root mean square of the base model's "
        "embeddings, so that one learning rate serves every model; 1.0 is the raw parametrisation.",
    )
    prompt_tuning_init: str = _option(
        "SAMPLE_VOCAB", "How the prompt starts: SAMPLE_VOCAB (rows of the table), RANDOM (normal, of unit rho) or TEXT."
    )
    prompt_tuning_init_text: str | None = _option(
        None,
        "With TEXT: the text whose token embeddings start the prompt; remaining rows come from the vocabulary.",
    )
    tokenizer_name_or_path: str | None = _option(None, "With TEXT: the tokenizer; None for the base model's own.")
    tokenizer_kwargs: dict[str, Any] | None = field(
        default=None,
        metadata={"help": "With TEXT: further arguments of `AutoTokenizer.from_pretrained`; no `trust_remote_code`."},
    )
    template: str | None = _option(None, "Text template of the task it was trained for; not used in any computation.")
    label_words: list[str] | None = field(
        default=None, metadata={"help": "Label words of that task, in order; a classifier's outputs get these names."}
    )
    base_dropout: bool = _option(False, "Keeps the frozen model's dropout on during training; off is more accurate.")
    seed: int = _option(0, "Seed of the initialisation, the same on every device.")
    folded: bool = _option(False, "Set by folding: inference form, one prompt (s x d) and the factors of the update.")

    def __post_init__(self) -> None:
        for name in ("task_type", "prompt_tuning_init"):  # enumeration members count as their values
            setattr(self, name, getattr(getattr(self, name), "value", getattr(self, name)))
        if isinstance(self.prompt_tuning_init, str):
            self.prompt_tuning_init = self.prompt_tuning_init.upper()
        for name in [f.name for f in fields(self)]:  # NumPy integers, as in grids of sizes
            value = getattr(self, name)
            if getattr(value, "shape", None) == () and hasattr(value, "item"):
                setattr(self, name, value.item())
        # None is allowed where it is the default.
        given = {f.name: v for f in fields(self) if (v := getattr(self, f.name)) is not None or f.default is not None}
        for name, allowed in _CHOICES.items():
            if name in given and given[name] not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {shown(given[name])}")
        super().__post_init__()
        self.peft_type = PEFT_TYPE
        self.num_transformer_submodules = 1
        for name, (minimum, maximum) in _INTEGERS.items():
            value = given[name]
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} must be an integer, got {shown(value)}")
            if not minimum <= value <= maximum:
                bound = f"at least {minimum}" if value < minimum else f"at most {maximum}"
                raise ValueError(f"{name} must be {bound}, got {shown(value)}")
        for name in _FLAGS:
            if not isinstance(given[name], bool):
                raise TypeError(f"{name} must be true or false, got {shown(given[name])}")
        for name in _NUMBERS:
            if name not in given or (name == "embedding_scale" and given[name] == "auto"):
                continue
            value = given[name]
            is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not is_number or not abs(value) <= sys.float_info.max:
                raise TypeError(f"{name} must be a finite number, got {shown(value)}")
            if name == "embedding_scale" and value <= 0:
                raise ValueError(f"embedding_scale must be 'auto' or a number above 0, got {shown(value)}")
        names = self.modules_to_save
        if names is not None and not (
            isinstance(names, (list, tuple, set)) and all(isinstance(name, str) and name for name in names)
        ):
            raise TypeError(f"modules_to_save must be a list of module names, got {shown(names)}")
        if self.template is not None and not isinstance(self.template, str):
            raise TypeError(f"template must be a string, got {shown(self.template)}")
        words = self.label_words
        if words is not None and not (isinstance(words, list) and all(isinstance(word, str) for word in words)):
            raise TypeError(f"label_words must be a list of strings, got {shown(words)}")
        if not isinstance(self.prompt_tuning_init_text, (str, type(None))):
            raise ValueError(f"prompt_tuning_init_text={self.prompt_tuning_init_text!r} is not text: give one string")
        if self.prompt_tuning_init == "TEXT" and not self.prompt_tuning_init_text:
            raise ValueError("prompt_tuning_init='TEXT' needs prompt_tuning_init_text, a text to start the prompt from")
        if self.lowrank_init == "svd" and self.alpha <= 0:
            raise ValueError(f"lowrank_init='svd' needs an alpha above 0, got {shown(self.alpha)}")
        if self.lowrank_init != "uniform" and self.updates_by_token:
            raise ValueError(
                f"lowrank_init='{self.lowrank_init}' is for the position-dependent update: leave it out, "
                "or set update='position'"
            )
        if self.tokenizer_kwargs is not None and (
            not isinstance(self.tokenizer_kwargs, dict) or not all(isinstance(k, str) for k in self.tokenizer_kwargs)
        ):
            raise TypeError(f"tokenizer_kwargs must be a dictionary of arguments, got {shown(self.tokenizer_kwargs)}")
        if self.tokenizer_kwargs and self.prompt_tuning_init != "TEXT":
            raise ValueError("tokenizer_kwargs only valid when using prompt_tuning_init='TEXT'.")

    @property
    def updates_by_token(self) -> bool:
        """True if there is an update and it depends on the token itself."""
        return bool(self.r) and self.update == "token"

    @property
    def is_prompt_learning(self) -> bool:
        """True once the task is known: PEFT then treats the adapter as a prompt and looks up its task."""
        return self.task_type is not None

    @classmethod
    def prompt_tuning(cls, num_virtual_tokens: int = 100, **fields: Any) -> EPTConfig:
        """Configures prompt tuning (Lester et al., 2021): the prompt alone."""
        return cls(num_virtual_tokens=num_virtual_tokens, r=0, fusion=False, num_spaces=0, **fields)

    @classmethod
    def dept(cls, num_virtual_tokens: int = 60, r: int = 30, **fields: Any) -> EPTConfig:
        """Configures DePT (Shi and Lipani, 2024): a shorter prompt and a low-rank update of the input embeddings."""
        return cls(num_virtual_tokens=num_virtual_tokens, r=r, fusion=False, num_spaces=0, **fields)

    @classmethod
    def ulpt(cls, num_virtual_tokens: int = 100, prompt_rank: int = 64, **fields: Any) -> EPTConfig:
        """Configures ULPT (Wu et al., 2025): a prompt in a frozen random basis, with a learned scale and shift."""
        ulpt = {"num_virtual_tokens": num_virtual_tokens, "prompt_rank": prompt_rank, "prompt_scale_shift": True}
        return cls.prompt_tuning(**{**ulpt, **fields})

    @classmethod
    def adept(cls, num_virtual_tokens: int = 60, r: int = 19, **fields: Any) -> EPTConfig:
        """Configures ADePT (Tang et al., 2025): DePT with an update that depends on the token, not on its position."""
        return cls.dept(num_virtual_tokens, r, **{"update": "token", **fields})

    @classmethod
    def residual_prompt_tuning(
        cls, num_virtual_tokens: int = 100, residual_dim: int = RESIDUAL_DIM, **fields: Any
    ) -> EPTConfig:
        """Configures residual prompt tuning (Razdaibiedina et al., 2023): the prompt plus a network's output on it."""
        return cls.prompt_tuning(num_virtual_tokens, **{"residual_dim": residual_dim, **fields})

    @classmethod
    def for_budget(
        cls,
        model_or_d: Any,
        max_length: int,
        budget: int,
        method: str = "ept",
        kind: str = "trained",
        **fields: Any,
    ) -> EPTConfig:
        """Finds the configuration of `method` that makes the best use of a parameter budget, never exceeding it.

        Sizes not given in `fields` are searched: as much of the budget as possible is spent, split between prompt,
        low-rank part and spaces as nearly as possible in the proportions of the defaults (40 : 40 : 20; without
        spaces, or if they do not count, DePT's 60 : 40). If that would leave the prompt fewer than 16 tokens, it gets
        up to 70 % of the budget. A budget below 24 tokens may get a single space, whose gate is 1.

        Args:
            model_or_d: a model (its input embeddings are measured) or the embedding width d.
            max_length: longest input text, in tokens.
            budget: number of parameters; heads in `modules_to_save` are not counted.
            method: `"ept"`, `"dept"`, `"pt"`, `"ulpt"`, `"adept"` or `"residual"`.
            kind: what the budget counts: `"trained"` all parameters during training, `"stored"` what a saved adapter
                holds (see `stored_count`), which excludes the spaces.
            fields: other fields of the configuration, kept as given.

        Raises:
            ValueError: no configuration fits; the message names the smallest budget that would.
        """
        is_model = hasattr(model_or_d, "get_input_embeddings")
        d = embedding_width(model_or_d.get_input_embeddings()) if is_model else operator.index(model_or_d)
        return best_config(cls, d, max_length, budget, method, kind, fields)

    def parameter_count(self, d: int) -> int:
        """Counts the trainable parameters for embedding width `d`, without heads in `modules_to_save`."""
        return sum(math.prod(shape) for shape in self.parameter_shapes(d).values())

    def stored_count(self, d: int) -> int:
        """Counts the numbers that a saved adapter has to hold for embedding width `d`, without heads.

        A folded adapter holds s·d + r·(m + d), or s·d + r·(2d + 1) + d with the token-dependent update, whatever the
        spaces and the fusion are. An adapter that is smaller unfolded, such as ULPT's, is stored unfolded.
        """
        folded = copy.copy(self)
        folded.folded = True
        return min(self.parameter_count(d), folded.parameter_count(d))

    def parameter_shapes(self, d: int) -> dict[str, tuple[int, ...]]:
        """Returns every parameter's shape by name, for embedding width `d`; parts that are switched off are absent."""
        s, m, r = self.num_virtual_tokens, self.max_length, self.r
        K, h, a = self.num_spaces, self.space_dim, self.fusion_dim
        shapes: dict[str, tuple[int, ...]] = {}
        if s and self.folded:
            shapes["folded_prompt"] = (s, d)  # another name: it is in the embeddings' units, `prompt` is not
        elif s and self.prompt_rank:
            shapes["Z"] = (s, self.prompt_rank)
        elif s:
            shapes["prompt"] = (s, d)
        if r and self.update == "position":
            shapes.update(A=(m, r), B=(r, d))
        elif r:
            shapes.update(W_in=(d, r), b_in=(r,), W_out=(r, d), b_out=(d,))
        if self.folded or not s:
            return shapes
        if self.prompt_scale_shift:
            shapes.update(scale=(d,), shift=(d,))
        if n := self.residual_dim:
            shapes.update(W_down=(d, n), b_down=(n,), W_up=(n, d), gain=(d,))
        if self.fusion:
            if self.fusion_weight is None:
                shapes["beta"] = (1,)
            if a:
                shapes.update(W_q=(d, a), W_k=(d, a))
        if K:
            shapes.update(D=(d, K * h), U=(K * h, d))
            if K > 1 and self.space_gate == "learned":  # the gate of a single space is 1
                shapes["G"] = (d, K)
        return shapes

    def lowrank_scale(self) -> float:
        """Returns `c = α/√r`; 0 without a low-rank part."""
        return self.alpha / math.sqrt(self.r) if self.r else 0.0

    def score_scale(self, d: int) -> float:
        """Returns `σ`, the factor of the fusion's scores for embedding width `d`."""
        return self.fusion_score_scale if self.fusion_score_scale is not None else 1 / math.sqrt(self.fusion_dim or d)


_START = (
    "lowrank_init",
    "prompt_tuning_init",
    "prompt_tuning_init_text",
    "tokenizer_name_or_path",
    "tokenizer_kwargs",
    "seed",
)
# These do not change how a trained adapter answers; the scale that is used is saved with its parameters.
_OTHER = (*_START, "template", "label_words", "base_dropout", "embedding_scale")
# These do: two adapters that differ in one of them cannot replace each other.
OUTPUT_FIELDS = [f.name for f in fields(EPTConfig) if f.name in EPTConfig.__annotations__ and f.name not in _OTHER]

# For `PeftConfig.from_pretrained` of saved adapters. PEFT's enumeration of types cannot be extended, its mapping can.
if (known := PEFT_TYPE_TO_CONFIG_MAPPING.get(PEFT_TYPE)) is not None and known.__module__ != __name__:
    warnings.warn(f"replacing another registration of the adapter type {PEFT_TYPE}: {known}", stacklevel=2)
PEFT_TYPE_TO_CONFIG_MAPPING[PEFT_TYPE] = EPTConfig
