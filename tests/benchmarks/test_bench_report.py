"""The report end to end on a CPU, at sizes that mean nothing: its code runs before any GPU is near."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import checks, gpu_report, record, shapes
from benchmarks import run as benchmarks_run
from benchmarks.record import ROOT, Record, Work

SECTIONS = {"tests", "ceilings", "kernels", "sanitizer", "steps"}


@pytest.fixture(autouse=True)
def fixed_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    """Records of these tests are continued even where a source file is saved while they run."""
    monkeypatch.setattr(record, "source_fingerprint", lambda: "fixed")


STARTED = """
import sys
from benchmarks import gpu_report, record
record.source_fingerprint = lambda: "fixed"
sys.argv = {arguments!r}
gpu_report.main()
"""


def begun_kernels(output: Path) -> int:
    text = output.read_text() if output.exists() else ""
    return sum('"begin"' in line and "kernels/" in line for line in text.splitlines())


@pytest.mark.slow
def test_report_end_to_end_killed_and_continued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "report.jsonl"
    command = ["gpu_report.py", "--device", "cpu", "--reduced", "--output", str(output), "--scale", "4"]
    with subprocess.Popen([sys.executable, "-c", STARTED.format(arguments=command)], cwd=ROOT) as process:
        while begun_kernels(output) < 2:
            assert process.poll() is None, "the report ended before its second kernel"
            time.sleep(0.02)
        process.kill()
    time.sleep(0.5)
    first = output.read_text()
    time.sleep(1.0)
    assert output.read_text() == first, "the process that measures has outlived the report"
    first = first[: first.rindex("\n") + 1]
    output.write_text(first + '{"line": "result", "un')  # as a machine that lost its power leaves it

    def in_this_process(command: list[str], variables: dict[str, str], seconds: float) -> tuple[int, str]:
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", command[2:])
            benchmarks_run.main()
        return 0, ""

    # The processes of the suites have been seen above: here their libraries are loaded already.
    monkeypatch.setattr(gpu_report, "call", in_this_process)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(sys, "argv", command)
    code = gpu_report.main()
    printed = capfd.readouterr().out
    assert code == 0, printed
    assert output.read_text().startswith(first), "what was measured is kept"
    written = Record(output)
    results = written.results()
    assert {row["section"] for row in results} == SECTIONS
    assert all(row["reduced"] and row["device"] == "cpu" and row["versions"]["torch"] for row in results)
    for case in shapes.reduced_cases():
        rows = {row["provider"]: row for row in results if row.get("case") == case.id}
        assert set(rows) == set(case.providers), case.id
        for row in rows.values():
            if row["status"] == "ok":
                assert min(row["bytes"], row["median"], row["p20"], row["bytes_per_second"]) > 0, row
            else:
                assert row["reason"], row
    finished = [line["unit"] for line in written.lines() if line["line"] == "end" and "kernels/" in line["unit"]]
    assert len(finished) == len(set(finished)), "what was measured is not measured again"
    assert "REDUCED" in printed
    goals = [line for line in printed.splitlines() if line.startswith("|") and ("≥" in line or "≤" in line)]
    assert goals
    assert all("not measured" in line for line in goals), "no goal is met by a reduced run"


def test_all_sections_end_in_time_even_where_nothing_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]

    def outlast(command: list[str], environment: dict[str, str], seconds: float) -> tuple[None, str]:
        now[0] += seconds
        return None, ""

    monkeypatch.setattr(gpu_report, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(gpu_report, "call", outlast)
    gpu_report.measure(Record(tmp_path / "r.jsonl"), "cpu", False)
    assert sum(gpu_report.BUDGETS.values()) <= now[0] <= gpu_report.TOTAL
    assert gpu_report.TOTAL <= 8 * 60 - 15


@pytest.mark.parametrize(
    "options, message",
    [((), "goes with --reduced"), (("--reduced",), "--reduced needs --output")],
    ids=["full size on a CPU", "reduced among the real ones"],
)
def test_a_record_that_would_mean_nothing_is_refused(options: tuple[str, ...], message: str) -> None:
    command = [sys.executable, "benchmarks/gpu_report.py", "--device", "cpu", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert message in done.stderr


def test_a_command_that_outlasts_its_time_is_ended_with_all_that_it_started(tmp_path: Path) -> None:
    marker = tmp_path / "alive"
    child = f"import time, pathlib; time.sleep(2); pathlib.Path({str(marker)!r}).touch()"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    row = checks.run_command([sys.executable, "-c", parent], dict(os.environ), seconds=0.7)
    assert (row["status"], row["timed_out"]) == ("failed", True)
    time.sleep(2.0)
    assert not marker.exists()


def test_a_failed_command_leaves_its_last_lines() -> None:
    row = checks.run_command([sys.executable, "-c", "print('why'); raise SystemExit(3)"], dict(os.environ), seconds=30)
    assert (row["status"], row["reason"], row["output"]) == ("failed", "ended with code 3", "why")


def test_pytest_results_are_counted(tmp_path: Path) -> None:
    file = tmp_path / "test_three.py"
    file.write_text(
        "import pytest\ndef test_a(): pass\ndef test_b(): assert 0\n@pytest.mark.skip\ndef test_c(): pass\n"
    )
    row = checks.run_tests((str(file),), "cpu", time.monotonic() + 60)[0]
    assert row["status"] == "failed"
    assert row["summary"] == "1 passed, 1 failed, 1 skipped"


def test_what_the_clock_cut_off_is_run_again(tmp_path: Path) -> None:
    written = Record(tmp_path / "r.jsonl")
    answers = [{"status": "failed", "reason": "late", "timed_out": True}, {"status": "ok", "reason": ""}]
    tests = Work("tests/a", lambda: [answers.pop(0)])
    for expected in ("failed", "ok", "ok"):
        benchmarks_run.run(written, [tests], {}, seconds=60)
        assert [row["status"] for row in written.results()] == [expected]
    assert not answers


def test_every_command_line_names_a_file_that_exists() -> None:
    units = [arguments for units in checks.TESTS.values() for arguments in units.values()]
    for argument in itertools.chain.from_iterable(units):
        assert not argument.startswith("tests/") or (ROOT / argument).exists(), argument


def test_what_the_memory_checker_watches_equals_the_reference(capsys: pytest.CaptureFixture[str]) -> None:
    checks.main()
    assert "72 dequantisations equal the reference" in capsys.readouterr().out
