"""`Linear4bit`: drop-in for bitsandbytes' 4-bit layer that computes through this project's operators.

`swap_linear4bit` turns the layers of a loaded model into it in place, `restore_linear4bit` turns them back.
Only a layer's class changes: parameters, quant states, hooks, names and state dict stay the same, and a layer is still
an instance of `bitsandbytes.nn.Linear4bit`.
"""

from __future__ import annotations

from typing import Any

import bitsandbytes
import torch
from torch import Tensor, nn
from torch.nn import functional

import ept_kernels
from ept_kernels import FourBitWeight
from ept_kernels.four_bit.weight import LEVELS, levels

from ..functional import matmul_4bit
from .swapping import change_class

# Classes that compute as bitsandbytes' layer does; other subclasses have their own forward.
_THEIRS = (bitsandbytes.nn.Linear4bit, bitsandbytes.nn.LinearNF4, bitsandbytes.nn.LinearFP4)

_DERIVED = ("_four_bit", "_dequantized", "_dequantized_from")  # attributes computed from the weight on demand


@torch.compiler.assume_constant_result
def _runs_triton(device_type: str) -> bool:
    return ept_kernels.backend(device_type) == "triton"


class Linear4bit(bitsandbytes.nn.Linear4bit):
    """A frozen 4-bit layer, `x·Wᵀ + bias`, made by `swap_linear4bit`.

    It falls back to bitsandbytes if the Triton kernels do not run (on a CPU, or with `EPT_KERNELS=reference`; see
    `ept_kernels.backend`).

    As in bitsandbytes, the input is cast to `compute_dtype` (under autocast to autocast's dtype) and the output back to
    the input's dtype. Gradients reach the input and a trainable bias; only the packed weight is kept for the backward
    pass.
    """

    compute_dtype: torch.dtype | None
    compute_type_is_set: bool
    their_class: type[nn.Module]
    always: bool
    cache_bytes: int  # of the dequantised weight; 0: it is not kept

    def forward(self, x: Tensor) -> Tensor:
        """Maps `[..., in_features]` to `[..., out_features]`, in x's dtype.

        Raises:
            ValueError: the weight is not quantised, damaged, repacked for CPU inference, or requires a gradient.
        """
        shape, swapped = getattr(self._state(), "shape", None), (self.in_features, self.out_features)
        # bitsandbytes can also compute with a weight that was quantised as [in_features, out_features].
        is_transposed = shape is not None and tuple(shape) == swapped and swapped[0] != swapped[1]
        if not (self.always or _runs_triton(x.device.type)) or is_transposed:
            return super().forward(x)
        if self.weight.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                "a packed 4-bit weight cannot be trained: set requires_grad=False on it and train an adapter"
            )
        if not self.compute_type_is_set:
            self.set_compute_type(x)
            self.compute_type_is_set = True
        dtype = x.dtype
        if self.compute_dtype is not None:
            x = x.to(self.compute_dtype)
        if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
            x = x.to(torch.get_autocast_dtype(x.device.type))
        weight = self.four_bit_weight()
        bias = None if self.bias is None else self.bias.to(x.dtype)
        W = self._dequantized_weight(weight, x.dtype)
        out = matmul_4bit(x, weight, bias) if W is None else functional.linear(x, W, bias)
        return out.to(dtype)

    def four_bit_weight(self) -> FourBitWeight:
        """Returns the weight in the operators' form, checked again only if its memory or quant state has changed.

        Nothing is kept for a weight that is offloaded after every call, and a kept weight is not used once sharding has
        freed its memory.
        """
        if torch.compiler.is_compiling():
            return FourBitWeight.from_bitsandbytes(self, check_code=False)
        state = self._state()
        absmax = getattr(state, "absmax", None)
        known, weight = self.__dict__.get("_four_bit", (None, None))
        same = known is not None and known[0] is state
        if weight is None or not same or known[1] is not absmax or weight.packed.data_ptr() != self.weight.data_ptr():
            with torch.inference_mode(False):
                weight = FourBitWeight.from_bitsandbytes(self, check_code=not same)
            self.make_levels()  # accelerate may have moved the weight to another device
            self.__dict__["_four_bit"] = ((state, absmax), None if self._is_offloaded() else weight)
        return weight

    def make_levels(self) -> None:
        """Puts the table of the weight's 16 levels where the kernels need it: if an operator made it while a CUDA graph
        is captured, it would lie in that graph's memory.
        """
        state = self._state()
        if state is not None and state.quant_type in LEVELS and _runs_triton(self.weight.device.type):
            levels(state.quant_type, self.weight.device)

    def drop_caches(self) -> None:
        """Drops everything derived from the weight, which is then checked again at the next call."""
        for name in _DERIVED:
            self.__dict__.pop(name, None)

    def _dequantized_weight(self, weight: FourBitWeight, dtype: torch.dtype) -> Tensor | None:
        """Returns the kept weight `[out_features, in_features]`; None if the budget has no room for it."""
        if self.cache_bytes < dtype.itemsize * weight.rows * weight.columns or self._is_offloaded():
            return None
        W = self.__dict__.get("_dequantized")
        if torch.compiler.is_compiling():  # used if an uncompiled call has made it
            return W if W is not None and W.dtype == dtype and W.device == weight.packed.device else None
        version = (weight, dtype, weight.packed._version, weight.absmax._version)
        if W is None or self.__dict__.get("_dequantized_from") != version:
            self.__dict__.pop("_dequantized", None)  # first, so that there are never two
            with torch.inference_mode(False), torch.no_grad():
                W = ept_kernels.dequantize_4bit(weight, dtype)
            self.__dict__.update(_dequantized=W, _dequantized_from=version)
        return W

    def _is_offloaded(self) -> bool:
        """Checks whether a hook of accelerate moves the weight off the device after every call."""
        hook = self.__dict__.get("_hf_hook")
        return hook is not None and any(getattr(h, "offload", False) for h in getattr(hook, "hooks", (hook,)))

    def _state(self) -> Any:
        state = getattr(self.weight, "quant_state", None)
        return self.quant_state if state is None else state

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self.drop_caches()
        super()._apply(fn, recurse)
        self.make_levels()
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.drop_caches()
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in _DERIVED}


