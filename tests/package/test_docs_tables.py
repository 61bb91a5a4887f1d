"""Tables in the documentation that list what the code has."""

from __future__ import annotations

import ast
import dataclasses
import re
from pathlib import Path

from ept import EPTConfig

README = Path(__file__).parents[2] / "README.md"
PEFTS = {"task_type", "modules_to_save"}  # fields of every adapter that the table has as well


def test_readme_lists_every_field_of_the_configuration_with_its_default():
    section = README.read_text(encoding="utf-8").split("\n## `EPTConfig`\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)` \| `(.+?)` \|", section, flags=re.MULTILINE)
    names = {*EPTConfig.__annotations__, *PEFTS}
    defaults = {field.name: field.default for field in dataclasses.fields(EPTConfig) if field.name in names}
    assert {name: ast.literal_eval(default) for name, default in rows} == defaults
    assert len(rows) == len(defaults)
