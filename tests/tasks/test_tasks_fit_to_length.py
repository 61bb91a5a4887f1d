"""fit_to_length: never too long, the template's words kept, the longest column cut, each cut a prefix."""

import random

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from ept.tasks import fit_to_length, local_task, render

LABELS = ["no", "yes"]
WORDS = ["the", "quick", "foxes", "jump", "over", "a", "lazy", "dog", "naïve", "café", "東京", "🙂", "quietly"]


def byte_level_bpe():
    """A small fast tokenizer of GPT-2's kind; most words are several tokens, an emoji is several bytes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(["the quick brown fox passage: question: sentence"] * 4, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def word_level():
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


TOKENIZERS = {"fast byte-level": byte_level_bpe, "fast word-level": word_level, "slow bytes": ByT5Tokenizer}


@pytest.fixture(scope="module", params=TOKENIZERS)
def tokenizer(request):
    return TOKENIZERS[request.param]()


def length(tokenizer, text):
    return len(tokenizer(text, add_special_tokens=False)["input_ids"])


def test_kinds_of_tokenizer():
    assert [make().is_fast for make in TOKENIZERS.values()] == [True, True, False]


def test_text_that_fits_is_untouched(tokenizer):
    task = local_task("question: {q} passage: {p}", LABELS)
    row = {"q": " is  it ", "p": "It is.\n"}
    text = "question:  is  it  passage: It is.\n"
    assert fit_to_length(task, row, tokenizer, length(tokenizer, text)) == (text, False)


def test_random_rows(tokenizer):
    draw = random.Random(0)
    task = local_task("question: {q}\npassage: {p}\nanswer?", LABELS)
    shortened = 0
    for _ in range(60):
        row = {c: " ".join(draw.choices(WORDS, k=draw.randint(1, 60))) for c in ("q", "p")}
        max_length = draw.randint(90, 300) if length(tokenizer, "a b") > 2 else draw.randint(6, 60)
        text, cut = fit_to_length(task, row, tokenizer, max_length)
        shortened += cut
        assert cut == (length(tokenizer, render(task, row)) > max_length)
        assert length(tokenizer, text) <= max_length
        assert text.startswith("question: ")
        assert text.endswith("\nanswer?")
        question, passage = text.removeprefix("question: ").removesuffix("\nanswer?").split("\npassage: ")
        assert row["q"].startswith(question)
        assert row["p"].startswith(passage)
        if question != row["q"] and passage != row["p"]:  # both were cut, so both to about one length
            assert abs(length(tokenizer, question) - length(tokenizer, passage)) <= 12
        elif question != row["q"]:
            assert length(tokenizer, row["q"]) > length(tokenizer, passage)
    assert shortened > 20


COUNTED = {"q": "one two three", "p": " ".join(f"w{i}" for i in range(50))}
ASKED, SLOW = "is this sarcastic or not? {s}", {"s": "one two three"}
LOADED = {"text": "s: one two three", "label": 0, "fields": {"text": "one two three"}}
# template, row, tokenizer, limit, text
CUT = {
    "longest column": ("question: {q} passage: {p}", COUNTED, word_level, 10,
                       "question: one two three passage: w0 w1 w2 w3 w4"),
    # the question is longer than an equal share: both end at three words
    "equal shares": ("question: {q} passage: {p}", COUNTED, word_level, 7, "question: one two passage: w0 w1"),
    "slow tokenizers cut at words": ("s: {s}", SLOW, ByT5Tokenizer, 12, "s: one two"),
    "inside a word": ("s: {s}", SLOW, ByT5Tokenizer, 9, "s: one"),
    "a row of task data is its fields": ("s: {text}", LOADED, word_level, 3, "s: one two"),
    "a column used twice": ("{a} again: {a}", {"a": "1 2 3 4 5"}, word_level, 6, "1 2 again: 1 2"),
    "room for one": (ASKED, {"s": "word and more"}, word_level, 6, "is this sarcastic or not? word"),
}  # fmt: skip


@pytest.mark.parametrize("template, row, make, max_length, text", CUT.values(), ids=CUT)
def test_cut(template, row, make, max_length, text):
    assert fit_to_length(local_task(template, LABELS), row, make(), max_length) == (text, True)


def test_a_row_of_task_data_is_rendered_from_its_fields():
    assert render(local_task("s: {text}", LABELS), LOADED) == "s: one two three"


NO_ROOM = [
    (ASKED, "word", word_level, 5, r"the template alone has 5 tokens.*max_length=5: shorten the template"),
    ("s: {s}", "unbreakable", ByT5Tokenizer, 8, "no part of the text fits beside the template's 3 tokens within "
                                                "max_length=8"),
]  # fmt: skip


@pytest.mark.parametrize("template, text, make, max_length, message", NO_ROOM)
def test_no_room_for_text(template, text, make, max_length, message):
    with pytest.raises(ValueError, match=message):
        fit_to_length(local_task(template, LABELS), {"s": text}, make(), max_length)
