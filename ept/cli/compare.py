"""`ept compare`"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import typer
from typer import Option

from .common import (
    DATA,
    JSON,
    LABEL_COLUMN,
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


def compare(
    own: str | None = DATA,
    model: str | None = MODEL,
    text_column: list[str] | None = TEXT_COLUMN,
    label_column: str | None = LABEL_COLUMN,
    template: str | None = TEMPLATE,
    target_template: str | None = TARGET_TEMPLATE,
    steps: int | None = STEPS,
    strict: bool = STRICT,
    config: Path | None = Option(None, metavar="FILE.yaml", help="The comparison's configuration."),
    set_: list[str] | None = SET,
    data: Path | None = Option(
        None, metavar="DIR", help="Folder with a folder for each task (glue/sst2), in place of the hub (data.data_dir)."
    ),
    output: Path | None = Option(None, metavar="DIR", help="The comparison's folder (output_dir)."),
    jobs: int | None = Option(None, "--jobs", "-j", metavar="N", help="Runs side by side (compare.jobs)."),
    executor: str | None = Option(None, help="local: on this machine; ray: through Ray (compare.executor)."),
    print_config: bool = PRINT_CONFIG,
    dry_run: bool = Option(False, "--dry-run", help="List the runs, write nothing."),
    json: bool = JSON,
) -> None:
    """Compare methods over tasks: scores, parameters, step times.

    Finished runs in the folder are skipped, interrupted ones resume, and failed ones are tried again: the same
    command continues a comparison. Exit code 1 if a run failed.
    """
    from ept.compare.config import load_comparison

    given = data_keys(own, text_column, label_column, template, strict, target_template)
    given |= {"model.name_or_path": model, "training.max_steps": steps}
    if data is not None:
        given["data.data_dir"] = data
    given |= {"output_dir": output, "compare.jobs": jobs, "compare.executor": executor}
    comparison = load_comparison(config, overrides(set_, given))
    if print_config:
        answer(json, comparison.to_dict(), comparison.to_yaml().rstrip("\n"))
        return
    if comparison.data.is_local and not comparison.compare.tasks:
        with quiet():  # inferred from the rows once, for all runs
            from ept.runs.data import resolved
            from ept.runs.loading import task_type_of

            models = [comparison.model] if comparison.model.name_or_path is not None else []
            for name in comparison.compare.sweep.get("model", ()):
                models.append(comparison.model.model_copy(update={"name_or_path": name, "gguf_file": None}))
            types = {task_type_of(model) for model in models}
            if len(types) < 2:  # else each run infers its own: a classifier's template does not ask for the label
                comparison.data = resolved(comparison.data, next(iter(types), None))
    if dry_run:
        from ept.compare.plan import finished, plan, search_seeds

        described, lines = [], []
        runs = plan(comparison)
        for run in runs:
            state = "finished" if finished(run) else "begun" if run.folder.exists() else "to do"
            described.append({"run": run.description, "state": state, "config": run.config.to_dict()})
            lines.append(f"{state:9} {run.description}")
        seeds = len(comparison.compare.seeds) - len(search_seeds(comparison))
        later = seeds * len({run.group for run in runs})
        if later:
            lines.append(f"and {later} more, for {seeds} more seeds at the chosen learning rates")
        answer(json, {"runs": described, "runs_at_chosen_rates": later}, *lines, "nothing was written")
        return
    with quiet():
        from ept.compare.figures import draw
        from ept.compare.plan import compare as carry_out
        from ept.compare.tables import as_json, scores_table, summarise, write_tables
        from ept.utils.tables import table

        try:
            records = carry_out(comparison, report=lambda line: typer.echo(line, err=True))
        except KeyboardInterrupt as stop:
            said = (str(stop), "run the same command again to continue the comparison")
            typer.echo("\n".join(filter(None, said)), err=True)
            raise typer.Exit(getattr(stop, "exit_code", 130)) from stop
        settings = summarise(records)
        folder = Path(str(comparison.output_dir))
        files = write_tables(folder, records, settings, command=shlex.join(["ept", *sys.argv[1:]]))
        files += draw(settings, folder, published=comparison.compare.published)
    tables = [table(*scores_table(setting), setting.title) for setting in settings]
    answer(json, as_json(records, settings), *tables, "written: " + ", ".join(map(str, files)))
    failed = [record for record in records if record.outcome.results is None]
    for record in failed:
        typer.echo(f"failed: {record.run.description}: {record.outcome.error}  (in {record.run.folder})", err=True)
    if failed:
        raise typer.Exit(1)
