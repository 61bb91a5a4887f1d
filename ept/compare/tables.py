"""Tables of a comparison's results: means with intervals, and paired tests between methods."""

from __future__ import annotations

import itertools
import json
import math
import statistics
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..runs.evaluation import standard_error
from ..runs.folder import RunFolder
from ..runs.method_table import METHODS
from ..tasks.metrics import metric_name
from ..utils.environment import CUDA_ALLOCATED
from ..utils.files import json_record, write_atomically
from ..utils.tables import csv_text
from ..utils.tables import markdown as table
from .plan import Group, Rates, Record, in_words
from .progress import Curve, curve_of, mean_curve, steps_table

CONFIDENCE = 0.95
SIZES = {
    **{"num_virtual_tokens": "s", "r": "r", "num_spaces": "K", "space_dim": "h"},
    **{"prompt_rank": "n", "residual_dim": "width"},
}
"""Sizes of an adapter: their names in its configuration, and in the tables."""

TEST_COLUMNS = ["difference", "points", "p", "n", "p of the tasks"]

Scores = Mapping[tuple[str, int], float]
"""Score by (task, seed)."""


@dataclass(frozen=True)
class Interval:
    """Mean of `n` values and half the width of its 95 % interval by Student's t.

    For a single value the interval is over the rows on which it was scored (`of_rows`), or None if their number is
    unknown.
    """

    mean: float
    half_width: float | None
    n: int
    of_rows: bool = False

    def text(self) -> str:
        """Formats it in percent, as in papers."""
        if self.half_width is None:
            return f"{100 * self.mean:.1f}"
        return f"{100 * self.mean:.1f} ± {100 * self.half_width:.1f}" + (" (rows)" if self.of_rows else "")


def interval(values: Sequence[float], error: float | None = None) -> Interval:
    """Computes mean and interval. Raises statistics.StatisticsError for no values.

    Args:
        error: standard error of a single value, over the rows on which it was scored.
    """
    from scipy.stats import norm, t

    mean, n = statistics.fmean(values), len(values)
    if n < 2:
        half = None if error is None else float(norm.ppf((1 + CONFIDENCE) / 2)) * error
        return Interval(mean, half, n, of_rows=half is not None)
    quantile = float(t.ppf((1 + CONFIDENCE) / 2, n - 1))
    return Interval(mean, quantile * statistics.stdev(values) / math.sqrt(n), n)


@dataclass(frozen=True)
class PairedTest:
    """Paired t-test of two methods over the `n` pairs (task, seed) that both have; `p` is two-sided.

    `p_of_tasks` is that of the task means, which are independent of each other, unlike the pairs of one task. Each is
    None if undefined: fewer than two pairs, or all differences equal.
    """

    first: str
    second: str
    difference: Interval
    p: float | None
    p_of_tasks: float | None = None

    def row(self, name: Callable[[str], str] = str) -> list[str]:
        """Formats it as a row of `TEST_COLUMNS`; `name` formats the methods' names."""
        ps = ["-" if p is None else f"{p:.3f}" if p >= 0.0005 else "< 0.001" for p in (self.p, self.p_of_tasks)]
        names = f"{name(self.first)} − {name(self.second)}"
        return [names, self.difference.text(), ps[0], str(self.difference.n), ps[1]]


def paired_test(first: str, one: Scores, second: str, other: Scores) -> PairedTest | None:
    """Tests the difference `one` − `other` over their common pairs; None if there are none."""
    common = sorted(set(one) & set(other))
    if not common:
        return None
    differences = {key: one[key] - other[key] for key in common}
    by_task = [
        statistics.fmean(differences[key] for key in keys) for _, keys in itertools.groupby(common, lambda key: key[0])
    ]
    found = list(differences.values())
    return PairedTest(first, second, interval(found), _p_of(found), _p_of(by_task))


def _p_of(differences: Sequence[float]) -> float | None:
    from scipy.stats import ttest_1samp

    has_spread = max(differences) - min(differences) > 1e-12  # a single difference has none
    return float(ttest_1samp(differences, 0.0).pvalue) if has_spread else None


@dataclass(frozen=True)
class MethodSummary:
    """A method at one setting, over the runs with its chosen learning rates.

    `stored` counts what a saved adapter holds, `parameters` what was trained, heads included. `mean` averages each
    seed's mean over the tasks, for the seeds that have a score on every task.
    """

    method: str
    stored: int
    parameters: int
    sizes: dict[str, list[int]]
    """Several if the tasks' longest texts differ, because a budget has to cover them."""
    tasks: dict[str, Interval]
    mean: Interval | None
    scores: Scores
    step_time_ms: float | None
    """The median over the runs; None if a task has none. The same holds for the curve, which is then empty."""
    learning_rates: dict[str, tuple[float, float]]
    constant: int = 0
    """Number of runs that ended with one answer for all rows."""
    curve: Curve = field(default_factory=dict)
    """The mean validation score at each step at which all runs were scored."""


