"""A run's configuration: sections of typed keys, read from YAML and `dotted.key=value`.

Imports nothing heavy, so that printing or checking a configuration is instant.
"""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from ..utils.messages import reason, shown, shown_name
from .method_table import check_settings

if TYPE_CHECKING:
    from typing_extensions import Self

MAX_FILE_BYTES = 1 << 20
MAX_DEPTH = 20  # levels of YAML; a run's configuration has three
MAX_INTEGER = 2**63 - 1
MAX_SEED = 2**32 - 1  # NumPy takes no larger one


def _number(value: Any) -> Any:
    """Turns a text that is a number into one: YAML 1.1 reads `1e-3` as a text."""
    try:
        return float(value) if isinstance(value, (int, str)) and not isinstance(value, bool) else value
    except (ValueError, OverflowError):
        return value


Count = Annotated[int, Field(gt=0, le=MAX_INTEGER)]
Size = Annotated[int, Field(ge=0, le=MAX_INTEGER)]
Number = Annotated[float, BeforeValidator(_number)]
NotNegative = Annotated[Number, Field(ge=0)]


class Section(BaseModel):
    """A part of a configuration: no value is converted to another type, and no unknown key passes."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _fill_empty(cls, values: Any) -> Any:
        return {} if values is None else values  # `model:` with nothing under it


class ModelConfig(Section):
    """The frozen base model. `trust_remote_code` is never set, whatever a file says."""

    name_or_path: str | None = None
    """Folder or hub name of the base model."""
    gguf_file: str | None = None
    """Name of a GGUF file inside `name_or_path`; it is unpacked into a plain model."""
    revision: str | None = None
    tokenizer_name_or_path: str | None = None
    """Where the tokenizer is, when it is not beside the model."""
    task_type: Literal["SEQ_2_SEQ_LM", "CAUSAL_LM", "SEQ_CLS"] | None = None
    """None: encoder-decoders are SEQ_2_SEQ_LM, decoders with a language-model head CAUSAL_LM, all others SEQ_CLS."""
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = "float32"
    load_in_4bit: bool = False
    quant_type: Literal["nf4", "fp4"] = "nf4"
    double_quant: bool = True
    fast_4bit: bool = True
    """Run 4-bit layers through this project's operators where their kernels run. False: through bitsandbytes."""
    dequantized_cache_bytes: Size = 0
    """Memory to spend on keeping dequantised weights of 4-bit layers, where they run through the operators."""
    fast_frozen: bool = True
    """Run norms, rotary embeddings and activations of known families through this project's operators."""
    attn_implementation: str | None = None


class DataConfig(Section):
    """Either a named `task` (see `ept tasks`) or local files with a `template` and `label_words`."""

    task: str | None = None
    data_dir: str | None = None
    """Folder with {train,validation,test}.jsonl|csv|parquet of the task's own columns, instead of the hub."""
    train_file: str | None = None
    validation_file: str | None = None
    test_file: str | None = None
    template: str | None = None
    """Input text of a local task, for example "{headline}\\nSarcastic?"."""
    label_column: str = "label"
    label_words: list[str] | dict[Any, str] | None = None
    """A list of words, or a mapping {raw label: word}."""
    metric: list[str] | None = None
    """Metrics of a local task; the first decides which checkpoint is best. None: accuracy."""
    labels: Literal["digits", "words"] = "digits"
    max_length: Count | None = None
    """Most tokens of the input text. None: the task's own limit."""
    on_too_long: Literal["truncate", "error"] = "truncate"
    max_train: Count | None = None
    max_validation: Count | None = None
    max_test: Count | None = None
    k_shot: Count | None = None
    """Few-shot: so many train rows in all, as many of each label, drawn with the run's seed."""

    @model_validator(mode="after")
    def _check(self) -> DataConfig:
        if self.task is not None and self.template is not None:
            raise ValueError("data.task and data.template exclude each other: a named task brings its own template")
        return self


class MethodConfig(Section):
    """The adapter. None means the method's own default (see `EPTConfig`)."""

    name: str = "ept"
    """One of `ept.runs.method_table.METHODS`: ept, dept, pt, their ablations, or one of PEFT's own methods."""
    budget: Count | None = None
    """Number of parameters to stay within; the sizes are searched for."""
    budget_kind: Literal["trained", "stored"] = "trained"
    """What the budget is of: the parameters while they are learned, or what a saved, folded adapter holds."""
    num_virtual_tokens: Size | None = None
    r: Size | None = None
    alpha: Number | None = None
    update: Literal["position", "token"] | None = None
    lowrank_init: Literal["uniform", "cosine", "svd"] | None = None
    prompt_rank: Size | None = None
    prompt_scale_shift: bool | None = None
    residual_dim: Size | None = None
    num_spaces: Size | None = None
    space_dim: Size | None = None
    space_activation: str | None = None
    fusion: bool | None = None
    fusion_dim: Size | None = None
    fusion_score_scale: Number | None = None
    fusion_weight: Number | None = None
    space_gate: Literal["learned", "uniform"] | None = None
    embedding_scale: Annotated[Number | str | None, Field(union_mode="left_to_right")] = None
    prompt_tuning_init: Literal["SAMPLE_VOCAB", "RANDOM", "TEXT"] | None = None
    prompt_tuning_init_text: str | None = None
    base_dropout: bool | None = None

    def fields_given(self) -> dict[str, Any]:
        """Returns the `EPTConfig` fields that the run sets."""
        return self.model_dump(exclude={"name", "budget", "budget_kind"}, exclude_none=True)

    _check = model_validator(mode="after")(check_settings)


