"""A classifier's trained head names its outputs: labels of these names are trained, scored and predicted as those."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoTokenizer, BertForSequenceClassification

from ept.runs.config import RunConfig
from ept.runs.labelling import label_rows
from ept.runs.predict import open_run
from ept.runs.train import train, with_data

Configure = Callable[..., RunConfig]
NAMED = ["data.task=glue/sst2"]
OWN = ["data.task=null", "data.label_words={0: Negative, 1: Positive}", "data.template={sentence}"]


def save_head(source: Path, folder: Path, names: list[str], order: list[int]) -> Path:
    """A copy of a classifier whose outputs stand in another order, with names."""
    model = BertForSequenceClassification.from_pretrained(source)
    model.classifier.weight.data = model.classifier.weight.data[order]
    model.config.id2label, model.config.label2id = dict(enumerate(names)), {n: i for i, n in enumerate(names)}
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("settings", [NAMED, OWN], ids=["named task", "own data"])
def test_labels_go_to_the_outputs_of_their_names(
    configure: Configure, models: dict[str, Path], tmp_path: Path, settings: list[str]
) -> None:
    found = {}
    for name, order in (("usual", [0, 1]), ("turned", [1, 0])):
        names = [["negative", "positive"][output] for output in order]
        model = save_head(models["bert"], tmp_path / f"model {name}", names, order)
        config = configure("bert", f"model.name_or_path={model}", *settings, "training.max_steps=2", name=name)
        found[name] = train(config)
    usual, turned = found["usual"], found["turned"]
    for key in ("test_metrics_before", "test_metrics", "calibration_error", "majority"):
        assert turned[key] == pytest.approx(usual[key], abs=1e-5)
    words = list(turned["by_label"])
    assert [usual["config"]["model"]["head_labels"], turned["config"]["model"]["head_labels"]] == [None, words[::-1]]
    assert (
        json.loads((tmp_path / "turned" / "adapter" / "adapter_config.json").read_text())["label_words"] == words[::-1]
    )
    rows = [{"text": "the film was awful"}, {"text": "the story was lovely"}]
    labelled = [label_rows(open_run(tmp_path / name), rows, "test") for name in found]
    assert [[row["prediction"] for row in of] for of in labelled] == [[row["prediction"] for row in labelled[0]]] * 2
    assert labelled[1][0][f"p({words[0]})"] == pytest.approx(labelled[0][0][f"p({words[0]})"], abs=1e-4)


@pytest.mark.parametrize("names, warns", [
    (["LABEL_0", "LABEL_1"], False), (["NEGATIVE", "Positive"], False), (["toxic", "civil"], True),
])  # fmt: skip
def test_names_of_other_words_are_told(
    configure: Configure, models: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture,
    names: list[str], warns: bool,
) -> None:  # fmt: skip
    model = save_head(models["bert"], tmp_path / "model", names, [0, 1])
    with caplog.at_level(logging.WARNING):
        config = with_data(configure("bert", f"model.name_or_path={model}"), None)
    assert config.model.head_labels is None
    assert ("gives 'toxic', 'civil'; the labels 'negative', 'positive'" in caplog.text) == warns


def test_an_order_that_is_given_must_be_of_the_labels(configure: Configure) -> None:
    with pytest.raises(ValueError, match=r"model.head_labels=\['good', 'bad'\]: name each of the labels negative, pos"):
        train(configure("bert", "model.head_labels=[good, bad]"))
