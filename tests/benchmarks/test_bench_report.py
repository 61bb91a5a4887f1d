"""The report end to end on a CPU, at sizes that mean nothing: its code runs before any GPU is near."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from benchmarks import checks, device_tests, gpu_report, performance_page, processes, record, shapes, tables
from benchmarks import run as benchmarks_run
from benchmarks.gpu_report import PLAN
from benchmarks.processes import Job, run_command, run_jobs
from benchmarks.record import ROOT, Record, Work

SECTIONS = {"environment", "once", "tests", "sanitizer", "ceilings", "kernels", "steps", "plan"}


@pytest.fixture(autouse=True)
def fixed_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fixes the source fingerprint, so that records of these tests are continued even if a source file changes."""
    monkeypatch.setattr(record, "source_fingerprint", lambda: "fixed")


STARTED = """
import sys
from benchmarks import checks, device_tests, gpu_report, record
record.source_fingerprint = lambda: "fixed"
sys.argv = {arguments!r}
gpu_report.main()
"""


def begun(output: Path, section: str) -> int:
    text = output.read_text() if output.exists() else ""
    return sum('"begin"' in line and f'"{section}/' in line for line in text.splitlines())


@pytest.mark.slow
def test_report_end_to_end_killed_and_continued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "report.jsonl"
    command = ["gpu_report.py", "--device", "cpu", "--reduced", "--output", str(output), "--minutes", "30"]
    with subprocess.Popen([sys.executable, "-c", STARTED.format(arguments=command)], cwd=ROOT) as process:
        while begun(output, "once") < 2:
            assert process.poll() is None, "the report ended before its second check"
            time.sleep(0.02)
        process.kill()
    time.sleep(0.5)
    first = output.read_text()
    time.sleep(1.0)
    assert output.read_text() == first, "the process that measures has outlived the report"
    tables.goal_table(Record(output).results())  # what was written is a record
    first = first[: first.rindex("\n") + 1]
    output.write_text(first + '{"line": "result", "un')  # as left by a machine that lost power

    def in_this_process(jobs: Sequence[Job], at_once: int, deadline: float, variables: dict[str, str]) -> list[str]:
        for job in jobs:
            if job.name.startswith("tests"):  # pytest within pytest is another matter
                assert run_jobs([job], at_once, deadline, variables) == []
                continue
            with monkeypatch.context() as patch:
                patch.setattr(sys, "argv", list(job.command[2:]))
                benchmarks_run.main()
        return []

    # The processes of the suites have been seen above: here their libraries are loaded already.
    monkeypatch.setattr(gpu_report, "run_jobs", in_this_process)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(sys, "argv", command)
    code = gpu_report.main()
    printed = capfd.readouterr().out
    assert code == 0, printed
    assert output.read_text().startswith(first), "what was measured is kept"
    written = Record(output)
    results = written.results()
    assert {row["section"] for row in results} == SECTIONS
    assert [row["case"] for row in results if row["section"] == "plan"] == [f"plan/{s.suite}" for s in PLAN]
    assert all(row["reduced"] and row["device"] == "cpu" and row["versions"]["torch"] for row in results)
    for case in shapes.reduced_cases():
        rows = {row["provider"]: row for row in results if row.get("case") == case.id}
        assert set(rows) == set(case.providers), case.id
        for row in rows.values():
            if row["status"] == "ok":
                assert min(row["bytes"], row["median"], row["p20"], row["bytes_per_second"]) > 0, row
                assert row["fraction_of_own_copy"] > 0, row
            else:
                assert row["reason"], row
    finished = [line["unit"] for line in written.lines() if line["line"] == "end" and "kernels/" in line["unit"]]
    assert len(finished) == len(set(finished)), "what was measured is not measured again"
    assert "NOTHING IS MEASURED" in printed
    goals = [line for line in printed.splitlines() if line.startswith("|") and ("≥" in line or "≤" in line)]
    assert goals
    assert all("not measured" in line for line in goals), "no goal is met by a reduced run"
    with pytest.raises(ValueError, match="holds reduced results"):
        performance_page.rows_of(tmp_path)


@pytest.mark.parametrize(
    "suite, unit, kernels",
    [
        ("once", "once/dequantize_4bit", ("dequantize_4bit_kernel",)),
        # Fused modules among them: their trials compare values, and a rehearsal has none.
        ("steps", "steps/bare", ("prompted_embedding_kernel", "rms_norm_backward_kernel", "rotary_kernel")),
    ],
)
def test_a_rehearsal_compiles_what_a_gpu_would_run_and_every_row_says_that_it_is_one(
    suite: str, unit: str, kernels: tuple[str, ...], tmp_path: Path
) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    output = tmp_path / "report.jsonl"
    command = [sys.executable, "-m", "benchmarks.run", suite, "--rehearse", "--output", str(output), "--only", unit]
    variables = processes.environment(TRITON_CACHE_DIR=str(tmp_path / "cache"))
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "keeps its own code" not in done.stderr
    rows = Record(output).results()
    assert {row["case"].partition(" ")[0] for row in rows} == {unit}
    assert all(row["status"] == "ok" and row["rehearsal"] for row in rows), rows
    compiled = {file.stem for file in (tmp_path / "cache").rglob("*.cubin")}
    assert compiled >= set(kernels)
    with pytest.raises(ValueError, match="holds rehearsed results"):
        performance_page.rows_of(tmp_path)


