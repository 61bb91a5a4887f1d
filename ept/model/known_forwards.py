"""Digests of the forward passes of transformers' modules that `frozen.py` can compute in another way.

A class is known by what its method says, whatever class and method are called: names say little, and many families
copy the same lines. After a change in transformers a class is unknown, and is left alone. A digest does not tell what a
function computes, so a fused form is tried first (`frozen_trial.py`).
"""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import textwrap
from collections.abc import Callable
from typing import Any, NamedTuple


class Known(NamedTuple):
    """A function of transformers that can be computed in another way."""

    kind: str
    """What computes it: a key of `frozen.py`."""
    constant: Any
    """The argument that makes the operator compute this one; None: it needs none."""
    versions: str
    """Releases of transformers in which it was found; of 5.10 to 5.24 every other one was looked at."""
    names: tuple[str, ...]
    """Families that have it, a few of them where it is many: where it stands within transformers.models."""


def known_as(function: Callable[..., Any] | None) -> Known | None:
    """Looks a function up by its source; None: it is unknown, or has none."""
    return KNOWN.get(digest_of(function) or "")


@functools.cache
def digest_of(function: Any) -> str | None:
    """Computes the SHA-256 of a function's arguments and statements, under any version of Python the same.

    Its name, annotations, docstring and decorators do not count, nor do comments and layout. None: it has no source.
    """
    try:
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(function))).body
    except (OSError, TypeError, SyntaxError, ValueError):
        return None
    if not isinstance(tree, ast.FunctionDef):
        return None
    statements = tree.body[1:] if ast.get_docstring(tree) is not None else tree.body
    return hashlib.sha256(_written([tree.args, *statements]).encode()).hexdigest()


# Fields of a node that say nothing of what is computed, or that some versions of Python do not have.
_LEFT_OUT = {"annotation", "returns", "decorator_list", "ctx", "kind", "type_comment", "type_params"}


def _written(node: Any) -> str:
    """Writes a syntax tree out. `ast.dump` and `ast.unparse` differ between versions of Python."""
    if isinstance(node, list):
        return f"[{', '.join(map(_written, node))}]"
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = [(name, value) for name, value in ast.iter_fields(node) if name not in _LEFT_OUT]
    if not isinstance(node, ast.Constant):  # whose value may be None
        fields = [(name, value) for name, value in fields if value is not None and value != []]
    return f"{type(node).__name__}({', '.join(f'{name}={_written(value)}' for name, value in fields)})"


