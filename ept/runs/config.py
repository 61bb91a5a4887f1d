"""What a run is made of: nested dataclasses, read from YAML and `dotted.key=value`, with every key and type checked.

Imports nothing heavy, so that printing or checking a configuration is instant.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

import yaml

from ..utils.messages import reason, shown, shown_name
from .method_table import check_settings

LARGEST_FILE = 1 << 20  # bytes
DEEPEST = 20  # levels; a run's configuration has three
LARGEST_INTEGER = 2**63 - 1
LARGEST_SEED = 2**32 - 1  # what NumPy takes

TaskType = Literal["SEQ_2_SEQ_LM", "CAUSAL_LM", "SEQ_CLS"]


@dataclass
class ModelConfig:
    """The frozen base model. `trust_remote_code` is never set, whatever a file says."""

    name_or_path: str | None = None
    """Folder or hub name of the base model."""
    gguf_file: str | None = None
    """Name of a GGUF file inside `name_or_path`; it is unpacked into a plain model."""
    revision: str | None = None
    tokenizer_name_or_path: str | None = None
    """Where the tokenizer is, when it is not beside the model."""
    task_type: TaskType | None = None
    """None: encoder-decoders are SEQ_2_SEQ_LM, decoders with a language-model head CAUSAL_LM, all others SEQ_CLS."""
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = "float32"
    load_in_4bit: bool = False
    quant_type: Literal["nf4", "fp4"] = "nf4"
    double_quant: bool = True
    fast_4bit: bool = True
    """Run 4-bit layers through this project's operators where their kernels run. False: through bitsandbytes."""
    dequantized_cache_bytes: int = 0
    """Memory to spend on keeping dequantised weights of 4-bit layers, where they run through the operators."""
    attn_implementation: str | None = None


@dataclass
class DataConfig:
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
    max_length: int | None = None
    """Most tokens of the input text. None: the task's own limit."""
    on_too_long: Literal["truncate", "error"] = "truncate"
    max_train: int | None = None
    max_validation: int | None = None
    max_test: int | None = None
    k_shot: int | None = None
    """Few-shot: so many train rows in all, as many of each label, drawn with the run's seed."""


@dataclass
class MethodConfig:
    """The adapter. None means the method's own default (see `EPTConfig`)."""

    name: str = "ept"
    """One of `ept.runs.method_table.METHODS`: ept, dept, pt, their ablations, or one of PEFT's own methods."""
    budget: int | None = None
    """Number of trainable parameters to stay within; the sizes are searched for."""
    num_virtual_tokens: int | None = None
    r: int | None = None
    alpha: float | None = None
    num_spaces: int | None = None
    space_dim: int | None = None
    space_activation: str | None = None
    fusion: bool | None = None
    fusion_dim: int | None = None
    fusion_score_scale: float | None = None
    fusion_weight: float | None = None
    space_gate: Literal["learned", "uniform"] | None = None
    embedding_scale: float | str | None = None
    prompt_tuning_init: Literal["SAMPLE_VOCAB", "RANDOM", "TEXT"] | None = None
    prompt_tuning_init_text: str | None = None
    base_dropout: bool | None = None

    def fields_given(self) -> dict[str, Any]:
        """The `EPTConfig` fields that the run sets."""
        values = dataclasses.asdict(self)
        return {k: v for k, v in values.items() if v is not None and k not in ("name", "budget")}


