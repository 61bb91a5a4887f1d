"""Collects the wheels that this project needs on a GPU host without a network.

    python tools/offline_bundle.py --python 3.12 --cuda 130 --limit 512 --have-file freeze.txt --output bundle
    python tools/offline_bundle.py --python 3.12 --cuda 130 --limit 64 --output bundle datasets bitsandbytes

pip resolves for the target, not for this machine, and against what the host is assumed to have: its `pip freeze`
(`--have-file`), single packages (`--have`), torch and triton in any case. That is left out with all that only it
needs, and listed. bitsandbytes carries a library for every CUDA version: its wheel is rebuilt with that of `--cuda`
alone. The folder appears only when the bundle is complete and within the limit. On the host:

    python -m pip install --no-index --no-deps --target site bundle/*.whl
"""

from __future__ import annotations

import argparse
import base64
import csv
import hashlib
import io
import json
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
CONSTRAINTS = ROOT / "constraints.txt"
ASSUMED = ("torch", "triton")  # in the versions of constraints.txt where the host's own are not given
HOST = "host"  # local version of the stubs that stand for what the host has
LIBRARY = re.compile(r"bitsandbytes/libbitsandbytes_(?P<build>\w+)\.(so|dll|dylib)")
MIB = 1 << 20


class BundleError(Exception):
    """The bundle cannot be made as asked; the message says what to change."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packages", nargs="*", help="requirements; default: the project's own dependencies")
    parser.add_argument("--python", required=True, help="the host's Python, as 3.12")
    parser.add_argument("--cuda", required=True, help="the host's CUDA version without its dot, as 130")
    parser.add_argument("--limit", required=True, type=float, help="most MiB of the whole bundle")
    parser.add_argument("--output", required=True, type=Path, help="a folder that does not exist yet")
    parser.add_argument("--have", default="", help="what the host has, as torch==2.11.0,triton==3.6.0,numpy==2.5.2")
    parser.add_argument("--have-file", type=Path, help="the same as a file: the host's pip freeze")
    parser.add_argument("--glibc", default="2.28", help="the host's C library, as 2.28 (default)")
    parser.add_argument("--arch", default="x86_64", help="the host's processor (default x86_64)")
    arguments = parser.parse_args()
    pins = versions_of_freeze(CONSTRAINTS.read_text(encoding="utf-8"))
    have = {name: pins[name] for name in ASSUMED}
    if arguments.have_file:
        have |= versions_of_freeze(arguments.have_file.read_text(encoding="utf-8"))
    have |= versions_of_freeze("\n".join(arguments.have.split(",")))
    try:
        manifest = make_bundle(
            arguments.packages or project_dependencies(),
            python=arguments.python,
            cuda=arguments.cuda,
            limit=int(arguments.limit * MIB),
            output=arguments.output,
            have=have,
            platforms=platforms(arguments.glibc, arguments.arch),
        )
    except BundleError as error:
        print(f"offline_bundle: {error}", file=sys.stderr)
        return 1
    print(describe(manifest))
    return 0


def make_bundle(
    packages: list[str],
    *,
    python: str,
    cuda: str,
    limit: int,
    output: Path,
    have: dict[str, str],
    platforms: list[str],
) -> dict[str, Any]:
    """Downloads, trims and checks; returns the manifest that is also written to `output/bundle.json`.

    Args:
        packages: requirements. have: canonical name → version of what the host has.
        limit: bytes of all wheels together.

    Raises:
        BundleError: `output` exists, pip finds no wheel for the target, bitsandbytes has no library of this CUDA
            version, or the bundle is larger than `limit`.
    """
    if output.exists():
        raise BundleError(f"{output} exists: remove it, or name another folder")
    target = ["--python-version", python, "--implementation", "cp", "--only-binary", ":all:"]
    target += [part for platform in platforms for part in ("--platform", platform)]
    with tempfile.TemporaryDirectory(dir=output.resolve().parent) as scratch:
        work, stubs, constraints = (Path(scratch) / name for name in ("bundle", "stubs", "constraints.txt"))
        work.mkdir()
        stubs.mkdir()
        for name, version in have.items():
            write_stub(stubs, name, version)
        constraints.write_text(_constraints(have), encoding="utf-8")
        sources = ["--find-links", str(stubs), "--constraint", str(constraints)]
        _pip("download", "--dest", str(work), *sources, *target, *packages)
        assumed = {}
        for stub in work.glob(f"*+{HOST}-*.whl"):
            name = canonicalize_name(stub.name.split("-")[0])
            assumed[name] = have[name]
            stub.unlink()
        for wheel in work.glob("bitsandbytes-*.whl"):
            trim_bitsandbytes(wheel, cuda)
        wheels = [_entry(wheel) for wheel in sorted(work.glob("*.whl"))]
        check_size(wheels, limit)
        about = {"python": python, "cuda": cuda, "platforms": platforms}
        manifest = {**about, "wheels": wheels, "assumed_present": dict(sorted(assumed.items()))}
        (work / "bundle.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        shutil.move(work, output)
    return manifest


def write_stub(folder: Path, name: str, version: str) -> None:
    """An empty wheel that stands for a package of the host, so that pip resolves against its version and asks for
    nothing that only it needs.
    """
    stem = f"{name.replace('-', '_')}-{_host_version(version)}"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {_host_version(version)}\n"
    wheel = "Wheel-Version: 1.0\nGenerator: offline_bundle\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    with zipfile.ZipFile(folder / f"{stem}-py3-none-any.whl", "w") as archive:
        for file, text in (("METADATA", metadata), ("WHEEL", wheel), ("RECORD", "")):
            archive.writestr(f"{stem}.dist-info/{file}", text)


def _host_version(version: str) -> str:
    return f"{version.partition('+')[0]}+{HOST}"


def _constraints(have: dict[str, str]) -> str:
    """The project's pins, but for what the host has."""
    pinned = CONSTRAINTS.read_text(encoding="utf-8").splitlines()
    pins = [line for line in pinned if not set(versions_of_freeze(line)) & set(have)]
    return "\n".join([*pins, *(f"{name}=={_host_version(version)}" for name, version in have.items())])


