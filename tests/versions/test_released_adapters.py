"""Adapters saved by every release so far load in this one, and answer as they did."""

from __future__ import annotations

import pytest
import torch
from release_fixtures import ADAPTERS, EXPECTED_NAME, HERE, answers, base_model, expected

from ept import EPTModel, __version__
from ept.model.export import FoldedAdapter

RELEASES = sorted(path for path in HERE.glob("adapter_*") if path.is_dir())
SAVED = [(release, name) for release in RELEASES for name in ADAPTERS if (release / name).is_dir()]


def test_there_is_one_of_this_release():
    assert HERE / f"adapter_{__version__}" in RELEASES, "run python tests/versions/release_fixtures.py and commit it"
    for name in ADAPTERS:
        assert (HERE / f"adapter_{__version__}" / name / EXPECTED_NAME).is_file()


@pytest.mark.parametrize("release, name", SAVED, ids=[f"{release.name}/{name}" for release, name in SAVED])
def test_loads_and_answers_as_then(release, name, recwarn):
    family, _ = ADAPTERS[name]
    then = expected(release / name)
    model = EPTModel.from_pretrained(base_model(family), release / name)
    torch.testing.assert_close(answers(model, family), then, rtol=1e-4, atol=1e-5)
    assert not [w for w in recwarn if "does not know" in str(w.message)]
    assert EPTModel.from_pretrained(base_model(family), release / name, is_trainable=True).peft_config
    torch.testing.assert_close(FoldedAdapter.read(release / name).tensors()["prompt"], then["prompt"])


def test_the_answers_are_the_adapters_and_not_the_base_models():
    """Had the adapter no effect, the comparison would hold for any adapter."""
    family, _ = ADAPTERS["decoder"]
    release = HERE / f"adapter_{__version__}" / "decoder"
    model = EPTModel.from_pretrained(base_model(family), release)
    with torch.no_grad():
        model.prompt_encoder["default"].prompt.add_(0.01)
    assert not torch.allclose(answers(model, family)["logits"], expected(release)["logits"], rtol=1e-4, atol=1e-5)
