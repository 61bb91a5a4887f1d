"""The whole way of an adapter by the README's commands: trained, scored, asked, compared, exported, trained on.

    python examples/whole_way.py MODEL DATA FOLDER --steps 200 [--config FILE] [--set KEY=VALUE]

MODEL and DATA are what `ept train DATA --model MODEL` takes, DATA a file or a folder. All is written into FOLDER, which
must be new. `make whole-way` does it with SmolLM2 on headlines, and with MiniLM as a classifier on sentences of SST-2.
"""

from __future__ import annotations

import argparse
import csv
import json
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ept.runs.config import load_run_config
from ept.runs.data import read_splits, task_of
from ept.tasks import Task, read_rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or hub name of the base model")
    parser.add_argument("data", type=Path, help="file or folder of labelled rows")
    parser.add_argument("folder", type=Path, help="where everything is written")
    parser.add_argument("--steps", type=int, default=200, help="training steps (default: 200)")
    parser.add_argument("--config", type=Path, help="configuration file of all runs")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as for ept train; repeatable")
    given = parser.parse_args()
    options = ["--config", given.config] if given.config is not None else []
    options += [part for setting in given.set for part in ("--set", setting)]
    for name, results in whole_way(as_a_user, given.model, given.data, given.folder, given.steps, options).items():
        before, after, majority = results["score_before"], results["score"], results["majority"]
        print(f"{name}: {results['metric']} {before:.3f} -> {after:.3f}, commonest label {majority:.3f}")
    print(f"figures and reports: {given.folder}")


def as_a_user(*arguments: Any) -> None:
    """Runs a command of `ept` in a process of its own."""
    print(f"\n$ {shlex.join(['ept', *map(str, arguments)])}", flush=True)
    subprocess.run([sys.executable, "-m", "ept", *map(str, arguments)], check=True)


def whole_way(
    ept: Callable[..., Any], model: str | Path, data: Path, folder: Path, steps: int, options: Sequence[Any] = ()
) -> dict[str, Any]:
    """Goes the whole way, each command by `ept(argument, ...)`; returns the results of the runs by what they are.

    Raises FileExistsError where there is `folder` already, RuntimeError where two commands contradict each other.
    """
    folder.mkdir(parents=True)
    run, new, labelled, compared = (folder / name for name in ("run", "new.csv", "labelled.csv", "compared"))
    train: tuple[Any, ...] = ("train", data, "--model", model, *options)
    ept(*train, "--dry-run")
    ept(*train, "--steps", steps, "--output", run)
    trained = read_results(run)

    ept("evaluate", run)
    task = task_of(load_run_config(run / "config.yaml").data)
    labels = write_test_rows(run, data, task, new)
    ept("predict", run, "--file", new, "--output", labelled)
    answers = [row["prediction"] for row in read_rows(labelled)]
    right = sum(answer == label for answer, label in zip(answers, labels, strict=True)) / len(labels)
    check("share of right answers in the file", right, "accuracy on test", trained["test_metrics"]["accuracy"])

    method = trained["method"]
    seeds = ("--set", f"compare.methods=[pt,{method}]", "--set", "compare.seeds=[0,1]")
    ept("compare", data, "--model", model, *options, *seeds, "--steps", steps, "--output", compared)
    (again,) = [row for row in read_rows(compared / "comparison.csv") if (row["method"], row["seed"]) == (method, "0")]
    check("score of the compared run", float(again["score"]), "that of the run", trained["score"])

    ept("export", run, "--output", folder / "exported", "--texts", new)
    ept("train", "--resume", "--output", run, "--steps", 2 * steps)
    longer = read_results(run)
    check("steps of the run trained on", longer["steps"], "those wanted", 2 * steps)
    sizes = ("--set", "method.budget=null")  # they are the old adapter's
    ept(*train, *sizes, "--steps", steps, "--init-from", run, "--output", folder / "from_run")
    return {"trained": trained, "trained on": longer, "started from it": read_results(folder / "from_run")}


def write_test_rows(run: Path, data: Path, task: Task, file: Path) -> list[str]:
    """Writes the rows that a run was tested on into a csv file, without their labels; returns these, as words."""
    drawn = read_splits(run)["test"]
    source = data if data.is_file() else next(data.glob(f"{drawn['from']}.*"))
    rows = read_rows(source)
    rows = [rows[number - 1] for number in drawn["rows"]]
    columns = [column for column in rows[0] if column != task.label_column]
    with file.open("w", encoding="utf-8", newline="") as written:
        writer = csv.DictWriter(written, columns, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    words: dict[int | None, str] = dict(enumerate(task.label_words))
    return [words[task.label_class(row[task.label_column])] for row in rows]


def read_results(run: Path) -> Any:
    return json.loads((run / "results.json").read_text(encoding="utf-8"))


def check(name: str, value: float, other: str, expected: float) -> None:
    if abs(value - expected) > 1e-9:
        raise RuntimeError(f"{name} is {value}, {other} {expected}")


if __name__ == "__main__":
    main()