def trim_bitsandbytes(wheel: Path, cuda: str) -> Path:
    """Rebuilds a bitsandbytes wheel with the library of one CUDA version; returns the new file, the old one is removed.

    The build number in its name and metadata (`1cuda130`) tells it from the published wheel; RECORD lists what is
    left.

    Raises:
        BundleError: the wheel has no library of that version.
    """
    with zipfile.ZipFile(wheel) as archive:
        builds = {m["build"]: m.string for m in map(LIBRARY.fullmatch, archive.namelist()) if m}
        if f"cuda{cuda}" not in builds:
            raise BundleError(
                f"{wheel.name} has no library of CUDA {cuda}, but {', '.join(sorted(builds))}: change --cuda"
            )
        dropped = {name for build, name in builds.items() if build != f"cuda{cuda}"}
        name, version, *tags = wheel.stem.split("-")
        tag = f"1cuda{cuda}"
        trimmed = wheel.with_name("-".join([name, version, tag, *tags[-3:]]) + ".whl")
        rewrite_wheel(archive, trimmed, dropped, tag)
    wheel.unlink()
    return trimmed


def rewrite_wheel(archive: zipfile.ZipFile, path: Path, dropped: set[str], build: str) -> None:
    """Copies a wheel to `path` without the files `dropped`, with a build number and a RECORD that fits."""
    record_name = next(name for name in archive.namelist() if name.endswith(".dist-info/RECORD"))
    signatures = {f"{record_name}.jws", f"{record_name}.p7s"}  # of the old RECORD
    rows = []
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as target:
        for info in archive.infolist():
            if info.filename in {record_name, *signatures, *dropped} or info.is_dir():
                continue
            content = archive.read(info)
            if info.filename.endswith(".dist-info/WHEEL"):
                lines = [line for line in content.decode().splitlines() if line and not line.startswith("Build:")]
                content = "\n".join([*lines, f"Build: {build}", ""]).encode()
            target.writestr(info, content, zipfile.ZIP_DEFLATED)
            digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
            rows.append((info.filename, f"sha256={digest}", str(len(content))))
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([*rows, (record_name, "", "")])
        target.writestr(record_name, text.getvalue())


def check_size(wheels: list[dict[str, Any]], limit: int) -> None:
    """Raises `BundleError` with the largest wheels where all together are over `limit` bytes."""
    total = sum(wheel["bytes"] for wheel in wheels)
    if total > limit:
        largest = sorted(wheels, key=lambda wheel: -wheel["bytes"])[:8]
        listed = "\n".join(f"  {wheel['bytes'] / MIB:7.1f} MiB  {wheel['file']}" for wheel in largest)
        raise BundleError(
            f"the bundle has {total / MIB:.1f} MiB, the limit is {limit / MIB:.1f} MiB; its largest wheels:\n{listed}\n"
            "name those that the host has with --have name==version, leave packages out, or raise --limit"
        )


def platforms(glibc: str, arch: str) -> list[str]:
    """pip's platform tags of wheels that run on a Linux with this C library."""
    major, _, minor = glibc.partition(".")
    if major != "2" or not minor.isdecimal() or int(minor) < 17:
        raise BundleError(f"--glibc {glibc}: give a version of 2.17 or later, as 2.28")
    numbered = [f"manylinux_2_{n}_{arch}" for n in range(int(minor), 4, -1)]
    return [*numbered, *(f"{old}_{arch}" for old in ("manylinux2014", "manylinux2010", "manylinux1", "linux"))]


def project_dependencies() -> list[str]:
    """The requirements in `pyproject.toml`, those of `make gpu`'s tests too."""
    if sys.version_info < (3, 11):
        raise BundleError("reading pyproject.toml needs Python 3.11 or later: name the packages")
    import tomllib  # type: ignore[import-not-found,unused-ignore]  # mypy checks for 3.10

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return [*project["dependencies"], "pytest", "hypothesis", "pytest-benchmark"]


def versions_of_freeze(text: str) -> dict[str, str]:
    """Canonical name → version, of the lines `name==version` in the output of `pip freeze`."""
    lines = (line.partition("#")[0].partition(";")[0].strip() for line in text.splitlines())
    pairs = (line.split("==") for line in lines if line.count("==") == 1)
    return {canonicalize_name(name.strip()): version.strip() for name, version in pairs}


def describe(manifest: dict[str, Any]) -> str:
    lines = [f"{wheel['bytes'] / MIB:7.1f} MiB  {wheel['file']}" for wheel in manifest["wheels"]]
    lines.append(f"{sum(wheel['bytes'] for wheel in manifest['wheels']) / MIB:7.1f} MiB  in all")
    lines.append("the host must have:")
    lines += [f"  {name} {version}" for name, version in manifest["assumed_present"].items()]
    return "\n".join(lines)


def _pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        said = "\n".join((done.stdout + done.stderr).strip().splitlines()[-20:])
        raise BundleError(f"pip {arguments[0]} failed:\n{said}")


def _entry(wheel: Path) -> dict[str, Any]:
    content = wheel.read_bytes()
    return {"file": wheel.name, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


if __name__ == "__main__":
    sys.exit(main())
