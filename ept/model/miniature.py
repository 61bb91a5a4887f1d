"""Miniatures: random models of a given class and configuration, small enough to test how they read their input."""

from __future__ import annotations

import copy
import math
import re
import warnings
from typing import Any

import torch
from torch import nn

LAYERS, HEADS, HEAD_DIM, WIDTH, EXPERTS, WINDOW, MAX_POSITIONS = 2, 4, 8, 32, 4, 4, 4096
MAX_PARAMETERS = 100_000_000  # mostly in the vocabulary, which keeps its size

_SEED = 0
_WIDTHS = ("width", "head_dim", "rank")
_LARGE = 64  # smaller sizes are left as they are
# Attempts, until one can be built and run: sizes set, or all widths divided by one number, at few or all layers.
ATTEMPTS: tuple[tuple[str | None, bool], ...] = (
    ("set", True),
    ("divided", True),
    ("set", False),
    ("divided", False),
    (None, False),
)
# Names of sizes in configurations. None of them decides how a model reads, as kinds of layers and positions, special
# tokens and pooling do; a window remains, but small enough for a few tokens to reach its end.
_NAMES = {
    kind: re.compile("|".join(names))
    for kind, names in {
        "layers": (r"(num_|n_)?(hidden_|encoder_|decoder_|attention_|main_)?(layers?|blocks)",),
        "experts": (r"(num|n|moe_num)_(local_|routed_|dense_)?experts",),
        "top_k": ("num_experts_per_tok(en)?", "(moe_|router_)?top_?k", "moe_k", "num_selects"),
        "groups": ("n_group", "topk_groups?", "num_expert_groups?", "n_groups_expert"),
        "head_dim": (".*(head_dim|head_size|d_kv|d_head|key_length|rotary_dim|kv_channels|rope_dim|qk_dim)",),
        "rank": (".*_rank", ".*_lora.*dim"),
        "heads": (".*heads?", ".*head_groups?", ".*num_key_value_groups"),
        "window": (".*(window|window_size|chunk_size|block_length|look_?back)", ".*sliding.*size"),
        "positions": (
            ".*(max_position_embeddings|n_positions|n_ctx|max_seq_len|max_target_positions)",
            ".*max_seq.*length",
        ),
        "width": (
            ".*(hidden_size|hidden_dim|d_model|n_embd|n_embed|dims?|d_ff|ffn_dim|d_inner|n_inner|intermediate.*)",
            ".*(embedding_size|embd?_size|proj.*_size|bottleneck.*size|inner_size|ff_size|_width|_size_per_(head|group))",
        ),
    }.items()
}


def miniature(model_class: type[nn.Module], config: Any, widths: str | None = "set", layers: bool = True) -> nn.Module:
    """Makes a random model of `model_class`, with few layers and small widths in `config`, on the CPU in eval mode.

    The state of random generators, `config` and devices are unchanged. Raises whatever the class raises, and
    `ValueError` if the model would be large.
    """
    small = shrunk(config, widths, layers)
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if (widths, layers) != ATTEMPTS[0]:
            with torch.device("meta"):
                size = sum(parameter.numel() for parameter in model_class(copy.deepcopy(small)).parameters())
            if size > MAX_PARAMETERS:
                raise ValueError(f"a small {model_class.__name__} would have {size:,} parameters")
        with torch.device("cpu"):
            torch.default_generator.manual_seed(_SEED)  # not accelerators' generators
            model: Any = model_class(small).to(torch.float32)
            _randomise(model)
    return model.eval().requires_grad_(False)


def shrunk(config: Any, widths: str | None = "set", layers: bool = True) -> Any:
    """Copies a configuration with small sizes."""
    config = copy.deepcopy(config)
    for name in ("quantization_config", "_pre_quantization_dtype"):
        if name in config.__dict__:
            delattr(config, name)
    _shrink(config, widths, layers)
    for part in {id(part): part for part in (config, config.get_text_config())}.values():
        if getattr(part, "pad_token_id", None) is None:
            part.pad_token_id = 0  # many set it only when a batch needs it
    return config


