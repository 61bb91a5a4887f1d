"""A classifier's regression head for numbers of any scale: where it starts, and that it learns."""

import json
import random
import statistics

import pytest
import torch
from scipy import stats
from sklearn.metrics import r2_score
from tiny_runs import BAD, GOOD, OTHER
from torch import nn

from ept.runs.folder import RunFolder
from ept.runs.labelling import label_rows
from ept.runs.predict import open_run
from ept.runs.regression import MEAN, SPREAD, UNIT, in_units_of, last_layer, start_below, unit_of
from ept.runs.train import prepare, train
from ept.runs.trainer import PromptTrainer, collate_share
from ept.tasks import read_rows
from ept.tasks.encoding import Collator

UNITS = {"shares": (0.002, 0.0005), "stars": (3.0, 1.0), "prices": (240_000.0, 60_000.0), "years": (1990.0, 4.0)}


def save_numbers(folder, mean, spread):
    """Sentences whose last word says which half of the range the number is in, and how far."""
    chance = random.Random(0)
    folder.mkdir()
    for split, count in (("train", 96), ("validation", 32), ("test", 32)):
        lines = []
        for index in range(count):
            sign = 1 if index % 2 else -1
            words = [*chance.choices(OTHER, k=chance.randint(3, 6)), chance.choice(GOOD if sign > 0 else BAD)]
            number = mean + spread * sign * chance.uniform(0.5, 1.5)
            lines.append(json.dumps({"text": " ".join(words), "label": round(number, 6)}))
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def settings(tmp_path, unit):
    data = save_numbers(tmp_path / "numbers", *UNITS[unit])
    return "data.task=null", f"data.data_dir={data}", "training.learning_rate=0.1", "training.max_steps=60"


@pytest.mark.parametrize("unit, dtype", [("shares", "float32"), ("prices", "bfloat16"), ("years", "bfloat16")])
def test_a_run_learns_numbers_of_any_unit(configure, tmp_path, unit, dtype):
    config = configure("bert", *settings(tmp_path, unit), f"model.dtype={dtype}")
    results = train(config)
    assert results["test_metrics"]["pearson"] > 0.8
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in lines if '"loss"' in line]
    assert losses[-1] < 0.25 * losses[0] < 8  # of numbers with a variance of 2.25
    mean, spread = UNITS[unit]
    predictor = open_run(tmp_path / "run")
    low, high = (predictor.fit([{"text": f"the film was {word}"}], "test")[0].ids for word in ("awful", "lovely"))
    logits = predictor.model(**predictor._batch([low, high])).logits[:, 0].tolist()
    assert mean - 2.5 * spread < logits[0] < mean < logits[1] < mean + 2.5 * spread


def test_numbers_are_trained_scored_and_given_as_they_are(configure, tmp_path):
    config = configure("bert", *settings(tmp_path, "prices"), "training.max_steps=20")
    rows = {split: read_rows(tmp_path / "numbers" / f"{split}.jsonl") for split in ("train", "test")}
    run = prepare(config)
    trained = PromptTrainer(config, run, RunFolder(tmp_path / "unused")).train_dataset["labels"]
    assert sorted(trained) == sorted(row["label"] for row in rows["train"])

    results = train(config)
    predictor = open_run(tmp_path / "run")
    labelled = label_rows(predictor, [{"text": row["text"]} for row in rows["test"]], "test")
    found, right = [row["prediction"] for row in labelled], [row["label"] for row in rows["test"]]
    assert len(set(found)) > len(set(predictor.labels))  # finer than what a language model would write
    ids = [fitted.ids for fitted in predictor.fit(rows["test"], "test")]
    with torch.no_grad():
        logits = [predictor.model(**predictor._batch([text])).logits.item() for text in ids]
    assert found == pytest.approx(logits, rel=1e-4)
    for name, correlate in (("pearson", stats.pearsonr), ("spearman", stats.spearmanr)):
        assert results["test_metrics"][name] == pytest.approx(correlate(found, right).statistic, abs=1e-5)
    assert results["test_metrics"]["r2"] == pytest.approx(r2_score(right, found), abs=1e-4)