def swap_linear4bit(model: nn.Module, *, always: bool = False, dequantized_cache_bytes: int = 0) -> int:
    """Turns every bitsandbytes 4-bit layer of `model` into `Linear4bit`, in place; returns their number.

    Calling it again resets the options.

    Args:
        always: use the operators on every device, whichever implementation runs them there. By default they are used
            only where that is the Triton kernels; bitsandbytes computes elsewhere.
        dequantized_cache_bytes: maximum bytes, over the whole model, for keeping dequantised weights. The smallest
            layers come first, in the model's order among equals: a kept byte saves the same memory traffic in every
            layer, and a small layer saves one launch for fewer bytes. A layer without a compute type counts as float32.
            Kept weights serve every number of tokens; they are dropped when the model is moved or loaded, and never
            saved.

    Raises:
        ValueError: `dequantized_cache_bytes` is negative.
    """
    if dequantized_cache_bytes < 0:
        raise ValueError(f"dequantized_cache_bytes must be at least 0, got {dequantized_cache_bytes}")
    for module in model.modules():
        if type(module) in _THEIRS:
            module.__dict__["their_class"] = type(module)
            change_class(module, Linear4bit)
    ours = [module for module in model.modules() if isinstance(module, Linear4bit)]
    left = dequantized_cache_bytes
    for module in sorted(ours, key=_dequantized_bytes):
        needed = _dequantized_bytes(module)
        module.drop_caches()
        module.always, module.cache_bytes = always, needed if needed <= left else 0
        left -= module.cache_bytes
        module.make_levels()
    return len(ours)


def restore_linear4bit(model: nn.Module) -> int:
    """Undoes `swap_linear4bit` and drops kept weights. Returns the number of restored layers."""
    ours = [module for module in model.modules() if isinstance(module, Linear4bit)]
    for module in ours:
        module.drop_caches()
        change_class(module, module.their_class)
        for name in ("their_class", "always", "cache_bytes"):
            del module.__dict__[name]
    return len(ours)


def _dequantized_bytes(module: Linear4bit) -> int:
    return (module.compute_dtype or torch.float32).itemsize * module.in_features * module.out_features
