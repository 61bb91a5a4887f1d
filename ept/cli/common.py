"""What the commands share: options, quiet libraries, machine-readable output, opening a trained run."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from ept.runs.config import RunConfig
    from ept.tasks import Task

SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Set one dotted key, e.g. method.r=30. Repeatable."),
]
JsonOption = Annotated[
    bool, typer.Option("--json", help="Print JSON on standard output, everything else on standard error.")
]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Standard output is the command's alone: what libraries print goes to standard error, their chatter nowhere."""
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


def print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False))


def print_table(table: Any) -> None:
    from rich.console import Console

    Console().print(table)


@dataclass
class TrainedRun:
    """A finished run, ready to predict."""

    config: RunConfig
    task: Task
    task_type: str
    tokenizer: Any
    model: Any
    max_length: int
    labels: tuple[str, ...]


def open_run(run_dir: Path, overrides: list[str]) -> TrainedRun:
    """Loads the model of a run's folder, with `overrides` over its configuration.

    Raises:
        FileNotFoundError: the folder holds no run, or one without an adapter.
    """
    from ept.runs.adapters import load_trained
    from ept.runs.config import load_run_config
    from ept.runs.data import max_length_of, task_of
    from ept.runs.folder import RunFolder
    from ept.runs.loading import load_tokenizer, task_type_of

    folder = RunFolder(run_dir)
    folder.load_config()
    config = load_run_config(folder.config, overrides)
    if not folder.adapter.is_dir():
        raise FileNotFoundError(
            f"the run in {run_dir} has no adapter yet: `ept train --output {run_dir} --resume` finishes it"
        )
    task = task_of(config.data)
    task_type = task_type_of(config.model)
    tokenizer = load_tokenizer(config.model)
    model = load_trained(config, folder.adapter, task_type, task.num_outputs, int(tokenizer.pad_token_id))
    labels = task.labels(config.data.labels)
    return TrainedRun(config, task, task_type, tokenizer, model, max_length_of(config.data, task), labels)
