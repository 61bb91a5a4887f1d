"""How a model reads its input: tested on a small random copy of its class and configuration, never guessed from names.

The copy reads a few tokens as ids and as embeddings, with and without prompt rows, alone and padded on either side.
The model is then called in a way in which all of these agree with the row alone.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
)

from .facts import BaseModelFacts
from .miniature import ATTEMPTS, miniature
from .questions import WITHOUT_LANGUAGE_MODEL, Subject

_LANGUAGE_MODELS = (MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES)
_KEPT: dict[Any, Any] = {}  # answers in this process, by question, model class and configuration


def examine(model: Any, task_type: str) -> BaseModelFacts:
    """Finds out how `model` reads its input; a `ValueError` says why it cannot be adapted and what to do instead."""
    facts, name = facts_of(model), type(model).__name__
    if facts.refusal:
        raise ValueError(f"{name} {facts.refusal}")
    if task_type != facts.task_type:
        raise ValueError(f"task_type={task_type} does not fit {name}, which is for {facts.task_type}")
    facts = with_forward_of(facts, model)
    if facts.position_table is None:
        return facts
    table, dimension, first = facts.position_table
    parameter: Any = dict(model.named_parameters()).get(table)
    shape = getattr(parameter, "ds_shape", getattr(parameter, "shape", ()))  # a partitioned one has no own shape
    return replace(facts, position_limit=int(shape[dimension]) - first if len(shape) > dimension else None)


def infer_task_type(model: Any) -> str:
    """Returns the task type of a model's head, or of the configuration of a model that is not loaded yet.

    A configuration without a language-model head counts as a classifier's, because a head can be added; that of a
    language model that also reads images or sounds as a language model's. Raises `ValueError` for a model whose head
    fits no task.
    """
    if isinstance(model, nn.Module):
        facts = facts_of(model)
        if not facts.task_type:
            raise ValueError(f"{type(model).__name__} {facts.refusal}")
        return facts.task_type
    if getattr(model, "is_encoder_decoder", False):
        return "SEQ_2_SEQ_LM"
    heads = getattr(model, "architectures", None) or []
    known = [names.get(getattr(model, "model_type", "")) for names in _LANGUAGE_MODELS]
    return "CAUSAL_LM" if any("CausalLM" in h or "LMHead" in h or h in known for h in heads) else "SEQ_CLS"


def with_forward_of(facts: BaseModelFacts, model: Any) -> BaseModelFacts:
    """Returns `facts` with the arguments of the present `forward` of `model`, which trainers may have replaced."""
    forward = getattr(model.forward, "__func__", model.forward)
    if forward is facts.forward:
        return facts
    return replace(facts, forward=forward, forward_arguments=frozenset(inspect.signature(model.forward).parameters))


def facts_of(model: Any) -> BaseModelFacts:
    """Returns the facts of `model`, determined on a copy once per process for each class and configuration."""
    return _once("facts", model, _ask)


def generation_of(model: Any, facts: BaseModelFacts) -> str | None:
    """Finds out how `generate` of a causal `model` continues padded rows as it continues them alone.

    Returns:
        `"mask"` if it counts positions from the mask, `"positions"` if they have to be given; None if it does not.
    """

    def ask(model: Any) -> str | None:
        try:
            return _asked(model, lambda subject: subject.generation(facts))
        except _CannotBeAsked:
            return None

    return _once("generation", model, ask)


def can_share_prompt(model: Any, facts: BaseModelFacts) -> bool:
    """Checks whether a causal `model` reads texts after a prompt read once as after a prompt for each."""
    return _agrees("sharing", model, lambda subject: subject.sharing(facts))


def can_pack_texts(model: Any, facts: BaseModelFacts) -> bool:
    """Checks whether a causal `model` reads texts side by side after one prompt as after a prompt for each."""
    arguments = {"position_ids", "attention_mask", "logits_to_keep"}
    can_be_told = facts.position_offset is not None and arguments <= facts.forward_arguments
    return can_be_told and _agrees("packing", model, lambda subject: subject.packing(facts))


def _agrees(question: str, model: Any, ask: Callable[[Subject], bool]) -> bool:
    """Answers a yes-or-no question; no, if the model cannot be tested."""

    def answer(model: Any) -> bool:
        try:
            return bool(_asked(model, ask))
        except _CannotBeAsked:
            return False

    return bool(_once(question, model, answer))


def _once(question: str, model: Any, ask: Callable[[Any], Any]) -> Any:
    try:
        key = (question, type(model), json.dumps(model.config.to_dict(), sort_keys=True, default=str))
    except (AttributeError, TypeError, ValueError):
        return ask(model)
    if key not in _KEPT:
        _KEPT[key] = ask(model)
    return _KEPT[key]


def _ask(model: Any) -> BaseModelFacts:
    facts = BaseModelFacts(frozenset(inspect.signature(model.forward).parameters))
    if "inputs_embeds" not in facts.forward_arguments:
        return replace(facts, refusal="takes no inputs_embeds, so no prompt can be put before its input")
    try:
        return _asked(model, lambda subject: subject.facts(facts))
    except _CannotBeAsked as error:
        if (
            getattr(model.config, "is_encoder_decoder", False) and not model.can_generate()
        ):  # some models look for an end token
            return replace(facts, refusal=WITHOUT_LANGUAGE_MODEL)
        return replace(
            facts, refusal=f"cannot be probed for how it reads its input: a small copy of it fails ({error})"
        )


def _asked(model: Any, question: Callable[[Subject], Any]) -> Any:
    """Puts a question to the first copy of `model` that can be made and run, or else to the model itself."""
    reasons = []
    for attempt in (*ATTEMPTS, None):
        try:
            with torch.device("cpu"):  # a user may have set another default device
                subject = Subject(model if attempt is None else miniature(type(model), model.config, *attempt))
                with subject.quiet():
                    return question(subject)
        except Exception as error:  # a class may raise anything
            reasons.append(f"{type(error).__name__}: {str(error).strip() or 'no message'}"[:200])
    raise _CannotBeAsked(reasons[0])


class _CannotBeAsked(Exception):
    """Raised if neither a copy of the model nor the model itself runs."""
