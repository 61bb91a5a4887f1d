"""The records that are one JSON file each, as the rows of a report: those of `ept profile`, and earlier ones of steps.

A file is known by its name.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from ept.profile.clock import PHASES
from ept.profile.report import draw_phases, draw_sweep, title

from .goals import BARE_STEP, EPT_METHOD
from .plots import Plot, draw_steps
from .record import Row
from .tables import BARE_TITLE, OPTIONS_TITLE, bare_text, markdown, mebibytes, options_text, spread

OVERHEAD = "step_overhead.json"


class Kind(NamedTuple):
    """`pattern` of a file's name, title and text of its section."""

    pattern: str
    title: str
    text: Callable[[Row], str]


def sorted_by_kind(folder: Path) -> tuple[list[tuple[Path, Kind]], list[Path]]:
    """Returns the records of `folder`, each with the first kind it fits, in the page's order, and those of no kind."""
    found: dict[Path, Kind] = {}
    for kind in KINDS:
        for file in sorted(folder.glob(kind.pattern)):
            found.setdefault(file, kind)
    return list(found.items()), sorted({*folder.glob("*.json")} - {*found})


def read(file: Path) -> Row:
    return json.loads(file.read_text(encoding="utf-8"))


def measured_with(record: Row, command: str, when: str = "") -> str:
    """Returns command, machine and versions in a line."""
    hardware = record["hardware"]
    named = "".join(f", {gpu['name']}" for gpu in hardware.get("gpus") or ())
    machine = f"{hardware['processor']}{named}, {hardware['threads']} threads on {hardware['cores']} cores"
    versions = ", ".join(f"{name} {version or 'not installed'}" for name, version in record["versions"].items())
    return f"`{command}`{when and ', '}{when}, {machine}; {versions}.\n"


# Rows of a record. Milliseconds become seconds.


def profile_row(method: Row, record: Row) -> Row:
    """Makes a row of one method of an `ept profile` record."""
    kept = ("tokens_per_second", "trainable_parameters", "num_virtual_tokens")
    return {
        "provider": method["method"],
        **{name: 1e-3 * method["step_ms"][name] for name in ("median", "p20", "p80")},
        "samples": len(method["step_ms"]["samples"]),
        "phases": {name: 1e-3 * value for name, value in method["phases_ms"].items()},
        "peak_bytes": method["peak_memory_bytes"],
        "peak_kind": record["peak_memory_kind"],
        **{name: method[name] for name in kept},
        "model": record["model"],
        "size": {"batch": record["batch"], "length": record["length"]},
    }


def step_rows(record: Row) -> list[Row]:
    """Makes rows of an earlier record of EPT's step against PEFT's, which `draw_steps` draws."""
    cases = [(case, f"{case['case']}, padded to {case['data']['padding']}") for case in record["cases"]]
    return [
        {**profile_row(method, case), "section": "steps", "status": "ok", "case": name}
        for case, name in cases
        for method in case["methods"]
    ]


def overhead_row(record: Row) -> Row:
    """Makes a row of a record of EPT's step beside the bare model's."""
    over = record["ratio"]
    return {
        "case": BARE_STEP,
        "provider": EPT_METHOD,
        "median": 1e-3 * record["ept_step_ms"],
        "ratio_to_bare": over["median"],
        "ratio_p20": over["p20"],
        "ratio_p80": over["p80"],
        "samples": over["pairs"],
        "model": record["model"],
        "size": {"batch": record["batch"], "length": record["text_tokens"], "positions": record["positions"]},
        "dtype": record["dtype"],
    }


def _options_text(record: Row) -> str:
    """Shows an earlier record of what each option gains."""
    size = {"batch": record["batch"], "length": record["length"]}
    about = {"size": size, "dtype": record["dtype"], "method": record["method"]}
    rows = [
        {
            "provider": option["option"],
            "setting": option["setting"],
            "median": 1e-3 * option["on_ms"]["median"],
            "off_median": 1e-3 * option["off_ms"]["median"],
            "gain": option["gain"],
            "samples": option["pairs"],
            "model": option["shape"],
            **about,
        }
        for option in record["options"]
    ]
    return options_text([*rows, *({"provider": name, "reason": why} for name, why in record["not_measured"].items())])


