"""Tables and lines in the documentation that list or call what the code has."""

from __future__ import annotations

import ast
import dataclasses
import re
from pathlib import Path

from configuration_page import PAGE, configuration_page
from pydantic import BaseModel

from ept import EPTConfig
from ept.compare.config import ComparisonConfig

README = Path(__file__).parents[2] / "README.md"
METHOD = README.parent / "docs" / "method.md"
PEFTS = {"task_type", "modules_to_save"}  # fields of every adapter that the table has as well


def test_the_page_of_the_method_lists_every_field_of_the_configuration_with_its_default():
    section = METHOD.read_text(encoding="utf-8").split("\n## `EPTConfig`\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)` \| `(.+?)` \|", section, flags=re.MULTILINE)
    names = {*EPTConfig.__annotations__, *PEFTS}
    defaults = {field.name: field.default for field in dataclasses.fields(EPTConfig) if field.name in names}
    assert {name: ast.literal_eval(default) for name, default in rows} == defaults
    assert len(rows) == len(defaults)


def test_the_page_of_configuration_keys_is_what_their_docstrings_say():
    assert PAGE.read_text(encoding="utf-8") == configuration_page(), "`make config-page` writes it anew"


def test_every_configuration_key_has_a_docstring():
    sections = [ComparisonConfig, *(field.annotation for field in ComparisonConfig.model_fields.values())]
    for section in sections:
        if not (isinstance(section, type) and issubclass(section, BaseModel)):
            continue
        for name, field in section.model_fields.items():
            is_section = isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
            assert is_section or field.description, f"{section.__name__}.{name}"


def test_readme_optimizer_line(monkeypatch):
    """The lines about the optimizer run as they stand, after the block above them, on a small model."""
    import torch
    import transformers
    from tiny_models import make_model

    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    first = next(i for i, block in enumerate(blocks) if 'from_pretrained("google-t5/t5-base")' in block)
    auto = transformers.AutoModelForSeq2SeqLM
    monkeypatch.setattr(auto, "from_pretrained", staticmethod(lambda name: make_model("t5")))
    names: dict = {}
    for block in blocks[first : first + 2]:
        exec(block, names)
    assert isinstance(names["optimizer"], torch.optim.AdamW)
    assert [group["lr"] for group in names["optimizer"].param_groups][:1] == [0.05]
