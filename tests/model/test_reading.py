"""How a model reads its input is tested: the right way is found, a model without one is refused, no trace is left."""

from __future__ import annotations

import random
from typing import Any

import numpy
import pytest
import torch
import transformers
from classes import tiny, trial
from tiny_models import SMALL, adapted, make_batch, make_model, randomise
from torch import Tensor

from ept import EPTConfig, get_ept_model
from ept.model import reading
from ept.model.miniature import miniature, shrunk
from ept.model.reading import BaseModelFacts, facts_of, generation_of

IDS = torch.arange(4, 11)[None]


def adapted_to(model_type: str, name: str, **changes: Any) -> Any:
    """Makes a tiny model of a class with an adapter, no part of it at its start."""
    model = get_ept_model(tiny(model_type, name, **changes), EPTConfig(**SMALL))
    randomise(model)
    return model.eval()


# Model type, class, changes of its configuration: what was found.
FOUND: list[tuple[str, str, dict[str, Any], dict[str, Any]]] = [
    ("llama", "LlamaForCausalLM", {}, {"padding": "beside", "position_offset": 0, "splits_prompt": True}),
    ("mistral", "MistralForCausalLM", {}, {"padding": "beside", "splits_prompt": False}),  # it sees a window
    ("gpt_neo", "GPTNeoForCausalLM", {}, {"padding": "beside", "splits_prompt": False}),  # as well, without saying so
    ("opt", "OPTForCausalLM", {}, {"padding": "beside", "position_limit": 2048, "is_causal": True}),
    ("rwkv", "RwkvForCausalLM", {}, {"padding": "behind", "position_offset": None}),  # it knows no mask
    ("roberta", "RobertaForCausalLM", {}, {"position_offset": 2, "position_limit": 510, "is_causal": False}),
    ("bart", "BartForConditionalGeneration", {}, {"padding": "behind", "position_limit": 1024}),
    ("bert", "BertForSequenceClassification", {}, {"padding": "behind", "position_limit": 512}),
    ("modernbert", "ModernBertForSequenceClassification", {}, {"padding": "behind"}),
    ("modernbert-decoder", "ModernBertDecoderForSequenceClassification", {}, {"padding": "front"}),  # pools the last
    ("gpt2", "GPT2ForSequenceClassification", {}, {"padding": "front", "position_offset": 0}),
    ("fnet", "FNetForSequenceClassification", {}, {"padding": None}),
    ("esm", "EsmForSequenceClassification", {}, {"embedding_factor": pytest.approx(0.88), "ids_alone": (32,)}),
    ("esm", "EsmModel", {"token_dropout": False}, {"embedding_factor": 1.0, "ids_alone": ()}),
    ("marian", "MarianMTModel", {"scale_embedding": True}, {"embedding_factor": pytest.approx(32**0.5, rel=1e-7)}),
    ("pegasus", "PegasusForConditionalGeneration", {"scale_embedding": False}, {"embedding_factor": 1.0}),
    ("bert", "BertForTokenClassification", {}, {"task_type": "TOKEN_CLS"}),
    ("bert", "BertForQuestionAnswering", {}, {"task_type": "QUESTION_ANS"}),
    ("bert", "BertModel", {}, {"task_type": "FEATURE_EXTRACTION", "has_pooler": True}),
]


@pytest.mark.parametrize("model_type, name, changes, found", FOUND, ids=[case[1] for case in FOUND])
def test_what_is_found(model_type, name, changes, found):
    facts = get_ept_model(tiny(model_type, name, **changes), EPTConfig.prompt_tuning(2))._facts
    assert {field: getattr(facts, field) for field in found} == found


REFUSED = [
    ("bart", "BartForQuestionAnswering", None, "is an encoder-decoder without a language-model head"),
    ("bert", "BertForMaskedLM", None, "predicts tokens at their own positions, which fits none of the task types"),
    ("esmc", "EsmcForSequenceClassification", None, "cannot be called with inputs_embeds"),
    ("modernbert", "ModernBertForQuestionAnswering", None, "takes no inputs_embeds"),
    ("bert", "BertForQuestionAnswering", "SEQ_CLS", "SEQ_CLS does not fit BertForQuestionAnswering, which is for QUES"),
    ("bert", "BertForTokenClassification", "SEQ_CLS", "which is for TOKEN_CLS"),
    ("bert", "BertModel", "CAUSAL_LM", "which is for FEATURE_EXTRACTION"),
]


@pytest.mark.parametrize("model_type, name, task_type, message", REFUSED, ids=[f"{c[1]}-{c[2]}" for c in REFUSED])
def test_what_is_refused_at_wrapping(model_type, name, task_type, message):
    with pytest.raises(ValueError, match=message):
        get_ept_model(tiny(model_type, name), EPTConfig(task_type=task_type))


