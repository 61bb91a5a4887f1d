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
from .plots import Plot, drawable
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
    """Returns the page's text."""
    folders = _folders(results)
    gpus = [folder for folder in folders if folder.name != "cpu"]
    every = [row for folder in folders for row in rows_of(folder)]
    parts = [HEAD, "## Goals\n", goal_table(every) + "\n"]
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


def _device(folder: Path) -> tuple[str, dict[str, Plot]]:
    """Returns what the page says of one device, and the plots in it by their path as the page refers to them."""
    rows = rows_of(folder)
    header = Record(folder / RECORD_NAME).header()
    name = header["device"] if header else folder.name
    parts = [f"## {name if name != 'cpu' else 'CPU'}\n"]
    plots: dict[str, Plot] = {}

    def shown(plot: Plot) -> str:
        path = f"{PLOTS}/{folder.name}-{plot.name}.png"
        plots[path] = plot
        return f"![{plot.caption}]({path})\n\n{plot.caption}\n"

    if name == "cpu":
        parts.append(CPU_NOTE)
    if header:
        parts.append(measured_with(header, header["command"], header["started"][:10]))
    parts += map(shown, drawable(rows))

    steps = [row for row in rows if row["section"] == "steps"]
    bare, gains = ([row for row in steps if field in row] for field in ("ratio_to_bare", "gain"))
    checks = [row for row in rows if row["section"] in ("tests", "sanitizer")]
    checked = [[row["case"], row.get("summary") or row["reason"] or "ok"] for row in checks]
    sections = {
        "Checks on this device": markdown(["check", "result"], checked),
        "Ceilings": ceiling_table(rows),
        "Kernels": peer_table(rows),
        "Training steps": step_table(rows),
        OPTIONS_TITLE: options_text(gains) if gains else "",
        BARE_TITLE: bare_text(bare),
        "Not measured": "\n".join(f"* {line}" for line in reasons(rows)),
    }
    parts += [f"### {title}\n\n{text.rstrip()}\n" for title, text in sections.items() if text]

    known, unknown = json_records.sorted_by_kind(folder)
    for file, kind in known:
        record = json_records.read(file)
        parts.append(f"### {kind.title}\n\n{kind.text(record)}")
        plot = json_records.plot_of(record, file)
        parts += [shown(plot)] if plot else []
        about = record if "hardware" in record else record["cases"][0]
        parts.append(f"Record `{file.name}`: {measured_with(about, record['command'])}")
    commands = [(file.name, json_records.read(file).get("command")) for file in unknown]
    if commands:
        lines = [[f"`{file}`", f"`{command}`" if command else "–"] for file, command in commands]
        parts.append(f"### Further records\n\n{markdown(['record', 'command'], lines)}\n")
    return "\n".join(parts), plots


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
