"""The offline bundle on synthetic wheels: trimming, stubs for what the host has, limits. No network."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tools import offline_bundle
from tools.offline_bundle import BundleError

BUILDS = ("cpu", "cuda124", "cuda130", "rocm64")
WHEEL_NAME = "bitsandbytes-0.50.2-py3-none-manylinux_2_24_x86_64.whl"


def digest(content: bytes) -> str:
    return "sha256=" + base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    """A wheel laid out as bitsandbytes', with one small library a build."""
    info = "bitsandbytes-0.50.2.dist-info"
    files = {
        "bitsandbytes/__init__.py": b"__version__ = '0.50.2'\n",
        f"{info}/METADATA": b"Metadata-Version: 2.1\nName: bitsandbytes\nVersion: 0.50.2\n",
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: false\nTag: py3-none-manylinux_2_24_x86_64\n",
        **{f"bitsandbytes/libbitsandbytes_{build}.so": build.encode() * 500 for build in BUILDS},
    }
    path = tmp_path / WHEEL_NAME
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
        rows = "".join(f"{name},{digest(content)},{len(content)}\n" for name, content in files.items())
        archive.writestr(f"{info}/RECORD", f"{rows}{info}/RECORD,,\n")
    return path


def test_only_the_asked_library_stays_and_record_fits(wheel: Path) -> None:
    trimmed = offline_bundle.trim_bitsandbytes(wheel, "130")
    assert trimmed.name == "bitsandbytes-0.50.2-1cuda130-py3-none-manylinux_2_24_x86_64.whl"
    assert not wheel.exists()
    with zipfile.ZipFile(trimmed) as archive:
        names = set(archive.namelist())
        assert [n for n in names if n.endswith(".so")] == ["bitsandbytes/libbitsandbytes_cuda130.so"]
        record = next(n for n in names if n.endswith("RECORD"))
        rows = list(csv.reader(io.StringIO(archive.read(record).decode())))
        assert {row[0] for row in rows} == names
        for name, hashed, size in rows:
            if name != record:
                content = archive.read(name)
                assert (hashed, int(size)) == (digest(content), len(content)), name
        assert "Build: 1cuda130" in archive.read("bitsandbytes-0.50.2.dist-info/WHEEL").decode().splitlines()


def test_pip_installs_the_trimmed_wheel(wheel: Path, tmp_path: Path) -> None:
    trimmed = offline_bundle.trim_bitsandbytes(wheel, "130")
    site = tmp_path / "site"
    # As on the host, whose platform the synthetic wheel names; --no-deps and --no-index keep pip off the network.
    options = ["--no-index", "--no-deps", "--no-compile", "--disable-pip-version-check", "--quiet"]
    platform = ["--platform", "manylinux_2_24_x86_64", "--only-binary", ":all:"]
    command = [sys.executable, "-m", "pip", "install", *options, *platform, "--target", str(site), str(trimmed)]
    subprocess.run(command, check=True, capture_output=True)
    assert sorted(path.name for path in (site / "bitsandbytes").iterdir()) == [
        "__init__.py",
        "libbitsandbytes_cuda130.so",
    ]


def test_a_cuda_version_without_a_library_is_refused_with_those_there_are(wheel: Path) -> None:
    with pytest.raises(BundleError, match=r"no library of CUDA 999, but cpu, cuda124, cuda130, rocm64: change --cuda"):
        offline_bundle.trim_bitsandbytes(wheel, "999")
    assert wheel.exists()


def test_over_the_limit_names_the_largest_wheels_and_the_remedy() -> None:
    wheels = [{"file": "small.whl", "bytes": 1 << 20}, {"file": "large.whl", "bytes": 5 << 20}]
    offline_bundle.check_size(wheels, 6 << 20)
    with pytest.raises(BundleError) as error:
        offline_bundle.check_size(wheels, (6 << 20) - 1)
    message = str(error.value)
    assert "has 6.0 MiB, the limit is 6.0 MiB" in message
    assert message.index("large.whl") < message.index("small.whl")
    assert "--have" in message


