"""`generate` after a prompt: the base model's arguments, and the refusal of those that a prompt would invalidate.

A decoder is given the text's ids and the embeddings of prompt and text. It reads the embeddings, and uses the ids for
everything derived from the text: output, streaming, penalties, lengths. Encoders read only embeddings.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .facts import BaseModelFacts
from .inputs import cache_among, cached_length
from .layout import numbered
from .reading import generation_of

_DRAFTS = "drafts tokens without the prompt, or counts the cache without it"
_ELSEWHERE = "is code that transformers loads from elsewhere and that knows of no prompt"
# Arguments of `generate` and fields of its configuration that a prompt invalidates, unless they have these values.
REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    **dict.fromkeys(("assistant_model", "assistant_early_exit", "prompt_lookup_num_tokens"), ((None,), _DRAFTS)),
    **dict.fromkeys(("speculation_type", "use_mtp", "is_assistant"), ((None, False), _DRAFTS)),
    "guidance_scale": ((None, 1, 1.0), "compares with answers that the base model gives without the prompt"),
    "token_healing": ((None, False), "changes ids after they have been embedded"),
    "prefill_chunk_size": ((None,), "reads the ids in pieces, and the prompt has none"),
    **dict.fromkeys(("custom_generate", "penalty_alpha", "dola_layers"), ((None,), _ELSEWHERE)),
    **dict.fromkeys(("constraints", "force_words_ids"), ((None,), _ELSEWHERE)),
    "num_beam_groups": ((None, 1), _ELSEWHERE),
    "diversity_penalty": ((None, 0, 0.0), _ELSEWHERE),
}


class GenerationOptions(Mapping[str, Any]):
    """Options of one call of `generate`: its arguments take precedence over its configurations."""

    def __init__(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        names = list(inspect.signature(model.generate).parameters)[1:]  # all after the inputs
        self.given = {**dict(zip(names, args)), **kwargs}
        self._own, self._default = self.given.get("generation_config"), model.generation_config

    def asked_for(self, name: str) -> Any:
        """Returns what the caller set, directly or in a configuration; None if it is left to the model's own."""
        value = self.given.get(name)
        return getattr(self._own, name, None) if value is None else value

    def __getitem__(self, name: str) -> Any:
        value = self.asked_for(name)
        return getattr(self._default, name, None) if value is None else value

    def __iter__(self) -> Any:
        return iter(self.given)

    def __len__(self) -> int:
        return len(self.given)


def check_options(model: Any, options: GenerationOptions, facts: BaseModelFacts) -> None:
    """Raises `ValueError` for an option that a prompt invalidates, and for a language model that is not causal."""
    if facts.task_type == "CAUSAL_LM" and not facts.is_causal:
        raise ValueError(
            f"{type(model).__name__} sees the text after each token, so it cannot generate token by token: load it "
            "as a decoder (is_decoder=True in a configuration like BERT's)"
        )
    for name, (allowed, reason) in REFUSED.items():
        value = options[name]
        if not any(value is a or (isinstance(a, (int, float)) and value == a) for a in allowed):
            shown = value if isinstance(value, (bool, int, float, str)) else "…"
            raise ValueError(f"{name}={shown} {reason}: leave it out")
    if options["cache_implementation"] == "paged":
        raise ValueError("cache_implementation='paged' reads only ids, without a prompt: use another one")
    if cached_length(facts, options.given):
        raise ValueError(
            "generate reads prompt and text from the beginning and cannot use past_key_values of an earlier call: "
            "pass the whole text's ids without them (use_prompt_cache=True keeps those of the prompt)"
        )


def start_of_text(options: GenerationOptions, device: torch.device) -> Tensor:
    """Returns the ids from which generation without a text starts, `[1, 1]`."""
    if options["bos_token_id"] is None:
        raise ValueError("generate needs input_ids: the model has no bos_token_id to begin with")
    return torch.full((1, 1), options["bos_token_id"], device=device)


def infer_mask(ids: Tensor, options: GenerationOptions) -> Tensor | None:
    """Infers the attention mask of `ids` from their padding, if the base model would; None: nothing is padded."""
    padding, end = options["pad_token_id"], options["eos_token_id"]
    ends = end if isinstance(end, (list, tuple)) else [] if end is None else torch.as_tensor(end).flatten().tolist()
    if padding is None or int(padding) in ends:
        return None
    mask = ids != int(padding)
    return None if bool(mask.all()) else mask.long()


def bound_length(
    inputs: dict[str, Any], options: GenerationOptions, n: int, s: int, longest: int, facts: BaseModelFacts, model: Any
) -> None:
    """Turns bounds on the whole length into bounds on new tokens, because the base model would also count the prompt.

    Args:
        n: length of the padded text.
        s: length of the prompt.
        longest: length of the longest text, in real tokens.

    Raises:
        ValueError: `max_length` leaves no room, or more tokens are requested than the model has positions.
    """
    for bound, new in (("max_length", "max_new_tokens"), ("min_length", "min_new_tokens")):
        inputs.pop(bound, None)
        # A bound set in a call takes precedence over the other kind in the model's own configuration.
        if options.asked_for(new) is not None or (options.asked_for(bound) is None and options[new] is not None):
            continue
        if not (value := options[bound]):
            continue
        if bound == "max_length" and value <= n:
            raise ValueError(
                f"max_length={value} leaves no room after {n} input tokens: raise it or use max_new_tokens"
            )
        inputs[new] = max(value - n, 0)
    count = inputs.get("max_new_tokens", options["max_new_tokens"])
    limit = _position_limit(model, facts)
    if limit is not None:
        room = limit - s - longest + 1  # the last new token is never read
        if options.asked_for("max_new_tokens") is None and options.asked_for("max_length") is None:
            inputs["max_new_tokens"] = count = min(20 if count is None else count, room)
        if room < 1 or (count is not None and count > room):
            raise ValueError(
                f"{s} prompt tokens, {longest} text tokens and {count} new ones are more than the {limit} positions of "
                f"{type(model).__name__}: ask for at most {max(room, 0)} new tokens"
            )
    read = s + (20 if count is None else count) - 1  # except the last new token
    _check_rope(model, s + longest, longest + read)
    layers = getattr(cache_among(facts, options.given), "layers", ())
    places = [layer.max_cache_len for layer in layers if _is_full_when_filled(layer)]
    if places and min(places) < n + read:
        raise ValueError(
            f"{s} prompt tokens, {n} text tokens and new ones fill {n + read} places, but the cache has "
            f"{min(places)}: make it with max_cache_len={n + read}"
        )


