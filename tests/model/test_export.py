"""`ept export`: the exported files alone give the adapter's own answers."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import TASK_OF, VOCAB, make_batch, make_model, randomise
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from typer.testing import CliRunner

from ept import EPTConfig, get_ept_model
from ept.cli.main import app
from ept.model.base_model import input_embedding
from ept.model.export import FoldedAdapter, write_folded
from ept.model.vocabulary import add_prompt_tokens
from ept.runs.loading import MODEL_CLASSES

SIZES = {
    "whole": {"num_virtual_tokens": 5, "max_length": 12, "r": 3},
    "prompt alone": {"num_virtual_tokens": 4, "max_length": 12, "r": 0, "fusion": False, "num_spaces": 0},
    "update alone": {"num_virtual_tokens": 0, "max_length": 12, "r": 3},
    "token-dependent": {"num_virtual_tokens": 4, "max_length": 5, "r": 3, "update": "token"},
    "token-dependent alone": {"num_virtual_tokens": 0, "r": 3, "update": "token"},
}
TEXTS = ["w5 w6 w7 w8", "w9 w10"]
DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "serving.md"


def adapted(name="llama", **fields):
    model = get_ept_model(make_model(name), EPTConfig(**(fields or SIZES["whole"])))
    randomise(model)
    return model.eval()


@pytest.fixture
def base_folder(tmp_path):
    """A base model and its tokenizer, one token a word: w5 is 5."""
    make_model("llama").save_pretrained(tmp_path / "base")
    tokenizer_with().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def outputs_of(model, name, inputs, **options):
    if TASK_OF[name] == "SEQ_CLS":
        with torch.no_grad():
            return model(**inputs).logits
    return model.generate(**inputs, max_new_tokens=6, min_new_tokens=6, do_sample=False, eos_token_id=None, **options)


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "t5", "bert"])
def test_embeddings_of_a_text_give_the_adapters_answers(name, size, tmp_path):
    model = adapted(name, **size)
    model.save_pretrained(tmp_path / "adapter")
    folded = FoldedAdapter.read(tmp_path / "adapter")
    ids = make_batch(name, (7,))["input_ids"]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    expected = outputs_of(model, name, inputs)
    bare = make_model(name)
    with torch.no_grad():
        for key, tensor in folded.heads.items():
            bare.get_parameter(key).copy_(tensor)
    embeds = folded.embed(ids.tolist(), input_embedding(bare))[0][None]
    assert embeds.shape == (1, size["num_virtual_tokens"] + 7, 32)
    mask = torch.ones(embeds.shape[:2], dtype=torch.int64)
    found = outputs_of(bare, name, {"inputs_embeds": embeds, "attention_mask": mask})
    if TASK_OF[name] == "SEQ_CLS":
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    else:
        assert found[0, -6:].tolist() == expected[0, -6:].tolist()


@pytest.mark.parametrize("name, size", [("llama", size) for size in SIZES] + [("bert", "whole")])
def test_files_hold_what_they_say(name, size, tmp_path):
    model = adapted(name, **SIZES[size])
    model.save_pretrained(tmp_path / "adapter")
    write_folded(FoldedAdapter.read(tmp_path / "adapter"), tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "folded.safetensors")
    info = json.loads((tmp_path / "out" / "folded.json").read_text(encoding="utf-8"))
    assert info["format"] == "ept-folded"
    by_token = size.startswith("token-dependent")
    assert info["format_version"] == (3 if by_token else 1)
    assert info["task_type"] == TASK_OF[name]
    assert info["hidden_size"] == 32
    assert info["num_virtual_tokens"] == SIZES[size]["num_virtual_tokens"]
    assert info["max_length"] == (12 if SIZES[size]["r"] and not by_token else None)
    assert info["tensors"] == {key: list(tensor.shape) for key, tensor in tensors.items()}
    assert {"head.classifier.weight", "head.classifier.bias"} <= set(tensors) or name != "bert"
    layer = model.fold().prompt_encoder["default"]
    has_table = SIZES[size]["r"] > 0 and not by_token
    assert ("prompt" in tensors, "table" in tensors) == (SIZES[size]["num_virtual_tokens"] > 0, has_table)
    assert ({"W_in", "b_in", "W_out", "b_out"} <= set(tensors)) == by_token
    expected = {"prompt": layer.joint_prompt().detach(), "table": layer.position_table().detach()}
    expected = {name: tensor for name, tensor in expected.items() if name in tensors}
    torch.testing.assert_close({name: tensors[name] for name in expected}, expected)


def test_a_folded_adapter_is_exported_as_it_is(tmp_path):
    adapted().fold().save_pretrained(tmp_path / "adapter")
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    tensors = FoldedAdapter.read(tmp_path / "adapter").tensors()
    assert torch.equal(tensors["prompt"], saved["folded_prompt"])
    scale = saved["embedding_scale"].float() * 8 / saved["A"].shape[1] ** 0.5
    torch.testing.assert_close(tensors["table"], scale * saved["A"] @ saved["B"])


def test_an_update_of_generated_tokens_is_written_down_and_not_made_of_texts(tmp_path):
    adapted("llama", update_scope="all").save_pretrained(tmp_path / "adapter")
    folded = FoldedAdapter.read(tmp_path / "adapter")
    assert (folded.info()["format_version"], folded.info()["update_scope"]) == (2, "all")
    with pytest.raises(ValueError, match='trained with update_scope="all": generated tokens get the update too'):
        folded.embed([[5, 6]], input_embedding(make_model("llama")))
    adapted("t5", update_scope="all").save_pretrained(tmp_path / "t5")  # whose generated tokens are the decoder's
    assert len(FoldedAdapter.read(tmp_path / "t5").embed([[5, 6]], input_embedding(make_model("t5")))) == 1
    adapted("llama", update_scope="all", r=0).save_pretrained(tmp_path / "plain")
    assert FoldedAdapter.read(tmp_path / "plain").info()["format_version"] == 1


@pytest.mark.parametrize("size", ["whole", "token-dependent"])
def test_the_documents_example_reproduces_generation(size, tmp_path, base_folder, monkeypatch):
    """The code of docs/serving.md, run as it stands there."""
    model = adapted(**SIZES[size])
    model.save_pretrained(tmp_path / "adapter")
    result = run("export", tmp_path / "adapter", "--output", tmp_path / "exported")
    assert result.exit_code == 0, result.output
    code = re.search(
        r"<!-- test: exported files alone -->\n```python\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL
    )
    assert code is not None
    names = {"model_name": str(base_folder), "text": TEXTS[0]}
    monkeypatch.chdir(tmp_path)
    exec(compile(code[1], str(DOCUMENT), "exec"), names)
    expected = model.generate(torch.tensor([[5, 6, 7, 8]]), max_new_tokens=8, do_sample=False)
    assert names["tokens"][0].tolist() == expected[0, 4:].tolist()


def test_prompt_embeds_of_a_text_file(tmp_path, base_folder):
    model = adapted()
    model.save_pretrained(tmp_path / "adapter")
    lines = "\ufeff" + "\r\n".join([*TEXTS, "a\u2028b\x0cc\x85d"]) + "\n"  # a byte order mark, breaks inside a text
    (tmp_path / "lines.txt").write_text(lines, encoding="utf-8", newline="")
    arguments = ["export", tmp_path / "adapter", "--output", tmp_path / "out", "--texts", tmp_path / "lines.txt"]
    result = run(*arguments, "--model", base_folder, "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["texts"] == 3
    assert [Path(file).name for file in report["files"]] == [
        "folded.safetensors",
        "folded.json",
        "prompt_embeds.safetensors",
    ]
    embeds = load_file(tmp_path / "out" / "prompt_embeds.safetensors")
    with torch.no_grad():
        expected = model.prompt_encoder["default"](torch.tensor([[9, 10]]))[0][0]
    torch.testing.assert_close(embeds["text.000001"], expected, rtol=1e-5, atol=1e-6)
    assert embeds["text.000000"].shape == (9, 32)
    refused = run(*arguments, "--model", base_folder)
    assert refused.exit_code == 2
    assert "already holds folded.safetensors, folded.json, prompt_embeds.safetensors: --overwrite" in refused.output
    assert run("export", tmp_path / "adapter", "--output", tmp_path / "out", "--overwrite").exit_code == 0
    assert not (tmp_path / "out" / "prompt_embeds.safetensors").exists()  # it was of another export


def test_a_run_names_its_own_model(tmp_path, base_folder):
    adapted().save_pretrained(tmp_path / "run" / "adapter")
    (tmp_path / "run" / "config.yaml").write_text(f"model: {{name_or_path: '{base_folder}'}}\n", encoding="utf-8")
    (tmp_path / "lines.txt").write_text(TEXTS[0], encoding="utf-8")
    result = run("export", tmp_path / "run", "--output", tmp_path / "out", "--texts", tmp_path / "lines.txt")
    assert result.exit_code == 0, result.output
    assert load_file(tmp_path / "out" / "prompt_embeds.safetensors")["text.000000"].shape == (9, 32)


@pytest.mark.parametrize("name, rows", [
    ("rows.csv", "a,b,c\nw5,w6,x\nw9,w4,y\n"), ("rows.jsonl", '{"c": "x", "a": "w5", "b": "w6"}\n{"a": "w9"}\n'),
])  # fmt: skip
def test_a_file_of_rows_goes_through_the_template(name, rows, tmp_path, base_folder):
    """That of the adapter, or of the run whose adapter it is."""
    model = adapted(**SIZES["whole"], template="w7 {a} {b} w8")
    model.save_pretrained(tmp_path / "adapter")
    (tmp_path / name).write_text(rows, encoding="utf-8")
    result = run(
        *("export", tmp_path / "adapter", "--output", tmp_path / "out"),
        *("--texts", tmp_path / name, "--model", base_folder),
    )
    assert result.exit_code == 0, result.output
    embeds = load_file(tmp_path / "out" / "prompt_embeds.safetensors")
    with torch.no_grad():
        expected = model.prompt_encoder["default"](torch.tensor([[7, 5, 6, 8]]))[0][0]
    torch.testing.assert_close(embeds["text.000000"], expected, rtol=1e-5, atol=1e-6)
    assert json.loads((tmp_path / "out" / "folded.json").read_text("utf-8"))["template"] == "w7 {a} {b} w8"


def tokenizer_with(begin=None, end=None):
    """One token a word, w5 is 5; texts begin and end with these tokens."""
    vocabulary = {"<unk>": 0, "<pad>": 1, "<s>": 2, "</s>": 3, **{f"w{i}": i for i in range(4, VOCAB)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if begin or end:
        single = " ".join(filter(None, (begin, "$A", end)))
        tokenizer.post_processor = processors.TemplateProcessing(
            single=single, special_tokens=[(token, vocabulary[token]) for token in (begin, end) if token]
        )
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>", **({"bos_token": begin} if begin else {})}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


AS_TOKENS = {
    "prompt": {**SIZES["prompt alone"], "num_spaces": 2},
    "token": {**SIZES["token-dependent"], "update_scope": "all"},
    "token alone": {**SIZES["token-dependent alone"], "update_scope": "all"},
    "head": {**SIZES["prompt alone"], "modules_to_save": ["lm_head"]},
}


@pytest.mark.parametrize("name, begin, end, size", [
    ("llama", None, None, "prompt"), ("llama", "<s>", None, "prompt"), ("gemma3", "<s>", None, "prompt"),
    ("t5", None, "</s>", "prompt"), ("bart", "<s>", "</s>", "prompt"), ("bert", "<s>", "</s>", "prompt"),
    ("llama", "<s>", None, "token"), ("gpt2", None, None, "token"), ("gemma3", "<s>", None, "token"),
    ("opt", "</s>", None, "token alone"), ("bert", "<s>", "</s>", "token"), ("roberta", "<s>", "</s>", "token"),
    ("gpt2", None, None, "head"), ("llama_classifier", "<s>", None, "token"), ("bert", "<s>", "</s>", "token alone"),
])  # fmt: skip
def test_plain_transformers_answer_as_the_adapter(name, begin, end, size, tmp_path):
    """With tied heads (GPT-2, Gemma, OPT) as well: the head keeps its weights where the vocabulary's rows change."""
    make_model(name).save_pretrained(tmp_path / "base")
    tokenizer_with(begin, end).save_pretrained(tmp_path / "base")
    fields = {**AS_TOKENS[size], "template": "{a}", "label_words": ["w5", "w6", "w7"]}
    model = adapted(name, **fields)
    model.save_pretrained(tmp_path / "adapter")
    arguments = (
        "export",
        tmp_path / "adapter",
        "--output",
        tmp_path / "out",
        "--as-tokens",
        "--model",
        tmp_path / "base",
    )
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    plain = MODEL_CLASSES[TASK_OF[name]].from_pretrained(tmp_path / "out").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    about = json.loads((tmp_path / "out" / "prompt_tokens.json").read_text("utf-8"))
    assert (about["template"], about["label_words"]) == ("{a}", ["w5", "w6", "w7"])
    assert ("add_special_tokens=False" in result.output) is (begin is not None)
    assert ("'</s>' after it" in result.output) is (begin is not None and end is not None)
    s = fields["num_virtual_tokens"]
    for text in TEXTS:
        whole = about["before"] + text + about["after"]
        inputs = tokenizer(whole, add_special_tokens=about["add_special_tokens"], return_tensors="pt")
        own = tokenizer_with(begin, end)(text, return_tensors="pt")["input_ids"]
        assert inputs["input_ids"].shape[1] == own.shape[1] + s
        given = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        found = outputs_of(plain, name, given)
        expected = outputs_of(model, name, {"input_ids": own, "attention_mask": torch.ones_like(own)})
        if TASK_OF[name] == "SEQ_CLS":
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
            assert plain.config.id2label == {0: "w5", 1: "w6", 2: "w7"}
        else:
            assert found[0, -6:].tolist() == expected[0, -6:].tolist()
    assert "already holds prompt_tokens.json" in run(*arguments).output


