"""Calls that continue an earlier one, calls without the adapter, and arguments that cannot be used."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from tiny_models import PAD, SMALL, VOCAB, adapted, add_lora, make_batch, make_model, randomise
from transformers import BartConfig, BartForCausalLM, MambaConfig, MambaForCausalLM, RobertaConfig, RobertaForCausalLM

from ept import EPTConfig, EPTModel, get_ept_model

_SIZES = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "pad_token_id": PAD}
_HEADS = {"num_attention_heads": 4, "intermediate_size": 48, "max_position_embeddings": 64, "initializer_range": 0.3}


def wrapped(base, **fields):
    model = get_ept_model(base.eval(), EPTConfig(**{**SMALL, **fields}))
    randomise(model)
    return model.eval()


def roberta(**fields):
    torch.manual_seed(0)
    return wrapped(RobertaForCausalLM(RobertaConfig(**_SIZES, **_HEADS, is_decoder=True)), **fields)


def bart(**fields):
    torch.manual_seed(0)
    sizes = {"decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 48, "max_position_embeddings": 64}
    config = BartConfig(vocab_size=VOCAB, d_model=32, pad_token_id=PAD, init_std=0.3, **sizes)
    return wrapped(BartForCausalLM(config), **fields)


@torch.no_grad()
def test_a_state_that_is_no_cache_of_positions_is_refused_and_generate_keeps_it():
    torch.manual_seed(0)
    model = wrapped(MambaForCausalLM(MambaConfig(**_SIZES, state_size=4)))
    ids = make_batch("llama", (6, 6))["input_ids"]
    read = model(ids[:, :5], use_cache=True)
    with pytest.raises(ValueError, match="cache_params does not show how much MambaForCausalLM has read"):
        model(ids[:, 5:], cache_params=read.cache_params)
    options = {"max_new_tokens": 3, "output_logits": True, "return_dict_in_generate": True, "do_sample": False}
    found = model.generate(ids, **options)
    whole = model(found.sequences, text_mask=torch.arange(9).expand(2, -1) < 6).logits[:, SMALL["num_virtual_tokens"] :]
    torch.testing.assert_close(torch.stack(found.logits, 1), whole[:, 5:-1], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_generated_tokens_get_their_update_where_positions_have_an_offset():
    model, batch = roberta(update_scope="all"), make_batch("llama", (6, 3), "left")
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    found = model.generate(**inputs, **options, output_logits=True, return_dict_in_generate=True)
    mask = torch.cat([inputs["attention_mask"], torch.ones(2, 5, dtype=torch.int64)], dim=1)
    whole = model(found.sequences, attention_mask=mask).logits[:, SMALL["num_virtual_tokens"] :]
    torch.testing.assert_close(torch.stack(found.logits, 1), whole[:, 5:-1], rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("lengths", [(6, 6), (6, 3)])
def test_a_prompt_cache_where_positions_have_an_offset(lengths):
    model, batch = roberta(), make_batch("llama", lengths, "left")
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    options = {"max_new_tokens": 3, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    plain, cached = (model.generate(**inputs, **options, use_prompt_cache=use) for use in (False, True))
    torch.testing.assert_close(cached.logits, plain.logits, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_tokens_behind_padding_and_positions_by_index_are_refused():
    model, batch = bart(), make_batch("llama", (6, 3), "left")
    ids, mask = batch["input_ids"], batch["attention_mask"]
    following, text = ids[:, :1], torch.arange(7).expand(2, -1) < 6
    longer = torch.cat([mask, torch.ones_like(following)], dim=1)
    read = model(ids, attention_mask=mask, use_cache=True)
    with pytest.raises(ValueError, match="BartForCausalLM counts positions by index"):
        model(following, attention_mask=longer, past_key_values=read.past_key_values)
    read = model(ids, use_cache=True)  # rows of one length go on
    found = model(following, attention_mask=torch.ones_like(longer), past_key_values=read.past_key_values).logits
    whole = model(torch.cat([ids, following], dim=1), text_mask=text).logits
    torch.testing.assert_close(found[:, -1], whole[:, -1], rtol=1e-4, atol=1e-4)


def test_labels_of_a_loss_that_shifts_none_are_refused():
    model, batch = bart(), make_batch("llama", (6, 6))
    with pytest.raises(ValueError, match="BartForCausalLM compares each label with the prediction at its own position"):
        model(batch["input_ids"], labels=batch["labels"])
    assert roberta()(batch["input_ids"], labels=batch["labels"]).loss > 0


@torch.no_grad()
@pytest.mark.parametrize("side", ["right", "left"])
def test_tokens_behind_padding_are_refused_where_a_window_would_hold_it(side):
    model = adapted("mistral", model_changes={"sliding_window": 4})
    inputs = {key: make_batch("mistral", (6, 3), side)[key] for key in ("input_ids", "attention_mask")}
    following = inputs["input_ids"][:1, -1:].expand(2, -1)
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(following)], dim=1)
    read = model(**inputs, use_cache=True)
    if side == "right":
        with pytest.raises(ValueError, match="MistralForCausalLM counts positions by index or sees a window of them"):
            model(following, attention_mask=mask, past_key_values=read.past_key_values)
        return
    found = model(following, attention_mask=mask, past_key_values=read.past_key_values).logits
    ids, text = torch.cat([inputs["input_ids"], following], dim=1), torch.arange(7).expand(2, -1) < 6
    whole = model(ids, attention_mask=mask, text_mask=text).logits
    torch.testing.assert_close(found[:, -1], whole[:, -1], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_prompt_cache_is_made_anew_when_lora_is_switched():
    base = make_model("llama")
    add_lora(base, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model, ids = wrapped(base), make_batch("llama", (6, 6))["input_ids"]
    options = {"max_new_tokens": 1, "output_logits": True, "return_dict_in_generate": True, "do_sample": False}
    seen = []
    for switch in (lambda: None, base.disable_adapters, base.enable_adapters):
        switch()
        cached = model.generate(ids, use_prompt_cache=True, **options).logits[0]
        torch.testing.assert_close(cached, model.generate(ids, **options).logits[0], rtol=1e-4, atol=1e-4)
        seen.append(cached)
    assert not torch.allclose(seen[0], seen[1])


@pytest.mark.parametrize("of_the_model", [False, True])
def test_a_prompt_cache_and_a_cache_of_another_kind_are_refused(of_the_model):
    model, ids = adapted("llama"), make_batch("llama", (6, 6))["input_ids"]
    options = {} if of_the_model else {"cache_implementation": "static"}
    if of_the_model:
        model.base_model.generation_config.cache_implementation = "static"
    with pytest.raises(ValueError, match="cache_implementation='static' makes a cache without the prompt"):
        model.generate(ids, max_new_tokens=2, use_prompt_cache=True, **options)


@torch.no_grad()
def test_without_the_adapter_arguments_mean_the_same():
    model, ids = adapted("llama"), make_batch("llama", (6, 6))["input_ids"]
    with model.disable_adapter():
        assert isinstance(model(ids, return_dict=False), tuple)
        assert model(ids, use_cache=False).past_key_values is None
        expected = model.base_model.generate(ids, max_new_tokens=3, do_sample=False)
        extra = {"text_mask": torch.ones_like(ids), "adapter_names": ["default"] * 2, "labels": ids}
        found = model.generate(inputs=ids, max_new_tokens=3, do_sample=False, **extra)
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    "names, message",
    [
        (["default"], "1 names for a batch of 2 rows"),
        (["default", "zz"], "no adapter is named 'zz': the loaded ones are default"),
    ],
)
@torch.no_grad()
def test_names_of_adapters_are_checked_in_every_call(names, message):
    model, ids = adapted("llama", update_scope="all"), make_batch("llama", (6, 6))["input_ids"]
    read = model(ids, use_cache=True)
    encoded = adapted("t5")
    states = encoded.base_model.get_encoder()(inputs_embeds=torch.zeros(2, 11, 32))
    for call in (
        lambda: model(ids, adapter_names=names),
        lambda: model(ids[:, :1], past_key_values=read.past_key_values, adapter_names=names),
        lambda: encoded(encoder_outputs=states, labels=ids, adapter_names=names),
    ):
        with pytest.raises(ValueError, match=message):
            call()


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "bloom"])
def test_a_mixed_batch_goes_on_without_a_mask_as_each_row_alone(name):
    model, ids = adapted(name), make_batch(name, (6, 6))["input_ids"]
    model.add_adapter("b", EPTConfig(**{**SMALL, "num_virtual_tokens": 2}))
    names = ["default", "b", "__base__"]
    ids = torch.cat([ids, ids[:1]])
    found = [model(ids, adapter_names=names, use_cache=True)]
    found.append(model(ids[:, :2], adapter_names=names, past_key_values=found[0].past_key_values))
    for row, own in enumerate(names):
        alone = {"adapter_names": [own]}
        read = model(ids[row : row + 1], **alone, use_cache=True)
        expected = model(ids[row : row + 1, :2], **alone, past_key_values=read.past_key_values).logits[0, -2:]
        torch.testing.assert_close(found[1].logits[row, -2:], expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_long_text_without_an_update_stands_beside_a_short_table():
    model = adapted("llama", r=0, max_length=8)
    model.add_adapter("b", EPTConfig(**{**SMALL, "max_length": 8}))
    batch = make_batch("llama", (12, 4), "left")
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    found = model(**inputs, adapter_names=["default", "b"]).logits
    torch.testing.assert_close(found[0], model(inputs["input_ids"][:1]).logits[0], rtol=1e-4, atol=1e-4)


def test_bad_arguments_are_named(tmp_path):
    model, ids = adapted("llama"), make_batch("llama", (6, 6))["input_ids"]
    with pytest.raises(ValueError, match=r"attention_mask must be a tensor .*, got dict"):
        model(ids, attention_mask={"full_attention": None})
    added = torch.zeros(ids.shape).index_fill(1, torch.tensor([0]), torch.finfo(torch.float32).min)
    for call in (model, model.generate):
        with pytest.raises(ValueError, match="negative numbers, as masks that are added to scores do: give 1"):
            call(ids, attention_mask=added)
    for name in ("merge_and_unload", "unload", "merge_adapter", "unmerge_adapter", "add_weighted_adapter"):
        assert not hasattr(model, name)  # as of PEFT's prompt tuning
        with pytest.raises(AttributeError, match="cannot be merged into weights"):
            getattr(model, name)()
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no argument is_trainble: did you mean is_trainable"):
        EPTModel.from_pretrained(make_model("llama"), tmp_path, is_trainble=True)
    with pytest.raises(ValueError, match=r"prompt_tuning_init_text=\['a'\] is not text"):
        EPTConfig(prompt_tuning_init="TEXT", prompt_tuning_init_text=["a"])
    config = EPTConfig(**SMALL, prompt_tuning_init="TEXT", prompt_tuning_init_text="a")
    with pytest.raises(ValueError, match="contains token 500, but the model's embedding has 99 rows"):
        get_ept_model(make_model("llama"), config, tokenizer=lambda *_, **__: {"input_ids": [7, 500]})


@pytest.mark.parametrize("change", ["one row", "a row less", "missing"])
def test_weights_of_another_shape_are_refused(change):
    model = adapted("llama")
    state = get_peft_model_state_dict(model)
    state["prompt"] = state["prompt"][: 1 if change == "one row" else -1]
    if change == "missing":
        del state["prompt"]
    before = model.prompt_encoder["default"].prompt.detach().clone()
    with pytest.raises(
        ValueError,
        match=r"prompt is (\[\d, 32\]|missing) in the state, but \[5, 32\] in the adapter: load the adapter's own",
    ):
        set_peft_model_state_dict(model, state)
    assert torch.equal(model.prompt_encoder["default"].prompt, before)


@pytest.mark.parametrize("name", ["B", "embedding_scale"])
def test_a_state_that_lacks_one_weight_changes_none(name):
    model = adapted("llama")
    before = get_peft_model_state_dict(model)
    before = {key: value.detach().clone() for key, value in before.items()}
    state = {key: value + 1 for key, value in before.items() if key != name}
    with pytest.raises(ValueError, match=f"{name} is missing in the state"):
        set_peft_model_state_dict(model, state)
    for key, value in get_peft_model_state_dict(model).items():
        assert torch.equal(value, before[key]), key


@pytest.mark.parametrize("form", ["fewer parts", "folded"])
def test_weights_that_the_adapter_does_not_have_are_refused(form):
    state = get_peft_model_state_dict(adapted("llama"))
    other = adapted("llama") if form == "folded" else adapted("llama", num_spaces=0, fusion=False)
    if form == "folded":
        other.fold()
    before = other(torch.tensor([[5, 6, 7]])).logits
    with pytest.raises(
        ValueError, match=r"the state holds .*D.*, which the adapter does not have: load the adapter's own weights"
    ):
        set_peft_model_state_dict(other, state)
    assert torch.equal(other(torch.tensor([[5, 6, 7]])).logits, before)


@pytest.mark.parametrize("update", ["position", "token"])
@pytest.mark.parametrize("way", ["peft", "torch"])
def test_weights_before_and_after_folding_are_not_taken_for_each_other(way, update):
    """Without spaces and fusion they have the same shapes, but the prompt has another unit."""
    models = [adapted("llama", num_spaces=0, fusion=False, update=update) for _ in range(2)]
    models[1].fold()
    ids = torch.tensor([[5, 6, 7]])
    for source, target in (models, models[::-1]):
        before = target(ids).logits
        load = target.load_state_dict if way == "torch" else partial(set_peft_model_state_dict, target)
        with pytest.raises((ValueError, RuntimeError), match="prompt"):
            load(source.state_dict() if way == "torch" else get_peft_model_state_dict(source))
        assert torch.equal(target(ids).logits, before)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("names", [None, ["default"] * 3])
def test_a_decoders_class_is_that_of_the_last_token_without_a_mask_too(side, names):
    """The model itself finds it by the ids, which it does not get after a prompt."""
    model, batch = adapted("llama_classifier"), make_batch("llama_classifier", (7, 4, 1), side)
    ids = batch["input_ids"]
    masked = model(ids, attention_mask=batch["attention_mask"] if side == "right" else None).logits
    torch.testing.assert_close(model(ids, adapter_names=names).logits, masked)
    bare = adapted("llama_classifier", seed=None, num_virtual_tokens=0, r=1)  # at its start, without an effect
    with torch.no_grad(), bare.disable_adapter():
        expected = bare(ids).logits
    torch.testing.assert_close(bare(ids).logits, expected)


def test_the_cache_of_a_decoder_behind_an_encoder_is_not_that_of_the_text():
    model, batch = adapted("t5"), make_batch("t5")
    ids, mask = batch["input_ids"], batch["attention_mask"]
    start = torch.full((2, 1), PAD)
    first = model(ids, mask, decoder_input_ids=start, use_cache=True)
    following = torch.tensor([[5], [6]])
    whole = model(ids, mask, decoder_input_ids=torch.cat([start, following], dim=1)).logits
    again = model(ids, mask, decoder_input_ids=following, past_key_values=first.past_key_values)
    torch.testing.assert_close(again.logits[:, -1], whole[:, -1], atol=1e-4, rtol=1e-4)
