"""How the benchmarks of the training step are recorded: one JSON file, with the command that gives it again."""

from __future__ import annotations

import argparse
import json
import shlex
from pathlib import Path
from typing import Any


def command(script: str, arguments: argparse.Namespace) -> str:
    """What gives the record again: every option with its value, but for where the record goes."""
    given = {name: value for name, value in vars(arguments).items() if name != "output" and value is not None}
    return shlex.join(["python", f"benchmarks/{script}", *(f"--{name}={value}" for name, value in given.items())])


def write(record: dict[str, Any], file: Path | None) -> None:
    """Writes the record; None: it has been printed only."""
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
