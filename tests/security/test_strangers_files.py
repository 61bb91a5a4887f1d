"""Limits of a stranger's adapter, case by case: links, sizes, names looked up, texts written."""

from __future__ import annotations

import json
import re
import shutil
import socket
import tracemalloc
from contextlib import contextmanager

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from tiny_models import make_batch, make_model, randomise
from watch import MAX_MESSAGE, LargestTensor, watched

from ept import EPTConfig, EPTModel, get_ept_model
from ept.model.adapter_files import CONFIG_NAME, WEIGHTS_NAME, read_config, write_adapter
from ept.runs.config import load_run_config


@pytest.fixture
def folder(tmp_path):
    model = get_ept_model(make_model("llama"), EPTConfig(num_virtual_tokens=3, max_length=6, r=2))
    randomise(model)
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def edit(folder, **changes):
    path = folder / CONFIG_NAME
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def load(folder, family="llama"):
    return EPTModel.from_pretrained(make_model(family), folder)


@pytest.mark.parametrize("name", [CONFIG_NAME, WEIGHTS_NAME])
def test_links_out_of_the_folder_are_not_followed(folder, tmp_path, name):
    shutil.move(folder / name, tmp_path / name)
    (folder / name).symlink_to(tmp_path / name)
    with pytest.raises(
        ValueError, match="is a link to a file outside the adapter's folder and is not followed: if you trust it"
    ):
        load(folder)
    (folder / name).unlink()
    shutil.move(tmp_path / name, folder / "elsewhere")
    (folder / name).symlink_to("elsewhere")
    assert isinstance(load(folder), EPTModel)


def test_the_hubs_cache_is_made_of_links_into_its_blobs(folder, tmp_path):
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "0123", tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        shutil.move(folder / name, blobs / f"hash-{name}")
        (snapshot / name).symlink_to(f"../../blobs/hash-{name}")
    assert isinstance(load(snapshot), EPTModel)


def test_saving_does_not_write_through_links(folder, tmp_path):
    """Saving over a stranger's files replaces a link and leaves alone what it leads to."""
    model, precious = load(folder), tmp_path / "precious"
    precious.write_text("mine")
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        (folder / name).unlink()
        (folder / name).symlink_to(precious)
    model.save_pretrained(folder)
    assert precious.read_text() == "mine"
    assert isinstance(load(folder), EPTModel)


CLAIMS = [
    {"max_length": 2**31 - 1},
    *({name: 10**9} for name in ("r", "num_virtual_tokens", "num_spaces", "space_dim", "fusion_dim")),
    {"folded": True, "num_virtual_tokens": 10**9, "max_length": 10**9},
    {"num_virtual_tokens": 10**12},
    {"max_length": 10**400},
    *({"modules_to_save": [name]} for name in ("model", "lm_head", "proj")),
]


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: str(claim)[:60])
def test_sizes_that_the_weights_do_not_have_are_refused_before_anything_is_made(folder, claim):
    edit(folder, **claim)
    base, tensors = make_model("llama"), LargestTensor()
    with tensors, pytest.raises(ValueError):
        EPTModel.from_pretrained(base, folder)
    assert tensors.bytes == 0
    assert all(p.requires_grad for p in base.parameters()), "a refused adapter froze the base model"


def test_heads_of_other_shapes_are_refused_before_a_copy_is_made(tmp_path):
    get_ept_model(make_model("bert"), EPTConfig(num_virtual_tokens=3, max_length=6, r=2)).save_pretrained(tmp_path)
    for names, message in (
        (["encoder", "classifier"], r"base_model.bert.encoder.layer.0.* is missing"),
        (["bert", "encoder"], r"modules_to_save names bert\.encoder and also bert, which contains it"),
        ("classifier", "modules_to_save must be a list of module names, got 'classifier'"),
    ):
        edit(tmp_path, modules_to_save=names)
        with pytest.raises(ValueError, match=message):
            load(tmp_path, "bert")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_weights_of_other_float_types_load(folder, dtype):
    state = load_file(folder / WEIGHTS_NAME)
    save_file({name: tensor.to(dtype) for name, tensor in state.items()}, folder / WEIGHTS_NAME)
    parameters = load(folder).prompt_encoder.parameters()
    assert {p.dtype for p in parameters} == {torch.float32}


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.to(torch.float8_e4m3fn), "prompt has dtype F8_E4M3 instead of one of F64, F32, F16, BF16"),
        (lambda t: t.to(torch.complex64), "prompt has dtype C64 instead of"),
        (lambda t: t.bool(), "prompt has dtype BOOL instead of"),
        (lambda t: t.double() * 1e300, "tensor prompt holds values that are not finite"),
    ],
    ids=["float8", "complex", "bool", "beyond float32"],
)
def test_other_types_and_values_are_refused(folder, change, message):
    state = load_file(folder / WEIGHTS_NAME)
    save_file({**state, "prompt": change(state["prompt"])}, folder / WEIGHTS_NAME)
    with pytest.raises(ValueError, match=message):
        load(folder)


