"""The benchmark of mixed batches runs, and its record says what it measured."""

from __future__ import annotations

import json

import pytest

from benchmarks.mixed_adapters import main


def test_record_of_a_model_of_one_layer(tmp_path, capsys):
    file = tmp_path / "record.json"
    arguments = ["--layers", "1", "--adapters", "1", "3", "--rows", "7", "--batch", "4", "--rounds", "2"]
    main([*arguments, "--length", "5", "--num-virtual-tokens", "2", "--rank", "2", "--output", str(file)])
    record = json.loads(file.read_text(encoding="utf-8"))
    assert record == json.loads(capsys.readouterr().out)
    assert [result["adapters"] for result in record["results"]] == [1, 3]
    assert all(result["mixed_rows_per_second"]["median"] > 0 for result in record["results"])
    assert "--adapters 1 3" in record["command"]
    assert str(tmp_path) not in record["command"]


def test_more_layers_than_there_are_is_refused():
    with pytest.raises(ValueError, match="layers=99 is out of range: smollm2-135m has 30 layers"):
        main(["--layers", "99"])