@pytest.mark.parametrize("unit", UNITS)
def test_a_new_head_starts_below_the_numbers_in_their_units(configure, tmp_path, unit):
    run = prepare(configure("bert", *settings(tmp_path, unit)))
    values = list(run.run_data.data.train["number"])
    ids = run.run_data.data.train["text_ids"][:16]
    with torch.no_grad():
        found = run.model(**run._batch(ids)).logits[:, 0].tolist()
    mean, spread = statistics.fmean(values), statistics.pstdev(values)
    assert all(abs(x - mean + 1.8 * spread) < 6 * spread for x in found)
    assert statistics.pstdev(found) > 1e-4 * spread


def test_numbers_spread_as_ratings_are_leave_a_head_as_it_is(configure, tmp_path):
    model = prepare(configure("bert", *settings(tmp_path, "prices"))).model
    layer = last_layer(model)
    before = layer.weight.detach().clone(), layer.bias.detach().clone()
    ratings = [MEAN - SPREAD, MEAN + SPREAD] * 3
    start_below(model, ratings)
    torch.testing.assert_close((layer.weight.detach(), layer.bias.detach()), before)
    assert unit_of(ratings) == pytest.approx(1.0)
    assert unit_of([7.0, 7.0]) == 1.0


def test_rates_of_the_last_layer_are_in_units_of_the_spread():
    body, layer = nn.Linear(3, 4), nn.Linear(4, 1)
    groups = [{"params": list(body.parameters()), "lr": 0.1}, {"params": [*layer.parameters()], "lr": 0.01}]
    first, last = in_units_of(50.0, layer, groups)
    assert first == {"params": list(body.parameters()), "lr": 0.1}
    assert last == {"params": [layer.weight, layer.bias], "lr": 0.5, UNIT: 50.0}


def test_a_head_of_several_numbers_has_no_last_layer(configure):
    assert last_layer(prepare(configure("bert")).model) is None


@pytest.mark.parametrize("accumulated", [1, 4])
def test_minus_100_is_a_number_like_any_other(configure, tmp_path, accumulated):
    """The labels' mark for "no label" is -100: the losses must be those of numbers that are all larger by one."""
    found = []
    for shift in (0, 1):
        data, name = tmp_path / f"numbers{shift}", f"run{shift}"
        data.mkdir()
        for split, count in (("train", 48), ("validation", 8), ("test", 8)):
            rows = [
                {"text": f"the film {OTHER[i % 10]}", "label": (-100, -37, 100)[i % 3] + shift} for i in range(count)
            ]
            lines = [json.dumps({**row, "text": f"{row['text']} {split} {i}"}) for i, row in enumerate(rows)]
            (data / f"{split}.jsonl").write_text("\n".join(lines))
        own = ("data.task=null", f"data.data_dir={data}", "data.label_values=[-100, 0, 100, 200]")
        steps = ("training.max_steps=4", "training.batch_size=1", "training.logging_steps=1")
        run = configure("bert", *own, *steps, f"training.gradient_accumulation_steps={accumulated}", name=name)
        train(run)
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        found.append([event["loss"] for event in map(json.loads, lines) if "loss" in event])
    assert found[0] == pytest.approx(found[1], rel=1e-3)


def test_a_share_without_rows_has_no_number(configure, tmp_path):
    config = configure("bert", *settings(tmp_path, "prices"))
    trainer = PromptTrainer(config, prepare(config), RunFolder(tmp_path / "unused"))
    rows, collate = list(trainer.train_dataset), Collator("SEQ_CLS", 0)
    shares = [collate_share(collate, rows[0], share) for share in (rows[:3], [])]
    assert int(trainer._get_num_items_in_batch(shares, trainer.args.device)) == 3
