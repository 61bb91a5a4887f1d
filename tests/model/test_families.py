"""Every supported family: exact without a prompt, trains, saves and loads."""

from __future__ import annotations

import pytest
import torch
from tiny_models import DECODERS, FAMILIES, SMALL, make_batch, make_model, randomise

from ept import EPTConfig, EPTModel, get_ept_model


@pytest.mark.parametrize("name", FAMILIES)
def test_without_prompt_and_update_it_is_the_bare_model(name):
    bare = make_model(name)
    batch = make_batch(name, (9, 4), "right" if name not in DECODERS else "left")
    with torch.no_grad():
        mask = batch["attention_mask"]
        positions = {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
        if name not in DECODERS or name == "bloom":  # bloom counts positions from the mask by itself
            positions = {}
        expected = bare(**batch, **positions)
        model = get_ept_model(make_model(name), EPTConfig.prompt_tuning(0)).eval()
        actual = model(**batch)
    real = mask.bool() if name in DECODERS else torch.ones(actual.logits.shape[:-1], dtype=torch.bool)
    torch.testing.assert_close(actual.logits[real], expected.logits[real], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(actual.loss, expected.loss)


@pytest.mark.parametrize("name", FAMILIES)
def test_trains_saves_and_loads(name, tmp_path):
    model = get_ept_model(make_model(name), EPTConfig(**SMALL))
    batch = make_batch(name)
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    model(**batch).loss.backward()
    optimizer.step()
    randomise(model)
    model.eval()
    with torch.no_grad():
        expected = model(**batch).logits
    model.save_pretrained(tmp_path)
    names = {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    assert {path.name for path in tmp_path.iterdir()} == names
    again = EPTModel.from_pretrained(make_model(name), tmp_path, is_trainable=True)
    again.eval()
    with torch.no_grad():
        assert torch.equal(again(**batch).logits, expected)
    assert {n for n, p in again.named_parameters() if p.requires_grad} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }
    frozen = EPTModel.from_pretrained(make_model(name), tmp_path)
    assert not any(p.requires_grad for p in frozen.parameters())


def test_classifier_cannot_generate():
    model = get_ept_model(make_model("bert"), EPTConfig(**SMALL))
    with pytest.raises(ValueError, match="BertForSequenceClassification cannot generate"):
        model.generate(make_batch("bert")["input_ids"])
