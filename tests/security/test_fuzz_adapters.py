"""Adapters from strangers: changed files, each of which loads or gives one clear error, and does no more than that."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import strategies as st
from strangers import configurations, weights
from tiny_models import make_batch, make_model, randomise
from watch import MAX_MESSAGE, LargestTensor, watched

from ept import EPTConfig, EPTModel, get_ept_model
from ept.model.adapter_files import CONFIG_NAME, WEIGHTS_NAME

REFUSALS = (ValueError, FileNotFoundError)
# Tensors are made in float32 from files of at least 8 bits a value; the rest is for what is no tensor of the adapter.
TIMES_THE_FILE, BESIDES = 8, 1 << 16


class Good:
    """A good adapter's files, and the base model it is for."""

    def __init__(self, family: str, folder: Path) -> None:
        self.folder = folder
        self.base = make_model(family, num_hidden_layers=1)  # half of a case's time goes into running the base model
        model = get_ept_model(copy.deepcopy(self.base), EPTConfig(num_virtual_tokens=3, max_length=6, r=2))
        randomise(model)
        model.save_pretrained(folder)
        self.config = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
        self.weights = (folder / WEIGHTS_NAME).read_bytes()
        self.batch = make_batch(family, (3, 2))
        self.keys = list(self.base.state_dict())
        self.spare: list[torch.nn.Module] = []  # copies that a refused adapter has left as they were


@pytest.fixture(scope="module", params=["llama", "bert"])
def good(request, tmp_path_factory):
    good = Good(request.param, tmp_path_factory.mktemp(request.param))
    folder = tmp_path_factory.mktemp("first")
    EPTModel.from_pretrained(copy.deepcopy(good.base), good.folder)(**good.batch)  # imports what loading imports
    assert check(good, folder, json.dumps(good.config).encode(), good.weights) == "loaded"
    return good


def check(good: Good, folder: Path, config: bytes, content: bytes) -> str:
    """Writes the two files, loads them, and returns what became of it; every other outcome fails."""
    for name, written in ((CONFIG_NAME, config), (WEIGHTS_NAME, content)):
        (folder / name).unlink(missing_ok=True)  # a file written over takes fifty times as long
        (folder / name).write_bytes(written)
    base = good.spare.pop() if good.spare else copy.deepcopy(good.base)
    tensors, refusal = LargestTensor(), None
    with warnings.catch_warnings(), watched(folder) as offences, tensors:
        warnings.simplefilter("ignore")
        try:
            model = EPTModel.from_pretrained(base, folder)
            with torch.no_grad():
                model(**good.batch)
        except REFUSALS as error:
            refusal = error
    assert not offences
    assert tensors.bytes <= TIMES_THE_FILE * len(content) + BESIDES
    if refusal is None:
        return "loaded"
    message = str(refusal)
    assert type(refusal) in REFUSALS, repr(refusal)
    assert 0 < len(message) <= MAX_MESSAGE
    assert message.replace("\n", "").isprintable(), message
    if "the adapter was made for max_length=" in message:  # it loaded, and the batch is too long for it
        return "loaded"
    assert list(base.state_dict()) == good.keys, "the base model was changed by a refused adapter"
    good.spare.append(base)
    return "refused"


@pytest.mark.slow
def test_changed_configurations(good, tmp_path, fuzz):
    outcomes = fuzz(configurations(good.config), 0.15, lambda config: check(good, tmp_path, config, good.weights))
    assert set(outcomes) == {"loaded", "refused"}


@pytest.mark.slow
def test_changed_weights(good, tmp_path, fuzz):
    config = json.dumps(good.config).encode()
    outcomes = fuzz(weights(good.weights), 0.15, lambda content: check(good, tmp_path, config, content))
    assert set(outcomes) == {"loaded", "refused"}


@pytest.mark.slow
def test_both_changed(good, tmp_path, fuzz):
    both = st.tuples(configurations(good.config), weights(good.weights))
    assert fuzz(both, 0.1, lambda files: check(good, tmp_path, *files))["refused"]