def test_names_in_a_configuration_are_never_looked_up(folder, monkeypatch):
    """Neither the base model nor a tokenizer nor classes that it names, nor anything over the network."""
    edit(
        folder,
        base_model_name_or_path="nobody/model",
        revision="evil",
        tokenizer_name_or_path="nobody/tokenizer",
        prompt_tuning_init="TEXT",
        prompt_tuning_init_text="x",
        auto_mapping={"base_model_class": "Evil", "parent_library": "antigravity"},
        trust_remote_code=True,
    )
    monkeypatch.setattr(socket, "socket", None)
    with watched(folder) as offences, pytest.warns(UserWarning, match="does not know and ignores: trust_remote_code"):
        model = load(folder)
    assert not offences
    assert model.peft_config["default"].auto_mapping is None


GOOD_NAME = "someone/model-1.5_b"
CARD_NAMES = [
    *(GOOD_NAME, "a/b\n---\n# Buy now", "a/b: {evil: true}", "a/[x](http://evil.example)", "a/b`</script>", "é/b"),
    *("../b", 7),
]


@pytest.mark.parametrize("name", CARD_NAMES, ids=range(len(CARD_NAMES)))
def test_names_do_not_get_into_the_card_unless_the_hub_allows_them(tmp_path, name):
    config = EPTConfig(num_virtual_tokens=3, r=0, fusion=False, num_spaces=0, base_model_name_or_path=name)
    write_adapter(tmp_path, config, {"prompt": torch.ones(3, 4), "embedding_scale": torch.ones(())})
    _, front, body = (tmp_path / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    expected = {"library_name": "peft", "tags": ["ept", "prompt tuning"]}
    assert yaml.safe_load(front) == (expected | {"base_model": name} if name == GOOD_NAME else expected)
    assert (str(name) in body) == (name == GOOD_NAME)


NO_ALIASES = "aliases (*a) are not read: write the value out"
# of each: the text, and why it is refused
BOMBS = {
    "one alias": ("seed: &a 1\ntraining: {max_steps: *a}", NO_ALIASES),
    "aliases": (
        "a: &a [x, x, x, x, x, x, x, x, x]\n"
        + "\n".join(f"{b}: &{b} [{','.join([f'*{a}'] * 9)}]" for a, b in zip("abcdefghi", "bcdefghij")),
        NO_ALIASES,
    ),
    "merges": (
        "a: &a {x: 1}\n"
        + "\n".join(f"{b}: &{b} {{<<: [{','.join([f'*{a}'] * 9)}]}}" for a, b in zip("abcdefgh", "bcdefghi")),
        NO_ALIASES,
    ),
    "recursive": ("a: &a [*a]", NO_ALIASES),
    "deep": ("[" * 10_000, "nested more than 20 levels deep"),
    "objects": ("!!python/object/apply:os.system ['id']", "could not determine a constructor for the tag"),
    "twice": ("seed: 1\nseed: 2", "the same key is given twice"),
    "megabytes": ("seed: " + "x" * 2_000_000, "a configuration has at most 1,048,576"),
    "digits": ("seed: " + "9" * 100_000, "cannot read"),
}


@contextmanager
def refused_within(size, message):
    """Expects a short refusal for which at most `size` bytes of memory are taken."""
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=re.escape(message)) as error:
            yield
        assert tracemalloc.get_traced_memory()[1] < size
    finally:
        tracemalloc.stop()
    assert len(str(error.value)) < MAX_MESSAGE


@pytest.mark.parametrize("text, message", BOMBS.values(), ids=BOMBS)
def test_run_configurations_cannot_blow_up(tmp_path, text, message):
    (tmp_path / "run.yaml").write_text(text, encoding="utf-8")
    with refused_within(100 * len(text) + 5_000_000, message):
        load_run_config(tmp_path / "run.yaml")


def test_a_configuration_of_megabytes_is_refused_unread(folder):
    (folder / CONFIG_NAME).write_text(json.dumps({"peft_type": "EPT", "x": ["a" * 1000] * 2000}))
    with refused_within(1_000_000, "a configuration has at most 1,048,576: it is damaged"):
        read_config(folder)


def test_a_loaded_adapter_answers(folder):
    """An adapter of this project's own, which all of this is measured against."""
    assert torch.isfinite(load(folder)(**make_batch("llama", (4,))).logits).all()
