"""Modules that a checkpoint has no weights for: trained and saved with a classifier's head, or refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoTokenizer, BertForMaskedLM, LlamaConfig, LlamaModel

from ept.runs.config import RunConfig
from ept.runs.labelling import label_rows
from ept.runs.predict import open_run
from ept.runs.train import train

Configure = Callable[..., RunConfig]
ROWS = [{"text": "the film was awful"}, {"text": "the story was lovely"}]


@pytest.fixture
def masked(models: dict[str, Path], tmp_path: Path) -> Path:
    """A BERT as it is trained on masked words, without a pooler."""
    BertForMaskedLM(AutoConfig.from_pretrained(models["bert"])).save_pretrained(tmp_path / "masked")
    AutoTokenizer.from_pretrained(models["bert"]).save_pretrained(tmp_path / "masked")
    return tmp_path / "masked"


@pytest.mark.parametrize("method, unset", [("ept", ()), ("prompt-tuning", ["r"]), ("lora", ["num_virtual_tokens"])])
def test_a_pooler_that_the_checkpoint_lacks_is_saved_with_the_head(
    configure: Configure, masked: Path, tmp_path: Path, method: str, unset: Sequence[str]
) -> None:
    settings = [f"model.name_or_path={masked}", f"method.name={method}", "training.max_steps=2"]
    train(configure("bert", *settings, *(f"method.{key}=null" for key in unset)))
    saved = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert {"classifier", "bert.pooler.dense"} <= set(saved["modules_to_save"])
    first, second = (label_rows(open_run(tmp_path / "run"), ROWS, "rows") for _ in range(2))
    assert first == second


def test_an_adapter_without_it_is_refused(configure: Configure, masked: Path, tmp_path: Path) -> None:
    train(configure("bert", "training.max_steps=2"))
    with pytest.raises(ValueError, match=r"masked has no weights for bert\.pooler\.dense of BertForSequence.*give a"):
        open_run(tmp_path / "run", [f"model.name_or_path={masked}"])


def test_a_language_model_without_its_head_is_refused(
    configure: Configure, models: dict[str, Path], tmp_path: Path
) -> None:
    config = LlamaConfig.from_pretrained(models["llama"])
    torch.manual_seed(0)
    LlamaModel(config).save_pretrained(tmp_path / "headless")
    AutoTokenizer.from_pretrained(models["llama"]).save_pretrained(tmp_path / "headless")
    with pytest.raises(ValueError, match="headless has no weights for lm_head of LlamaForCausalLM"):
        train(configure("llama", f"model.name_or_path={tmp_path / 'headless'}", "model.task_type=CAUSAL_LM"))
