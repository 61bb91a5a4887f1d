"""Tables of a record, as aligned Markdown: in a terminal, and in `docs/performance.md`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from .goals import NOT_MEASURED, judge_all
from .shapes import OURS, OURS_AGAIN

Row = dict[str, Any]

PEERS_FIRST = ("reference", "torch.compile", "bitsandbytes", "PEFT", "unquantised")


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """An aligned Markdown table; the first column to the left, all others to the right."""
    rows = [list(row) for row in rows]
    widths = [max(3, *(len(line[i]) for line in [list(header), *rows])) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        padded = [cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(cells, widths))]
        return f"| {' | '.join(padded)} |"

    rule = "|" + "|".join("-" * (w + 2) if i == 0 else "-" * (w + 1) + ":" for i, w in enumerate(widths)) + "|"
    return "\n".join([line(header), rule, *map(line, rows)])


def seconds(value: float) -> str:
    """Three digits in the unit that suits."""
    for unit, factor in (("s", 1.0), ("ms", 1e3), ("µs", 1e6)):
        if value * factor >= 1 or unit == "µs":
            return f"{value * factor:.3g} {unit}"
    raise AssertionError("unreachable")


def rate(row: Row) -> str:
    """What a row does a second: bytes where memory sets its floor, operations where products do."""
    if row["bound"] == "memory":
        return f"{row['bytes_per_second'] / 1e9:.3g} GB/s"
    return operations(row["operations_per_second"])


def operations(a_second: float) -> str:
    """Floating-point operations a second, in the unit that suits."""
    return f"{a_second / 1e9:.3g} GFLOP/s" if a_second < 1e12 else f"{a_second / 1e12:.3g} TFLOP/s"


def mebibytes(value: float | None) -> str:
    """Bytes in MiB; a dash where they were not counted."""
    if value is None:
        return "–"
    amount = value / 2**20
    return f"{amount:.3g} MiB" if amount < 100 else f"{amount:,.0f} MiB"


def by_case(results: Iterable[Row]) -> dict[str, dict[str, Row]]:
    """Rows of the kernel section by case and version, in the order measured."""
    cases: dict[str, dict[str, Row]] = {}
    for row in results:
        if row["section"] == "kernels":
            cases.setdefault(row["case"], {})[row["provider"]] = row
    return cases


def peer_table(results: Iterable[Row]) -> str:
    """Our time, what runs it, its rate and its fraction of the ceiling, the memory it takes, its noise, and its
    speed-up over each peer.
    """
    cases = by_case(results)
    present = {provider for rows in cases.values() for provider in rows}
    peers = [peer for peer in PEERS_FIRST if peer in present]
    header = [
        "case",
        "ours",
        "20–80 %",
        "by",
        "rate",
        "of ceiling",
        "peak memory",
        "again",
        *(f"vs {peer}" for peer in peers),
    ]
    return markdown(header, [_peer_line(case, rows, peers) for case, rows in cases.items()])


def _peer_line(case: str, rows: dict[str, Row], peers: Sequence[str]) -> list[str]:
    ours = rows.get(OURS) or next(iter(rows.values()))
    if ours["status"] != "ok":
        return [case, ours["status"], *[""] * (6 + len(peers))]
    again = rows.get(OURS_AGAIN)
    spread = f"{seconds(ours['p20'])} – {seconds(ours['p80'])}"
    fraction = f"{100 * ours['fraction_of_ceiling']:.0f} % {ours['bound']}"
    noise = f"{again['median'] / ours['median']:.2f} ×" if again and again["status"] == "ok" else "–"
    return [
        case,
        seconds(ours["median"]) + (" *" if ours["host_bound"] else ""),
        spread,
        ours["backend"],
        rate(ours),
        fraction,
        mebibytes(ours.get("peak_bytes")),
        noise,
        *(_speedup(rows.get(peer), ours) for peer in peers),
    ]


def _speedup(peer: Row | None, ours: Row) -> str:
    if peer is None:
        return ""
    return f"{peer['median'] / ours['median']:.2f} ×" if peer["status"] == "ok" else peer["status"]


def reasons(results: Iterable[Row]) -> list[str]:
    """Why something was skipped or failed, each reason once, with what it concerns."""
    found: dict[tuple[str, str, str], list[str]] = {}
    for row in results:
        if row["status"] != "ok":
            key = row["status"], row.get("provider", ""), row["reason"]
            found.setdefault(key, []).append(row["case"])
    return [
        f"{status}{f', {provider}' if provider else ''}: {reason} ({len(cases)} cases, the first {cases[0]})"
        for (status, provider, reason), cases in found.items()
    ]


def step_table(results: Iterable[Row]) -> str:
    """Whole training steps: time, memory, tokens a second."""
    lines = []
    for row in results:
        if row["section"] == "steps" and row["status"] == "ok" and "gain" not in row:
            memory = mebibytes(row.get("peak_bytes"))
            tokens = f"{row['tokens_per_second']:.0f}" if row.get("tokens_per_second") else "–"
            spread = f"{seconds(row['p20'])} – {seconds(row['p80'])}" if "p20" in row else "–"
            lines.append([row["case"], row["provider"], seconds(row["median"]), spread, memory, tokens])
    return markdown(["step", "method", "time", "20–80 %", "peak memory", "text tokens/s"], lines) if lines else ""


def option_table(results: Iterable[Row]) -> str:
    """What each option of the training step gains: time without it and with it, and their ratio."""
    lines = []
    for row in results:
        if "gain" in row:
            gain = row["gain"]
            setting = f"`{row['setting']}`" if "=" in row["setting"] else row["setting"]
            shown = f"{gain['median']:.3f} × ({gain['p20']:.3f} to {gain['p80']:.3f})"
            lines.append(
                [row["provider"], setting, row["model"], seconds(row["off_median"]), seconds(row["median"]), shown]
            )
    return markdown(["option", "setting", "shape", "without", "with", "gain (20–80 %)"], lines) if lines else ""


def goal_table(results: Iterable[Row]) -> str:
    """Every goal: met, missed or not measured, with its worst number."""
    lines = []
    for verdict in judge_all(results):
        goal = verdict.goal
        partly = (
            f" ({verdict.measured} of {verdict.wanted})" if verdict.status == NOT_MEASURED and verdict.measured else ""
        )
        lines.append([goal.what, goal.against, goal.threshold, goal.show(verdict.worst), verdict.status + partly])
    return markdown(["goal", "against", "wanted", "worst", "verdict"], lines)
