"""Facts about how a base model reads its input; `reading` finds them out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

TASKS_WITH_HEAD = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")  # of its own, to be trained
# The names of outputs with one entry a token, by task; the others' outputs are compared whole.
TOKEN_OUTPUTS = {
    "CAUSAL_LM": ("logits",),
    "TOKEN_CLS": ("logits",),
    "QUESTION_ANS": ("start_logits", "end_logits"),
    "FEATURE_EXTRACTION": ("last_hidden_state",),
}


@dataclass(frozen=True)
class BaseModelFacts:
    """Facts that decide how a base model is called."""

    forward_arguments: frozenset[str]  # names that its `forward` accepts
    forward: Any = None  # the function that had them
    task_type: str = ""  # that its head is for
    embedding_factor: float = 1.0  # between the vectors of its embedding module and what it makes of ids
    padding: str | None = None  # where padding may stand, see `layout`; None: nowhere, rows must have one length
    position_offset: int | None = None  # of the first token; None: no positions are given
    position_table: tuple[str, int, int] | None = None  # the parameter they are looked up in, its dimension, first row
    position_limit: int | None = None  # the most positions that the table has
    is_causal: bool = False  # no token sees those behind it
    shifts_labels: bool = True  # the label of a place is compared with the prediction of the place before
    splits_prompt: bool = False  # padding may stand between prompt and text
    needs_mask: bool = False  # a mask of ones is not the same as none
    has_pooler: bool = False  # its module `pooler` makes the pooled output of the hidden states
    ids_alone: tuple[int, ...] = ()  # special tokens that it reads otherwise as ids than as embeddings
    refusal: str | None = None  # the reason why it cannot be adapted