@dataclass
class TrainingConfig:
    max_steps: int | None = None
    num_train_epochs: float = 3.0
    """Used when `max_steps` is None."""
    batch_size: int = 16
    """Rows of a step; of several processes, those of each."""
    eval_batch_size: int = 32
    gradient_accumulation_steps: int = 1
    learning_rate: float = 0.05
    """Of the prompt, in units of the embedding's root mean square."""
    low_rank_learning_rate: float = 1e-3
    """Of every other parameter (A, B, fusion, spaces, heads)."""
    weight_decay: float = 0.0
    warmup_steps: int = 0
    lr_scheduler: str = "linear"
    max_grad_norm: float = 1.0
    eval_steps: int = 100
    """Evaluate and save every so many steps, and at the end."""
    logging_steps: int = 10
    score_before: bool = True
    """Score the untrained adapter on the test split as well."""
    scoring: Literal["generate", "rank"] | None = None
    """How a language model's labels are scored. None: encoder-decoders generate, decoders rank the labels."""
    early_stopping_patience: int | None = None
    """Stop after so many evaluations without a better score. None: never."""
    save_total_limit: int = 2
    bf16: bool = False
    fp16: bool = False
    gradient_checkpointing: bool = False
    optim: Literal["adamw_torch_fused", "adamw_torch"] = "adamw_torch_fused"
    """AdamW in one kernel for all parameters of a group, or PyTorch's default implementation."""
    label_only_logits: bool = True
    """A decoder's logits at the labels only. False: at every position."""
    group_by_length: bool = False
    """Batches of texts of like length: less padding, but another order of the rows."""
    pad_to_multiple_of: int | None = None
    """Round each batch's length up to a multiple, and pad labels to the longest answer, so that a compiled step meets
    few shapes. None: pad to the longest text of the batch."""
    compile_layers: bool = False
    """Train through torch.compile of the frozen model's repeated layers, needs `pad_to_multiple_of`; evaluation stays
    uncompiled."""
    cuda_graphs: bool = False
    """Replay each compiled layer as one CUDA graph, needs `compile_layers` and a CUDA device."""
    tensorboard: bool = False


@dataclass
class RunConfig:
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    output_dir: str | None = None
    seed: int = 0

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def to_yaml(self) -> str:
        """YAML that `load_run_config` reads back to an equal configuration."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)


AnyRun = TypeVar("AnyRun", bound=RunConfig)


def load_run_config(file: Path | None, overrides: typing.Sequence[str] = ()) -> RunConfig:
    """Read a run from a YAML file (None: all defaults) and apply `dotted.key=value` overrides, in order.

    Raises: as `load_config`.
    """
    return load_config(RunConfig, file, overrides)


def load_config(cls: type[AnyRun], file: Path | None, overrides: typing.Sequence[str] = ()) -> AnyRun:
    """`load_run_config` for a configuration with more sections.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: not YAML, an unknown key (names the nearest known one), a value of the wrong type or range.
    """
    values = _read_yaml(file) if file is not None else {}
    for override in overrides:
        _apply_override(values, override)
    return config_from_dict(cls, values)


def config_from_dict(cls: type[AnyRun], values: dict[str, Any]) -> AnyRun:
    """A configuration from nested mappings, as YAML gives them. Raises ValueError as `load_config`."""
    config = _build(cls, values, path="")
    _check(config)
    return config


def _read_yaml(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise FileNotFoundError(f"no configuration file {file}")
    if (size := file.stat().st_size) > LARGEST_FILE:
        raise ValueError(f"{file} has {size:,} bytes, a configuration at most {LARGEST_FILE:,}")
    values = parse_yaml(file.read_bytes(), str(file))
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ValueError(f"{file} holds {_describe(values)}, expected a mapping such as `model: {{...}}`")
    return values


class _PlainLoader(yaml.SafeLoader):
    """PyYAML's safe loader without aliases (whose expansion may be exponential), repeated keys and deep nesting."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise yaml.composer.ComposerError(
                None, None, f"aliases (*{shown_name(event.anchor)}) are not read: write the value out", event.start_mark
            )
        if self.depth >= DEEPEST:
            raise yaml.composer.ComposerError(
                None, None, f"nested more than {DEEPEST} levels deep", self.peek_event().start_mark
            )
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        values = super().construct_mapping(node, deep)
        if len(values) < len(node.value):
            raise yaml.constructor.ConstructorError(None, None, "a key stands there twice", node.start_mark)
        return values


