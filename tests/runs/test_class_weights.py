"""Class weights: an unbalanced batch teaches what a balanced one teaches, in every family and however it is cut."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from run_checks import assert_same_step, first_step
from tiny_runs import OTHER, save_data

from ept.runs.class_weights import added_loss, row_weights
from ept.runs.config import RunConfig, load_run_config
from ept.runs.train import prepare

Configure = Callable[..., RunConfig]
ONE_STEP = ["training.max_steps=1", "training.max_grad_norm=0", "training.logging_steps=1"]


@pytest.fixture(scope="module")
def unbalanced(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder of data with nine rows of one label and three of another, and one where the three stand three times."""
    folders = {}
    for name, times in (("uneven", 1), ("even", 3)):
        folder = folders[name] = save_data(tmp_path_factory.mktemp(name), rows=18)
        rows = [json.loads(line) for line in (folder / "train.jsonl").read_text("utf-8").splitlines()]
        common, rare = ([row for row in rows if row["label"] == label] for label in (0, 1))
        lines = [json.dumps(row) for row in [*common, *rare[:3] * times]]
        (folder / "train.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folders


@pytest.mark.parametrize("batch_size, accumulation", [(12, 1), (4, 3)])
def test_weights_do_what_repeated_rows_do(
    configure: Configure, unbalanced: dict[str, Path], tmp_path: Path, family: str, batch_size: int, accumulation: int
) -> None:
    even = configure(family, *ONE_STEP, f"data.data_dir={unbalanced['even']}")
    weighted = configure(family, *ONE_STEP, f"data.data_dir={unbalanced['uneven']}", "training.class_weights=true")
    expected = first_step(even, tmp_path / "even", batch_size=18)
    assert_same_step(first_step(weighted, tmp_path / "weighted", batch_size, accumulation), expected)


@pytest.mark.parametrize("labels, weights", [([0, 0, 0, 1], [2 / 3, 2 / 3, 2 / 3, 2]), ([5, 5], [1, 1])])
def test_weights_of_rows(labels: list[int], weights: list[float]) -> None:
    assert row_weights(labels) == pytest.approx(weights)
    assert sum(row_weights(labels)) == pytest.approx(len(labels))


def test_positions_without_a_label_weigh_nothing() -> None:
    logits = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([[-100, 3, 4], [-100, -100, 1]])
    losses = -logits[:, -3:].log_softmax(-1)  # the rows in front of the labels are the prompt's
    expected = (losses[0, 0, 3] + losses[0, 1, 4]) / 2 - losses[1, 1, 1] / 2
    found = added_loss(logits, labels, torch.tensor([1.5, 0.5]), 6, shifted=True)
    torch.testing.assert_close(found, expected / 6)
    torch.testing.assert_close(added_loss(logits, labels, torch.tensor([1.5, 0.5]), None, True), expected / 3)


def test_refused(configure: Configure, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"balanced_sampling and training\.class_weights exclude each other"):
        load_run_config(None, ["training.class_weights=true", "training.balanced_sampling=true"])
    file = tmp_path / "a.jsonl"
    rows = [{"text": f"{word} film {number}", "stars": number / 4} for number in range(20) for word in OTHER[:3]]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    own = ("data.task=null", "data.data_dir=null", f"data.train_file={file}", "training.class_weights=true")
    for settings, kind in (((), "numbers"), (("data.target_template={stars}", "data.template={text}"), "free text")):
        with pytest.raises(ValueError, match=f"weights labels, but the answers here are {kind}"):
            prepare(configure("llama", *own, *settings, name=None))