class TrainingConfig(Section):
    max_steps: Count | None = None
    num_train_epochs: Annotated[Number, Field(gt=0)] = 3.0
    """Used when `max_steps` is None."""
    batch_size: Count = 16
    """Rows of a step; of several processes, those of each."""
    eval_batch_size: Count = 32
    gradient_accumulation_steps: Count = 1
    learning_rate: NotNegative = 0.05
    """Of the prompt, in units of the embedding's root mean square."""
    low_rank_learning_rate: NotNegative = 1e-3
    """Of every other parameter (A, B, fusion, spaces, heads)."""
    weight_decay: NotNegative = 0.0
    warmup_steps: Size = 0
    lr_scheduler: str = "linear"
    max_grad_norm: NotNegative = 1.0
    eval_steps: Count = 100
    """Evaluate and save every so many steps, and at the end."""
    logging_steps: Count = 10
    score_before: bool = True
    """Score the untrained adapter on the test split as well."""
    scoring: Literal["generate", "rank"] | None = None
    """How a language model's labels are scored. None: encoder-decoders generate, decoders rank the labels."""
    early_stopping_patience: Count | None = None
    """Stop after so many evaluations without a better score. None: never."""
    save_total_limit: Count = 2
    bf16: bool = False
    fp16: bool = False
    gradient_checkpointing: bool = False
    optim: Literal["adamw_torch_fused", "adamw_torch"] = "adamw_torch_fused"
    """AdamW in one kernel for all parameters of a group, or PyTorch's default implementation."""
    label_only_logits: bool = True
    """A decoder's logits at the labels only. False: at every position."""
    group_by_length: bool = False
    """Batches of texts of like length: less padding, but another order of the rows."""
    pad_to_multiple_of: Count | None = None
    """Round each batch's length up to a multiple, and pad labels to the longest answer, so that a compiled step meets
    few shapes. None: pad to the longest text of the batch."""
    compile_layers: bool = False
    """Train through torch.compile of the frozen model's repeated layers, needs `pad_to_multiple_of`; evaluation stays
    uncompiled."""
    cuda_graphs: bool = False
    """Replay each compiled layer as one CUDA graph, needs `compile_layers` and a CUDA device."""
    tensorboard: bool = False

    @model_validator(mode="after")
    def _check(self) -> TrainingConfig:
        if self.compile_layers and self.pad_to_multiple_of is None:
            missing = "set training.pad_to_multiple_of too, such as 64"
            raise ValueError(f"training.compile_layers compiles every length for itself: {missing}")
        if self.cuda_graphs and not self.compile_layers:
            raise ValueError("training.cuda_graphs replays compiled layers: set training.compile_layers=true too")
        if self.cuda_graphs and self.gradient_checkpointing:
            raise ValueError(
                "training.cuda_graphs and training.gradient_checkpointing exclude each other: a layer that is run "
                "again in the backward pass would overwrite what was recorded; set one"
            )
        if self.bf16 and self.fp16:
            raise ValueError("training.bf16 and training.fp16 exclude each other: set one")
        return self


class RunConfig(Section):
    model: ModelConfig = Field(default_factory=ModelConfig)
    data: DataConfig = Field(default_factory=DataConfig)
    method: MethodConfig = Field(default_factory=MethodConfig)
    training: TrainingConfig = Field(default_factory=TrainingConfig)
    output_dir: str | None = None
    seed: Annotated[Size, Field(le=MAX_SEED)] = 0

    @classmethod
    def load(cls, file: Path | None, overrides: Sequence[str] = ()) -> Self:
        """Reads a YAML file (None: all defaults) and applies `dotted.key=value` overrides, in order.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: not YAML, an unknown key (names the nearest known one), a value of the wrong type or range.
        """
        values: Any = {}
        if file is not None:
            if not file.is_file():
                raise FileNotFoundError(f"no configuration file {file}")
            if (size := file.stat().st_size) > MAX_FILE_BYTES:
                raise ValueError(f"{file} has {size:,} bytes, a configuration at most {MAX_FILE_BYTES:,}")
            if (values := _parse_yaml(file.read_bytes(), str(file))) is None:
                values = {}
            if not isinstance(values, dict):
                raise ValueError(f"{file} holds {_describe(values)}, expected a mapping such as `model: {{...}}`")
        for override in overrides:
            key, separator, text = override.partition("=")
            if not separator or not key.strip():
                raise ValueError(f"cannot read the override {override!r}: write it as dotted.key=value")
            value = _parse_yaml(text, f"the value of {shown_name(key)!r}")
            *sections, name = key.strip().split(".")
            keys = values
            for section in sections:
                if keys.get(section) is None:
                    keys[section] = {}
                if not isinstance(keys[section], dict):
                    raise ValueError(f"cannot set {key}: {section} is {_describe(keys[section])}, not a section")
                keys = keys[section]
            keys[name] = value
        return cls.from_dict(values)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Checks nested mappings, as YAML gives them. Raises ValueError as `load`."""
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
        raise ValueError(_message(cls, values, first))

    def to_dict(self) -> dict[str, Any]:
        return self.model_dump()

    def to_yaml(self) -> str:
        """Writes YAML that `load_run_config` reads back to an equal configuration."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)


