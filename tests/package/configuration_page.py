"""The page of all configuration keys, from the configuration's own docstrings: `make config-page` regenerates it."""

from __future__ import annotations

import json
import re
from typing import Any

from checkout import ROOT
from pydantic import BaseModel

from ept.compare.config import ComparisonConfig
from ept.runs.config_text import expected

PAGE = ROOT / "docs" / "configuration.md"
HEAD = """# Configuration keys

`make config-page` generates this page from the docstrings in `ept/runs/config.py` and `ept/compare/config.py`.

A run is configured by a YAML file (`--config FILE.yaml`) with these sections. `--set section.key=value` overrides the
file, and the options of a command override both. `ept train --print-config` shows all keys with their values. An
unknown key is refused, and the error names the nearest known one.
"""


def configuration_page() -> str:
    """Returns the page: the keys of a run, then a table for each section."""
    parts = [HEAD, _table("", {k: f for k, f in ComparisonConfig.model_fields.items() if not _section(f)})]
    for name, field in ComparisonConfig.model_fields.items():
        if section := _section(field):
            text = (section.__doc__ or "").replace("\n    ", "\n").strip()
            parts += [f"## `{name}`\n\n{text}\n", _table(f"{name}.", section.model_fields)]
    return "\n".join(parts)


def _section(field: Any) -> type[BaseModel] | None:
    annotation = field.annotation
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


def _table(prefix: str, fields: dict[str, Any]) -> str:
    lines = ["| key | default | takes | meaning |", "|---|---|---|---|"]
    for name, field in fields.items():
        default = field.get_default(call_default_factory=True)
        written = default if isinstance(default, str) else json.dumps(default)
        meaning = " ".join((field.description or "").split())
        meaning = re.sub(
            r"\b(None|True|False)\b", lambda found: {"None": "null"}.get(found[0], found[0].lower()), meaning
        )
        cells = (f"`{prefix}{name}`", f"`{written}`", expected(field.annotation), meaning)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(configuration_page(), encoding="utf-8")
