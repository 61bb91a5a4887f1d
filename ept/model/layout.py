"""Where prompt, text and padding are in the rows that the base model reads, and how positions are counted."""

from __future__ import annotations

import torch
from torch import Tensor

from ..embedding import position_ids_of

# Where padding may be without affecting the model's answer:
BESIDE = "beside"  # anywhere except between prompt and text: the prompt moves to the first token of the text
FRONT = "front"  # all of it before the prompt
BEHIND = "behind"  # all of it after the text
APART = "apart"  # anywhere, even between prompt and text


def arrangement(mask: Tensor, s: int, padding: str) -> Tensor | None:
    """Finds the order of columns that puts padding where it may be; None: it already is.

    Args:
        mask: `[batch, s + n]`, nonzero at real tokens, of rows that begin with `s` places for a prompt.
        padding: `"beside"`, `"front"`, `"behind"` or `"apart"`.

    Returns:
        the old column of each new one, `[batch, s + n]` int64. Real tokens keep their order.
    """
    if padding == APART or (padding == BESIDE and not s):
        return None
    # Only on a CPU, check whether anything has to move at all: elsewhere this waits, and a compiled graph cannot.
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
    """Checks whether padding is between real tokens in a row of `mask` `[batch, length]`."""
    is_real = mask.bool().to(torch.int8)
    begins = is_real.diff(dim=1, prepend=torch.zeros_like(is_real[:, :1])) == 1
    return bool((begins.sum(1) > 1).any())


def moved(values: Tensor, order: Tensor | None) -> Tensor:
    """Reorders the columns of `values` `[batch, length, …]`."""
    if order is None:
        return values
    row = torch.arange(len(values), device=values.device)[:, None]
    return values[row, order.to(values.device)]  # by whole vectors, faster than entry by entry


def moved_back(values: Tensor, order: Tensor | None) -> Tensor:
    """Undoes `moved`."""
    return values if order is None else moved(values, order.argsort(dim=1))


def numbered(mask: Tensor, offset: int) -> Tensor:
    """Numbers every row's real tokens from `offset`; padding gets `offset` − 1; for 0, the number before it."""
    positions = position_ids_of(mask)
    return torch.where(mask.bool(), positions + offset, offset - 1) if offset else positions
