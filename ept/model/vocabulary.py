"""An adapter as a plain model: its prompt as new words, its token-dependent update in the rows of the vocabulary.

Every engine that serves the model then serves the adapter, and the update costs nothing at run time.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from tokenizers import AddedToken
from torch import Tensor, nn

from ..embedding import ROWS_AT_ONCE, rows_of, scaled_embedding
from ..prompt import EPTLayer
from .base_model import input_embedding
from .reading import examine

TASK_TYPES = ("CAUSAL_LM", "SEQ_2_SEQ_LM", "SEQ_CLS")
_PROBES = ("a", "The text, as it is.", "1 2")
_TOLERANCE = 0.05  # of the largest logit: a prompt that is read differently is off by more than rounding


class PromptText(NamedTuple):
    """The text to write around an input text: `before + text + after`, tokenised with `add_special_tokens`."""

    before: str
    after: str
    add_special_tokens: bool


@torch.no_grad()
def add_prompt_tokens(model: Any, tokenizer: Any, layer: EPTLayer, task_type: str) -> PromptText:
    """Adds a token for each row of a prompt to `model` and `tokenizer`, in place, and updates the rows of all others.

    The new tokens are never generated: they are among `suppress_tokens` of the model's generation configuration.

    Args:
        model: on the CPU or an accelerator, with the adapter's head if it trained one.
        layer: a folded adapter's, without an update or with a token-dependent one.
        task_type: of the adapter.

    Returns:
        The text to put around an input text for the model to give the adapter's answers.

    Raises:
        ValueError: another task type, an update that the vocabulary's rows cannot hold, a tokenizer that already has
            such tokens or tokenises texts differently after them, an embedding that does more than look up and scale,
            or answers that differ from the adapter's.
    """
    check_update(layer, task_type)
    factor = examine(model, task_type).embedding_factor
    embedding = scaled_embedding(input_embedding(model), factor)
    tokens = [f"<prompt_{number}>" for number in range(layer.config.num_virtual_tokens)]
    if known := set(tokens) & set(tokenizer.get_vocab()):
        raise ValueError(f"the tokenizer already has a token {min(known)}: export from the original model")
    alone = [tokenizer(probe)["input_ids"] for probe in _PROBES]
    expected = [_logits(model, task_type, inputs_embeds=_embeds(layer, ids, embedding)) for ids in alone]
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in tokens])
    ids = tokenizer.convert_tokens_to_ids(tokens)
    text = _around(tokenizer, tokens)
    wholes = []
    for probe, own in zip(_PROBES, alone):
        whole = tokenizer(text.before + probe + text.after, add_special_tokens=text.add_special_tokens)["input_ids"]
        if whole != [*ids, *own]:
            raise ValueError(
                f"the tokenizer encodes {probe!r} as {whole[len(ids) :]} after the prompt, but as {own} alone: a "
                "prompt cannot be served as tokens with it"
            )
        wholes.append(whole)
    rows = rows_of(embedding)
    if layer.config.r:
        untie(model)
    model.resize_token_embeddings(max([*ids, rows - 1]) + 1, mean_resizing=False)
    embedding = scaled_embedding(input_embedding(model), factor)
    if layer.config.r:
        for start in range(0, rows, ROWS_AT_ONCE):
            part = list(range(start, min(start + ROWS_AT_ONCE, rows)))
            _write(embedding, part, _embeds(layer, part, embedding)[0, len(tokens) :])
    if tokens:
        _write(embedding, ids, layer.part("folded_prompt"))
    if (generation := getattr(model, "generation_config", None)) is not None:
        generation.suppress_tokens = [*(generation.suppress_tokens or []), *ids] or None
    model.tie_weights()
    for probe, whole, logits in zip(_PROBES, wholes, expected):
        input_ids = torch.tensor([whole], device=logits.device)
        found = _logits(model, task_type, input_ids=input_ids)[..., : logits.shape[-1]]
        if not torch.allclose(found, logits, rtol=_TOLERANCE, atol=_TOLERANCE * float(logits.abs().max())):
            raise ValueError(
                f"{type(model).__name__} with the adapter's tokens does not answer {probe!r} as the adapter does"
            )
    return text


def check_update(layer: EPTLayer, task_type: str) -> None:
    """Raises `ValueError` for an adapter that a vocabulary's rows cannot hold."""
    config = layer.config
    if task_type not in TASK_TYPES:
        raise ValueError(
            f"the adapter is for {task_type}, but only adapters for {', '.join(TASK_TYPES)} can become tokens"
        )
    if not config.r:
        return
    if not config.updates_by_token:
        raise ValueError(
            f"the adapter has a position-dependent update (r={config.r}), which a vocabulary cannot hold: "
            '--as-tokens is for adapters with r=0, such as prompt tuning, or with update="token"'
        )
    if task_type == "SEQ_2_SEQ_LM":
        raise ValueError("only the encoder gets the update, but the decoder reads the same vocabulary: train with r=0")
    if task_type == "CAUSAL_LM" and config.update_scope != "all":
        raise ValueError(
            "the adapter leaves generated tokens without the update, but as words of the vocabulary they would get "
            'it: train with update_scope="all"'
        )


def _embeds(layer: EPTLayer, ids: list[int], embedding: Any) -> Tensor:
    return layer(torch.tensor([ids], device=embedding.weight.device), embedding=embedding)[0]


def _logits(model: Any, task_type: str, **inputs: Tensor) -> Tensor:
    """Returns the last column's logits in float32; for an encoder-decoder those of the first word of its answer."""
    (given,) = inputs.values()
    inputs["attention_mask"] = torch.ones(given.shape[:2], dtype=torch.int64, device=given.device)
    if task_type == "SEQ_2_SEQ_LM":
        inputs["decoder_input_ids"] = torch.tensor([[model.config.decoder_start_token_id]], device=given.device)
    logits: Tensor = model(**inputs).logits
    return (logits if task_type == "SEQ_CLS" else logits[:, -1]).float()


def untie(model: Any) -> None:
    """Unties a model's head from the input embedding, if they share weights."""
    head, embedding = model.get_output_embeddings(), cast(Any, input_embedding(model))
    if head is not None and head.weight is embedding.weight:
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
        model.config.tie_word_embeddings = model.config.get_text_config().tie_word_embeddings = False


def _write(embedding: Any, ids: list[int], rows: Tensor) -> None:
    """Writes `rows` `[len(ids), d]` into `embedding` as the embeddings of `ids`."""
    place = torch.tensor(ids, device=embedding.weight.device)
    rows = rows.to(place.device, embedding.weight.dtype)
    embedding.weight[place] = 1.0
    scale = embedding(place)[0, 0].float()  # Gemma and BART scale what they look up
    embedding.weight[place] = (rows.float() / scale).to(rows.dtype)
    if not torch.allclose(embedding(place).float(), rows.float(), rtol=2**-6, atol=0.0):
        raise ValueError(f"{type(embedding).__name__} does more than look up and scale: its rows cannot be set")


def _around(tokenizer: Any, tokens: list[str]) -> PromptText:
    """Puts the tokens that the tokenizer places before a text after the prompt, as in training."""
    whole, body = (tokenizer(_PROBES[0], add_special_tokens=added)["input_ids"] for added in (True, False))
    place = next((i for i in range(len(whole)) if whole[i : i + len(body)] == body), 0)
    start, end = whole[:place], whole[place + len(body) :]
    if not start:
        return PromptText("".join(tokens), "", True)
    before, after = ("".join(tokenizer.convert_ids_to_tokens(part)) for part in (start, end))
    return PromptText("".join(tokens) + before, after, False)