KNOWN: dict[str, Known] = {
    # RMSNorm. The forms differ in where they round, and Gemma's adds 1 to the weight.
    "ab976057508269c92eaf790a17554a5f8fdbcbf924e057a52ad9f127e5f7939e": Known(
        "rms_norm",
        "llama",
        "5.10 to 5.24",
        (
            "llama.LlamaRMSNorm.forward",
            "mistral.MistralRMSNorm.forward",
            "qwen2.Qwen2RMSNorm.forward",
            "qwen3.Qwen3RMSNorm.forward",
            "phi3.Phi3RMSNorm.forward",
            "smollm3.SmolLM3RMSNorm.forward",
        ),
    ),
    "7ac8fd8fa4570ffa0d1251f6389e4e1a0a62245d5798ae46081a266da42700b8": Known(
        "rms_norm",
        "olmo",
        "5.10 to 5.24",
        ("olmo2.Olmo2RMSNorm.forward", "olmo3.Olmo3RMSNorm.forward"),
    ),
    "b99eb53e64755b847dad1a69473161ca02e90bac238a0079b5f6449f902930ac": Known(
        "rms_norm",
        "t5",
        "5.10 to 5.24",
        ("t5.T5LayerNorm.forward", "mt5.MT5LayerNorm.forward", "umt5.UMT5LayerNorm.forward"),
    ),
    "d402e14a9fb09c2cab5bdf973a0d2ea2ab1946ee4ab8170967fd5cb9fa80235b": Known(
        "rms_norm",
        "gemma",
        "5.10 to 5.24",
        ("gemma.GemmaRMSNorm.forward", "gemma2.Gemma2RMSNorm.forward", "gemma3.Gemma3RMSNorm.forward"),
    ),
    "179156153e92a27f5ae3a53e72ff97acfc76598940c0d754e49b847e6cd04151": Known(
        "gemma_rows",
        None,
        "5.10 to 5.24",
        ("gemma.GemmaRMSNorm._norm", "gemma2.Gemma2RMSNorm._norm", "gemma3.Gemma3RMSNorm._norm"),
    ),
    # Rotary embedding. Angles turn neighbouring columns together (True), or those of two halves.
    "2fe1910d039f824f8b26e86c50914f437a168788f653ecb6de6929fb28daed44": Known(
        "rotate",
        False,
        "5.10 to 5.24",
        (
            "llama.rotate_half",
            "mistral.rotate_half",
            "qwen2.rotate_half",
            "qwen3.rotate_half",
            "gemma.rotate_half",
            "gpt_neox.rotate_half",
        ),
    ),
    "d7432c4cf7ceb78989eac3b0fdc02b0e4abf3bdfd6cc698a3ae5e1808e1599b7": Known(
        "rotate",
        True,
        "5.10 to 5.24",
        ("cohere.rotate_half", "cohere2.rotate_half"),
    ),
    # The result has the dtype of queries and keys, whatever the angles' is (True), or they must have one dtype.
    "9759618c8ab33259c536f26d55c0b272c9594918a0100c3466babe7bd091dfc6": Known(
        "rotary",
        False,
        "5.10 to 5.24",
        (
            "llama.apply_rotary_pos_emb",
            "mistral.apply_rotary_pos_emb",
            "qwen2.apply_rotary_pos_emb",
            "qwen3.apply_rotary_pos_emb",
            "gemma.apply_rotary_pos_emb",
        ),
    ),
    "7a900f8de11b0c805b5a239c1a23a484f0fe26eaa881b91a1fbb5d4d59cfbe19": Known(
        "rotary",
        False,
        "5.10 to 5.24",
        ("gpt_neox.apply_rotary_pos_emb", "glm4_moe.apply_rotary_pos_emb"),
    ),
    "8a4abe422798dbe8aa3a05dede20346d52ed6b8d1545cb39ce6ef6ec83cf8f5a": Known(
        "rotary",
        True,
        "5.10 to 5.24",
        ("cohere.apply_rotary_pos_emb", "cohere2.apply_rotary_pos_emb"),
    ),
    "64beeedb8ab0a481fde4f2e88f4b10f626b441bc9c0636c70aa483393c64a544": Known(
        "rotary",
        True,
        "5.10 to 5.24",
        ("olmo.apply_rotary_pos_emb", "olmo2.apply_rotary_pos_emb"),
    ),
    # Feed-forward layers.
    "8d9c30ca200ab50057fa63765652bb4fa6c1f4f9b93a2264908489425e4d96c4": Known(
        "gated_mlp",
        None,
        "5.10 to 5.24",
        (
            "llama.LlamaMLP.forward",
            "mistral.MistralMLP.forward",
            "qwen2.Qwen2MLP.forward",
            "qwen3.Qwen3MLP.forward",
            "gemma.GemmaMLP.forward",
            "olmo2.Olmo2MLP.forward",
            "cohere.CohereMLP.forward",
        ),
    ),
    "09c1c1d936b4e9ba2fc8e9d850dea4cc6d78681bf9f385ade0820fce9c19198e": Known(
        "t5_mlp",
        None,
        "5.10 to 5.24",
        ("t5.T5DenseActDense.forward", "longt5.LongT5DenseActDense.forward"),
    ),
    "ae6dc3c1618856b4072130302d50c172939c71bdb1dfe677cf3f7cde33f50a59": Known(
        "t5_gated_mlp",
        None,
        "5.10 to 5.24",
        ("t5.T5DenseGatedActDense.forward", "mt5.MT5DenseGatedActDense.forward", "umt5.UMT5DenseGatedActDense.forward"),
    ),
    # Layers whose norms add the residual. Releases differ in what they call the cache and what they hand on.
    "dae8d49a8fb221d80c50de0facb43b5fb0a896877bebcefba84b7372511ce800": Known(
        "llama_layer",
        None,
        "5.10 to 5.23",
        (
            "llama.LlamaDecoderLayer.forward",
            "mistral.MistralDecoderLayer.forward",
            "qwen2.Qwen2DecoderLayer.forward",
            "qwen3.Qwen3DecoderLayer.forward",
            "gemma.GemmaDecoderLayer.forward",
        ),
    ),
    "0e64d7ec93af17b07e39246cf435b38d582fe12d562029cde6110f5d441722ea": Known(
        "llama_layer",
        None,
        "5.24",
        (
            "llama.LlamaDecoderLayer.forward",
            "mistral.MistralDecoderLayer.forward",
            "qwen2.Qwen2DecoderLayer.forward",
            "qwen3.Qwen3DecoderLayer.forward",
            "gemma.GemmaDecoderLayer.forward",
        ),
    ),
    "ff504e0686ddd0efcbd080265cddcdf01b021ba08587e4eb81f740d6286639cf": Known(
        "t5_feed_forward",
        None,
        "5.10 to 5.24",
        ("t5.T5LayerFF.forward", "mt5.MT5LayerFF.forward", "umt5.UMT5LayerFF.forward"),
    ),
    "ee13697b4c3575d666bbde4456b55ba93b50b5222ae31c3edd863f2184f4fd3b": Known(
        "t5_self_attention",
        None,
        "5.10 to 5.14",
        ("t5.T5LayerSelfAttention.forward", "mt5.MT5LayerSelfAttention.forward"),
    ),
    "599196744ad2a8d7ab1bc6c601fad88a228b8cbbbb05d373006a7b679b2a231d": Known(
        "t5_self_attention",
        None,
        "5.16 to 5.23",
        ("t5.T5LayerSelfAttention.forward", "mt5.MT5LayerSelfAttention.forward"),
    ),
    "7a929d0442c0f77af0df3af8c323e3890363b46f68c1b1ee42bafc62f428d1ce": Known(
        "t5_self_attention",
        None,
        "5.24",
        ("t5.T5LayerSelfAttention.forward", "mt5.MT5LayerSelfAttention.forward"),
    ),
}
