"""The demo, `make demo`: EPT on a real small model and real headlines, its score before and after, and what it learned.

The same code path as `ept train --config examples/headlines.yaml`: this script only supplies model and data, both taken
from packages of the package index (see `headlines_data.py`), and shows the results.
"""

from __future__ import annotations

import argparse
import logging
import signal
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

CONFIG = Path(__file__).with_name("headlines.yaml")
EXAMPLES = 5


class Stopped(KeyboardInterrupt):
    """Ctrl-C or SIGTERM before or after the training, which has a way of its own: a step is finished and saved."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.exit_code = 128 + number


def main() -> None:
    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)
    try:
        demo()
    except KeyboardInterrupt as stopped:
        print(stopped)
        raise SystemExit(getattr(stopped, "exit_code", 130)) from None


def stop(number: int, frame: Any) -> None:
    raise Stopped(number)


def demo() -> None:
    # Here, where a signal is waited for: these imports take seconds.
    import headlines_data as source
    from rich.console import Console

    from ept.runs.config import load_run_config
    from ept.runs.method_table import METHODS

    console = Console()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, help=f"training steps (default: as {CONFIG.name} says)")
    parser.add_argument("--method", choices=METHODS, metavar="NAME", help="pt, dept, ept, ... at the same stored size")
    parser.add_argument(
        "--model",
        type=Path,
        help="folder made by smollm2.py, which loads faster; default: the package's file, unpacked twice",
    )
    parser.add_argument("--output", type=Path, default=Path("runs/demo"), help="folder, written anew each time")
    parser.add_argument("--seed", type=int, default=0, help="draws the split, the initialisation and the order of rows")
    arguments = parser.parse_args()
    if arguments.steps is not None and arguments.steps < 1:
        parser.error(f"--steps must be at least 1, got {arguments.steps}")
    config = load_run_config(CONFIG, [f"method.name={arguments.method}"] if arguments.method else [])
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # no 4-bit weights here: it may lack kernels
    started = time.perf_counter()
    model_file = source.package_file(source.MODEL_PACKAGE, source.MODEL_FILE)

    console.rule(f"{METHODS[config.method.name].title}: which headlines are sarcastic?")
    console.print("Reading the headlines ...")
    rows = source.read_headlines(source.package_file(source.DATA_PACKAGE, source.DATA_FILE))
    data = arguments.output / "data"
    counts = source.write_splits(rows, data, arguments.seed)
    console.print(
        f"Data: {len(rows):,} different headlines, split by a hash of their text into "
        f"{counts['train']:,} to train on, {counts['validation']:,} to validate on, {counts['test']:,} held out."
    )
    if arguments.model is not None:
        config.model.name_or_path = str(arguments.model.resolve())
    else:
        config.model.name_or_path, config.model.gguf_file = str(model_file.parent), model_file.name
    config.data.data_dir = str(data)
    config.output_dir, config.seed = str(arguments.output), arguments.seed
    if arguments.steps is not None:
        config.training.max_steps = arguments.steps

    console.print("Loading torch and transformers ...")
    from ept.cli.common import quiet
    from ept.runs.loading import default_device
    from ept.runs.report import results_tables
    from ept.runs.train import train

    console.print(f"Model: {model_file.stem}, frozen, on {default_device()}; only the adapter learns.")
    console.print(
        f"Training: {config.training.max_steps} steps of {config.training.batch_size} headlines, "
        f"scored before and after on {config.data.max_test} held-out ones."
    )
    console.print("Loading the model and tokenising, then scoring it untrained ...\n")
    with quiet():
        results = train(config, overwrite=True)
    for part in results_tables(results):
        console.print(part)
    gain, held_out = 100 * (results["score"] - results["majority"]), results["rows"]["test"]
    console.print(f"{gain:+.1f} points over always giving the commoner label, on {held_out} held-out headlines.\n")
    show_examples(arguments.output, console)
    console.print()
    for name, file in {"Adapter": "adapter", "Results": "results.json", "Learning curve": "learning_curve.png"}.items():
        console.print(f"{name + ':':15} {arguments.output / file}")
    console.print(f"Done in {time.perf_counter() - started:.0f} s.")


def show_examples(folder: Path, console: Console) -> None:
    """Loads the adapter back from disk and lets it judge the first held-out headlines."""
    from rich.table import Column, Table
    from rich.text import Text

    from ept.cli.common import quiet
    from ept.runs.predict import open_run
    from ept.tasks import read_rows

    with quiet():
        run = open_run(folder)
    rows = read_rows(folder / "data" / "test.jsonl")[:EXAMPLES]
    predictions = run.predict([row.ids for row in run.fit(rows, "test")])
    columns = (Column("headline"), Column("sarcastic?", justify="center"), Column("truth", justify="center"))
    table = Table(*columns, title="Held-out headlines, judged by the adapter loaded back from disk", show_lines=True)
    for row, prediction in zip(rows, predictions):
        colour = "green" if prediction == row["label"] else "red"
        # Text, as rich would read "[...]" in a headline as its markup.
        table.add_row(Text(row["headline"]), Text(run.labels[prediction], colour), run.labels[row["label"]])
    console.print(table)


if __name__ == "__main__":
    main()
