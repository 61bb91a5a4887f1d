"""Imports run one way between the parts of the code, never in a circle, never back to `ept` itself."""

import ast
import sys
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LAYERS = {
    "__init__",
    "__main__",
    "config",
    "budget",
    "prompt",
    "initialisation",
    "reparameterization",
    "embedding",
    "functional",
    "version",
}
GROUND = {"utils", "config", "budget", "embedding", "version", "ept_kernels"}
MODEL = GROUND | {"functional", "prompt"}
RUNS = MODEL | {"model", "tasks"}
MAY_IMPORT = {  # a part of the code: the parts that it may import besides itself
    **dict.fromkeys(GROUND | {"functional", "initialisation", "reparameterization", "tasks"}, GROUND),
    "prompt": GROUND | {"functional", "initialisation", "reparameterization"},
    "model": MODEL,
    "runs": RUNS,
    **dict.fromkeys(("compare", "profile"), RUNS | {"runs"}),
    **dict.fromkeys(("cli", "__main__"), RUNS | {"runs", "compare", "profile", "cli"}),
    "integrations": MODEL | {"model"},
    "__init__": MODEL | {"model"},
    "ept_kernels": {"torch", "triton"},
    "ept_kernels.dev": {"torch", "triton", "ept_kernels", "bitsandbytes"},
}
FILES = {
    ".".join(path.relative_to(root).with_suffix("").parts): path
    for root, package in ((ROOT, "ept"), (ROOT / "kernels" / "torch-ext", "ept_kernels"))
    for path in (root / package).rglob("*.py")
}


def imports(name: str, for_types: bool) -> set[str]:
    """Lists what a file imports, inside functions and perhaps for type checkers too: our files, others' packages."""
    tree, found = ast.parse(FILES[name].read_text(encoding="utf-8")), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test) and not for_types:
            node.body = []
    for node in ast.walk(tree):
        targets = [alias.name for alias in node.names] if isinstance(node, (ast.Import, ast.ImportFrom)) else []
        if isinstance(node, ast.ImportFrom):
            folder = name.split(".")[: -node.level] if node.level else []
            targets = [".".join([*folder, *filter(None, [node.module]), target]) for target in targets]
        for target in targets:  # a file, a folder, or a name that stands in one of them
            forms = [form + end for form in (target, target.rpartition(".")[0]) for end in ("", ".__init__")]
            found.add(next((form for form in forms if form in FILES), target.partition(".")[0]))
    return found - {name}


def part(name: str) -> str:
    top, _, rest = name.partition(".")
    return rest.partition(".")[0] if top == "ept" else "ept_kernels.dev" if rest.startswith("dev.") else top


def test_imports_run_one_way_and_only_layers_stand_beside_the_wings() -> None:
    assert {path.stem for path in (ROOT / "ept").glob("*.py")} == LAYERS
    graph = {name: imports(name, True) for name in FILES}
    arrows = [(a, b) for a in graph for b in graph[a] - sys.stdlib_module_names if b in FILES or "kernels" in part(a)]
    wrong = [f"{a} -> {b}" for a, b in arrows if part(b) not in {part(a), *MAY_IMPORT[part(a)]}]
    assert not wrong, wrong
    list(TopologicalSorter({name: imports(name, False) for name in FILES}).static_order())  # raises on a circle
