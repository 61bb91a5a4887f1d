"""Tables of a record, as aligned Markdown: for a terminal, and for `docs/performance.md`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from ept.utils import tables

from .goals import GOALS, NOT_MEASURED, SET_FOR, judge
from .record import Row, by_case, is_measured
from .shapes import COPY, LIGER, MODEL, OURS, OURS_AGAIN

PEERS_FIRST = ("reference", "torch.compile", "bitsandbytes", "PEFT", "unquantised", MODEL, LIGER)


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Returns an aligned table; empty if it has no rows."""
    lines = list(rows)
    return tables.markdown(header, lines, aligned=True) if lines else ""


def seconds(value: float) -> str:
    """Formats a time with three digits in a suitable unit."""
    unit, factor = ("s", 1.0) if value >= 1 else ("ms", 1e3) if value * 1e3 >= 1 else ("µs", 1e6)
    return f"{value * factor:.3g} {unit}"


def operations(a_second: float) -> str:
    """Formats floating-point operations per second in a suitable unit."""
    return f"{a_second / 1e9:.3g} GFLOP/s" if a_second < 1e12 else f"{a_second / 1e12:.3g} TFLOP/s"


def mebibytes(value: float | None) -> str:
    """Formats bytes in MiB; a dash if they were not counted."""
    if value is None:
        return "–"
    amount = value / 2**20
    return f"{amount:.3g} MiB" if amount < 100 else f"{amount:,.0f} MiB"


def spread(values: Row, digits: int, unit: str = "") -> str:
    """Formats the median and, in brackets, the 20 and 80 % quantiles."""
    median, low, high = (f"{values[name]:.{digits}f}" for name in ("median", "p20", "p80"))
    return f"{median}{unit} ({low} to {high})"


def peer_table(results: Iterable[Row]) -> str:
    """Shows our time, what runs it, its rate, the fraction of the ceiling and of a copy of as many bytes, the host's
    time per call, memory, noise, and the speed-up over each alternative.
    """
    cases = by_case(row for row in results if row["section"] == "kernels" and row["provider"] != COPY)
    peers = [peer for peer in PEERS_FIRST if any(peer in rows for rows in cases.values())]
    lines = []
    for case, rows in cases.items():
        ours = rows.get(OURS) or next(iter(rows.values()))
        if ours["status"] != "ok":
            lines.append([case, ours["status"], *[""] * (8 + len(peers))])
            continue
        over = {name: f"{row['median'] / ours['median']:.2f} ×" for name, row in rows.items() if row["status"] == "ok"}
        rate = f"{ours['bytes_per_second'] / 1e9:.3g} GB/s"
        lines.append(
            [
                case,
                seconds(ours["median"]) + (" *" if ours["host_bound"] else ""),
                f"{seconds(ours['p20'])} – {seconds(ours['p80'])}",
                ours["backend"],
                rate if ours["bound"] == "memory" else operations(ours["operations_per_second"]),
                f"{100 * ours['fraction_of_ceiling']:.0f} % {ours['bound']}",
                f"{100 * ours['fraction_of_own_copy']:.0f} %" if "fraction_of_own_copy" in ours else "–",
                seconds(ours["host"]) if ours.get("host") else "–",
                mebibytes(ours.get("peak_bytes")),
                over.get(OURS_AGAIN, "–"),
                *(over.get(peer) or rows.get(peer, {}).get("status", "") for peer in peers),
            ]
        )
    header = ["case", "ours", "20–80 %", "by", "rate", "of ceiling", "of a copy", "host", "peak memory", "again"]
    return markdown([*header, *(f"vs {peer}" for peer in peers)], lines)


def reasons(results: Iterable[Row]) -> list[str]:
    """Lists why something was skipped or failed, each reason once, with what it concerns."""
    found: dict[tuple[str, str, str], list[str]] = {}
    for row in results:
        if row["status"] != "ok" and row["section"] != "tests":
            key = row["status"], row.get("provider", ""), row["reason"]
            found.setdefault(key, []).append(row["case"])
    return [
        f"{status}{f', {provider}' if provider else ''}: {reason} ({len(cases)} cases, the first {cases[0]})"
        for (status, provider, reason), cases in found.items()
    ]


def plan_table(results: Iterable[Row]) -> str:
    """Shows the sections of a report: how long each took, and what was left when its time was up."""
    lines = [
        [row["case"].partition("/")[2], f"{row['seconds']:.0f} s", f"{row['box']:.0f} s", row["summary"]]
        for row in results
        if row["section"] == "plan"
    ]
    return markdown(["section", "took", "had", "and is"], lines)


def check_table(results: Iterable[Row]) -> str:
    """Shows the checks, a line for each (for tests, for each file), with the failures."""
    lines: list[list[str]] = []
    files: dict[str, Counter[str]] = {}
    for row in results:
        if row["section"] == "tests":
            files.setdefault(row["case"].partition("::")[0], Counter())[row["status"]] += 1
        elif row["section"] in ("environment", "cache", "once", "sanitizer"):
            lines.append([row["case"], row["status"], row["reason"] or row.get("summary", "")])
    for file, counted in files.items():
        status = "failed" if counted["failed"] else "ok"
        lines.append(
            [file, status, f"{counted['ok']} passed, {counted['failed']} failed, {counted['skipped']} skipped"]
        )
    return markdown(["check", "status", "result"], lines)


