"""`ept evaluate`"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .common import JsonOption, SetOption, open_run, print_json, print_table, quiet

SPLITS = ("train", "validation", "test")


def evaluate(
    run_dir: Annotated[Path, typer.Argument(help="Folder of a finished run.")],
    split: Annotated[str, typer.Option(help="train, validation or test.")] = "test",
    data_dir: Annotated[Path | None, typer.Option(help="Folder of data instead of the run's own.")] = None,
    file: Annotated[
        Path | None, typer.Option(help="One labelled file (jsonl, json, csv, parquet) instead of a split.")
    ] = None,
    scoring: Annotated[str | None, typer.Option(help="generate or rank, in place of the task type's own way.")] = None,
    set_: SetOption = None,
    json: JsonOption = False,
) -> None:
    """Score a trained run on its test split, or on other data."""
    if split not in SPLITS:
        raise ValueError(f"--split {split}: choose one of {', '.join(SPLITS)}")
    if file is not None and data_dir is not None:
        raise ValueError("--file and --data-dir exclude each other: give one")
    with quiet():
        result = _evaluate(run_dir, split, data_dir, file, scoring, set_ or [])
    if json:
        print_json(result)
        return
    from ept.utils.tables import table

    title = f"{result['task']}, {result['data']}, {result['rows']:,} rows"
    print_table(table(("metric", "value"), [(name, f"{v:.4f}") for name, v in result["metrics"].items()], title))


def _evaluate(
    run_dir: Path, split: str, data_dir: Path | None, file: Path | None, scoring: str | None, overrides: list[str]
) -> dict[str, Any]:
    from ept.runs.data import fit_split, load_run_data
    from ept.runs.predict import evaluate as score
    from ept.tasks import load_split

    run = open_run(run_dir, overrides)
    config = run.config.data
    if file is not None:
        rows = load_split(run.task, file, labels=config.labels)
        rows, rate = fit_split(
            rows, run.task, run.tokenizer, run.task_type, run.max_length, config.on_too_long, str(file)
        )
    else:
        if data_dir is not None:
            config.data_dir, config.train_file, config.validation_file, config.test_file = (
                str(data_dir),
                None,
                None,
                None,
            )
        run_data = load_run_data(config, run.tokenizer, run.task_type, run.config.seed)
        rows, rate = getattr(run_data.data, split), run_data.truncation_rate[split]
    metrics = score(
        run.model,
        run.tokenizer,
        rows,
        run.labels,
        run.task.metrics,
        run.task_type,
        run.max_length,
        run.config.training.eval_batch_size,
        scoring=scoring or run.config.training.scoring,
        values=run.task.values,
        progress="scoring",
    )
    return {
        "task": run.task.name,
        "data": str(file) if file is not None else split,
        "rows": len(rows),
        "truncation_rate": rate,
        "metrics": metrics,
    }
