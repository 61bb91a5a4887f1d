"""Calls that the sources never make, whatever the tests happen to reach."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted([*(ROOT / "ept").rglob("*.py"), *(ROOT / "kernels" / "torch-ext").rglob("*.py")])

# A function by the last part of its name and, where others share that, by the part before.
FORBIDDEN = {
    "torch.load": "unpickles: adapters are safetensors",
    "pickle.load": "runs code",
    "pickle.loads": "runs code",
    "yaml.unsafe_load": "makes objects",
    "yaml.full_load": "makes objects",
    "os.system": "runs a shell",
    "eval": "runs code",
    "exec": "runs code",
}


def _name(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{_name(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def offences(source: str) -> list[str]:
    """Forbidden calls in `source`, and any mention of `trust_remote_code` but to say no."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and (name := _name(node.func)) in FORBIDDEN:
            found.append(f"line {node.lineno}: {name} {FORBIDDEN[name]}")
        if isinstance(node, ast.Call) and _name(node.func) == "yaml.load" and "_PlainLoader" not in ast.unparse(node):
            found.append(f"line {node.lineno}: yaml.load with a loader of objects")
        if isinstance(node, ast.keyword):
            if node.arg == "trust_remote_code" and ast.unparse(node.value) != "False":
                found.append(f"line {node.value.lineno}: trust_remote_code={ast.unparse(node.value)}")
            if node.arg == "weights_only" and ast.unparse(node.value) != "True":
                found.append(f"line {node.value.lineno}: weights_only={ast.unparse(node.value)}")
            if node.arg == "shell" and ast.unparse(node.value) != "False":
                found.append(f"line {node.value.lineno}: shell={ast.unparse(node.value)}")
    return found


def test_there_are_sources():
    assert len(SOURCES) > 30


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_source_runs_what_a_file_says(path):
    assert not offences(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "source",
    [
        "import torch\ntorch.load(p)",
        "eval(x)",
        "f(trust_remote_code=config.x)",
        "yaml.load(t, yaml.Loader)",
        "g(shell=True)",
    ],
)
def test_the_check_finds_what_it_looks_for(source):
    assert offences(source)
