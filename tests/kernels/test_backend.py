"""Which device runs the operators on what."""

from __future__ import annotations

import importlib.util

import pytest

from ept_kernels import library


@pytest.fixture
def backend_of(monkeypatch):
    """`backend(device type)` under a choice of EPT_KERNELS, with or without the interpreter and triton."""

    def of(device_type: str, choice: str = "", interpret: bool = False, triton: bool = True) -> str:
        monkeypatch.setattr(library, "_choice", choice)
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if triton else None)
        monkeypatch.setenv("TRITON_INTERPRET", "1" if interpret else "0")
        return library.backend.__wrapped__(device_type)

    return of


@pytest.mark.parametrize("device_type", ["cuda", "xpu"])
def test_accelerators_take_the_kernels_unless_told_otherwise(backend_of, device_type):
    assert backend_of(device_type) == backend_of(device_type, "triton") == "triton"
    assert backend_of(device_type, "reference") == "reference"
    assert backend_of(device_type, triton=False) == "reference"
    with pytest.raises(RuntimeError, match="triton is not installed: pip install triton"):
        backend_of(device_type, "triton", triton=False)


def test_a_cpu_takes_the_kernels_under_the_interpreter_only(backend_of):
    assert backend_of("cpu") == backend_of("cpu", "triton") == "reference"
    assert backend_of("cpu", interpret=True) == "triton"
    assert backend_of("cpu", "reference", interpret=True) == backend_of("mps") == "reference"
