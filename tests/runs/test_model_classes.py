"""Which class loads a checkpoint: language models that read images as well are language models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import transformers

from ept.model.base_model import absent_modules
from ept.model.miniature import miniature
from ept.runs.config import ModelConfig
from ept.runs.loading import load_base_model, task_type_of


@pytest.mark.parametrize(
    "name, loaded",
    [
        ("Gemma3ForConditionalGeneration", "Gemma3ForConditionalGeneration"),
        ("Qwen3_5ForConditionalGeneration", "Qwen3_5ForCausalLM"),  # its part that reads texts
        ("Mistral3ForConditionalGeneration", "Mistral3ForConditionalGeneration"),
    ],
)
def test_a_model_that_reads_images_is_a_language_model(tmp_path: Path, name: str, loaded: str) -> None:
    model_class: Any = getattr(transformers, name)
    saved: Any = miniature(model_class, model_class.config_class())
    saved.save_pretrained(tmp_path)
    model = ModelConfig(name_or_path=str(tmp_path))
    assert task_type_of(model) == "CAUSAL_LM"
    base = load_base_model(model, "CAUSAL_LM", num_labels=2, pad_token_id=0)
    assert type(base).__name__ == loaded
    assert absent_modules(base) == []


@pytest.mark.parametrize(
    "config, name, task_type",
    [
        (transformers.BertConfig, "BertForMaskedLM", "SEQ_CLS"),
        (transformers.BertConfig, "BertLMHeadModel", "CAUSAL_LM"),
        (transformers.BertGenerationConfig, "BertGenerationDecoder", "CAUSAL_LM"),
        (transformers.LlamaConfig, "LlamaModel", "SEQ_CLS"),
        (transformers.Qwen3_5Config, "Qwen3_5ForSequenceClassification", "SEQ_CLS"),
        (transformers.T5Config, "T5ForConditionalGeneration", "SEQ_2_SEQ_LM"),
    ],
)
def test_a_checkpoints_head_says_what_it_is_for(tmp_path: Path, config: Any, name: str, task_type: str) -> None:
    config(architectures=[name]).save_pretrained(tmp_path)
    assert task_type_of(ModelConfig(name_or_path=str(tmp_path))) == task_type