def parse_yaml(text: str | bytes, name: str) -> Any:
    """The value that `text` stands for: plain types only, never objects.

    Raises:
        ValueError: it is not YAML; the message says so of `name`.
    """
    try:
        return yaml.load(text, _PlainLoader)
    # A malformed number, date or flag raises whatever PyYAML's conversion of it ran into.
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError, OverflowError, RecursionError) as error:
        raise ValueError(f"cannot read {name} as YAML: {reason(error)}") from error


def _apply_override(values: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key.strip():
        raise ValueError(f"cannot read the override {override!r}: write it as dotted.key=value")
    value = parse_yaml(text, f"the value of {shown_name(key)!r}")
    *sections, name = key.strip().split(".")
    for section in sections:
        below = values.setdefault(section, {})
        if below is None:
            below = values[section] = {}
        if not isinstance(below, dict):
            raise ValueError(f"cannot set {key}: {section} is {_describe(below)}, not a section")
        values = below
    values[name] = value


def _build(cls: type, values: Any, path: str) -> Any:
    """An instance of the dataclass `cls` from a mapping; nested dataclasses are built the same way."""
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected a section with keys, got {_describe(values)}")
    hints = typing.get_type_hints(cls)
    names = [f.name for f in dataclasses.fields(cls)]
    arguments = {}
    for key, value in values.items():
        text = shown_name(key) if isinstance(key, str) else shown(key)
        dotted = f"{path}.{text}" if path else text
        if key not in names:
            raise ValueError(_unknown_key(dotted, text, path, names))
        hint = hints[key]
        is_section = isinstance(hint, type) and dataclasses.is_dataclass(hint)
        arguments[key] = _build(hint, value, dotted) if is_section else _convert(hint, value, dotted)
    return cls(**arguments)


def _unknown_key(dotted: str, key: str, path: str, names: list[str]) -> str:
    prefix = f"{path}." if path else ""
    near = difflib.get_close_matches(key, names, n=1, cutoff=0.5)
    if near:
        return f"unknown key {dotted}: did you mean {prefix}{near[0]}?"
    elsewhere = _sections_with(key)
    if elsewhere:
        return f"unknown key {dotted}: did you mean {elsewhere[0]}?"
    return f"unknown key {dotted}: the keys here are {', '.join(names)}"


def _sections_with(key: str) -> list[str]:
    hints = typing.get_type_hints(RunConfig)
    sections = {name: cls for name, cls in hints.items() if dataclasses.is_dataclass(cls)}
    known = {f.name: f"{name}.{f.name}" for name, cls in sections.items() for f in dataclasses.fields(cls)}
    return [known[name] for name in difflib.get_close_matches(key, list(known), n=1, cutoff=0.8)]


def _convert(hint: Any, value: Any, dotted: str) -> Any:
    """`value` if it fits the type hint, else ValueError. Integers pass as floats, and "1e-3" (a string in YAML) too."""
    options = typing.get_args(hint) if typing.get_origin(hint) in (Union, types.UnionType) else (hint,)
    for option in options:
        fits, converted = _fit(option, value)
        if fits:
            return converted
    message = f"{dotted}: expected {' or '.join(_name(option) for option in options)}, got {_describe(value)}"
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else [value]
    if any(isinstance(item, bool) for item in items):
        message += " (YAML reads yes, no, on, off as true and false: put such words in quotes)"
    raise ValueError(message)


def _fit(option: Any, value: Any) -> tuple[bool, Any]:
    if option is type(None):
        return value is None, None
    if typing.get_origin(option) is Literal:
        return value in typing.get_args(option) and not isinstance(value, bool), value
    if typing.get_origin(option) is list:
        (item_type,) = typing.get_args(option)
        items = [_fit(item_type, item) for item in value] if isinstance(value, list) else []
        return isinstance(value, list) and all(fits for fits, _ in items), [item for _, item in items]
    if typing.get_origin(option) is dict:
        _, item_type = typing.get_args(option)
        named = {k: _fit(item_type, v) for k, v in value.items()} if isinstance(value, dict) else {}
        return isinstance(value, dict) and all(f for f, _ in named.values()), {k: v for k, (_, v) in named.items()}
    if option is Any:
        return True, value
    if option is float:
        if isinstance(value, bool) or not isinstance(value, (int, float, str)):
            return False, value
        try:
            number = float(value)
        except (ValueError, OverflowError):
            return False, value
        return math.isfinite(number), number
    if option is int:
        return isinstance(value, int) and not isinstance(value, bool) and abs(value) <= LARGEST_INTEGER, value
    return isinstance(value, option), value


def _name(option: Any) -> str:
    if typing.get_origin(option) is Literal:
        return "one of " + ", ".join(map(str, typing.get_args(option)))
    if typing.get_origin(option) is list:
        return f"a list of {_plural(_name(typing.get_args(option)[0]))}"
    if typing.get_origin(option) is dict:
        return f"a mapping to {_plural(_name(typing.get_args(option)[1]))}"
    names = {str: "a text", int: "a whole number", float: "a number", bool: "true or false", type(None): "null"}
    return names.get(option, "a value")


def _plural(name: str) -> str:
    article, _, noun = name.partition(" ")
    return noun.replace("list", "lists") + ("" if " of " in noun else "s") if article == "a" else name


def _describe(value: Any) -> str:
    return f"{shown(value)} ({type(value).__name__})"


def _check(config: RunConfig) -> None:
    """Ranges, and keys that exclude each other."""
    positive: dict[str, float | None] = {
        "data.max_length": config.data.max_length,
        "data.max_train": config.data.max_train,
        "data.max_validation": config.data.max_validation,
        "data.max_test": config.data.max_test,
        "data.k_shot": config.data.k_shot,
        "method.budget": config.method.budget,
        "training.max_steps": config.training.max_steps,
        "training.num_train_epochs": config.training.num_train_epochs,
        "training.batch_size": config.training.batch_size,
        "training.eval_batch_size": config.training.eval_batch_size,
        "training.gradient_accumulation_steps": config.training.gradient_accumulation_steps,
        "training.eval_steps": config.training.eval_steps,
        "training.logging_steps": config.training.logging_steps,
        "training.pad_to_multiple_of": config.training.pad_to_multiple_of,
        "training.early_stopping_patience": config.training.early_stopping_patience,
        "training.save_total_limit": config.training.save_total_limit,
    }
    not_negative = {
        "model.dequantized_cache_bytes": config.model.dequantized_cache_bytes,
        "training.learning_rate": config.training.learning_rate,
        "training.low_rank_learning_rate": config.training.low_rank_learning_rate,
        "training.weight_decay": config.training.weight_decay,
        "training.warmup_steps": config.training.warmup_steps,
        "training.max_grad_norm": config.training.max_grad_norm,
        "seed": config.seed,
    }
    for key, value in positive.items():
        if value is not None and not value > 0:
            raise ValueError(f"{key} must be greater than 0, got {value}")
    for key, value in not_negative.items():
        if not value >= 0:
            raise ValueError(f"{key} must not be negative, got {value}")
    if config.seed > LARGEST_SEED:
        raise ValueError(f"seed must be at most {LARGEST_SEED}, got {config.seed}")
    check_settings(config.method)
    if config.data.task is not None and config.data.template is not None:
        raise ValueError("data.task and data.template exclude each other: a named task brings its own template")
    if config.training.compile_layers and config.training.pad_to_multiple_of is None:
        raise ValueError(
            "training.compile_layers compiles every length for itself: set training.pad_to_multiple_of too, such as 64"
        )
    if config.training.cuda_graphs and not config.training.compile_layers:
        raise ValueError("training.cuda_graphs replays compiled layers: set training.compile_layers=true too")
    if config.training.cuda_graphs and config.training.gradient_checkpointing:
        raise ValueError(
            "training.cuda_graphs and training.gradient_checkpointing exclude each other: a layer that is run again in "
            "the backward pass would overwrite what was recorded; set one"
        )
    if config.training.bf16 and config.training.fp16:
        raise ValueError("training.bf16 and training.fp16 exclude each other: set one")