WITHOUT = """
import importlib, sys
sys.modules.update(dict.fromkeys(("bitsandbytes", "datasets", "pydantic", "liger_kernel")))
sys.path.insert(0, "tests")
from benchmarks.run import SUITES, works_of
for suite in SUITES:
    for table, device in (("gpu", "cpu"), ("rehearsal", "cpu")):
        works = works_of(suite, table, device)
        left_out = {work.unit for work in works if work.unit.count("/") == 1 and work.needs in sys.modules}
        assert left_out <= {"steps/llama-2-7b nf4"}, left_out  # its weights are bitsandbytes'
for module in ("benchmarks.device_tests", "benchmarks.gpu_report", "ept.profile.profile", "conftest"):
    importlib.import_module(module)
"""


def test_the_report_needs_no_package_that_a_gpu_host_may_lack() -> None:
    row = run_command([sys.executable, "-c", WITHOUT], processes.environment(), seconds=120)
    assert row["status"] == "ok", row["output"]


@pytest.mark.parametrize("group", ["1/8", device_tests.MARKED])
def test_every_session_of_tests_is_collected_without_what_a_gpu_host_may_lack(group: str) -> None:
    """One session per group: in one process, two folders' `conftest` would hide each other."""
    found = device_tests.arguments("rehearsal", group)
    blocked = "import sys; sys.modules.update(dict.fromkeys(('bitsandbytes', 'datasets', 'pydantic'))); import pytest; "
    options = ("-q", "--collect-only", "--continue-on-collection-errors", "-p", "no:cacheprovider")
    command = [sys.executable, "-c", f"{blocked} sys.exit(pytest.main({[*options, *found]!r}))"]
    done = subprocess.run(command, cwd=ROOT, env=processes.environment(), capture_output=True, text=True)
    wrong = [line for line in done.stdout.splitlines() if line.startswith("E  ") and "Error" in line]
    assert all("halted; None in sys.modules" in line for line in wrong), done.stdout
    assert re.search(r"\d+ tests collected", done.stdout), done.stdout + done.stderr


def test_a_suite_whose_file_cannot_be_imported_is_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(benchmarks_run.SUITES, "steps", ("absent:works_of",))
    written = Record(tmp_path / "r.jsonl")
    assert benchmarks_run.run(written, benchmarks_run.works_of("steps", "gpu", "cuda"), {}, seconds=60) == 0
    rows = [(row["case"], row["status"], row["reason"]) for row in written.results()]
    assert rows == [("steps/absent", "failed", "ModuleNotFoundError: No module named 'benchmarks.absent'")]