load_run_config = RunConfig.load


class _PlainLoader(yaml.SafeLoader):
    """PyYAML's safe loader without aliases (whose expansion may be exponential), repeated keys and deep nesting."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event: Any = self.peek_event()
        problem = f"nested more than {MAX_DEPTH} levels deep" if self.depth >= MAX_DEPTH else None
        if self.check_event(yaml.AliasEvent):
            problem = f"aliases (*{shown_name(event.anchor)}) are not read: write the value out"
        if problem:
            raise yaml.composer.ComposerError(None, None, problem, event.start_mark)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_scalar(self, node: Any) -> Any:
        value = super().construct_scalar(node)
        value.encode()  # raises for half a surrogate pair, which no file name has and no file can hold
        return value

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        values = super().construct_mapping(node, deep)
        if len(values) < len(node.value):
            raise yaml.constructor.ConstructorError(None, None, "the same key is given twice", node.start_mark)
        return values


def _parse_yaml(text: str | bytes, name: str) -> Any:
    """Returns the value that `text` stands for: plain types only, never objects. `name` says in the error where."""
    try:
        return yaml.load(text, _PlainLoader)
    # A malformed number, date or flag raises whatever PyYAML's conversion of it ran into.
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError, OverflowError, RecursionError) as error:
        raise ValueError(f"cannot read {name} as YAML: {reason(error)}") from error


def _message(cls: type[RunConfig], values: dict[str, Any], error: Any) -> str:
    """Says in a line which key one of pydantic's errors is about, what it wants and what it got."""
    kind, context = error["type"], error.get("ctx", {})
    if kind == "value_error":  # raised by a check above, which names its keys
        return str(context["error"])
    below = {name: getattr(field.annotation, "model_fields", {}) for name, field in cls.model_fields.items()}
    key, *inside = error["loc"]
    keys, prefix = cls.model_fields, ""
    if inside and below.get(key):
        keys, prefix, values, key = below[key], f"{key}.", values[key], inside[0]
    if kind in ("extra_forbidden", "invalid_key"):
        text = shown_name(str(key))
        elsewhere = {name: f"{section}.{name}" for section, names in below.items() for name in names}
        near = [prefix + name for name in difflib.get_close_matches(text, keys, n=1, cutoff=0.5)] or [
            elsewhere[name] for name in difflib.get_close_matches(text, elsewhere, n=1, cutoff=0.8)
        ]
        known = f"did you mean {near[0]}?" if near else f"the keys here are {', '.join(keys)}"
        return f"unknown key {prefix}{text}: {known}"
    if kind in _LIMITS:
        return f"{prefix}{key} {_LIMITS[kind].format(**context)}, got {shown(error['input'])}"
    value = values[key]
    message = f"{prefix}{key}: expected {_expected(keys[key].annotation)}, got {_describe(value)}"
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else [value]
    if any(isinstance(item, bool) for item in items):
        message += " (YAML reads yes, no, on, off as true and false: put such words in quotes)"
    return message


_LIMITS = {
    "greater_than": "must be greater than {gt}",
    "greater_than_equal": "must not be negative",
    "less_than_equal": "must be at most {le}",
}
_WORDS = {str: "a text", int: "a whole number", float: "a number", bool: "true or false", Any: "a value"}


def _expected(hint: Any) -> str:
    """Describes a type to the writer of a file, such as `a list of texts or null`."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return _expected(arguments[0])
    if origin in (typing.Union, types.UnionType):
        return " or ".join(map(_expected, arguments))
    if origin is Literal:
        return "one of " + ", ".join(map(str, arguments))
    if origin in (list, dict):
        one, of, parts = _expected(arguments[-1]).partition(" of ")
        return f"{'a list of' if origin is list else 'a mapping to'} {one.removeprefix('a ')}s{of}{parts}"
    return "null" if hint is types.NoneType else _WORDS.get(hint, "a section with keys")


def _describe(value: Any) -> str:
    return f"{shown(value)} ({type(value).__name__})"
