"""Draws `docs/performance.md` and its plots from the committed records, and from nothing else.

python -m benchmarks.performance_page            writes the page and the plots
python -m benchmarks.performance_page --check    ends with 1 where the page is not what the records give
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path

from ept.compare.progress import BASELINE, steps_to
from ept.profile.clock import PHASES
from ept.profile.report import draw_phases, draw_sweep, title

from . import tables
from .goals import BARE_STEP, EPT_METHOD, SCORES
from .plots import Plot, drawable
from .record import RECORD_NAME, RESULTS, ROOT, Record, Row, is_measured
from .tables import markdown, spread

PAGE = ROOT / "docs" / "performance.md"
PLOTS = "performance"  # folder beside the page
OVERHEAD, SCORES_NAME = "step_overhead.json", "scores.json"
BARE_TITLE = "EPT's step beside the bare frozen model on as many positions"
ON_REQUEST = "everything.jsonl"
"""Record of the units of `python -m benchmarks.run steps --only everything attention`."""

HEAD = """\
# Performance

Made by `python -m benchmarks.performance_page` from the records in `benchmarks/results/`; do not edit.

* Time is the median; the 20 and 80 % quantiles stand beside it. All versions of one case take turns in one run. Every
  version is checked against the reference before it is timed. Inputs rotate among sets that are larger, with their
  outputs, than the last-level cache.
* On a GPU the time is the device's, by events behind a full queue; `*` marks cases where the host could not keep it
  full. "host" is what the host alone takes for a call, while the device is busy with another.
* "of a copy": the time of a plain copy of as many bytes, measured in turn with the case, over the time taken.
* "of ceiling" is the least time that the bytes or operations take at the rates measured in the same run (copy
  bandwidth; a dense product), over the time taken. "again" is our own version measured a second time: differences of
  that size are noise.
