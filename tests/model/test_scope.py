"""Which tokens get the update: input text alone, or all of them, in training, scoring and generation alike."""

from __future__ import annotations

import inspect
import warnings

import pytest
import torch
from tiny_models import DECODERS, SMALL, VOCAB, adapted, make_batch, make_model, randomise
from transformers import LlamaForCausalLM, MambaConfig, MambaForCausalLM, Trainer, TrainingArguments

from ept import EPTConfig, EPTModel, get_ept_model

# transformers 5.24 calls `cache` what was `past_key_values`.
CACHE = "cache" if "cache" in inspect.signature(LlamaForCausalLM.forward).parameters else "past_key_values"
GREEDY = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "eos_token_id": None}


def inputs_for(name, lengths=(6, 3), side="left"):
    batch = make_batch(name, lengths, side)
    return {k: batch[k] for k in ("input_ids", "attention_mask")}


def continued(inputs, sequences):
    """Inputs for the whole of what was generated."""
    new = sequences.shape[1] - inputs["input_ids"].shape[1]
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, new), value=1)
    return {"input_ids": sequences, "attention_mask": mask}


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("name", DECODERS)
def test_with_all_any_scorer_agrees_with_generation(name, cache):
    """Without labels and masks; the last tokens lie beyond max_length and have no update."""
    model, inputs = adapted(name, update_scope="all", max_length=10), inputs_for(name)
    options = {**GREEDY, "return_dict_in_generate": True, "output_logits": True, "cache_implementation": cache}
    generated = model.generate(**inputs, **options)
    with torch.no_grad():
        scored = model(**continued(inputs, generated.sequences)).logits
    expected = torch.stack(generated.logits, dim=1)
    torch.testing.assert_close(scored[:, -7:-1], expected, rtol=1e-4, atol=1e-5)
    text = adapted(name, max_length=10).generate(**inputs, **GREEDY, return_dict_in_generate=True, output_logits=True)
    torch.testing.assert_close(text.logits[0], generated.logits[0])
    assert not torch.allclose(text.logits[1], generated.logits[1])


def test_with_all_a_model_without_positions_and_keys_agrees_too():
    """Mamba's cache does not say how many tokens it has seen."""
    config = MambaConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=1, state_size=4, pad_token_id=1)
    model = get_ept_model(MambaForCausalLM(config), EPTConfig(**SMALL, update_scope="all")).eval()
    randomise(model)
    inputs = inputs_for("llama", (4, 4))
    generated = model.generate(**inputs, **GREEDY, return_dict_in_generate=True, output_logits=True)
    with torch.no_grad():
        scored = model(generated.sequences).logits[:, -7:-1]
    torch.testing.assert_close(scored, torch.stack(generated.logits, dim=1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3, "do_sample": False, "output_scores": True},
        {"do_sample": True, "num_return_sequences": 2},
        {"use_prompt_cache": True, "do_sample": False},
        {"cache_implementation": "static", "do_sample": False},
    ],
    ids=["beams", "samples", "prompt cache", "static cache"],
)
def test_with_all_generation_however_it_searches(options):
    model, inputs = adapted("llama", update_scope="all", max_length=10), inputs_for("llama")
    torch.manual_seed(0)
    options = {**GREEDY, "return_dict_in_generate": True, "output_logits": True, **options}
    output = model.generate(**inputs, **options)
    copies = len(output.sequences) // 2
    repeated = {k: v.repeat_interleave(copies, 0) for k, v in inputs.items()}
    with torch.no_grad():
        scored = model(**continued(repeated, output.sequences)).logits[:, -7:-1]
    if "num_beams" in options:
        likelihood = scored.log_softmax(-1).gather(-1, output.sequences[:, 6:, None]).sum((1, 2)) / 6
        torch.testing.assert_close(likelihood, output.sequences_scores, rtol=1e-4, atol=1e-5)
    else:
        torch.testing.assert_close(torch.stack(output.logits, dim=1), scored, rtol=1e-4, atol=1e-5)


