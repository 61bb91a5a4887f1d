"""Registration of EPT with PEFT: PEFT's own functions make, load and swap EPT adapters once this module is imported.

PEFT's mappings name the classes of an adapter type, but `PeftModel` builds only its own prompts ("Not supported"),
and does not train loaded ones. So `PeftModel`, and with it `get_peft_model`, the task classes and the `AutoPeftModel`
family, first checks here whether a configuration or folder is EPT's. All others proceed as before.
"""

from __future__ import annotations

import contextlib
from functools import wraps
from typing import Any

from peft import PeftConfig, PeftModel
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from peft.utils import hotswap

from ..config import OUTPUT_FIELDS, PEFT_TYPE, EPTConfig
from .ept_model import EPTModel

_PEFTS_LOADING: Any = PeftModel.from_pretrained
_PEFTS_SWAPPING = hotswap.hotswap_adapter_from_state_dict


def _new(cls: type, *args: Any, **kwargs: Any) -> Any:
    """Makes the object for `cls(model, config, ...)`: an `EPTModel` for an `EPTConfig`, whichever class is called."""
    config = args[1] if len(args) > 1 else kwargs.get("peft_config")
    if not isinstance(config, EPTConfig) or issubclass(cls, EPTModel):
        return object.__new__(cls)
    # Python calls __init__ only on instances of the class that was called, `PeftModel`.
    return object.__new__(EPTModel) if issubclass(EPTModel, cls) else EPTModel(*args, **kwargs)


@wraps(_PEFTS_LOADING.__func__)
def _from_pretrained(
    cls: Any,
    model: Any,
    model_id: Any,
    adapter_name: str = "default",
    is_trainable: bool = False,
    config: Any = None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    peft_type = getattr(config, "peft_type", None)
    if config is None:
        place = {name: kwargs.get(name) for name in ("subfolder", "revision", "cache_dir", "token")}
        with contextlib.suppress(Exception):  # PEFT's own function, which reads it again, reports errors
            peft_type = PeftConfig._get_peft_type(model_id, **place)
    if peft_type == PEFT_TYPE:
        return EPTModel.from_pretrained(model, model_id, adapter_name, is_trainable, config, **kwargs)
    return _PEFTS_LOADING.__func__(cls, model, model_id, adapter_name, is_trainable, config, *args, **kwargs)


@wraps(_PEFTS_SWAPPING)
def _hotswap(model: Any, state_dict: dict[str, Any], adapter_name: str, config: Any, *args: Any, **kwargs: Any) -> None:
    if not isinstance(config, EPTConfig):
        return _PEFTS_SWAPPING(model, state_dict, adapter_name, config, *args, **kwargs)
    getattr(model, "_orig_mod", model).swap_weights(adapter_name, config, state_dict)


PeftModel.__new__ = staticmethod(_new)  # type: ignore[assignment, method-assign]
PeftModel.from_pretrained = classmethod(_from_pretrained)  # type: ignore[assignment, method-assign]
hotswap.hotswap_adapter_from_state_dict = _hotswap
hotswap.CONFIG_KEYS_TO_CHECK[PEFT_TYPE] = OUTPUT_FIELDS
# Swapping inserts the adapter's name into names that contain the prefix. No name contains EPT's, a space.
PEFT_TYPE_TO_PREFIX_MAPPING[PEFT_TYPE] = " "
