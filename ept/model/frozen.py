"""The frozen model's element-wise work through this project's operators: norms, rotary embedding, activations.

`swap_frozen` replaces modules of a loaded model by equivalent ones that run fewer, fused kernels and keep less for the
backward pass; `restore_frozen` undoes it. Only a module's class changes: parameters, hooks, names and state dict stay
the same, and a module is still an instance of its original class and carries that class's name.

A module is swapped only if its `forward` is known (`known_forwards.py`) and its fused form gave the same results in a
trial (`frozen_trial.py`). It decides at every call: the model's own code runs where the operators gain nothing, while
`torch.compile` traces (it fuses that code itself), and if a weight requires a gradient.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

import ept_kernels

from .. import functional
from .frozen_trial import computes_the_same, is_on_trial, rotates_the_same
from .known_forwards import known_as
from .swapping import change_class, runs_its_class_forward

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# φ by the class of an activation, in torch or transformers.
_ACTIVATIONS = {
    "SiLU": "silu",
    "SiLUActivation": "silu",
    "GELUActivation": "gelu",
    "GELUTanh": "gelu_tanh",
    "PytorchGELUTanh": "gelu_tanh",
    "NewGELUActivation": "gelu_tanh",
    "ReLU": "relu",
}


def swap_frozen(model: nn.Module) -> int:
    """Replaces every module of `model` with a known `forward` by its fused form, in place; returns their number."""
    count = 0
    for module in model.modules():
        if not is_swapped(module) and runs_its_class_forward(module):
            kind: Any = type(module)
            if (new := _fused_class(kind)) is not None:
                change_class(module, new)
                count += 1
    return count


def restore_frozen(model: nn.Module) -> int:
    """Undoes `swap_frozen`; returns the number of restored modules."""
    ours: list[Any] = [module for module in model.modules() if is_swapped(module)]
    for module in ours:
        change_class(module, type(module).their_class)
    return len(ours)


def is_swapped(module: nn.Module) -> bool:
    return "their_class" in vars(type(module))


def _pays(x: Tensor) -> bool:
    """Returns whether the operators should compute with `x`: if kernels run them, and for meta tensors, which represent
    an accelerator's. On a CPU the model's own code is as fast to within 1 %.
    """
    if torch.compiler.is_compiling() or x.dtype not in _DTYPES or type(x) not in (Tensor, nn.Parameter):
        return False
    return x.device.type == "meta" or ept_kernels.backend(x.device) == "triton" or is_on_trial()


class _Fused(nn.Module):
    """A module in its fused form; `their_class` is its original class."""

    their_class: ClassVar[type[nn.Module]]

    if TYPE_CHECKING:  # stands for the class that is fused

        def __getattr__(self, name: str) -> Any: ...

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _unpickled, (self.their_class,), self.__dict__.copy()  # the class is made at run time


class _FusedNorm(_Fused):
    form: ClassVar[str]
    weight: Tensor

    def forward(self, hidden_states: Tensor) -> Tensor:
        if not self.takes(hidden_states):
            return super().forward(hidden_states)
        return self.norm(hidden_states, None)[0]

    def takes(self, x: Tensor) -> bool:
        weight = self.weight
        wants_gradient = weight.requires_grad and torch.is_grad_enabled()
        is_plain = type(weight) in (Tensor, nn.Parameter) and weight.device == x.device and not wants_gradient
        is_plain = is_plain and weight.shape == x.shape[-1:]
        same_dtype = weight.dtype == x.dtype or (self.form in ("t5", "gemma") and weight.dtype in _DTYPES)
        return is_plain and same_dtype and _pays(x)

    def norm(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        eps: Any = self.eps if self.form == "gemma" else self.variance_epsilon
        return functional.rms_norm(x, self.weight, residual, eps, self.form)


def _norm_of_sum(norm: nn.Module, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Computes `norm(x + residual)`, and `x + residual` for the residual path, whose gradients are added in the norm's
    own backward.
    """
    is_watched = norm._forward_hooks or norm._forward_pre_hooks or norm._backward_hooks or norm._backward_pre_hooks
    is_alike = residual is None or (residual.dtype == x.dtype and residual.shape == x.shape)
    if (
        isinstance(norm, _FusedNorm)
        and not is_watched
        and "forward" not in norm.__dict__
        and is_alike
        and norm.takes(x)
    ):
        return norm.norm(x, residual)
    total = x if residual is None else residual + x
    return norm(total), total


