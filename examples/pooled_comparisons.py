"""Tests methods over several comparisons at once, by the pairs (task, seed) of their runs at chosen rates.

    python examples/pooled_comparisons.py FOLDER FOLDER --tasks glue/sst2,glue/mnli --methods ept,dept,pt

A comparison with few seeds shows only large differences; several together show whether a small one keeps its sign.
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
    parser.add_argument("folders", type=Path, nargs="+", help="of comparisons, each with its comparison.csv")
    parser.add_argument("--tasks", required=True, help="comma-separated; scores of one kind, or means say nothing")
    parser.add_argument("--methods", required=True, help="comma-separated; each is tested against those behind it")
    arguments = parser.parse_args()
    scores: dict[str, dict[tuple[str, int], float]] = defaultdict(dict)
    for folder in arguments.folders:
        with (folder / "comparison.csv").open(encoding="utf-8", newline="") as file:
            for run in csv.DictReader(file):
                is_counted = run["status"] == "finished" and run["chosen"] == "True" and not run["sweep"]
                if is_counted and run["task"] in arguments.tasks.split(","):
                    key = f"{folder.name} {run['task']}", int(run["seed"])
                    scores[run["method"]][key] = float(run["score"])
    methods = arguments.methods.split(",")
    if unknown := [method for method in methods if method not in scores]:
        parser.error(f"no run of {', '.join(unknown)} on these tasks; there are {', '.join(sorted(scores)) or 'none'}")
    pairs = itertools.combinations(methods, 2)
    tests = (paired_test(one, scores[one], other, scores[other]) for one, other in pairs)
    print(markdown(TEST_COLUMNS, [test.row() for test in tests if test]))


if __name__ == "__main__":
    main()
