"""A trial of a fused form on a miniature of the module it replaces: a digest shows that code is known, not what it
computes. Output and gradient must equal the module's own.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

logger = logging.getLogger(__name__)

# Fractions of the largest entry: the two sides round in different orders.
_TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2.0**-6}
_WIDTH, _INNER = 8, 12

_on_trial: ContextVar[bool] = ContextVar("on_trial", default=False)


def is_on_trial() -> bool:
    """Checks whether a fused form must use the operators although they may not pay here."""
    return _on_trial.get()


def computes_the_same(theirs: type[nn.Module], fused: type[nn.Module], kind: str) -> bool:
    """Runs both classes on one small random input, forward and backward; warns if they differ.

    Args:
        kind: of `known_forwards.Known`; determines what a miniature consists of.
    """

    def result(new: type[nn.Module], dtype: torch.dtype) -> list[Tensor]:
        module = new.__new__(new)
        nn.Module.__init__(module)
        for name, part in _PARTS[kind]().items():
            setattr(module, name, part)
        module.to(dtype).requires_grad_(False).eval()
        x = _drawn(dtype, 2, 3, _WIDTH).requires_grad_()
        output = module(x, **{name: value(dtype) for name, value in _ARGUMENTS.get(kind, {}).items()})
        return _with_gradients(output if isinstance(output, tuple) else (output,), [x])

    return _is_same(theirs, lambda dtype: result(theirs, dtype), lambda dtype: result(fused, dtype))


def rotates_the_same(theirs: Callable[..., Any], ours: Callable[..., Any], any_angles: bool) -> bool:
    """Runs both rotary embeddings on one small random input, forward and backward; warns if they differ.

    Args:
        any_angles: float32 angles also rotate 16-bit rows.
    """

    def result(rotate: Callable[..., Any], dtype: torch.dtype) -> list[Tensor]:
        q, k = (_drawn(dtype, 2, heads, 3, _WIDTH).requires_grad_() for heads in (4, 2))
        cos, sin = (_drawn(torch.float32 if any_angles else dtype, 2, 3, _WIDTH) for _ in range(2))
        return _with_gradients(rotate(q, k, cos, sin), [q, k])

    return _is_same(theirs, lambda dtype: result(theirs, dtype), lambda dtype: result(ours, dtype))


def _is_same(theirs: Any, expected: Callable[..., list[Tensor]], actual: Callable[..., list[Tensor]]) -> bool:
    reason = "its results differ"
    for dtype, tolerance in _TOLERANCES.items():
        try:
            with _apart():
                wanted = expected(dtype)
            with _apart():
                found = actual(dtype)
        except Exception as error:  # a class that only shares its source with a known one may need anything
            reason = f"the trial failed: {error}"
            break
        pairs = list(zip(found, wanted, strict=True)) if len(found) == len(wanted) else []
        if not pairs or not all(_is_close(a, b, tolerance) for a, b in pairs):
            break
    else:
        return True
    logger.warning("%s.%s keeps its own code instead of the fused code: %s", theirs.__module__, theirs.__name__, reason)
    return False


@contextlib.contextmanager
def _apart() -> Iterator[None]:
    """Leaves the caller's random numbers, modes and devices unchanged."""
    token = _on_trial.set(True)
    try:
        with (
            torch.random.fork_rng(devices=[]),
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.autocast("cpu", enabled=False),
            torch.device("cpu"),
        ):
            torch.default_generator.manual_seed(0)  # not `torch.manual_seed`, which also seeds accelerators
            yield
    finally:
        _on_trial.reset(token)


def _drawn(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(shape).to(dtype)


def _with_gradients(outputs: tuple[Any, ...], inputs: list[Tensor]) -> list[Tensor]:
    values = [output for output in outputs if isinstance(output, Tensor)]
    differentiable = [value for value in values if value.requires_grad]
    gradients = torch.autograd.grad(differentiable, inputs, [torch.cos(value.detach()) for value in differentiable])
    return [*(value.detach() for value in values), *gradients]


def _is_close(actual: Tensor, expected: Tensor, tolerance: float) -> bool:
    if actual.dtype != expected.dtype or actual.shape != expected.shape:
        return False
    return bool((actual - expected).abs().max() <= tolerance * (1 + expected.abs().max()))


class _Attention(nn.Module):
    """A stand-in for an attention, whose output depends on all its inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(_WIDTH, _WIDTH)

    def forward(self, hidden_states: Tensor, **given: Any) -> tuple[Any, ...]:
        out = self.linear(hidden_states)
        for name, value in sorted(given.items()):
            if isinstance(value, Tensor):
                out = out + len(name) * value
        return out, given.get("position_bias"), None


class _DecoderAttention(_Attention):
    def forward(self, hidden_states: Tensor, **given: Any) -> tuple[Any, ...]:
        return super().forward(hidden_states, **given)[0], None


def _norm() -> dict[str, Any]:
    return {"weight": nn.Parameter(torch.randn(_WIDTH)), "variance_epsilon": 1e-3, "eps": 1e-3}


def _gated_mlp() -> dict[str, Any]:
    gate, up = (nn.Linear(_WIDTH, _INNER) for _ in range(2))
    return {"gate_proj": gate, "up_proj": up, "down_proj": nn.Linear(_INNER, _WIDTH), "act_fn": nn.SiLU()}


def _t5_mlp() -> dict[str, Any]:
    wi, wo = nn.Linear(_WIDTH, _INNER), nn.Linear(_INNER, _WIDTH)
    return {"wi": wi, "wo": wo, "act": nn.ReLU(), "dropout": nn.Dropout()}


def _t5_gated_mlp() -> dict[str, Any]:
    return {**_t5_mlp(), "act": nn.SiLU(), "wi_0": nn.Linear(_WIDTH, _INNER), "wi_1": nn.Linear(_WIDTH, _INNER)}


def _llama_layer() -> dict[str, Any]:
    first, second, mlp = (nn.Linear(_WIDTH, _WIDTH) for _ in range(3))
    norms = {"input_layernorm": first, "post_attention_layernorm": second}
    return {**norms, "self_attn": _DecoderAttention(), "mlp": mlp}


def _t5_self_attention() -> dict[str, Any]:
    return {"layer_norm": nn.Linear(_WIDTH, _WIDTH), "SelfAttention": _Attention(), "dropout": nn.Dropout()}


def _t5_feed_forward() -> dict[str, Any]:
    norm, inner = (nn.Linear(_WIDTH, _WIDTH) for _ in range(2))
    return {"layer_norm": norm, "DenseReluDense": inner, "dropout": nn.Dropout()}


_PARTS: dict[str, Callable[[], dict[str, Any]]] = {
    "rms_norm": _norm,
    "gated_mlp": _gated_mlp,
    "t5_mlp": _t5_mlp,
    "t5_gated_mlp": _t5_gated_mlp,
    "llama_layer": _llama_layer,
    "t5_self_attention": _t5_self_attention,
    "t5_feed_forward": _t5_feed_forward,
}


def _like_rows(dtype: torch.dtype) -> Tensor:
    return _drawn(dtype, 2, 3, _WIDTH)


_ARGUMENTS: dict[str, dict[str, Callable[[torch.dtype], Tensor]]] = {
    "llama_layer": dict.fromkeys(("attention_mask", "position_ids", "position_embeddings"), _like_rows),
    "t5_self_attention": dict.fromkeys(("attention_mask", "position_bias"), _like_rows),
}
