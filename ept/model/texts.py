"""Batches separated until each row holds one text and at most one answer, and their outputs put together again.

A token in a row has one embedding, but an answer's tokens are plain while they are generated, and text (with the
update) once the next turn begins: a row with several answers is therefore read once for each of them. Packed rows,
whose position ids restart, hold several texts: each is read after its own prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

# Arguments that describe packed rows, which separated rows no longer are.
_PACKING = ("position_ids", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")


def targets(labels: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Removes the label of each row's first token, as every causal loss does: `generate` is given that token.

    After a prompt it could be predicted, but the Trainer does not count it.
    """
    real = torch.ones_like(labels, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    return labels.masked_fill(~_labelled(labels, real), -100)


def text_before_answer(labels: Tensor) -> Tensor:
    """Marks the input text of rows with at most one answer: everything before the first label, `[batch, n]` bool.

    Tokens after an answer do not affect the loss and count as neither.
    """
    return (labels != -100).cumsum(1) == 0


def predicted(labels: Tensor, logits_to_keep: int) -> Tensor:
    """Removes the labels that the last `logits_to_keep` positions of the text do not predict; 0 keeps all."""
    n = labels.shape[1]
    if not 0 < logits_to_keep <= n:
        return labels
    return labels.masked_fill(torch.arange(n, device=labels.device) <= n - logits_to_keep, -100)


@dataclass
class SeparateTexts:
    """The texts of a batch, one per row and padded on the right, with the mapping there and back."""

    source: Tensor  # [rows, length]: the token of the flattened batch at this place, -1 at padding
    first_label: Tensor  # [rows, 1]: labels before this column belong to an earlier row
    row_of: Tensor  # [batch, n]: the row in which a token is read as in generation
    column_of: Tensor  # [batch, n]: the token's column there, -1 at padding
    row_of_prompt: Tensor  # [batch]: a row with the prompt of the batch's row
    batch_row: Tensor  # [rows]: the batch's row from which a row is taken

    @classmethod
    def find(cls, arguments: dict[str, Any], split_answers: bool) -> SeparateTexts | None:
        """Finds several texts in a row or, if `split_answers`, several answers; None if there are none.

        Args:
            arguments: of `EPTModel.forward`, with either `input_ids` or `inputs_embeds`; position ids are counted
                from 0 in each text. If a text mask is given, it defines the text, and answers are not looked for.

        Raises:
            ValueError: position ids neither go on nor restart at 0.
        """
        tokens = arguments["inputs_embeds"] if arguments["input_ids"] is None else arguments["input_ids"]
        mask, labels, position_ids = (arguments.get(name) for name in ("attention_mask", "labels", "position_ids"))
        if tokens is None or (mask is not None and mask.shape != tokens.shape[:2]):
            return None  # refused elsewhere
        real = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device) if mask is None else mask.bool()
        packed = None
        if position_ids is not None and position_ids.dim() == 2:
            packed = _unpack(real, position_ids.expand(real.shape))
        labelled = None
        if split_answers and labels is not None and arguments["text_mask"] is None:
            labelled = _labelled(labels, real)
            begins = labelled & ~pad(labelled, (1, 0))[:, :-1]
            labelled = labelled if packed is not None or bool((begins.sum(1) > 1).any()) else None
        if packed is None and labelled is None:
            return None
        nothing = torch.zeros_like(real)
        real, starts = (real, nothing) if packed is None else packed
        with torch.device("cpu"):
            return cls._of(real.cpu(), starts.cpu(), (nothing if labelled is None else labelled).cpu(), tokens.device)

    @classmethod
    def _of(cls, real: Tensor, starts: Tensor, labelled: Tensor, device: torch.device) -> SeparateTexts:
        batch, n = real.shape
        row_of, column_of = torch.zeros(batch, n, dtype=torch.int64), torch.full((batch, n), -1)
        rows: list[Tensor] = []
        batch_row, first_label, row_of_prompt = [], [], []
        for b in range(batch):
            row_of_prompt.append(len(rows))
            columns = real[b].nonzero().flatten()
            begins = [i for i in starts[b, columns].nonzero().flatten().tolist() if i]
            for text in torch.tensor_split(columns, begins):
                turn = 0
                for end in _ends_of_turns([False, *labelled[b, text[1:]].tolist()][: len(text)]):
                    # A token's output is about the next token: that of an answer's last one belongs to the next turn.
                    own = torch.arange(max(turn - 1, 0), end if end == len(text) else end - 1)
                    row_of[b, text[own]], column_of[b, text[own]] = len(rows), own
                    rows.append(b * n + text[:end])
                    batch_row.append(b)
                    first_label.append(turn)
                    turn = end
        length = max(map(len, rows))
        source = torch.stack([pad(row, (0, length - len(row)), value=-1) for row in rows])
        parts = [source, torch.tensor(first_label)[:, None], row_of, column_of]
        return cls(*(p.to(device) for p in [*parts, torch.tensor(row_of_prompt), torch.tensor(batch_row)]))

    def take(self, values: Tensor, fill: int = 0) -> Tensor:
        """Separates `values` `[batch, n, …]` of the batch's tokens into `[rows, length, …]`, with `fill` at padding."""
        taken = values.flatten(0, 1)[self.source.clamp(min=0)]
        missing = (self.source < 0).view(*self.source.shape, *[1] * (taken.dim() - 2))
        return taken.masked_fill(missing, fill)

    def take_arguments(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Separates the arguments of `EPTModel.forward`, leaving out those about packing."""
        (batch, n), taken = self.row_of.shape, {}
        for name, value in arguments.items():
            if name in _PACKING or (name == "shift_labels" and arguments.get("labels") is not None):
                continue  # the labels are shifted anew, each within its row
            if name == "labels" and value is not None:  # each goes into the one row with its answer
                columns = torch.arange(self.source.shape[1], device=value.device)
                value = self.take(value, -100).masked_fill(columns < self.first_label, -100)
            elif name == "adapter_names" and value is not None:
                value = [value[b] for b in self.batch_row.tolist()]
            elif isinstance(value, Tensor) and value.shape[:2] == (batch, n):
                value = self.take(value)
            elif isinstance(value, Tensor) and value.shape[:1] == (batch,):
                value = value[self.batch_row]
            taken[name] = value
        return {**taken, "attention_mask": (self.source >= 0).to(torch.int64)}

    def put_together(self, output: Any, s: int) -> Any:
        """Reshapes a model's output to that of the original batch, with `s` prompt tokens before each row.

        Tensors `[rows, s + length, …]`, and those shorter by one (about each token's successor), become `[batch, s + n,
        …]` and `[batch, s + n - 1, …]`. Everything else is unchanged.
        """
        for name, value in output.items():
            if isinstance(value, Tensor):
                output[name] = self._put_tensor(value, s)
            elif isinstance(value, tuple) and all(isinstance(part, Tensor) for part in value):
                output[name] = tuple(self._put_tensor(part, s) for part in value)
        return output

    def _put_tensor(self, value: Tensor, s: int) -> Tensor:
        rows, length = self.source.shape
        if value.dim() < 2 or value.shape[0] != rows or not 0 <= s + length - value.shape[1] <= 1:
            return value
        row = torch.cat([self.row_of_prompt[:, None].expand(-1, s), self.row_of], dim=1)
        prompt = torch.arange(s, device=row.device).expand(len(row), -1)
        column = torch.cat([prompt, self.column_of + torch.where(self.column_of < 0, 0, s)], dim=1)
        known = column >= 0
        if value.shape[1] < s + length:
            row, column, known = row[:, :-1], column[:, :-1], known[:, :-1]
            # The last token of a text has no successor.
            following = pad(self.source, (0, 1), value=-1)
            inside = column >= s
            successor = following[row, (column - s + 1).clamp(min=0)] >= 0
            known = known & (successor | ~inside)
        found = value[row, column.clamp(0, value.shape[1] - 1)]
        return torch.where(known.view(*known.shape, *[1] * (value.dim() - 2)), found, found.new_zeros(()))


def _labelled(labels: Tensor, real: Tensor) -> Tensor:
    return (labels != -100) & real & (real.cumsum(1) > 1)


def _unpack(real: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor] | None:
    """Marks real tokens, and those at which a further text begins, both `[batch, n]`; None if no row has several."""
    before = pad(position_ids, (1, 0), value=-1)[:, :-1]
    starts = real & pad(real, (1, 0))[:, :-1] & (position_ids != before + 1)
    if not bool(starts.any()):
        return None
    if bool((starts & (position_ids != 0)).any()):
        raise ValueError(
            "position_ids must rise by 1 from token to token, or restart at 0 where another text begins: leave them "
            "out to count them from the attention mask"
        )
    # Packed rows are filled up with tokens at position 0.
    is_filler = (position_ids == 0) & (pad(position_ids, (0, 1), value=1)[:, 1:] == 0)
    return real & ~is_filler, starts


def _ends_of_turns(labelled: Sequence[bool]) -> list[int]:
    """Lists the ends of a text's turns, each with its answer; tokens after the last answer belong to its turn."""
    ends = [i + 1 for i, label in enumerate(labelled[:-1]) if label and not labelled[i + 1]]
    if not any(labelled[ends[-1] :] if ends else labelled):
        ends = ends[:-1]
    return [*ends, len(labelled)]
