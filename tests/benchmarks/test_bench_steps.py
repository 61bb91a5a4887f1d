"""The suite of steps: what only `--only` names runs, and every row says what it measured."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from benchmarks import run, steps
from benchmarks.record import Record
from benchmarks.tables import options_text, step_table


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> Record:
    """What the two units that the report leaves out give at sizes that mean nothing."""
    output = tmp_path_factory.mktemp("steps") / "record.jsonl"
    with pytest.MonkeyPatch.context() as patch:
        command = ["run", "steps", "--reduced", "--output", str(output), "--only", "adapters", "operators"]
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
    assert len(rows) == 2 * 6


def test_a_record_holds_no_path_and_every_unit_once(record: Record) -> None:
    header = record.header()
    assert header is not None
    assert header["command"].endswith("--output record.jsonl --only adapters operators")
    assert [line["unit"] for line in record.lines() if line["line"] == "end"] == ["steps/adapters", "steps/operators"]


def test_a_unit_that_does_not_exist_is_refused_with_the_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["run", "steps", "--output", str(tmp_path / "r.jsonl"), "--only", "nonsense"])
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with pytest.raises(SystemExit):
        run.main()
    assert "--only nonsense: choose from steps/t5-base, steps/bare" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_method_measured_twice_is_named_so_the_second_time() -> None:
    size = {"shape": "t5-small", "layers": 1, "batch": 1, "length": 8, "steps": 2, "warmup": 1, "padding": "longest"}
    rows = list(steps.profiled(groups=(("peft-pt",), ("ept",), ("peft-pt",)), **size))
    assert [row["provider"] for row in rows] == ["peft-pt", "ept", "peft-pt again"]
    assert all(row["median"] > 0 and row["phases"] for row in rows)


def test_options_without_a_device_have_their_reason() -> None:
    rows = list(steps.options(batch=1, length=8, pairs=2, layers=1))
    assert all(row["gain"]["median"] > 0 for row in rows if "gain" in row)
    text = options_text(rows)
    assert "| SDPA " in text
    assert "Without a figure: no waits in the loop: there is no device to wait for." in text
