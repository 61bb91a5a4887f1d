"""`ept compare`"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from typer import Option

from .common import JsonOption, PrintConfigOption, SetOption, answer, overrides, quiet, show_config

if TYPE_CHECKING:
    from ept.compare.config import ComparisonConfig
    from ept.compare.plan import PlannedRun


def compare(
    config: Annotated[Path | None, Option(metavar="FILE.yaml", help="The comparison's configuration.")] = None,
    set_: SetOption = None,
    data: Annotated[
        Path | None,
        Option(
            metavar="DIR", help="Folder with a folder for each task (glue/sst2), in place of the hub (data.data_dir)."
        ),
    ] = None,
    output: Annotated[Path | None, Option(metavar="DIR", help="The comparison's folder (output_dir).")] = None,
    executor: Annotated[
        str | None, Option(help="local: one run after another; ray: side by side (compare.executor).")
    ] = None,
    print_config: PrintConfigOption = False,
    dry_run: Annotated[bool, Option("--dry-run", help="List the runs, write nothing.")] = False,
    json: JsonOption = False,
) -> None:
    """Compare methods over tasks: scores, parameters, step times.

    Finished runs in the folder are skipped, interrupted ones resume, and failed ones are tried again: the same
    command continues a comparison. Exit code 1 if a run failed.
    """
    from ept.compare.config import load_comparison

    given = {"data.data_dir": data, "output_dir": output, "compare.executor": executor}
    comparison = load_comparison(config, overrides(set_, given))
    if print_config:
        show_config(json, comparison)
        return
    if dry_run:
        _list_runs(comparison, json)
        return
    with quiet():
        from ept.compare.figures import draw
        from ept.compare.plan import compare as carry_out
        from ept.compare.tables import as_json, scores_table, summarise, write_tables
        from ept.utils.tables import table

        try:
            records = carry_out(comparison, report=lambda line: typer.echo(line, err=True))
        except KeyboardInterrupt as stop:
            typer.echo(f"{stop}\nthe same command again continues the comparison", err=True)
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


def _list_runs(comparison: ComparisonConfig, json: bool) -> None:
    from ept.compare.plan import finished, plan, search_seeds

    def state(run: PlannedRun) -> str:
        return "finished" if finished(run) else "begun" if run.folder.exists() else "to do"

    listed = [(run, state(run)) for run in plan(comparison)]
    seeds = len(comparison.compare.seeds) - len(search_seeds(comparison))
    later = seeds * len({run.group for run, _ in listed})
    lines = [f"{state:9} {run.description}" for run, state in listed]
    if later:
        lines.append(f"and {later} more, for {seeds} more seeds at the chosen learning rates")
    described = [{"run": run.description, "state": state, "config": run.config.to_dict()} for run, state in listed]
    answer(json, {"runs": described, "runs_at_chosen_rates": later}, *lines, "nothing was written")