class _FusedLlamaLayer(_Fused):
    def forward(
        self,
        hidden_states: Tensor,
        *args: Any,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        position_embeddings: Any = None,
        **kwargs: Any,
    ) -> Tensor:
        given = {"attention_mask": attention_mask, "position_ids": position_ids, **kwargs}
        given["position_embeddings"] = position_embeddings
        if args:  # the order of positional arguments depends on transformers' release
            return super().forward(hidden_states, *args, **given)
        normed, residual = _norm_of_sum(self.input_layernorm, hidden_states)
        attended, _ = self.self_attn(hidden_states=normed, **given)
        normed, residual = _norm_of_sum(self.post_attention_layernorm, attended, residual)
        return residual + self.mlp(normed)


class _FusedT5SelfAttention(_Fused):
    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> tuple[Any, ...]:
        if args:
            return super().forward(hidden_states, attention_mask, *args, **kwargs)
        normed, residual = _norm_of_sum(self.layer_norm, hidden_states)
        attended, *others = self.SelfAttention(normed, mask=attention_mask, **kwargs)
        return residual + self.dropout(attended), *others


class _FusedT5FeedForward(_Fused):
    def forward(self, hidden_states: Tensor) -> Tensor:
        normed, residual = _norm_of_sum(self.layer_norm, hidden_states)
        return residual + self.dropout(self.DenseReluDense(normed))


def _activation_of(module: nn.Module) -> str | None:
    kind = type(module)
    is_theirs = kind.__module__ in ("transformers.activations", "torch.nn.modules.activation")
    return _ACTIVATIONS.get(kind.__name__) if is_theirs and not module._forward_hooks else None


def _gated(activation: nn.Module, gate: Tensor, up: Tensor) -> Tensor:
    name = _activation_of(activation)
    if name is not None and gate.dtype == up.dtype and gate.shape == up.shape and _pays(gate):
        return functional.gated_activation(gate, up, name)
    return activation(gate) * up


class _FusedGatedMLP(_Fused):
    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(_gated(self.act_fn, self.gate_proj(x), self.up_proj(x)))


class _FusedT5GatedMLP(_Fused):
    def forward(self, hidden_states: Tensor) -> Tensor:
        return _projected(self, _gated(self.act, self.wi_0(hidden_states), self.wi_1(hidden_states)))


class _FusedT5MLP(_Fused):
    def forward(self, hidden_states: Tensor) -> Tensor:
        x = self.wi(hidden_states)
        is_fused = _activation_of(self.act) == "relu" and _pays(x)
        return _projected(self, functional.relu(x) if is_fused else self.act(x))


def _projected(mlp: Any, x: Tensor) -> Tensor:
    x, weight = mlp.dropout(x), mlp.wo.weight
    if isinstance(weight, Tensor) and x.dtype != weight.dtype and weight.dtype != torch.int8:
        x = x.to(weight.dtype)
    return mlp.wo(x)


# By what a known `forward` computes; norms and attention are handled separately.
_CLASSES: dict[str, type[_Fused]] = {
    "rms_norm": _FusedNorm,
    "gated_mlp": _FusedGatedMLP,
    "t5_mlp": _FusedT5MLP,
    "t5_gated_mlp": _FusedT5GatedMLP,
    "llama_layer": _FusedLlamaLayer,
    "t5_self_attention": _FusedT5SelfAttention,
    "t5_feed_forward": _FusedT5FeedForward,
}


