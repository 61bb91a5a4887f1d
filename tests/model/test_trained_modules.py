"""Modules of the base model that adapters train: in mixed batches, beside other adapters', added and deleted."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_models import SMALL, adapted, add_lora, make_batch, make_model, randomise
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PegasusConfig, PegasusForConditionalGeneration, PreTrainedTokenizerFast

from ept import EPTConfig, get_ept_model
from ept.model.export import FoldedAdapter
from ept.model.vocabulary import add_prompt_tokens
from ept.runs.config import ModelConfig
from ept.runs.exporting import embed_texts

GREEDY = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "eos_token_id": None}


def two(name, *heads, **fields):
    """Makes a model with the adapters `a` and `b`, each with copies of `heads` of its own."""
    model = adapted(name, None, modules_to_save=[*heads] or None, **fields)
    model.add_adapter("b", EPTConfig(**{**SMALL, **fields}, modules_to_save=[*heads] or None))
    randomise(model, seed=5, scale=1.0)
    return model.eval()


def alone(model, call):
    """Calls with each adapter alone, and without any."""
    found = {}
    for name in ("default", "b"):
        model.set_adapter(name)
        found[name] = call()
    model.set_adapter("default")
    with model.disable_adapter():
        found["__base__"] = call()
    return found


@pytest.mark.parametrize("names", [("default", "b"), ("__base__", "b"), ("b", "__base__")])
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"num_return_sequences": 2, "num_beams": 2}], ids=str)
@pytest.mark.parametrize("name", ["llama", "t5"])
def test_generate_sends_each_row_through_its_own_head(name, options, names):
    model = two(name, "lm_head")
    inputs = {key: make_batch(name, (6, 6))[key] for key in ("input_ids", "attention_mask")}
    expected = alone(model, lambda: model.generate(**inputs, **GREEDY, **options))
    found = model.generate(**inputs, adapter_names=names, **GREEDY, **options)
    each = len(found) // 2
    for row, own in enumerate(names):
        rows = slice(row * each, (row + 1) * each)
        assert torch.equal(found[rows], expected[own][rows]), own
    assert not torch.equal(expected["default"], expected["b"])


@pytest.mark.parametrize(
    "name, heads",
    [("llama", ["embed_tokens"]), ("llama", ["up_proj", "lm_head"]), ("roberta", ["classifier"]), ("bert", ["bert"])],
)
@torch.no_grad()
def test_a_mixed_batch_takes_each_rows_modules(name, heads):
    model = two(name, *heads)
    inputs = {key: make_batch(name, (6, 6, 6))[key] for key in ("input_ids", "attention_mask")}
    names = ("b", "__base__", "default")
    if heads == ["bert"]:  # gives no tensor
        with pytest.raises(ValueError, match=r"BertModel returns a BaseModelOutput\w+, from which the rows"):
            model(**inputs, adapter_names=names)
        return
    expected = alone(model, lambda: model(**inputs).logits)
    found = model(**inputs, adapter_names=names).logits
    for row, own in enumerate(names):
        logits = expected[own][row]
        torch.testing.assert_close(found[row][-6:], logits[-6:], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_mixed_batch_of_adapters_with_and_without_a_head():
    model = adapted("llama", modules_to_save=["lm_head"])
    model.add_adapter("b", EPTConfig(**SMALL))
    randomise(model, seed=5)
    model.eval()
    ids = make_batch("llama", (6, 6))["input_ids"]
    expected = alone(model, lambda: model(ids).logits)
    for active in ("default", "b"):  # PEFT sends all rows past the heads where the active adapter has none
        model.set_adapter(active)
        found = model(ids, adapter_names=["default", "b"]).logits
        torch.testing.assert_close(found[0], expected["default"][0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found[1], expected["b"][1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("heads, refused", [(["up_proj"], True), (["lm_head"], False)])
def test_checkpointed_layers_with_modules_of_several_adapters_are_refused(heads, refused):
    model, batch = two("llama", *heads), make_batch("llama", (6, 6))
    model.set_requires_grad(["default", "b"])
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.train()
    if refused:
        with pytest.raises(ValueError, match="LlamaDecoderLayer again in the backward"):
            model(**batch, adapter_names=["default", "b"])
    else:
        model(**batch, adapter_names=["default", "b"]).loss.backward()
    assert model(**batch).loss.isfinite()


@pytest.mark.parametrize("options", [{"modules_to_save": ["lm_head"]}, {"trainable_token_indices": [4, 5]}], ids=str)
def test_a_base_whose_modules_another_adapter_trained_is_refused(options):
    base = make_model("llama")
    add_lora(base, "lora", target_modules=["q_proj"], **options)
    with pytest.raises(ValueError, match=r"another adapter has trained .* of LlamaForCausalLM itself: merge it first"):
        get_ept_model(base, EPTConfig(**SMALL))


def test_the_next_adapter_takes_the_state_of_the_deleted_one():
    for is_trained in (True, False):
        model = two("llama", "lm_head")
        model.set_adapter("b", inference_mode=not is_trained)
        with pytest.warns(UserWarning, match="'b' was active; 'default' is active now"):
            model.delete_adapter("b")
        own = [p.requires_grad for name, p in model.named_parameters() if ".default." in f"{name}."]
        assert len(own) > 3
        assert all(own) if is_trained else not any(own)


def test_a_refused_adapter_leaves_nothing():
    model = adapted("llama", modules_to_save=["lm_head"])
    before = [name for name, _ in model.named_parameters()]
    with pytest.raises(TypeError, match="ModuleList"):
        model.add_adapter("b", EPTConfig(**SMALL, modules_to_save=["lm_head", "layers"]))
    assert [name for name, _ in model.named_parameters()] == before
    model.add_adapter("b", EPTConfig(**SMALL))


def test_a_new_adapter_starts_from_the_models_own_embedding():
    model = adapted("llama", modules_to_save=["embed_tokens"])
    with torch.no_grad():
        model.base_model.model.embed_tokens.modules_to_save["default"].weight.mul_(10)
    model.add_adapter("b", EPTConfig(**SMALL, seed=3))
    fresh = get_ept_model(make_model("llama"), EPTConfig(**SMALL, seed=3), "b")
    torch.testing.assert_close(
        {name: p.detach() for name, p in model.prompt_encoder["b"].named_parameters()},
        {name: p.detach() for name, p in fresh.prompt_encoder["b"].named_parameters()},
    )


def pegasus():
    torch.manual_seed(0)
    sizes = {f"{side}_{name}": 2 for side in ("encoder", "decoder") for name in ("layers", "attention_heads")}
    sizes |= {"vocab_size": 99, "max_position_embeddings": 64, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
    config = PegasusConfig(**sizes, d_model=32, scale_embedding=True, init_std=0.3)
    return PegasusForConditionalGeneration(config).eval()


@pytest.mark.parametrize(
    "name, heads",
    [("pegasus", None), *((name, heads) for name in ("llama", "gemma3") for heads in (None, ["embed_tokens"]))],
)
@torch.no_grad()
def test_exported_embeddings_are_scaled_and_of_the_trained_table(name, heads, tmp_path):
    base = pegasus() if name == "pegasus" else make_model(name)
    base.save_pretrained(tmp_path / "base")
    model = get_ept_model(copy.deepcopy(base), EPTConfig(**SMALL, modules_to_save=heads))
    randomise(model, scale=1.0)
    model.eval().save_pretrained(tmp_path / "adapter")
    ids, answers = [5, 6, 7, 8], torch.tensor([[0, 9]])
    task_type = model.active_peft_config.task_type
    given = {"decoder_input_ids": answers} if name == "pegasus" else {}
    described = ModelConfig(name_or_path=str(tmp_path / "base"), dtype="float32")
    (embeds,) = embed_texts(FoldedAdapter.read(tmp_path / "adapter"), described, task_type, [ids], pad_token_id=0)
    expected = model(torch.tensor([ids]), attention_mask=torch.ones(1, 4, dtype=torch.int64), **given).logits
    found = model.base_model(inputs_embeds=embeds[None], **given).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_prompt_becomes_words_of_a_model_that_scales_what_it_looks_up():
    base = pegasus()
    model = get_ept_model(copy.deepcopy(base), EPTConfig(num_virtual_tokens=4, r=0, fusion=False, num_spaces=0))
    randomise(model, scale=1.0)
    words = {f"w{number}": number for number in range(99)}
    plain = Tokenizer(WordLevel(words, unk_token="w3"))
    plain.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="w3", pad_token="w0")
    text = add_prompt_tokens(base, tokenizer, model.eval().fold().prompt_encoder["default"], "SEQ_2_SEQ_LM")
    answers = torch.tensor([[0, 9]])
    ids = torch.tensor([tokenizer(f"{text.before}w5 w6{text.after}", add_special_tokens=False)["input_ids"]])
    expected = model(torch.tensor([[5, 6]]), decoder_input_ids=answers).logits
    torch.testing.assert_close(base(ids, decoder_input_ids=answers).logits[..., :99], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_a_module_that_is_never_called_is_not_trained(name):
    with pytest.raises(ValueError, match=r"shared of .* is never called, .*: name the encoder's"):
        adapted(name, None, modules_to_save=["shared"])
    model = adapted(name, None, modules_to_save=["embed_tokens"])
    model(**make_batch(name, (6, 4))).loss.backward()
    trained = {key: p for key, p in model.base_model.named_parameters() if p.requires_grad}
    assert len(trained) == 2
    assert all(p.grad is not None and p.grad.any() for p in trained.values())
