"""Intervals and tests against known values, and the tables."""

import csv
import json
from dataclasses import replace

import pytest
import torch

from ept.compare.execute import Outcome
from ept.compare.plan import PlannedRun, Record
from ept.compare.progress import steps_table, steps_to
from ept.compare.tables import (
    as_json,
    interval,
    markdown,
    paired_test,
    rates_table,
    scores_table,
    summarise,
    write_tables,
)
from ept.runs.config import RunConfig
from ept.utils.environment import peak_memory


def test_interval_of_known_values():
    # mean 3, standard deviation sqrt(2.5), t(0.975, 4) = 2.7764451
    found = interval([1, 2, 3, 4, 5])
    assert (found.mean, found.n) == (3, 5)
    assert found.half_width == pytest.approx(2.7764451 * 2.5**0.5 / 5**0.5, rel=1e-7)
    assert interval([0.5]).half_width is None
    assert interval([0.5, 0.5]).half_width == 0
    assert interval([0.9, 0.8]).text() == "85.0 ± 63.5"  # t(0.975, 1) = 12.7062, of 0.05
    assert interval([0.9]).text() == "90.0"
    assert interval([0.9], 0.01).text() == "90.0 ± 2.0 (rows)"  # 1.96 standard errors


def test_paired_test_of_known_values():
    # differences 1, 2, 3, 2, 2: mean 2, standard deviation sqrt(0.5), t = 2 / sqrt(0.1) = 6.3246, p = 0.0032 at 4
    one = dict(zip([("a", 0), ("a", 1), ("a", 2), ("b", 0), ("b", 1)], [2, 4, 6, 5, 7]))
    other = dict(zip(one, [1, 2, 3, 3, 5])) | {("b", 9): 100.0}
    found = paired_test("x", one, "y", other)
    assert (found.difference.mean, found.difference.n) == (2, 5)
    assert found.p == pytest.approx(0.00320, abs=5e-6)
    assert found.p_of_tasks is None  # both tasks differ by 2
    assert paired_test("y", other, "x", one).difference.mean == -2
    assert found.row() == ["x − y", "200.0 ± 87.8", "0.003", "5", "-"]
    assert replace(found, p=0.0001).row()[2] == "< 0.001"
    # of the tasks' means 1, 2 and 3: t = 2 / (1 / sqrt(3)) = 3.4641, p = 0.0742 at 2
    tasks = {(name, seed): mean + aside for name, mean in zip("abc", (1, 2, 3)) for seed, aside in ((0, 1), (1, -1))}
    assert paired_test("x", tasks, "y", dict.fromkeys(tasks, 0)).p_of_tasks == pytest.approx(0.0742, abs=5e-5)


def test_paired_test_without_a_spread():
    same = {("a", 0): 0.1, ("a", 1): 0.2}
    shifted = {key: value + 0.3 for key, value in same.items()}
    assert paired_test("x", same, "y", shifted).p is None
    assert paired_test("x", same, "y", {("a", 0): 0.5}).difference.n == 1
    assert paired_test("x", same, "y", {("b", 0): 0.5}) is None


def record(
    folder,
    method,
    seed,
    score,
    task="glue/sst2",
    sweep=None,
    value=None,
    chosen=True,
    parameters=100,
    step=5.0,
    rates=(0.1, 0.001),
):
    """A run as `compare` leaves it; `score` None: it failed."""
    config = RunConfig(output_dir=str(folder / f"{task}-{method}-{seed}-{sweep}-{value}-{rates[0]}"))
    config.model.name_or_path = "a/model"
    run = PlannedRun(method, task, sweep, value, seed, rates, config)
    if score is None:
        return Record(run, Outcome(run.folder, None, "RuntimeError: out | of memory"), chosen)
    (run.folder / "adapter").mkdir(parents=True)
    adapter = {"num_virtual_tokens": 7, "r": 3, "num_spaces": 4 * (method == "ept"), "space_dim": 2}
    (run.folder / "adapter/adapter_config.json").write_text(json.dumps(adapter), "utf-8")
    curve = [{"step": 10, "loss": 1.0}, {"step": 10, "eval_accuracy": score / 2}, {"step": 20, "eval_accuracy": score}]
    (run.folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, curve)) + "\n", "utf-8")
    results = {
        "task": task,
        "metric": "accuracy",
        "score": score,
        "best_validation": score,
        "majority": 0.5,
        "constant": score == 0.5,
        "stored_parameters": parameters - 20,
        "trainable_parameters": parameters,
        "step_time_ms": step,
        "train_seconds": 2.0,
        "rows": {"train": 10, "validation": 5, "test": 1234},
        "versions": {"torch": "9.9"},
        "hardware": {"cores": 2},
    }
    return Record(run, Outcome(run.folder, results), chosen)


