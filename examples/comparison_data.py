"""Writes the splits of a comparison: official validation rows to test on, and validation rows out of the train rows.

    python examples/comparison_data.py DATA FOLDER [--fresh]

DATA holds a folder a task, `DATA/glue/rte/{train,validation}.jsonl`, with the hub's columns. The halves of
`ept compare` would leave 138 rows of RTE to choose rates with, and as many to test on. `--fresh`: the protocol's third
part, whose test rows are none of the first part's.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

TASKS = ("glue/sst2", "glue/cola", "glue/mnli", "glue/rte", "super_glue/boolq", "super_glue/cb", "super_glue/wsc")
FRESH = ("glue/sst2", "glue/mnli", "glue/stsb")
MAX_VALIDATION, MAX_TEST = 400, 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--fresh", action="store_true")
    arguments = parser.parse_args()
    for task in FRESH if arguments.fresh else TASKS:
        rows = {name: read(arguments.data / task / f"{name}.jsonl") for name in ("train", "validation")}
        splits = (fresh if arguments.fresh else usual)(task, rows["train"], rows["validation"])
        folder = arguments.folder / task
        folder.mkdir(parents=True)
        for name, lines in splits.items():
            (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        print(task, *(f"{name} {len(lines):,}" for name, lines in splits.items()))


def usual(task: str, train: list[str], validation: list[str]) -> dict[str, list[str]]:
    count = min(MAX_VALIDATION, len(train) // 5)
    return {"train": train[count:], "validation": train[:count], "test": validation[:MAX_TEST]}


def fresh(task: str, train: list[str], validation: list[str]) -> dict[str, list[str]]:
    if task == "glue/sst2":  # all of its validation rows have been scored
        return {"train": train[:400] + train[1800:], "validation": train[1400:1800], "test": train[400:1400]}
    if task == "glue/mnli":
        return {"train": train[:400] + train[800:], "validation": train[400:800], "test": validation[1000:]}
    return {"train": train[400:], "validation": train[:400], "test": validation[:1000]}


def read(file: Path) -> list[str]:
    """Reads a file's rows in an order that is drawn once for all."""
    rows = file.read_text(encoding="utf-8").split("\n")
    rows = [row for row in rows if row]
    random.Random(0).shuffle(rows)
    return rows


if __name__ == "__main__":
    main()
