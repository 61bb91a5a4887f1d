"""``docs/troubleshooting.md`` has an entry for every message of an error or warning, and no entry without a message.

The messages are read from the source: whatever text an exception, a warning, ``sys.exit`` or standard error is given,
with ``…`` for every part that is known at run time only. An entry is a code span in the first column of a table on the
page. It covers a message in which it occurs word for word.
"""

from __future__ import annotations

import ast
import builtins
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "troubleshooting.md"
PACKAGES = (ROOT / "ept", ROOT / "kernels" / "torch-ext" / "ept_kernels")
HIDDEN = "…"

# Functions whose texts become parts of messages: what is wrong with a file's content, a compiled kernel, a result.
PARTS = (
    "_mismatches",
    "missing_column",
    "problems",
    "_difference",
    *("divergence_advice", "_memory_advice", "_disk_advice", "_refused", "_what_is_left"),
)
# What is raised without a text of this project's own, and why that needs no entry.
WORDLESS = {
    "typer.Exit": "ends `ept --version`",
    "typer.Exit(1)": "an exit code; what failed has been written to standard error",
    "typer.Exit(2 if isinstance(error, USER_ERRORS) else 1)": "an exit code; the error has been written",
    "typer.Exit(getattr(stop, 'exit_code', 130))": "an exit code; what to do has been written",
    "explanation": "made of the texts of the functions in PARTS",
    "self._stopped(number)": "made in that method",
    "self._stopped(self.received)": "made in that method",
    "OSError(int(found[1]) if found else likely, reason(error).strip(), str(path))": "a library's own reason",
    "failure": "an error of this process or of another one, as it was raised there",
    "Refused(str(error).strip().splitlines()[0])": "Triton's own reason",
}
LEAST_LETTERS = 12  # of an entry that is a part of a message: fewer would be found in messages of all kinds


class Message(NamedTuple):
    place: str
    text: str


def exceptions_defined(trees: dict[Path, ast.Module]) -> set[str]:
    """Names of the project's own exceptions."""
    classes = [node for tree in trees.values() for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    return {c.name for c in classes if any(is_exception(base.id) for base in c.bases if isinstance(base, ast.Name))}


def is_exception(name: str) -> bool:
    found = getattr(builtins, name, None)
    return isinstance(found, type) and issubclass(found, BaseException)


class Reader:
    """Reads the messages out of the sources."""

    def __init__(self) -> None:
        paths = [path for package in PACKAGES for path in sorted(package.rglob("*.py"))]
        self.trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in paths}
        self.own = exceptions_defined(self.trees)
        nodes = [node for tree in self.trees.values() for node in ast.walk(tree)]
        self.functions = {node.name: node for node in nodes if isinstance(node, ast.FunctionDef)}

    def messages(self) -> list[Message]:
        """Every text that has letters, in the order of the sources."""
        return [
            Message(f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}", text)
            for path, node, scope in self._nodes()
            for text in self._texts_at(node, scope)
        ]

    def wordless(self) -> set[str]:
        """What is raised without such a text. A function that makes the error is read where it is defined."""
        return {
            ast.unparse(node.exc)
            for _, node, scope in self._nodes()
            if isinstance(node, ast.Raise) and node.exc is not None and not self._made_elsewhere(node.exc)
            if not (isinstance(node.exc, ast.Call) and self._texts_at(node.exc, scope))
        }

    def _nodes(self) -> Iterator[tuple[Path, ast.AST, ast.AST]]:
        """Every node of the sources and the function that it is in."""

        def below(node: ast.AST, scope: ast.AST) -> Iterator[tuple[ast.AST, ast.AST]]:
            for child in ast.iter_child_nodes(node):
                yield child, scope
                yield from below(child, child if isinstance(child, ast.FunctionDef) else scope)

        return ((path, *found) for path, tree in self.trees.items() for found in below(tree, tree))

    def _made_elsewhere(self, error: ast.expr) -> bool:
        return isinstance(error, ast.Call) and isinstance(error.func, ast.Name) and error.func.id in self.functions

    def _texts_at(self, node: ast.AST, scope: ast.AST) -> list[str]:
        """The texts with letters that ``node`` itself shows or makes."""
        values: list[ast.expr] = self._shown(node) if isinstance(node, ast.Call) else []
        if isinstance(node, ast.FunctionDef) and node.name in PARTS:
            values, scope = list(f_strings(node)), node
        texts = (" ".join(text.split()) for value in values for text in self._texts(value, scope))
        return [re.sub(f"{HIDDEN}+", HIDDEN, text) for text in texts if any(map(str.isalpha, text))]

    def _shown(self, call: ast.Call) -> list[ast.expr]:
        """The arguments of ``call`` that a reader gets to see."""
        owner = ast.unparse(call.func).rpartition(".")[0]
        name = ast.unparse(call.func).rpartition(".")[2]
        if name in self.own or is_exception(name) or name.endswith(("Error", "BadParameter")):
            return call.args
        if name in ("warn", "warning") or (owner, name) == ("sys", "exit"):
            return call.args[:1]
        if name == "_assert_async":
            return call.args[1:]
        if name == "echo" and any(keyword.arg == "err" for keyword in call.keywords):
            return call.args
        return []

    def _texts(self, node: ast.expr, scope: ast.AST) -> list[str]:
        """What ``node`` may be; several texts where the code chooses."""
        if isinstance(node, ast.Constant):
            return [re.sub("%[a-z]", HIDDEN, node.value)] if isinstance(node.value, str) else []
        if isinstance(node, ast.JoinedStr):
            parts = (part.value if isinstance(part, ast.Constant) else HIDDEN for part in node.values)
            return ["".join(map(str, parts))]
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            right = self._texts(node.right, scope) or [HIDDEN]
            return [left + tail for left in self._texts(node.left, scope) or [HIDDEN] for tail in right]
        if isinstance(node, ast.IfExp):
            return self._texts(node.body, scope) + self._texts(node.orelse, scope)
        if isinstance(node, ast.Name):
            assigned = [part for part in ast.walk(scope) if isinstance(part, ast.Assign | ast.AugAssign)]
            values = [part.value for part in assigned if node.id in map(ast.unparse, targets(part))]
            return [text for value in values for text in self._texts(value, scope)]
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in self.functions:
            function = self.functions[node.func.id]
            returns = [part.value for part in ast.walk(function) if isinstance(part, ast.Return) and part.value]
            return [text for value in returns for text in self._texts(value, function)]
        return []


