"""Parts that the commands share: options, quiet libraries, and the answer as text or as JSON."""

from __future__ import annotations

import contextlib
import json as json_format
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import typer
from typer import Option

SET: Any = Option(None, "--set", metavar="KEY=VALUE", help="Set one dotted key, e.g. method.r=30. Repeatable.")
JSON: Any = Option(False, "--json", help="Print JSON on standard output, everything else on standard error.")
PRINT_CONFIG: Any = Option(False, "--print-config", help="Print the whole configuration as YAML and exit.")


def overrides(set_: list[str] | None, options: Mapping[str, object]) -> list[str]:
    """Returns what `--set` gives, and after it the keys that options of their own have set."""
    given = {key: str(value) for key, value in options.items() if value is not None}
    return [*(set_ or []), *(f"{key}={json_format.dumps(text, ensure_ascii=False)}" for key, text in given.items())]


def answer(json: bool, value: Any, *shown: Any) -> None:
    """Prints a command's answer on standard output: `value` as JSON, or else tables and lines of text."""
    from rich.console import Console

    if json:
        shown = (json_format.dumps(value, indent=2, ensure_ascii=False),)
    for part in shown:
        typer.echo(part) if isinstance(part, str) else Console().print(part)


def shares(values: Mapping[str, float]) -> str:
    """Writes fractions as percentages, each after its name."""
    return ", ".join(f"{name} {share:.1%}" for name, share in values.items())


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps standard output for the answer: what libraries print goes to standard error, their chatter nowhere."""
    import datasets
    import transformers

    with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():
        if os.environ.get("EPT_DEBUG") != "1":
            transformers.logging.set_verbosity_error()
            transformers.logging.disable_progress_bar()
            datasets.disable_progress_bars()
            logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
            warnings.filterwarnings("ignore", category=FutureWarning)
        yield
