"""Records: written line by line, continued after an interruption, repaired where the last line was cut off."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import record as records
from benchmarks.record import ROOT, Record, Work, is_finished
from benchmarks.run import MAX_ATTEMPTS, run

ABOUT = {"sources": "0123", "device": "cpu", "device_type": "cpu", "reduced": True}
HEADER: dict[str, Any] = {"line": "header", **ABOUT, "versions": {"torch": "2.13.0"}}


def test_results_of_a_unit_count_only_once_it_has_ended(tmp_path: Path) -> None:
    record = Record.resume(tmp_path / "r.jsonl", HEADER)
    with record.unit("a") as add:
        add({"value": 1})

    def interrupted() -> Iterator[dict[str, Any]]:
        yield {"value": 2}
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(record, [Work("b", interrupted)], {}, seconds=60)
    again = Record.resume(tmp_path / "r.jsonl", HEADER)
    assert [row["value"] for row in again.results()] == [1]
    attempts, ended = again.units()
    assert (set(ended), attempts["b"]) == ({"a"}, 1)


def test_what_was_cut_off_counts_as_never_begun_once_it_is_forgiven(tmp_path: Path) -> None:
    record = Record.resume(tmp_path / "r.jsonl", HEADER)
    for _ in range(MAX_ATTEMPTS):
        record.append({"line": "begin", "unit": "a"})
    assert record.units()[0]["a"] == MAX_ATTEMPTS
    record.forgive()
    lines = len(record.lines())
    record.forgive()
    assert (record.units()[0]["a"], len(record.lines())) == (0, lines)
    run(record, [Work("a", lambda: [{"value": 1}])], {}, seconds=60)
    assert [(row["status"], row["value"]) for row in record.results()] == [("ok", 1)]


def test_a_unit_measured_again_replaces_its_results(tmp_path: Path) -> None:
    record = Record.resume(tmp_path / "r.jsonl", HEADER)
    for value in (1, 2):
        with record.unit("a") as add:
            add({"value": value})
    assert [row["value"] for row in record.results()] == [2]


def test_a_line_that_was_cut_off_is_dropped_and_appending_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    record = Record.resume(path, HEADER)
    with record.unit("a") as add:
        add({"value": 1})
    path.write_bytes(path.read_bytes() + b'{"line": "begin", "unit": "b"}\n{"line": "res')
    again = Record.resume(path, HEADER)
    with again.unit("c") as add:
        add({"value": 3})
    assert [row["value"] for row in again.results()] == [1, 3]
    assert all(json.loads(line) for line in path.read_text().splitlines())


def test_a_damaged_line_inside_is_an_error_that_names_it(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text(json.dumps(HEADER) + '\n{"line": \n{"line": "begin", "unit": "a"}\n')
    with pytest.raises(ValueError, match=r"line 2 is not JSON .* delete the file"):
        Record(path).results()


@pytest.mark.parametrize(
    "key, value", [("sources", "4567"), ("device", "other"), ("reduced", False), ("versions", {"torch": "2.12.0"})]
)
def test_a_record_of_something_else_is_kept_aside(tmp_path: Path, key: str, value: Any) -> None:
    path = tmp_path / "r.jsonl"
    with Record.resume(path, HEADER).unit("a") as add:
        add({"value": 1})
    fresh = Record.resume(path, {**HEADER, key: value})
    assert fresh.results() == []
    assert [row["value"] for row in Record(tmp_path / "previous-r.jsonl").results()] == [1]


def test_a_unit_whose_process_keeps_dying_is_given_up_with_a_reason(tmp_path: Path) -> None:
    def dies() -> list[dict[str, Any]]:
        raise SystemExit(1)

    record = Record.resume(tmp_path / "r.jsonl", HEADER)
    for _ in range(MAX_ATTEMPTS):
        with pytest.raises(SystemExit):
            run(record, [Work("steps/a", dies)], {}, seconds=60)
        assert not record.units()[1]
    assert run(record, [Work("steps/a", dies)], {}, seconds=60) == 0
    assert is_finished(record.units()[1]["steps/a"])
    (row,) = record.results()
    assert (row["status"], row["section"], row["case"]) == ("failed", "steps", "steps/a")
    assert f"{MAX_ATTEMPTS} times" in row["reason"]


def test_a_missing_gpu_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match=r"sees no CUDA device.*--device cpu"):
        records.check_device("cuda")


def test_the_fingerprint_follows_the_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ept").mkdir()
    file = tmp_path / "ept" / "a.py"
    monkeypatch.setattr(records, "ROOT", tmp_path)
    found = []
    for text in ("x = 1", "x = 2", "x = 1"):
        file.write_text(text)
        found.append(records.source_fingerprint())
    assert found[0] == found[2] != found[1]


def test_a_command_names_paths_by_the_repository_and_no_others(tmp_path: Path) -> None:
    arguments = ["steps", "--output", str(ROOT / "benchmarks/results/cpu/report.jsonl"), "--only", "two words"]
    found = records.command_line("-m benchmarks.run", arguments)
    assert found == "python -m benchmarks.run steps --output benchmarks/results/cpu/report.jsonl --only 'two words'"
    assert records.command_line("x.py", ["--output", str(tmp_path / "a.jsonl")]) == "python x.py --output a.jsonl"
