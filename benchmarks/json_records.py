"""The records that are one JSON file each, and how `docs/performance.md` shows them: a table, and plots where there
is something to see.

A file is known by its name: what no name here fits is listed by `unknown`, so that no record is passed over in
silence.
"""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from ept.profile.clock import PHASES
from ept.profile.report import draw_phases, draw_sweep, title

from .plots import draw_steps
from .run_steps import option_rows, overhead_row, profile_row
from .tables import markdown, mebibytes, option_table, seconds

Record = dict[str, Any]


class Plot(NamedTuple):
    """Ending of the file's name, what stands below it, and what draws it into a PNG."""

    name: str
    caption: str
    draw: Callable[[Record, Path], None]


class Kind(NamedTuple):
    """`pattern` of a file's name, title of its section, its text, the plots that a record allows, and where in the
    record its machine and versions stand.
    """

    pattern: str
    title: str
    text: Callable[[Record], str]
    plots: Callable[[Record], list[Plot]]
    about: Callable[[Record], Record] = lambda record: record


def known(folder: Path) -> list[tuple[Path, Kind]]:
    """The records of `folder` that have a section, in the order of the page."""
    kinds = [(file, kind_of(file)) for file in sorted(folder.glob("*.json"))]
    return [(file, kind) for wanted in KINDS for file, kind in kinds if kind is wanted]


def kind_of(file: Path) -> Kind | None:
    """The first kind that the file's name fits; None where it fits none."""
    return next((kind for kind in KINDS if fnmatch.fnmatch(file.name, kind.pattern)), None)


def unknown(folder: Path) -> str:
    """A table of the records that have no section of their own; empty where there are none."""
    lines = []
    for file in sorted(folder.glob("*.json")):
        if kind_of(file) is None:
            record = read(file)
            command = record.get("command") if isinstance(record, dict) else None
            lines.append([f"`{file.name}`", f"`{command}`" if command else "–"])
    return markdown(["record", "command"], lines) if lines else ""


def read(file: Path) -> Record:
    return json.loads(file.read_text(encoding="utf-8"))


def measured_with(record: Record, command: str, when: str = "") -> str:
    """Command, machine and versions, in a line."""
    hardware = record["hardware"]
    named = "".join(f", {gpu['name']}" for gpu in hardware.get("gpus") or ())
    machine = f"{hardware['processor']}{named}, {hardware['threads']} threads on {hardware['cores']} cores"
    versions = ", ".join(f"{name} {version or 'not installed'}" for name, version in record["versions"].items())
    return f"`{command}`{when and ', '}{when}, {machine}; {versions}.\n"


def section(file: Path, kind: Kind, plot: Callable[[str], str]) -> str:
    """The section of one record.

    Args:
        plot: from a plot's name, its path as the page refers to it.
    """
    record = read(file)
    parts = [f"### {kind.title}\n", kind.text(record)]
    for drawn in kind.plots(record):
        parts.append(f"![{drawn.caption}]({plot(plot_name(file, drawn))})\n\n{drawn.caption}\n")
    parts.append(f"Record `{file.name}`: {measured_with(kind.about(record), record['command'])}")
    return "\n".join(parts)


def plot_name(file: Path, plot: Plot) -> str:
    """What tells the plot of one record from those of others."""
    return f"{file.stem}-{plot.name}".replace("_", "-")


def spread(values: Record, digits: int, unit: str = "") -> str:
    """Median and, in brackets, the 20 and 80 % quantiles."""
    median, low, high = (f"{values[name]:.{digits}f}" for name in ("median", "p20", "p80"))
    return f"{median}{unit} ({low} to {high})"


# EPT's step beside the bare frozen model: step_overhead.py


def overhead(row: Record) -> str:
    """What a row of `run_steps.overhead_row` says."""
    size = row["size"]
    return (
        f"{row['ratio_to_bare']:.3f} times its time (20 to 80 %: {row['ratio_p20']:.3f} to {row['ratio_p80']:.3f}, "
        f"{row['samples']} pairs):\n{row['model']}, {row['dtype']}, batch {size['batch']}, {size['length']} text "
        f"tokens, {size['positions']} positions; {seconds(row['median'])} a step.\n"
    )


# EPT's step against PEFT's prompt tuning: training_step.py