@dataclass(frozen=True)
class Setting:
    """All methods at one point of the comparison; `sweep` is None for the base configuration."""

    sweep: str | None
    value: Any
    tasks: list[str]
    methods: list[MethodSummary]
    tests: list[PairedTest]
    failed: list[str]
    """Methods without a finished run."""
    seeds: int
    rows: str
    """Metric and number of rows of each task, in words."""
    majority: dict[str, float] = field(default_factory=dict)
    """The score of always giving the commonest train label, by task, on the rows of the methods' scores."""

    @property
    def title(self) -> str:
        return in_words(self.sweep, self.value) or "The configuration itself"


def summarise(records: Sequence[Record]) -> list[Setting]:
    """Makes an entry for each point of the comparison, in the order of the runs; failed runs are left out."""
    points: dict[tuple[str | None, Any], list[Record]] = {}
    for record in records:
        points.setdefault((record.run.sweep, record.run.value), []).append(record)
    settings = []
    for (sweep, value), group in points.items():
        tasks = list(dict.fromkeys(record.run.task for record in group))
        kept = [record for record in group if record.chosen and record.outcome.results]
        by_method: dict[str, list[Record]] = {}
        for record in kept:
            by_method.setdefault(record.run.method, []).append(record)
        methods = [_method(name, found, tasks) for name, found in by_method.items()]
        pairs = itertools.combinations(methods, 2)
        found_tests = (paired_test(a.method, a.scores, b.method, b.scores) for b, a in pairs)
        failed = [name for name in dict.fromkeys(record.run.method for record in group) if name not in by_method]
        rows = dict.fromkeys(
            f"{found['task']} ({metric_name(found['metric'], [*found.get('by_label', ())])}): "
            + ", ".join(f"{count:,} {split}" for split, count in found["rows"].items())
            for record in kept
            if (found := record.outcome.results)
        )
        seeds = len({record.run.seed for record in group})
        majority = {record.run.task: found["majority"] for record in kept if (found := record.outcome.results)}
        tests = [*filter(None, found_tests)]
        settings.append(Setting(sweep, value, tasks, methods, tests, failed, seeds, "; ".join(rows), majority))
    return settings


def seed_means(scores: Scores, tasks: Collection[str]) -> dict[int, float]:
    """Computes, for each seed that has a score on all tasks, the mean over them."""
    seeds = dict.fromkeys(seed for _, seed in scores)
    return {
        seed: statistics.fmean(scores[task, seed] for task in tasks)
        for seed in seeds
        if all((task, seed) in scores for task in tasks)
    }


def _method(name: str, records: Sequence[Record], tasks: Sequence[str]) -> MethodSummary:
    results = {(r.run.task, r.run.seed): r.outcome.results for r in records if r.outcome.results}
    scores = {key: found["score"] for key, found in results.items()}
    by_task = {task: [score for (t, _), score in scores.items() if t == task] for task in tasks}
    means = seed_means(scores, tasks)
    errors: dict[tuple[str, int], float] = {
        key: standard_error(found["metric"], found["score"], found["rows"]["test"]) for key, found in results.items()
    }
    by_rows = {task: next((error for (t, _), error in errors.items() if t == task), None) for task in tasks}
    of_mean = math.hypot(*(errors[task, seed] for task in tasks for seed in [*means][:1])) / len(tasks)
    times = [found["step_time_ms"] for found in results.values() if found["step_time_ms"] is not None]
    adapters = [RunFolder(record.outcome.folder).adapter / "adapter_config.json" for record in records]
    saved, known = [json.loads(file.read_text(encoding="utf-8")) for file in adapters], METHODS[name].settable
    sizes = {size: [*dict.fromkeys(config[size] for config in saved if config.get(size))] for size in SIZES}
    curves: dict[str, list[Curve]] = {}
    for record in records:
        if record.outcome.results:
            curve = curve_of(record.outcome.folder, record.outcome.results["metric"])
            curves.setdefault(record.run.task, []).append(curve)
    is_whole = len(curves) == len(tasks)  # tasks differ in length and score, so some of them say nothing about all
    return MethodSummary(
        method=name,
        stored=max(found["stored_parameters"] for found in results.values()),
        parameters=max(found["trainable_parameters"] for found in results.values()),
        sizes={size: found for size, found in sizes.items() if found and (size != "space_dim" or size in known)},
        tasks={task: interval(values, by_rows[task]) for task, values in by_task.items() if values},
        mean=interval([*means.values()], of_mean) if means else None,
        scores=scores,
        step_time_ms=statistics.median(times) if times and is_whole else None,
        learning_rates={record.run.task: record.run.rates for record in records},
        constant=sum(found["constant"] for found in results.values()),
        curve=mean_curve(curves) if is_whole else {},
    )


