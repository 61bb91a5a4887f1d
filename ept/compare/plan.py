"""The runs of a comparison: listing and executing them, and choosing learning rates on validation.

Every run has its own folder, named after the run and a hash of its configuration: a finished run is skipped, an
interrupted one resumes, and a changed configuration makes another run. Files and folders are identified by where they
are, however their paths are written.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import json
import logging
import os
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ..runs.config import RunConfig
from ..runs.folder import RunFolder, identity, read_config, with_whole_paths
from ..runs.method_table import METHODS
from ..runs.processes import world_size
from .config import SWEPT, ComparisonConfig, rates_of
from .execute import Outcome, run_all

logger = logging.getLogger(__name__)

Rates = tuple[float, float]
"""Learning rates: of the prompt, and of everything else."""
Group = tuple[str | None, Any, str, str]
"""Sweep, its value, task, method: the runs that differ only in seed and learning rates."""


def in_words(sweep: str | None, value: Any) -> str:
    """Writes a varied setting as on a command line; empty for the base configuration."""
    return "" if sweep is None else f"{sweep}={value}"


@dataclass(frozen=True)
class PlannedRun:
    """One run; `sweep` and `value` are None for the base configuration, without any sweep."""

    method: str
    task: str
    sweep: str | None
    value: Any
    seed: int
    rates: Rates
    config: RunConfig

    @property
    def folder(self) -> Path:
        return Path(str(self.config.output_dir))

    @property
    def group(self) -> Group:
        return (self.sweep, self.value, self.task, self.method)

    @property
    def setting(self) -> str:
        return in_words(self.sweep, self.value)

    @property
    def description(self) -> str:
        rates = f"lr {self.rates[0]:g}" + (f"/{self.rates[1]:g}" if METHODS[self.method].has_two_rates else "")
        return " ".join(filter(None, (self.method, self.task, self.setting, rates, f"seed {self.seed}")))


@dataclass(frozen=True)
class Record:
    """A planned run with its outcome. `chosen`: its learning rates are the best of its group on validation."""

    run: PlannedRun
    outcome: Outcome
    chosen: bool = False


def plan(config: ComparisonConfig, seeds: Iterable[int] | None = None) -> list[PlannedRun]:
    """Lists all runs of the comparison for `seeds` (None: those of the learning-rate search), in order.

    A sweep leaves out methods to which its key does not apply (such as `r` for prompt tuning).

    Raises:
        ValueError: the output folder, the task or the data is not set, or a swept value does not fit its key.
    """
    compare = config.compare
    if config.output_dir is None:
        raise ValueError("output_dir is not set: give --output DIR")
    tasks = compare.tasks or [config.data.name]
    if not compare.tasks and config.data.task is None and not config.data.is_local:
        raise ValueError("no task: set compare.tasks (see `ept tasks`), or the section data as for `ept train`")
    points: list[tuple[str | None, Any]] = [(None, None)] if config.model.name_or_path or not compare.sweep else []
    points += [(name, value) for name, values in compare.sweep.items() for value in values]
    default = (config.training.learning_rate, config.training.low_rank_learning_rate)
    seeds = search_seeds(config) if seeds is None else seeds
    runs, earlier = [], functools.cache(functools.partial(earlier_runs, runs_folder(config)))
    for (sweep, value), task, seed, method in itertools.product(points, tasks, seeds, compare.methods):
        section, _, key = SWEPT[sweep].partition(".") if sweep else ("", "", "")
        if section == "method" and key not in METHODS[method].settable | {"budget"}:
            continue
        for rates in rates_of(compare, method, default):
            run_config = _run_config(config, method, task, sweep, value, seed, rates, earlier)
            runs.append(PlannedRun(method, task, sweep, value, seed, rates, run_config))
    return runs


def search_seeds(config: ComparisonConfig) -> list[int]:
    return config.compare.seeds[: config.compare.learning_rate_seeds or len(config.compare.seeds)]


def _run_config(
    config: ComparisonConfig,
    method: str,
    task: str,
    sweep: str | None,
    value: Any,
    seed: int,
    rates: Rates,
    earlier: Callable[[], dict[str, Path]],
) -> RunConfig:
    values = config.to_dict()
    values.pop("compare")
    known = METHODS[method].settable
    given = {name: setting for name, setting in config.method.fields_given().items() if name in known}
    values["method"] = {"name": method, **config.method.model_dump(include={"budget", "budget_kind"}), **given}
    if config.compare.tasks or config.data.task is not None:
        values["data"]["task"] = task
        if config.data.data_dir is not None:
            root = Path(config.data.data_dir)
            own = root / task
            if not own.is_dir() and len(config.compare.tasks) > 1:
                raise ValueError(
                    f"data.data_dir={root} has no folder {task}: one folder per task is needed, such as {own}"
                )
            values["data"]["data_dir"] = str(
                own if own.is_dir() else root
            )  # with a single task, its own folder will do
    if sweep == "model" and value != config.model.name_or_path:
        values["model"].update(gguf_file=None, revision=None, tokenizer_name_or_path=None)
    elif sweep is None and config.model.name_or_path is None:
        raise ValueError("model.name_or_path is not set: give a model folder or hub name, or compare.sweep.model")
    if sweep is not None:
        section, _, key = SWEPT[sweep].partition(".")
        values[section][key] = value
    if values["model"]["name_or_path"] is None:  # another sweep, while the models are one too
        values["model"]["name_or_path"] = config.compare.sweep["model"][0]
    values["training"].update(learning_rate=rates[0], low_rank_learning_rate=rates[1])
    values.update(seed=seed, output_dir=None)
    resolved = with_whole_paths(values, os.path.realpath)
    digest = hashlib.sha256(json.dumps(resolved, sort_keys=True).encode()).hexdigest()[:10]
    name = f"{task.replace('/', '_')}-{method}-seed{seed}-{digest}"
    folder = runs_folder(config) / name
    if not folder.exists() and (found := earlier()):
        folder = found.get(identity_of(values), folder)
    return RunConfig.from_dict({**with_whole_paths(values), "output_dir": str(folder)})


def runs_folder(config: ComparisonConfig) -> Path:
    return Path(str(config.output_dir)) / "runs"


def earlier_runs(folder: Path) -> dict[str, Path]:
    """Finds the runs in `folder` by their configurations: an earlier release named folders differently."""
    found = {}
    for path in sorted(folder.glob("*/config.yaml")):
        with contextlib.suppress(OSError, ValueError, yaml.YAMLError):  # a damaged one is no run
            found[identity_of(read_config(path))] = path.parent
    return found


def identity_of(values: dict[str, Any]) -> str:
    return json.dumps(identity(values, RunConfig().to_dict()), sort_keys=True)


def compare(config: ComparisonConfig, report: Callable[[str], None] = lambda line: None) -> list[Record]:
    """Executes every unfinished run; returns all of them in the order of the plan.

    A run that fails is recorded as such and does not stop the others; it is tried again next time.

    Args:
        report: called with a line about each finished run.

    Raises:
        ValueError: a launcher has started more than one process.
        OSError: the output folder can be neither written to nor created.
    """
    if world_size() > 1:
        raise ValueError(
            "`ept compare` is a single process, but a launcher has started several: start it without the launcher; "
            "--jobs N carries out N runs side by side"
        )
    from ..runs.failures import check_writable  # imports torch, which a plan does not need

    searched, outcomes = plan(config), dict[Path, Outcome]()
    check_writable(Path(str(config.output_dir)))

    def carry_out(runs: list[PlannedRun]) -> None:
        check_rows(runs)
        folders = {run.folder: run for run in runs}  # two points of the comparison may be the same run
        waiting = {folder: run for folder, run in folders.items() if folder not in outcomes and not finished(run)}
        for folder in folders.keys() - outcomes.keys() - waiting.keys():
            outcomes[folder] = Outcome.of(folder)
        if done := len(folders) - len(waiting):
            report(f"{done} of {len(folders)} runs are finished already")
        if min(config.compare.jobs, len(waiting)) > 1:
            report(f"{len(waiting)} runs, side by side: metrics.jsonl in each run's folder shows its progress")
        jobs = [run.config.to_dict() for run in waiting.values()]
        for number, outcome in enumerate(run_all(jobs, config.compare), start=1):
            outcomes[outcome.folder] = outcome
            report(f"[{number}/{len(waiting)}] {waiting[outcome.folder].description}: {outcome.summary}")

    carry_out(searched)
    best = best_rates(searched, outcomes)
    rest = plan(config, [seed for seed in config.compare.seeds if seed not in search_seeds(config)])
    rest = [run for run in rest if run.rates == best.get(run.group)]
    carry_out(rest)
    return [Record(run, outcomes[run.folder], run.rates == best.get(run.group)) for run in [*searched, *rest]]


def check_rows(runs: Iterable[PlannedRun]) -> None:
    """Raises `ValueError` if a run in its folder was made from other rows than its data now hold.

    If the data are gone or out of reach, all runs of a task must at least have been made from the same rows.
    """
    from ..runs.data import FILES, read_splits, row_checksums  # imports transformers, which a plan does not need

    now: dict[str, dict[str, str]] = {}
    for run in runs:
        if not RunFolder(run.folder).splits.is_file():
            continue
        made_of = {split["from"]: split["sha256"] for split in read_splits(run.folder).values()}
        data = run.config.data.model_dump_json(include={"task", "hub", "data_dir", "encoding", *FILES})
        if data not in now:
            try:
                now[data] = row_checksums(run.config.data)
            except OSError as error:  # includes FileNotFoundError and ConnectionError
                logger.warning("%s; the rows of its runs are not checked", error)
                now[data] = made_of
        if not made_of.items() <= now[data].items():
            raise ValueError(
                f"{run.folder} was made with other rows of {run.task} than the current ones: give another output "
                "folder, or remove the runs with the old rows"
            )


def finished(run: PlannedRun) -> bool:
    return RunFolder(run.folder).results.is_file()


def best_rates(runs: list[PlannedRun], outcomes: dict[Path, Outcome]) -> dict[Group, Rates]:
    """Chooses each group's learning rates, with the best mean validation score; the first if tied.

    Rates that failed with a seed are ignored, unless all did.
    """
    scores: dict[Group, dict[Rates, list[float | None]]] = {}
    for run in runs:
        results = outcomes[run.folder].results or {"best_validation": None}
        scores.setdefault(run.group, {}).setdefault(run.rates, []).append(results["best_validation"])
    best = {}
    for group, by_rates in scores.items():
        whole = {rates: found for rates, found in by_rates.items() if None not in found} or by_rates
        known = {rates: [score for score in found if score is not None] for rates, found in whole.items()}
        if means := {rates: statistics.fmean(found) for rates, found in known.items() if found}:
            best[group] = max(means, key=means.__getitem__)
    return best
