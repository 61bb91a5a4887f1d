"""EPT models for the language model evaluation harness, scored as they generate.

The harness reads a context and its continuation in one call without saying where the context ends, so its own class
would apply the update to the continuation as if it were input text. Needs `pip install lm-eval`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from tqdm import tqdm

from ..model.ept_model import EPTModel


@register_model("ept")
class EPTLM(HFLM):
    """An EPT model of a decoder or an encoder-decoder in the harness; arguments and methods are those of `HFLM`.

    Args:
        pretrained: an `EPTModel`, with `tokenizer`; or the base model's name or folder, with `peft`, the adapter's
            folder.

    Example:
        >>> lm = EPTLM(pretrained=model, tokenizer=tokenizer)  # doctest: +SKIP
        >>> lm_eval.simple_evaluate(model=lm, tasks=["arc_easy"])  # doctest: +SKIP

    Raises:
        ValueError: the model has no EPT adapter; when scoring, a context is longer than the adapter's `max_length`. The
            argument `max_length` cuts contexts with continuations to that length from the left, as the harness does.
    """

    def __init__(self, pretrained: Any, **kwargs: Any) -> None:
        super().__init__(pretrained=pretrained, **kwargs)
        if not isinstance(self.model, EPTModel):
            raise ValueError(
                f"{type(self.model).__name__} has no EPT adapter: pass an EPTModel, or the adapter's folder as peft"
            )

    @property
    def max_length(self) -> int:
        """The most tokens of a context and continuation: as given, or the model's positions less the prompt."""
        longest = int(super().max_length)
        return longest if self._max_length else longest - self.model.active_peft_config.num_virtual_tokens

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        """Scores each continuation after its context: log-likelihood, and whether greedy search gives it."""
        if self.backend != "causal":
            return super()._loglikelihood_tokens(requests, disable_tqdm=disable_tqdm, override_bs=override_bs)
        answers: dict[int, tuple[float, bool]] = {}
        # Longest first, so that a lack of memory shows at once.
        order = sorted(range(len(requests)), key=lambda i: -len(requests[i][1]) - len(requests[i][2]))
        size = override_bs or self.batch_size
        size = self._detect_batch_size([requests[i] for i in order]) if size == "auto" else int(size)
        bar = tqdm(total=len(requests), disable=disable_tqdm or self.rank != 0, desc="Running loglikelihood requests")
        for begin in range(0, len(order), size):
            numbers = order[begin : begin + size]
            for number, answer in zip(numbers, self._score([requests[i][1:] for i in numbers]), strict=True):
                answers[number] = answer
                if (key := requests[number][0]) is not None:
                    self.cache_hook.add_partial("loglikelihood", key, answer)
            bar.update(len(numbers))
        bar.close()
        return [answers[number] for number in range(len(requests))]

    def _score(self, rows: Sequence[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        """Scores a batch of contexts and continuations, both in tokens."""
        kept = max(len(continuation) for _, continuation in rows)
        # The last token is not read; a text that is too long loses its beginning.
        read = [(context + continuation)[-self.max_length - 1 :][:-1] for context, continuation in rows]
        length = max(max(map(len, read)), kept)
        ids, real, text = torch.zeros(3, len(rows), length, dtype=torch.int64, device=self.device)
        for row, (tokens, (_, continuation)) in enumerate(zip(read, rows, strict=True)):
            ids[row, length - len(tokens) :] = torch.tensor(tokens)
            real[row, length - len(tokens) :] = 1
            text[row, length - len(tokens) : length + 1 - len(continuation)] = 1
        mixed_precision = self.mixed_precision_dtype
        with torch.no_grad(), torch.autocast(self.device.type, mixed_precision, enabled=mixed_precision is not None):
            logits: Tensor = self.model(ids, real, text_mask=text, logits_to_keep=kept).logits
        answers = []
        for scores, (_, continuation) in zip(logits, rows, strict=True):
            likelihoods = torch.log_softmax(scores[-len(continuation) :], dim=-1, dtype=self.softmax_dtype)
            wanted = torch.tensor(continuation, device=likelihoods.device)
            total = float(likelihoods.gather(1, wanted[:, None]).sum())
            answers.append((total, torch.equal(likelihoods.argmax(-1), wanted)))
        return answers

    def _model_call(self, inps: Tensor, attn_mask: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        """Runs the model. The harness calls a decoder this way only to find a batch size, with no token as text."""
        if attn_mask is not None or labels is not None:
            return super()._model_call(inps, attn_mask, labels)
        with torch.no_grad():
            return self.model(inps, text_mask=torch.zeros_like(inps)).logits
