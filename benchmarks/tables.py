"""Tables of a record, as aligned Markdown: in a terminal, and in `docs/performance.md`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ept.utils import tables

from .goals import NOT_MEASURED, judge_all
from .record import Row
from .shapes import OURS, OURS_AGAIN

PEERS_FIRST = ("reference", "torch.compile", "bitsandbytes", "PEFT", "unquantised")


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return tables.markdown(header, rows, aligned=True)


def seconds(value: float) -> str:
    """Show three digits in the unit that suits."""
    for unit, factor in (("s", 1.0), ("ms", 1e3), ("µs", 1e6)):
        if value * factor >= 1 or unit == "µs":
            return f"{value * factor:.3g} {unit}"
    raise AssertionError("unreachable")


def rate(row: Row) -> str:
    """Show what a row does a second: bytes where memory sets its floor, operations where products do."""
    if row["bound"] == "memory":
        return f"{row['bytes_per_second'] / 1e9:.3g} GB/s"
    return operations(row["operations_per_second"])


def operations(a_second: float) -> str:
    """Show floating-point operations a second in the unit that suits."""
    return f"{a_second / 1e9:.3g} GFLOP/s" if a_second < 1e12 else f"{a_second / 1e12:.3g} TFLOP/s"


def mebibytes(value: float | None) -> str:
    """Show bytes in MiB; a dash where they were not counted."""
    if value is None:
        return "–"
    amount = value / 2**20
    return f"{amount:.3g} MiB" if amount < 100 else f"{amount:,.0f} MiB"


def by_case(results: Iterable[Row]) -> dict[str, dict[str, Row]]:
    """Return the rows of the kernel section by case and version, in the order measured."""
    cases: dict[str, dict[str, Row]] = {}
    for row in results:
        if row["section"] == "kernels":
            cases.setdefault(row["case"], {})[row["provider"]] = row
    return cases


def peer_table(results: Iterable[Row]) -> str:
    """Show our time, what runs it, its rate and its fraction of the ceiling, the memory it takes, its noise, and its
    speed-up over each peer.
    """
    cases = by_case(results)
    if not cases:
        return ""
    present = {provider for rows in cases.values() for provider in rows}
    peers = [peer for peer in PEERS_FIRST if peer in present]
    header = ["case", "ours", "20–80 %", "by", "rate", "of ceiling", "peak memory", "again"]
    header += [f"vs {peer}" for peer in peers]
    return markdown(header, [_peer_line(case, rows, peers) for case, rows in cases.items()])


def _peer_line(case: str, rows: dict[str, Row], peers: Sequence[str]) -> list[str]:
    ours = rows.get(OURS) or next(iter(rows.values()))
    if ours["status"] != "ok":
        return [case, ours["status"], *[""] * (6 + len(peers))]
    time = seconds(ours["median"]) + (" *" if ours["host_bound"] else "")
    spread = f"{seconds(ours['p20'])} – {seconds(ours['p80'])}"
    fraction = f"{100 * ours['fraction_of_ceiling']:.0f} % {ours['bound']}"
    again = rows.get(OURS_AGAIN)
    noise = f"{again['median'] / ours['median']:.2f} ×" if again and again["status"] == "ok" else "–"
    line = [case, time, spread, ours["backend"], rate(ours), fraction, mebibytes(ours.get("peak_bytes")), noise]
    return line + [_speedup(rows.get(peer), ours) for peer in peers]


def _speedup(peer: Row | None, ours: Row) -> str:
    if peer is None:
        return ""
    return f"{peer['median'] / ours['median']:.2f} ×" if peer["status"] == "ok" else peer["status"]


def reasons(results: Iterable[Row]) -> list[str]:
    """List why something was skipped or failed, each reason once, with what it concerns."""
    found: dict[tuple[str, str, str], list[str]] = {}
    for row in results:
        if row["status"] != "ok":
            key = row["status"], row.get("provider", ""), row["reason"]
            found.setdefault(key, []).append(row["case"])
    return [
        f"{status}{f', {provider}' if provider else ''}: {reason} ({len(cases)} cases, the first {cases[0]})"
        for (status, provider, reason), cases in found.items()
    ]


def ceiling_table(results: Iterable[Row]) -> str:
    """Show the ceilings that were measured, and their spread."""
    lines = []
    for row in results:
        if row["section"] == "ceilings":
            copied = "bytes_per_second" in row
            rate = f"{row['bytes_per_second'] / 1e9:.1f} GB/s" if copied else operations(row["operations_per_second"])
            lines.append([row["ceiling"], rate, *(seconds(row[name]) for name in ("p20", "median", "p80"))])
    return markdown(["ceiling", "rate", "20 %", "median", "80 %"], lines) if lines else ""


def step_table(results: Iterable[Row]) -> str:
    """Show whole training steps: time, memory, tokens a second."""
    lines = []
    for row in results:
        if row["section"] == "steps" and row["status"] == "ok" and "gain" not in row:
            memory = mebibytes(row.get("peak_bytes"))
            tokens = f"{row['tokens_per_second']:.0f}" if row.get("tokens_per_second") else "–"
            spread = f"{seconds(row['p20'])} – {seconds(row['p80'])}" if "p20" in row else "–"
            lines.append([row["case"], row["provider"], seconds(row["median"]), spread, memory, tokens])
    return markdown(["step", "method", "time", "20–80 %", "peak memory", "text tokens/s"], lines) if lines else ""


def option_table(results: Iterable[Row]) -> str:
    """Show what each option of the training step gains: time without it and with it, and their ratio."""
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
    """Show every goal: met, missed or not measured, with its worst number."""
    lines = []
    for verdict in judge_all(results):
        goal = verdict.goal
        partly = (
            f" ({verdict.measured} of {verdict.wanted})" if verdict.status == NOT_MEASURED and verdict.measured else ""
        )
        lines.append([goal.what, goal.against, goal.threshold, goal.show(verdict.worst), verdict.status + partly])
    return markdown(["goal", "against", "wanted", "worst", "verdict"], lines)


BARE_TITLE = "EPT's step beside the bare frozen model on as many positions"
OPTIONS_TITLE = "What each option of the training step gains"


def spread(values: Row, digits: int, unit: str = "") -> str:
    """Show the median and, in brackets, the 20 and 80 % quantiles."""
    median, low, high = (f"{values[name]:.{digits}f}" for name in ("median", "p20", "p80"))
    return f"{median}{unit} ({low} to {high})"


def bare_text(rows: list[Row]) -> str:
    """Say what EPT's step takes beside the bare model's."""
    return "".join(
        f"{row['ratio_to_bare']:.3f} times its time (20 to 80 %: {row['ratio_p20']:.3f} to {row['ratio_p80']:.3f}, "
        f"{row['samples']} pairs):\n{row['model']}, {row['dtype']}, batch {row['size']['batch']}, "
        f"{row['size']['length']} text tokens, {row['size']['positions']} positions; {seconds(row['median'])} a step.\n"
        for row in rows
    )


def options_text(rows: list[Row]) -> str:
    """Show what each option gains, and which have no figure here."""
    first = next(row for row in rows if "gain" in row)
    left_out = "".join(
        f"\nWithout a figure: {row['provider']}: {row['reason']}.\n" for row in rows if "gain" not in row
    )
    return (
        "One option switched off and on in turn, everything else at its default; the gain is taken pair by pair, off\n"
        f"over on: above 1 the option is faster. Median (20 to 80 %) of {first['samples']} pairs; {first['method']}, "
        f"{first['dtype']},\n{first['size']['batch']} rows of at most {first['size']['length']} tokens.\n\n"
        f"{option_table(rows)}\n{left_out}"
    )
