"""Efficient Prompt Tuning of frozen language models: a short prompt, a low-rank embedding update and gated spaces.

`from ept import EPTConfig, EPTLayer, EPTModel, get_ept_model`. The names are loaded on first use, so that `import
ept` alone imports no model library. The first use of a name registers EPT with PEFT (`ept.model.registration`), and so
does `import ept` if transformers or PEFT has been imported before.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

from .version import __version__

if TYPE_CHECKING:
    from .config import EPTConfig
    from .model.ept_model import EPTModel, get_ept_model
    from .prompt import EPTLayer

__all__ = ["EPTConfig", "EPTLayer", "EPTModel", "__version__", "get_ept_model"]

_MODEL, _REGISTRATION = ".model.ept_model", ".model.registration"
_HOME = {"EPTConfig": ".config", "EPTLayer": ".prompt", "EPTModel": _MODEL, "get_ept_model": _MODEL}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'ept' has no attribute {name!r}")
    import_module(_REGISTRATION, __name__)
    return getattr(import_module(_HOME[name], __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)


if "transformers" in sys.modules or "peft" in sys.modules:  # from here on PEFT's functions know EPT
    import_module(_REGISTRATION, __name__)
