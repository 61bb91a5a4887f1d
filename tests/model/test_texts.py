"""Rows with several texts or answers: every token is read as generation reads it, whatever shares its row."""

from __future__ import annotations

import functools

import pytest
import torch
from tiny_models import SMALL, VOCAB, adapted, make_batch, randomise
from torch.nn.functional import cross_entropy

from ept import EPTConfig

# Rows of turns (tokens of text, tokens of answer); a packed row has several texts.
CONVERSATIONS = {
    "two answers": [[(3, 2), (2, 2)]],
    "beside rows with one and none": [[(3, 2), (2, 2)], [(4, 3)], [(6, 0)]],
    "three, the last turn open": [[(2, 1), (1, 3), (2, 0)], [(1, 1), (1, 1), (1, 1)]],
}
PACKED = {
    "two texts": [[[(3, 2)], [(2, 2)]]],
    "of one token, of several answers": [[[(1, 0)], [(2, 1), (1, 2)], [(3, 1)]]],
    "two rows": [[[(3, 2)], [(2, 2)]], [[(5, 1)]]],
}


def make_rows(texts, side="right"):
    """Ids, mask, labels and position ids of rows of texts, and each text's `(row, first column, turns)`."""
    generator = torch.Generator().manual_seed(0)
    lengths = [sum(t + a for text in row for t, a in text) for row in texts]
    n = max(lengths)
    batch = {"input_ids": torch.ones(len(texts), n, dtype=torch.int64), "attention_mask": torch.zeros(len(texts), n)}
    batch["labels"] = torch.full((len(texts), n), -100)
    batch["position_ids"] = torch.zeros(len(texts), n, dtype=torch.int64)
    places = []
    for row, (length, row_texts) in enumerate(zip(lengths, texts)):
        column = n - length if side == "left" else 0
        batch["input_ids"][row, column : column + length] = torch.randint(4, VOCAB, (length,), generator=generator)
        batch["attention_mask"][row, column : column + length] = 1
        for turns in row_texts:
            places.append((row, column, turns))
            start = column
            for text, answer in turns:
                column += text + answer
                batch["labels"][row, column - answer : column] = batch["input_ids"][row, column - answer : column]
            batch["position_ids"][row, start:column] = torch.arange(column - start)
    return batch, places


@torch.no_grad()
def generated_logits(model, ids, text):
    """Logits after each of the tokens from the last of the text on, `[tokens, vocabulary]`, one token at a time."""
    mask = (torch.arange(len(ids)) < text).long()
    steps = range(text, len(ids) + 1)
    return torch.stack([model(ids[None, :end], text_mask=mask[None, :end]).logits[0, -1] for end in steps])


def check(model, batch, places, s=5):
    output = model(**batch)
    assert output.logits.shape[:2] == (len(batch["input_ids"]), s + batch["input_ids"].shape[1])
    losses = []
    for row, column, turns in places:
        end = 0
        for text, answer in turns:
            begin, end = end, end + text + answer
            if answer:
                ids = batch["input_ids"][row, column : column + end]
                expected = generated_logits(model, ids, begin + text)[:-1]
                actual = output.logits[row, s + column + begin + text - 1 : s + column + end - 1]
                torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
                losses.append(-expected.log_softmax(-1).gather(1, ids[begin + text :, None]))
    torch.testing.assert_close(output.loss, torch.cat(losses).mean())
    divided = model(**batch, num_items_in_batch=10).loss
    torch.testing.assert_close(divided, torch.cat(losses).sum() / 10)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("rows", CONVERSATIONS.values(), ids=CONVERSATIONS)
def test_each_answer_is_trained_as_it_is_generated(rows, side):
    batch, places = make_rows([[turns] for turns in rows], side)
    check(adapted("llama", max_length=16), batch, places)
    del batch["position_ids"]
    check(adapted("bloom", max_length=16), batch, places)


@pytest.mark.parametrize("mask", ["no mask", "mask"])
@pytest.mark.parametrize("rows", PACKED.values(), ids=PACKED)
def test_packed_texts_are_read_as_if_alone(rows, mask):
    batch, places = make_rows(rows)
    if mask == "no mask":
        del batch["attention_mask"]
    check(adapted("llama", max_length=16), batch, places)


def test_packing_of_prompt_tuning_and_of_each_rows_adapter():
    batch, places = make_rows(PACKED["two rows"])
    check(adapted("gpt2", r=0), batch, places)
    model = adapted("llama", max_length=16)
    model.add_adapter("other", EPTConfig(**{**SMALL, "num_virtual_tokens": 3, "max_length": 16}, seed=5))
    randomise(model, seed=3)
    mixed = model(**batch, adapter_names=["other", "default"]).logits
    model.set_adapter("default")
    torch.testing.assert_close(mixed[1, :11], model(**{k: v[1:] for k, v in batch.items()}).logits[0, :11])
    model.set_adapter("other")
    alone = model(**{k: v[:1] for k, v in batch.items()}).logits[0, 3:]
    torch.testing.assert_close(mixed[0, 5:], alone, rtol=1e-5, atol=1e-5)


