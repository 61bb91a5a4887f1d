"""A comparison's configuration: a run's, with a section `compare` that says what varies.

Imports nothing heavy, so that printing or checking a configuration is instant.
"""

from __future__ import annotations

import difflib
from typing import Any, Literal

from pydantic import Field, model_validator

from ..runs.config import Count, Number, RunConfig, Section, Size
from ..runs.method_table import METHODS, get_method

SWEPT = {
    "model": "model.name_or_path",
    "budget": "method.budget",
    "num_virtual_tokens": "method.num_virtual_tokens",
    "r": "method.r",
    "num_spaces": "method.num_spaces",
    "k_shot": "data.k_shot",
}
"""Name of a sweep: the key of the run's configuration that it varies."""
DEFAULT = "default"

Rates = list[Number] | dict[str, list[Number]] | None


class CompareConfig(Section):
    """Every method × task × seed × learning rate, and every value of each sweep, is one run."""

    methods: list[str] = Field(default_factory=lambda: ["pt", "dept", "ept-token", "ept"])
    """Names as for `method.name`. By default both forms of EPT, DePT and prompt tuning."""
    tasks: list[str] = Field(default_factory=list)
    """Names from `ept tasks`. Empty: the task of the section `data`."""
    seeds: list[Size] = Field(default_factory=lambda: [0, 1, 2])
    """Seeds; every run is repeated with each."""
    learning_rates: Rates = None
    """For the prompt (for PEFT's methods, the whole adapter): one list, or a list per method with `default` for the
    others. The best on validation is reported on test. None: `training.learning_rate` only."""
    low_rank_learning_rates: Rates = None
    """For all other parameters, crossed with `learning_rates`. Ignored for methods without such parameters."""
    learning_rate_seeds: Count | None = None
    """Search the rates with the first N seeds only, and run the others at the best. None: search with all."""
    sweep: dict[str, list[Any]] = Field(default_factory=dict)
    """Settings to vary, one at a time, around the rest of the configuration."""
    executor: Literal["local", "ray"] = "local"
    """Run on this machine, or through Ray, also on a cluster."""
    jobs: Count = 1
    """Number of runs side by side on this machine, each in its own process. They share its cores and GPUs."""
    cpus_per_run: Count = 1
    """For Ray on machines without a GPU. On machines with GPUs every run gets its own."""
    published: bool = False
    """Add published results, marked as such, to the figure of score against parameters."""

    @model_validator(mode="after")
    def _check(self) -> CompareConfig:
        for name in self.methods:
            get_method(name)
        for key in ("methods", "seeds", "tasks"):
            values = getattr(self, key)
            if not values and key != "tasks":
                raise ValueError(f"compare.{key} is empty: name at least one")
            _check_once(key, values)
        if self.jobs > 1 and self.executor == "ray":
            raise ValueError("compare.jobs is for runs on this machine: leave it out, Ray schedules by GPUs and cores")
        if (self.learning_rate_seeds or 1) > len(self.seeds):
            raise ValueError(f"compare.learning_rate_seeds must be 1 .. {len(self.seeds)}, the number of seeds")
        for key in ("learning_rates", "low_rank_learning_rates"):
            rates = getattr(self, key)
            for method, values in rates.items() if isinstance(rates, dict) else [(DEFAULT, rates or [0.1])]:
                if method != DEFAULT:
                    get_method(method)  # of a known method: only some of the methods may be run with the same file
                if not values or min(values) <= 0:
                    raise ValueError(f"compare.{key} of {method} is {values}: give numbers greater than 0")
                _check_once(key, values)
        for name, points in self.sweep.items():
            if name not in SWEPT:
                near = difflib.get_close_matches(name, SWEPT, n=1, cutoff=0.0)[0]
                raise ValueError(f"unknown sweep {name!r}: did you mean {near!r}? Known: {', '.join(SWEPT)}")
            if not points:
                raise ValueError(f"compare.sweep.{name} is empty: give at least one value")
            if None in points:
                raise ValueError(f"compare.sweep.{name} holds null: give a value in its place, or leave it out")
            _check_once(f"sweep.{name}", points)
        return self


def _check_once(key: str, values: list[Any]) -> None:
    if any(value in values[:place] for place, value in enumerate(values)):
        raise ValueError(f"compare.{key} lists a value twice: {values}; remove one")


class ComparisonConfig(RunConfig):
    """A run's configuration, shared by several runs, and the settings in which they differ."""

    compare: CompareConfig = Field(default_factory=CompareConfig)


load_comparison = ComparisonConfig.load


def rates_of(compare: CompareConfig, method: str, default: tuple[float, float]) -> list[tuple[float, float]]:
    """Lists the pairs of learning rates to try for a method: for the prompt, and for everything else."""

    def rates(given: Rates, otherwise: float) -> list[float]:
        named = given if isinstance(given, dict) else {} if given is None else {DEFAULT: given}
        return named.get(method) or named.get(DEFAULT) or [otherwise]

    prompt = rates(compare.learning_rates, default[0])
    others = rates(compare.low_rank_learning_rates if METHODS[method].has_two_rates else None, default[1])
    return [(first, second) for first in prompt for second in others]