def write_tables(folder: Path, records: Sequence[Record], settings: Sequence[Setting], command: str) -> list[Path]:
    """Writes `comparison.csv`, `comparison.md` and `comparison.json`; returns their paths.

    The first has a line for each run: scores as fractions, times in milliseconds and seconds, a CUDA device's memory in
    bytes. The last has the result of `as_json`, with command, versions and hardware.
    """
    columns = (
        "sweep", "value", "task", "method", "model", "seed", "learning_rate", "low_rank_learning_rate", "chosen",
        "status", "metric", "validation", "score", "majority", "stored_parameters", "trainable_parameters",
        "step_time_ms",
        "train_seconds", "peak_memory_bytes", "steps", "best_step", "train_rows", "test_rows", "error", "folder",
    )  # fmt: skip
    lines = []
    for record in records:
        run, found = record.run, record.outcome.results or {}
        rows = found.get("rows", {})
        values = {
            "model": run.config.model.name_or_path,
            "learning_rate": run.rates[0],
            "low_rank_learning_rate": run.rates[1] if METHODS[run.method].has_two_rates else None,
            "chosen": record.chosen,
            "status": "finished" if found else "failed",
            "validation": found.get("best_validation"),
            # The memory of a process itself is the maximum over all runs that it has executed.
            "peak_memory_bytes": found["peak_memory_bytes"]
            if found.get("peak_memory_kind") == CUDA_ALLOCATED
            else None,
            "train_rows": rows.get("train"),
            "test_rows": rows.get("test"),
            "error": record.outcome.error,
            "folder": run.folder.name,
        }
        lines.append({**found, **vars(run), **values})
    folder.mkdir(parents=True, exist_ok=True)
    about = next(({name: found[name] for name in ("versions", "hardware")} for found in _finished(records)), {})
    contents = {
        "comparison.csv": csv_text(columns, lines),
        "comparison.md": markdown(records, settings, command),
        "comparison.json": json_record({"command": command, **about, **as_json(records, settings)}, indent=1),
    }
    for name, content in contents.items():
        write_atomically(folder / name, content)
    return [folder / name for name in contents]


def _finished(records: Sequence[Record]) -> list[dict[str, Any]]:
    return [record.outcome.results for record in records if record.outcome.results]


def _each_once(records: Sequence[Record], name: str) -> list[dict[str, Any]]:
    """Lists the versions or machines of the runs, several if a comparison was continued elsewhere."""
    found = [results[name] for results in _finished(records)]
    return [one for place, one in enumerate(found) if one not in found[:place]]


def markdown(records: Sequence[Record], settings: Sequence[Setting], command: str) -> str:
    """Writes the whole comparison as one page."""
    about = "No run has finished."
    if _finished(records):
        versions, machines = (
            "; ".join(", ".join(f"{name} {value}" for name, value in one.items() if value) for one in each)
            for each in (_each_once(records, "versions"), _each_once(records, "hardware"))
        )
        seeds = ", ".join(map(str, dict.fromkeys(record.run.seed for record in records)))
        about = (
            f"Scores are the task's first metric on the test split in percent, mean ± half of the 95 % interval (t) "
            f"over the seeds {seeds}, all that finished; of a single run (rows) that of its test rows. `one answer` "
            f"counts the runs that gave one answer to all rows. Learning rates are chosen on the validation split. The "
            f"step time is a median and includes no evaluation. Versions: {versions}. Machine: {machines}."
        )
    parts = ["# Comparison", f"```sh\n{command}\n```", about]
    for setting in settings:
        parts += [f"## {setting.title}", setting.rows and f"Rows: {setting.rows}.", table(*scores_table(setting))]
        if setting.tests:
            rows = [test.row(lambda method: METHODS[method].title) for test in setting.tests]
            parts += [
                "Paired t-test, two-sided, over the n pairs (task, seed), and over the means of the tasks; no p is "
                "corrected for their number:",
                table(TEST_COLUMNS, rows),
            ]
        if steps := steps_table(setting.methods):
            parts += [
                "Steps, by the mean score on validation, on straight lines between the evaluations:",
                table(*steps),
            ]
    parts += [
        "## Learning rates, chosen on validation",
        "`behind` is the difference from the chosen ones over the seeds that both have, `share` what is reached of "
        "their score; the best of several are lucky.",
        table(*rates_table(records)),
    ]
    failed = [record for record in records if not record.outcome.results]
    if failed:
        lines = [f"* {r.run.description}: {r.outcome.error} (`{r.run.folder.name}`)" for r in failed]
        parts += [f"## {len(failed)} of {len(records)} runs failed", "\n".join(lines)]
    return "\n\n".join(filter(None, parts)) + "\n"


