"""`ept env`"""

from __future__ import annotations

from typing import Any

import typer

from .common import JsonOption, print_json, quiet


def env(json: JsonOption = False) -> None:
    """Show versions, devices and which operators run: what a bug report needs."""
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
    if json:
        print_json(report)
        return
    for name, version in report["versions"].items():
        typer.echo(f"{name:14} {version or 'not installed'}")
    typer.echo(f"{'platform':14} {machine['platform']}")
    typer.echo(f"{'processor':14} {machine['processor']} ({machine['cores']} cores, {machine['threads']} threads)")
    for gpu in machine["gpus"]:
        typer.echo(f"{'gpu':14} {gpu['name']} ({gpu['memory_bytes'] / 2**30:.0f} GiB)")
    typer.echo(f"{'cuda':14} {machine['cuda'] or 'none'}")
    for name, kind in report["operators"].items():
        typer.echo(f"{'operators':14} {kind} on {name}")
