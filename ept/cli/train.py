"""`ept train`"""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from typer import Option

from .common import (
    DATA,
    JSON,
    LABEL_COLUMN,
    METHOD,
    MODEL,
    PRINT_CONFIG,
    SET,
    STEPS,
    STRICT,
    TARGET_TEMPLATE,
    TEMPLATE,
    TEXT_COLUMN,
    answer,
    data_keys,
    overrides,
    quiet,
)

if TYPE_CHECKING:
    from ept.runs.config import DataConfig
    from ept.runs.train import PreparedRun


def train(
    data: str | None = DATA,
    model: str | None = MODEL,
    text_column: list[str] | None = TEXT_COLUMN,
    label_column: str | None = LABEL_COLUMN,
    template: str | None = TEMPLATE,
    target_template: str | None = TARGET_TEMPLATE,
    method: str | None = METHOD,
    steps: int | None = STEPS,
    output: Path | None = Option(
        None, metavar="DIR", help="The run's folder (output_dir). Default: runs/ with the data's name and the date."
    ),
    strict: bool = STRICT,
    config: Path | None = Option(None, metavar="FILE.yaml", help="The run's configuration."),
    set_: list[str] | None = SET,
    resume: bool = Option(False, "--resume", help="Continue the run in the folder from its last checkpoint."),
    overwrite: bool = Option(False, "--overwrite", help="Delete the run in the folder and start anew."),
    init_from: Path | None = Option(None, metavar="RUN", help="Start from another run's adapter (method.init_from)."),
    print_config: bool = PRINT_CONFIG,
    dry_run: bool = Option(False, "--dry-run", help="Load everything, show what would be trained, write nothing."),
    json: bool = JSON,
) -> None:
    """Train an adapter and score it before and after.

    `ept train reviews.csv --model NAME` is enough: columns, labels and metric are inferred from the file and shown.
    With --resume and without --config, the configuration is the one in the folder. In several processes:
    torchrun --nproc-per-node 2 -m ept train ...
    """
    from ept.runs.config import load_run_config
    from ept.runs.processes import rank, world_size

    if config is None and resume and output is not None:
        if (output / "config.yaml").is_file():
            config = output / "config.yaml"
        elif data is None and model is None and not set_:
            raise FileNotFoundError(f"{output} holds no run to resume: there is no config.yaml")
    given: dict[str, object] = {"model.name_or_path": model, "method.name": method, "training.max_steps": steps}
    given["method.init_from"] = init_from
    given |= {"output_dir": output, **data_keys(data, text_column, label_column, template, strict, target_template)}
    run_config = load_run_config(config, overrides(set_, given))
    if (print_config or dry_run) and rank() != 0:
        return
    if print_config:
        answer(json, run_config.to_dict(), run_config.to_yaml().rstrip("\n"))
        return
    if dry_run:
        with quiet():
            from ept.runs.data import OwnRows
            from ept.runs.summary import run_summary, summary_table
            from ept.runs.train import prepare, with_data

            rows = OwnRows()
            summary = run_summary(prepare(with_data(run_config, rows), rows=rows))
        answer(json, summary, *_examples(summary), summary_table(summary, "dry run"), "nothing was written")
        return
    if run_config.output_dir is None and not resume and world_size() == 1:
        run_config.output_dir = str(free_folder(run_config.data))
    with quiet():
        from torch.distributed.elastic.multiprocessing.errors import record

        from ept.runs.report import results_tables
        from ept.runs.train import train as train_run

        launched = record(train_run) if world_size() > 1 else train_run  # record: for the launcher's report
        results = launched(run_config, resume=resume, overwrite=overwrite, on_ready=_show)
    if results is not None and rank() == 0:
        answer(json, results, *results_tables(results), f"saved in {run_config.output_dir}, with report.md")


def free_folder(data: DataConfig) -> Path:
    """Makes an unused name for a run's folder, from its data and the date."""
    name = f"{data.name.replace('/', '_').replace(':', '_')}-{datetime.date.today()}"
    folder, number = Path("runs") / name, 1
    while folder.exists():
        number += 1
        folder = Path("runs") / f"{name}-{number}"
    return folder


def _show(run: PreparedRun) -> None:
    """Shows on standard error what will be trained."""
    from rich.console import Console

    from ept.runs.summary import run_summary, summary_table

    Console(stderr=True).print(summary_table(run_summary(run), "training"))


def _examples(summary: dict[str, Any]) -> list[str]:
    return [
        f"example {number}\n  text:   {example['text']!r}\n  target: {example['target']!r}"
        for number, example in enumerate(summary["examples"], start=1)
    ]
