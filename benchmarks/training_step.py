"""A training step of EPT against one of PEFT's prompt tuning (100 tokens, `num_transformer_submodules=1`).

Two cases, each under both padding policies, to the longest row of each batch and to the longest row allowed:

* SmolLM2-135M-Instruct on the demo's headlines, batch 8, at most 64 tokens;
* T5-base's shape with random weights, batch 4, texts of 64 to 256 tokens.

Both methods take their steps in turn, on the same batches, with the same logits (`ept profile`); the ratio is taken
turn by turn, EPT's time over PEFT's: below 1 EPT is faster.

    python benchmarks/training_step.py                          both, about 8 minutes on two cores
    python benchmarks/training_step.py --cases t5-base --layers 2 --steps 3      a short trial
    python benchmarks/training_step.py --output FILE.json       the record as JSON too
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from step_records import command, write

from ept.profile.batches import Row
from ept.profile.clock import summary
from ept.profile.profile import ProfileConfig, load, profile
from ept.runs.config import load_run_config
from ept.runs.data import load_run_data
from ept.runs.loading import default_device, load_tokenizer
from ept.tasks.encoding import encode_split

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
METHODS = ("peft-pt", "ept")
PADDINGS = ("longest", "max_length")


def headlines(arguments: argparse.Namespace) -> tuple[ProfileConfig, list[Row]]:
    """The demo's model, and as many of its headlines as are measured, as its configuration encodes them."""
    sys.path.insert(0, str(EXAMPLES))
    import headlines_data as source

    model_file = source.package_file(source.MODEL_PACKAGE, source.MODEL_FILE)
    config = load_run_config(EXAMPLES / "headlines.yaml")
    config.model.name_or_path, config.model.gguf_file = str(model_file.parent), model_file.name
    tokenizer = load_tokenizer(config.model)
    config.data.max_train = 8 * (arguments.steps + arguments.warmup)
    with tempfile.TemporaryDirectory() as folder:
        rows = source.read_headlines(source.package_file(source.DATA_PACKAGE, source.DATA_FILE))
        source.write_splits(rows, Path(folder), seed=0)
        config.data.data_dir = folder
        data = load_run_data(config.data, tokenizer, "CAUSAL_LM").data
        encoded = list(encode_split(data.train, tokenizer, data.labels, "CAUSAL_LM"))
    return ProfileConfig(model=config.model, methods=METHODS, batch=8, length=64), encoded


def t5_base(arguments: argparse.Namespace) -> tuple[ProfileConfig, None]:
    return ProfileConfig(shape="t5-base", layers=arguments.layers, methods=METHODS, batch=4, length=256), None


CASES: dict[str, Callable[[argparse.Namespace], tuple[ProfileConfig, list[Row] | None]]] = {
    "smollm2-headlines": headlines,
    "t5-base": t5_base,
}


def measure(name: str, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """A record a padding policy."""
    config, rows = CASES[name](arguments)
    config.steps, config.warmup = arguments.steps, arguments.warmup
    base = load(config, default_device())
    if config.model.name_or_path is not None:
        config.model.name_or_path = Path(config.model.name_or_path).name  # recorded; where it lies is nobody's business
    records = []
    for padding in PADDINGS:
        config.padding = padding
        report = profile(config, rows=rows, base=base)
        peft, ept = (method["step_ms"]["samples"] for method in report["methods"])
        ratio = summary([ours / theirs for ours, theirs in zip(ept, peft, strict=True)])
        print(
            f"{name:20} {padding:12} {ratio['median']:.3f} ({ratio['p20']:.3f} to {ratio['p80']:.3f})",
            flush=True,
        )
        records.append({"case": name, "padding": padding, "ept_over_peft": ratio, **report})
    return records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default=",".join(CASES), help=f"comma-separated, of {', '.join(CASES)}")
    parser.add_argument("--steps", type=int, default=16, help="measured steps of each method, case and policy")
    parser.add_argument("--warmup", type=int, default=2, help="steps before them")
    parser.add_argument("--layers", type=int, help="of T5-base's shape: only the first so many")
    parser.add_argument("--output", type=Path, help="write the record here as JSON")
    arguments = parser.parse_args()
    names = arguments.cases.split(",")
    if unknown := [name for name in names if name not in CASES]:
        parser.error(f"--cases {unknown[0]}: choose from {', '.join(CASES)}")
    cases = [record for name in names for record in measure(name, arguments)]
    write({"command": command("training_step.py", arguments), "cases": cases}, arguments.output)


if __name__ == "__main__":
    main()
