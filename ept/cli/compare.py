"""`ept compare`"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .common import JsonOption, SetOption, print_json, print_table, quiet

if TYPE_CHECKING:
    from ept.compare.config import ComparisonConfig
    from ept.compare.plan import PlannedRun
    from ept.compare.tables import Setting


def compare(
    config: Annotated[Path | None, typer.Option(metavar="FILE.yaml", help="The comparison's configuration.")] = None,
    set_: SetOption = None,
    data: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Folder with a folder a task (glue/sst2), instead of the hub (data.data_dir)."
        ),
    ] = None,
    output: Annotated[Path | None, typer.Option(metavar="DIR", help="The comparison's folder (output_dir).")] = None,
    executor: Annotated[
        str | None, typer.Option(help="local: one run after another; ray: side by side (compare.executor).")
    ] = None,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Print the whole configuration as YAML and exit.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the runs, write nothing.")] = False,
    json: JsonOption = False,
) -> None:
    """Train several methods on several tasks and compare their scores, parameters and step times.

    Finished runs in the folder are skipped, interrupted ones resume, and failed ones are tried again: the same
    command continues a comparison. Exit code 1 if a run failed.
    """
    from ept.compare.config import load_comparison

    given = [("data.data_dir", data), ("output_dir", output), ("compare.executor", executor)]
    overrides = [*(set_ or []), *(f'{key}="{value}"' for key, value in given if value is not None)]
    comparison = load_comparison(config, overrides)
    if print_config:
        print_json(comparison.to_dict()) if json else typer.echo(comparison.to_yaml(), nl=False)
        return
    if dry_run:
        _list_runs(comparison, json)
        return
    with quiet():
        from ept.compare.figures import draw
        from ept.compare.plan import compare as carry_out
        from ept.compare.tables import as_json, summarise, write_tables

        try:
            records = carry_out(comparison, report=lambda line: typer.echo(line, err=True))
        except KeyboardInterrupt as stop:
            typer.echo(f"{stop}\nthe same command again goes on with the comparison", err=True)
            raise typer.Exit(getattr(stop, "exit_code", 130)) from stop
        settings = summarise(records)
        folder = Path(str(comparison.output_dir))
        files = write_tables(folder, records, settings, command=_command())
        files += draw(settings, folder, published=comparison.compare.published)
    failed = [record for record in records if record.outcome.results is None]
    if json:
        print_json(as_json(records, settings))
    else:
        _show(settings)
        typer.echo("written: " + ", ".join(map(str, files)))
    for record in failed:
        typer.echo(f"failed: {record.run.description}: {record.outcome.error}  (in {record.run.folder})", err=True)
    if failed:
        raise typer.Exit(1)


def _command() -> str:
    return shlex.join(["ept", *sys.argv[1:]])


def _list_runs(comparison: ComparisonConfig, json: bool) -> None:
    from ept.compare.plan import finished, plan, search_seeds

    searched = plan(comparison)
    later = len(comparison.compare.seeds) - len(search_seeds(comparison))
    groups = len({run.group for run in searched})

    def state(run: PlannedRun) -> str:
        return "finished" if finished(run) else "begun" if run.folder.exists() else "to do"

    if json:
        listed = [{"run": run.description, "state": state(run), "config": run.config.to_dict()} for run in searched]
        print_json({"runs": listed, "runs_at_chosen_rates": later * groups})
        return
    for run in searched:
        typer.echo(f"{state(run):9} {run.description}")
    if later:
        typer.echo(f"and {later * groups} more, for {later} more seeds at the chosen learning rates")
    typer.echo("nothing was written")


def _show(settings: Sequence[Setting]) -> None:
    from rich.table import Table

    from ept.compare.tables import scores_table

    for setting in settings:
        header, rows = scores_table(setting)
        table = Table(title=setting.title)
        for column in header:
            table.add_column(column, justify="left" if column in ("method", "sizes") else "right")
        for row in rows:
            table.add_row(*row)
        print_table(table)
