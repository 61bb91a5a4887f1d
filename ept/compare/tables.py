"""What a comparison found: means with intervals, paired tests between methods, and the tables they are printed in."""

from __future__ import annotations

import csv
import io
import itertools
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..runs.folder import RunFolder
from ..runs.method_table import METHODS
from ..utils.files import write_atomically
from .plan import Record

CONFIDENCE = 0.95
SIZES = ("num_virtual_tokens", "r", "num_spaces", "space_dim")


@dataclass(frozen=True)
class Interval:
    """Mean of `n` values and half the width of its 95 % interval by Student's t; None for a single value."""

    mean: float
    half_width: float | None
    n: int

    def text(self, digits: int = 1) -> str:
        """In percent, as papers print scores."""
        half = "" if self.half_width is None else f" ± {100 * self.half_width:.{digits}f}"
        return f"{100 * self.mean:.{digits}f}{half}"


def interval(values: Sequence[float]) -> Interval:
    """Raises statistics.StatisticsError for no values."""
    from scipy.stats import t

    mean, n = statistics.fmean(values), len(values)
    if n < 2:
        return Interval(mean, None, n)
    quantile = float(t.ppf((1 + CONFIDENCE) / 2, n - 1))
    return Interval(mean, quantile * statistics.stdev(values) / math.sqrt(n), n)


@dataclass(frozen=True)
class PairedTest:
    """Paired t-test of two methods over the `n` pairs (task, seed) that both have; `p` is two-sided.

    `p` is None where it is undefined: fewer than two pairs, or all differences equal.
    """

    first: str
    second: str
    difference: Interval
    p: float | None


Scores = Mapping[tuple[str, int], float]
"""(task, seed): score."""


def paired_test(first: str, one: Scores, second: str, other: Scores) -> PairedTest | None:
    """The difference `one` − `other` over their common pairs; None where they have none."""
    from scipy.stats import ttest_rel

    common = sorted(set(one) & set(other))
    if not common:
        return None
    differences = [one[key] - other[key] for key in common]
    p = None
    if len(common) > 1 and max(differences) - min(differences) > 1e-12:
        p = float(ttest_rel([one[key] for key in common], [other[key] for key in common]).pvalue)
    return PairedTest(first, second, interval(differences), p)


@dataclass(frozen=True)
class MethodSummary:
    """A method at one setting, over the runs with its chosen learning rates.

    `mean` is over the seeds for which every task has a score: of each seed's mean over the tasks.
    """

    method: str
    parameters: int
    sizes: dict[str, int]
    by_task: dict[str, Interval]
    mean: Interval | None
    scores: Scores
    step_time_ms: float | None
    rates: dict[str, tuple[float, float]]


@dataclass(frozen=True)
class Setting:
    """All methods at one point of the comparison; `sweep` is None for the configuration itself."""

    sweep: str | None
    value: Any
    tasks: list[str]
    methods: list[MethodSummary]
    tests: list[PairedTest]
    failed: list[str]
    """Methods of which no run has finished."""
    seeds: int
    rows: str
    """Metric and number of rows of each task, in words."""

    @property
    def title(self) -> str:
        return "The configuration itself" if self.sweep is None else f"{self.sweep} = {self.value}"


def summarise(records: Sequence[Record]) -> list[Setting]:
    """One entry for each point of the comparison, in the order of the runs; failed runs do not take part."""
    settings = []
    for (sweep, value), group in _grouped(records, lambda record: (record.run.sweep, record.run.value)):
        tasks = list(dict.fromkeys(record.run.task for record in group))
        kept = [record for record in group if record.chosen and record.outcome.results is not None]
        methods = [_method(name, found, tasks) for name, found in _grouped(kept, lambda record: record.run.method)]
        tests = [
            test
            for b, a in itertools.combinations(methods, 2)
            if (test := paired_test(a.method, a.scores, b.method, b.scores)) is not None
        ]
        finished = {m.method for m in methods}
        failed = list(dict.fromkeys(r.run.method for r in group if r.run.method not in finished))
        seeds = len({record.run.seed for record in group})
        settings.append(Setting(sweep, value, tasks, methods, tests, failed, seeds, _rows(kept)))
    return settings


def _rows(records: Sequence[Record]) -> str:
    found = [record.outcome.results for record in records if record.outcome.results is not None]
    about = (
        f"{r['task']} ({r['metric']}): " + ", ".join(f"{count:,} {split}" for split, count in r["rows"].items())
        for r in found
    )
    return "; ".join(dict.fromkeys(about))


