"""Timing and measuring on a CPU: rotation, order, quantiles, memory, wrong versions, and `pytest benchmarks`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import counts, operators, shapes
from benchmarks.problems import Prepared, copies, prepare
from benchmarks.record import ROOT
from benchmarks.timing import SPIN_HERTZ, Clock, DeviceClock, ThreadClock, peak_bytes, ratio, summary, time_in_turn

CEILINGS = operators.Ceilings(1e9, {"float32": 1e9})
TINY = next(case for case in shapes.reduced_cases() if case.kernel == "prompted_embedding")


def test_every_call_takes_the_next_input_set() -> None:
    seen: list[int] = []
    time_in_turn({"a": seen.append}, Clock("cpu"), sets=3, seconds=0.001)
    assert seen[:7] == [0, 1, 2, 0, 1, 2, 0]


def test_outputs_lie_elsewhere_until_all_sets_were_taken() -> None:
    """In one place they would stay in the cache, unlike what a copy writes into rotating tensors."""
    made: list[weakref.ref[Any]] = []
    alive: list[int] = []

    def call(_: int) -> torch.Tensor:
        alive.append(sum(output() is not None for output in made))
        out = torch.empty(8)
        made.append(weakref.ref(out))
        return out

    time_in_turn({"a": call}, Clock("cpu"), sets=3, rounds=4, warmup=1)
    assert alive == [0, 1, 2, 2, 2]
    alive.clear()
    time_in_turn({"a": call}, Clock("cpu"), rounds=4, warmup=1)
    assert alive == [0] * 5


def test_versions_alternate_and_the_slower_one_is_slower() -> None:
    order: list[str] = []

    def sleeper(name: str, seconds: float):
        def call(_: int) -> None:
            order.append(name)
            time.sleep(seconds)

        return call

    calls = {"fast": sleeper("fast", 0.001), "slow": sleeper("slow", 0.01)}
    found = time_in_turn(calls, Clock("cpu"), sets=2, seconds=0.05)
    fast = found["fast"].as_dict()
    assert 0.001 <= fast["p20"] <= fast["median"] <= fast["p80"]
    assert found["slow"].median > 5 * found["fast"].median
    slow = [index for index, name in enumerate(order) if name == "slow"]
    between = [b - a for a, b in zip(slow[-4:], slow[-3:])]
    assert max(between) > 1, "the fast version takes its turns between those of the slow one"


@pytest.mark.parametrize("clock", [Clock("cpu"), ThreadClock("cpu", 3)], ids=["wall", "thread"])
def test_rounds_give_one_sample_each_and_pair_by_pair_a_ratio(clock: Clock) -> None:
    calls = {"a": lambda _: torch.ones(1 << 16).sum(), "b": lambda _: None}
    found = time_in_turn(calls, clock, rounds=6, warmup=1)
    assert [len(timing.samples) for timing in found.values()] == [6, 6]
    assert all(timing.clock == clock.name for timing in found.values())
    assert ratio(found["a"], found["b"])["median"] > 1


class Stream:
    """A device that works through a queue: every call takes it 3 ms, however long the host takes to enqueue it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.free_at = 0.0
        stream = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                self.at = 0.0

            def record(self) -> None:
                self.at = max(stream.free_at, time.perf_counter())

            def query(self) -> bool:
                return time.perf_counter() >= self.at

            def elapsed_time(self, other: Event) -> float:
                return 1e3 * (other.at - self.at)

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: self.enqueue(cycles / SPIN_HERTZ))
        monkeypatch.setattr(torch.cuda, "synchronize", self.wait)
        monkeypatch.setattr(torch.accelerator, "synchronize", self.wait)

    def enqueue(self, seconds: float) -> None:
        self.free_at = max(self.free_at, time.perf_counter()) + seconds

    def wait(self) -> None:
        time.sleep(max(0.0, self.free_at - time.perf_counter()))


def test_on_a_device_its_time_the_hosts_and_both_together_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Stream(monkeypatch)

    def call(_: int) -> None:
        time.sleep(0.001)  # the host's work
        stream.enqueue(0.003)

    timing = time_in_turn({"only": call}, DeviceClock("cuda"), seconds=0.05)["only"]
    assert timing.clock == "device events"
    assert timing.host is not None
    assert timing.call is not None
    assert 0.0029 <= timing.median <= 0.01  # a busy machine leaves gaps
    assert 0.001 <= timing.host < 0.02
    assert timing.call >= 0.003


