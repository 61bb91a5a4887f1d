"""EPTModel on the three task types: equalities the method promises, padding, generation, gradients, adapters."""

from __future__ import annotations

import inspect

import peft
import pytest
import torch
from peft import PeftModel
from tiny_models import DECODERS, ONE_A_TASK, SMALL, VOCAB, adapted, make_batch, make_model, randomise
from transformers import GenerationConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from ept import EPTConfig, get_ept_model

# transformers 5.24 calls `cache` what was `past_key_values`.
CACHE = "cache" if "cache" in inspect.signature(LlamaForCausalLM.forward).parameters else "past_key_values"


def logits_of(model, batch):
    with torch.no_grad():
        return model(**{k: v for k, v in batch.items() if k != "labels" or task_type_of(model) != "CAUSAL_LM"}).logits


def task_type_of(model):
    return model.active_peft_config.task_type


@pytest.mark.parametrize("name", ONE_A_TASK)
def test_at_the_start_ept_is_prompt_tuning_bit_for_bit(name):
    batch = make_batch(name)
    ept = logits_of(adapted(name, seed=None), batch)
    pt = logits_of(get_ept_model(make_model(name), EPTConfig.prompt_tuning(5)).eval(), batch)
    dept = logits_of(get_ept_model(make_model(name), EPTConfig.dept(5, 3, max_length=12)).eval(), batch)
    assert torch.equal(ept, pt)
    assert torch.equal(ept, dept)


@pytest.mark.parametrize("fields", [{}, {"fusion_dim": 4}, {"num_spaces": 1}, {"fusion": False}, {"r": 0}], ids=str)
def test_every_variant_starts_as_prompt_tuning(fields):
    batch = make_batch("llama")
    pt = get_ept_model(make_model("llama"), EPTConfig.prompt_tuning(5)).eval()
    assert torch.equal(logits_of(adapted("llama", seed=None, **fields), batch), logits_of(pt, batch))


def real_logits(model, batch, row):
    """Logits of row `row` at its real text tokens, as if it were alone."""
    output = logits_of(model, batch)
    s = output.shape[1] - batch["input_ids"].shape[1]
    return output[row, s:][batch["attention_mask"][row].bool()]


@pytest.mark.parametrize("name", DECODERS)
def test_decoder_logits_do_not_depend_on_padding(name):
    model = adapted(name)
    lengths = (9, 4, 1)
    sides = {side: make_batch(name, lengths, side) for side in ("left", "right")}
    for row, length in enumerate(lengths):
        alone = {k: sides["right"][k][row : row + 1, :length] for k in ("input_ids", "attention_mask")}
        expected = real_logits(model, alone, 0)
        actual = {side: real_logits(model, batch, row) for side, batch in sides.items()}
        torch.testing.assert_close(actual, dict.fromkeys(sides, expected), rtol=1e-5, atol=1e-5)


