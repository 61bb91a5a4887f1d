"""`ept predict`"""

from __future__ import annotations

import sys
from pathlib import Path

from typer import Argument, Option

from .common import JSON, SET, answer, encoding_of, quiet


def predict(
    run_dir: Path = Argument(help="Folder of a finished run."),
    texts: list[str] | None = Argument(
        None, metavar="[TEXT]...", help="Texts to label; - reads one text per line from standard input."
    ),
    file: Path | None = Option(
        None, help="A file (csv, tsv, jsonl, json, parquet) with the task's columns, or a column `text`."
    ),
    text_column: list[str] | None = Option(
        None, "--text-column", metavar="NAME", help="With --file: the name of its text column. Repeatable."
    ),
    output: Path | None = Option(None, help="Write the rows to this file (csv, tsv, jsonl, json, parquet)."),
    overwrite: bool = Option(False, "--overwrite", help="Replace the output file."),
    set_: list[str] | None = SET,
    json: bool = JSON,
) -> None:
    """Label texts with a trained run.

    One row in, one row out, with all columns kept. `prediction` holds the label; it is empty if the row has no text or
    the answer is not a label. If labels are ranked, `p(LABEL)` holds the probability of each. For a task with one text
    column a TEXT (or a `text` column) goes into its template; for a task with several it is the whole input text, as
    `ept tasks show` shows it.
    """
    if bool(texts) == (file is not None):
        raise ValueError("give either texts or --file; - reads texts from standard input, one per line")
    if texts == ["-"]:
        texts = sys.stdin.read().removesuffix("\n").split("\n")
    if output is not None and output.exists() and not overwrite:
        raise FileExistsError(f"{output} exists: --overwrite replaces it")
    with quiet():
        from ept.runs.labelling import PREDICTION, check_output, label_rows, probability_columns, write_rows
        from ept.runs.predict import open_run
        from ept.tasks import read_rows

        if output is not None:
            check_output(output)
        rows = read_rows(file, encoding_of(set_)) if file is not None else [{"text": text} for text in texts or []]
        run = open_run(run_dir, set_ or [])
        labelled, probabilities = label_rows(run, rows, str(file or "text"), text_column), probability_columns(run.task)
        if output is not None:
            write_rows(labelled, output, probabilities)
    left_out = sum(row[PREDICTION] is None for row in labelled)
    if left_out:
        print(
            f"{left_out:,} of {len(labelled):,} rows get no label: they have no text, or the answer is not a label",
            file=sys.stderr,
        )
    if output is not None and not json:
        answer(json, labelled, f"{len(labelled):,} rows in {output}")
        return
    lines = []
    for row in labelled:
        shares = " ".join(f"{name}={row[name]:.3f}" for name in probabilities if name in row)
        text = row.get("text", {k: v for k, v in row.items() if k not in (PREDICTION, *probabilities)})
        lines.append("\t".join(["(no label)" if row[PREDICTION] is None else str(row[PREDICTION]), shares, repr(text)]))
    answer(json, labelled, *lines)
