"""Search for the sizes of a configuration that use a budget of parameters best."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import EPTConfig

# How a budget is shared out where the caller leaves it open: as the defaults do at d = 768, m = 256; without spaces, as
# DePT's published default (60 prompt tokens, rank 30) does.
_SHARES = {"prompt": 0.4, "low-rank": 0.4, "spaces": 0.2}
_SHARES_WITHOUT_SPACES = {"prompt": 0.6, "low-rank": 0.4}
# A small budget goes to the prompt first: on T5-base, prompt tuning with 2, 10, 20 and 50 tokens has GLUE means near
# 77, 84, 84 and 84 (a figure of arXiv 2502.04501). A handful of tokens is too few, and more than twenty gain little.
_ENOUGH_TOKENS, _LARGEST_PROMPT_SHARE = 16, 0.7


def best_config(
    cls: type[EPTConfig], model_or_d: Any, max_length: int, budget: int, method: str, fields: dict[str, Any]
) -> EPTConfig:
    """As `EPTConfig.for_budget`."""
    d = model_or_d if isinstance(model_or_d, int) else _embedding_width(model_or_d)
    fields = {"max_length": max_length, **_method_fields(method), **fields}
    best: tuple[float, EPTConfig] | None = None
    smallest: int | None = None
    for sizes in _candidate_sizes(d, budget, fields):
        config = cls(**{**fields, **sizes})
        config, count = _spend_rest(config, d, budget, fields)
        smallest = count if smallest is None else min(smallest, count)
        if count <= budget:
            loss = _distance_from_shares(config, d, budget)
            if best is None or loss < best[0]:
                best = (loss, config)
    if best is None:
        raise ValueError(
            f"no {method} configuration has at most {budget} parameters with width {d} and "
            f"max_length={max_length}: the smallest has {smallest}; raise the budget or lower max_length, r or "
            "num_virtual_tokens"
        )
    return best[1]


def _distance_from_shares(self: EPTConfig, d: int, budget: int) -> float:
    """How far this configuration is from spending `budget` in the usual proportions; 0 is perfect."""
    shapes = self.parameter_shapes(d)
    spent = {
        "prompt": math.prod(shapes.get("prompt", (0,))),
        "low-rank": sum(math.prod(shapes.get(name, (0,))) for name in ("A", "B")),
        "spaces": sum(math.prod(shapes.get(name, (0,))) for name in ("D", "U", "G")),
    }
    used = sum(math.prod(shape) for shape in shapes.values())
    shares = _shares(_SHARES if spent["spaces"] else _SHARES_WITHOUT_SPACES, d, budget)
    present = {part: share for part, share in shares.items() if spent[part]}
    total = sum(present.values()) or 1.0
    off = sum(abs(spent[part] / budget - share / total) for part, share in present.items())
    return off + 4 * (1 - used / budget)


def _shares(usual: dict[str, float], d: int, budget: int) -> dict[str, float]:
    """The usual proportions, with a larger prompt where theirs would have less than `_ENOUGH_TOKENS` tokens."""
    prompt = max(usual["prompt"], min(_LARGEST_PROMPT_SHARE, _ENOUGH_TOKENS * d / budget))
    others = (1 - prompt) / (1 - usual["prompt"])
    return {part: prompt if part == "prompt" else share * others for part, share in usual.items()}


def _embedding_width(model: Any) -> int:
    embedding = model.get_input_embeddings()
    return int(getattr(embedding, "embedding_dim", None) or embedding.weight.shape[1])


def _method_fields(method: str) -> dict[str, Any]:
    methods: dict[str, dict[str, Any]] = {
        "ept": {},
        "dept": {"fusion": False, "num_spaces": 0},
        "pt": {"r": 0, "fusion": False, "num_spaces": 0},
    }
    if method not in methods:
        raise ValueError(f"unknown method {method!r}: use one of {', '.join(methods)}")
    return methods[method]


def _candidate_sizes(d: int, budget: int, fields: dict[str, Any]) -> list[dict[str, int]]:
    """Every (s, K, h) worth trying; the rank is then chosen to spend the rest."""
    lengths = [fields["num_virtual_tokens"]] if "num_virtual_tokens" in fields else range(1, max(budget // d, 1) + 1)
    # Two spaces and their gate are at least six rows of d; a single space, without a gate, only where that is much.
    spaces = [fields["num_spaces"]] if "num_spaces" in fields else [2, 4, 8] if budget >= 24 * d else [1, 2]
    widths = [fields["space_dim"]] if "space_dim" in fields else [1, 2, 3, 4, 6, 8, 12, 16]
    if list(spaces) == [0]:
        widths = [fields.get("space_dim", 2)]
    return [{"num_virtual_tokens": s, "num_spaces": K, "space_dim": h} for s in lengths for K in spaces for h in widths]


def _spend_rest(config: EPTConfig, d: int, budget: int, fields: dict[str, Any]) -> tuple[EPTConfig, int]:
    """`config` with the largest rank that fits, at least 1, unless the caller fixed the rank; and its size."""
    if "r" not in fields:
        config.r = 0
        rest = budget - config.parameter_count(d)
        config.r = max(rest // (config.max_length + d), 1)
    return config, config.parameter_count(d)