def test_prompt_stays_inside_a_sliding_window_whatever_the_padding():
    """Window 12: with 20 padding tokens between prompt and text, the prompt would fall out of it."""
    model = adapted("mistral", max_length=40)
    short = make_batch("mistral", (6,), "left")
    padded = make_batch("mistral", (30, 6), "left")
    padded["input_ids"][1, -6:] = short["input_ids"][0]
    torch.testing.assert_close(real_logits(model, padded, 1), real_logits(model, short, 0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["t5", "bart", "bert", "roberta"])
def test_right_padding_changes_nothing_elsewhere(name):
    model = adapted(name)
    batch = make_batch(name, (9, 4))
    for row, length in enumerate((9, 4)):
        alone = {k: v[row : row + 1] for k, v in batch.items()}
        alone |= {k: batch[k][row : row + 1, :length] for k in ("input_ids", "attention_mask")}
        torch.testing.assert_close(logits_of(model, alone)[0], logits_of(model, batch)[row], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["t5", "bert", "roberta", "llama_classifier"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_side_of_padding_changes_nothing(name, side):
    model = adapted(name)
    alone = make_batch(name, (4,))
    batch = make_batch(name, (9, 4), side)
    batch["input_ids"][1, -4 if side == "left" else 0 :][:4] = alone["input_ids"][0]
    batch["labels"][1] = alone["labels"][0]
    torch.testing.assert_close(logits_of(model, batch)[1], logits_of(model, alone)[0], rtol=1e-5, atol=1e-5)


def greedy_by_forward(model, batch, steps, cached):
    """Step-by-step argmax of forwards: whole ones, or one token at a time after a cache."""
    ids, mask = batch["input_ids"], batch["attention_mask"]
    text = mask.clone()
    cache = None
    for _ in range(steps):
        inputs = {"input_ids": ids[:, -1:], CACHE: cache} if cache is not None else {"input_ids": ids}
        if cache is None:
            inputs["text_mask"] = text
        with torch.no_grad():
            output = model(**inputs, attention_mask=mask, use_cache=cached)
        cache = output[CACHE] if cached else None
        ids = torch.cat([ids, output.logits[:, -1].argmax(-1, keepdim=True)], dim=1)
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        text = torch.cat([text, text.new_zeros(len(text), 1)], dim=1)
    return ids


@pytest.mark.parametrize("cached", [True, False], ids=["cache", "no cache"])
@pytest.mark.parametrize("name", DECODERS)
def test_greedy_generation_is_argmax_of_forwards(name, cached):
    model = adapted(name)
    batch = make_batch(name, (8, 3), "left")
    inputs = {k: batch[k] for k in ("input_ids", "attention_mask")}
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    generated = model.generate(**inputs, **options, use_cache=cached)
    assert torch.equal(generated, greedy_by_forward(model, batch, 6, cached))


@pytest.mark.parametrize("name", ["t5", "bart"])
@pytest.mark.parametrize("cached", [True, False], ids=["cache", "no cache"])
def test_seq2seq_generation_is_argmax_of_forwards(name, cached):
    model = adapted(name)
    batch = make_batch(name, (8, 3))
    inputs = {k: batch[k] for k in ("input_ids", "attention_mask")}
    generated = model.generate(
        **inputs, max_new_tokens=5, do_sample=False, use_cache=cached, eos_token_id=None, labels=batch["labels"]
    )
    decoded = torch.full((2, 1), model.config.decoder_start_token_id)
    for _ in range(5):
        with torch.no_grad():
            step = model(**inputs, decoder_input_ids=decoded).logits[:, -1].argmax(-1, keepdim=True)
        decoded = torch.cat([decoded, step], dim=1)
    assert torch.equal(generated, decoded)


@pytest.mark.parametrize(
    "options", [{"num_beams": 3, "do_sample": False}, {"do_sample": True, "num_return_sequences": 3}], ids=str
)
def test_seq2seq_beams_and_samples_score_what_the_forward_says(options):
    model, batch = adapted("t5"), make_batch("t5", (8, 3))
    inputs = {k: batch[k] for k in ("input_ids", "attention_mask")}
    torch.manual_seed(0)
    kept = {"return_dict_in_generate": True, "output_logits": True, "output_scores": True}
    output = model.generate(**inputs, max_new_tokens=4, eos_token_id=None, **options, **kept)
    repeated = {k: v.repeat_interleave(len(output.sequences) // 2, 0) for k, v in inputs.items()}
    with torch.no_grad():
        scored = model(**repeated, decoder_input_ids=output.sequences[:, :-1]).logits
    if "num_beams" in options:
        likelihood = scored.log_softmax(-1).gather(-1, output.sequences[:, 1:, None]).mean((1, 2))
        torch.testing.assert_close(likelihood, output.sequences_scores, rtol=1e-4, atol=1e-5)
    else:
        torch.testing.assert_close(torch.stack(output.logits, dim=1), scored, rtol=1e-4, atol=1e-5)


def test_beams_score_what_the_forward_says():
    """The best of exhaustive beams over two steps is the best pair of tokens by teacher-forced likelihood."""
    model = adapted("llama")
    batch = make_batch("llama", (4,), "left")
    inputs = {k: batch[k] for k in ("input_ids", "attention_mask")}
    best = model.generate(**inputs, num_beams=VOCAB, do_sample=False, max_new_tokens=2, eos_token_id=None)[0, -2:]
    with torch.no_grad():
        first = model(**inputs).logits[0, -1].log_softmax(-1)
        ids = torch.cat([batch["input_ids"].expand(VOCAB, -1), torch.arange(VOCAB)[:, None]], dim=1)
        text = torch.tensor([[1, 1, 1, 1, 0]]).expand(VOCAB, -1)
        second = model(input_ids=ids, text_mask=text).logits[:, -1].log_softmax(-1)
    pair = (first[:, None] + second).flatten().argmax()
    assert best.tolist() == [int(pair) // VOCAB, int(pair) % VOCAB]


def test_max_length_counts_the_text_and_not_the_prompt():
    model = adapted("llama")
    ids = make_batch("llama", (6,))["input_ids"]
    assert model.generate(ids, max_length=9, do_sample=False, eos_token_id=None).shape == (1, 9)
    config = GenerationConfig(max_length=9, do_sample=False, pad_token_id=1)
    assert model.generate(ids, generation_config=config).shape == (1, 9)
    model.base_model.generation_config.max_length = 8
    assert model.generate(ids, do_sample=False, eos_token_id=None).shape == (1, 8)
    assert model.generate(ids, max_new_tokens=4, do_sample=False, eos_token_id=None).shape == (1, 10)
    with pytest.raises(ValueError, match="max_length=6 leaves no room after 6 input tokens"):
        model.generate(ids, max_length=6)


@pytest.mark.parametrize("name", ONE_A_TASK)
def test_fold_changes_nothing(name):
    model = adapted(name)
    batch = make_batch(name, (8, 3), "left" if name == "llama" else "right")
    inputs = {k: batch[k] for k in ("input_ids", "attention_mask")}
    logits, tokens = [], []
    for change in (model.eval, model.fold):
        change()
        logits.append(logits_of(model, batch))
        if name != "bert":
            tokens.append(model.generate(**inputs, max_new_tokens=4, do_sample=False))
    torch.testing.assert_close(*logits, rtol=1e-5, atol=1e-5)
    assert name == "bert" or torch.equal(*tokens)


@pytest.mark.parametrize("name", [*ONE_A_TASK, "gemma", "bart"])
def test_gradients_reach_the_adapter_and_nothing_else(name):
    model = adapted(name, seed=None, fusion_dim=3).train()
    batch = make_batch(name)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    trained = {n: p for n, p in model.named_parameters() if "prompt_encoder" in n or "modules_to_save" in n}
    base = {n: p for n, p in model.named_parameters() if n not in trained}
    assert not any(p.requires_grad or p.grad is not None for p in base.values())
    assert len([n for n in trained if "prompt_encoder" in n]) == 9
    assert all(p.requires_grad and p.grad is not None for p in trained.values())
    # G sits behind U, which is zero in the first step; after two steps every part has moved.
    assert all(p.grad.abs().sum() > 0 for p in trained.values())


def test_base_is_in_eval_mode_while_training_unless_asked_otherwise():
    def training_modules(model):
        return {type(m).__name__ for m in model.train().base_model.modules() if m.training}

    assert training_modules(adapted("t5", model_changes={"dropout_rate": 0.1})) == set()
    assert "T5ForConditionalGeneration" in training_modules(adapted("t5", base_dropout=True))
    assert training_modules(adapted("bert")) == {"HeadsOfRows", "ModuleDict", "Linear"}


def test_noise_of_neftune_reaches_the_text_while_training():
    """The Trainer hooks it to the embedding, whose `training` flag it asks."""
    model, batch = adapted("llama"), make_batch("llama")
    embedding = model.get_input_embeddings()
    embedding.register_forward_hook(lambda module, args, output: output + module.training * torch.rand_like(output))
    for mode in (False, True):
        model.train(mode)
        assert torch.equal(model(**batch).loss, model(**batch).loss) is not mode


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ONE_A_TASK)
def test_a_padded_batch_is_exported(name, side):
    model, batch = adapted(name), make_batch(name, side=side)
    options = {"decoder_input_ids": batch["labels"].clamp(min=0)} if name == "t5" else {}
    options |= {} if name == "bert" else {"use_cache": False}
    inputs = (batch["input_ids"], batch["attention_mask"])
    with torch.no_grad():
        exported = torch.export.export(model, inputs, options, strict=False).module()
        torch.testing.assert_close(exported(*inputs, **options).logits, model(*inputs, **options).logits)


def test_gradient_checkpointing_recomputes_and_gives_the_same_gradients():
    gradients = []
    for checkpointing in (False, True):
        model = adapted("llama")
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        calls = []
        model.base_model.model.layers[0].self_attn.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        model.train()
        model(**make_batch("llama")).loss.backward()
        assert len(calls) == (2 if checkpointing else 1)
        gradients.append([p.grad for p in model.prompt_encoder.parameters()])
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_generates_the_same_while_training_with_gradient_checkpointing(name):
    """Checkpointed layers in training mode drop the cache they are given."""
    model, batch = adapted(name), make_batch(name, (6,))
    options = {"input_ids": batch["input_ids"], "max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    expected = model.generate(**options)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert torch.equal(model.train().generate(**options), expected)
    assert model.base_model.is_gradient_checkpointing


def first_taken_away(labels):
    return labels.masked_fill((labels != -100).cumsum(1) == 1, -100)


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("name", DECODERS)
def test_logits_are_shortened_only_where_asked_for(name, mode):
    model = getattr(adapted(name), mode)()
    batch = make_batch(name, (8, 5), "left")
    whole = model(**batch)
    assert whole.logits.shape[1] == 5 + 8
    kept = model(**batch, logits_to_keep=3)
    torch.testing.assert_close(kept.loss, whole.loss)
    torch.testing.assert_close(kept.logits, whole.logits[:, -3:], rtol=1e-4, atol=1e-5)
    few = model(**batch, logits_to_keep=2)  # of two labels a row, the last
    last = model(**{**batch, "text_mask": batch["labels"] == -100, "labels": first_taken_away(batch["labels"])})
    torch.testing.assert_close(few.loss, last.loss)
    labels = batch.pop("labels")
    text = {**batch, "text_mask": labels == -100}
    picked = model(**text, logits_to_keep=torch.tensor([4, -1])).logits
    torch.testing.assert_close(picked, whole.logits[:, [5 + 4, -1]], rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="logits_to_keep as a tensor ignores where the labels are"):
        model(**batch, labels=labels, logits_to_keep=torch.tensor([4]))


@pytest.mark.parametrize("name", DECODERS)
def test_a_head_gets_contiguous_hidden_states(name):
    """Of others, a CPU's matmul copies the frozen head once for each row of the batch."""
    model, batch = adapted(name).train(), make_batch(name, (8, 5), "left")
    seen = []
    head = model.base_model.get_output_embeddings()
    handle = head.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    model(**batch, logits_to_keep=3)
    handle.remove()
    assert [hidden.shape[1] for hidden in seen] == [3]
    assert seen[0].is_contiguous()


def test_a_model_that_computes_all_logits_has_them_shortened():
    """As FlauBERT and xLSTM, whose forward takes no `logits_to_keep`."""
    model, batch = adapted(), make_batch("llama", (8, 5), "left")
    whole = model(**batch)
    forward = model.base_model.forward

    def without(input_ids=None, attention_mask=None, inputs_embeds=None, labels=None, position_ids=None):
        return forward(input_ids, attention_mask, position_ids, inputs_embeds=inputs_embeds, labels=labels)

    model.base_model.forward = without
    kept = model(**batch, logits_to_keep=3)
    torch.testing.assert_close(kept.loss, whole.loss)
    assert torch.equal(kept.logits, whole.logits[:, -3:])
    last = model(**{**batch, "text_mask": batch["labels"] == -100, "labels": first_taken_away(batch["labels"])})
    torch.testing.assert_close(model(**batch, logits_to_keep=2).loss, last.loss)


def test_a_replaced_forward_is_seen():
    model, batch = adapted(), make_batch("llama")
    seen = []

    def replaced(inputs_embeds, attention_mask, labels=None, answer=None):
        seen.append(inputs_embeds.shape)
        return {"loss": labels.sum(), "answer": answer}

    model.base_model.forward = replaced
    assert model(**batch, answer=5)["answer"] == 5
    assert seen == [(2, 5 + 7, 32)]


@pytest.mark.parametrize("name", [*ONE_A_TASK, "bart", "gpt2"])
def test_return_dict_false_gives_the_same_in_a_tuple(name):
    model, batch = adapted(name), make_batch(name)
    for options in ({}, {"num_items_in_batch": 7}):
        whole = model(**batch, **options, use_cache=False) if name != "bert" else model(**batch, **options)
        plain = model(**batch, **options, return_dict=False)
        assert isinstance(plain, tuple)
        assert torch.equal(plain[0], whole.loss)
        assert torch.equal(plain[1], whole.logits)


@pytest.mark.parametrize("items", [torch.tensor(3), torch.tensor(0), 0], ids=repr)
@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "bart"])
def test_no_label_at_all_is_a_loss_of_zero_with_gradients_of_zero(name, items):
    model, batch = adapted(name).train(), make_batch(name)
    batch["labels"] = torch.full_like(batch["labels"], -100)
    loss = model(**batch, num_items_in_batch=items).loss
    assert loss.item() == 0.0
    loss.backward()
    assert all(p.grad is None or not p.grad.any() for p in model.prompt_encoder.parameters())


def test_the_routers_part_of_the_loss_is_not_divided():
    """Experts add a loss of their own, a mean over the batch, which does not depend on the number of labels."""
    config = MixtralConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, router_aux_loss_coef=0.5, output_router_logits=True,
    )  # fmt: skip
    torch.manual_seed(0)
    model, batch = get_ept_model(MixtralForCausalLM(config), EPTConfig(**SMALL)).eval(), make_batch("llama")
    mean, divided = model(**batch), model(**batch, num_items_in_batch=8)
    other = 0.5 * mean.aux_loss
    torch.testing.assert_close(divided.loss, (mean.loss - other) * 4 / 8 + other)


def test_labels_get_no_update_so_training_and_generation_agree():
    model = adapted("llama")
    batch = make_batch("llama", (8,))
    labelled = model(**batch).logits
    text = (batch["labels"] == -100).long()
    unlabelled = model(**{k: batch[k] for k in ("input_ids", "attention_mask")}, text_mask=text).logits
    assert torch.equal(labelled, unlabelled)
    everything = model(**{k: batch[k] for k in ("input_ids", "attention_mask")}).logits
    assert not torch.allclose(everything, unlabelled)


def test_a_batch_of_labels_alone_is_warned_of_once(recwarn):
    model = adapted("llama").train()
    batch = make_batch("llama")
    batch["labels"] = batch["input_ids"].where(batch["attention_mask"].bool(), -100)
    for _ in range(2):
        model(**batch).loss.backward()
    warned = [str(w.message) for w in recwarn if "every token is a label" in str(w.message)]
    assert len(warned) == 1
    recwarn.clear()
    adapted("llama").train()(**make_batch("llama")).loss.backward()
    assert not any("every token is a label" in str(w.message) for w in recwarn)


@pytest.mark.parametrize("name", [*ONE_A_TASK, "bart", "gpt2", "roberta"])
def test_loss_divided_by_given_number_of_items_sums_over_batches(name):
    """Gradient accumulation needs it: parts add up to the whole, labels of unequal number included."""
    model = adapted(name)
    batch = make_batch(name, (8, 5, 7, 4))
    if batch["labels"].dim() == 2:
        batch["labels"][1, int((batch["labels"][1] != -100).nonzero()[0])] = -100
    items = (batch["labels"] != -100).sum()
    whole = model(**batch).loss
    parts = [model(**{k: v[i : i + 1] for k, v in batch.items()}, num_items_in_batch=items).loss for i in range(4)]
    torch.testing.assert_close(sum(parts), whole)


def test_is_a_peft_model_and_counts_as_one(capsys):
    model = adapted("llama", seed=None)
    assert isinstance(model, PeftModel)
    expected = EPTConfig(**SMALL).parameter_count(32)
    assert model.get_nb_trainable_parameters() == (expected, sum(p.numel() for p in model.parameters()))
    model.print_trainable_parameters()
    assert capsys.readouterr().out.startswith(f"trainable params: {expected:,} || all params: ")


@pytest.mark.parametrize("name", ONE_A_TASK)
def test_disabled_adapter_is_the_bare_model(name):
    bare, batch = make_model(name), make_batch(name)
    model = adapted(name)
    with torch.no_grad():
        expected = bare(**batch).logits
    before = logits_of(model, batch)
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    with model.disable_adapter():
        with torch.no_grad():
            assert torch.equal(model(**batch).logits, expected)
        if name != "bert":
            ids = batch["input_ids"][:1]
            assert torch.equal(*(m.generate(ids, max_new_tokens=3, do_sample=False) for m in (model, bare)))
    assert torch.equal(logits_of(model, batch), before)
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags


@pytest.mark.parametrize("name", ONE_A_TASK)
def test_adapters_can_be_added_set_and_deleted(name):
    model = adapted(name)
    batch = make_batch(name)
    first = logits_of(model, batch)
    model.add_adapter("second", EPTConfig(num_virtual_tokens=2, max_length=12, r=1, seed=5))
    assert torch.equal(logits_of(model, batch), first)  # the active one stays active

    def trainable():
        return {n for n, p in model.named_parameters() if p.requires_grad}

    assert trainable()
    assert not any(".second" in n for n in trainable())
    model.set_adapter("second")
    assert not torch.equal(logits_of(model, batch), first)
    assert trainable()
    assert not any(".default" in n for n in trainable())
    model.set_adapter("default")
    assert torch.equal(logits_of(model, batch), first)
    with pytest.raises(ValueError, match="an adapter named 'default' already exists"):
        model.add_adapter("default", EPTConfig(**SMALL))
    assert torch.equal(logits_of(model, batch), first)  # and is as it was
    model.delete_adapter("second")
    assert list(model.peft_config) == ["default"]
    with pytest.raises(ValueError, match="no adapter is named 'second': the loaded ones are default"):
        model.set_adapter("second")
    with pytest.raises(ValueError, match=r"only one adapter can be active, got \['default', 'second'\]"):
        model.set_adapter(["default", "second"])


def test_the_frozen_model_has_the_dropout_of_the_adapter_that_is_left():
    model = adapted("t5", base_dropout=True)
    model.add_adapter("second", EPTConfig(num_virtual_tokens=2, max_length=12, r=1))
    assert model.train().base_model.training
    with pytest.warns(UserWarning, match="'second' is active now"):
        model.delete_adapter("default")
    assert not model.base_model.training
    model.delete_adapter("second")
    model.add_adapter("third", EPTConfig(**SMALL, base_dropout=True))
    assert model.base_model.training


@pytest.mark.parametrize("name", ONE_A_TASK)
def test_without_an_adapter_the_base_model_is_bare_and_takes_a_new_one(name):
    model = adapted(name)
    batch = make_batch(name)
    model.delete_adapter("default")
    assert (list(model.peft_config), model.active_adapters) == ([], [])
    with torch.no_grad():
        torch.testing.assert_close(model.base_model(**batch).logits, make_model(name)(**batch).logits)
    for call in (lambda: model(**batch), lambda: model.set_adapter("default"), model.fold):
        with pytest.raises(ValueError, match="the model has no adapter: add or load one, or use its base_model"):
            call()
    model.train().add_adapter("new", EPTConfig(**SMALL))
    model(**batch).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    other = adapted(name, seed=None)
    assert torch.equal(logits_of(model.eval(), batch), logits_of(other, batch))


def test_mixed_batch_trains():
    model = adapted("llama")
    model.add_adapter("other", EPTConfig(**SMALL, seed=5))
    randomise(model, seed=3)
    model.set_requires_grad(["default", "other"])
    model.train()(**make_batch("llama", (8, 3), "left"), adapter_names=["other", "default"]).loss.backward()
    assert all(p.grad.abs().sum() > 0 for p in model.prompt_encoder.parameters())


def test_what_cannot_work_is_refused():
    llama, t5 = make_model("llama"), make_model("t5")
    with torch.device("meta"):
        without_weights = LlamaForCausalLM(llama.config)
    not_seq2seq = "SEQ_2_SEQ_LM does not fit LlamaForCausalLM, which is for CAUSAL_LM"
    for model, task_type, message in (
        (llama, "SEQ_2_SEQ_LM", f"task_type={not_seq2seq}"),
        (t5, "CAUSAL_LM", "task_type=CAUSAL_LM does not fit T5ForConditionalGeneration, which is for SEQ_2_SEQ_LM"),
        (adapted("llama"), None, "already carries an adapter: pass the base model, or use its add_adapter"),
        (peft.get_peft_model(make_model("llama"), peft.LoraConfig()), None, "or pass its merge_and_unload"),
        (without_weights, None, "the model is on the meta device: load its weights first"),
        ("gpt2", None, "model is 'gpt2', not a model: load it first"),
        (llama.model, "SEQ_CLS", "task_type=SEQ_CLS does not fit LlamaModel, which is for FEATURE_EXTRACTION"),
    ):
        with pytest.raises(ValueError, match=message):
            get_ept_model(model, EPTConfig(task_type=task_type))
    for config in (None, {"num_virtual_tokens": 3}, peft.LoraConfig()):
        with pytest.raises(ValueError, match=f"takes EPTConfig adapters, got {type(config).__name__}"):
            get_ept_model(llama, config)
    with pytest.raises(ValueError, match="num_virtual_tokens=64 leaves no room for text in the 64 positions of GPT2"):
        get_ept_model(make_model("gpt2"), EPTConfig(num_virtual_tokens=64))
    for name in ("", "a.b", "__base__", "keys"):
        with pytest.raises(ValueError, match=f"an adapter cannot be named '{name}'"):
            get_ept_model(llama, EPTConfig(**SMALL), name)


@pytest.mark.parametrize("family", ["llama", "gemma", "t5", "bert"])  # Gemma's embedding is called, not only read
@pytest.mark.parametrize("strange", [-1, -100, VOCAB])
def test_ids_that_the_embedding_has_no_rows_for_are_named(family, strange):
    model, batch = adapted(family), make_batch(family)
    batch["input_ids"][0, 2] = strange
    with pytest.raises(
        ValueError, match=f"input_ids contain {strange}, but the model's embedding has rows 0 to {VOCAB - 1}"
    ):
        model(**batch)


REFUSED_CALLS = [
    ("llama", (7, 4), {"adapter_names": ["default"]}, "1 names for a batch of 2 rows"),
    (
        "llama",
        (7, 4),
        {"adapter_names": ["default", "none"]},
        "no adapter is named 'none': the loaded ones are default",
    ),
    (
        "gpt2",
        (62,),
        {},
        "5 prompt tokens and 62 text .* make 67 positions, but the model has 64: truncate the text to 59",
    ),
    ("t5", (73, 2), {}, "input has 73 tokens, the adapter was made for max_length=64"),
]


@pytest.mark.parametrize(
    "name, lengths, options, message", REFUSED_CALLS, ids=[case[-1][:30] for case in REFUSED_CALLS]
)
def test_what_a_call_cannot_do_is_named(name, lengths, options, message):
    with pytest.raises(ValueError, match=message):
        adapted(name, max_length=64)(**make_batch(name, lengths), **options)


@pytest.mark.parametrize("name", ["llama", "t5", "gemma3"])
def test_vocabulary_resized_after_wrapping(name):
    """T5's encoder has an embedding module of its own; a resize replaces both."""
    model = get_ept_model(make_model(name), EPTConfig.prompt_tuning(0)).eval()
    model.base_model.resize_token_embeddings(VOCAB + 10, mean_resizing=False)
    batch = make_batch(name, (5, 5))
    batch["input_ids"][0, 0] = VOCAB + 5
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, model.base_model(**batch).logits)


def test_token_types_and_given_positions():
    """BERT's second segment counts; positions are always counted from the mask."""
    bare, model = make_model("bert"), get_ept_model(make_model("bert"), EPTConfig.prompt_tuning(0)).eval()
    batch = make_batch("bert", (5, 5))
    types = torch.tensor([[0, 0, 0, 1, 1]] * 2)
    with torch.no_grad():
        expected = bare(**batch, token_type_ids=types).logits
        assert torch.equal(model(**batch, token_type_ids=types).logits, expected)
        assert not torch.equal(model(**batch).logits, expected)
        with pytest.warns(UserWarning, match="position_ids are counted from the attention mask"):
            assert torch.equal(model(**batch, position_ids=types).logits, model(**batch).logits)
        assert adapted("bert")(**batch, token_type_ids=types).logits.shape == (2, 3)


def test_mask_of_the_wrong_length_after_a_cache_is_refused():
    model, batch = adapted("llama"), make_batch("llama", (5,))
    with torch.no_grad():
        cache = model(**batch, use_cache=True).past_key_values
        with pytest.raises(ValueError, match="covers 4 tokens; with 10 cached positions and 1 new tokens it must"):
            model(input_ids=batch["input_ids"][:, -1:], attention_mask=torch.ones(1, 4), past_key_values=cache)


def learnt(name: str, rms: float) -> float:
    """Share of the loss that 60 steps at the default rate take off, on a model whose embeddings have the given size."""
    base = make_model(name)
    with torch.no_grad():
        head = torch.nn.Parameter(base.get_output_embeddings().weight.clone(), requires_grad=False)
        base.get_output_embeddings().weight = head  # T5 ties it to the embeddings
        head.mul_((1.0 if name == "t5" else 0.2) / head.square().mean().sqrt())  # T5 divides its logits by √d
        embeddings = (m.weight for m in base.modules() if isinstance(m, torch.nn.Embedding))
        for embedding in {weight for weight in embeddings if len(weight) == VOCAB}:
            embedding.mul_(rms / embedding.square().mean().sqrt())
    model = get_ept_model(base, EPTConfig(**SMALL)).train()
    batch = make_batch(name, (8, 6, 7, 5), "left" if name == "llama" else "right")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05, weight_decay=0)
    losses = []
    for _ in range(60):
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return 1 - losses[-1] / losses[0]


@pytest.mark.parametrize("name, rms", [("llama", 0.02), ("t5", 10.0)])
def test_one_rate_teaches_models_of_very_different_embedding_scale(name, rms):
    """embedding_scale='auto': parameters in units of the embeddings' root mean square."""
    assert learnt(name, rms) > 0.05
