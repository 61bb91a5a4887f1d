"""A prompt as new words of a model's vocabulary, so that every engine that serves the model serves the prompt."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from tokenizers import AddedToken
from torch import Tensor

from ..embedding import rows_of
from .base_model import input_embedding

TASK_TYPES = ("CAUSAL_LM", "SEQ_2_SEQ_LM")
_PROBES = ("a", "The text, as it is.", "1 2")


class PromptText(NamedTuple):
    """The text to write around an input text: `before + text + after`, tokenised with `add_special_tokens`."""

    before: str
    after: str
    add_special_tokens: bool


@torch.no_grad()
def add_prompt_tokens(model: Any, tokenizer: Any, prompt: Tensor, task_type: str) -> PromptText:
    """Adds a token for each row of `prompt` `[s, d]` to `model` and `tokenizer`, in place.

    The new tokens are never generated: they are among `suppress_tokens` of the model's generation configuration.

    Args:
        prompt: in the units of the model's embeddings, of a folded adapter without an update.
        task_type: of the adapter.

    Returns:
        What turns an input text into one for which the model gives the adapter's answers.

    Raises:
        ValueError: the adapter is no language model's, the tokenizer knows such tokens already or writes texts
            differently behind them, or the embedding does more than look up and scale.
    """
    if task_type not in TASK_TYPES:
        raise ValueError(f"the adapter is for {task_type}: prompts of {' and '.join(TASK_TYPES)} alone become tokens")
    tokens = [f"<prompt_{number}>" for number in range(len(prompt))]
    if known := set(tokens) & set(tokenizer.get_vocab()):
        raise ValueError(f"the tokenizer has a token {min(known)} already: export from the original model")
    alone = [tokenizer(probe)["input_ids"] for probe in _PROBES]
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in tokens])
    ids = tokenizer.convert_tokens_to_ids(tokens)
    text = _around(tokenizer, tokens)
    for probe, expected in zip(_PROBES, alone):
        found = tokenizer(text.before + probe + text.after, add_special_tokens=text.add_special_tokens)["input_ids"]
        if found != [*ids, *expected]:
            raise ValueError(
                f"behind the prompt the tokenizer writes {probe!r} as {found[len(ids) :]}, alone as {expected}: "
                "with it a prompt cannot be served as tokens"
            )
    model.resize_token_embeddings(max(max(ids) + 1, rows_of(input_embedding(model))), mean_resizing=False)
    embedding: Any = input_embedding(model)
    place = torch.tensor(ids, device=embedding.weight.device)
    rows = prompt.to(place.device, embedding.weight.dtype)
    embedding.weight[place] = 1.0
    scale = embedding(place)[0, 0].float()  # Gemma and BART multiply what they look up
    embedding.weight[place] = (rows.float() / scale).to(rows.dtype)
    if not torch.allclose(embedding(place).float(), rows.float(), rtol=2**-6, atol=0.0):
        raise ValueError(f"the input embedding of {type(model).__name__} does more than look up and scale")
    model.generation_config.suppress_tokens = [*(model.generation_config.suppress_tokens or []), *ids]
    return text


def _around(tokenizer: Any, tokens: list[str]) -> PromptText:
    """Puts the tokens that the tokenizer places before a text behind the prompt, as they stand in training."""
    whole, body = (tokenizer(_PROBES[0], add_special_tokens=added)["input_ids"] for added in (True, False))
    place = next((i for i in range(len(whole)) if whole[i : i + len(body)] == body), 0)
    start, end = whole[:place], whole[place + len(body) :]
    if not start:
        return PromptText("".join(tokens), "", True)
    before, after = ("".join(tokenizer.convert_ids_to_tokens(part)) for part in (start, end))
    return PromptText("".join(tokens) + before, after, False)