def test_quantiles_are_those_between_the_samples() -> None:
    assert summary([6.0, 1.0, 2.0, 3.0, 4.0, 5.0]) == {"median": 3.5, "p20": 2.0, "p80": 5.0}


def test_peak_bytes_counts_outputs_and_temporaries_that_live_together() -> None:
    def call(_: int) -> torch.Tensor:
        first = torch.empty(1 << 18)
        second = first + 1  # both live: 2 MiB
        del first
        return second * 2

    assert peak_bytes(call, "cpu") == pytest.approx(2 << 20, rel=0.01)


def prepared(ours) -> Prepared:
    return Prepared({"ours": ours}, 1, counts.Counts(100, 0), reference=lambda: torch.ones(4), tolerance=1e-4)


WRONG = {
    "value": (lambda _: torch.full((4,), 1.1), "relative error 1.0e-01"),
    "nan": (lambda _: torch.full((4,), torch.nan), "relative error nan"),
    "shape": (lambda _: torch.ones(1), "relative error inf"),
    "raises": (lambda _: 1 / 0, "ZeroDivisionError"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_version_is_failed_with_the_reason_and_not_timed(name: str) -> None:
    ours, reason = WRONG[name]
    case = replace(TINY, providers=("ours",))
    (row,) = operators.measure(case, prepared(ours), "cpu", 0.001, CEILINGS)
    assert row["status"] == "failed"
    assert row["reason"].startswith(reason)
    assert "median" not in row


def test_a_right_version_is_held_against_the_ceiling() -> None:
    def ours(_: int) -> torch.Tensor:
        time.sleep(0.001)
        return torch.ones(4)

    case = replace(TINY, providers=("ours", "torch.compile"))
    made = prepared(ours)
    made.skipped["torch.compile"] = "no compiler"
    row, skipped = operators.measure(case, made, "cpu", 0.001, CEILINGS)
    assert row["status"] == "ok"
    assert row["bytes_per_second"] == 100 / row["median"]
    assert row["fraction_of_ceiling"] == pytest.approx(100 / 1e9 / row["median"])
    assert row["bound"] == "memory"
    assert row["backend"] == "reference"
    assert row["repeats_bit_equal"] is True
    assert (skipped["status"], skipped["reason"]) == ("skipped", "no compiler")


def test_an_operator_that_does_not_exist_is_skipped_by_name() -> None:
    case = replace(TINY, kernel="no_such_operator")
    rows = list(operators.measure(case, prepare(case, "cpu"), "cpu", 0.001, CEILINGS))
    assert len(rows) == len(case.providers)
    assert {row["reason"] for row in rows} == {"this version of ept_kernels has no no_such_operator"}


def test_floor_takes_the_larger_of_both_ceilings() -> None:
    assert CEILINGS.floor(1000, 10, "float32") == (1e-6, "memory")
    assert CEILINGS.floor(10, 1000, "float32") == (1e-6, "compute")


@pytest.mark.parametrize(
    "touched, cache, maximum, sets", [(100, 1000, 64, 20), (10**6, 1000, 64, 2), (1, 1000, 64, 64)]
)
def test_input_sets_together_exceed_the_cache(touched: int, cache: int, maximum: int, sets: int) -> None:
    assert copies(touched, cache, maximum) == sets


NEEDED = ("median", "p20", "p80", "bytes", "operations", "fraction_of_ceiling", "peak_bytes", "device", "versions")


def test_a_suite_of_pytest_benchmark_runs_and_its_rows_are_whole(tmp_path: Path) -> None:
    output = tmp_path / "benchmark.json"
    command = [sys.executable, "-m", "pytest", "benchmarks", "-k", "dequantize", "--cases", "reduced", "-q"]
    command += ["-p", "no:cacheprovider", f"--benchmark-json={output}"]
    # pytest-benchmark writes nothing where it takes itself for a worker of this test run.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "kernels against alternatives, cpu (reduced sizes: no figure means anything)" in done.stdout
    rows = [run["extra_info"] for run in json.loads(output.read_text(encoding="utf-8"))["benchmarks"]]
    (case,) = (case for case in shapes.reduced_cases() if case.kernel == "dequantize_4bit")
    assert {row["provider"] for row in rows} == set(case.providers)
    for row in rows:
        assert row["status"] == "ok"
        assert not [name for name in NEEDED if row.get(name) is None]
        assert min(row["median"], row["bytes"], row["peak_bytes"] + (row["provider"] == shapes.COPY)) > 0
