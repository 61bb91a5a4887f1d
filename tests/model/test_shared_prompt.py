"""A prompt read once for a batch: logits, loss and gradients of one for each row, with fewer positions to read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from tiny_models import DECODERS, SMALL, adapted, make_batch, make_model, randomise

from ept import EPTConfig, EPTModel
from ept.model import ept_model, packing
from ept.model.packing import Packing, packing_of

# Windowed attention, or positions by index: padding may not stand between prompt and text.
ONLY_ONE_LENGTH = ["mistral", "gemma3"]
READ_BEFORE = [*ONLY_ONE_LENGTH, "bloom"]  # which read no mask of pairs of positions, or not with what it adds to one
BATCHES = {"left": ((8, 3, 5), "left"), "right": ((8, 3, 5), "right"), "equal": ((6, 6, 6), "left")}


def step(model, batch):
    """Takes logits, loss and gradients of one training step, of all positions of the text unless told otherwise."""
    model.zero_grad()
    output = model(**{"logits_to_keep": batch["input_ids"].shape[1], **batch})
    output["loss"].backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return output["logits"].detach(), output["loss"].detach(), gradients


def same(gradient, expected):
    """The layer's own part is in float32: what comes of it has its rounding."""
    assert (gradient - expected).norm() <= 1e-4 * expected.norm()


@contextmanager
def positions_read(model) -> Iterator[list[tuple[int, int]]]:
    """Collects rows and columns of every call of the frozen model."""
    read = list[tuple[int, int]]()

    def hook(module, arguments, given):
        read.append(tuple(given["inputs_embeds"].shape[:2]))

    handle = model.base_model.register_forward_pre_hook(hook, with_kwargs=True)
    yield read
    handle.remove()


@pytest.fixture(params=["side by side", "read before"])
def side_by_side(request, monkeypatch):
    """Has all texts read side by side where they can be, or none; what pays is another question."""
    packs = request.param == "side by side"
    monkeypatch.setattr(
        ept_model, "packing_of", lambda texts, s, n, *others: Packing(texts, texts, s, n) if packs else None
    )
    return packs


