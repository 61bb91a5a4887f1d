"""`ept train`"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .common import JsonOption, SetOption, print_json, print_table, quiet

if TYPE_CHECKING:
    from ept.runs.config import RunConfig


def train(
    config: Annotated[Path | None, typer.Option(metavar="FILE.yaml", help="The run's configuration.")] = None,
    set_: SetOption = None,
    output: Annotated[Path | None, typer.Option(metavar="DIR", help="The run's folder (output_dir).")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the run in the folder from its last checkpoint.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Delete the run in the folder and start anew.")
    ] = False,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Print the whole configuration as YAML and exit.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Load everything, show what would be trained, write nothing.")
    ] = False,
    json: JsonOption = False,
) -> None:
    """Train an adapter and score it before and after.

    With --resume and without --config, the configuration is the one in the folder. In several processes:
    torchrun --nproc-per-node 2 -m ept train ...
    """
    from ept.runs.processes import rank, world_size

    run_config = _configuration(config, set_ or [], output, resume)
    if (print_config or dry_run) and rank() != 0:
        return
    if print_config:
        print_json(run_config.to_dict()) if json else typer.echo(run_config.to_yaml(), nl=False)
        return
    if dry_run:
        with quiet():
            summary = describe(run_config)
        print_json(summary) if json else _show(summary)
        return
    with quiet():
        from torch.distributed.elastic.multiprocessing.errors import record

        from ept.runs.report import results_table
        from ept.runs.train import train as train_run

        launched = record(train_run) if world_size() > 1 else train_run  # record: for the launcher's report
        results = launched(run_config, resume=resume, overwrite=overwrite)
    if results is None or rank() != 0:
        return
    if json:
        print_json(results)
        return
    print_table(results_table(results))
    typer.echo(f"saved in {run_config.output_dir}")


def _configuration(file: Path | None, overrides: list[str], output: Path | None, resume: bool) -> RunConfig:
    from ept.runs.config import load_run_config

    if file is None and resume and output is not None and (output / "config.yaml").is_file():
        file = output / "config.yaml"
    config = load_run_config(file, overrides)
    if output is not None:
        config.output_dir = str(output)
    return config


def describe(config: RunConfig) -> dict[str, Any]:
    """What a run would train, on what; loads tokenizer, data and model, writes nothing."""
    from ept.runs.train import prepare
    from ept.tasks.encoding import encode_split

    run = prepare(config)
    data = run.run_data.data
    encode_split(data.train, run.tokenizer, data.labels, run.task_type, data.task.values)
    rows = {name: len(getattr(data, name)) for name in ("train", "validation", "test")}
    return {
        "task": data.task.name,
        "task_type": run.task_type,
        "metric": data.task.metrics[0],
        "rows": rows,
        "labels": list(data.labels),
        "label_balance": data.balance(),
        "majority": data.majority(),
        "max_length": run.run_data.max_length,
        "truncation_rate": run.run_data.truncation_rate,
        "examples": [
            {"text": row["text"], "target": row["target"]} for row in data.train.select(range(min(2, rows["train"])))
        ],
        "method": config.method.name,
        "model": config.model.name_or_path,
        "trainable_parameters": run.model.get_nb_trainable_parameters()[0],
        "adapter": {key: value for key, value in run.model.active_peft_config.to_dict().items() if value is not None},
    }


def _show(summary: dict[str, Any]) -> None:
    from rich.table import Table

    for number, example in enumerate(summary["examples"], start=1):
        typer.echo(f"example {number}\n  text:   {example['text']!r}\n  target: {example['target']!r}")
    table = Table(title=f"dry run: {summary['method']} on {summary['task']}", show_header=False)
    table.add_column(style="bold")
    table.add_column()
    table.add_row("model", f"{summary['model']} ({summary['task_type']})")
    table.add_row("rows", ", ".join(f"{name} {count:,}" for name, count in summary["rows"].items()))
    table.add_row("label balance", ", ".join(f"{word} {share:.1%}" for word, share in summary["label_balance"].items()))
    table.add_row("majority class", f"{summary['metric']} {summary['majority']:.4f}")
    rates = ", ".join(f"{name} {rate:.1%}" for name, rate in summary["truncation_rate"].items())
    table.add_row(f"texts cut to {summary['max_length']} tokens", rates)
    table.add_row("trainable parameters", f"{summary['trainable_parameters']:,}")
    print_table(table)
    typer.echo("nothing was written")
