"""Published results for T5-Base, drawn beside ours and marked as published.

`published_t5_base.csv` holds a row for each method, with its scores in percent: Pearson for STS-B, F1 for MultiRC,
Matthews for CoLA, accuracy for the others (for CB too, where ours is macro-F1). Sources: a, the comparison table in the
repository of ACCEPT (AI-Application-and-Integration-Lab/Accept, image/cp1.png), which collects the methods' own papers;
b, the same table, and equal to the checkpoints in the repository of DePT (ZhengxiangShi/DePT). They used other seeds
for the splits and other training budgets, and some are single runs; EPT's own table is not public in text form.
"""

from __future__ import annotations

import csv
import statistics
from collections.abc import Sequence
from importlib.resources import files


def published_scores(tasks: Sequence[str]) -> list[tuple[str, int, float]]:
    """Lists (method, parameters, mean score in percent) of every method that has a result for each of `tasks`."""
    text = files("ept.compare").joinpath("published_t5_base.csv").read_text(encoding="utf-8")
    return [
        (row["method"], int(row["parameters"]), statistics.fmean(float(row[task]) for task in tasks))
        for row in csv.DictReader(text.splitlines())
        if all(row.get(task) for task in tasks)
    ]