def f_strings(node: ast.AST) -> Iterator[ast.JoinedStr]:
    """The f-strings in ``node``, without the formats of their values, which are f-strings to Python as well."""
    if isinstance(node, ast.JoinedStr):
        yield node
        return
    for child in ast.iter_child_nodes(node):
        yield from f_strings(child)


def targets(assignment: ast.Assign | ast.AugAssign) -> list[ast.expr]:
    return assignment.targets if isinstance(assignment, ast.Assign) else [assignment.target]


def entries() -> list[str]:
    """The code spans in the first column."""
    return [span for cells in table_rows() for span in re.findall("`([^`]+)`", cells[0])]


def table_rows() -> list[list[str]]:
    """The cells of every row of the page's tables that is about messages."""
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    return [line.strip("| ").split(" | ") for line in lines if line.startswith("| `")]


def covers(entry: str, text: str) -> bool:
    return entry == text or (sum(map(str.isalpha, entry)) >= LEAST_LETTERS and entry in text)


@pytest.fixture(scope="module")
def messages() -> list[Message]:
    return Reader().messages()


def test_every_message_has_an_entry(messages: list[Message]) -> None:
    page = entries()
    missing = [f"{m.place}: {m.text}" for m in messages if not any(covers(entry, m.text) for entry in page)]
    assert not missing, f"{PAGE.name} has no entry for\n" + "\n".join(missing)


def test_every_entry_has_a_message(messages: list[Message]) -> None:
    stale = [entry for entry in entries() if not any(covers(entry, m.text) for m in messages)]
    assert not stale, f"{PAGE.name} explains what no code says:\n" + "\n".join(stale)


def test_every_raise_is_read() -> None:
    """Otherwise a message that is put together in a new way would need no entry."""
    assert Reader().wordless() == set(WORDLESS)


def test_no_entry_stands_there_twice() -> None:
    page = entries()
    assert len(page) == len(set(page)), sorted({entry for entry in page if page.count(entry) > 1})


def test_every_entry_is_explained() -> None:
    bare = [cells[0] for cells in table_rows() if len(cells) != 2 or len(cells[1].split()) < 3]
    assert not bare, f"{PAGE.name}: a message and what to do about it are needed in\n" + "\n".join(bare)


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("raise ValueError(f'a {b:.3g} c' ' d')", ["a … c d"]),
        ("raise errors.ParserError(None, 'x' if y else 'z')", ["x", "z"]),
        ("def f():\n    text = f'{a}: b'\n    text += ' c'\n    raise KeyError(text)", ["…: b", "c"]),
        ("def f():\n    return 'no such'\nraise TypeError(f())", ["no such"]),
        ("warnings.warn('look', stacklevel=2)", ["look"]),
        ("class Odd(Exception): ...\nraise Odd('own')", ["own"]),
        ("logger.warning('%d of %s', 1, 'b')", ["… of …"]),
        ("typer.echo('shown')\ntyper.echo('failed', err=True)", ["failed"]),
        ("raise ValueError(str(error)) from error", []),
    ],
)
def test_the_reader_finds(code: str, expected: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "module.py").write_text(code, encoding="utf-8")
    monkeypatch.setattr(f"{__name__}.PACKAGES", (tmp_path,))
    monkeypatch.setattr(f"{__name__}.ROOT", tmp_path)
    assert [message.text for message in Reader().messages()] == expected
    assert bool(Reader().wordless()) == (not expected)
