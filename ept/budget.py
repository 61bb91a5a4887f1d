"""Search for the configuration sizes that make the best use of a parameter budget."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import EPTConfig

_COUNTS: dict[str, Callable[[EPTConfig, int], int]] = {
    "trained": lambda config, d: config.parameter_count(d),
    "stored": lambda config, d: config.stored_count(d),
}
_METHODS: dict[str, dict[str, Any]] = {
    "ept": {},
    "dept": {"fusion": False, "num_spaces": 0},
    "pt": {"r": 0, "fusion": False, "num_spaces": 0},
    # A hundred tokens and a basis of 64 rows are ULPT's published default; the basis gets the rest of the budget.
    "ulpt": {"num_virtual_tokens": 100, "prompt_scale_shift": True, "r": 0, "fusion": False, "num_spaces": 0},
    "adept": {"update": "token", "fusion": False, "num_spaces": 0},
    "residual": {"r": 0, "fusion": False, "num_spaces": 0},
}
RESIDUAL_DIM = 64
"""Default width of residual prompt tuning's network."""
# How a budget is split unless the caller says otherwise: as in the defaults at d = 768, m = 256; without spaces, as in
# DePT's published default (60 prompt tokens, rank 30).
_SHARES = {"prompt": 0.4, "low-rank": 0.4, "spaces": 0.2}
_SHARES_WITHOUT_SPACES = {"prompt": 0.6, "low-rank": 0.4}
# A small budget goes to the prompt first: on T5-base, prompt tuning with 2, 10, 20 and 50 tokens has GLUE means near
# 77, 84, 84 and 84 (a figure of arXiv 2502.04501). A handful of tokens is too few, and more than twenty gain little.
_ENOUGH_TOKENS, _MAX_PROMPT_SHARE = 16, 0.7


def best_config(
    config_class: type[EPTConfig], d: int, max_length: int, budget: int, method: str, kind: str, fields: dict[str, Any]
) -> EPTConfig:
    """Runs the search that `EPTConfig.for_budget` describes, for embedding width `d`."""
    if method not in _METHODS:
        raise ValueError(f"unknown method {method!r}: use one of {', '.join(_METHODS)}")
    if kind not in _COUNTS:
        raise ValueError(f"unknown kind of budget {kind!r}: use one of {', '.join(_COUNTS)}")
    count = _COUNTS[kind]
    fields = {"max_length": max_length, **_METHODS[method], **fields}
    lengths = [fields["num_virtual_tokens"]] if "num_virtual_tokens" in fields else range(1, max(budget // d, 1) + 1)
    if "num_spaces" in fields:
        spaces = [fields["num_spaces"]]
    elif kind == "stored":  # they cost nothing
        spaces = [config_class.num_spaces]
    else:  # two spaces and a gate take at least six rows of d; if that is much, a single one without a gate is tried
        spaces = [2, 4, 8] if budget >= 24 * d else [1, 2]
    if "space_dim" in fields:
        widths = [fields["space_dim"]]
    else:
        widths = [1, 2, 3, 4, 6, 8, 12, 16] if spaces != [0] and kind == "trained" else [config_class.space_dim]
    # The size that uses up what the others leave.
    rank = {"ulpt": "prompt_rank", "residual": "residual_dim"}.get(method, "r")

    def of_sizes(s: int, K: int, h: int) -> EPTConfig:
        config = config_class(**{**fields, "num_virtual_tokens": s, "num_spaces": K, "space_dim": h})
        if rank not in fields:  # the largest that fits, but at least 1
            one, two = (count(_with(config, **{rank: r}), d) for r in (1, 2))
            largest = d if rank == "prompt_rank" else max(budget, 1)  # more rows than d span nothing new
            if two > one:
                setattr(config, rank, min(max((budget - one) // (two - one) + 1, 1), largest))
            else:  # it costs nothing: it folds into the prompt, or there is no prompt
                setattr(config, rank, RESIDUAL_DIM if rank == "residual_dim" else largest)
        return config

    candidates = itertools.starmap(of_sizes, itertools.product(lengths, spaces, widths))
    best = min(candidates, key=lambda config: _misfit(config, d, budget, count(config, d)))
    if (smallest := count(best, d)) > budget:
        raise ValueError(
            f"no {method} configuration has at most {budget} parameters with width {d} and "
            f"max_length={max_length}: the smallest has {smallest}; raise the budget or lower max_length, r or "
            "num_virtual_tokens"
        )
    return best


def _with(config: EPTConfig, **sizes: int) -> EPTConfig:
    changed = copy.copy(config)
    for name, size in sizes.items():
        setattr(changed, name, size)
    return changed


def _misfit(config: EPTConfig, d: int, budget: int, count: int) -> tuple[bool, float]:
    """Ranks what fits by its distance from the usual proportions and from the full budget, then the rest by size."""
    if count > budget:
        return True, count
    sizes = {name: math.prod(shape) for name, shape in config.parameter_shapes(d).items()}
    parts = {
        "prompt": ("prompt", "Z"),
        "low-rank": ("A", "B", "W_in", "W_out", "W_down", "W_up"),
        "spaces": ("D", "U", "G"),
    }
    spent = {part: sum(sizes.get(name, 0) for name in names) for part, names in parts.items()}
    if sum(spent.values()) > budget:  # the spaces do not count
        spent["spaces"] = 0
    shares = _SHARES if spent["spaces"] else _SHARES_WITHOUT_SPACES
    prompt = max(shares["prompt"], min(_MAX_PROMPT_SHARE, _ENOUGH_TOKENS * d / budget))
    others = (1 - prompt) / (1 - shares["prompt"])
    present = {part: prompt if part == "prompt" else share * others for part, share in shares.items() if spent[part]}
    total = sum(present.values()) or 1.0
    off = sum(abs(spent[part] / budget - share / total) for part, share in present.items())
    return False, off + 4 * (1 - count / budget)