* "vs" is the time of the peer over ours: above 1 ours is faster.
* The goals on GPUs are set for an H100 and an H200. Each card is judged by itself, its name beside its figure.
* Scores are those of the first comparison (seven tasks, EPT by the position). Later planned ones, most of them of EPT
  by the token, are in [results](results/README.md#what-is-known).
* A command is the one that its record was made with. Programs of an earlier form (`benchmarks/step_overhead.py` and
  others) are gone: `python -m benchmarks.run` measures the same.
"""

NO_GPU = """\
No GPU record has been committed: nothing is known yet about the kernels' speed. `make gpu` makes one.
"""

CPU_NOTE = """\
On a CPU the operators run the plain-PyTorch references, so "ours" holds no kernel of this project: the rows show what
the operators' dispatch costs and where the peers stand.
"""


def render(results: Path = RESULTS) -> str:
    """Returns the page's text."""
    folders = _folders(results)
    gpus = [folder for folder in folders if folder.name != "cpu"]
    every = [row for folder in folders for row in rows_of(folder)]
    parts = [HEAD, "## Goals\n", tables.goal_table(every) + "\n"]
    parts += [_device(folder)[0] for folder in gpus] or [f"## GPU\n\n{NO_GPU}"]
    parts += [_device(folder)[0] for folder in folders if folder.name == "cpu"]
    return "\n".join(parts).rstrip() + "\n"


def draw(results: Path = RESULTS, page: Path = PAGE) -> list[Path]:
    """Draws every plot that the records allow, beside `page`."""
    plots = {page.parent / path: plot for folder in _folders(results) for path, plot in _device(folder)[1].items()}
    for path, plot in plots.items():
        plot.draw(path)
    return list(plots)


def _folders(results: Path) -> list[Path]:
    """Returns the devices' folders: those that hold a record."""
    return sorted(folder for folder in results.iterdir() if folder.is_dir() and any(folder.glob("*.json*")))


def rows_of(folder: Path) -> list[Row]:
    """Returns all rows of a device: its report, and an earlier record of the step beside the bare model."""
    rows = Record(folder / RECORD_NAME).results()
    overhead = folder / OVERHEAD
    if overhead.exists():
        record = json.loads(overhead.read_text(encoding="utf-8"))
        # First, so that the report's own row, if any, is the one that counts.
        rows.insert(0, {**overhead_row(record), **_about(record), "section": "bare", "status": "ok", "reason": ""})
    for row in Record(folder / ON_REQUEST).results():
        rows.append({**row, "section": row["case"].split()[0]})  # not of the report's steps
    scores = folder / SCORES_NAME
    if scores.exists():
        rows += score_rows(json.loads(scores.read_text(encoding="utf-8")))
    for row in rows:
        if not is_measured(row):
            kind = "reduced" if row["reduced"] else "rehearsed"
            raise ValueError(
                f"{folder / RECORD_NAME} holds {kind} results ({row['case']}, …): they measure nothing; delete it"
            )
    return rows


def _device(folder: Path) -> tuple[str, dict[str, Plot]]:
    """Returns what the page says of one device, and the plots in it by their path as the page refers to them."""
    rows = rows_of(folder)
    header = Record(folder / RECORD_NAME).header()
    name = header["device"] if header else folder.name
    on_cpu = name == "cpu"
    parts = [f"## {'CPU' if on_cpu else name}\n"]
    plots: dict[str, Plot] = {}

    def shown(plot: Plot) -> str:
        path = f"{PLOTS}/{folder.name}-{plot.name}.png"
        plots[path] = plot
        return f"![{plot.caption}]({path})\n\n{plot.caption}\n"

    if on_cpu:
        parts.append(CPU_NOTE)
    if header:
        parts.append(measured_with(header, header["command"], header["started"][:10]))
    parts += map(shown, drawable(rows))

    steps = [row for row in rows if row["section"] == "steps"]
    bare = [row for row in steps if "ratio_to_bare" in row]
    unfinished = [row for row in rows if row["section"] == "plan" and row["left"]]
    begun, ended = Record(folder / RECORD_NAME).units()
    interrupted = [
        f"{unit}: begun and not ended; the same command goes on"
        for unit, attempts in begun.items()
        if attempts and unit not in ended
    ]
    sections = {
        "The report's sections": tables.plan_table(rows),
        "Checks on this device": tables.check_table(rows),
        "Ceilings": tables.ceiling_table(rows),
        "Kernels": tables.peer_table(rows),
        "Training steps": tables.step_table(rows),
        "Kernels of a step that take longest": tables.kernel_table(rows),
        f"EPT's step with every option, against PEFT's{', on a CPU' * on_cpu}": tables.everything_text(rows),
        "Attention on a CPU": tables.attention_text(rows) + written_by(folder / ON_REQUEST),
        BARE_TITLE: tables.bare_text(bare),
        "Not measured": "\n".join(
            f"* {line}" for line in [*tables.reasons(rows), *map(cut_off, unfinished), *interrupted]
        ),
    }
    parts += [f"### {name}\n\n{text.rstrip()}\n" for name, text in sections.items() if text]

    records = {file: json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.glob("*.json"))}
    for pattern, heading, section in KINDS:
        for file in [file for file in records if file.match(pattern)]:
            record = records.pop(file)
            text, plot = section(record)
            parts.append(f"### {heading}\n\n{text}")
            if plot is not None:  # its name tells it from those of other files
                parts.append(shown(plot._replace(name=f"{file.stem}-{plot.name}".replace("_", "-"))))
            parts.append(f"Record `{file.name}`: {measured_with(record, record['command'])}")
    if records:
        commands = [(f"`{file.name}`", record.get("command")) for file, record in records.items()]
        lines = [[name, f"`{command}`" if command else "–"] for name, command in commands]
        parts.append(f"### Further records\n\n{markdown(['record', 'command'], lines)}\n")
    return "\n".join(parts), plots


def written_by(record: Path) -> str:
    """Returns command, machine and versions of a record of JSON lines; nothing where there is none."""
    header = Record(record).header()
    return (
        f"\nRecord `{record.name}`: {measured_with(header, header['command'], header['started'][:10])}"
        if header
        else ""
    )


def cut_off(row: Row) -> str:
    """Says that a section of the report's plan is not complete."""
    return f"{row['case'].partition('/')[2]}: time was up ({', '.join(row['left'])}); the same command goes on"


def measured_with(record: Row, command: str, when: str = "") -> str:
    """Returns command, machine and versions in a line."""
    hardware = record["hardware"]
    named = "".join(f", {gpu['name']}" for gpu in hardware.get("gpus") or ())
    machine = f"{hardware['processor']}{named}, {hardware['threads']} threads on {hardware['cores']} cores"
    versions = ", ".join(f"{name} {version or 'not installed'}" for name, version in record["versions"].items())
    return f"`{command}`{when and ', '}{when}, {machine}; {versions}.\n"


