"""Where prompt, text and padding stand in the rows that the base model reads, and how positions are counted."""

from __future__ import annotations

import torch
from torch import Tensor

from ..embedding import position_ids_of

# Where padding may stand so that the model's answer does not depend on it:
BESIDE = "beside"  # anywhere but between prompt and text: the prompt moves to the first token of the text
FRONT = "front"  # in front of the prompt, all of it
BEHIND = "behind"  # behind the text, all of it
APART = "apart"  # anywhere, between prompt and text too


def arrangement(mask: Tensor, s: int, padding: str) -> Tensor | None:
    """Finds the order of columns that takes padding where it may stand; None: it stands there.

    Args:
        mask: `[batch, s + n]`, nonzero at real tokens, of rows that begin with `s` places for a prompt.
        padding: `"beside"`, `"front"`, `"behind"` or `"apart"`.

    Returns:
        for each new column the old one, `[batch, s + n]` int64. Real tokens keep their order.
    """
    if padding == APART or (padding == BESIDE and not s):
        return None
    # A CPU is asked whether anything has to move at all: it has the answer, which a compiled graph cannot wait for.
    can_ask = mask.device.type == "cpu" and not torch.compiler.is_compiling()
    if padding == BESIDE:
        leading = (mask[:, s:].cumsum(1) == 0).sum(1, keepdim=True)  # [batch, 1]
        if can_ask and not bool(leading.any()):
            return None
        index = torch.arange(mask.shape[1], device=mask.device)
        return torch.where(index < leading, index + s, torch.where(index < leading + s, index - leading, index))
    is_real = mask.bool().to(torch.int8)
    if can_ask and bool((is_real.diff(dim=1) * (1 if padding == FRONT else -1) >= 0).all()):
        return None
    return torch.sort(is_real, dim=1, stable=True, descending=padding == BEHIND).indices


def has_gaps(mask: Tensor) -> bool:
    """Tells whether padding stands between real tokens of a row of `mask` `[batch, length]`."""
    is_real = mask.bool().to(torch.int8)
    begins = is_real.diff(dim=1, prepend=torch.zeros_like(is_real[:, :1])) == 1
    return bool((begins.sum(1) > 1).any())


def moved(values: Tensor, order: Tensor | None) -> Tensor:
    """Takes the columns of `values` `[batch, length, …]` in the given order."""
    if order is None:
        return values
    row = torch.arange(len(values), device=values.device)[:, None]
    return values[row, order.to(values.device)]  # whole vectors, quicker than entry by entry


def moved_back(values: Tensor, order: Tensor | None) -> Tensor:
    """Takes columns that were put in the given order back to their places."""
    return values if order is None else moved(values, order.argsort(dim=1))


def numbered(mask: Tensor, offset: int) -> Tensor:
    """Numbers the real tokens of every row from `offset`; padding in front has the number before, or 0."""
    positions = position_ids_of(mask)
    return torch.where(mask.bool(), positions + offset, offset - 1) if offset else positions
