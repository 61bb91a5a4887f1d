"""What a run is made of: nested dataclasses, read from YAML and `dotted.key=value`, with every key and type checked.

Imports nothing heavy, so that printing or checking a configuration is instant.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Union

import yaml

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


@dataclass
class MethodConfig:
    """The adapter. None means the method's own default (see `EPTConfig`)."""

    name: Literal["ept", "dept", "pt"] = "ept"
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
    early_stopping_patience: int | None = None
    """Stop after so many evaluations without a better score. None: never."""
    save_total_limit: int = 2
    bf16: bool = False
    fp16: bool = False
    gradient_checkpointing: bool = False
    group_by_length: bool = False
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


def load_run_config(file: Path | None, overrides: typing.Sequence[str] = ()) -> RunConfig:
    """Read a run from a YAML file (None: all defaults) and apply `dotted.key=value` overrides, in order.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: not YAML, an unknown key (names the nearest known one), a value of the wrong type or range.
    """
    values = _read_yaml(file) if file is not None else {}
    for override in overrides:
        _apply_override(values, override)
    config = _build(RunConfig, values, path="")
    _check(config)
    return config


def _read_yaml(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise FileNotFoundError(f"no configuration file {file}")
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not YAML: {error}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ValueError(f"{file} holds {_describe(values)}, expected a mapping such as `model: {{...}}`")
    return values


def _apply_override(values: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key.strip():
        raise ValueError(f"cannot read the override {override!r}: write it as dotted.key=value")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"cannot read the value of {key!r} as YAML: {text!r}") from error
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
        dotted = f"{path}.{key}" if path else str(key)
        if key not in names:
            raise ValueError(_unknown_key(dotted, str(key), path, names))
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
        return isinstance(value, list) and all(_fit(item_type, item)[0] for item in value), value
    if typing.get_origin(option) is dict:
        _, item_type = typing.get_args(option)
        return isinstance(value, dict) and all(_fit(item_type, item)[0] for item in value.values()), value
    if option is float:
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return True, float(value)
        try:
            return isinstance(value, str), float(value)
        except (TypeError, ValueError):
            return False, value
    if option is int:
        return isinstance(value, int) and not isinstance(value, bool), value
    return isinstance(value, option), value


def _name(option: Any) -> str:
    if typing.get_origin(option) is Literal:
        return "one of " + ", ".join(map(str, typing.get_args(option)))
    if typing.get_origin(option) is list:
        return "a list of texts"
    if typing.get_origin(option) is dict:
        return "a mapping to texts"
    names = {str: "a text", int: "a whole number", float: "a number", bool: "true or false", type(None): "null"}
    return names[option]


def _describe(value: Any) -> str:
    return f"{value!r} ({type(value).__name__})"


def _check(config: RunConfig) -> None:
    """Ranges, and keys that exclude each other."""
    positive: dict[str, float | None] = {
        "data.max_length": config.data.max_length,
        "data.max_train": config.data.max_train,
        "data.max_validation": config.data.max_validation,
        "data.max_test": config.data.max_test,
        "method.budget": config.method.budget,
        "training.max_steps": config.training.max_steps,
        "training.num_train_epochs": config.training.num_train_epochs,
        "training.batch_size": config.training.batch_size,
        "training.eval_batch_size": config.training.eval_batch_size,
        "training.gradient_accumulation_steps": config.training.gradient_accumulation_steps,
        "training.eval_steps": config.training.eval_steps,
        "training.logging_steps": config.training.logging_steps,
        "training.early_stopping_patience": config.training.early_stopping_patience,
        "training.save_total_limit": config.training.save_total_limit,
    }
    not_negative = {
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
    if config.data.task is not None and config.data.template is not None:
        raise ValueError("data.task and data.template exclude each other: a named task brings its own template")
    if config.training.bf16 and config.training.fp16:
        raise ValueError("training.bf16 and training.fp16 exclude each other: set one")
