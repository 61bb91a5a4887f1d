"""Draws `docs/performance.md` and its plots from the committed records, and from nothing else.

python -m benchmarks.performance_page            writes the page and the plots
python -m benchmarks.performance_page --check    ends with 1 where the page is not what the records give
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from . import json_records
from .json_records import OVERHEAD, measured_with, overhead_row
from .plots import drawable
from .record import RECORD_NAME, RESULTS, ROOT, Record, Row
from .tables import (
    BARE_TITLE,
    OPTIONS_TITLE,
    bare_text,
    ceiling_table,
    goal_table,
    markdown,
    options_text,
    peer_table,
    reasons,
    step_table,
)

PAGE = ROOT / "docs" / "performance.md"
PLOTS = "performance"  # folder beside the page

CAPTIONS = {
    "bandwidth": "Bandwidth over size: the least bytes that the operator must move, over its time.",
    "speedup": "Products with 4-bit weights: time of bitsandbytes over ours, over the number of tokens.",
    "steps": "Time of a whole training step by method, and where it goes.",
}

HEAD = """\
# Performance

Made by `python -m benchmarks.performance_page` from the records in `benchmarks/results/`; do not edit.

* Time is the median; the 20 and 80 % quantiles stand beside it. All versions of one case take turns in one run. Every
  version is checked against the reference before it is timed. Inputs rotate among sets larger than the last-level
  cache.
* On a GPU the time is the device's, by events behind a full queue; `*` marks cases where the host could not keep it
  full.
* "of ceiling" is the least time that the bytes or operations take at the rates measured in the same run (copy
  bandwidth; a dense product), over the time taken. "again" is our own version measured a second time: differences of
  that size are noise.
* "vs" is the time of the peer over ours: above 1 ours is faster.
"""

NO_GPU = """\
No GPU record has been committed: nothing is known yet about the kernels' speed. `make gpu` makes one.
"""

CPU_NOTE = """\
On a CPU the operators run the plain-PyTorch references, so "ours" holds no kernel of this project: the rows show what
the operators' dispatch costs and where the peers stand.
"""


def render(results: Path = RESULTS) -> str:
    """Return the page's text."""
    folders = _folders(results)
    gpus = [folder for folder in folders if folder.name != "cpu"]
    every = [row for folder in folders for row in rows_of(folder)]
    parts = [HEAD, "## Goals\n", goal_table(every) + "\n"]
    parts += [_device(folder) for folder in gpus] or [f"## GPU\n\n{NO_GPU}"]
    parts += [_device(folder) for folder in folders if folder.name == "cpu"]
    return "\n".join(parts).rstrip() + "\n"


def draw(results: Path = RESULTS, page: Path = PAGE) -> list[Path]:
    """Draws every plot that the records allow, beside `page`."""
    drawn = []
    for folder in _folders(results):
        rows = rows_of(folder)
        for name, function in drawable(rows).items():
            path = page.parent / _plot(folder, name)
            function(rows, path)
            drawn.append(path)
        for file, kind in json_records.known(folder):
            record = json_records.read(file)
            for plot in kind.plots(record):
                path = page.parent / _plot(folder, json_records.plot_name(file, plot))
                path.parent.mkdir(parents=True, exist_ok=True)
                plot.draw(record, path)
                drawn.append(path)
    return drawn


def _folders(results: Path) -> list[Path]:
    """Return the devices' folders: those that hold a record."""
    return sorted(folder for folder in results.iterdir() if folder.is_dir() and any(folder.glob("*.json*")))


def rows_of(folder: Path) -> list[Row]:
    """Return all rows of a device: its report, and an earlier record of the step beside the bare model."""
    rows = Record(folder / RECORD_NAME).results()
    overhead = folder / OVERHEAD
    if overhead.exists():
        record = json_records.read(overhead)
        about = {"device_type": "cuda" if record["hardware"]["gpus"] else "cpu", "reduced": False}
        # First, so that the report's own row, if any, is the one that counts.
        rows.insert(0, {**overhead_row(record), **about, "section": "bare", "status": "ok", "reason": ""})
    reduced = [row["case"] for row in rows if row["reduced"] and "case" in row]
    if reduced:
        raise ValueError(
            f"{folder / RECORD_NAME} holds reduced results ({reduced[0]}, …): they measure nothing; delete it"
        )
    return rows


def _device(folder: Path) -> str:
    rows = rows_of(folder)
    header = Record(folder / RECORD_NAME).header()
    name = header["device"] if header else folder.name
    parts = [f"## {name if name != 'cpu' else 'CPU'}\n"]
    if name == "cpu":
        parts.append(CPU_NOTE)
    if header:
        parts.append(measured_with(header, header["command"], header["started"][:10]))
    parts += [f"![{CAPTIONS[plot]}]({_plot(folder, plot)})\n\n{CAPTIONS[plot]}\n" for plot in drawable(rows)]
    parts += [f"### {title}\n\n{text.rstrip()}\n" for title, text in _sections(rows) if text]
    for file, kind in json_records.known(folder):
        parts.append(json_records.section(file, kind, lambda name: _plot(folder, name)))
    others = json_records.unknown(folder)
    if others:
        parts.append(f"### Further records\n\n{others}\n")
    return "\n".join(parts)


def _sections(rows: list[Row]) -> list[tuple[str, str]]:
    """Return title and text of every section of a report; without a text where it has no rows."""
    checks = [row for row in rows if row["section"] in ("tests", "sanitizer")]
    checked = [[row["case"], row.get("summary") or row["reason"] or "ok"] for row in checks]
    steps = [row for row in rows if row["section"] == "steps"]
    bare, gains = ([row for row in steps if field in row] for field in ("ratio_to_bare", "gain"))
    return [
        ("Checks on this device", checked and markdown(["check", "result"], checked)),
        ("Ceilings", ceiling_table(rows)),
        ("Kernels", peer_table(rows)),
        ("Training steps", step_table(rows)),
        (OPTIONS_TITLE, gains and options_text(gains)),
        (BARE_TITLE, bare_text(bare)),
        ("Not measured", "\n".join(f"* {line}" for line in reasons(rows))),
    ]


def _plot(folder: Path, name: str) -> str:
    return f"{PLOTS}/{folder.name}-{name}.png"


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
