"""Configurations: strict keys, checked types, overrides, and a YAML form that reads back the same."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import peft
import pytest

from ept import EPTConfig
from ept.runs.config import MethodConfig, RunConfig, load_run_config

REFUSED = {
    "training.learning_rte=1": "unknown key training.learning_rte: did you mean training.learning_rate?",
    "trainin.max_steps=1": "unknown key trainin: did you mean training?",
    "batch_size=4": "unknown key batch_size: did you mean training.batch_size?",
    "model.xyzzy=1": "unknown key model.xyzzy: the keys here are name_or_path,",
    "model.trust_remote_code=true": "unknown key model.trust_remote_code",
    "training.max_steps=ten": "training.max_steps: expected a whole number or null, got 'ten' (str)",
    "training.max_steps=1.5": "training.max_steps: expected a whole number or null, got 1.5 (float)",
    "training.max_steps=true": "training.max_steps: expected a whole number or null, got True (bool)",
    "training.batch_size=null": "training.batch_size: expected a whole number, got None",
    "training.bf16=1": "training.bf16: expected true or false, got 1 (int)",
    "training.learning_rate=fast": "training.learning_rate: expected a number, got 'fast' (str)",
    "training=5": "training: expected a section with keys, got 5 (int)",
    "model.dtype=float8": "model.dtype: expected one of float32, bfloat16, float16, auto, fastest, got 'float8'",
    "data.label_words=[no, yes]": "put such words in quotes",
    "data.labels=[digits]": "data.labels: expected one of digits, words",
    "training.batch_size=0": "training.batch_size must be greater than 0, got 0",
    "training.warmup_steps=-1": "training.warmup_steps must not be negative, got -1",
    "max_steps": "cannot read the override 'max_steps': write it as dotted.key=value",
    "seed.a=1": "seed: expected a whole number",
    'output_dir="\\ud800"': "surrogates not allowed",
    "method.r=-1": "method.r must not be negative, got -1",
    f"seed={2**32}": "seed must be at most 4294967295, got 4294967296",
    "training.compile_layers=true": "set training.pad_to_multiple_of too",
    "training.pad_to_multiple_of=0": "training.pad_to_multiple_of must be greater than 0, got 0",
    "training.optim=sgd": "training.optim: expected one of adamw_torch_fused, adamw_torch",
    "training.lr_scheduler=cosine_with_min_lr": "training.lr_scheduler: expected one of linear, cosine, ",
    "training.lr_scheduler=warmup_stable_decay": "got 'warmup_stable_decay'",
    "training.lr_scheduler=sine": "got 'sine'",
    "training.cuda_graphs=true": "training.cuda_graphs replays compiled layers: set training.compile_layers=true",
    "data.template='{a": "cannot read the value of 'data.template' as YAML",
}


@pytest.mark.parametrize("override, message", REFUSED.items(), ids=list(REFUSED))
def test_refused(override: str, message: str) -> None:
    with pytest.raises(ValueError) as error:
        load_run_config(None, [override])
    assert message in str(error.value)


def test_exclusive_keys() -> None:
    with pytest.raises(ValueError, match=r"training\.bf16 and training\.fp16 exclude each other"):
        load_run_config(None, ["training.bf16=true", "training.fp16=true"])
    compiled = ["training.compile_layers=true", "training.pad_to_multiple_of=16", "training.cuda_graphs=true"]
    for other in ("compile_layers", "gradient_checkpointing"):
        settings = ["training.shared_prompt=true", "training.pad_to_multiple_of=8", f"training.{other}=true"]
        with pytest.raises(ValueError, match=rf"training\.shared_prompt and training\.{other} exclude each other"):
            load_run_config(None, settings)
    with pytest.raises(ValueError, match="gradient_checkpointing exclude each other"):
        load_run_config(None, [*compiled, "training.gradient_checkpointing=true"])
    for given in ("template='{text}'", "label_column=a", "text_columns=[a]", "metric=[f1]", "label_words=[a, b]"):
        key = given.partition("=")[0]
        with pytest.raises(ValueError, match=rf"data\.task and data\.{key} exclude each other: a named task brings"):
            load_run_config(None, ["data.task=glue/sst2", f"data.{given}"])


@pytest.mark.parametrize("name, has_warmup", [("constant", False), ("reduce_lr_on_plateau", False), ("cosine", True)])
def test_a_warmup_that_a_schedule_would_pass_over_is_refused(name: str, has_warmup: bool) -> None:
    settings = [f"training.lr_scheduler={name}", "training.warmup_steps=5"]
    if has_warmup:
        assert load_run_config(None, settings).training.warmup_steps == 5
        return
    with pytest.raises(ValueError, match=rf"lr_scheduler={name} ignores training\.warmup_steps=5: set it to 0"):
        load_run_config(None, settings)


def test_overrides_come_after_the_file_and_in_order(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("training: {max_steps: 7, learning_rate: 1e-3}\nmodel:\nseed: 3\n", encoding="utf-8")
    config = load_run_config(file, ["training.max_steps=8", "training.max_steps=9", "data.label_words=['no', 'yes']"])
    assert config.training.max_steps == 9
    assert config.training.learning_rate == 1e-3  # YAML reads 1e-3 as a text
    assert config.seed == 3
    assert config.data.label_words == ["no", "yes"]


def test_yaml_round_trip(tmp_path: Path) -> None:
    overrides = ["data.template='{a}\\nä?'", "data.label_words={0: 'no', 1: 'yes'}", "method.embedding_scale=1"]
    config = load_run_config(None, overrides)
    file = tmp_path / "run.yaml"
    file.write_text(config.to_yaml(), encoding="utf-8")
    assert load_run_config(file) == config
    assert config != RunConfig()


@pytest.mark.parametrize("text, message", [("- a\n", "expected a mapping"), ("a: [", "cannot read .* as YAML")])
def test_files_that_are_no_configuration(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        load_run_config(file)
    with pytest.raises(FileNotFoundError, match=r"no configuration file .*nothing\.yaml"):
        load_run_config(tmp_path / "nothing.yaml")


def test_every_field_of_the_adapter_can_be_set() -> None:
    """A run's own decisions, and the state of a saved adapter, are no keys of `method`."""
    elsewhere = {"max_length", "seed", "task_type", "folded", "tokenizer_name_or_path", "tokenizer_kwargs"}
    elsewhere |= {"template", "label_words"}
    inherited = {field.name for field in dataclasses.fields(peft.PromptLearningConfig)} - {"num_virtual_tokens"}
    adapter = {field.name for field in dataclasses.fields(EPTConfig)} - elsewhere - inherited
    method = set(MethodConfig.model_fields) - {"name", "budget", "budget_kind", "init_from"}
    assert method == adapter


@pytest.mark.parametrize("key", ["template", "target_template"])
def test_a_line_break_in_a_template_of_the_command_line(key):
    config = load_run_config(None, [f"data.{key}={{a}}\\nb"])
    assert getattr(config.data, key) == "{a}\nb"