def test_with_all_each_row_of_a_mixed_batch_has_its_own_scope():
    model = adapted("llama", update_scope="all", max_length=10)
    model.add_adapter("text", EPTConfig(**{**SMALL, "num_virtual_tokens": 3}, seed=5))
    randomise(model, seed=3)
    inputs, names = inputs_for("llama", (6, 3, 5)), ["text", "default", "__base__"]
    mixed = model.generate(**inputs, **GREEDY, adapter_names=names)
    for row, name in enumerate(names):
        alone = {k: v[row : row + 1] for k, v in inputs.items()}
        if name == "__base__":
            with model.disable_adapter():
                expected = model.generate(**alone, **GREEDY)
        else:
            model.set_adapter(name, inference_mode=True)
            expected = model.generate(**alone, **GREEDY)
        assert torch.equal(mixed[row], expected[0])


@pytest.mark.parametrize("scope", ["text", "all"])
@pytest.mark.parametrize("name", ["llama", "mistral", "bloom"])
def test_token_by_token_after_a_cache_is_as_in_one_go(name, scope):
    """With `text`, a text mask says which of the tokens behind the cache are text: those of a further turn."""
    model, inputs = adapted(name, update_scope=scope, max_length=16), inputs_for(name, (12, 12))
    text = torch.ones_like(inputs["input_ids"])
    text[:, 7:9] = 0
    with torch.no_grad():
        whole = model(**inputs, text_mask=text).logits
        cache, steps = None, []
        for begin, end in ((0, 6), (6, 9), (9, 10), (10, 12)):
            given = {"input_ids": inputs["input_ids"][:, begin:end], "text_mask": text[:, begin:end]}
            output = model(**given, attention_mask=inputs["attention_mask"][:, :end], **{CACHE: cache}, use_cache=True)
            cache = output[CACHE]
            steps.append(output.logits[:, begin - end :])
    torch.testing.assert_close(torch.cat(steps, dim=1), whole[:, 5:], rtol=1e-4, atol=1e-5)


def test_cache_of_a_mixed_batch_knows_the_prompts_of_its_rows():
    model = adapted("llama", max_length=16)
    model.add_adapter("short", EPTConfig(**{**SMALL, "num_virtual_tokens": 2}, seed=5))
    randomise(model, seed=3)
    inputs, names = inputs_for("llama", (6, 4)), ["short", "default"]
    text = inputs["attention_mask"].clone()
    text[:, -1] = 0
    with torch.no_grad():
        whole = model(**inputs, text_mask=text, adapter_names=names).logits[:, -1]
        first = {"input_ids": inputs["input_ids"][:, :-1], "attention_mask": inputs["attention_mask"][:, :-1]}
        cache = model(**first, adapter_names=names, use_cache=True)[CACHE]
        last = {"input_ids": inputs["input_ids"][:, -1:], "attention_mask": inputs["attention_mask"], CACHE: cache}
        step = model(**last, adapter_names=names).logits[:, -1]
    torch.testing.assert_close(step, whole, rtol=1e-4, atol=1e-5)


def test_positions_count_every_real_token_before_the_last_text_token():
    """A hole in the text mask gets no update, and the text behind it the rows of A that follow."""
    model, inputs = adapted("llama", r=3, num_virtual_tokens=0, fusion=False, num_spaces=0), inputs_for("llama", (7, 5))
    text = inputs["attention_mask"].clone()
    text[:, 3:5] = 0
    layer = model.prompt_encoder["default"]
    embeds, _, _ = layer(**inputs, text_mask=text)
    C = layer.position_table()
    plain = model.get_input_embeddings()(inputs["input_ids"])
    for row, pads in enumerate((0, 2)):
        for column in range(7):
            update = C[column - pads] if text[row, column] else 0
            torch.testing.assert_close(embeds[row, column], plain[row, column] + update)


def messages_of(call):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [str(w.message) for w in caught if "which tokens are input text" in str(w.message)]


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_a_scorer_that_cannot_tell_text_from_answer_is_warned_of_once(mode):
    model, inputs = getattr(adapted("llama"), mode)(), inputs_for("llama")
    assert messages_of(lambda: model(**make_batch("llama"))) == []
    assert messages_of(lambda: model(**inputs, text_mask=inputs["attention_mask"])) == []
    assert messages_of(lambda: model(**inputs, logits_to_keep=1)) == []
    assert messages_of(lambda: model.generate(**inputs, max_new_tokens=2)) == []
    (message,) = messages_of(lambda: model(**inputs))
    assert "pass text_mask" in message
    assert "labels" in message
    assert 'update_scope="all"' in message
    assert messages_of(lambda: model(**inputs)) == []
    for other in (adapted("llama", update_scope="all"), adapted("llama", r=0)):
        assert messages_of(lambda other=other: other(**inputs)) == []