def _position_limit(model: Any, facts: BaseModelFacts) -> int | None:
    """Returns the number of positions that the model has, learned or (GPT-J's) computed once; None: no limit."""
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    tables = (b for b in model.buffers() if b.dim() == 2 and b.is_floating_point() and b.shape[0] == most)
    return most if facts.position_limit is None and any(True for _ in tables) else facts.position_limit


def choose_positions(inputs: dict[str, Any], facts: BaseModelFacts, model: Any, mask: Tensor | None) -> None:
    """Keeps position ids in `inputs` only if `generate` of `model` needs them to continue as `forward` reads.

    Raises:
        ValueError: it continues differently either way, and rows are padded or positions do not begin at 0.
    """
    positions = inputs.pop("position_ids", None)
    is_padded = mask is not None and not bool(mask.all())
    if not is_padded and not facts.position_offset:
        return  # all ways of counting agree
    way = generation_of(model, facts)
    if way is None:
        raise ValueError(
            f"generate of {type(model).__name__} counts positions differently from forward if rows are padded or do "
            "not begin at 0: give rows of one length, or use another model"
        )
    if way == "positions":
        real = inputs.get("attention_mask")
        if positions is None and real is not None and facts.position_offset is not None:
            positions = numbered(real, facts.position_offset)
        inputs["position_ids"] = positions


def _is_full_when_filled(layer: Any) -> bool:
    """Checks whether a cache's layer has a fixed number of places, with no window that drops the oldest."""
    return hasattr(layer, "max_cache_len") and not getattr(layer, "is_sliding", False)


def _check_rope(model: Any, before: int, after: int) -> None:
    """Refuses to cross the length at which LongRoPE changes all angles, because cached keys would keep theirs."""
    config = model.config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    for entry in (rope, *rope.values()):
        if not isinstance(entry, dict) or entry.get("rope_type") != "longrope":
            continue
        switch = entry.get("original_max_position_embeddings") or getattr(
            config, "original_max_position_embeddings", config.max_position_embeddings
        )
        if before <= switch < after:
            raise ValueError(
                f"{type(model).__name__} changes its rotary angles beyond {switch} positions, and prompt, text and "
                f"new tokens go from {before} to {after}: ask for at most {switch - before + 1} new tokens"
            )


def encoder_processors(inputs: dict[str, Any], options: GenerationOptions, ids: Tensor | None) -> None:
    """Adds the processors that need the encoder's ids (or a decoder's text), which the base model does not see."""
    from transformers import LogitsProcessorList
    from transformers.generation.logits_process import (
        EncoderNoRepeatNGramLogitsProcessor,
        EncoderRepetitionPenaltyLogitsProcessor,
    )

    made: list[Any] = []
    for name, neutral, kind in (
        ("encoder_repetition_penalty", 1.0, EncoderRepetitionPenaltyLogitsProcessor),
        ("encoder_no_repeat_ngram_size", 0, EncoderNoRepeatNGramLogitsProcessor),
    ):
        if (value := options[name]) is None or value == neutral:
            continue
        if ids is None:
            raise ValueError(f"{name}={value} needs the text's ids: pass input_ids")
        made.append(kind(value, ids))
        inputs[name] = neutral
    if made:
        inputs["logits_processor"] = LogitsProcessorList([*made, *(options.given.get("logits_processor") or [])])


@contextmanager
def embedding_new_tokens(model: Any, embed: Callable[[Tensor, Tensor], Tensor], before: Tensor) -> Iterator[None]:
    """Makes `embed` embed the tokens that `generate` passes to `model` as ids, in this thread and within the context.

    Args:
        embed: maps ids and the number of real tokens before each, both `[rows, k]`, to embeddings `[rows, k, d]`.
        before: `[batch]`, the number of real tokens in each row before the first new one. It is not counted from a
            call's mask, whose form and length differ for a cache of fixed size.
    """
    thread, read = threading.get_ident(), 0  # number of new tokens

    def replace_ids(module: Any, args: Any, inputs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        nonlocal read
        if threading.get_ident() != thread or (ids := inputs.get("input_ids")) is None:
            return None  # prompt and text are already embedded
        rows = before.to(ids.device).repeat_interleave(len(ids) // len(before))  # beams, or several samples
        positions = rows[:, None] + torch.arange(read, read + ids.shape[1], device=ids.device)
        read += ids.shape[1]
        embeds = embed(ids, positions)
        return args, {**{k: v for k, v in inputs.items() if k != "input_ids"}, "inputs_embeds": embeds}

    handle = model.register_forward_pre_hook(replace_ids, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
