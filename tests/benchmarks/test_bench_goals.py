"""Goals: data that names cases which are measured, and verdicts that cannot be met by accident."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from triton import knobs

from benchmarks import cold, goals, shapes, steps
from benchmarks.goals import GOALS, MET, MISSED, NOT_MEASURED, Goal, judge
from benchmarks.options import VERSIONS
from benchmarks.performance_page import score_rows
from benchmarks.tables import goal_table


def row(case: str, provider: str, median: float, **other: Any) -> dict[str, Any]:
    ok = {"status": "ok", "device_type": "cuda", "reduced": False, "backend": "triton"}
    return {"case": case, "provider": provider, "median": median, **ok, **other}


def pair(case: str, ours: float, peer: float, **other: Any) -> list[dict[str, Any]]:
    return [row(case, "ours", ours, **other), row(case, "bitsandbytes", peer, **other)]


TWICE = Goal("speed", "bitsandbytes", ("a", "b"), "median", of="bitsandbytes", over="ours", at_least=2.0)

VERDICTS = [
    ("nothing measured", [], NOT_MEASURED, None),
    ("all reach it", pair("a", 1, 2) + pair("b", 1, 3), MET, 2.0),
    ("one does not", pair("a", 1, 1.9) + pair("b", 1, 3), MISSED, 1.9),
    ("one of two measured", pair("a", 1, 3), NOT_MEASURED, 3.0),
    ("one measured, a miss", pair("a", 1, 1), MISSED, 1.0),
    ("peer not measured", [row("a", "ours", 1)], NOT_MEASURED, None),
    ("reduced sizes", pair("a", 1, 3, reduced=True) + pair("b", 1, 3, reduced=True), NOT_MEASURED, None),
    ("a rehearsal", pair("a", 1, 3, rehearsal=True) + pair("b", 1, 3, rehearsal=True), NOT_MEASURED, None),
    ("a CPU", pair("a", 1, 3, device_type="cpu") + pair("b", 1, 3, device_type="cpu"), NOT_MEASURED, None),
    ("the reference stood in", pair("a", 1, 3, backend="reference") + pair("b", 1, 3), NOT_MEASURED, 3.0),
    ("handed to a library", pair("a", 1, 3, backend="library") + pair("b", 1, 1), MISSED, 1.0),
    ("nothing says what ran", pair("a", 1, 3, backend=None) + pair("b", 1, 3), NOT_MEASURED, 3.0),
    ("ours failed", pair("a", 1, 3, status="failed") + pair("b", 1, 3), NOT_MEASURED, 3.0),
    ("measured twice", pair("a", 1, 1) + pair("b", 1, 3) + pair("a", 1, 2), MET, 2.0),
    (
        "wrong in what was tuned",
        pair("a", 1, 3) + pair("b", 1, 3) + [row("a", "ours", 1, status="failed")],
        NOT_MEASURED,
        3.0,
    ),
]


@pytest.mark.parametrize("name, rows, status, worst", VERDICTS, ids=[v[0] for v in VERDICTS])
def test_verdict(name: str, rows: list[dict[str, Any]], status: str, worst: float | None) -> None:
    verdict = judge(TWICE, rows)
    assert (verdict.status, verdict.worst) == (status, worst)


def test_at_most_takes_the_largest_as_the_worst() -> None:
    goal = Goal("time", "peer", ("a", "b"), "median", of="ept", over="peft-pt", at_most=0.6)
    rows = [row("a", "ept", 1), row("a", "peft-pt", 2), row("b", "ept", 7), row("b", "peft-pt", 10)]
    verdict = judge(goal, rows)
    assert (verdict.status, verdict.worst, verdict.worst_case) == (MISSED, 0.7, "b")


def test_every_goal_has_one_threshold_and_speaks_of_cases_that_are_measured() -> None:
    works = [work.unit for table, device in (("gpu", "cuda"), ("cpu", "cpu")) for work in steps.works_of(table, device)]
    measured = {case.id for case in shapes.gpu_cases()} | {*works, goals.SCORES, goals.COLD_START, goals.COMPILING}
    for goal in GOALS:
        assert (goal.at_least is None) != (goal.at_most is None), goal.what
        assert goal.cases, goal.what
        assert set(goal.cases) <= measured, goal.what


def test_the_goals_of_a_step_on_a_cpu_hold_like_against_like() -> None:
    """The two steps have the same options, so that only the prompts differ."""
    options = {version.name: replace(version, name="", method="", setting="") for version in VERSIONS}
    held = [goal for goal in GOALS if goal.cases[0].startswith(goals.EVERYTHING)]
    assert [options[goal.of] == options[goal.over] for goal in held] == [True, True]


def test_the_goals_on_products_cover_every_m() -> None:
    numbers = {goal.what: len(goal.cases) for goal in GOALS}
    assert numbers["matmul_4bit, M 1 to 8192"] == 3 * 14
    assert numbers["matmul_4bit, 4096×4096, M 16 to 64"] == 3


def test_cases_of_goals_come_first_and_every_case_once() -> None:
    cases = [case.id for case in shapes.gpu_cases()]
    assert len(cases) == len(set(cases))
    wanted = {identifier for goal in GOALS for identifier in goal.cases} & set(cases)
    assert set(cases[: len(wanted)]) == wanted


def test_a_short_run_on_a_cpu_has_a_case_of_every_kernel() -> None:
    cases = shapes.cpu_cases()
    kernels = {case.kernel for case in cases}
    assert {case.kernel for case in cases[: len(kernels)]} == kernels
    assert len({case.id for case in cases}) == len(cases)


def test_the_table_says_not_measured_where_nothing_was() -> None:
    lines = goal_table([]).splitlines()[2:]
    assert len(lines) == len(GOALS)
    assert all(line.rstrip(" |").endswith(NOT_MEASURED) for line in lines)


def test_every_card_is_judged_by_itself_and_named() -> None:
    case = shapes.GOAL_DEQUANTIZE.id
    rows = pair(case, 1.0, 1.25, device="NVIDIA H100") + pair(case, 1.0, 2.0, device="NVIDIA H200")
    lines = [line for line in goal_table(rows).splitlines() if "4096×4096 " in line and "dequantize" in line]
    cells = [[cell.strip() for cell in line.split("|")][4:7] for line in lines]
    assert cells == [["NVIDIA H100", "1.25 ×", MISSED], ["NVIDIA H200", "2.00 ×", MET]]


def test_no_launches_counted_is_no_goal_met() -> None:
    """A profiler that reports nothing gives None, not a number that would meet a goal of "at most"."""
    launches = next(goal for goal in GOALS if goal.field == "launches")
    rows = [row(case, "ours", 1.0, launches=None) for case in launches.cases]
    assert judge(launches, rows).status == NOT_MEASURED
    assert judge(launches, [{**found, "launches": 9} for found in rows]).status == MET


def test_compiling_is_counted_whole_and_nothing_seen_of_it_meets_no_goal(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0

    def compiles(*_: Any) -> None:
        nonlocal now
        now += 2.0
        knobs.compilation.listener(src=SimpleNamespace(name="rows"), cache_hit=False)

    monkeypatch.setattr(cold, "time", SimpleNamespace(perf_counter=lambda: now))
    monkeypatch.setattr("ept_kernels.library.launcher_of", lambda name: compiles)
    monkeypatch.setattr(knobs.compilation, "listener", None)
    found = {**row(goals.COMPILING, "ours", 1.0), **cold.joint_prompt("cpu")}
    first, other = (goal for goal in GOALS if goal.cases == (goals.COMPILING,))
    assert judge(first, [found]) == (MISSED, 4.0, goals.COMPILING, 1)  # forward and backward
    assert judge(other, [found]).status == MISSED
    unseen = {**found, "compiled": 0, "compile_seconds": 0, "compiled_again": 0}
    assert {judge(goal, [unseen]).status for goal in (first, other)} == {NOT_MEASURED}


def test_a_step_that_the_profiler_saw_nothing_of_is_not_measured() -> None:
    goal = next(goal for goal in GOALS if goal.cases == (goals.T5_STEP,))
    rows = [row(goals.T5_STEP, "ept", 0.5, launches=7), row(goals.T5_STEP, "peft-pt", 1.0)]
    assert judge(goal, rows).status == NOT_MEASURED
    rows[1]["launches"] = 7
    assert judge(goal, rows).status == MET


def test_the_table_shows_a_miss_with_its_number() -> None:
    case = shapes.GOAL_DEQUANTIZE.id
    line = next(text for text in goal_table(pair(case, 1.0, 1.25)).splitlines() if "4096×4096" in text)
    assert "1.25 ×" in line
    assert MISSED in line


def test_a_comparison_is_held_against_the_goals_of_scores() -> None:
    def method(name: str, mean: float, curve: dict[str, float]) -> dict[str, object]:
        return {"method": name, "mean": {"mean": mean}, "curve": curve}

    methods = [
        method("pt", 0.70, {"60": 0.5, "120": 0.6}),
        method("dept", 0.60, {"60": 0.4, "120": 0.5}),
        method("ept", 0.69, {"60": 0.6, "120": 0.7}),
    ]
    test = {"first": "ept", "second": "dept", "p": 0.01, "difference": {"mean": 0.09}}
    tests = [test, {"first": "ept", "second": "pt", "p": 0.9, "difference": {"mean": -0.01}}]
    record = {"hardware": {"gpus": []}, "settings": [{"methods": methods, "tests": tests}]}
    rows = score_rows(record)
    found = {goal.against: judge(goal, rows) for goal in goals.GOALS if goal.cases == (goals.SCORES,)}
    assert {name: verdict.status for name, verdict in found.items()} == {
        "DePT": goals.MET,
        "tuned prompt tuning": goals.MISSED,
        "ULPT": goals.NOT_MEASURED,
        "p": goals.MET,
        "prompt tuning": goals.MET,
    }
    assert found["prompt tuning"].worst == 0.5
    methods[2]["curve"], test["difference"] = {"60": 0.1, "120": 0.2}, {"mean": -0.09}
    above = next(goal for goal in goals.GOALS if goal.field == "p_value")
    assert judge(above, score_rows(record)).status == goals.MISSED  # surely below
    steps = next(goal for goal in goals.GOALS if goal.field == "steps_to_score")
    assert judge(steps, score_rows(record)).status == goals.MISSED  # never reached
