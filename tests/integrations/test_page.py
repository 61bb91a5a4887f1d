"""Every block of docs/integrations.md runs; those whose packages are not installed are skipped here.

`make integrations` installs them aside.
"""

from __future__ import annotations

import ast
import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "integrations.md"
BLOCKS = [
    (title, opening.endswith("continued"), code)
    for title, text in re.findall(r"^## (.*?)$\n(.*?)(?=^## |\Z)", PAGE.read_text("utf-8"), re.DOTALL | re.MULTILINE)
    for opening, code in re.findall(r"^```(python[ \w]*)\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
]
names_before: dict[str, Any] = {}  # of the block before, for one that is continued


def packages(code: str) -> set[str]:
    imports = [node for node in ast.walk(ast.parse(code)) if isinstance(node, (ast.Import, ast.ImportFrom))]
    modules = [getattr(node, "module", None) or node.names[0].name for node in imports]
    return {module.partition(".")[0] for module in modules}


def test_there_are_blocks_of_each_library():
    known = {"peft", "trl", "lm_eval", "accelerate", "transformers", "torch", "onnxruntime", "optuna"}
    assert known <= set().union(*(packages(code) for _, _, code in BLOCKS))


@pytest.mark.parametrize("title, continued, code", BLOCKS, ids=[f"{i} {title}" for i, (title, *_) in enumerate(BLOCKS)])
def test_block_runs(title, continued, code, models, tmp_path, monkeypatch):
    needed = packages(code) | ({"onnxscript"} if "torch.onnx" in code else set())
    if missing := [name for name in sorted(needed) if importlib.util.find_spec(name) is None]:
        pytest.skip(f"needs {', '.join(missing)}: `make integrations` runs it")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    if not continued:
        names_before.clear()
        names_before.update(MODEL=str(models["llama"]))
    names_before["FOLDER"] = str(tmp_path)
    above = PAGE.read_text(encoding="utf-8").partition(code)[0].count("\n")  # so that a traceback names the page's line
    exec(compile("\n" * above + code, str(PAGE), "exec"), names_before)