@pytest.fixture
def records(tmp_path):
    return [
        record(tmp_path, "pt", 0, 0.6),
        record(tmp_path, "pt", 1, 0.7),
        record(tmp_path, "ept", 0, 0.8, parameters=99),
        record(tmp_path, "ept", 1, 0.9, parameters=99, step=7.0),
        record(tmp_path, "pt", 0, 0.5, task="super_glue/cb"),
        record(tmp_path, "pt", 1, None, task="super_glue/cb"),
        record(tmp_path, "ept", 0, 0.6, task="super_glue/cb", parameters=99),
        record(tmp_path, "ept", 1, 0.7, task="super_glue/cb", parameters=99),
        record(tmp_path, "lora", 0, None),
        record(tmp_path, "ept", 0, 0.1, sweep="r", value=2),
        record(tmp_path, "ept", 0, 0.95, sweep="r", value=2, task="super_glue/cb", chosen=False),
    ]


def test_f1_is_named_with_its_label(tmp_path):
    found = record(tmp_path, "pt", 0, 0.6)
    found.outcome.results.update(metric="f1", by_label={"no": {}, "yes": {}})
    assert summarise([found])[0].rows == "glue/sst2 (f1 of 'yes'): 10 train, 5 validation, 1,234 test"


def test_summary(records):
    base, swept = summarise(records)
    assert (base.title, swept.title) == ("The configuration itself", "r=2")
    pt, ept = base.methods
    assert (ept.parameters, ept.step_time_ms) == (99, 5.0)
    assert ept.mean.mean == pytest.approx((0.7 + 0.8) / 2)  # of seed 0 and seed 1
    assert ept.tasks["super_glue/cb"].mean == pytest.approx(0.65)
    assert (pt.mean.mean, pt.mean.n) == (pytest.approx(0.55), 1)  # seed 1 lacks a task
    (test,) = base.tests
    assert (test.first, test.second, test.difference.n) == ("ept", "pt", 3)
    assert test.difference.mean == pytest.approx((0.2 + 0.2 + 0.1) / 3)
    assert base.failed == ["lora"]
    assert swept.methods[0].mean is None  # the run of the other task was not chosen


def test_steps(records):
    base, _ = summarise(records)
    pt, ept = base.methods
    assert pt.curve == {10: pytest.approx(0.575 / 2), 20: pytest.approx(0.575)}  # of 0.65 and 0.5
    assert ept.curve[20] == pytest.approx(0.75)
    header, rows = steps_table(base.methods)
    assert header[-2:] == ["steps to prompt tuning's end", "share of its steps"]
    # on the line from (10, 0.375) to (20, 0.75): 0.7125 at 19, 0.575 at 15.3
    assert rows[1] == ["EPT", "20", "75.0", "19", "15", "0.77"]
    assert rows[0][-2:] == ["20", "1.00"]
    assert steps_to({10: 0.5, 20: 0.6}, 0.7) is None
    assert steps_to({10: 0.5, 20: 0.6}, 0.4) == 10  # no straight line from nowhere
    assert steps_table([replace(pt, curve={20: 0.5})]) is None


def test_a_method_without_a_score_of_a_task_has_no_steps(tmp_path):
    runs = [("pt", 0.9, "a"), ("pt", 0.5, "b"), ("ept", 0.8, "a"), ("ept", None, "b")]
    (base,) = summarise([record(tmp_path, method, 0, score, task=task) for method, score, task in runs])
    # The task that is left is the easier one: its mean passes prompt tuning's, which is better on both.
    assert [row[0] for row in steps_table(base.methods)[1]] == ["prompt tuning"]
    assert [row[-1] for row in scores_table(base)[1]] == ["5.0", "-", ""]


def test_sizes_that_differ_by_task_are_all_shown(tmp_path):
    runs = [record(tmp_path, "dept", seed, 0.6, task=task) for task in "ab" for seed in (0, 1)]
    for run in runs[2:]:  # the longer texts of the task leave less of a budget for the rank
        file = run.outcome.folder / "adapter/adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text("utf-8")) | {"r": 2}), "utf-8")
    assert scores_table(summarise(runs)[0])[1][0][3] == "s=7 r=3/2"


def test_steps_that_the_evaluations_do_not_tell(records):
    (pt, ept), _ = (setting.methods for setting in summarise(records))
    at_once, negative = replace(ept, curve={10: 0.9, 20: 0.9}), replace(pt, curve={10: -0.4, 20: -0.2})
    assert steps_table([pt, at_once])[1][1][3:] == ["≤ 10", "≤ 10", "0.50"]
    assert steps_table([negative])[1][0][3] == "-"


