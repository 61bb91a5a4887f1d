"""Whole comparisons on a tiny model: finished runs are skipped, interrupted ones resume, failed ones do not stop it."""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from typer.testing import CliRunner

from ept.cli.main import app
from ept.compare import execute as execution
from ept.compare.config import CompareConfig, load_comparison
from ept.compare.execute import Outcome, execute
from ept.compare.plan import compare
from ept.compare.tables import summarise
from ept.runs import train as training
from ept.runs.train import PromptTrainer

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.usefixtures("no_curves")
needs_ray = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="the optional package ray is not installed: `make ray` runs it"
)
PARTS = ["ept", "ept-no-fusion", "ept-no-spaces", "ept-uniform-gate", "ept-fixed-beta", "ept-cosine", "ept-token"]
PARTS += ["ept-raw-scale"]


def overrides(tiny, output, *more):
    return [
        f"model.name_or_path={tiny / 'llama'}",
        f"data.data_dir={tiny / 'data'}",
        f"output_dir={output}",
        "data.max_length=16",
        "method.num_virtual_tokens=4",
        "method.r=2",
        "training.max_steps=6",
        "training.eval_steps=3",
        "training.low_rank_learning_rate=0.03",
        "training.score_before=false",
        "compare.tasks=[glue/sst2]",
        "compare.methods=[pt, ept]",
        "compare.seeds=[0, 1]",
        "compare.learning_rates=[0.05, 0.01]",
        "compare.learning_rate_seeds=1",
        *more,
    ]


def carry_out(tiny, output, *more):
    lines = []
    return compare(load_comparison(None, overrides(tiny, output, *more)), report=lines.append), lines


def found(records):
    """Collects everything that must not depend on how the runs were executed: all but times, memory and folders."""
    kept = ("score", "best_validation", "best_step", "steps", "trainable_parameters", "test_metrics", "seed")
    return [
        (r.run.description, r.chosen, r.outcome.results and {key: r.outcome.results[key] for key in kept})
        for r in records
    ]


@pytest.fixture(scope="module")
def once(no_curves, tiny, tmp_path_factory):
    """A finished comparison: its folder, records and report."""
    folder = tmp_path_factory.mktemp("comparison")
    return folder, *carry_out(tiny, folder)


def test_rates_are_searched_with_the_first_seed(once):
    _, records, lines = once
    runs = [(r.run.method, r.run.seed) for r in records]
    assert runs == [*[("pt", 0)] * 2, *[("ept", 0)] * 2, ("pt", 1), ("ept", 1)]
    assert all(r.outcome.results is not None for r in records)
    for method in ("pt", "ept"):
        mine = [r for r in records if r.run.method == method]
        assert [r.chosen for r in mine].count(True) == 2
        best = max(r.outcome.results["best_validation"] for r in mine[:2])
        (chosen,) = [r for r in mine[:2] if r.chosen]
        assert chosen.outcome.results["best_validation"] == best
        assert chosen.run.rates == mine[2].run.rates
    assert len(lines) == 6
    assert "accuracy" in lines[0]
    assert json.loads((records[0].run.folder / "results.json").read_text("utf-8"))["score_before"] is None


def test_finished_runs_are_skipped(once, tiny, monkeypatch):
    folder, records, _ = once
    monkeypatch.setattr(training, "train", None)  # would fail if it were called
    again, lines = carry_out(tiny, folder)
    assert found(again) == found(records)
    assert lines == ["4 of 4 runs are finished already", "2 of 2 runs are finished already"]


@pytest.fixture
def kept_files():
    """Gives a function that remembers a file's content, and restores all of them at the end."""
    contents = {}
    yield lambda file: contents.setdefault(file, file.read_bytes())
    for file, content in contents.items():
        file.write_bytes(content)


