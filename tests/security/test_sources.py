"""Calls that the sources never make, whatever the tests happen to reach."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted([*(ROOT / "ept").rglob("*.py"), *(ROOT / "kernels" / "torch-ext").rglob("*.py")])

FORBIDDEN = {
    "torch.load": "unpickles: adapters are safetensors",
    **dict.fromkeys(("yaml.unsafe_load", "yaml.full_load"), "makes objects"),
    **dict.fromkeys(("pickle.load", "pickle.loads", "os.system", "eval", "exec"), "runs code"),
}
ONLY = {"trust_remote_code": "False", "weights_only": "True", "shell": "False"}  # keywords and their one value


def _name(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{_name(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def offences(source: str) -> list[str]:
    """Finds forbidden calls in `source`, and keywords with another value than their `ONLY` one."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and (name := _name(node.func)) in FORBIDDEN:
            found.append(f"line {node.lineno}: {name} {FORBIDDEN[name]}")
        if isinstance(node, ast.Call) and _name(node.func) == "yaml.load" and "_PlainLoader" not in ast.unparse(node):
            found.append(f"line {node.lineno}: yaml.load with a loader of objects")
        if isinstance(node, ast.keyword) and ast.unparse(node.value) != ONLY.get(
            str(node.arg), ast.unparse(node.value)
        ):
            found.append(f"line {node.value.lineno}: {node.arg}={ast.unparse(node.value)}")
    return found


def test_there_are_sources():
    assert len(SOURCES) > 30


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_source_runs_what_a_file_says(path):
    assert not offences(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "source",
    ["torch.load(p)", "eval(x)", "f(trust_remote_code=config.x)", "yaml.load(t, yaml.Loader)", "g(shell=True)"],
)
def test_the_check_finds_what_it_looks_for(source):
    assert offences(source)
