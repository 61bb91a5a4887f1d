"""`docs/performance.md`: what the committed records give, and nothing else."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from profile_records import kernel_row, profiled

from benchmarks import performance_page, shapes
from benchmarks.record import RECORD_NAME, Record
from benchmarks.tables import markdown, seconds

SYNTHETIC = "Synthetic GPU for tests"


def test_the_committed_page_is_what_the_committed_records_give() -> None:
    text = performance_page.PAGE.read_text(encoding="utf-8")
    assert text == performance_page.render(), "run python -m benchmarks.performance_page"


def test_the_readme_says_what_its_record_holds() -> None:
    record = json.loads((performance_page.RESULTS / "cpu" / "profile_t5_small.json").read_text(encoding="utf-8"))
    step = {method["method"]: round(method["step_ms"]["median"]) for method in record["methods"]}
    size = {method["method"]: f"{method['trainable_parameters']:,}" for method in record["methods"]}
    text = " ".join((performance_page.PAGE.parents[1] / "README.md").read_text(encoding="utf-8").split())
    ept = f"EPT with 40 prompt tokens ({size['ept']} parameters) takes {step['ept']} ms"
    pt = f"prompt tuning with 100 tokens ({size['pt']} parameters) {step['pt']} ms (`{record['command']}`,"
    assert f"{ept}, one of {pt}" in text


def test_every_plot_of_the_page_is_there() -> None:
    for line in performance_page.PAGE.read_text(encoding="utf-8").splitlines():
        if line.startswith("!["):
            plot = performance_page.PAGE.parent / line.rpartition("(")[2].rstrip(")")
            assert plot.read_bytes().startswith(b"\x89PNG"), plot


def test_without_a_gpu_record_the_page_says_so_and_shows_nothing_of_a_gpu(tmp_path: Path) -> None:
    shutil.copytree(performance_page.RESULTS / "cpu", tmp_path / "cpu")
    text = performance_page.render(tmp_path)
    assert performance_page.NO_GPU in text
    verdicts = [line for line in text.splitlines() if line.rstrip("| ").rpartition("|")[2].strip() in ("met", "missed")]
    assert verdicts
    for line in verdicts:
        assert "cpu" in line.lower(), line


@pytest.fixture
def synthetic(tmp_path: Path) -> Path:
    """Results of a device that does not exist: two sizes of an operator, a product at two M, a training step."""
    folder = tmp_path / "synthetic"
    folder.mkdir()
    about: dict[str, Any] = {"device": SYNTHETIC, "device_type": "cuda", "reduced": False, "versions": {"torch": "0"}}
    hardware = {"processor": "none", "threads": 1, "cores": 1}
    header = {"line": "header", "command": "none", "started": "2000-01-01T00:00", "sources": "0", "hardware": hardware}
    record = Record.resume(folder / RECORD_NAME, {**header, **about})
    timing = {"p20": 0.9, "p80": 1.2, "host_bound": False, "status": "ok", "reason": "", "backend": "triton"}
    rates = {"ceilings": {"bytes_per_second": 4e9}, "bound": "memory", "fraction_of_ceiling": 0.5}
    measured = {**timing, **rates, "peak_bytes": 3 << 20, **about}
    cases = [shapes.embedding("prompted_embedding", "T5-base", batch, 128) for batch in (1, 2)]
    cases += [case for case in shapes.products("T5-base", 768, 768, (1, 16)) if case.kernel == "matmul_4bit"]
    for number, case in enumerate(cases, 1):
        with record.unit(case.id) as add:
            for provider, slower in (("ours", 1), ("ours again", 1), ("reference", 3), ("bitsandbytes", 2)):
                add(kernel_row(case, provider, slower, number * 10**6, bytes_per_second=2e9 / slower, **measured))
    with record.unit("steps/t5-base") as add:
        for method, time in (("ept", 0.5), ("peft-pt", 1.0)):
            phases = {"base_forward": time / 2, "base_backward": time / 2}
            step = {"median": time, "phases": phases, "size": {"batch": 1, "length": 8}, "peak_bytes": 1 << 20}
            step |= {"launches": 1, "busy_fraction": 0.75, "kernels": [{"name": "gemm", "runs": 1, "seconds": time}]}
            row = {"case": "steps/t5-base", "provider": method, "section": "steps", "tokens_per_second": 8 / time}
            add({**row, **timing, **step, **about})
    return tmp_path


def test_a_record_becomes_tables_plots_and_verdicts(synthetic: Path) -> None:
    page = synthetic / "docs" / "performance.md"
    text = performance_page.render(synthetic)
    assert performance_page.NO_GPU not in text
    assert SYNTHETIC in text
    line = next(line for line in text.splitlines() if line.startswith("| matmul_4bit/T5-base") and "m=16" in line)
    assert "2.00 ×" in line
    assert ["steps/t5-base", "ept", "75 %", "gemm", "1", "500 ms"] in [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()
    ]
    goal = next(line for line in text.splitlines() if "T5-base shape" in line)
    assert "0.50 ×" in goal
    assert goal.rstrip(" |").endswith("met")
    drawn = performance_page.draw(synthetic, page)
    assert {path.name for path in drawn} == {f"synthetic-{name}.png" for name in ("bandwidth", "speedup", "steps")}
    for path in drawn:
        assert f"({path.relative_to(page.parent)})" in text
        assert path.read_bytes().startswith(b"\x89PNG")


def test_a_kernels_row_shows_rate_ceiling_and_memory(synthetic: Path) -> None:
    lines = performance_page.render(synthetic).splitlines()
    head = next(line for line in lines if line.startswith("| case"))
    line = next(line for line in lines if line.startswith("| prompted_embedding/T5-base"))
    cells = dict(zip((cell.strip() for cell in head.split("|")), (cell.strip() for cell in line.split("|"))))
    shown = {"rate": "2 GB/s", "of ceiling": "50 % memory", "peak memory": "3 MiB"}
    shown |= {"again": "1.00 ×", "vs reference": "3.00 ×", "vs bitsandbytes": "2.00 ×"}
    assert {name: cells[name] for name in shown} == shown


def test_every_json_record_has_its_table_its_plot_and_its_command(tmp_path: Path) -> None:
    folder = tmp_path / "cpu"
    folder.mkdir()
    records: dict[str, dict[str, Any]] = {
        "profile_t5.json": {"command": "ept profile a", **profiled(("pt", 100, 9.0), ("ept", 40, 4.5))},
        "profile_length.json": {"command": "ept profile b", **profiled(("pt", 10, 1.0), ("pt", 20, 2.0))},
    }
    for name, record in records.items():
        (folder / name).write_text(json.dumps(record))
    page = tmp_path / "page.md"
    text = performance_page.render(tmp_path)
    for name, record in records.items():
        assert f"Record `{name}`: `{record['command']}`, none, 1 threads on 1 cores; torch 0." in text
    assert "Further records" not in text
    drawn = performance_page.draw(tmp_path, page)
    names = {"profile-t5-phases", "profile-length-length"}
    assert {path.name for path in drawn} == {f"cpu-{name}.png" for name in names}
    for path in drawn:
        assert f"({path.relative_to(page.parent)})" in text
        assert path.read_bytes().startswith(b"\x89PNG")


def test_other_results_get_a_page_beside_them(synthetic: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = performance_page.PAGE.read_bytes()
    monkeypatch.setattr("sys.argv", ["page", "--results", str(synthetic)])
    assert performance_page.main() == 0
    assert (synthetic / "performance.md").read_text(encoding="utf-8") == performance_page.render(synthetic)
    assert performance_page.PAGE.read_bytes() == before
    monkeypatch.setattr("sys.argv", ["page", "--results", str(synthetic), "--check"])
    assert performance_page.main() == 0
    (synthetic / "performance.md").write_text("old")
    assert performance_page.main() == 1


def test_a_record_that_was_cut_off_anywhere_is_drawn_and_meets_no_goal_too_many(synthetic: Path) -> None:
    path = synthetic / "synthetic" / RECORD_NAME
    whole = path.read_text()
    starts = [0, *(at + 1 for at, character in enumerate(whole) if character == "\n")]
    for number, at in enumerate(starts):
        path.write_text(whole[: at + 7])  # after every line, and within the next one
        text = performance_page.render(synthetic)
        step = next(line for line in text.splitlines() if "T5-base shape" in line)
        assert step.rstrip(" |").endswith("not measured") == (number < len(starts) - 1), number
        last = json.loads(whole[:at].splitlines()[-1]) if at else {"line": "none"}
        assert ("begun but not ended" in text) == (last["line"] in ("begin", "result")), number


@pytest.mark.parametrize(
    "mark, kind", [('"reduced": true', "reduced"), ('"reduced": false, "rehearsal": true', "rehearsed")]
)
def test_what_measures_nothing_is_refused(synthetic: Path, mark: str, kind: str) -> None:
    path = synthetic / "synthetic" / RECORD_NAME
    path.write_text(path.read_text().replace('"reduced": false', mark))
    with pytest.raises(ValueError, match=f"holds {kind} results"):
        performance_page.render(synthetic)


def test_a_record_without_a_section_of_its_own_is_named(synthetic: Path) -> None:
    (synthetic / "synthetic" / "other.json").write_text(json.dumps({"command": "python other.py"}))
    assert "`other.json`" in performance_page.render(synthetic)


def test_markdown_is_aligned_and_seconds_have_their_unit() -> None:
    lines = markdown(["a", "b"], [["x", "1"], ["longer", "22"]]).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert [seconds(value) for value in (1.5, 0.0123, 4.56e-6, 1e-7)] == ["1.5 s", "12.3 ms", "4.56 µs", "0.1 µs"]
