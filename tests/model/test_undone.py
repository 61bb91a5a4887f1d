"""A call that raises leaves the caller's model, and the configuration it was given, as they were."""

from __future__ import annotations

import copy
import warnings

import peft
import pytest
import torch
from tiny_models import SMALL, make_model

from ept import EPTConfig, EPTModel, get_ept_model
from ept.model import adapters, base_model, ept_model
from ept.prompt import EPTLayer


def state_of(model):
    """Lists all that a call may change: classes, modes, modules, hooks, attributes, gradients, values, label names."""
    state = {}
    for path, module in model.named_modules():
        state[path] = id(module), type(module), {name: seen(value) for name, value in vars(module).items()}
    for name, parameter in model.named_parameters():
        state[name] = id(parameter), parameter.requires_grad, parameter.tolist()
    return {**state, "config": copy.deepcopy(vars(model.config))}


def seen(value):
    if isinstance(value, dict):
        return {key: seen(each) for key, each in value.items()}
    return copy.copy(value) if isinstance(value, (str, int, list, set, tuple, type(None))) else id(value)


def assert_same(state, before):
    assert [key for key in state.keys() | before.keys() if state.get(key) != before.get(key)] == []


def fail(*args, **kwargs):
    raise KeyboardInterrupt  # the user's, at this place


# The model, the configuration's fields, and the place that breaks; None: the configuration does not fit the model.
BREAKS = {
    "no room for the prompt": ("gpt2", {"num_virtual_tokens": 64}, None),
    "no such module": ("llama", {"modules_to_save": ["nothing"]}, None),
    "no tokenizer": ("llama", {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "a b"}, None),
    "swapping 4-bit layers": ("llama", {}, (ept_model, "swap_4bit")),
    "after swapping frozen layers": ("llama", {}, (adapters, "embedding_width")),
    "the layer": ("t5", {}, (EPTLayer, "__init__")),
    "the head's dtype": ("bert", {}, (adapters, "train_in_float32")),
    "dropout": ("bert", {"base_dropout": True}, (base_model.nn.Embedding, "train")),
    "label names": ("bert", {"label_words": ["a", "b", "c"]}, (ept_model.EPTModel, "train")),
}


@pytest.mark.parametrize("way", [get_ept_model, peft.get_peft_model], ids=["ours", "PEFT's"])
@pytest.mark.parametrize(("name", "fields", "place"), BREAKS.values(), ids=BREAKS)
def test_wrapping(name, fields, place, way, monkeypatch):
    base, config = make_model(name).train("base_dropout" not in fields), EPTConfig(**{**SMALL, **fields})
    before, fields_before = state_of(base), copy.deepcopy(vars(config))
    if place:
        monkeypatch.setattr(*place, fail)
    with pytest.raises((ValueError, KeyboardInterrupt, OSError)):
        way(base, config)
    monkeypatch.undo()
    assert_same(state_of(base), before)
    assert vars(config) == fields_before


@pytest.fixture
def saved(tmp_path):
    """Saves an adapter of a classifier, whose head is trained."""
    get_ept_model(make_model("bert"), EPTConfig(**SMALL, base_dropout=True)).save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


PLACES = {
    "layer": (EPTLayer, "__init__"),
    "head": (adapters, "train_in_float32"),
    "weights": (adapters, "set_peft_model_state_dict"),
    "active head": (adapters, "_set_adapter"),
    "mode": (adapters.ModelWithAdapters, "train"),
    "gradients": (adapters.ModelWithAdapters, "_require_gradients"),
    "folded": (EPTLayer, "_place_basis"),
    "warning": (warnings, "warn"),
}
# A change of a model with the adapters "default", which is active, and "second"; and the places where it may break.
CHANGES = {
    "add": (
        lambda model, saved: model.add_adapter("new", EPTConfig(**SMALL, modules_to_save=["classifier", "pooler"])),
        ["layer", "head", "active head", "gradients"],
    ),
    "load": (lambda model, saved: model.load_adapter(saved, "new"), ["layer", "head", "weights", "gradients", "mode"]),
    "load again": (lambda model, saved: model.load_adapter(saved, "second"), ["weights"]),
    "delete": (lambda model, saved: model.delete_adapter("default"), ["warning", "gradients", "mode"]),
    "fold": (lambda model, saved: model.fold(), ["folded"]),
}


@pytest.mark.filterwarnings("ignore:'default' was active")
@pytest.mark.parametrize(("change", "places"), CHANGES.values(), ids=CHANGES)
def test_changing_adapters(change, places, saved, monkeypatch):
    model = get_ept_model(make_model("bert"), EPTConfig(**SMALL))
    model.add_adapter("second", EPTConfig(**SMALL))
    before = state_of(model)
    for place in places:
        with monkeypatch.context() as patch:
            patch.setattr(*PLACES[place], fail)
            with pytest.raises(KeyboardInterrupt):
                change(model, saved)
        assert_same(state_of(model), before)
    change(model, saved)  # and nothing is in its way


@pytest.mark.parametrize("place", [PLACES["weights"], (EPTModel, "eval")], ids=["weights", "mode"])
def test_loading_with_the_model(place, saved, monkeypatch):
    base = make_model("bert").train()
    before = state_of(base)
    monkeypatch.setattr(*place, fail)
    with pytest.raises(KeyboardInterrupt):
        EPTModel.from_pretrained(base, saved)
    monkeypatch.undo()
    assert_same(state_of(base), before)
    assert torch.isfinite(EPTModel.from_pretrained(base, saved)(torch.ones(1, 3, dtype=torch.long)).logits).all()