def test_runs_of_other_rows_are_not_taken(once, tiny, kept_files, monkeypatch, caplog):
    folder, records, finished = (
        once[0],
        once[1],
        ["4 of 4 runs are finished already", "2 of 2 runs are finished already"],
    )
    monkeypatch.setattr(training, "train", None)  # would fail if it were called
    train, splits = next((tiny / "data").rglob("train.*")), records[1].run.folder / "splits.json"
    message = "was made with other rows of glue/sst2 than the current ones: give another output folder"
    rows = kept_files(train)
    train.write_bytes(rows + rows.splitlines(keepends=True)[-1])
    with pytest.raises(ValueError, match=message):
        carry_out(tiny, folder)
    train.unlink()
    assert carry_out(tiny, folder)[1] == finished
    assert "the rows of its runs are not checked" in caplog.text
    splits.write_bytes(kept_files(splits).replace(b'"sha256": "', b'"sha256": "0'))
    with pytest.raises(ValueError, match=message):
        carry_out(tiny, folder)


def test_a_run_that_another_comparison_finished_meanwhile_is_taken(once, monkeypatch):
    record = once[1][0]
    monkeypatch.setattr(training, "train", None)  # would fail if it were called
    assert execute(record.run.config.to_dict()) == record.outcome


# A separate process that the system kills in the middle of a run's training: nothing is closed, flushed or caught.
KILLED = """
import os, signal, sys
from ept.cli.main import app
from ept.runs.train import PromptTrainer

step, left = PromptTrainer.training_step, [int(sys.argv.pop(1))]

def counted(self, *arguments, **keywords):
    left[0] -= 1
    if left[0] < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, *arguments, **keywords)

PromptTrainer.training_step = counted
app()
"""


def test_a_killed_comparison_continues_where_it_was(once, tiny, tmp_path, monkeypatch):
    steps = 6 + 4  # the second run, after its first checkpoint
    command = [sys.executable, "-c", KILLED, str(steps), *arguments(tiny, tmp_path, "compare.methods=[pt]")]
    killed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    runs = sorted((tmp_path / "runs").iterdir(), key=lambda run: (run / "results.json").is_file())
    assert [(run / "results.json").is_file() for run in runs] == [False, True]
    assert [path.name for path in (runs[0] / "checkpoints").iterdir()] == ["checkpoint-3"]
    step, counted = PromptTrainer.training_step, []

    def counting(self, *arguments, **keywords):
        counted.append(1)
        return step(self, *arguments, **keywords)

    monkeypatch.setattr(PromptTrainer, "training_step", counting)
    records, lines = carry_out(tiny, tmp_path, "compare.methods=[pt]")
    assert lines[0] == "1 of 2 runs are finished already"
    assert len(counted) == 3 + 6  # the second run continues from step 3, the third is new
    assert found(records) == found(record for record in once[1] if record.run.method == "pt")


def test_a_failing_run_is_recorded_and_does_not_stop_the_rest(once, tiny, tmp_path, monkeypatch):
    shutil.copytree(once[0], tmp_path, dirs_exist_ok=True)
    for record in once[1]:
        if record.run.method == "pt":
            shutil.rmtree(tmp_path / "runs" / record.run.folder.name)
    step = PromptTrainer.training_step

    def failing(self, *arguments, **keywords):
        if self.run_config.method.name == "pt":
            raise RuntimeError("device lost\nsecond line")
        return step(self, *arguments, **keywords)

    with monkeypatch.context() as patched:
        patched.setattr(PromptTrainer, "training_step", failing)
        records, lines = carry_out(tiny, tmp_path, "compare.learning_rates=[0.05]")
    assert [r.outcome.error for r in records if r.run.method == "pt"] == ["RuntimeError: device lost"]
    assert all(r.outcome.results for r in records if r.run.method == "ept")
    assert "failed: RuntimeError: device lost" in lines[1]
    error = records[0].run.folder / "error.txt"
    assert "second line" in error.read_text("utf-8")
    again, _ = carry_out(tiny, tmp_path, "compare.learning_rates=[0.05]")  # tried again, and the second seed with it
    assert len(again) == 4
    assert all(r.outcome.results for r in again)
    assert not error.exists()


