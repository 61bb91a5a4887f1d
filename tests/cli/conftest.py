"""The command-line tests use the tiny models and runs of the training tests."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

_TRAINING = Path(__file__).resolve().parents[1] / "training"
sys.path.insert(0, str(_TRAINING))
_spec = importlib.util.spec_from_file_location("training_fixtures", _TRAINING / "conftest.py")
assert _spec is not None
assert _spec.loader is not None
_fixtures = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_fixtures)
data, models, runs = _fixtures.data, _fixtures.models, _fixtures.runs