@pytest.mark.parametrize("kind, masked", [*((kind, True) for kind in BATCHES), ("equal", False)])
@pytest.mark.parametrize("name", DECODERS)
def test_same_step_as_with_a_prompt_for_each_row(name, kind, masked, side_by_side):
    lengths, side = BATCHES[kind]
    model, batch = adapted(name).train(), make_batch(name, lengths, side)
    tolerance = 1e-4
    if name != "bloom":  # whose biases and mask add up to -inf in float64
        model, tolerance = model.double(), 1e-9
    if not masked:
        del batch["attention_mask"]
    expected = step(model, batch)
    model.share_prompt()
    with positions_read(model) as read:
        logits, loss, gradients = step(model, batch)
    n, s = max(lengths), SMALL["num_virtual_tokens"]
    if side_by_side and name not in READ_BEFORE:
        assert read == [(1, s + 3 * n)]
    else:
        assert read == ([(3, s + n)] if masked and name in ONLY_ONE_LENGTH else [(1, s), (3, n)])
    real = batch.get("attention_mask", torch.ones(3, n)).bool()
    torch.testing.assert_close(logits[real], expected[0][real], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(loss, expected[1], rtol=tolerance, atol=tolerance)
    assert gradients.keys() == expected[2].keys()
    for parameter, gradient in gradients.items():
        assert gradient.abs().max() > 0, parameter
        same(gradient, expected[2][parameter])


@pytest.mark.parametrize("options", [{}, {"logits_to_keep": 10}, {"return_dict": False}], ids=str)
def test_the_prompts_logits_stand_before_the_texts_as_ever(options, side_by_side):
    """As a plain Trainer calls it; 10 are the text's 8 and two of the prompt's."""
    model, batch = adapted().double().train(), {**make_batch("llama", (8, 8)), **options}
    expected = model(**batch, num_items_in_batch=3)
    model.share_prompt()
    with positions_read(model) as read:
        output = model(**batch, num_items_in_batch=3)
    assert read == ([(1, 21)] if side_by_side else [(1, 5), (2, 8)])
    assert output[1].shape == (2, options.get("logits_to_keep", 13), expected[1].shape[2])
    torch.testing.assert_close(output[:2], expected[:2], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("fields", [{"update": "token"}, {"r": 0}, {"update_scope": "all"}, {"num_spaces": 0}], ids=str)
def test_every_form_of_the_adapter_and_half_of_the_positions(fields, side_by_side):
    model, batch = adapted(**fields).double().train(), make_batch("llama", (8, 6), "left")
    for logits_to_keep in (3, 6):  # of 8
        given = {**batch, "logits_to_keep": logits_to_keep}
        model._shared_from = None
        expected = model(**given)
        model.share_prompt()
        output = model(**given)
        assert output.logits.shape == expected.logits.shape == (2, logits_to_keep, expected.logits.shape[-1])
        torch.testing.assert_close(output.logits, expected.logits, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(output.loss, expected.loss, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("s", [12, 20], ids=["as long as the window", "longer than the window"])
@pytest.mark.parametrize("name", ["mistral", "gemma3"])
def test_prompt_that_fills_a_sliding_window(name, s):
    model, batch = adapted(name, num_virtual_tokens=s).double().train(), make_batch(name, (6, 6))
    del batch["attention_mask"]
    expected = step(model, batch)
    model.share_prompt()
    with positions_read(model) as read:
        logits, loss, gradients = step(model, batch)
    assert read == [(1, s), (2, 6)]
    torch.testing.assert_close((logits, loss), expected[:2], rtol=1e-9, atol=1e-9)
    for parameter, gradient in gradients.items():
        same(gradient, expected[2][parameter])


AS_BEFORE = [
    {"logits_to_keep": torch.tensor([2, 3]), "labels": None, "text_mask": torch.ones(2, 8)},
    {"logits_to_keep": 2, "use_cache": True},
    {"logits_to_keep": 2, "output_hidden_states": True},
    {"logits_to_keep": 2, "token_type_ids": torch.ones(2, 8, dtype=torch.int64)},
    {"logits_to_keep": 2, "adapter_names": ["default", "__base__"]},
]


@pytest.mark.parametrize("options", AS_BEFORE, ids=lambda options: ", ".join(options) or "nothing")
def test_calls_that_want_more_of_the_prompt_are_as_before(options):
    name = "gpt2" if "token_type_ids" in options else "llama"
    model, batch = adapted(name), {**make_batch(name, (8, 3), "left"), **options}
    expected = model(**batch)
    model.share_prompt()
    with positions_read(model) as read:
        output = model(**batch)
    assert read == [(2, 13)]
    assert torch.equal(output.logits, expected.logits)
    assert len(output.get("hidden_states") or ()) == len(expected.get("hidden_states") or ())


def test_tokens_after_a_cache_and_generation_are_as_before():
    model, batch = adapted(), make_batch("llama", (8, 3), "left")
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    inputs["text_mask"] = inputs["attention_mask"]
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    expected = model.generate(**inputs, **options)
    model.share_prompt()
    assert torch.equal(model.generate(**inputs, **options), expected)
    assert torch.equal(model.generate(**inputs, **options, use_prompt_cache=True), expected)
    output = model(**inputs, use_cache=True)
    following = {"input_ids": batch["input_ids"][:, -1:], "attention_mask": torch.ones(2, 9, dtype=torch.int64)}
    following["attention_mask"][:, :8] = batch["attention_mask"]
    assert model(**following, past_key_values=output.past_key_values, logits_to_keep=1).logits.shape[:2] == (2, 1)


@pytest.mark.filterwarnings("ignore:.*needs.*in training mode")
def test_checkpointed_layers_and_dropout_have_a_prompt_for_each_row(side_by_side):
    batch = make_batch("llama", (8, 3), "left")
    model = adapted().double().share_prompt().train()
    expected = step(model, batch)
    model.base_model.gradient_checkpointing_enable()
    model.train()
    with positions_read(model) as read:
        _, loss, gradients = step(model, batch)
    assert set(read) == {(2, 13)}
    torch.testing.assert_close(loss, expected[1], rtol=1e-9, atol=1e-9)
    for parameter, gradient in gradients.items():
        same(gradient, expected[2][parameter])
    model = adapted("gpt2", base_dropout=True, model_changes={"attn_pdrop": 0.5}).share_prompt()
    for training, shape in ((True, [(2, 13)]), (False, [(1, 21)] if side_by_side else [(1, 5), (2, 8)])):
        with positions_read(model.train(training)) as read:
            model(**batch, logits_to_keep=2)
        assert read == shape


def test_a_call_that_saves_too_little_is_as_before(monkeypatch):
    monkeypatch.setattr(ept_model, "packing_of", lambda *sizes: None)
    model, batch = adapted().share_prompt(least=10), make_batch("llama", (8, 3, 5), "left")
    for rows, expected in ((3, [(1, 5), (3, 8)]), (2, [(2, 13)]), (1, [(1, 13)])):
        with positions_read(model) as read:
            model(**{name: value[:rows] for name, value in batch.items()}, logits_to_keep=2)
        assert read == expected


SIZES = [
    ((8, 12, 20, 576), 4),  # headlines in SmolLM2-135M
    ((3, 12, 20, 576), 3),
    ((4, 12, 20, 576), 4),
    ((40, 12, 24, 576), None),  # a call for the prompt alone costs less than 40 texts' places in several rows
    ((2, 400, 600, 64), None),
    ((1, 12, 20, 576), None),
    ((8, 0, 20, 576), None),
]


@pytest.mark.parametrize("sizes, per_row", SIZES, ids=str)
def test_as_many_texts_a_row_as_pay(sizes, per_row):
    packed = packing_of(*sizes, call=64)
    assert packing_of(*sizes, call=64, longest=31) is None  # as many as stand in the model's table of positions
    assert packed is None if per_row is None else packed is not None and packed.per_row == per_row
    if packed is not None:
        texts, s, n, _ = sizes
        assert packed.rows * packed.per_row >= texts > (packed.rows - 1) * packed.per_row
        assert s + packed.per_row * n <= 1024


def test_texts_in_several_rows_and_a_place_that_none_takes(monkeypatch):
    model, batch = adapted().double().train(), make_batch("llama", (8, 3, 5, 7, 4), "left")
    expected = step(model, batch)
    model.share_prompt()
    monkeypatch.setattr(ept_model, "packing_of", lambda texts, s, n, *others: Packing(texts, 2, s, n))
    with positions_read(model) as read:
        logits, loss, gradients = step(model, batch)
    assert read == [(3, 21)]
    real = batch["attention_mask"].bool()
    torch.testing.assert_close((logits[real], loss), (expected[0][real], expected[1]), rtol=1e-9, atol=1e-9)
    for parameter, gradient in gradients.items():
        same(gradient, expected[2][parameter])


def test_attention_that_reads_no_such_masks_has_the_prompt_read_before(monkeypatch):
    monkeypatch.setattr(ept_model, "packing_of", lambda texts, s, n, *others: Packing(texts, texts, s, n))
    model, batch = adapted().share_prompt(), make_batch("llama", (8, 3), "left")
    model.base_model.config._attn_implementation = "eager"
    monkeypatch.setattr(packing, "_READS_MASKS", ("sdpa",))
    with positions_read(model) as read:
        model(**batch, logits_to_keep=2)
    assert read == [(1, 5), (2, 8)]


def test_rows_without_a_token_are_as_before():
    model, ids = adapted(), torch.zeros(3, 0, dtype=torch.int64)
    expected = model(ids).logits
    assert torch.equal(model.share_prompt()(ids).logits, expected)


def test_compiled_layers_end_it():
    model, batch = adapted().share_prompt(), make_batch("llama", (8, 3), "left")
    model.compile_layers(backend="eager")
    with positions_read(model) as read:
        model(**batch, logits_to_keep=2)
    assert read == [(2, 13)]


REFUSED = [
    (
        "t5",
        {},
        "changes with the text after it and cannot be read once for a batch: share_prompt is for decoder-only models",
    ),
    ("bert", {}, "changes with the text after it"),
    (
        "llama",
        {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
        r"depends on the length of the whole text \(dynamic RoPE\)",
    ),
    ("gemma3", {"use_bidirectional_attention": True}, "reads texts differently after a prompt that they share"),
]


@pytest.mark.parametrize("name, changes, message", REFUSED, ids=[message[:30] for *_, message in REFUSED])
def test_refused_where_it_could_not_be_the_same(name, changes, message):
    model = EPTModel(make_model(name, **changes), EPTConfig(**SMALL)).eval()
    with pytest.raises(ValueError, match=message):
        model.share_prompt()
    assert not model.shares_prompt


def test_a_model_that_keeps_other_things_of_a_position_is_refused():
    from transformers import MambaConfig, MambaForCausalLM

    base = MambaForCausalLM(MambaConfig(vocab_size=40, hidden_size=16, num_hidden_layers=2, state_size=4))
    model = EPTModel(base, EPTConfig(**SMALL))
    with pytest.raises(ValueError, match="MambaForCausalLM"):
        model.share_prompt()


def test_several_adapters_each_share_their_own():
    model, batch = adapted(), make_batch("llama", (8, 3), "left")
    model.add_adapter("other", EPTConfig(num_virtual_tokens=3, max_length=12, r=1, seed=5))
    model.add_adapter("none", EPTConfig(num_virtual_tokens=0, max_length=12, r=1, fusion=False, num_spaces=0))
    randomise(model, seed=3)
    for adapter in ("default", "other", "none"):
        model.set_adapter(adapter, inference_mode=True)
        model._shared_from = None
        expected = model(**batch, logits_to_keep=3).logits
        model.share_prompt()
        torch.testing.assert_close(model(**batch, logits_to_keep=3).logits, expected, rtol=1e-4, atol=1e-4)