@functools.cache
def _fused_class(theirs: Any) -> type[nn.Module] | None:
    """Derives the fused form of a class, with the same name; None if its `forward` is unknown or failed its trial."""
    forward = theirs.forward
    base: type[_Fused] = _Fused
    members: dict[str, Any] = {}
    known = known_as(forward)
    if known is not None and known.kind in _CLASSES:
        base = _CLASSES[known.kind]
        if known.kind == "rms_norm":
            members = {"form": known.constant}
            rows = known_as(getattr(theirs, "_norm", None)) if known.constant == "gemma" else None
            if known.constant == "gemma" and (rows is None or rows.kind != "gemma_rows"):
                return None
    elif (with_rotary := _with_rotary(forward)) is not None:
        members = {"forward": with_rotary}
    else:
        return None
    names = {"__module__": theirs.__module__, "__qualname__": theirs.__qualname__, "their_class": theirs}
    fused = type(theirs.__name__, (base, theirs), {**names, **members})
    return fused if known is None or computes_the_same(theirs, fused, known.kind) else None


def _unpickled(theirs: Any) -> nn.Module:
    new: Any = _fused_class(theirs) or theirs
    return new.__new__(new)


def _with_rotary(forward: Any) -> Callable[..., Any] | None:
    """Makes the `forward` of an attention from the same code, with the operator as its `apply_rotary_pos_emb`."""
    name = "apply_rotary_pos_emb"
    plain = inspect.unwrap(forward)
    if not isinstance(plain, types.FunctionType) or name not in plain.__code__.co_names:
        return None
    theirs: Any = plain.__globals__.get(name)
    known, layout = known_as(theirs), known_as(getattr(theirs, "__globals__", {}).get("rotate_half"))
    if known is None or layout is None or (known.kind, layout.kind) != ("rotary", "rotate"):
        return None
    any_angles, interleaved = known.constant, layout.constant
    if not rotates_the_same(theirs, functools.partial(functional.rotary, interleaved=interleaved), any_angles):
        return None

    def apply_rotary_pos_emb(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs or not _is_rotary(q, k, cos, sin, any_angles):
            return theirs(q, k, cos, sin, *args, **kwargs)
        return functional.rotary(q, k, cos, sin, interleaved)

    again = _made_anew(forward, {name: apply_rotary_pos_emb})
    if again is None:
        return None

    @functools.wraps(forward)
    def forward_with_rotary(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return (forward if torch.compiler.is_compiling() else again)(self, *args, **kwargs)

    return forward_with_rotary


def _made_anew(function: Any, variables: dict[str, Any]) -> Any:
    """Copies a function with other globals, and the decorators around it; None if one of them does not keep it in its
    closure.
    """
    cells = function.__closure__
    if (inner := getattr(function, "__wrapped__", None)) is None:
        variables = {**function.__globals__, **variables}
    else:
        again, variables = _made_anew(inner, variables), function.__globals__
        if again is None or all(cell.cell_contents is not inner for cell in cells or ()):
            return None
        cells = tuple(types.CellType(again) if cell.cell_contents is inner else cell for cell in cells)
    new = types.FunctionType(function.__code__, variables, function.__name__, function.__defaults__, cells)
    new.__kwdefaults__ = function.__kwdefaults__
    return new


def _is_rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, any_angles: bool) -> bool:
    same_dtype = q.dtype == k.dtype and cos.dtype == sin.dtype and (any_angles or cos.dtype == q.dtype)
    if not _pays(q) or not same_dtype or cos.dtype not in _DTYPES or (q.dim(), k.dim(), cos.dim()) != (4, 4, 3):
        return False
    batch, _, n, width = q.shape
    columns = cos.shape[-1]
    fits = cos.shape[0] in (1, batch) and cos.shape[1] == n == k.shape[2] and columns <= width and columns % 2 == 0
    return fits and cos.shape == sin.shape and not cos.requires_grad
