"""`pytest benchmarks`: the suites of pytest-benchmark, one a kernel, at sizes that take no time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from benchmarks import shapes
from benchmarks.record import ROOT

NEEDED = ("median", "p20", "p80", "bytes", "operations", "fraction_of_ceiling", "peak_bytes", "device", "versions")


def test_a_suite_runs_and_its_rows_are_whole(tmp_path: Path) -> None:
    output = tmp_path / "benchmark.json"
    command = [sys.executable, "-m", "pytest", "benchmarks", "-k", "dequantize", "--cases", "reduced", "-q"]
    command += ["-p", "no:cacheprovider", f"--benchmark-json={output}"]
    # pytest-benchmark writes nothing where it takes itself for a worker of this test run.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "kernels against peers, cpu (reduced sizes: no figure means anything)" in done.stdout
    rows = [run["extra_info"] for run in json.loads(output.read_text(encoding="utf-8"))["benchmarks"]]
    (case,) = (case for case in shapes.reduced_cases() if case.kernel == "dequantize_4bit")
    assert {row["provider"] for row in rows} == set(case.providers)
    for row in rows:
        assert row["status"] == "ok"
        assert not [name for name in NEEDED if row.get(name) is None]
        assert row["median"] > 0
        assert row["bytes"] > 0
        assert row["peak_bytes"] > 0
