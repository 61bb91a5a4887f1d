"""TOKEN_CLS, QUESTION_ANS and FEATURE_EXTRACTION: outputs, losses and files without the prompt's rows."""

from __future__ import annotations

import pytest
import torch
from classes import tiny
from tiny_models import SMALL, randomise

from ept import EPTConfig, EPTModel, get_ept_model

CLASSES = {
    "TOKEN_CLS": ("bert", "BertForTokenClassification", {"num_labels": 3}),
    "QUESTION_ANS": ("distilbert", "DistilBertForQuestionAnswering", {}),
    "FEATURE_EXTRACTION": ("bert", "BertModel", {}),
}
OUTPUTS = {"TOKEN_CLS": "logits", "QUESTION_ANS": "start_logits", "FEATURE_EXTRACTION": "last_hidden_state"}
IDS = torch.tensor([[5, 6, 7, 8, 9, 10, 11], [12, 13, 14, 15, 1, 1, 1]])
MASK = torch.tensor([[1] * 7, [1] * 4 + [0] * 3])


def labels_of(task: str) -> dict[str, torch.Tensor]:
    if task == "TOKEN_CLS":
        return {"labels": torch.tensor([[0, 1, 2, 0, 1, 2, -100], [2, 1, 0, 1, -100, -100, -100]])}
    if task == "QUESTION_ANS":  # the last is beyond the text, which the loss ignores
        return {"start_positions": torch.tensor([2, 1]), "end_positions": torch.tensor([4, 99])}
    return {}


def adapted(task: str, **fields):
    model_type, name, changes = CLASSES[task]
    model = get_ept_model(tiny(model_type, name, **changes), EPTConfig(**{**SMALL, **fields}))
    randomise(model)
    return model.eval()


@pytest.mark.parametrize("task", CLASSES)
def test_without_prompt_and_update_outputs_and_loss_are_the_bare_models(task):
    model_type, name, changes = CLASSES[task]
    bare, batch = tiny(model_type, name, **changes), {"input_ids": IDS, "attention_mask": MASK, **labels_of(task)}
    options = {"output_hidden_states": True, "output_attentions": True}
    bare.config._attn_implementation = "eager"
    with torch.no_grad():
        expected = bare(**batch, **options)
        model = get_ept_model(bare, EPTConfig.prompt_tuning(0)).eval()
        actual = model(**batch, **options)
    assert model.active_peft_config.task_type == task
    assert list(actual) == list(expected)
    real = MASK.bool()
    for key, value in expected.items():
        if isinstance(value, tuple):
            for mine, theirs in zip(actual[key], value, strict=True):
                assert mine.shape == theirs.shape
        elif value.shape[:2] == MASK.shape:
            torch.testing.assert_close(actual[key][real], value[real], rtol=1e-4, atol=1e-4)
        else:
            torch.testing.assert_close(actual[key], value, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("task", CLASSES)
def test_outputs_follow_the_callers_columns_whatever_the_padding(task):
    """Also the loss, the pooled output and the hidden states of a batch padded on the left."""
    model = adapted(task)
    labels = labels_of(task)
    flipped = {"input_ids": IDS.clone(), "attention_mask": MASK.flip(1)}
    flipped["input_ids"][1] = torch.tensor([1, 1, 1, 12, 13, 14, 15])
    flipped["attention_mask"][0] = 1
    moved = {k: v.clone() for k, v in labels.items()}
    if task == "TOKEN_CLS":
        moved["labels"][1] = torch.tensor([-100, -100, -100, 2, 1, 0, 1])
    elif task == "QUESTION_ANS":
        moved["start_positions"][1] += 3
    with torch.no_grad():
        right = model(input_ids=IDS, attention_mask=MASK, **labels, output_hidden_states=True)
        left = model(**flipped, **moved, output_hidden_states=True)
        alone = model(input_ids=IDS[1:, :4], output_hidden_states=True)
    for one, other in ((right, lambda x: x[1, :4]), (left, lambda x: x[1, 3:])):
        value = one[OUTPUTS[task]]
        assert value.shape[:2] == IDS.shape
        torch.testing.assert_close(other(value), alone[OUTPUTS[task]][0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(other(one.hidden_states[-1]), alone.hidden_states[-1][0], rtol=1e-4, atol=1e-4)
        if task == "FEATURE_EXTRACTION":
            torch.testing.assert_close(one.pooler_output[1], alone.pooler_output[0], rtol=1e-4, atol=1e-4)
    if task == "TOKEN_CLS":  # the loss of answers' ends is over all columns, as the bare model's is
        torch.testing.assert_close(right.loss, left.loss, rtol=1e-4, atol=1e-4)
        expected = torch.nn.functional.cross_entropy(right.logits.transpose(1, 2), labels["labels"])
        torch.testing.assert_close(right.loss, expected)


@pytest.mark.parametrize("task", [task for task in CLASSES if task != "FEATURE_EXTRACTION"])
def test_trains_saves_and_loads_with_its_head(task, tmp_path):
    model, batch = adapted(task).train(), {"input_ids": IDS, "attention_mask": MASK, **labels_of(task)}
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert any("modules_to_save" in name for name in trained)
    model(**batch).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    model.eval()
    model.save_pretrained(tmp_path)
    model_type, name, changes = CLASSES[task]
    again = EPTModel.from_pretrained(tiny(model_type, name, **changes), tmp_path)
    assert again.active_peft_config.task_type == task
    with torch.no_grad():
        assert torch.equal(again(**batch).loss, model(**batch).loss)
        mixed = again(input_ids=IDS, attention_mask=MASK, adapter_names=["default", "__base__"])
        bare = tiny(model_type, name, **changes)(IDS[1:, :4])
    torch.testing.assert_close(mixed[OUTPUTS[task]][1, :4], bare[OUTPUTS[task]][0], rtol=1e-4, atol=1e-4)


def test_features_train_under_a_loss_of_the_callers():
    model = adapted("FEATURE_EXTRACTION").train()
    assert model.active_peft_config.modules_to_save is None
    model(IDS, attention_mask=MASK).last_hidden_state.square().mean().backward()
    assert all(p.grad is not None for p in model.prompt_encoder.parameters())