def test_a_token_that_is_read_by_its_id_alone_is_refused():
    """ESM leaves mask tokens out and scales the others up by their number, which it determines from the ids."""
    model = adapted_to("esm", "EsmForSequenceClassification")
    with pytest.raises(
        ValueError, match="contains token 32, which EsmForSequenceClassification reads differently from ids"
    ):
        model(input_ids=IDS.index_fill(1, torch.tensor([2]), 32))
    assert model(input_ids=IDS).logits.isfinite().all()


class TwiceEmbedded(transformers.LlamaForCausalLM):
    """A model that looks up a second embedding of every token, as Gemma 3n does for each layer."""

    def forward(self, input_ids=None, inputs_embeds=None, attention_mask=None, **kwargs):
        if input_ids is not None:
            inputs_embeds = self.get_input_embeddings()(input_ids) + input_ids[..., None] / 100
        return super().forward(inputs_embeds=inputs_embeds, attention_mask=attention_mask, **kwargs)


def test_a_classifier_that_looks_for_an_end_token_in_the_ids_is_refused():
    model = transformers.BartForSequenceClassification(make_model("bart").config)
    with pytest.raises(ValueError, match="is an encoder-decoder without a language-model head"):
        get_ept_model(model, EPTConfig())


def test_more_than_a_look_up_of_ids_is_refused():
    model = TwiceEmbedded(make_model("llama").config)
    with pytest.raises(ValueError, match="TwiceEmbedded needs input_ids besides embeddings"):
        get_ept_model(model, EPTConfig())


class Unbuildable(transformers.LlamaForCausalLM):
    """A model whose class cannot be built from its configuration, so that it is asked itself."""

    def __init__(self, config, size):
        super().__init__(config)


def test_what_cannot_be_copied_is_asked_itself_and_stays_as_it_was():
    model = Unbuildable(make_model("gemma3").config.__class__(**make_model("llama").config.to_dict()), 1).train()
    before = [module.training for module in model.modules()]
    facts = facts_of(model)
    assert (facts.task_type, facts.padding, facts.position_offset, facts.refusal) == ("CAUSAL_LM", "beside", 0, None)
    assert [module.training for module in model.modules()] == before
    assert not any(module._forward_hooks for module in model.modules())


def test_asking_leaves_no_trace(monkeypatch):
    """Random states of torch, accelerators', numpy and Python, and the model's configuration."""
    model = make_model("gpt2", n_positions=77).train()
    seeded: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    states = torch.get_rng_state(), numpy.random.get_state()[1].copy(), random.getstate(), model.config.to_dict()
    facts = facts_of(model)
    assert facts.task_type == "CAUSAL_LM"
    assert generation_of(model, facts) is not None
    assert not seeded
    now = torch.get_rng_state(), numpy.random.get_state()[1], random.getstate(), model.config.to_dict()
    assert torch.equal(states[0], now[0])
    assert (states[1] == now[1]).all()
    assert states[2:] == now[2:]
    assert model.training


@pytest.mark.parametrize(
    "fields", [{}, {"prompt_rank": 3}, {"lowrank_init": "cosine"}, {"lowrank_init": "svd"}], ids=str
)
def test_a_default_device_of_the_users_changes_nothing(fields, monkeypatch):
    """A tensor made without a device would be there. The device in this test gives it no value."""
    batch = make_batch("llama")
    batch["labels"][0, 2] = 5  # two answers in a row, which is read twice
    models = [adapted(seed=None, **fields)]
    monkeypatch.setattr(reading, "_KEPT", {})
    base = make_model("llama")
    with torch.device("meta"):
        models.append(get_ept_model(base, EPTConfig(**SMALL | fields)).eval())
        losses = [model(**batch).loss for model in models]
    assert torch.equal(*losses)
    for expected, parameter in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(expected, parameter)


def test_a_class_and_configuration_are_asked_once(monkeypatch):
    facts_of(make_model("llama"))
    monkeypatch.setattr("ept.model.reading._ask", lambda model: BaseModelFacts(frozenset(), refusal="asked again"))
    assert facts_of(make_model("llama")).refusal is None
    assert facts_of(make_model("llama", pad_token_id=7)).refusal == "asked again"


def test_a_model_without_weights_can_be_asked():
    with torch.device("meta"):
        model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config())
    assert facts_of(model).padding == "beside"


def test_a_large_configuration_is_made_small_and_keeps_what_decides():
    config = transformers.Gemma3TextConfig(num_hidden_layers=26)
    small = shrunk(config)
    assert small.num_hidden_layers == 2
    assert set(small.layer_types) == set(config.layer_types)
    assert small.sliding_window < 8
    for field in ("vocab_size", "pad_token_id", "rope_parameters", "use_bidirectional_attention"):
        assert getattr(small, field) == getattr(config, field)
    model = miniature(transformers.Gemma3ForCausalLM, config)
    assert sum(p.numel() for name, p in model.named_parameters() if "embed" not in name) < 1e5


