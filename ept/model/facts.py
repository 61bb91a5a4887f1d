"""Facts about how a base model reads its input; the module `reading` determines them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

TASKS_WITH_HEAD = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")  # their models have a head to train
# Names of outputs with one entry per token, by task; the outputs of other tasks are compared whole.
TOKEN_OUTPUTS = {
    "CAUSAL_LM": ("logits",),
    "TOKEN_CLS": ("logits",),
    "QUESTION_ANS": ("start_logits", "end_logits"),
    "FEATURE_EXTRACTION": ("last_hidden_state",),
}


@dataclass(frozen=True)
class BaseModelFacts:
    """Facts that decide how a base model is called."""

    forward_arguments: frozenset[str]  # names of its arguments
    forward: Any = None  # the function to which they belong
    task_type: str = ""  # of its head
    embedding_factor: float = 1.0  # between its embedding module's vectors and what it makes of ids
    padding: str | None = None  # where padding may be, see `layout`; None: nowhere, all rows must have one length
    position_offset: int | None = None  # of the first token; None: positions are not passed
    position_table: tuple[str, int, int] | None = None  # parameter that holds them, dimension, first row
    position_limit: int | None = None  # number of positions in that table
    is_causal: bool = False  # no token sees later ones
    shifts_labels: bool = True  # a label is compared with the prediction at the previous place
    splits_prompt: bool = False  # padding may be between prompt and text
    needs_mask: bool = False  # a mask of ones differs from no mask
    has_pooler: bool = False  # its module `pooler` computes the pooled output from the hidden states
    ids_alone: tuple[int, ...] = ()  # special tokens that it reads differently as ids and as embeddings
    refusal: str | None = None  # why it cannot be adapted
