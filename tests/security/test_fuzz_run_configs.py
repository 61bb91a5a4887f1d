"""Run configurations from strangers: changed YAML files, each of which is read or gives one clear error."""

from __future__ import annotations

import pytest
from strangers import run_configurations
from watch import watched

from ept.runs.config import RunConfig, load_run_config

LONGEST_MESSAGE = 4000
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
        file.write_bytes(content)
        refusal = None
        with watched(tmp_path) as offences:
            try:
                config = load_run_config(file)
            except ValueError as error:
                refusal = error
        assert not offences
        if refusal is None:
            assert isinstance(config, RunConfig)
            return "read"
        assert type(refusal) is ValueError, repr(refusal)
        assert 0 < len(str(refusal)) <= LONGEST_MESSAGE
        return "refused"

    load_run_config(None)  # imports what reading imports
    assert set(fuzz(run_configurations(GOOD), 0.2, check)) == {"read", "refused"}