def test_scope_is_checked_saved_and_loaded(tmp_path):
    with pytest.raises(ValueError, match="update_scope must be one of text, all, got 'some'"):
        EPTConfig(update_scope="some")
    model, inputs = adapted("llama", update_scope="all", max_length=10), inputs_for("llama")
    model.save_pretrained(tmp_path)
    again = EPTModel.from_pretrained(make_model("llama"), tmp_path)
    assert again.active_peft_config.update_scope == "all"
    expected = model.generate(**inputs, **GREEDY)
    assert torch.equal(again.generate(**inputs, **GREEDY), expected)
    assert torch.equal(again.fold().generate(**inputs, **GREEDY), expected)


def test_with_all_a_long_text_is_taken_as_far_as_there_are_rows():
    model, inputs = adapted("t5", update_scope="all", max_length=4), inputs_for("t5", (9,), "right")
    text = torch.tensor([[1] * 4 + [0] * 5])
    layer, other = model.prompt_encoder["default"], adapted("t5", max_length=9).prompt_encoder["default"]
    with torch.no_grad():
        other.prompt.copy_(layer.prompt)
        plain = other(**inputs)[0][:, 9:]
    assert torch.equal(layer(**inputs)[0][:, 9:], model.base_model.shared(inputs["input_ids"])[:, 4:])
    assert not torch.equal(plain, layer(**inputs)[0][:, 9:])
    assert model(**inputs, labels=text[:, :2]).loss.isfinite()


def test_text_mask_reaches_the_model_through_the_trainer(tmp_path):
    """Every token a label: a text mask alone tells what is text, and the Trainer drops its column unless told."""
    batch = make_batch("llama", (8, 8), "left")
    batch["labels"], batch["text_mask"] = batch["input_ids"].clone(), torch.tensor([[1] * 5 + [0] * 3] * 2)
    rows = [{k: v[i] for k, v in batch.items()} for i in range(2)]
    model = adapted("llama")
    arguments = {"output_dir": str(tmp_path), "use_cpu": True, "report_to": "none", "remove_unused_columns": False}
    trainer = Trainer(model, TrainingArguments(**arguments), eval_dataset=rows)
    with torch.no_grad():
        expected = float(model(**batch).loss)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)
    with torch.no_grad():
        assert float(model(**{k: v for k, v in batch.items() if k != "text_mask"}).loss) != pytest.approx(expected)


@pytest.mark.parametrize("names", [None, ["short", "default"], ["__base__", "short"]], ids=str)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["t5", "bart"])
def test_reused_encoder_outputs_are_read_as_they_were_made(name, side, names):
    model = adapted(name)
    model.add_adapter("short", EPTConfig(**{**SMALL, "num_virtual_tokens": 2}, seed=5))
    randomise(model, seed=3)
    batch = make_batch(name, (8, 3), side)
    with torch.no_grad():
        first = model(**batch, adapter_names=names)
        reused = {"encoder_outputs": (first.encoder_last_hidden_state,), "labels": batch["labels"]}
        again = model(**reused, attention_mask=batch["attention_mask"], adapter_names=names)
        torch.testing.assert_close(again.logits, first.logits, rtol=1e-5, atol=1e-5)
    reused["encoder_outputs"] = (first.encoder_last_hidden_state[:, :8],)
    with pytest.raises(ValueError, match=r"encoder_outputs have 8 rows, but [25] prompt tokens and 8 text tokens make"):
        model(**reused, attention_mask=batch["attention_mask"], adapter_names=names)


def test_rows_of_labels_alone_may_train_with_all(recwarn):
    model, batch = adapted("llama", update_scope="all").train(), make_batch("llama")
    batch["labels"] = batch["input_ids"].where(batch["attention_mask"].bool(), -100)
    model(**batch).loss.backward()
    assert model.prompt_encoder["default"].A.grad[:7].abs().sum(1).all()
    assert not any("every token is a label" in str(w.message) for w in recwarn)
