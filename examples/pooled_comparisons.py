"""Tests methods over several comparisons at once, by the pairs (task, seed) of their runs at chosen rates.

    python examples/pooled_comparisons.py FOLDER FOLDER --tasks glue/sst2,glue/mnli --methods ept,dept,pt

A comparison with few seeds shows only large differences; several together show whether a small one keeps its sign.
With `--rates` it tests the learning rates of all but the prompt: of each method, and of two rates over all methods.
"""

from __future__ import annotations

import argparse
import csv
import itertools
from collections import defaultdict
from pathlib import Path

from ept.compare.tables import TEST_COLUMNS, paired_test
from ept.utils.tables import markdown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+", help="folders of comparisons, each with its comparison.csv")
    parser.add_argument(
        "--tasks", required=True, help="comma-separated; their scores must be of one kind, or means say nothing"
    )
    parser.add_argument("--methods", required=True, help="comma-separated; each is tested against those after it")
    parser.add_argument(
        "--rates", help="comma-separated rates of all but the prompt: every method at each, chosen or not"
    )
    arguments = parser.parse_args()
    rates = arguments.rates.split(",") if arguments.rates else []
    scores: dict[str, dict[tuple[str, int], float]] = defaultdict(dict)
    for folder in arguments.folders:
        with (folder / "comparison.csv").open(encoding="utf-8", newline="") as file:
            for run in csv.DictReader(file):
                is_counted = run["status"] == "finished" and not run["sweep"] and (rates or run["chosen"] == "True")
                if is_counted and run["task"] in arguments.tasks.split(","):
                    key = f"{folder.name} {run['task']} {run['learning_rate'] if rates else ''}", int(run["seed"])
                    name = f"{run['method']} {run['low_rank_learning_rate']}" if rates else run["method"]
                    scores[name][key] = float(run["score"])
    methods = arguments.methods.split(",")
    names = [f"{method} {rate}" for method in methods for rate in rates] if rates else methods
    if unknown := [name for name in names if name not in scores]:
        parser.error(f"no run of {', '.join(unknown)} on these tasks; there are {', '.join(sorted(scores)) or 'none'}")
    pairs = itertools.combinations(names, 2)
    tests = [paired_test(one, scores[one], other, scores[other]) for one, other in pairs]
    if len(rates) == 2:  # over all methods
        first, second = (
            {(f"{task} {m}", seed): s for m in methods for (task, seed), s in scores[f"{m} {rate}"].items()}
            for rate in rates
        )
        tests.append(paired_test(rates[0], first, rates[1], second))
    print(markdown(TEST_COLUMNS, [test.row() for test in tests if test]))


if __name__ == "__main__":
    main()
