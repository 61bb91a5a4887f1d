"""Parts that the commands share: options, quiet libraries, and the answer as text or as JSON."""

from __future__ import annotations

import contextlib
import json as json_format
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import typer
from typer import Argument, Option

from ept.utils.files import strict_json

SET: Any = Option(None, "--set", metavar="KEY=VALUE", help="Set one dotted key, e.g. method.r=30. Repeatable.")
DATA: Any = Argument(
    None,
    metavar="DATA",
    help="A file (csv, tsv, jsonl, json, parquet), a folder, a task's name, or a name on the hub.",
)
MODEL: Any = Option(None, metavar="NAME", help="The base model, a folder or hub name (model.name_or_path).")
METHOD: Any = Option(None, help="ept-token (the default), ept, dept, pt, lora, ... (method.name).")
STEPS: Any = Option(None, help="Training steps (training.max_steps). Default: 3 epochs.")
TEXT_COLUMN: Any = Option(
    None,
    "--text-column",
    metavar="NAME",
    help="Column of the text (data.text_columns). Repeatable. Default: found in the data.",
)
LABEL_COLUMN: Any = Option(
    None, metavar="NAME", help="Column of the label (data.label_column). Default: found in the data."
)
TEMPLATE: Any = Option(
    None,
    metavar="TEXT",
    help="Input text with columns in braces, \\n for a line break (data.template). Default: made from the text "
    "columns.",
)
TARGET_TEMPLATE: Any = Option(
    None, metavar="TEXT", help="For answers in free text: the answer, with columns in braces (data.target_template)."
)
STRICT: Any = Option(
    False, "--strict", help="Refuse rows with blank text or no label, which are left out by default (data.strict)."
)
JSON: Any = Option(False, "--json", help="Print JSON on standard output, everything else on standard error.")
PRINT_CONFIG: Any = Option(False, "--print-config", help="Print the whole configuration as YAML and exit.")

FILE_WIDTH = 120
"""Width of a table in a file or a pipe, where rich would break numbers to fit into 80 columns."""


def overrides(set_: list[str] | None, options: Mapping[str, object]) -> list[str]:
    """Returns the items of `--set`, followed by the keys set by other options."""
    given = {key: value for key, value in options.items() if value is not None and value is not False and value != []}
    written = {key: value if isinstance(value, (int, list)) else str(value) for key, value in given.items()}
    return [*(set_ or []), *(f"{key}={json_format.dumps(value, ensure_ascii=False)}" for key, value in written.items())]


def data_keys(
    data: str | None,
    text_columns: list[str] | None = None,
    label_column: str | None = None,
    template: str | None = None,
    strict: bool = False,
    target_template: str | None = None,
) -> dict[str, object]:
    """Returns the configuration keys for the data options; whether DATA is a file, a folder, a task or a name on the
    Hub depends on what exists.

    Raises FileNotFoundError for a path that does not exist.
    """
    keys: dict[str, object] = {"data.text_columns": text_columns, "data.label_column": label_column}
    written = {"data.template": template, "data.target_template": target_template}
    keys |= {key: text and text.replace("\\n", "\n") for key, text in written.items()}
    keys["data.strict"] = strict
    if data is not None:
        from ept.tasks.files import OTHER_FILES, READERS
        from ept.tasks.table import TASKS

        path = Path(data)
        if path.is_file() or path.suffix.lower() in READERS:
            keys["data.train_file"] = data
        elif path.is_dir():
            keys["data.data_dir"] = data
        elif data.count("/") == 1 and any(task.startswith(data.partition("/")[0] + "/") for task in TASKS):
            keys["data.task"] = data  # if it is unknown, the error names the nearest one
        elif path.is_absolute() or data.startswith(".") or data.count("/") > 1 or path.suffix.lower() in OTHER_FILES:
            raise FileNotFoundError(f"{data}: no such file or folder: check the path")
        else:
            keys["data.hub"] = data
    return keys


def encoding_of(set_: list[str] | None) -> str | None:
    """Returns the encoding that `--set data.encoding` names for a file that is not the run's own; else None."""
    from ept.runs.config import RunConfig

    named = [item for item in set_ or [] if item.partition("=")[0].strip() == "data.encoding"]
    return RunConfig.load(None, named).data.encoding


def answer(json: bool, value: Any, *shown: Any) -> None:
    """Prints a command's answer on standard output: `value` as JSON, or the tables and lines of text in `shown`."""
    from rich.console import Console

    if json:
        shown = (strict_json(value, indent=2),)
    console = Console()
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console = Console(width=FILE_WIDTH)
    for part in shown:
        typer.echo(part) if isinstance(part, str) else console.print(part)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps standard output for the answer: libraries' output goes to standard error, and their chatter is dropped."""
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