def test_freeze_lines_and_platforms_are_read() -> None:
    lines = [
        "torch==2.11.0+cu130",
        "# comment==1",
        "Hugging_Face.Hub==1.33.0",
        "-e git+https://x",
        "numpy==2.5.2; a>'3'",
    ]
    freeze = "\n".join(lines)
    assert offline_bundle.versions_of_freeze(freeze) == {
        "torch": "2.11.0+cu130",
        "hugging-face-hub": "1.33.0",
        "numpy": "2.5.2",
    }
    tags = offline_bundle.platforms("2.28", "x86_64")
    assert tags[0] == "manylinux_2_28_x86_64"
    assert {"manylinux2014_x86_64", "manylinux_2_17_x86_64"} <= set(tags)
    with pytest.raises(BundleError, match=r"--glibc 2\.5"):
        offline_bundle.platforms("2.5", "x86_64")


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wheel: Path) -> Path:
    """A folder of wheels in place of the package index: bitsandbytes asks for numpy and torch, torch for nothing."""
    folder = tmp_path / "index"
    folder.mkdir()
    metadata = {
        "bitsandbytes-0.50.2.dist-info/METADATA": b"Metadata-Version: 2.1\nName: bitsandbytes\nVersion: 0.50.2\n"
        b"Requires-Dist: torch>=2.4\nRequires-Dist: numpy>=1.17\n"
    }
    with zipfile.ZipFile(wheel) as old, zipfile.ZipFile(folder / WHEEL_NAME, "w") as new:
        for name in old.namelist():
            new.writestr(name, metadata.get(name, old.read(name)))
    for version in ("1.26", "2.0"):
        with monkeypatch.context() as patch:
            patch.setattr(offline_bundle, "HOST", "pypi")
            offline_bundle.write_stub(folder, "numpy", version)
    constraints = tmp_path / "constraints.txt"
    constraints.write_text("# comment\nnumpy==1.26\ntorch==2.13.0\n")
    monkeypatch.setattr(offline_bundle, "CONSTRAINTS", constraints)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def bundle(tmp_path: Path, **changes: object) -> dict:
    arguments = {
        "python": "3.12",
        "cuda": "130",
        "limit": 1 << 20,
        "output": tmp_path / "bundle",
        "have": {"torch": "2.11.0+cu130"},
        "platforms": offline_bundle.platforms("2.28", "x86_64"),
    }
    return offline_bundle.make_bundle(["bitsandbytes"], **{**arguments, **changes})


@pytest.mark.usefixtures("index")
def test_what_the_host_has_stays_out_and_is_listed(tmp_path: Path) -> None:
    manifest = bundle(tmp_path)
    wheels = sorted("-".join(path.name.split("-")[:2]) for path in (tmp_path / "bundle").glob("*.whl"))
    assert wheels == ["bitsandbytes-0.50.2", "numpy-1.26+pypi"], "numpy as constraints.txt pins it"
    assert manifest["assumed_present"] == {"torch": "2.11.0+cu130"}
    assert json.loads((tmp_path / "bundle" / "bundle.json").read_text()) == manifest
    for entry in manifest["wheels"]:
        content = (tmp_path / "bundle" / entry["file"]).read_bytes()
        assert (entry["bytes"], entry["sha256"]) == (len(content), hashlib.sha256(content).hexdigest())


REFUSALS = {
    "over the limit": ({"limit": 100}, "the limit is 0.0 MiB"),
    "host's torch too old": ({"have": {"torch": "2.0.0"}}, "pip download failed"),
    "no wheel for torch at all": ({"have": {}}, "pip download failed"),
    "no such CUDA": ({"cuda": "999"}, "no library of CUDA 999"),
}


@pytest.mark.usefixtures("index")
@pytest.mark.parametrize("name", REFUSALS)
def test_a_bundle_that_cannot_be_made_leaves_nothing_behind(tmp_path: Path, name: str) -> None:
    changes, message = REFUSALS[name]
    before = set(tmp_path.iterdir())
    with pytest.raises(BundleError, match=message):
        bundle(tmp_path, **changes)
    assert set(tmp_path.iterdir()) == before


def test_an_existing_folder_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "bundle").mkdir()
    with pytest.raises(BundleError, match="exists: remove it"):
        bundle(tmp_path)
