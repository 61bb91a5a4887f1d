"""Adapters on disk: round trips, and one clear error for every kind of bad file."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from peft import PeftConfig
from safetensors.torch import load_file, save_file
from tiny_models import SMALL, make_batch, make_model, randomise

from ept import EPTConfig, EPTModel, get_ept_model


@pytest.fixture
def saved(tmp_path):
    model = get_ept_model(make_model("llama"), EPTConfig(**SMALL))
    randomise(model)
    model.eval().save_pretrained(tmp_path / "adapter")
    return model, tmp_path / "adapter"


def load(folder, **kwargs):
    return EPTModel.from_pretrained(make_model("llama"), folder, **kwargs)


def test_load_under_another_name_beside_the_first(saved):
    model, folder = saved
    batch = make_batch("llama")
    expected = model(**batch).logits
    other = get_ept_model(make_model("llama"), EPTConfig(**SMALL, seed=9)).eval()
    before = other(**batch).logits
    other.load_adapter(folder, "loaded")
    assert torch.equal(other(**batch).logits, before)
    other.set_adapter("loaded", inference_mode=True)
    assert torch.equal(other(**batch).logits, expected)


def test_load_into_the_existing_adapter_keeps_it_trainable(saved):
    """`Trainer` does so when it resumes or restores the best checkpoint."""
    model, folder = saved
    other = get_ept_model(make_model("llama"), EPTConfig(**SMALL, seed=9))
    other.load_adapter(folder, "default", is_trainable=True)
    assert all(p.requires_grad for p in other.prompt_encoder.parameters())
    assert torch.equal(other.eval()(**make_batch("llama")).logits, model(**make_batch("llama")).logits)


def test_several_adapters_go_to_subfolders(saved, tmp_path):
    model, _ = saved
    model.add_adapter("second", EPTConfig.prompt_tuning(2))
    model.save_pretrained(tmp_path / "both")
    assert (tmp_path / "both" / "second" / "adapter_model.safetensors").is_file()
    second = load(tmp_path / "both" / "second")
    assert second.peft_config["default"].num_virtual_tokens == 2
    model.save_pretrained(tmp_path / "one", selected_adapters=["second"])
    assert not (tmp_path / "one" / "adapter_config.json").exists()


def test_folded_adapter_is_saved_and_loaded_as_such(saved, tmp_path):
    model, _ = saved
    batch = make_batch("llama")
    expected = model(**batch).logits
    model.fold().save_pretrained(tmp_path / "folded")
    folded = load(tmp_path / "folded")
    torch.testing.assert_close(folded(**batch).logits, expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="folded into its inference form and cannot be trained"):
        load(tmp_path / "folded", is_trainable=True)


def test_unit_comes_from_the_file_and_not_from_the_base_model(saved):
    """The base model may be loaded quantised or in half precision, where its root mean square differs."""
    model, folder = saved
    base = make_model("llama")
    with torch.no_grad():
        base.get_input_embeddings().weight.mul_(3)
    loaded = EPTModel.from_pretrained(base, folder)
    assert loaded.prompt_encoder["default"].embedding_scale == model.prompt_encoder["default"].embedding_scale


def test_peft_reads_the_configuration(saved):
    assert isinstance(PeftConfig.from_pretrained(str(saved[1])), EPTConfig)


def test_without_ept_imported_peft_says_key_error(saved):
    code = f"from peft import PeftConfig; PeftConfig.from_pretrained({str(saved[1])!r})"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "KeyError: 'EPT'" in result.stderr


def test_loading_looks_nothing_up(saved):
    """A stranger's configuration may name a tokenizer; only a fresh adapter reads one."""
    _, folder = saved
    named = {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "x", "tokenizer_name_or_path": "nobody/nothing"}
    _edit_config(**named)(folder)
    assert load(folder).peft_config["default"].tokenizer_name_or_path == "nobody/nothing"


def test_unknown_key_is_ignored_with_a_warning(saved):
    _edit_config(from_the_future=1)(saved[1])
    with pytest.warns(UserWarning, match="does not know and ignores: from_the_future"):
        load(saved[1])


def test_other_base_model_is_warned_of(saved):
    _edit_config(base_model_name_or_path="someone/else")(saved[1])
    base = make_model("llama")
    base.name_or_path = "someone/this"
    with pytest.warns(UserWarning, match="made for 'someone/else', but this base model is 'someone/this'"):
        EPTModel.from_pretrained(base, saved[1])