def test_a_unit_whose_last_kernel_breaks_the_device_fails_and_ends_its_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error shows at the next check of the device, which must not be in a later unit."""

    def synchronize() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    written = Record(tmp_path / "r.jsonl")
    works = [Work(f"once/{name}", lambda: {"launched": True}) for name in "ab"]
    with pytest.raises(SystemExit, match="the device's context is broken"):
        benchmarks_run.run(written, works, {}, seconds=60)
    rows = [(row["case"], row["status"], row["reason"]) for row in written.results()]
    reason = "RuntimeError: CUDA error: an illegal memory access was encountered"
    assert rows == [("once/a", "ok", ""), ("once/a", "failed", reason)]


def test_a_test_whose_kernel_breaks_the_device_fails_and_the_others_are_left_for_another_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written, file = Record(tmp_path / "r.jsonl"), tmp_path / "test_two_launches.py"
    file.write_text("def test_a(): pass\ndef test_b(): pass\n")
    monkeypatch.setattr(device_tests, "is_device_broken", lambda: True)
    assert not device_tests.run_tests(written, {}, "reduced", files=("--noconftest", str(file)))
    (row,) = written.results()
    assert (row["case"].rpartition("::")[2], row["status"]) == ("test_a", "failed")
    assert row["reason"] == "a kernel that it launched broke the device's context"


def test_the_path_by_bitsandbytes_is_there_to_be_tuned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its product exists once bitsandbytes is loaded, even if no weight of it has been used in this process."""
    (tmp_path / "bitsandbytes.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    del sys.modules["bitsandbytes"]
    assert any("matmul_4bit.path" in work.unit for work in benchmarks_run.works_of("tune", "gpu", "cuda"))
    assert sys.modules["bitsandbytes"].__file__ == str(tmp_path / "bitsandbytes.py")


def sleeping(seconds: float, code: int = 0) -> list[str]:
    return [sys.executable, "-c", f"import time; time.sleep({seconds}); raise SystemExit({code})"]


def test_jobs_end_at_the_deadline_and_dead_ones_are_begun_again() -> None:
    began = time.monotonic()
    jobs = [Job("slow", sleeping(60), 1), Job("dead", sleeping(0, 3), 2), Job("quick", sleeping(0), 1)]
    assert sorted(run_jobs(jobs, 3, began + 3.0, dict(os.environ))) == ["dead", "slow"]
    assert time.monotonic() - began < 10
    assert [job.starts for job in jobs] == [1, 0, 0]


def test_the_plan_fits_its_time_and_every_section_is_a_suite() -> None:
    assert {section.suite for section in PLAN} <= set(benchmarks_run.SUITES)
    assert sum(section.seconds for section in PLAN) <= 60 * gpu_report.MINUTES


THREE = """
import os, pytest
def test_a(): pass
def test_b(): assert 0, "why"
@pytest.mark.skip(reason="not today")
def test_c(): pass
def test_d(): os._exit(3)
def test_e(): pass
"""


def test_every_test_is_a_row_also_one_that_ends_its_process(tmp_path: Path) -> None:
    file, output = tmp_path / "test_five.py", tmp_path / "report.jsonl"
    file.write_text(THREE)
    command = [sys.executable, "-m", "benchmarks.run", "tests", "--reduced", "--output", str(output)]
    job = Job("tests", [*command, "--as-is", "--only", str(file)], starts=4)
    assert run_jobs([job], 1, time.monotonic() + 120, processes.environment()) == []
    rows = {row["case"].rpartition("::")[2]: (row["status"], row["reason"]) for row in Record(output).results()}
    assert rows == {
        "test_a": ("ok", ""),
        "test_b": ("failed", "AssertionError: why"),
        "test_c": ("skipped", "Skipped: not today"),
        "test_d": ("failed", "the process ended 2 times while running it"),
        "test_e": ("ok", ""),
    }


HANGING = """
import sys, time
from pathlib import Path
from benchmarks.record import Record
with Record(Path(sys.argv[1])).unit("a", 0.2, {"case": "a"}):
    time.sleep(30)
"""


def test_a_unit_that_hangs_ends_its_process_and_says_so(tmp_path: Path) -> None:
    output = tmp_path / "report.jsonl"
    row = run_command([sys.executable, "-c", HANGING, str(output)], processes.environment(), seconds=60)
    assert row["reason"] == "ended with code 1"
    (result,) = Record(output).results()
    assert (result["case"], result["status"], result["reason"]) == ("a", "failed", "not finished after 0.2 s")
    assert record.is_finished(Record(output).units()[1]["a"])


@pytest.mark.parametrize(
    "options, message",
    [((), "goes with --reduced"), (("--reduced",), "--reduced and --rehearse need --output")],
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
    row = run_command([sys.executable, "-c", parent], dict(os.environ), seconds=0.7)
    assert (row["status"], row["timed_out"]) == ("failed", True)
    time.sleep(2.0)
    assert not marker.exists()


def test_a_failed_command_leaves_its_last_lines() -> None:
    row = run_command([sys.executable, "-c", "print('why'); raise SystemExit(3)"], dict(os.environ), seconds=30)
    assert (row["status"], row["reason"], row["output"]) == ("failed", "ended with code 3", "why")


def test_what_the_clock_cut_off_is_run_again(tmp_path: Path) -> None:
    written = Record(tmp_path / "r.jsonl")
    answers = [{"status": "failed", "reason": "late", "timed_out": True}, {"status": "ok", "reason": ""}]
    tests = Work("tests/a", lambda: [answers.pop(0)])
    for expected in ("failed", "ok", "ok"):
        benchmarks_run.run(written, [tests], {}, seconds=60)
        assert [row["status"] for row in written.results()] == [expected]
    assert not answers


def test_every_case_with_a_goal_is_measured_again_after_the_tuner_without_a_compiler_first() -> None:
    suites = [section.suite for section in PLAN]
    assert suites.index("goals") < suites.index("tune") < suites.index("rest")
    again = [work.unit for work in benchmarks_run.works_of("rest", "gpu", "cuda") if work.unit.startswith("again/")]
    assert sorted(again) == sorted(f"again/{case.id}" for case in shapes.GOAL_CASES)
    compiled = [
        shapes.COMPILED in case.providers for unit in again for case in shapes.GOAL_CASES if unit.endswith(case.id)
    ]
    assert compiled == sorted(compiled)
    assert len({*compiled}) == 2


def test_only_kernels_count_in_a_cache_and_no_launchers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    launched = iter(("launcher.so", "kernel.cubin"))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))  # and not through Triton's knobs, which would keep it
    monkeypatch.setattr(checks, "launcher_of", lambda _: lambda *_: (tmp_path / next(launched)).touch())
    assert [checks.try_cache("cpu")["hit"] for _ in range(2)] == [True, False]