def kernel_table(results: Iterable[Row]) -> str:
    """Shows where a training step's time goes on the device: the longest kernels of every method."""
    lines = []
    for row in results:
        for kernel in row.get("kernels", ()):
            step = [row["case"], row["provider"], f"{100 * row['busy_fraction']:.0f} %"]
            lines.append([*step, kernel["name"], str(kernel["runs"]), seconds(kernel["seconds"])])
    return markdown(["step", "method", "device busy", "kernel", "runs", "time"], lines)


def ceiling_table(results: Iterable[Row]) -> str:
    """Shows the measured ceilings and their spread."""
    lines = [
        [
            row["ceiling"],
            f"{row['bytes_per_second'] / 1e9:.1f} GB/s" if "bytes" in row else operations(row["operations_per_second"]),
            *(seconds(row[name]) for name in ("p20", "median", "p80")),
        ]
        for row in results
        if row["section"] == "ceilings" and row["status"] == "ok"
    ]
    return markdown(["ceiling", "rate", "20 %", "median", "80 %"], lines)


def step_table(results: Iterable[Row]) -> str:
    """Shows whole training steps: time, memory, tokens per second."""
    lines = []
    for row in results:
        if row["section"] == "steps" and row["status"] == "ok" and "over_started" not in row:
            tokens = f"{row['tokens_per_second']:.0f}" if row.get("tokens_per_second") else "–"
            low_high = f"{seconds(row['p20'])} – {seconds(row['p80'])}" if "p20" in row else "–"
            memory = mebibytes(row.get("peak_bytes"))
            lines.append([row["case"], row["provider"], seconds(row["median"]), low_high, memory, tokens])
    return markdown(["step", "method", "time", "20–80 %", "peak memory", "text tokens/s"], lines)


def goal_table(results: Iterable[Row]) -> str:
    """Shows every goal on every device with results for it: met, missed or not measured, with its worst number."""
    by_device: dict[str, list[Row]] = {}
    for row in filter(is_measured, results):
        by_device.setdefault(str(row.get("device", row["device_type"])), []).append(row)
    lines = []
    for goal in GOALS:
        limit = f"≥ {goal.show(goal.at_least)}" if goal.at_least is not None else f"≤ {goal.show(goal.at_most)}"
        about = [goal.what, goal.against, "yes" if goal.unit == "yes" else limit]
        verdicts = {device: judge(goal, rows) for device, rows in by_device.items()}
        there = {device: verdict for device, verdict in verdicts.items() if verdict.measured}
        for device, verdict in there.items():
            partly = f" ({verdict.measured} of {len(goal.cases)})" if verdict.status == NOT_MEASURED else ""
            lines.append([*about, device, goal.show(verdict.worst), verdict.status + partly])
        if not there:
            lines.append([*about, SET_FOR[goal.device_type], "–", NOT_MEASURED])
    return markdown(["goal", "against", "wanted", "on", "worst", "verdict"], lines)


def bare_text(rows: list[Row]) -> str:
    """Compares EPT's step with the bare model's, in words."""
    return "".join(
        f"{row['ratio_to_bare']:.3f} times as long (20 to 80 %: {row['ratio_p20']:.3f} to {row['ratio_p80']:.3f}, "
        f"{row['samples']} pairs):\n{row['model']}, {row['dtype']}, batch {row['size']['batch']}, "
        f"{row['size']['length']} text tokens, {row['size']['positions']} positions; {seconds(row['median'])} a step.\n"
        for row in rows
    )


def setting(row: Row) -> str:
    """Formats the setting that switches an option on; a key of the configuration as code."""
    return f"`{row['setting']}`" if "=" in row["setting"] else row["setting"]


def everything_text(results: Iterable[Row]) -> str:
    """Shows each option of a step alone and all together, beside PEFT's step."""
    rows = [row for row in results if "over_started" in row and row["status"] == "ok"]
    lines = []
    for row in rows:
        ratios = [row.get(name) for name in ("gain_alone", "over_started", "over_alike")]
        cells = [spread(found, 3, " ×") if found else "" for found in ratios]
        lines.append([row["model"], row["provider"], setting(row), seconds(row["median"]), *cells])
    head = ["model", "version", "setting", "step", "gain over EPT, no option"]
    head += ["over PEFT's as started", "over PEFT's in the same dtype and attention"]
    on_cpu = bool(rows) and rows[0]["device_type"] == "cpu"
    text = (
        f"{'CPU time of one thread, all' if on_cpu else 'All'} versions in turn; median (20 to 80 %). "
        "PEFT's prompt tuning has\n100 tokens, EPT 40. The frozen model's dropout is off in all."
        f"{' The goal compares the two with every option.' if on_cpu else ''}\n\n"
    )
    return f"{text}{markdown(head, lines)}\n" if lines else ""


def attention_text(results: Iterable[Row]) -> str:
    """Shows where eager attention is faster on a CPU."""
    lines = [
        [row["provider"], *map(seconds, (row["sdpa_median"], row["median"])), spread(row["gain_of_eager"], 2, " ×")]
        for row in results
        if "gain_of_eager" in row and row["status"] == "ok"
    ]
    text = "Forward and backward only. The gain is SDPA's time over that of `eager`: above 1 `eager` is faster.\n\n"
    return f"{text}{markdown(['shape, positions, dtype', 'SDPA', 'eager', 'gain'], lines)}\n" if lines else ""
