"""Every task through a whole run: read, encoded, trained, answered and scored by its own metrics."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import transformers
from test_tasks_all_thirteen import characters, write_folder
from tiny_models import FAMILIES, ONE_A_TASK, TASK_OF

from ept.runs.config import load_run_config
from ept.runs.train import train
from ept.tasks import TASKS, get_task

SPECIAL: dict[str, Any] = {"vocab_size": 127, "pad_token_id": 0, "eos_token_id": 1}  # of the tokenizer of characters
CHANGES: dict[str, dict[str, Any]] = {
    "llama": {"bos_token_id": None},
    "t5": {"decoder_start_token_id": 0},
    "bert": {"max_position_embeddings": 512},
}
# Each task with one kind of model in turn; those whose labels or rows are of another kind with all three.
SPECIAL_TASKS = ("glue/stsb", "super_glue/multirc")
CASES = [(name, ONE_A_TASK[i % 3]) for i, name in enumerate(sorted(TASKS)) if name not in SPECIAL_TASKS]
CASES += [(name, family) for name in SPECIAL_TASKS for family in ONE_A_TASK]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("characters")
    for family in ONE_A_TASK:
        _, model_class, config_class, arguments = FAMILIES[family]
        model_class = "BertModel" if family == "bert" else model_class  # each task draws a head of its own
        config = getattr(transformers, config_class)(**{**arguments, **SPECIAL, **CHANGES[family]})
        getattr(transformers, model_class)(config).save_pretrained(folder / family)
        characters().save_pretrained(folder / family)
    return folder


@pytest.mark.parametrize("name, family", CASES)
def test_a_whole_run(name: str, family: str, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ept.runs.train.learning_curve", lambda *_, **__: None)  # takes a third of the time
    task = get_task(name)
    (tmp_path / "data").mkdir()
    settings = [
        f"model.name_or_path={models / family}",
        f"data.task={name}",
        f"data.data_dir={write_folder(tmp_path / 'data', name)}",
        "method.num_virtual_tokens=3",
        "method.r=2",
        "training.max_steps=2",
        "training.eval_steps=2",
        "training.score_before=false",
        f"output_dir={tmp_path / 'run'}",
    ]
    results = train(load_run_config(None, settings))
    assert (results["task"], results["metric"], results["max_length"]) == (name, task.metrics[0], task.max_length)
    assert set(results["test_metrics"]) == {*task.metrics, "unparsable"}
    assert results["score"] == results["test_metrics"][task.metrics[0]]
    assert all(-1 <= value <= 1 for value in results["test_metrics"].values())
    if TASK_OF[family] != "SEQ_2_SEQ_LM":  # a random encoder-decoder generates what it likes
        assert results["test_metrics"]["unparsable"] == 0
    head = 0 if TASK_OF[family] != "SEQ_CLS" else 32 * task.num_outputs + task.num_outputs
    assert results["trainable_parameters"] - head == 3 * 32 + 2 * (task.max_length + 32) + 1 + 4 * (2 * 2 * 32 + 32)