# Classes whose reading was guessed wrong, and what PEFT has no width for.
@pytest.mark.parametrize(
    "model_type, name",
    [
        ("modernbert-decoder", "ModernBertDecoderForSequenceClassification"),
        ("modernbert", "ModernBertForSequenceClassification"),
        ("esm", "EsmForSequenceClassification"),
        ("distilbert", "DistilBertForSequenceClassification"),
        ("mpt", "MptForCausalLM"),
        ("mamba", "MambaForCausalLM"),
        ("xglm", "XGLMForCausalLM"),
        ("xlm", "XLMWithLMHeadModel"),
        ("qwen2_vl", "Qwen2VLForConditionalGeneration"),
        ("led", "LEDForConditionalGeneration"),
        ("fnet", "FNetForSequenceClassification"),
        ("bert", "BertForTokenClassification"),
        ("distilbert", "DistilBertForQuestionAnswering"),
        ("roberta", "RobertaModel"),
        ("llama", "LlamaModel"),
        ("gpt2", "GPT2ForTokenClassification"),
    ],
)
def test_examples(model_type, name):
    outcome = trial("", model_type, name)
    assert outcome.result == ("unpadded" if model_type == "fnet" else "pass"), outcome


@pytest.mark.parametrize(
    "model_type, name, arguments",
    [
        ("qwen2_vl", "Qwen2VLForConditionalGeneration", {"pixel_values": torch.ones(4, 1176)}),
        ("llava", "LlavaForConditionalGeneration", {"pixel_values": torch.ones(1, 3, 14, 14)}),
        ("llama", "LlamaForCausalLM", {"weights_of_tokens": torch.ones(1, 7)}),
        ("bert", "BertForSequenceClassification", {"token_weights": torch.ones(1, 7)}),
    ],
)
def test_arguments_that_might_follow_the_tokens_are_refused_by_name(model_type, name, arguments):
    """Features of images take places among the ids, which prompt and update would shift and hide."""
    model = adapted_to(model_type, name)
    with pytest.raises(ValueError, match=f"{next(iter(arguments))} .* cannot be passed on"):
        model(IDS, **arguments)


# Arguments with one entry a token: of the row alone, and in a padded batch.
TOKEN_ARGUMENTS = [
    ("bert", "BertForSequenceClassification", "token_type_ids", torch.tensor([[0, 0, 0, 0, 1, 1, 1]])),
    ("xlm", "XLMForSequenceClassification", "langs", torch.tensor([[1, 1, 1, 1, 0, 0, 0]])),
    (
        "layoutlm",
        "LayoutLMForTokenClassification",
        "bbox",
        torch.tensor([[[i, 0, i + 2, 3 * i + 1] for i in range(7)]]),
    ),
    ("led", "LEDForConditionalGeneration", "global_attention_mask", torch.tensor([[0, 1, 0, 0, 0, 0, 0]])),
]


@pytest.mark.parametrize(
    "model_type, name, argument, values", TOKEN_ARGUMENTS, ids=[case[2] for case in TOKEN_ARGUMENTS]
)
@pytest.mark.parametrize("side", ["left", "right"])
def test_arguments_with_an_entry_a_token_follow_it(model_type, name, argument, values, side):
    changes = {"n_langs": 2, "use_lang_emb": True} if argument == "langs" else {}
    bare = tiny(model_type, name, **changes)
    decoder = {"decoder_input_ids": torch.tensor([[5, 6]])} if bare.config.is_encoder_decoder else {}
    mask = torch.ones_like(IDS)
    with torch.no_grad():
        expected = bare(IDS, attention_mask=mask, **{argument: values}, **decoder).logits
        model = get_ept_model(bare, EPTConfig.prompt_tuning(0)).eval()
        assert (model(IDS, **{argument: values}, **decoder).logits - expected).abs().max() < 1e-4 * expected.abs().max()
        assert not torch.equal(model(IDS, **decoder).logits, expected)
        model = adapted_to(model_type, name, **changes)
        alone = model(IDS, **{argument: values}, **decoder).logits
        pads = (3, 0) if side == "left" else (0, 3)
        wide = {"input_ids": _pad(IDS, pads, 4), "attention_mask": _pad(mask, pads, 0), argument: _pad(values, pads, 1)}
        together = model(**wide, **decoder).logits
    if together.shape[1] == 10:
        together = together[:, 3:] if side == "left" else together[:, :7]
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)


def _pad(values: Tensor, pads: tuple[int, int], fill: int) -> Tensor:
    front, behind = (values.new_full((1, count, *values.shape[2:]), fill) for count in pads)
    return torch.cat([front, values, behind], dim=1)
