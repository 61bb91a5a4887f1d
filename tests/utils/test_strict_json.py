"""Files that programs read hold JSON that any parser reads, and what is null there is understood again."""

from __future__ import annotations

import json
import math

import pytest

from benchmarks.record import Record
from ept.compare.execute import Outcome
from ept.compare.progress import curve_of
from ept.runs.folder import MetricsLog, RunFolder
from ept.runs.report import learning_curve
from ept.utils.files import json_record, write_atomically

NUMBERS = {"nan": math.nan, "inf": math.inf, "r2": -math.inf, "there": [0.5, (math.nan,)], "word": "naïve\u2028\ud800"}


def read_strictly(text):
    return json.loads(text, parse_constant=lambda constant: pytest.fail(f"{constant} is no JSON"))


def test_a_record_is_strict(tmp_path):
    read = {**dict.fromkeys(("nan", "inf", "r2")), "there": [0.5, [None]], "word": "naïve\u2028\ud800"}
    assert read_strictly(json_record(NUMBERS)) == read
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.append({"step": 1, **NUMBERS})
    log.keep_until(1)
    assert read_strictly(log.file.read_text(encoding="utf-8")) == {"step": 1, **read}
    assert log.read() == [{"step": 1, **read}]
    record = Record(tmp_path / "report.jsonl")
    record.append(NUMBERS)
    assert read_strictly(record.path.read_text(encoding="utf-8")) == read
    assert record.lines() == [read]


RESULTS = {
    **{"method": "pt", "task": "local", "metric": "r2", "score": 0.5, "score_before": -math.inf, "majority": 0.0},
    **{"verdict": None, "trainable_parameters": 7, "steps": 2, "best_step": None},
}


@pytest.mark.parametrize(("score", "error"), [
    (0.5, None),
    (-math.inf, "its r2 on test is not finite"),
    (math.nan, "its r2 on test is not finite"),
])  # fmt: skip
def test_a_run_whose_scores_are_not_finite_is_read(score, error, tmp_path):
    """The error of huge numbers is infinite, and R² -inf: such an evaluation is no point of a curve."""
    folder = RunFolder(tmp_path)
    write_atomically(folder.results, json_record({**RESULTS, "score": score}))
    outcome = Outcome.of(tmp_path)
    assert (outcome.results is None, outcome.error) == (error is not None, error)
    for step, value in ((1, -math.inf), (2, score)):
        MetricsLog(folder.metrics).append({"step": step, "loss": 1.0})
        MetricsLog(folder.metrics).append({"step": step, "eval_r2": value})
    assert curve_of(tmp_path, "r2") == ({} if error else {2: score})
    learning_curve({**RESULTS, "score": score}, MetricsLog(folder.metrics).read(), folder.curve)
    assert folder.curve.stat().st_size
