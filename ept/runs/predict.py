"""Predicting labels with a trained model, and scoring the predictions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from transformers import PreTrainedTokenizerBase

from .processes import Processes
from ..tasks.encoding import check_length, encode_labels, encode_texts, pad
from ..tasks import GROUP, UNPARSABLE, compute_metrics, nearest_value

SCORINGS = ("generate", "rank")


def predict_labels(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    labels: Sequence[str],
    task_type: str,
    max_length: int,
    batch_size: int,
    scoring: str | None = None,
    progress: str | None = None,
    values: Sequence[float] = (),
    processes: Processes | None = None,
) -> list[int]:
    """The index in `labels` predicted for each text; -1 where a generated answer is none of them.

    SEQ_CLS takes the head's largest logit. CAUSAL_LM ranks the labels by log-likelihood, summed over their tokens,
    without length normalisation. SEQ_2_SEQ_LM generates greedily and compares the stripped answer; `scoring="rank"`
    ranks instead.

    Args:
        max_length: most tokens of a text.
        scoring: None for the task type's own way; "generate" or "rank" otherwise.
        progress: what to call the progress bar on standard error; None for none.
        values: of a regression, the numbers that the labels stand for: a head's output, and an answer that is a number
            but not one of the labels, counts as the nearest.
        processes: share the batches, those of one process, among them; all return the predictions of all.

    Raises:
        ValueError: a text is too long, or the task type has no such scoring.
    """
    if scoring is not None and (task_type == "SEQ_CLS" or scoring not in SCORINGS):
        raise ValueError(f"scoring={scoring!r} is not available for {task_type}: leave it out")
    encoded = encode_texts(tokenizer, texts, task_type)
    for index, ids in enumerate(encoded):
        check_length(index, len(ids), max_length)
    scoring = scoring or {"SEQ_CLS": "head", "CAUSAL_LM": "rank", "SEQ_2_SEQ_LM": "generate"}[task_type]
    scorer = Scorer(model, tokenizer, labels, task_type, scoring, values)
    order = sorted(
        range(len(encoded)), key=lambda index: len(encoded[index])
    )  # neighbours of like length: less padding
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    processes = processes or Processes()
    own: dict[int, int] = {}
    with _evaluating(model):
        for batch in _tracked(processes.share(batches), progress if processes.is_rank_zero else None):
            own.update(zip(batch, scorer([encoded[index] for index in batch])))
    predictions = [UNPARSABLE] * len(encoded)
    for part in processes.gather(own):
        for index, prediction in part.items():
            predictions[index] = prediction
    return predictions


def evaluate(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    split: Any,
    labels: Sequence[str],
    metrics: Sequence[str],
    task_type: str,
    max_length: int,
    batch_size: int,
    scoring: str | None = None,
    progress: str | None = None,
    values: Sequence[float] = (),
    processes: Processes | None = None,
) -> dict[str, float]:
    """Metrics of the predictions on `split` (columns `text` and `label`), and the share of `unparsable` answers."""
    predictions = predict_labels(
        model,
        tokenizer,
        list(split["text"]),
        labels,
        task_type,
        max_length,
        batch_size,
        scoring,
        progress,
        values,
        processes,
    )
    groups = list(split[GROUP]) if GROUP in getattr(split, "column_names", split) else None
    scores = compute_metrics(metrics, predictions, list(split["label"]), len(labels), values=values, groups=groups)
    return {**scores, "unparsable": predictions.count(UNPARSABLE) / max(len(predictions), 1)}


class Scorer:
    """Predicts the label of each of a few encoded texts in one go."""

    def __init__(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        labels: Sequence[str],
        task_type: str,
        scoring: str,
        values: Sequence[float] = (),
    ) -> None:
        self.model, self.tokenizer, self.labels, self.task_type = model, tokenizer, labels, task_type
        self.values = values
        self.predict = {"head": self.by_head, "generate": self.by_generation, "rank": self.by_likelihood}[scoring]
        if scoring != "head":
            self.answers = encode_labels(tokenizer, labels, task_type)

    def __call__(self, inputs: Sequence[list[int]]) -> list[int]:
        return self.predict(inputs)

    def batch(self, inputs: Sequence[list[int]], answer: Sequence[int] = ()) -> dict[str, torch.Tensor]:
        """Padded ids and mask; with an `answer` after each text, also the mask of the text alone."""
        left = self.task_type == "CAUSAL_LM"
        batch = {
            "input_ids": pad([[*ids, *answer] for ids in inputs], self.tokenizer.pad_token_id, left),
            "attention_mask": pad([[1] * (len(ids) + len(answer)) for ids in inputs], 0, left),
        }
        if answer:
            batch["text_mask"] = pad([[1] * len(ids) + [0] * len(answer) for ids in inputs], 0, left).bool()
        return {name: tensor.to(self.model.device) for name, tensor in batch.items()}

    def by_head(self, inputs: Sequence[list[int]]) -> list[int]:
        logits = self.model(**self.batch(inputs)).logits
        if not self.values:
            return logits.argmax(-1).tolist()
        inside = logits[:, 0].float().clamp(self.values[0], self.values[-1]).tolist()
        return [self._nearest(number) for number in inside]

    def by_generation(self, inputs: Sequence[list[int]]) -> list[int]:
        longest = max(len(answer) for answer in self.answers)
        ids = self.model.generate(**self.batch(inputs), max_new_tokens=longest + 1, do_sample=False, num_beams=1)
        if self.task_type == "CAUSAL_LM":  # trained without an end token: what follows the label does not count
            new = ids[:, max(len(text) for text in inputs) :].tolist()
            return [next((i for i, a in enumerate(self.answers) if row[: len(a)] == a), UNPARSABLE) for row in new]
        found = [text.strip() for text in self.tokenizer.batch_decode(ids, skip_special_tokens=True)]
        index = {label: i for i, label in enumerate(self.labels)}
        return [index.get(answer, self._nearest(answer)) for answer in found]

    def _nearest(self, answer: Any) -> int:
        """The label of a regression nearest to a number; unparsable for anything else."""
        found = nearest_value(answer, self.values) if self.values else None
        return UNPARSABLE if found is None else found

    def by_likelihood(self, inputs: Sequence[list[int]]) -> list[int]:
        if self.task_type == "SEQ_2_SEQ_LM":
            scores = [self._seq2seq_likelihood(inputs, answer) for answer in self.answers]
        elif len({(*answer[:-1], len(answer)) for answer in self.answers}) == 1:
            return self._by_last_token(inputs)
        else:
            scores = [self._causal_likelihood(inputs, answer) for answer in self.answers]
        return torch.stack(scores, -1).argmax(-1).tolist()

    def _by_last_token(self, inputs: Sequence[list[int]]) -> list[int]:
        """Labels that differ in their last token only: one forward ranks them all, what they share cancels."""
        logits = self.model(**self.batch(inputs, self.answers[0][:-1]), logits_to_keep=1).logits[
            :, -1
        ]  # [B, vocabulary]
        last = torch.tensor([answer[-1] for answer in self.answers], device=logits.device)
        return logits[:, last].argmax(-1).tolist()

    def _causal_likelihood(self, inputs: Sequence[list[int]], answer: list[int]) -> torch.Tensor:
        logits = self.model(**self.batch(inputs, answer), logits_to_keep=len(answer) + 1).logits[
            :, :-1
        ]  # [B, k, vocabulary]
        target = torch.tensor(answer, device=logits.device).expand(len(inputs), -1)
        return _sum_log_likelihood(logits, target)

    def _seq2seq_likelihood(self, inputs: Sequence[list[int]], answer: list[int]) -> torch.Tensor:
        target = torch.tensor(answer, device=self.model.device).repeat(len(inputs), 1)
        logits = self.model(**self.batch(inputs), labels=target).logits  # [B, k, vocabulary]
        return _sum_log_likelihood(logits, target)


def _sum_log_likelihood(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Σ log p(target) over the positions: [B, k, vocabulary] and [B, k] to [B]."""
    return logits.float().log_softmax(-1).gather(-1, target.unsqueeze(-1)).squeeze(-1).sum(-1)


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def _tracked(batches: Sequence[list[int]], description: str | None) -> Any:
    console = Console(stderr=True)
    if description is None or not console.is_terminal:
        return batches
    return track(batches, description, console=console, transient=True)
