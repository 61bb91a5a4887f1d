"""Runs bitsandbytes' own tests of its 4-bit layer twice, as they are and with every layer swapped for ours.

    python tests/integrations/bitsandbytes_suite.py CHECKOUT [pytest's arguments]

CHECKOUT holds bitsandbytes' sources and its `tests/`.
Every test that passes with bitsandbytes' layer must pass with ours, which goes through this project's operators.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest


class Outcomes:
    """A plugin that notes how each test ended."""

    def __init__(self) -> None:
        self.of: dict[str, str] = {}

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or report.outcome != "passed":
            self.of[report.nodeid] = report.outcome


def swap_layers() -> None:
    """Makes each `bitsandbytes.nn.Linear4bit` that is built from here on one of ours."""
    import bitsandbytes

    from ept.model.linear4bit import swap_linear4bit

    theirs = bitsandbytes.nn.Linear4bit

    def swapped(*args: Any, **kwargs: Any) -> Any:
        layer = theirs(*args, **kwargs)
        assert swap_linear4bit(layer, always=True) == 1
        return layer

    bitsandbytes.nn.Linear4bit = swapped


def run(checkout: str, whose: str, file: str, arguments: list[str]) -> int:
    if whose == "ours":
        swap_layers()
    outcomes = Outcomes()
    os.chdir(checkout)
    sys.path.insert(0, checkout)
    options = ["-p", "no:cacheprovider", "-q", "--tb=short", "-W", "ignore", *arguments]
    code = pytest.main(["tests/test_linear4bit.py", *options], plugins=[outcomes])
    Path(file).write_text(json.dumps(outcomes.of))
    return int(code)


def compare(checkout: Path, arguments: list[str]) -> str:
    """Returns what is to be said of the two runs; empty if ours passes wherever bitsandbytes does."""
    if not (checkout / "tests" / "test_linear4bit.py").is_file():
        return f"{checkout} holds no tests of bitsandbytes: give its checkout"
    ended: dict[str, dict[str, str]] = {}
    with tempfile.TemporaryDirectory() as place:
        for whose in ("theirs", "ours"):
            file = Path(place, whose)
            command = [sys.executable, __file__, str(checkout.resolve()), whose, str(file), *arguments]
            subprocess.run(command, check=False)
            ended[whose] = json.loads(file.read_text())
            print(f"with {'our' if whose == 'ours' else 'their own'} layer: {dict(Counter(ended[whose].values()))}")
    worse = [name for name, how in ended["theirs"].items() if how == "passed" and ended["ours"].get(name) != "passed"]
    if not ended["theirs"] or "passed" not in ended["theirs"].values():
        return "no test passed with bitsandbytes' own layer: there is nothing to compare"
    return f"{len(worse)} pass with bitsandbytes' layer alone: {', '.join(worse)}" if worse else ""


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    if len(sys.argv) > 3 and sys.argv[2] in ("theirs", "ours"):
        sys.exit(run(*sys.argv[1:4], sys.argv[4:]))
    sys.exit(compare(Path(sys.argv[1]), sys.argv[2:]) or 0)