@pytest.mark.parametrize("made_for", ["models/tiny", "../tiny", "tiny"])
def test_a_base_model_named_from_another_folder_is_the_same(saved, made_for, recwarn):
    _edit_config(base_model_name_or_path=made_for)(saved[1])
    base = make_model("llama")
    base.name_or_path = "/home/models/tiny"
    EPTModel.from_pretrained(base, saved[1])
    assert not any("made for" in str(warning.message) for warning in recwarn)


def test_other_width_is_refused(saved):
    wide = make_model("llama", hidden_size=64)
    with pytest.raises(ValueError, match=r"made for embeddings of width 32 .* has 64: load it with its own base model"):
        EPTModel.from_pretrained(wide, saved[1])


def _edit_config(**changes):
    def edit(folder):
        path = folder / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return edit


def _edit_weights(change):
    def edit(folder):
        path = folder / "adapter_model.safetensors"
        state = load_file(path)
        change(state)
        save_file(state, path)

    return edit


def _truncate(folder):
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])


CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
BAD_FILES = [
    ("no configuration", lambda f: (f / CONFIG).unlink(), "holds no adapter_config.json"),
    ("no weights", lambda f: (f / WEIGHTS).unlink(), "holds no adapter_model.safetensors"),
    (
        "a pickle",
        lambda f: (f / WEIGHTS).rename(f / "adapter_model.bin"),
        "adapter_model.bin, a pickle, which could run code",
    ),
    ("configuration is no JSON", lambda f: (f / CONFIG).write_text("{"), "is damaged: it is not JSON"),
    ("configuration is a list", lambda f: (f / CONFIG).write_text("[]"), "its peft_type is 'list'"),
    ("another method", _edit_config(peft_type="LORA"), "configuration of an EPT adapter: its peft_type is 'LORA'"),
    ("wrong type", _edit_config(r="many"), "has a field of the wrong type: r must be an integer, got 'many'"),
    ("field out of range", _edit_config(max_length=0), "max_length must be at least 1, got 0"),
    ("sizes the file does not have", _edit_config(r=10**9), r"A has shape \[12, 3\] instead of \[12, 1000000000\]"),
    ("truncated", _truncate, "is damaged or truncated: .*copy or download it again"),
    ("empty", lambda f: (f / WEIGHTS).write_bytes(b""), "is damaged or truncated"),
    ("garbage", lambda f: (f / WEIGHTS).write_bytes(b"x" * 500), "is damaged or truncated"),
    ("tensor missing", _edit_weights(lambda s: s.pop("beta")), "beta is missing"),
    ("tensor too many", _edit_weights(lambda s: s.update(more=torch.ones(2))), "more is not part of it"),
    (
        "wrong shape",
        _edit_weights(lambda s: s.update(B=torch.ones(3, 31))),
        r"B has shape \[3, 31\] instead of \[3, 32\]",
    ),
    ("not a number", _edit_weights(lambda s: s["A"].fill_(float("nan"))), "tensor A holds values that are not finite"),
    (
        "integers",
        _edit_weights(lambda s: s.update(beta=torch.ones(1, dtype=torch.int64))),
        "beta has dtype I64 instead of one of F64, F32, F16, BF16",
    ),
    ("no unit", _edit_weights(lambda s: s["embedding_scale"].zero_()), "embedding_scale is 0.0, but must be above 0"),
]


@pytest.mark.parametrize("case, damage, message", BAD_FILES, ids=[case for case, _, _ in BAD_FILES])
def test_bad_file_is_refused_and_nothing_is_lost(saved, case, damage, message):
    model, folder = saved
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    damage(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        model.load_adapter(folder, "second")
    assert list(model.peft_config) == ["default"]
    torch.testing.assert_close({n: p.data for n, p in model.named_parameters()}, before, rtol=0, atol=0)


def test_no_such_folder_and_pickles_are_refused(saved, tmp_path):
    model, folder = saved
    with pytest.raises(FileNotFoundError, match="is not a folder with an adapter"):
        load(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="safetensors only"):
        model.save_pretrained(tmp_path / "x", safe_serialization=False)
    with pytest.raises(ValueError, match="is a file; give a folder"):
        model.save_pretrained(folder / "README.md")


def test_classifier_with_other_number_of_labels_is_refused(tmp_path):
    get_ept_model(make_model("bert"), EPTConfig(**SMALL)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"base_model.classifier.weight has shape \[3, 32\] instead of \[5, 32\]"):
        EPTModel.from_pretrained(make_model("bert", num_labels=5), tmp_path)
