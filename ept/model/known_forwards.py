"""Digests of the forward passes of transformers' modules that `frozen.py` can compute differently.

A class is recognised by the source of its method, whatever class and method are called: names say little, and many
families copy the same lines. A class that transformers changes becomes unknown, and is left alone. A digest does not
tell what a function computes, so a fused form is tried first (`frozen_trial.py`).
"""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import json
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple


class Known(NamedTuple):
    """A function of transformers that can be computed differently."""

    kind: str
    """The fused form that computes it, a key in `frozen.py`."""
    constant: Any
    """The argument that makes the operator compute this function; None: it needs none.

    `rms_norm`: its form; the forms differ in where they round, and Gemma's adds 1 to the weight. `rotate`: angles
    rotate neighbouring columns together (True), or those of two halves. `rotary`: the result has the dtype of queries
    and keys, whatever the angles' is (True), or all must have one dtype."""
    versions: str
    """Releases of transformers that contain it; between 5.10 and 5.24 every other one was searched."""
    names: list[str]
    """Families that have it (a few, if many): their place within transformers.models."""


def known_as(function: Callable[..., Any] | None) -> Known | None:
    """Looks a function up by its source; None if it is unknown or has no source."""
    return KNOWN.get(digest_of(function) or "")


@functools.cache
def digest_of(function: Any) -> str | None:
    """Computes the SHA-256 of a function's arguments and statements, the same under any version of Python.

    Ignores its name, annotations, docstring and decorators, comments and layout. None if it has no source.
    """
    try:
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(function))).body
    except (OSError, TypeError, SyntaxError, ValueError):
        return None
    if not isinstance(tree, ast.FunctionDef):
        return None
    statements = tree.body[1:] if ast.get_docstring(tree) is not None else tree.body
    return hashlib.sha256(_written([tree.args, *statements]).encode()).hexdigest()


# Fields of a node that do not affect what is computed, or that some versions of Python lack.
_LEFT_OUT = {"annotation", "returns", "decorator_list", "ctx", "kind", "type_comment", "type_params"}


def _written(node: Any) -> str:
    """Serialises a syntax tree; `ast.dump` and `ast.unparse` differ between versions of Python."""
    if isinstance(node, list):
        return f"[{', '.join(map(_written, node))}]"
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = [(name, value) for name, value in ast.iter_fields(node) if name not in _LEFT_OUT]
    if not isinstance(node, ast.Constant):  # a constant's value may be None
        fields = [(name, value) for name, value in fields if value is not None and value != []]
    return f"{type(node).__name__}({', '.join(f'{name}={_written(value)}' for name, value in fields)})"


def _read_table() -> dict[str, Known]:
    """Reads `known_forwards.json`, with a row for each digest."""
    rows = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
    return {row.pop("digest"): Known(**row) for row in rows}


KNOWN = _read_table()
"""The known functions, by digest."""