def folded_layer(name="llama", **fields):
    layer = adapted(name, **fields).prompt_encoder["default"]
    layer.fold()
    return layer


REFUSED = [
    ("llama", "TOKEN_CLS", SIZES["prompt alone"], "the adapter is for TOKEN_CLS"),
    ("llama", "CAUSAL_LM", SIZES["whole"], r"has a position-dependent update (r=3), which a vocabulary cannot hold"),
    ("llama", "CAUSAL_LM", SIZES["token-dependent"], "the adapter leaves generated tokens without the update"),
    ("t5", "SEQ_2_SEQ_LM", SIZES["token-dependent"], "only the encoder gets the update"),
]


@pytest.mark.parametrize("name, task, size, message", REFUSED, ids=[message for *_, message in REFUSED])
def test_what_words_cannot_hold(name, task, size, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        add_prompt_tokens(make_model(name), tokenizer_with(), folded_layer(name, **size), task)


def test_not_twice_and_not_for_a_model_that_answers_otherwise():
    layer = folded_layer(**SIZES["prompt alone"])
    tokenizer = tokenizer_with()
    add_prompt_tokens(make_model("llama"), tokenizer, layer, "CAUSAL_LM")
    with pytest.raises(ValueError, match="the tokenizer already has a token <prompt_0>"):
        add_prompt_tokens(make_model("llama"), tokenizer, layer, "CAUSAL_LM")
    model = make_model("llama")
    model.model.register_forward_pre_hook(  # something that reads ids and not embeddings
        lambda module, args, kwargs: (
            (args, {**kwargs, "input_ids": kwargs["input_ids"].flip(1)})
            if kwargs.get("input_ids") is not None
            else None
        ),
        with_kwargs=True,
    )
    with pytest.raises(ValueError, match="LlamaForCausalLM with the adapter's tokens does not answer"):
        add_prompt_tokens(model, tokenizer_with(), layer, "CAUSAL_LM")


def test_a_head_of_another_model_is_refused(tmp_path):
    make_model("bert").save_pretrained(tmp_path / "base")
    tokenizer_with("<s>", "</s>").save_pretrained(tmp_path / "base")
    adapted("llama_classifier", **SIZES["prompt alone"]).save_pretrained(tmp_path / "adapter")
    arguments = ("--output", tmp_path / "out", "--as-tokens", "--model", tmp_path / "base")
    assert (
        "the adapter's head, score.weight, does not belong to" in run("export", tmp_path / "adapter", *arguments).output
    )


MISTAKES = [
    (["--texts", "lines.txt"], "give --model"),
    (["--model", "somewhere"], "--model is only for --texts and --as-tokens"),
    (["--as-tokens", "--texts", "lines.txt"], "--texts and --as-tokens exclude each other"),
    (["--as-tokens", "--model", "base"], "the adapter has a position-dependent update (r=3), which a vocabulary"),
    (["--texts", "rows.jsonl", "--model", "base"], "rows.jsonl holds rows, but the adapter names no template"),
    (["--set", "model.dtype=bfloat16"], "is an adapter: use --model"),
    (["--texts", "empty.txt", "--model", "base"], "empty.txt is empty"),
    (["--texts", "gap.txt", "--model", "base"], "gap.txt, line 2 is empty"),
    (
        ["--texts", "binary.txt", "--model", "base"],
        "binary.txt, line 1: byte 0xff is not UTF-8: save the file as UTF-8",
    ),
    (["--output", "rows.jsonl"], "rows.jsonl is a file: give a folder"),
    (["--texts", "long.txt", "--model", "base"], "text 1: input has 13 tokens, the adapter was made for max_length=12"),
]


@pytest.mark.parametrize("options, message", MISTAKES, ids=[message for _, message in MISTAKES])
def test_mistakes_are_one_line_and_write_nothing(options, message, tmp_path, base_folder, monkeypatch):
    adapted().save_pretrained(tmp_path / "adapter")
    contents = {"lines": b"w5", "empty": b"", "gap": b"w5\n\nw6", "binary": b"\xff\xfe\xff", "long": b"w5 " * 13}
    (tmp_path / "rows.jsonl").write_text('{"a": "w5"}\n', encoding="utf-8")
    for name, content in contents.items():
        (tmp_path / f"{name}.txt").write_bytes(content)
    monkeypatch.chdir(tmp_path)
    result = run("export", "adapter", "--output", "out", *options)
    assert result.exit_code == 2
    assert message in result.output
    assert not (tmp_path / "out").exists()


def test_folders_that_hold_nothing_to_export(tmp_path):
    result = run("export", tmp_path, "--output", tmp_path / "out")
    assert result.exit_code == 2
    assert "holds neither a run (config.yaml) nor an adapter (adapter_config.json)" in result.output
    (tmp_path / "config.yaml").write_text("", encoding="utf-8")
    assert "has no adapter yet" in run("export", tmp_path, "--output", tmp_path / "out").output
    model = adapted(num_virtual_tokens=0, r=0)
    model.save_pretrained(tmp_path / "nothing")
    assert "there is nothing to fold" in run("export", tmp_path / "nothing", "--output", tmp_path / "out").output


def test_a_prompt_in_a_random_basis_is_exported_where_its_width_is_known(tmp_path):
    model = adapted(num_virtual_tokens=4, r=0, prompt_rank=3)
    model.save_pretrained(tmp_path / "spaces")
    found = FoldedAdapter.read(tmp_path / "spaces").tensors()["prompt"]
    torch.testing.assert_close(found, model.get_prompt_embedding_to_save("default"))
    adapted(num_virtual_tokens=4, r=0, prompt_rank=3, fusion=False, num_spaces=0).save_pretrained(tmp_path / "alone")
    with pytest.raises(ValueError, match="holds only the weights of a random basis"):
        FoldedAdapter.read(tmp_path / "alone")


def test_another_models_embedding_is_refused(tmp_path):
    adapted().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="the adapter is for embeddings of width 32, but the model has 64"):
        FoldedAdapter.read(tmp_path).embed([[5]], torch.nn.Embedding(9, 64))
