"""The examples run as a reader would run them; the demo's data is split without a text in two splits."""

from __future__ import annotations

import json
import re
import runpy
import shlex
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from checkout import ROOT, run_python

# script, the two numbers that it prints, by how much one is higher, and what else it prints
LEARN = [
    ("quickstart.py", r"loss (?P<high>[\d.]+) -> (?P<low>[\d.]+)", 0.5, "answers [7, 7]"),
    ("layer_alone.py", r"before (?P<low>[\d.]+), after (?P<high>[\d.]+)", 0.1, ""),
]


@pytest.mark.parametrize("script, pattern, gain, other", LEARN)
def test_it_learns(script: str, pattern: str, gain: float, other: str, capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(ROOT / "examples" / script), run_name="__main__")  # here, where the libraries are loaded
    output = capsys.readouterr().out
    found = re.search(pattern, output)
    assert found is not None
    assert float(found["high"]) > float(found["low"]) + gain, output
    assert other in output


def test_demo_explains_itself() -> None:
    shown = run_python(str(ROOT / "examples" / "demo.py"), "--help").stdout
    assert "--steps" in shown
    assert "--method" in shown


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_demo_in_one_line(number: signal.Signals, capsys: pytest.CaptureFixture[str]) -> None:
    before = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)}
    demo = runpy.run_path(str(ROOT / "examples" / "demo.py"))
    main = demo["main"]
    main.__globals__["demo"] = lambda: signal.raise_signal(number)
    try:
        with pytest.raises(SystemExit) as stopped:
            main()
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
    assert stopped.value.code == 128 + number
    assert capsys.readouterr().out == f"stopped by {number.name}\n"


def test_headlines_config_is_valid() -> None:
    from ept.runs.config import load_run_config

    config = load_run_config(ROOT / "examples" / "headlines.yaml")
    assert config.data.label_words == ["no", "yes"]
    assert (config.data.max_test or 0) >= 400, "the demo promises at least 400 held-out headlines"


@pytest.fixture
def headlines_data(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import headlines_data

    yield headlines_data
    sys.modules.pop("headlines_data")


def sample(headline: str, label: str) -> str:
    messages = [{"role": "system", "content": "?"}, {"role": "user", "content": headline}]
    return json.dumps({"input": messages, "ideal": label})


def test_repeated_headlines_are_kept_once_and_contradictions_dropped(headlines_data: Any, tmp_path: Path) -> None:
    lines = [("A  cat", "1"), ("a cat", "1"), ("a dog", "0"), ("A Dog", "1"), ("a dog", "0"), ("a bird", "0")]
    file = tmp_path / "samples.jsonl"
    file.write_text("\n".join(sample(*line) for line in lines), encoding="utf-8")
    assert headlines_data.read_headlines(file) == [
        {"headline": "A  cat", "label": 1},
        {"headline": "a bird", "label": 0},
    ]


def test_a_label_outside_the_set_is_refused(headlines_data: Any, tmp_path: Path) -> None:
    file = tmp_path / "samples.jsonl"
    file.write_text(sample("a cat", "1") + "\n" + sample("a dog", "maybe"), encoding="utf-8")
    with pytest.raises(ValueError, match=r"line 2: the label is 'maybe'"):
        headlines_data.read_headlines(file)


def test_splits_depend_on_seed_and_text_alone(headlines_data: Any, tmp_path: Path) -> None:
    rows = [{"headline": f"headline {number}", "label": number % 2} for number in range(2000)]
    counts = headlines_data.write_splits(rows, tmp_path / "a", seed=3)
    assert headlines_data.write_splits(reversed(rows), tmp_path / "b", seed=3) == counts
    texts: list[str] = []
    for split, count in counts.items():
        lines, again = ((tmp_path / name / f"{split}.jsonl").read_text("utf-8").splitlines() for name in ("a", "b"))
        assert sorted(lines) == sorted(again)
        assert len({*lines}) == count
        texts += [json.loads(line)["headline"] for line in lines]
    assert sum(counts.values()) == len({*texts}) == len(rows)
    assert counts["test"] == pytest.approx(200, abs=60)
    assert counts["validation"] == pytest.approx(100, abs=45)
    split_of = headlines_data.split_of
    assert split_of("Headline  7", 3) == split_of("headline 7", 3)
    assert any(split_of(f"headline {n}", 3) != split_of(f"headline {n}", 4) for n in range(99))


def test_a_missing_package_is_named_with_the_remedy(headlines_data: Any) -> None:
    with pytest.raises(FileNotFoundError, match="no_such_package is not installed: run `make demo`"):
        headlines_data.package_file("no_such_package", "file")


def test_splits_of_the_comparison_share_no_row_and_fresh_ones_test_on_others() -> None:
    script = runpy.run_path(str(ROOT / "examples" / "comparison_data.py"))
    train, validation = ([f"{name} {i}" for i in range(2000)] for name in ("train", "validation"))
    usual, fresh = (
        {task: script[name](task, train, validation) for task in tasks}
        for name, tasks in (("usual", script["TASKS"]), ("fresh", script["FRESH"]))
    )
    for splits in (*usual.values(), *fresh.values()):
        rows = [row for part in splits.values() for row in part]
        assert {*splits} == {"train", "validation", "test"}
        assert len({*rows}) == len(rows), "a row stands in two splits"
    for task in {*usual} & {*fresh}:
        assert not {*usual[task]["test"]} & {*fresh[task]["test"]}


def test_pooled_tests_are_those_that_the_results_page_tells(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script, results = ROOT / "examples" / "pooled_comparisons.py", ROOT / "docs" / "results"
    page = (results / "README.md").read_text("utf-8")
    commands = re.findall(
        r"python \S+pooled_comparisons.py([^`]+?)```\n\n[^`]+?\n\|[-|]+\|\n(.+?)\n\n", page, re.DOTALL
    )
    assert len(commands) == 3

    def rounded(p: str) -> str:
        return p if p == "< 0.001" or float(p) < 0.01 else f"{float(p):.2f}"

    monkeypatch.chdir(results)
    for command, rows in commands:
        monkeypatch.setattr(sys, "argv", [str(script), *shlex.split(command.replace("\\\n", " "))])
        runpy.run_path(str(script), run_name="__main__")
        computed, told = (
            {tuple(cell.strip().replace("−", "-") for cell in line.split("|")[1:6]) for line in lines}
            for lines in (capsys.readouterr().out.splitlines()[2:], rows.splitlines())
        )
        assert len(told) > 5

        assert told <= {
            (names, points.replace("-0.0 ", "0.0 "), rounded(p), n, rounded(of)) for names, points, p, n, of in computed
        }

    monkeypatch.setattr(sys, "argv", [str(script), "sst2_60_steps", "--tasks=glue/sst2", "--methods=ept,no-such"])
    with pytest.raises(SystemExit):
        runpy.run_path(str(script), run_name="__main__")
    assert "no run of no-such on these tasks; there are dept, ept, pt" in capsys.readouterr().err
