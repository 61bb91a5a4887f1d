"""Texts of a batch side by side in one row after one prompt, in a decoder-only model.

A row holds the prompt and then several texts; with the mask a token sees only the prompt and its own text, and every
text's positions start after the prompt. So the prompt is read once for several texts, in the same call. The cost is
products of queries with the keys of other texts, which the mask then drops.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .facts import BaseModelFacts
from .inputs import BaseInputs
from .layout import numbered

LONGEST = 1024  # places of a row: some models treat positions differently from several thousand on
_READS_MASKS = ("eager", "sdpa")  # kinds of attention that take a mask for each pair of positions


@dataclass(frozen=True)
class Packing:
    """`rows` rows with a prompt of `s` places and `per_row` texts of `n` places each; `texts` is the total."""

    texts: int
    per_row: int
    s: int
    n: int

    @property
    def rows(self) -> int:
        return -(-self.texts // self.per_row)

    def pack(self, facts: BaseModelFacts, inputs: BaseInputs, few: int) -> None:
        """Puts the texts in `inputs`, each of which follows its own copy of the prompt, side by side after one prompt.

        `inputs_embeds` `[texts, s + n, d]` become `[rows, s + per_row·n, d]`, padded if texts are missing; mask and
        positions follow. Logits will be those of the last `few` places of every text or, if 0, of all places.
        """
        embeds, s = inputs["inputs_embeds"], self.s
        mask = inputs.get("attention_mask")
        mask = torch.ones(embeds.shape[:2], dtype=torch.int64, device=embeds.device) if mask is None else mask
        positions = numbered(mask, facts.position_offset or 0)
        inputs["inputs_embeds"] = torch.cat(
            [embeds[:1, :s].expand(self.rows, -1, -1), self._side_by_side(embeds[:, s:])], dim=1
        )
        inputs["position_ids"] = torch.cat(
            [positions[:1, :s].expand(self.rows, -1), self._side_by_side(positions[:, s:])], dim=1
        )
        inputs["attention_mask"] = self._mask(self._side_by_side(mask[:, s:].bool()), embeds.dtype)
        if few:
            inputs["logits_to_keep"] = self._last(few, embeds.device)
        inputs["use_cache"] = False  # the rows are not the caller's
        inputs.packing = self

    def _mask(self, is_real: Tensor, dtype: torch.dtype) -> Tensor:
        """Returns the mask to add to the scores, `[rows, 1, length, length]`, for real tokens `[rows, per_row·n]`."""
        place = torch.arange(self.s + self.per_row * self.n, device=is_real.device)
        text = torch.where(place < self.s, -1, (place - self.s).div(self.n, rounding_mode="floor"))
        sees = (place[:, None] >= place) & ((text[:, None] == text) | (text == -1))  # [length, length]
        sees = sees & F.pad(is_real, (self.s, 0), value=True)[:, None, None, :]
        return torch.zeros(sees.shape, dtype=dtype, device=is_real.device).masked_fill(~sees, torch.finfo(dtype).min)

    def _side_by_side(self, values: Tensor, fill: int = 0) -> Tensor:
        """Rearranges values of texts `[texts, m, …]` to `[rows, per_row·m, …]`, with `fill` for missing texts."""
        missing = self.rows * self.per_row - self.texts
        if missing:
            values = torch.cat([values, values.new_full((missing, *values.shape[1:]), fill)])
        return values.reshape(self.rows, -1, *values.shape[2:])

    def labels(self, labels: Tensor, few: int) -> Tensor:
        """Rearranges labels `[texts, s + n]` as the rows' logits, for the last `few` places of every text (0: all).

        A text's first label must be none (`texts.targets`, `texts.predicted`): the place before it belongs to another
        text.
        """
        labels = self._side_by_side(labels[:, -(few or self.n) :], -100)
        return labels if few else F.pad(labels, (self.s, 0), value=-100)

    def _last(self, m: int, device: Any) -> Tensor:
        """Returns the places of every text's last m tokens in a row."""
        ends = self.s + self.n * torch.arange(1, self.per_row + 1, device=device)
        return (ends[:, None] + torch.arange(-m, 0, device=device)).flatten()

    def unpacked(self, logits: Tensor) -> Tensor:
        """Rearranges logits of the texts' last m places, or of whole rows, to one row per text.

        Returns:
            `[texts, m, vocabulary]`, or `[texts, s + n, vocabulary]` for whole rows.
        """
        prompt = None
        if logits.shape[1] == self.s + self.per_row * self.n:
            prompt, logits = logits[:1, : self.s].expand(self.texts, -1, -1), logits[:, self.s :]
        logits = logits.reshape(self.rows * self.per_row, -1, logits.shape[-1])[: self.texts]
        return logits if prompt is None else torch.cat([prompt, logits], dim=1)


def second_call() -> int:
    """Returns the cost, in places, of a separate call for the prompt, which reads all weights once more for a few rows.

    Measured on steps with SmolLM2-135M on a CPU: 35 to 60 with one thread, 55 to 156 with two.
    """
    return 64 * torch.get_num_threads()


@functools.lru_cache(1024)
def packing_of(texts: int, s: int, n: int, d: int, call: int, longest: int = LONGEST) -> Packing | None:
    """Chooses how many texts to put into a row; None if a row per text, or a separate call for the prompt, is cheaper.

    `call` is the cost of that separate call, in places. No row has more than `longest` places, or 1,024. A place costs
    24·d² operations in every layer of width d, and a pair of places 4·d, of which a CPU does a quarter as many per
    second (measured with SmolLM2-135M).
    """

    def cost(places: int, pairs: int) -> int:
        return 3 * d * places + 2 * pairs

    before = cost(s + texts * n + call, texts * n * (s + n))
    least, best = min(before, cost(texts * (s + n), texts * (s + n) ** 2)), None
    for rows in range(1, texts):
        packing = Packing(texts, -(-texts // rows), s, n)
        length = s + packing.per_row * n
        if (
            packing.rows == rows
            and length <= min(longest, LONGEST)
            and (c := cost(rows * length, rows * length**2)) < least
        ):
            least, best = c, packing
    return best


def reads_masks(model: Any) -> bool:
    """Checks whether the attention of `model` takes a mask for each pair of positions."""
    return getattr(model.config.get_text_config(), "_attn_implementation", None) in _READS_MASKS
