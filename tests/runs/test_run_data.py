"""A run's data beside its model: texts longer than its positions."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from ept.runs.config import RunConfig
from ept.runs.train import prepare

Configure = Callable[..., RunConfig]


@pytest.mark.parametrize("method, room", [("ept", 122), ("prompt-tuning", 122), ("lora", 128)])
def test_texts_are_cut_to_what_the_model_has_positions_for(
    configure: Configure, data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, method: str, room: int
) -> None:
    long = {"sentence": " ".join(["film"] * 300), "label": 1}
    shutil.copytree(data, tmp_path / "data")
    with (tmp_path / "data" / "train.jsonl").open("a") as file:
        file.write(json.dumps(long) + "\n")
    sizes = [] if method == "ept" else ["method.r=null"]
    sizes += ["method.num_virtual_tokens=null"] if method == "lora" else []
    own = [f"data.data_dir={tmp_path / 'data'}", "data.max_length=200", f"method.name={method}", *sizes]
    run = prepare(configure("bert", *own))
    assert run.max_length == max(map(len, run.run_data.data.train["text_ids"])) == room
    assert 0 < run.run_data.truncation_rate["train"] < 0.1
    assert f"positions for {room} tokens of text, which is the limit in place of data.max_length=200" in caplog.text
    assert run.predict([row.ids for row in run.fit([long], "test")])[0] in (0, 1)