def _shrink(config: Any, widths: str | None, fewer_layers: bool) -> None:
    values = config.__dict__
    sizes = [(_kind(name), value) for name, value in values.items() if type(value) is int]
    hidden = next((v for k in ("hidden_size", "d_model", "n_embd", "dim") if type(v := values.get(k)) is int), 0)
    depth = next((value for kind, value in sizes if kind == "layers"), 0)
    per_layer = [k for k, v in values.items() if isinstance(v, (list, tuple)) and len(v) == depth > LAYERS]
    kept = _kept_layers([values[k] for k in per_layer], depth) if fewer_layers else list(range(depth))
    heads = max((value for kind, value in sizes if kind == "heads"), default=0)
    divisor = math.gcd(8, *(value for kind, value in sizes if kind in _WIDTHS and value >= _LARGE))
    head_dim = _head_dim(values)
    for name, value in list(values.items()):
        kind = _kind(name)
        if hasattr(value, "to_dict") and hasattr(value, "__dict__"):
            _shrink(value, widths, fewer_layers)
        elif name in per_layer:
            values[name] = type(value)(value[i] for i in kept)
        elif type(value) is not int or kind is None:
            continue
        elif kind == "layers":
            values[name] = min(value, max(len(kept), LAYERS)) if fewer_layers else value
        elif kind == "window":
            values[name] = min(value, WINDOW)
        elif kind == "positions":
            values[name] = min(value, MAX_POSITIONS)
        elif widths == "set":
            values[name] = _small(kind, value, hidden, heads)
        elif widths == "divided" and kind in _WIDTHS and value >= _LARGE:
            values[name] = value // divisor
    rope = values.get("rope_parameters")
    if isinstance(rope, dict) and rope.get("mrope_section") and head_dim:  # parts of a head, for three axes
        section, part = rope["mrope_section"], _head_dim(values)
        made = [max(1, x * part // head_dim) for x in section[:-1]]
        rope["mrope_section"] = [*made, sum(section) * part // head_dim - sum(made)]


def _head_dim(values: dict[str, Any]) -> int:
    heads, hidden = values.get("num_attention_heads"), values.get("hidden_size")
    if type(own := values.get("head_dim")) is int:
        return own
    return hidden // heads if type(heads) is int and type(hidden) is int and heads else 0


def _kept_layers(per_layer: list[Any], depth: int) -> list[int]:
    """Chooses the layers of a miniature: the first ones, and the first of each kind."""
    kinds = [tuple(str(values[i]) for values in per_layer) for i in range(depth)]
    firsts = [i for i, kind in enumerate(kinds) if kind not in kinds[:i]][:4]
    return sorted({*firsts, *[i for i in range(depth) if i not in firsts][: max(0, LAYERS - len(firsts))]})


def _kind(name: str) -> str | None:
    return next((kind for kind, pattern in _NAMES.items() if pattern.fullmatch(name)), None)


def _small(kind: str, value: int, hidden: int, heads: int) -> int:
    if kind in ("experts", "top_k", "groups"):
        return min(value, {"experts": EXPERTS, "top_k": 2, "groups": 1}[kind])
    if kind == "heads":
        return value if heads <= HEADS else max(1, value * HEADS // heads)
    if value < _LARGE:
        return value
    return {"head_dim": HEAD_DIM, "rank": WIDTH // 2}.get(kind) or (WIDTH if value >= hidden else WIDTH // 2)


def _randomise(model: nn.Module) -> None:
    """Draws weights large enough to make any difference show: fresh models are nearly linear in theirs."""
    for parameter in {id(p): p for p in model.parameters()}.values():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=1 / math.sqrt(parameter[0].numel()))
        elif parameter.is_floating_point():
            parameter.data.add_(0.1 * torch.randn(parameter.shape))
