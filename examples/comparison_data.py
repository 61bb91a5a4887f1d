"""Writes the splits of a comparison: official validation rows to test on, and validation rows out of the train rows.

    python examples/comparison_data.py DATA FOLDER

DATA holds a folder a task, `DATA/glue/rte/{train,validation}.jsonl`, with the hub's columns. The halves of
`ept compare` would leave 138 rows of RTE to choose rates with, and as many to test on.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

TASKS = ("glue/sst2", "glue/cola", "glue/mnli", "glue/rte", "super_glue/boolq", "super_glue/cb", "super_glue/wsc")
MAX_VALIDATION, MAX_TEST = 400, 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    for task in TASKS:
        rows = {name: read(arguments.data / task / f"{name}.jsonl") for name in ("train", "validation")}
        count = min(MAX_VALIDATION, len(rows["train"]) // 5)
        splits = {
            "train": rows["train"][count:],
            "validation": rows["train"][:count],
            "test": rows["validation"][:MAX_TEST],
        }
        folder = arguments.folder / task
        folder.mkdir(parents=True)
        for name, lines in splits.items():
            (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        print(task, *(f"{name} {len(lines):,}" for name, lines in splits.items()))


def read(file: Path) -> list[str]:
    """Reads a file's rows in an order that is drawn once for all."""
    rows = file.read_text(encoding="utf-8").split("\n")
    rows = [row for row in rows if row]
    random.Random(0).shuffle(rows)
    return rows


if __name__ == "__main__":
    main()