def _training_step(record: Record) -> str:
    lines = []
    for case in record["cases"]:
        by_name = {method["method"]: method for method in case["methods"]}
        ept, peft = by_name["ept"], by_name["peft-pt"]
        data = case["data"]
        lines.append(
            [
                case["case"],
                data["padding"],
                f"{data['text_tokens_a_batch']:.0f} of {data['padded_tokens_a_batch']:.0f}",
                spread(ept["step_ms"], 0),
                spread(peft["step_ms"], 0),
                spread(case["ept_over_peft"], 3, " ×"),
                f"{ept['peak_memory_bytes'] / peft['peak_memory_bytes']:.2f} ×",
            ]
        )
    head = ["case", "padded to", "text tokens of a batch", "EPT, ms", "PEFT, ms", "EPT over PEFT", "memory"]
    about = [
        f"* {name}: {first['model']['class']}, {first['model']['dtype']}, {first['batch']} rows of at most "
        f"{first['length']} tokens, {first['steps']} steps of each method and policy"
        for name, first in _first_of_each(record["cases"]).items()
    ]
    return (
        "EPT (40 tokens, rank 30) and PEFT's prompt tuning (100 tokens) take their steps in turn, on the same batches\n"
        "with the same logits; the ratio is taken turn by turn: below 1 EPT is faster. Median (20 to 80 %). Memory:\n"
        f"{record['cases'][0]['peak_memory_kind']}, EPT's over PEFT's.\n\n"
        f"{markdown(head, lines)}\n\n" + "\n".join(about) + "\n"
    )


def _first_of_each(cases: list[Record]) -> dict[str, Record]:
    first: dict[str, Record] = {}
    for case in cases:
        first.setdefault(case["case"], case)
    return first


def step_rows(record: Record) -> list[Record]:
    """A record of `training_step.py` as rows of training steps, which `draw_steps` draws."""
    return [
        {
            **profile_row(method, case),
            "section": "steps",
            "status": "ok",
            "case": f"{case['case']}, padded to {case['data']['padding']}",
            "provider": method["method"],
        }
        for case in record["cases"]
        for method in case["methods"]
    ]


def _training_step_plots(record: Record) -> list[Plot]:
    caption = "Time of a training step of EPT and of PEFT's prompt tuning, and where it goes."
    return [Plot("vs-peft", caption, lambda record, path: draw_steps(step_rows(record), path))]


# What each option of the step gains: step_options.py


def _step_options(record: Record) -> str:
    left_out = "".join(f"\nWithout a figure: {name}: {reason}.\n" for name, reason in record["not_measured"].items())
    return (
        "One option switched off and on in turn, everything else at its default; the gain is taken pair by pair, off\n"
        f"over on: above 1 the option is faster. Median (20 to 80 %) of {record['options'][0]['pairs']} pairs; "
        f"{record['method']}, {record['dtype']},\n{record['batch']} rows of at most {record['length']} tokens.\n\n"
        f"{option_table(option_rows(record))}\n{left_out}"
    )


# ept profile --json


def _profile(record: Record) -> str:
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
    if _swept(record):
        return steps
    phases = [
        [
            method["label"],
            *(f"{method['phases_ms'][phase]:.2f}" for phase in PHASES),
            f"{method['phases_over_step']:.3f}",
        ]
        for method in record["methods"]
    ]
    table = markdown(["method", *PHASES, "sum / step"], phases)
    return f"{steps}\nWhere a step's time goes, in milliseconds:\n\n{table}\n"


def _swept(record: Record) -> bool:
    """Whether a method was measured at more than one prompt length."""
    return len({method["method"] for method in record["methods"]}) < len(record["methods"])


def _profile_plots(record: Record) -> list[Plot]:
    if _swept(record):
        return [Plot("length", "Time of a training step over the prompt's length.", draw_sweep)]
    return [Plot("phases", "Time of a training step by method, and where it goes.", draw_phases)]


BARE_TITLE = "EPT's step beside the bare frozen model on as many positions"
OVERHEAD = "step_overhead.json"

KINDS = (
    Kind(OVERHEAD, BARE_TITLE, lambda record: overhead(overhead_row(record)), lambda record: []),
    Kind(
        "training_step.json",
        "EPT's step against PEFT's prompt tuning",
        _training_step,
        _training_step_plots,
        about=lambda record: record["cases"][0],
    ),
    Kind("profile_length*.json", "`ept profile --sweep`: time over the prompt's length", _profile, _profile_plots),
    Kind("profile*.json", "`ept profile`: where a step's time goes", _profile, _profile_plots),
    Kind("step_options.json", "What each option of the training step gains", _step_options, lambda record: []),
)