def _grouped(records: Sequence[Record], key: Any) -> list[tuple[Any, list[Record]]]:
    groups: dict[Any, list[Record]] = {}
    for record in records:
        groups.setdefault(key(record), []).append(record)
    return list(groups.items())


def _method(name: str, records: Sequence[Record], tasks: Sequence[str]) -> MethodSummary:
    results = [record.outcome.results for record in records if record.outcome.results is not None]
    scores = {(record.run.task, record.run.seed): found["score"] for record, found in zip(records, results)}
    whole = [s for s in dict.fromkeys(seed for _, seed in scores) if all((task, s) in scores for task in tasks)]
    means = [statistics.fmean(scores[task, seed] for task in tasks) for seed in whole]
    times = [found["step_time_ms"] for found in results if found["step_time_ms"] is not None]
    found_tasks = {task: [v for (t, _), v in scores.items() if t == task] for task in tasks}
    return MethodSummary(
        method=name,
        parameters=max(found["trainable_parameters"] for found in results),
        sizes=_sizes(records[0]),
        by_task={task: interval(values) for task, values in found_tasks.items() if values},
        mean=interval(means) if means else None,
        scores=scores,
        step_time_ms=statistics.median(times) if times else None,
        rates={record.run.task: record.run.rates for record in records},
    )


def _sizes(record: Record) -> dict[str, int]:
    """The sizes of a trained adapter, from its saved configuration."""
    file = RunFolder(record.outcome.folder).adapter / "adapter_config.json"
    saved = json.loads(file.read_text(encoding="utf-8"))
    known = METHODS[record.run.method].settable
    return {name: saved[name] for name in SIZES if saved.get(name) and (name != "space_dim" or name in known)}


def csv_text(records: Sequence[Record]) -> str:
    """One line a run; scores as fractions, times in milliseconds and seconds, memory in bytes."""
    columns = (
        "sweep", "value", "task", "method", "model", "seed", "learning_rate", "low_rank_learning_rate", "chosen",
        "status", "metric", "validation", "score", "majority", "trainable_parameters", "step_time_ms",
        "train_seconds", "peak_memory_bytes", "steps", "best_step", "train_rows", "test_rows", "error", "folder",
    )  # fmt: skip
    file = io.StringIO()
    writer = csv.DictWriter(file, columns, lineterminator="\n", extrasaction="ignore")
    writer.writeheader()
    for record in records:
        run, found = record.run, record.outcome.results or {}
        rows = found.get("rows", {})
        writer.writerow(
            {
                **found,
                "sweep": run.sweep,
                "value": run.value,
                "task": run.task,
                "method": run.method,
                "model": run.config.model.name_or_path,
                "seed": run.seed,
                "learning_rate": run.rates[0],
                "low_rank_learning_rate": run.rates[1] if METHODS[run.method].has_two_rates else None,
                "chosen": record.chosen,
                "status": "failed" if record.outcome.results is None else "finished",
                "validation": found.get("best_validation"),
                "train_rows": rows.get("train"),
                "test_rows": rows.get("test"),
                "error": record.outcome.error,
                "folder": run.folder.name,
            }
        )
    return file.getvalue()


def markdown(records: Sequence[Record], settings: Sequence[Setting], command: str) -> str:
    """The whole comparison as one page."""
    parts = ["# Comparison", f"```sh\n{command}\n```", _about(records)]
    for setting in settings:
        parts += [
            f"## {setting.title}",
            setting.rows and f"Rows: {setting.rows}.",
            _table(*scores_table(setting)),
            _tests_table(setting),
        ]
    parts += ["## Learning rates, chosen on validation", _rates_table(settings)]
    failed = [record for record in records if record.outcome.results is None]
    if failed:
        lines = [
            f"* {record.run.description}: {record.outcome.error} (`{record.run.folder.name}`)" for record in failed
        ]
        parts += [f"## {len(failed)} of {len(records)} runs failed", "\n".join(lines)]
    return "\n\n".join(filter(None, parts)) + "\n"


