"""Run configurations from strangers: changed YAML files, each of which is read or gives one clear error."""

from __future__ import annotations

import pytest
from strangers import run_configurations
from watch import MAX_MESSAGE, watched

from ept.runs.config import RunConfig, load_run_config

GOOD = {
    "model": {"name_or_path": "somewhere/model", "dtype": "float32", "load_in_4bit": False},
    "data": {"template": "{a}", "label_words": ["no", "yes"], "max_length": 32, "metric": ["accuracy"]},
    "method": {"name": "ept", "num_virtual_tokens": 4, "r": 2, "alpha": 8.0, "embedding_scale": "auto"},
    "training": {"max_steps": 3, "learning_rate": 0.05, "bf16": False},
    "seed": 1,
}


@pytest.mark.slow
def test_changed_run_configurations(tmp_path, fuzz):
    file = tmp_path / "run.yaml"

    def check(content: bytes) -> str:
        file.unlink(missing_ok=True)  # a file written over takes fifty times as long
        file.write_bytes(content)
        with watched(tmp_path) as offences:
            try:
                read: RunConfig | ValueError = load_run_config(file)
            except ValueError as error:
                read = error
        assert not offences
        assert type(read) in (RunConfig, ValueError), repr(read)
        if isinstance(read, RunConfig):
            return "read"
        assert 0 < len(str(read)) <= MAX_MESSAGE
        return "refused"

    load_run_config(None)  # imports what reading imports
    assert set(fuzz(run_configurations(GOOD), 0.2, check)) == {"read", "refused"}
