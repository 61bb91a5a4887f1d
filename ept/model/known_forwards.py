"""Digests of the forward passes of transformers' modules that `frozen.py` can compute in another way.

A class is known by what its method says, whatever class and method are called: names say little, and many families
copy the same lines. After a change in transformers a class is unknown, and is left alone. A digest does not tell what a
function computes, so a fused form is tried first (`frozen_trial.py`).
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
    """A function of transformers that can be computed in another way."""

    kind: str
    """The fused form that computes it, a key of `frozen.py`."""
    constant: Any
    """The argument that makes the operator compute this one; None: it needs none.

    `rms_norm`: its form; they differ in where they round, and Gemma's adds 1 to the weight. `rotate`: angles turn
    neighbouring columns together (True), or those of two halves. `rotary`: the result has the dtype of queries and
    keys, whatever the angles' is (True), or they must have one dtype.
    """
    versions: str
    """Releases of transformers in which it was found; of 5.10 to 5.24 every other one was looked at."""
    names: list[str]
    """Families that have it, a few of them where it is many: where it stands within transformers.models."""


def known_as(function: Callable[..., Any] | None) -> Known | None:
    """Looks a function up by its source; None: it is unknown, or has none."""
    return KNOWN.get(digest_of(function) or "")


@functools.cache
def digest_of(function: Any) -> str | None:
    """Computes the SHA-256 of a function's arguments and statements, under any version of Python the same.

    Its name, annotations, docstring and decorators do not count, nor do comments and layout. None: it has no source.
    """
    try:
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(function))).body
    except (OSError, TypeError, SyntaxError, ValueError):
        return None
    if not isinstance(tree, ast.FunctionDef):
        return None
    statements = tree.body[1:] if ast.get_docstring(tree) is not None else tree.body
    return hashlib.sha256(_written([tree.args, *statements]).encode()).hexdigest()


# Fields of a node that say nothing of what is computed, or that some versions of Python do not have.
_LEFT_OUT = {"annotation", "returns", "decorator_list", "ctx", "kind", "type_comment", "type_params"}


def _written(node: Any) -> str:
    """Writes a syntax tree out. `ast.dump` and `ast.unparse` differ between versions of Python."""
    if isinstance(node, list):
        return f"[{', '.join(map(_written, node))}]"
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = [(name, value) for name, value in ast.iter_fields(node) if name not in _LEFT_OUT]
    if not isinstance(node, ast.Constant):  # whose value may be None
        fields = [(name, value) for name, value in fields if value is not None and value != []]
    return f"{type(node).__name__}({', '.join(f'{name}={_written(value)}' for name, value in fields)})"


def _read_table() -> dict[str, Known]:
    """Reads `known_forwards.json`: a row for each digest."""
    rows = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
    return {row.pop("digest"): Known(**row) for row in rows}


KNOWN = _read_table()
"""The known functions, by their digests."""