# The records that are one JSON file each: those of `ept profile`, and an earlier one of a step.


Section = tuple[str, Plot | None]


def score_rows(record: Row) -> list[Row]:
    """Makes rows of a comparison's `comparison.json`, one a method: its mean score, and what the goals ask of EPT."""
    (setting, *_), rows = record["settings"], []
    curves = {m["method"]: {int(step): score for step, score in m["curve"].items()} for m in setting["methods"]}
    goal = curves.get(BASELINE, {})
    for method in setting["methods"]:
        name, curve = method["method"], curves[method["method"]]
        ps = [
            # A difference the wrong way round, however sure, says nothing for the goal.
            test["p"] if (test["difference"]["mean"] > 0) == (test["first"] == name) else 1.0
            for test in setting["tests"]
            if {test["first"], test["second"]} == {name, "dept"}
        ]
        reached = steps_to(curve, goal[max(goal)]) if goal and curve else None
        rows.append(
            {
                **{"section": SCORES, "case": SCORES, "provider": name, "status": "ok", "reason": "", **_about(record)},
                "score": method["mean"] and method["mean"]["mean"],
                "p_value": ps[0] if ps else None,
                # A curve that never gets there needs more steps than any number.
                "steps_to_score": math.inf if goal and reached is None else reached,
            }
        )
    return rows


def _about(record: Row) -> Row:
    """Says what an earlier record was measured on."""
    gpus = record["hardware"]["gpus"]
    device = {"device": gpus[0]["name"], "device_type": "cuda"} if gpus else {"device": "cpu", "device_type": "cpu"}
    return {**device, "reduced": False}


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


def _profile(record: Row) -> Section:
    """Shows a record of `ept profile`: its steps and, of one prompt length, where their time goes."""
    head = ["method", "parameters", "step, ms", "text tokens/s", "peak memory", f"as fast as {record['reference']}"]
    lines = [
        [
            method["label"],
            f"{method['trainable_parameters']:,}",
            spread(method["step_ms"], 0 if method["step_ms"]["median"] >= 100 else 2),
            f"{method['tokens_per_second']:,.0f}",
            tables.mebibytes(method["peak_memory_bytes"]),
            spread(method["speedup"], 2, " ×"),
        ]
        for method in record["methods"]
    ]
    steps = f"{title(record)}. Median (20 to 80 %) of {record['steps']} steps.\n\n{markdown(head, lines)}\n"
    if len({method["method"] for method in record["methods"]}) < len(record["methods"]):
        caption = "Time of a training step over the prompt's length."
        return steps, Plot("length", caption, functools.partial(draw_sweep, record))
    phases = [
        [m["label"], *(f"{m['phases_ms'][phase]:.2f}" for phase in PHASES), f"{m['phases_over_step']:.3f}"]
        for m in record["methods"]
    ]
    text = f"Where a step's time goes, in milliseconds:\n\n{markdown(['method', *PHASES, 'sum / step'], phases)}\n"
    caption = "Time of a training step by method, and where it goes."
    return f"{steps}\n{text}", Plot("phases", caption, functools.partial(draw_phases, record))


# Pattern of a file's name, of which the first that fits counts; title and content of its section.
KINDS: tuple[tuple[str, str, Callable[[Row], Section]], ...] = (
    (OVERHEAD, BARE_TITLE, lambda record: (tables.bare_text([overhead_row(record)]), None)),
    ("profile_length*.json", "`ept profile --sweep`: time over the prompt's length", _profile),
    ("profile*.json", "`ept profile`: where a step's time goes", _profile),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; end with 1 where the page is out of date")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder with a folder of records a device")
    parser.add_argument("--page", type=Path, help="default docs/performance.md; of other results, a file beside them")
    arguments = parser.parse_args()
    results = arguments.results.resolve()
    page = arguments.page or (PAGE if results == RESULTS else results / PAGE.name)
    text = render(results)
    if arguments.check:
        current = page.read_text(encoding="utf-8") if page.exists() else ""
        if current != text:
            print(f"{page} is not what the records give: run python -m benchmarks.performance_page")
        return int(current != text)
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(text, encoding="utf-8")
    for path in [page, *draw(results, page)]:
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