def test_what_each_part_brings(tiny, tmp_path):
    """The ablations of the example, shortened: all are trained, and share one table at one budget."""
    example = ROOT / "examples/compare_sst2_parts.yaml"
    settings = ["data.max_train=null", "data.max_validation=null", "data.labels=digits", "method.budget=600"]
    settings += ["method.num_virtual_tokens=null", "method.r=null", "training.max_steps=2", "training.eval_steps=2"]
    settings += ["compare.seeds=[0]", "compare.learning_rates=[0.05]"]
    records = compare(load_comparison(example, overrides(tiny, tmp_path, *settings, f"compare.methods={PARTS}")))
    assert [record.outcome.error for record in records] == [None] * len(PARTS)
    (setting,) = summarise(records)
    assert [method.method for method in setting.methods] == PARTS
    assert all(500 < method.parameters <= 600 for method in setting.methods)
    assert {(test.first, test.second) for test in setting.tests} >= {("ept-no-fusion", "ept"), ("ept-no-spaces", "ept")}


def ept(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def arguments(tiny, folder, *more):
    return ["compare", *(part for override in overrides(tiny, folder, *more) for part in ("--set", override))]


def test_command(once, tiny):
    folder, records, _ = once
    listed = ept(*arguments(tiny, folder), "--dry-run")
    assert listed.exit_code == 0, listed.output
    assert listed.stdout.splitlines() == [
        *[f"finished  {r.run.description}" for r in records[:4]],
        "and 2 more, for 1 more seeds at the chosen learning rates",
        "nothing was written",
    ]
    result = ept(*arguments(tiny, folder))
    assert result.exit_code == 0, result.output
    files = {"comparison.csv", "comparison.json", "comparison.md", "runs"}
    files |= {"score_against_parameters.png", "score_over_steps.png"}
    assert {path.name for path in folder.iterdir()} == files
    assert "prompt" in result.stdout
    shown = json.loads(ept(*arguments(tiny, folder), "--json").stdout)
    assert [m["method"] for m in shown["settings"][0]["methods"]] == ["pt", "ept"]
    assert shown["failed"] == []
    printed = ept(*arguments(tiny, folder), "--print-config", "--data", "elsewhere", "--executor", "ray")
    assert "executor: ray" in printed.stdout
    assert "data_dir: elsewhere" in printed.stdout


def test_models_of_two_kinds_read_own_rows_each_in_its_way(tiny, tmp_path):
    rows = [f"{'good' if i % 2 else 'bad'} film {i},{'yes' if i % 2 else 'no'}\n" for i in range(40)]
    (tmp_path / "own.csv").write_text("text,label\n" + "".join(rows), encoding="utf-8")
    settings = ["compare.methods=[pt]", "compare.seeds=[0]", "training.max_steps=1", "training.eval_steps=1"]
    settings += ["data.max_length=32", f"compare.sweep={{model: [{tiny / 'bert'}, {tiny / 'llama'}]}}"]
    changes = [part for setting in settings for part in ("--set", setting)]
    result = ept("compare", tmp_path / "own.csv", "--output", tmp_path / "out", *changes)
    assert result.exit_code == 0, result.output
    found = {}
    for folder in (tmp_path / "out" / "runs").iterdir():
        config = yaml.safe_load((folder / "config.yaml").read_text("utf-8"))
        found[Path(config["model"]["name_or_path"]).name] = config["data"]["template"]
    assert found == {"bert": "{text}", "llama": "{text}\nlabel:"}


def test_command_reports_failures_with_its_exit_code(tiny, tmp_path):
    settings = ("method.budget=1", "method.num_virtual_tokens=null", "compare.learning_rates=[0.05]")
    result = ept(*arguments(tiny, tmp_path, *settings), "--json")
    assert result.exit_code == 1
    assert len(json.loads(result.stdout)["failed"]) == 2
    assert result.stderr.count("failed: ") >= 4
    assert "runs failed" in (tmp_path / "comparison.md").read_text("utf-8")


def test_command_refuses_before_anything_is_written(tiny, tmp_path):
    result = ept(*arguments(tiny, tmp_path / "new", "compare.methods=[eptt]"))
    assert result.exit_code == 2
    assert "did you mean 'ept'" in result.stderr
    assert not (tmp_path / "new").exists()


def test_runs_side_by_side_give_the_same_table(once, tiny, tmp_path):
    records, lines = carry_out(tiny, tmp_path, "compare.jobs=2")
    assert lines[0] == "4 runs, side by side: metrics.jsonl in each run's folder shows its progress"
    assert sum(line.startswith("[") for line in lines) == 6
    assert found(records) == found(once[1])
    failing, _ = carry_out(tiny, tmp_path, "compare.jobs=2", "compare.methods=[pt]", "method.budget=1")
    assert len(failing) == 2
    assert all("ValueError: no pt configuration has at most 1" in r.outcome.error for r in failing)


def side_by_side(at_once, *folders):
    jobs = [{"output_dir": folder} for folder in folders]
    return list(execution.run_all(jobs, CompareConfig(jobs=at_once)))


def test_a_process_that_dies_fails_what_is_not_finished(monkeypatch):
    monkeypatch.setattr(execution, "_execute_apart", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    outcomes = side_by_side(2, "a", "b", "c")
    assert sorted(str(outcome.folder) for outcome in outcomes) == ["a", "b", "c"]
    assert all(outcome.error.startswith("TerminatedWorkerError: A worker process") for outcome in outcomes)


def test_gpus_are_dealt_out_in_turn(monkeypatch):
    monkeypatch.setattr(execution, "_execute_apart", lambda job, gpu, _: Outcome(Path(job["output_dir"]), {"gpu": gpu}))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    dealt = {str(outcome.folder): outcome.results["gpu"] for outcome in side_by_side(3, "a", "b", "c")}
    assert dealt == {"a": "0", "b": "1", "c": "0"}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-7f")
    dealt = {str(outcome.folder): outcome.results["gpu"] for outcome in side_by_side(3, "a", "b", "c")}
    assert dealt == {"a": "3", "b": "GPU-7f", "c": "3"}


def test_a_process_keeps_the_gpu_of_its_first_run(monkeypatch):
    monkeypatch.setattr(execution, "_settle", lambda parent: None)
    monkeypatch.setattr(execution, "execute", lambda job: os.environ["CUDA_VISIBLE_DEVICES"])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    assert execution._execute_apart({}, "1", 0) == "1"
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    assert execution._execute_apart({}, "0", 0) == "1"


# Two processes that do nothing but note who they are.
ASLEEP = """
import os, sys, time
from pathlib import Path
from ept.compare import execute
from ept.compare.config import CompareConfig

def sleep(job, gpu, parent):
    execute._settle(parent)
    (Path(job["output_dir"]) / str(os.getpid())).touch()
    time.sleep(300)

execute._execute_apart = sleep
list(execute.run_all([{"output_dir": sys.argv[1]}] * 2, CompareConfig(jobs=2)))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="looks the processes up in /proc: Linux runs it")
def test_processes_end_with_a_comparison_that_is_killed(tmp_path):
    with subprocess.Popen([sys.executable, "-c", ASLEEP, tmp_path], cwd=ROOT) as comparison:
        try:
            wait_until(lambda: len(list(tmp_path.iterdir())) == 2)
        finally:
            comparison.kill()
    wait_until(lambda: not any(map(is_running, tmp_path.iterdir())))


def is_running(named_for_it):
    status = Path("/proc") / named_for_it.name / "status"
    try:
        return "State:\tZ" not in status.read_text("utf-8")
    except OSError:
        return False


def wait_until(holds, seconds=120):
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_without_ray(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="needs the package ray: pip install ray, or set"):
        carry_out(tiny, tmp_path, "compare.executor=ray")


@needs_ray
def test_ray_gives_the_same_table(once, tiny, tmp_path):
    records, lines = carry_out(tiny, tmp_path, "compare.executor=ray")
    assert len(lines) == 6
    assert found(records) == found(once[1])


@needs_ray
def test_ray_reports_failing_runs(tiny, tmp_path):
    records, _ = carry_out(tiny, tmp_path, "compare.executor=ray", "compare.methods=[pt]", "method.budget=1")
    assert len(records) == 2
    assert all("ValueError: no pt configuration has at most 1" in r.outcome.error for r in records)
