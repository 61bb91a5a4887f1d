"""The wheel holds `ept` and `ept_kernels` with their data files, and no top-level `kernels`."""

from __future__ import annotations

import email
import shutil
import subprocess
import sys
import zipfile
from email.message import Message
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("pyproject.toml", "README.md", "LICENSE", "ept", "kernels")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """Built from a copy, so that the build folder of the checkout neither leaks in nor appears."""
    source = tmp_path_factory.mktemp("source")
    for name in SOURCES:
        path = ROOT / name
        if path.is_dir():
            shutil.copytree(path, source / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
        else:
            shutil.copy(path, source / name)
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = out.glob("*.whl")
    return zipfile.ZipFile(path)


@pytest.fixture(scope="module")
def metadata(wheel: zipfile.ZipFile) -> Message:
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    return email.message_from_bytes(wheel.read(name))


def test_top_level_is_the_two_packages(wheel: zipfile.ZipFile) -> None:
    top = {name.partition("/")[0] for name in wheel.namelist()}
    assert {name for name in top if not name.endswith(".dist-info")} == {"ept", "ept_kernels"}


def test_every_module_and_data_file_is_inside(wheel: zipfile.ZipFile) -> None:
    expected = set()
    for package in (ROOT / "ept", ROOT / "kernels" / "torch-ext" / "ept_kernels"):
        for path in package.rglob("*"):
            if path.suffix in {".py", ".json"} or path.name == "py.typed":
                expected.add(path.relative_to(package.parent).as_posix())
    assert expected - set(wheel.namelist()) == set()


def test_name_licence_and_python(metadata: Message) -> None:
    assert metadata["Name"] == "ept-tuning"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.10"


def test_requirements(metadata: Message) -> None:
    required = metadata.get_all("Requires-Dist") or []
    always = [line for line in required if "extra ==" not in line]
    assert "torch>=2.8" in always
    assert "transformers>=5.10" in always
    assert "peft>=0.21" in always
    assert any(line.startswith("triton>=3.4;") and "Linux" in line for line in always)
    assert not any(line.startswith("kernels") for line in required), "Hugging Face's kernels must stay optional"
    assert set(metadata.get_all("Provides-Extra") or []) == {"dev", "demo", "ray", "tensorboard", "text"}


def test_console_script(wheel: zipfile.ZipFile) -> None:
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/entry_points.txt"))
    assert "ept = ept.cli.main:app" in wheel.read(name).decode()
