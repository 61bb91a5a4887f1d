"""The command line answers `--help` and names its commands, quickly: help must not load a model library."""

from __future__ import annotations

import pytest
from checkout import run_python

COMMANDS = ["train", "evaluate", "predict", "compare", "export", "profile", "env", "tasks"]


@pytest.mark.parametrize("module", ["ept", "ept.cli.main"])
def test_help_names_every_command(module: str) -> None:
    shown = run_python("-m", module, "--help").stdout
    named = [line.split()[0] for line in shown.partition("Commands:")[2].splitlines() if line.strip()]
    assert named == COMMANDS, shown


@pytest.mark.parametrize("encoding", ["latin-1", "cp1251"])
def test_what_a_console_cannot_write_is_escaped(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONIOENCODING", encoding)
    template = ("--set", "data.template='{text} fun 🎉'")
    assert "fun \\U0001f389" in run_python("-m", "ept", "train", "--print-config", *template).stdout
    assert "fun\\U0001f389.yaml" in run_python("-m", "ept", "train", "--config", "fun🎉.yaml", code=2).stderr


def test_unknown_command_fails() -> None:
    done = run_python("-m", "ept.cli.main", "trian", code=2)
    assert "trian" in done.stdout + done.stderr


def test_help_loads_no_model_library() -> None:
    lines = run_python("-X", "importtime", "-m", "ept.cli.main", "--help").stderr.splitlines()
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in lines if "|" in line}
    assert not imported & {"torch", "transformers", "peft", "datasets", "matplotlib", "sklearn"}
