"""The suite of steps: what only `--only` names runs, and every row says what it measured."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import goals, run, steps
from benchmarks.options import NOTHING, STARTED, VERSIONS
from benchmarks.record import Record
from benchmarks.tables import bare_text, everything_text, step_table


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> Record:
    """Returns the units on request, at sizes that mean nothing."""
    output = tmp_path_factory.mktemp("steps") / "record.jsonl"
    with pytest.MonkeyPatch.context() as patch:
        command = ["run", "steps", "--reduced", "--output", str(output)]
        command += ["--only", "bare", "everything", "adapters", "operators"]
        patch.setattr(sys, "argv", command)
        patch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        run.main()
        run.main()  # measures nothing again
    return Record(output)


def test_both_ways_to_serve_many_adapters_and_their_ratio(record: Record) -> None:
    rows = [row for row in record.results() if row["unit"] == "steps/adapters"]
    assert [(row["case"], row["provider"]) for row in rows] == [
        (f"steps/adapters, {number}", way) for number in (1, 3) for way in ("mixed", "switching")
    ]
    for row in rows:
        assert row["rows_per_second"]["median"] == pytest.approx(7 / row["median"], rel=0.5)
        assert row["mixed_over_switching"]["median"] > 0
    assert "steps/adapters, 3" in step_table(record.results())


def test_what_a_call_costs_beside_what_it_runs(record: Record) -> None:
    rows = [row for row in record.results() if row["unit"] == "steps/operators"]
    nothing = {row["provider"]: row for row in rows if row["case"] == "steps/call of nothing"}
    assert nothing["operator"]["overhead"]["median"] > 0
    assert "overhead" not in nothing["implementation"]
    assert len(rows) == 2 * 8


def test_a_record_holds_no_path_and_every_unit_once(record: Record) -> None:
    header = record.header()
    assert header is not None
    assert header["command"].endswith("--output record.jsonl --only bare everything adapters operators")
    ended = [line["unit"] for line in record.lines() if line["line"] == "end"]
    assert ended == [f"steps/{name}" for name in ("bare", "everything", "adapters", "operators")]


def test_a_unit_that_does_not_exist_is_refused_with_the_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["run", "steps", "--output", str(tmp_path / "r.jsonl"), "--only", "nonsense"])
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with pytest.raises(SystemExit):
        run.main()
    assert "--only nonsense: choose from steps/t5-base, steps/bare, steps/attention" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_trace_gives_the_longest_kernels_and_how_busy_the_device_was(tmp_path: Path) -> None:
    kernels = [("gemm", 0.0, 4.0), ("norm", 3.0, 2.0), ("gemm", 8.0, 2.0)]  # the second overlaps the first
    events = [{"cat": "kernel", "name": name, "ts": 100 + ts, "dur": dur} for name, ts, dur in kernels]
    trace = tmp_path / "trace.json"
    trace.write_text(json.dumps({"traceEvents": [*events, {"cat": "cpu_op", "name": "mm", "ts": 0, "dur": 900}]}))
    found = steps.kernels_of(trace)
    assert (found["launches"], found["busy_fraction"]) == (3, pytest.approx(7 / 10))
    assert [(k["name"], k["runs"]) for k in found["kernels"]] == [("gemm", 2), ("norm", 1)]
    assert found["kernels"][0]["seconds"] == pytest.approx(6e-6)
    trace.write_text(json.dumps({"traceEvents": []}))
    assert steps.kernels_of(trace) == {}


def test_pefts_steps_over_4_bit_weights_take_turns_with_ours_on_one_model(monkeypatch: pytest.MonkeyPatch) -> None:
    (work,) = (work for work in steps.works_of("gpu", "cuda") if work.unit == goals.LLAMA_STEP)
    asked: list[Any] = []
    monkeypatch.setattr(steps, "profile", lambda config, traces: asked.append(config) or {"methods": []})
    assert not list(work.rows())
    ((methods, quantization),) = [(config.methods, config.quantization) for config in asked]
    assert (methods, quantization) == (("pt", "dept", "ept", "peft-pt"), "nf4")


def test_the_bare_step_has_its_text(record: Record) -> None:
    (bare,) = (row for row in record.results() if row["unit"] == "steps/bare")
    assert bare["ratio_p20"] <= bare["ratio_to_bare"] <= bare["ratio_p80"]
    assert "batch 1, 8 text tokens, 48 positions" in bare_text([bare])


def test_every_option_alone_and_all_together_stand_beside_the_peers_steps(record: Record) -> None:
    rows = {row["provider"]: row for row in record.results() if row["unit"] == "steps/everything"}
    asked = [version for version in VERSIONS if version.only_on in ("", "cpu") and not version.compiled]
    assert list(rows) == [version.name for version in asked]
    assert rows[NOTHING]["gain_alone"]["median"] == rows[STARTED]["over_started"]["median"] == 1.0
    assert "gain_alone" not in rows[STARTED]
    assert rows["all in float32"]["over_alike"] == rows["all in float32"]["over_started"]
    text = everything_text(record.results())
    assert "`training.group_by_length=true` |" in text
    assert text.startswith("CPU time of one thread")
    assert not any(line.startswith("| steps/everything") for line in step_table(record.results()).splitlines())


def test_the_steps_on_a_gpu_are_in_16_bits_and_one_of_llama_needs_no_bitsandbytes() -> None:
    works = [work for work in steps.works_of("gpu", "cuda") if not work.on_request]
    assert all(work.rows.keywords["dtype"] == "bfloat16" for work in works)
    assert [work.unit for work in works if "llama" in work.unit and not work.needs] == [works[-1].unit]


def test_the_bare_step_says_what_numbers_it_was_in() -> None:
    (row,) = steps.bare(batch=1, length=8, pairs=2, layers=1, dtype="bfloat16")
    assert (row["dtype"], row["size"]["positions"]) == ("bfloat16", 48)