def rates_table(records: Sequence[Record]) -> tuple[list[str], list[list[str]]]:
    """Returns header and rows of the learning rates that were tried, with validation scores in percent."""
    groups: dict[Group, dict[Rates, dict[int, float]]] = {}  # by seed
    chosen: dict[Group, Rates] = {}
    for record in records:
        run, found = record.run, record.outcome.results
        if found and found["best_validation"] is not None:
            groups.setdefault(run.group, {}).setdefault(run.rates, {})[run.seed] = found["best_validation"]
            chosen |= {run.group: run.rates} if record.chosen else {}
    rows = []
    for (sweep, value, task, name), tried in groups.items():
        best = chosen.get((sweep, value, task, name))
        for rates, scores in tried.items():
            pairs = [(tried[best][seed], score) for seed, score in scores.items() if best and seed in tried[best]]
            total = math.fsum(first for first, _ in pairs)
            behind = interval([first - score for first, score in pairs]).text() if pairs else ""
            rows.append(
                [
                    in_words(sweep, value),
                    *(task, METHODS[name].title),
                    *(f"{rates[0]:g}", f"{rates[1]:g}" if METHODS[name].has_two_rates else "-"),
                    interval([*scores.values()]).text(),
                    "chosen" if rates == best else behind,
                    f"{math.fsum(score for _, score in pairs) / total:.3f}" if total > 0 else "",
                ]
            )
    header = ["setting", "task", "method", "of the prompt", "of all else", "on validation", "behind", "share"]
    return header, rows


def scores_table(setting: Setting) -> tuple[list[str], list[list[str]]]:
    """Returns header and rows of a setting's table: scores in percent, with intervals."""

    def cell(found: Interval | None) -> str:
        if found is None:
            return "failed"
        return found.text() + ("" if found.n == setting.seeds else f" ({found.n} of {setting.seeds} seeds)")

    header = ["method", "stored", "trained", "sizes", *setting.tasks, "mean", "one answer", "step (ms)"]
    rows = [
        [
            METHODS[m.method].title,
            f"{m.stored:,}",
            f"{m.parameters:,}",
            " ".join(f"{SIZES[name]}={'/'.join(map(str, values))}" for name, values in m.sizes.items()),
            *(cell(m.tasks.get(task)) for task in setting.tasks),
            cell(m.mean),
            f"{m.constant} of {len(m.scores)}",
            "-" if m.step_time_ms is None else f"{m.step_time_ms:,.1f}",
        ]
        for m in setting.methods
    ]
    failed = ["failed"] * (len(setting.tasks) + 1)
    rows += [[METHODS[name].title, "", "", "", *failed, "", ""] for name in setting.failed]
    if len(setting.majority) == len(setting.tasks):
        shares = [setting.majority[task] for task in setting.tasks]
        cells = [f"{100 * share:.1f}" for share in (*shares, statistics.fmean(shares))]
        rows.append(["commonest label always", "0", "0", "", *cells, "", ""])
    return header, rows


def as_json(records: Sequence[Record], settings: Sequence[Setting]) -> dict[str, Any]:
    """Returns the same in a form for JSON; scores as fractions."""

    described = []
    for setting in settings:
        methods = [asdict(method) for method in setting.methods]
        for method in methods:
            scores = method["scores"].items()
            method["scores"] = [{"task": task, "seed": seed, "score": score} for (task, seed), score in scores]
        tests = [asdict(test) for test in setting.tests]
        described.append({"sweep": setting.sweep, "value": setting.value, "methods": methods, "tests": tests})
    return {
        "settings": described,
        "runs": len(records),
        "failed": [
            {"run": r.run.description, "error": r.outcome.error, "folder": str(r.run.folder)}
            for r in records
            if not r.outcome.results
        ],
    }