def test_table(records):
    base, swept = summarise(records)
    header, rows = scores_table(base)
    assert header == [
        "method",
        "stored",
        "trained",
        "sizes",
        "glue/sst2",
        "super_glue/cb",
        "mean",
        "one answer",
        "step (ms)",
    ]
    scores = ["65.0 ± 63.5", "50.0 ± 2.8 (rows) (1 of 2 seeds)", "55.0 ± 2.0 (rows) (1 of 2 seeds)"]
    assert rows[0] == ["prompt tuning", "80", "100", "s=7 r=3", *scores, "1 of 3", "5.0"]
    assert rows[1][3] == "s=7 r=3 K=4 h=2"
    assert rows[2] == ["PEFT LoRA", "", "", "", "failed", "failed", "failed", "", ""]
    assert scores_table(swept)[1][0][4:7] == ["10.0 ± 1.7 (rows)", "failed", "failed"]
    assert rows[3] == ["commonest label always", "0", "0", "", "50.0", "50.0", "50.0", "", ""]


def test_page_and_csv(records, tmp_path):
    settings = summarise(records)
    command = "ept compare --config x.yaml"
    page = markdown(records, settings, command)
    for part in (
        command,
        "torch 9.9",
        "1,234 test",
        "| EPT − prompt tuning | 16.7 ± 14.3 | 0.038 | 3 |",
        "## 2 of 11 runs failed",
        "RuntimeError: out | of memory",
        "| r=2 | glue/sst2 | EPT | 0.1 | 0.001 | 10.0 | chosen | 1.000 |",
    ):
        assert part in page
    table, written, machines = write_tables(tmp_path / "new", records, settings, command)
    found = json.loads(machines.read_text("utf-8"))
    assert (found["command"], found["hardware"]) == (command, {"cores": 2})
    assert found["settings"][0]["methods"][0]["curve"].keys() == {"10", "20"}
    assert (table, written.read_text("utf-8")) == (tmp_path / "new/comparison.csv", page)
    lines = list(csv.DictReader(table.read_text("utf-8").splitlines()))
    assert len(lines) == len(records)
    assert [line["status"] for line in lines].count("failed") == 2
    assert (lines[2]["score"], lines[2]["trainable_parameters"], lines[2]["test_rows"]) == ("0.8", "99", "1234")
    assert lines[0]["low_rank_learning_rate"] == ""  # prompt tuning has nothing else


def test_a_comparison_that_was_continued_elsewhere_names_all_versions_and_machines(records):
    records[1].outcome.results.update(versions={"torch": "10.0"}, hardware={"cores": 64})
    page = markdown(records, summarise(records), "")
    assert "Versions: torch 9.9; torch 10.0. Machine: cores 2; cores 64." in page


def test_memory_of_a_process_is_not_that_of_a_run(tmp_path):
    runs = [record(tmp_path, "pt", seed, 0.6) for seed in (0, 1)]
    for run, kind in zip(runs, ("cuda allocated", peak_memory()[1])):
        run.outcome.results.update(peak_memory_bytes=7, peak_memory_kind=kind)
    table, *_ = write_tables(tmp_path, runs, summarise(runs), "")
    lines = csv.DictReader(table.read_text("utf-8").splitlines())
    assert [line["peak_memory_bytes"] for line in lines] == ["7", "7" if torch.cuda.is_available() else ""]


def test_rates(tmp_path):
    faster, twice = {"chosen": False, "rates": (0.2, 0.001)}, {"rates": (0.05, 0.001), "chosen": False}
    records = [
        record(tmp_path, "pt", 0, 0.8),
        record(tmp_path, "pt", 1, 0.6),
        record(tmp_path, "pt", 0, 0.7, **faster),
        record(tmp_path, "pt", 1, 0.6, **faster),
        record(tmp_path, "pt", 0, 0.4, **twice),
        record(tmp_path, "pt", 1, None, **twice),
        record(tmp_path, "ept", 0, 0.0),
    ]
    assert [row[2:] for row in rates_table(records)[1]] == [
        ["prompt tuning", "0.1", "-", "70.0 ± 127.1", "chosen", "1.000"],
        ["prompt tuning", "0.2", "-", "65.0 ± 63.5", "5.0 ± 63.5", "0.929"],  # 1.3 of 1.4
        ["prompt tuning", "0.05", "-", "40.0", "40.0", "0.500"],  # of seed 0, which both have
        ["EPT", "0.1", "0.001", "0.0", "chosen", ""],
    ]
    assert rates_table(records[5:6])[1] == []


def test_for_machines(records):
    found = json.loads(json.dumps(as_json(records, summarise(records))))
    assert found["runs"] == 11
    assert [failure["error"] for failure in found["failed"]] == ["RuntimeError: out | of memory"] * 2
    half_width = pytest.approx(0.6353, abs=1e-4)
    mean = {"mean": pytest.approx(0.75), "half_width": half_width, "n": 2, "of_rows": False}
    assert found["settings"][0]["methods"][1]["mean"] == mean


def test_nothing_finished(tmp_path):
    records = [record(tmp_path, "pt", 0, None)]
    page = markdown(records, summarise(records), "ept compare")
    assert "No run has finished." in page
    assert "1 of 1 runs failed" in page
