"""A part of the sweep over transformers' text classes: one of each way to read, and what is drawn of them."""

from __future__ import annotations

import pytest
from classes import KINDS, Outcome, page, text_classes, trial

CLASSES = [
    *("BloomForCausalLM", "FalconForCausalLM", "GemmaForCausalLM", "Gemma3ForCausalLM", "GPTNeoForCausalLM"),
    *("GPTJForCausalLM", "MixtralForCausalLM", "OPTForCausalLM", "RobertaForCausalLM", "RwkvForCausalLM"),
    *("BartForConditionalGeneration", "M2M100ForConditionalGeneration", "T5GemmaForConditionalGeneration"),
    *("DebertaV2ForSequenceClassification", "ElectraForSequenceClassification", "GPT2ForSequenceClassification"),
    *("ModernBertForTokenClassification", "RobertaForQuestionAnswering", "AlbertModel", "Qwen3Model"),
]
UNPADDED = ["ConvBertForTokenClassification"]  # whose convolution mixes padding into the text
LARGE_VOCABULARY = ("Bloom", "FalconFor", "GemmaFor", "Gemma3For", "M2M100")
BY_NAME = {name: (kind, model_type) for kind, model_type, name in text_classes()}


@pytest.mark.parametrize("name", [*CLASSES, *UNPADDED])
def test_alone_padded_and_empty(name):
    changes = {"vocab_size": 128} if name.startswith(LARGE_VOCABULARY) else {}
    outcome = trial(*BY_NAME[name], name, **changes)
    assert outcome.result == ("unpadded" if name in UNPADDED else "pass"), outcome


def test_every_text_class_is_in_the_sweep():
    kinds = {kind for kind, _ in BY_NAME.values()}
    assert kinds == set(KINDS)
    assert len(BY_NAME) > 400
    assert {"LlamaForCausalLM", "T5ForConditionalGeneration", "BertForTokenClassification", "BertModel"} <= set(BY_NAME)


def test_the_page_shows_what_is_wrong_and_why_a_class_is_refused():
    outcomes = [
        Outcome("A", "base models", "pass"),
        Outcome("B", "base models", "refused", "B takes no inputs_embeds"),
        Outcome("C", "encoder-decoders", "wrong", "off by 1"),
    ]
    text = page(outcomes)
    assert "1 pass, 0 unpadded, 1 refused, 0 unbuilt, 1 wrong" in " ".join(text.split())
    assert "| base models | 1 | 0 | 1 | 0 | 0 |" in text
    assert "| the class takes no inputs_embeds | B |" in text
