"""Registers the adapter type with PEFT as soon as both are imported, in whichever order.

``import ept`` must not import PEFT, which imports transformers; and ``PeftConfig.from_pretrained`` must know EPT
adapters once ``ept`` is imported. So, unless PEFT is there already, a finder waits for its import and registers right
after it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType


class _AfterPeft(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != "peft":
            return None
        sys.meta_path.remove(self)
        spec = find_spec("peft")
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            import_module("ept.config")

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


def register_when_peft_is_imported() -> None:
    """Imports ``ept.config``, which registers, now if PEFT is imported, else right after it is."""
    if "peft" in sys.modules:
        import_module("ept.config")
    else:
        sys.meta_path.insert(0, _AfterPeft())
