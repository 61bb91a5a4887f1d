"""`ept train`"""

from __future__ import annotations

from pathlib import Path

from typer import Option

from .common import JSON, PRINT_CONFIG, SET, answer, overrides, quiet, shares


def train(
    config: Path | None = Option(None, metavar="FILE.yaml", help="The run's configuration."),
    set_: list[str] | None = SET,
    output: Path | None = Option(None, metavar="DIR", help="The run's folder (output_dir)."),
    resume: bool = Option(False, "--resume", help="Continue the run in the folder from its last checkpoint."),
    overwrite: bool = Option(False, "--overwrite", help="Delete the run in the folder and start anew."),
    print_config: bool = PRINT_CONFIG,
    dry_run: bool = Option(False, "--dry-run", help="Load everything, show what would be trained, write nothing."),
    json: bool = JSON,
) -> None:
    """Train an adapter and score it before and after.

    With --resume and without --config, the configuration is the one in the folder. In several processes:
    torchrun --nproc-per-node 2 -m ept train ...
    """
    from ept.runs.config import load_run_config
    from ept.runs.processes import rank, world_size

    if config is None and resume and output is not None and (output / "config.yaml").is_file():
        config = output / "config.yaml"
    run_config = load_run_config(config, overrides(set_, {"output_dir": output}))
    if (print_config or dry_run) and rank() != 0:
        return
    if print_config:
        answer(json, run_config.to_dict(), run_config.to_yaml().rstrip("\n"))
        return
    if dry_run:
        with quiet():
            from ept.runs.data import describe
            from ept.runs.train import prepare
            from ept.utils.tables import properties

            run = prepare(run_config)
            adapter = run.model.active_peft_config.to_dict()
            summary = {
                "task": run.task.name,
                "task_type": run.task_type,
                "metric": run.task.metrics[0],
                **describe(run.run_data.data),
                "labels": list(run.labels),
                "max_length": run.max_length,
                "truncation_rate": run.run_data.truncation_rate,
                "method": run_config.method.name,
                "model": run_config.model.name_or_path,
                "trainable_parameters": run.model.get_nb_trainable_parameters()[0],
                "adapter": {key: value for key, value in adapter.items() if value is not None},
            }
        examples = [
            f"example {number}\n  text:   {example['text']!r}\n  target: {example['target']!r}"
            for number, example in enumerate(summary["examples"], start=1)
        ]
        rows = [
            ("model", f"{summary['model']} ({summary['task_type']})"),
            ("rows", ", ".join(f"{name} {count:,}" for name, count in summary["rows"].items())),
            ("label balance", shares(summary["label_balance"])),
            ("majority class", f"{summary['metric']} {summary['majority']:.4f}"),
            (f"texts cut to {summary['max_length']} tokens", shares(summary["truncation_rate"])),
            ("trainable parameters", f"{summary['trainable_parameters']:,}"),
        ]
        table = properties(rows, f"dry run: {summary['method']} on {summary['task']}")
        answer(json, summary, *examples, table, "nothing was written")
        return
    with quiet():
        from torch.distributed.elastic.multiprocessing.errors import record

        from ept.runs.report import results_tables
        from ept.runs.train import train as train_run

        launched = record(train_run) if world_size() > 1 else train_run  # record: for the launcher's report
        results = launched(run_config, resume=resume, overwrite=overwrite)
    if results is not None and rank() == 0:
        answer(json, results, *results_tables(results), f"saved in {run_config.output_dir}, with report.md")