def _vs_peft_text(record: Row) -> str:
    """Shows EPT's step against PEFT's, a line a case and padding."""
    lines, about = [], {}
    for case in record["cases"]:
        by_name = {method["method"]: method for method in case["methods"]}
        ept, peft, data = by_name["ept"], by_name["peft-pt"], case["data"]
        text_tokens = f"{data['text_tokens_a_batch']:.0f} of {data['padded_tokens_a_batch']:.0f}"
        times = [spread(method["step_ms"], 0) for method in (ept, peft)]
        over, memory = spread(case["ept_over_peft"], 3, " ×"), ept["peak_memory_bytes"] / peft["peak_memory_bytes"]
        lines.append([case["case"], data["padding"], text_tokens, *times, over, f"{memory:.2f} ×"])
        about[case["case"]] = (
            f"* {case['case']}: {case['model']['class']}, {case['model']['dtype']}, {case['batch']} rows of at most "
            f"{case['length']} tokens, {case['steps']} steps of each method and policy\n"
        )
    head = ["case", "padded to", "text tokens of a batch", "EPT, ms", "PEFT, ms", "EPT over PEFT", "memory"]
    return (
        "EPT (40 tokens, rank 30) and PEFT's prompt tuning (100 tokens) take their steps in turn, on the same batches\n"
        "with the same logits; the ratio is taken turn by turn: below 1 EPT is faster. Median (20 to 80 %). Memory:\n"
        f"{record['cases'][0]['peak_memory_kind']}, EPT's over PEFT's.\n\n{markdown(head, lines)}\n\n"
        + "".join(about.values())
    )


def _profile_text(record: Row) -> str:
    """Shows a record of `ept profile`: its steps and, of one prompt length, where their time goes."""
    head = ["method", "parameters", "step, ms", "text tokens/s", "peak memory", f"as fast as {record['reference']}"]
    lines = [
        [
            method["label"],
            f"{method['trainable_parameters']:,}",
            spread(method["step_ms"], 0 if method["step_ms"]["median"] >= 100 else 2),
            f"{method['tokens_per_second']:,.0f}",
            mebibytes(method["peak_memory_bytes"]),
            spread(method["speedup"], 2, " ×"),
        ]
        for method in record["methods"]
    ]
    steps = f"{title(record)}. Median (20 to 80 %) of {record['steps']} steps.\n\n{markdown(head, lines)}\n"
    if _is_swept(record):
        return steps
    phases = [
        [m["label"], *(f"{m['phases_ms'][phase]:.2f}" for phase in PHASES), f"{m['phases_over_step']:.3f}"]
        for m in record["methods"]
    ]
    table = markdown(["method", *PHASES, "sum / step"], phases)
    return f"{steps}\nWhere a step's time goes, in milliseconds:\n\n{table}\n"


def _is_swept(record: Row) -> bool:
    """Tells whether a method was measured at more than one prompt length."""
    return len({method["method"] for method in record["methods"]}) < len(record["methods"])


def plot_of(record: Row, file: Path) -> Plot | None:
    """Returns the plot of a record if it has one, with a name that tells it from those of other files."""
    if "cases" in record:
        caption = "Time of a training step of EPT and of PEFT's prompt tuning, and where it goes."
        plot = Plot("vs-peft", caption, functools.partial(draw_steps, step_rows(record)))
    elif "methods" not in record:
        return None
    elif _is_swept(record):
        caption = "Time of a training step over the prompt's length."
        plot = Plot("length", caption, functools.partial(draw_sweep, record))
    else:
        caption = "Time of a training step by method, and where it goes."
        plot = Plot("phases", caption, functools.partial(draw_phases, record))
    return plot._replace(name=f"{file.stem}-{plot.name}".replace("_", "-"))


KINDS = (
    Kind(OVERHEAD, BARE_TITLE, lambda record: bare_text([overhead_row(record)])),
    Kind("training_step.json", "EPT's step against PEFT's prompt tuning", _vs_peft_text),
    Kind("profile_length*.json", "`ept profile --sweep`: time over the prompt's length", _profile_text),
    Kind("profile*.json", "`ept profile`: where a step's time goes", _profile_text),
    Kind("step_options.json", OPTIONS_TITLE, _options_text),
)