def _about(records: Sequence[Record]) -> str:
    found = [record.outcome.results for record in records if record.outcome.results is not None]
    if not found:
        return "No run has finished."
    versions = ", ".join(f"{name} {version}" for name, version in found[-1]["versions"].items() if version)
    machine = ", ".join(f"{name} {value}" for name, value in found[-1]["hardware"].items() if value)
    seeds = ", ".join(map(str, dict.fromkeys(record.run.seed for record in records)))
    return (
        f"Scores are the task's first metric on the test split in percent, mean ± half of the 95 % interval (t) over "
        f"the seeds {seeds}, all that finished. Learning rates are chosen on the validation split. The step time is a "
        f"median and includes no evaluation. Versions: {versions}. Machine: {machine}."
    )


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def scores_table(setting: Setting) -> tuple[list[str], list[list[str]]]:
    """Header and rows of a setting's table: scores in percent, with their intervals."""
    header = ["method", "parameters", "sizes", *setting.tasks, "mean", "step (ms)"]
    rows = []
    for m in setting.methods:
        cells = [_cell(m.by_task.get(task), setting.seeds) for task in setting.tasks]
        sizes = " ".join(f"{_SHORT[name]}={value}" for name, value in m.sizes.items())
        mean = _cell(m.mean, setting.seeds)
        time = "-" if m.step_time_ms is None else f"{m.step_time_ms:,.1f}"
        rows.append([METHODS[m.method].title, f"{m.parameters:,}", sizes, *cells, mean, time])
    rows += [[METHODS[name].title, "", "", *(["failed"] * (len(setting.tasks) + 1)), ""] for name in setting.failed]
    return header, rows


def _cell(found: Interval | None, seeds: int) -> str:
    """A score, with the number of seeds where not all finished."""
    if found is None:
        return "failed"
    return found.text() + ("" if found.n == seeds else f" ({found.n} of {seeds} seeds)")


_SHORT = {"num_virtual_tokens": "s", "r": "r", "num_spaces": "K", "space_dim": "h"}


def _tests_table(setting: Setting) -> str:
    rows = [
        [
            f"{METHODS[test.first].title} − {METHODS[test.second].title}",
            test.difference.text(),
            "-" if test.p is None else f"{test.p:.3f}",
            str(test.difference.n),
        ]
        for test in setting.tests
    ]
    if not rows:
        return ""
    return "Paired t-test over the pairs (task, seed):\n\n" + _table(
        ["difference", "points", "p (two-sided)", "n"], rows
    )


def _rates_table(settings: Sequence[Setting]) -> str:
    rows = [
        [s.title, task, method.title, f"{first:g}", f"{second:g}" if method.has_two_rates else "-"]
        for s in settings
        for m in s.methods
        for method in [METHODS[m.method]]
        for task, (first, second) in m.rates.items()
    ]
    return _table(["setting", "task", "method", "of the prompt", "of all else"], rows)


def as_json(records: Sequence[Record], settings: Sequence[Setting]) -> dict[str, Any]:
    """The same for machines; scores as fractions."""

    def shown(found: Interval | None) -> dict[str, Any] | None:
        return None if found is None else {"mean": found.mean, "half_width": found.half_width, "n": found.n}

    return {
        "settings": [
            {
                "sweep": s.sweep,
                "value": s.value,
                "methods": [
                    {
                        "method": m.method,
                        "parameters": m.parameters,
                        "sizes": m.sizes,
                        "tasks": {task: shown(found) for task, found in m.by_task.items()},
                        "mean": shown(m.mean),
                        "scores": [{"task": t, "seed": seed, "score": v} for (t, seed), v in m.scores.items()],
                        "step_time_ms": m.step_time_ms,
                        "learning_rates": {task: list(rates) for task, rates in m.rates.items()},
                    }
                    for m in s.methods
                ],
                "tests": [
                    {"first": t.first, "second": t.second, "difference": shown(t.difference), "p": t.p} for t in s.tests
                ],
            }
            for s in settings
        ],
        "runs": len(records),
        "failed": [
            {"run": r.run.description, "error": r.outcome.error, "folder": str(r.run.folder)}
            for r in records
            if r.outcome.results is None
        ],
    }


def write_tables(folder: Path, records: Sequence[Record], settings: Sequence[Setting], command: str) -> list[Path]:
    """Writes `comparison.csv` and `comparison.md`; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    table, page = folder / "comparison.csv", folder / "comparison.md"
    write_atomically(table, csv_text(records))
    write_atomically(page, markdown(records, settings, command))
    return [table, page]
