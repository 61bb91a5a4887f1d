"""The demo's model and headlines, as rows for measurements."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

from .record import ROOT, Row

BATCH, LENGTH = 8, 64


def headline_rows(count: int) -> tuple[Any, list[Row]]:
    """Returns the model's configuration and `count` headlines with their answers, as ids."""
    sys.path.insert(0, str(ROOT / "examples"))
    import headlines_data as source

    from ept.runs.config import load_run_config
    from ept.runs.data import load_run_data
    from ept.runs.loading import load_tokenizer
    from ept.tasks.encoding import encode_split

    model_file = source.package_file(source.MODEL_PACKAGE, source.MODEL_FILE)
    config = load_run_config(ROOT / "examples" / "headlines.yaml")
    config.model.name_or_path, config.model.gguf_file = str(model_file.parent), model_file.name
    tokenizer = load_tokenizer(config.model)
    config.data.max_train = count
    with tempfile.TemporaryDirectory() as folder:
        rows = source.read_headlines(source.package_file(source.DATA_PACKAGE, source.DATA_FILE))
        source.write_splits(rows, Path(folder), seed=0)
        config.data.data_dir = folder
        data = load_run_data(config.data, tokenizer, "CAUSAL_LM").data
        return config.model, list(encode_split(data.train, tokenizer, data.labels, "CAUSAL_LM"))
