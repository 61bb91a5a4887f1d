"""`ept env`"""

from __future__ import annotations

from typing import Any

from .common import JSON, answer, quiet


def env(json: bool = JSON) -> None:
    """Show versions, devices and operators, for a bug report."""
    with quiet():
        from ept.runs.loading import default_device
        from ept.utils.environment import hardware, versions
        from ept_kernels import backend

    device = default_device()
    machine = hardware()
    report: dict[str, Any] = {
        "versions": versions(),
        "hardware": machine,
        "device": str(device),
        "operators": {name: backend(name) for name in dict.fromkeys(("cpu", device.type))},
    }
    lines = [(name, version or "not installed") for name, version in report["versions"].items()]
    lines += [
        ("platform", machine["platform"]),
        ("processor", f"{machine['processor']} ({machine['cores']} cores, {machine['threads']} threads)"),
        *(("gpu", f"{gpu['name']} ({gpu['memory_bytes'] / 2**30:.0f} GiB)") for gpu in machine["gpus"]),
        ("cuda", machine["cuda"] or "none"),
        *(("operators", f"{kind} on {name}") for name, kind in report["operators"].items()),
    ]
    answer(json, report, *(f"{name:14} {text}" for name, text in lines))