def test_what_packing_hands_over_beside_is_understood():
    """TRL's and transformers' padding-free collators: sequence lengths, and padding at position 0."""
    batch, _ = make_rows(PACKED["two texts"])
    model, lengths = adapted("llama"), torch.tensor([0, 5, 9], dtype=torch.int32)
    del batch["attention_mask"]
    expected = model(**batch)
    more = {"cu_seq_lens_q": lengths, "cu_seq_lens_k": lengths, "max_length_q": 5, "max_length_k": 5}
    more["seq_idx"] = torch.tensor([[0] * 5 + [1] * 4], dtype=torch.int32)
    assert torch.equal(model(**batch, **more).logits, expected.logits)
    fill = {"input_ids": 1, "labels": -100, "position_ids": 0}
    padded = {k: torch.nn.functional.pad(v, (0, 3), value=fill[k]) for k, v in batch.items()}
    torch.testing.assert_close(model(**padded).logits[:, :-3], expected.logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model(**padded).loss, expected.loss)


def test_outputs_about_the_next_token_are_put_together_too():
    """A head that returns a log-probability for each token but the last, as TRL's does; 0 where none is asked for."""
    batch, _ = make_rows(PACKED["of one token, of several answers"])
    model = adapted("llama", max_length=16)
    logits, forward = model(**batch).logits, model.base_model.forward

    @functools.wraps(forward)
    def scores(*args, labels, **kwargs):
        found = forward(*args, **kwargs).logits[:, :-1].log_softmax(-1)
        scored = found.gather(-1, labels[:, 1:].clamp(min=0)[..., None])[..., 0]
        return {"log_probs": scored.masked_fill(labels[:, 1:] == -100, 0)}

    model.base_model.forward = scores
    log_probs = model(**batch)["log_probs"]
    expected = logits[:, 4:-1].log_softmax(-1).gather(-1, batch["labels"].clamp(min=0)[..., None])[..., 0]
    expected = expected.masked_fill(batch["labels"] == -100, 0)
    torch.testing.assert_close(log_probs[:, 4:], expected, rtol=1e-5, atol=1e-5)


REFUSED = [
    ({"position_ids": torch.tensor([[0, 1, 3, 4, 5, 6, 7]])}, "position_ids must rise by 1 from token to token"),
    ({"labels": torch.full((1, 3), -100)}, r"labels must have the shape of the input, without the prompt, \[1, 7\]"),
    (
        {"position_ids": torch.tensor([[0, 1, 2, 0, 1, 2, 3]]), "output_attentions": True},
        "are read one by one: leave out output_attentions",
    ),
]


@pytest.mark.parametrize("changes, message", REFUSED, ids=[message[:30] for _, message in REFUSED])
def test_what_cannot_be_taken_apart_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        adapted("llama")(**{**make_batch("llama", (7,)), **changes})


@pytest.mark.parametrize("rows", [*CONVERSATIONS.values(), [[(4, 3)], [(2, 2)]]], ids=[*CONVERSATIONS, "one answer"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("is_packed", [False, True])
def test_the_loss_is_of_what_the_kept_positions_predict(rows, side, is_packed):
    """However a batch is read: what is an answer does not change with the number of logits."""
    batch, _ = make_rows([rows] if is_packed else [[turns] for turns in rows], side)
    if not is_packed:
        del batch["position_ids"]
    model, labels = adapted("llama", max_length=16), batch["labels"]
    n = labels.shape[1]
    model.share_prompt()
    whole = model(**batch).logits
    for kept in range(2, n + 1):
        output = model(**batch, logits_to_keep=kept)
        torch.testing.assert_close(output.logits, whole[:, -kept:], rtol=1e-5, atol=1e-5)
        expected = cross_entropy(whole[:, -kept:-1].flatten(0, 1), labels[:, n - kept + 1 :].flatten())
        torch.testing.assert_close(output.loss, expected, equal_nan=True)


@pytest.mark.parametrize("kept", [0, 4])
def test_shifted_labels_beside_several_answers_change_nothing(kept):
    batch, _ = make_rows([[[(3, 2), (2, 2)]], [[(4, 3)]]])
    del batch["position_ids"]
    model = adapted("llama")
    shifted = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100)
    expected = model(**batch, logits_to_keep=kept).loss
    torch.testing.assert_close(model(**batch, shift_labels=shifted, logits_to_keep=kept).loss, expected)
