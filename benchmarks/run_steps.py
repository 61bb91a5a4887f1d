"""Whole training steps for the report, appended to its record step by step: what `ept profile` measures, EPT
against the bare frozen model (`step_overhead.py`), and what each option of the step gains (`step_options.py`).

    python -m benchmarks.run_steps --device cuda --output FILE.jsonl --seconds 100
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .goals import BARE_STEP, EPT_METHOD, LLAMA_STEP, T5_STEP
from .record import ROOT, Record, command_line, measured_with, open_record, table_of

Row = dict[str, Any]

METHODS = ("pt", "dept", "ept", "peft-pt")
PEFT_AGAIN = "peft-pt again"
OPTIONS_STEP = "steps/options"


@dataclass(frozen=True)
class Profile:
    """Methods side by side on one shape.

    Attributes:
        case: name of the unit. options: fields of `ept.profile.profile.ProfileConfig` but for the methods.
        groups: methods that share one base model and take their steps in turn. A 4-bit model is made anew for PEFT,
            since EPT replaces the 4-bit layers of its own; PEFT's is measured before and after, to show the drift.
        needs: a package without which it is skipped.
    """

    case: str
    options: dict[str, Any] = field(hash=False)
    groups: tuple[tuple[str, ...], ...] = (METHODS,)
    needs: str = ""

    def rows(self) -> Iterator[Row]:
        from ept.profile.profile import ProfileConfig, profile

        seen: set[str] = set()
        for group in self.groups:
            record = profile(ProfileConfig(**self.options, methods=group))
            for method in record["methods"]:
                again = method["method"] in seen
                seen.add(method["method"])
                yield {
                    **profile_row(method, record),
                    "case": self.case,
                    "provider": PEFT_AGAIN if again else method["method"],
                }


@dataclass(frozen=True)
class Script:
    """One of the scripts that write a record of their own.

    Attributes:
        name: of its file. arguments: its command line, but for `--output`. read: the rows of its record.
    """

    case: str
    name: str
    arguments: tuple[str, ...]
    read: Callable[[Row], list[Row]]
    needs: str = ""

    def rows(self) -> Iterator[Row]:
        with tempfile.TemporaryDirectory() as folder:
            output = Path(folder) / "record.json"
            command = [sys.executable, f"benchmarks/{self.name}", *self.arguments, "--output", str(output)]
            subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
            yield from self.read(json.loads(output.read_text(encoding="utf-8")))


def profile_row(method: Row, record: Row) -> Row:
    """A row from one method of an `ept profile` record; seconds in place of its milliseconds."""
    return {
        **{name: 1e-3 * method["step_ms"][name] for name in ("median", "p20", "p80")},
        "samples": len(method["step_ms"]["samples"]),
        "phases": {name: 1e-3 * value for name, value in method["phases_ms"].items()},
        "peak_bytes": method["peak_memory_bytes"],
        "peak_kind": record["peak_memory_kind"],
        "tokens_per_second": method["tokens_per_second"],
        "trainable_parameters": method["trainable_parameters"],
        "num_virtual_tokens": method["num_virtual_tokens"],
        "model": record["model"],
        "size": {"batch": record["batch"], "length": record["length"]},
    }


def overhead_row(record: Row) -> Row:
    """A row from a record of `step_overhead.py`."""
    ratio = record["ratio"]
    return {
        "case": BARE_STEP,
        "provider": EPT_METHOD,
        "median": 1e-3 * record["ept_step_ms"],
        "bare_median": 1e-3 * record["bare_step_ms"],
        "ratio_to_bare": ratio["median"],
        "ratio_p20": ratio["p20"],
        "ratio_p80": ratio["p80"],
        "samples": ratio["pairs"],
        "model": record["model"],
        "size": {"batch": record["batch"], "length": record["text_tokens"], "positions": record["positions"]},
        "dtype": record["dtype"],
    }


def read_overhead(record: Row) -> list[Row]:
    """The one row of such a record."""
    return [overhead_row(record)]


def option_rows(record: Row) -> list[Row]:
    """Rows from a record of `step_options.py`, one an option."""
    return [
        {
            "case": OPTIONS_STEP,
            "provider": option["option"],
            **{name: 1e-3 * option["on_ms"][name] for name in ("median", "p20", "p80")},
            **{f"off_{name}": 1e-3 * option["off_ms"][name] for name in ("median", "p20", "p80")},
            "gain": option["gain"],
            "setting": option["setting"],
            "samples": option["pairs"],
            "model": option["shape"],
            "size": {"batch": record["batch"], "length": record["length"]},
            "dtype": record["dtype"],
        }
        for option in record["options"]
    ]


STEPS: dict[str, tuple[Profile | Script, ...]] = {
    "gpu": (
        Profile(T5_STEP, {"shape": "t5-base", "dtype": "bfloat16", "batch": 32, "length": 256, "warmup": 3}),
        Profile(
            LLAMA_STEP,
            {
                "shape": "llama-2-7b",
                "dtype": "bfloat16",
                "quantization": "nf4",
                "batch": 8,
                "length": 256,
                "steps": 6,
            },
            groups=(("peft-pt",), ("pt", "dept", "ept"), ("peft-pt",)),
            needs="bitsandbytes",
        ),
        Script(
            BARE_STEP,
            "step_overhead.py",
            ("--random", "--batch", "32", "--length", "256", "--pairs", "20"),
            read_overhead,
        ),
        Script(
            OPTIONS_STEP,
            "step_options.py",
            ("--dtype", "bfloat16", "--batch", "32", "--length", "256", "--pairs", "5"),
            option_rows,
        ),
    ),
    "cpu": (Profile(T5_STEP, {"shape": "t5-base", "batch": 2, "length": 128, "steps": 5, "warmup": 1}),),
    "reduced": (
        Profile(
            T5_STEP, {"shape": "t5-small", "layers": 1, "batch": 1, "length": 8, "steps": 2, "warmup": 1}, (METHODS,)
        ),
        Script(
            BARE_STEP,
            "step_overhead.py",
            ("--random", "--layers", "1", "--batch", "1", "--length", "8", "--pairs", "2", "--warmup", "1"),
            read_overhead,
        ),
        Script(
            OPTIONS_STEP,
            "step_options.py",
            ("--only", "label-only logits", "--layers", "1", "--batch", "1", "--length", "8", "--pairs", "2"),
            option_rows,
        ),
    ),
}


def run(record: Record, device: str, table: str, seconds: float) -> int:
    """Measures the steps of `table` that `record` lacks, and returns how many are left when time is up."""
    start = time.monotonic()
    about = {"section": "steps", **measured_with(device, table == "reduced")}
    left = [step for step in STEPS[table] if not record.finished(step.case)]
    while left and time.monotonic() - start < seconds:
        step = left.pop(0)
        described = {"case": step.case, "provider": "all", **about}
        if record.give_up(step.case, described):
            continue
        with record.unit(step.case) as unit:
            if step.needs and importlib.util.find_spec(step.needs) is None:
                unit.add({**described, "status": "skipped", "reason": f"{step.needs} is not installed"})
                continue
            try:
                for row in step.rows():
                    unit.add({**row, "status": "ok", "reason": "", **about})
                    print(f"{1e3 * row['median']:8.1f} ms  {step.case}  {row['provider']}", flush=True)
            except Exception as error:  # a step that cannot run is a result; the next one is still measured
                unit.add({**described, "status": "failed", "reason": f"{type(error).__name__}: {error}"})
                print(f"failed: {step.case}: {error}", flush=True)
        _let_go(device)
    return len(left)


def _let_go(device: str) -> None:
    """Gives the device's memory back, which the next step's process may need."""
    import gc

    import torch

    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    command_line(parser, seconds=300)
    arguments = parser.parse_args()
    record = open_record(arguments, "benchmarks.run_steps")
    left = run(record, arguments.device, table_of(arguments), arguments.seconds)
    if left:
        print(f"time is up, {left} steps left: the same command continues")
    return 0


if __name__ == "__main__":
    sys.exit(main())
