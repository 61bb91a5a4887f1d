"""The predictor: a model with its task's tokenizer, labels and length limit, which labels texts and scores splits."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from transformers import GenerationConfig, PreTrainedTokenizerBase
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput

from ..embedding import check_vocabulary, rows_of
from ..model.base_model import input_embedding
from ..model.compilation import uncompiled
from ..tasks import GROUP, UNPARSABLE, Task, compute_metrics, nearest_value
from ..tasks.encoding import IGNORE, TEXT_IDS, Collator, FittedText, encode_labels, encode_split, fit_rows, pad
from ..tasks.metrics import compute_text_metrics
from ..tasks.rows import NUMBER
from ..utils.messages import listed, shown
from ..utils.progress import with_lines
from .adapters import load_trained, share_prompt
from .config import RunConfig, load_run_config
from .data import max_length_of, task_of
from .evaluation import Answer, Evaluation
from .folder import RunFolder
from .loading import load_tokenizer, task_type_of
from .processes import Processes
from .text_answers import TextEvaluation

T = TypeVar("T")


@dataclass(kw_only=True)
class Predictor:
    """A model with its task's tokenizer, labels and length limit, ready to predict and to score.

    SEQ_CLS takes the head's largest logit. CAUSAL_LM ranks the labels by log-likelihood, summed over their tokens,
    without length normalisation. SEQ_2_SEQ_LM generates greedily and compares the answer's tokens. In a regression
    a head's output, and a generated answer that is a number but not one of the labels, count as the nearest label; a
    decoder's answer need only begin with the number.

    Attributes:
        max_length: limit on a text in tokens: `data.max_length`, or less if the model has fewer positions.
        config: provides that limit and the form of the labels (`data`), the batch size and the scoring
            (`training.eval_batch_size`, `training.scoring`: "rank" or "generate" instead of the task type's default).
        processes: share the batches; all return the predictions of all.

    Raises:
        ValueError: the task type does not support the scoring, or the tokenizer cannot tell the labels apart.
    """

    config: RunConfig
    task: Task
    task_type: str
    tokenizer: PreTrainedTokenizerBase
    model: Any
    processes: Processes = field(default_factory=Processes)

    def __post_init__(self) -> None:
        self.labels = self.task.labels(self.config.data.label_form)
        self.outputs: list[int] = []  # indices of each label in a head's output, if they are in another order
        order, words = self.config.model.head_labels, self.task.label_words
        if order is not None and self.task_type == "SEQ_CLS":
            if sorted(order) != sorted(words):
                raise ValueError(f"model.head_labels={shown(order)}: name each of the labels {listed(words)} once")
            self.outputs = [order.index(word) for word in words]
        scoring = self.config.training.scoring
        if self.task_type == "SEQ_CLS" and scoring is not None:
            raise ValueError(f"scoring={scoring!r} is not available for {self.task_type}: leave it out")
        if self.task.is_text and scoring == "rank":
            raise ValueError("scoring='rank' ranks labels, but the answers are free text: leave it out")
        self.generates = (scoring or ("generate" if self.task_type == "SEQ_2_SEQ_LM" else "rank")) == "generate"
        self.answers: list[list[int]] = []  # tokens of a language model's labels
        if self.task_type != "SEQ_CLS" and not self.task.is_text:
            self.answers = encode_labels(self.tokenizer, self.labels, self.task_type)
        self.max_length = max_length_of(self.config.data, self.task)
        if (limit := self.model.text_limit) is not None:
            answer = 0  # a decoder's answer follows the text
            if self.task_type == "CAUSAL_LM":
                answer = max(map(len, self.answers), default=self.config.data.max_answer)
            if answer >= limit:
                raise ValueError(
                    f"the model has positions for {limit} tokens after the prompt, but answers may have {answer}: "
                    + ("lower data.max_answer" if self.task.is_text else "use shorter label words")
                )
            self.max_length = min(self.max_length, limit - answer)
        training = self.config.training
        share_prompt(self.model, False if training.compile_layers else training.shared_prompt)

    def fit(
        self,
        rows: Sequence[Mapping[str, Any]],
        source: str,
        task: Task | None = None,
        numbers: Sequence[int] | None = None,
    ) -> list[FittedText]:
        """Renders each row with the template of `task` (None: its own) and tokenises it; raises as `fit_rows`."""
        truncate, task = self.config.data.on_too_long == "truncate", task or self.task
        options: Any = {"truncate": truncate, "source": source, "numbers": numbers}
        return fit_rows(task, rows, self.tokenizer, self.task_type, self.max_length, **options)

    def predict(self, encoded: Sequence[list[int]], progress: str | None = None) -> list[int]:
        """Predicts the index in `labels` for each text's tokens; -1 if a generated answer is not among them."""
        return [answer.label for answer in self.answer(encoded, progress)]

    def answer(self, encoded: Sequence[list[int]], progress: str | None = None) -> list[Answer]:
        """Answers each text's tokens, with the probability of each label if the labels are ranked.

        Args:
            progress: title of the progress bar on standard error; None: no bar.
        """
        return self._in_batches(self.predict_batch, encoded, progress)

    def write(self, encoded: Sequence[list[int]], progress: str | None = None) -> list[str]:
        """Greedily writes a free-text answer of at most `data.max_answer` tokens to each text's tokens."""
        return self._in_batches(self.write_batch, encoded, progress)

    def _in_batches(
        self, function: Callable[[Sequence[list[int]]], list[T]], encoded: Sequence[list[int]], progress: str | None
    ) -> list[T]:
        # Batches of similar lengths need less padding.
        order = sorted(range(len(encoded)), key=lambda index: len(encoded[index]))
        size, console, own = self.config.training.eval_batch_size, Console(stderr=True), dict[int, T]()
        batches = self.processes.share([order[start : start + size] for start in range(0, len(order), size)])
        steps: Iterable[list[int]] = batches
        if self.processes.is_rank_zero and not console.is_terminal:
            steps = with_lines(batches, progress or "scoring", console)
        elif self.processes.is_rank_zero and progress is not None:
            steps = track(batches, progress, console=console, transient=True)
        with self._evaluating():
            for batch in steps:
                own.update(zip(batch, function([encoded[index] for index in batch])))
        found = {index: answer for part in self.processes.gather(own) for index, answer in part.items()}
        return [found[index] for index in range(len(encoded))]

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        """Switches dropout, gradients and compiled layers off within the context."""
        was_training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad(), uncompiled():  # each new shape in evaluation would be compiled
                yield
        finally:
            self.model.train(was_training)

    def predict_batch(self, inputs: Sequence[list[int]]) -> list[Answer]:
        """Answers a single batch of texts."""
        if self.task_type == "SEQ_CLS":
            logits, values = self.model(**self._batch(inputs)).logits, self.task.values
            if not values:
                return _ranked(logits[:, self.outputs] if self.outputs else logits)
            return [Answer(self._nearest(x, clamp=True), number=x) for x in logits[:, 0].float().tolist()]
        if self.generates:
            ids = self._generate(inputs, max(len(answer) for answer in self.answers) + 1)
            if self.task_type == "CAUSAL_LM":  # trained without an end token, so what follows the label is ignored
                new = ids[:, max(len(text) for text in inputs) :].tolist()
                found = [next((i for i, a in enumerate(self.answers) if row[: len(a)] == a), None) for row in new]
                return [Answer(self._nearest(self._number(row)) if i is None else i) for i, row in zip(found, new)]
            # Compared as tokens, without the start token, because decoding changes text ("no?" becomes "no ?").
            label_of = {self._before_end(answer): i for i, answer in enumerate(self.answers)}
            rows = [self._before_end(row) for row in ids[:, 1:].tolist()]
            return [Answer(label_of[row] if row in label_of else self._nearest(self._text(row))) for row in rows]
        if self.task_type == "CAUSAL_LM" and len({(*answer[:-1], len(answer)) for answer in self.answers}) == 1:
            # Labels that differ only in their last token: one forward pass ranks them all, since the rest cancels.
            batch = self._batch(inputs, self.answers[0][:-1])
            logits = self.model(**batch, logits_to_keep=1).logits[:, -1]  # [B, vocabulary]
            return _ranked(logits[:, [answer[-1] for answer in self.answers]])
        likelihoods = []  # log p(answer | text) of each answer: [B]
        texts: dict[str, Any] = self._batch(inputs) if self.task_type == "SEQ_2_SEQ_LM" else {}
        for answer in self.answers:
            target = torch.tensor(answer, device=self.model.device).repeat(len(inputs), 1)  # [B, k]
            if self.task_type == "SEQ_2_SEQ_LM":
                output = self.model(**texts, labels=target)
                logits = output.logits  # [B, k, vocabulary]
                if isinstance(output, Seq2SeqLMOutput):  # a decoder with experts needs more than this
                    texts["encoder_outputs"] = BaseModelOutput(output.encoder_last_hidden_state)
            else:
                logits = self.model(**self._batch(inputs, answer), logits_to_keep=len(answer) + 1).logits[:, :-1]
            each = logits.float().log_softmax(-1).gather(-1, target.unsqueeze(-1)).squeeze(-1)
            likelihoods.append(each.sum(-1))
        return _ranked(torch.stack(likelihoods, -1))

    def write_batch(self, inputs: Sequence[list[int]]) -> list[str]:
        """Writes answers to a single batch of texts."""
        ids = self._generate(inputs, self.config.data.max_answer)
        start = max(len(text) for text in inputs) if self.task_type == "CAUSAL_LM" else 1
        return [self._text(self._before_end(row)) for row in ids[:, start:].tolist()]

    def _generate(self, inputs: Sequence[list[int]], max_new_tokens: int) -> torch.Tensor:
        """Generates greedily, as answers were trained, without the model's own generation settings.

        Those may include minimum lengths, penalties and forbidden words.
        """
        base: Any = self.model.get_base_model()
        own, end = base.generation_config, self.tokenizer.eos_token_id
        names = ("bos_token_id", "pad_token_id", "decoder_start_token_id")
        ends = {end, *np.atleast_1d(own.eos_token_id if own.eos_token_id is not None else end).tolist()} - {None}
        base.generation_config = GenerationConfig(
            **{name: getattr(own, name, None) for name in names}, eos_token_id=sorted(ends) or None
        )
        try:
            options = {"max_new_tokens": max_new_tokens, "do_sample": False, "num_beams": 1}
            ids: torch.Tensor = self.model.generate(**self._batch(inputs), **options)
            return ids
        finally:
            base.generation_config = own

    def loss(self, split: Any) -> float:
        """Computes the loss of a split's true free-text answers, in nats per token."""
        limit, size = self.config.data.max_answer, self.config.training.eval_batch_size
        encoded = encode_split(
            split, self.tokenizer, (), self.task_type, max_answer=limit, spaced=not self.task.is_chat
        )
        collate = Collator(self.task_type, int(self.tokenizer.pad_token_id))
        starts = self.processes.share(range(0, len(encoded), size))
        own, tokens = 0.0, 0
        with self._evaluating():
            for start in starts:
                batch = collate(encoded.select(range(start, min(start + size, len(encoded)))).to_list())
                count = int((batch["labels"] != IGNORE).sum())
                moved = {k: v.to(self.model.device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
                own, tokens = own + float(self.model(**moved).loss) * count, tokens + count
        parts = self.processes.gather((own, tokens))
        return sum(part[0] for part in parts) / max(sum(part[1] for part in parts), 1)

    def score(self, split: Any, progress: str | None = None) -> dict[str, float]:
        """Computes the task's metrics on a split made by `with_texts`, and the share of `unparsable` answers."""
        return self.evaluate(split, progress).metrics

    def evaluate(self, split: Any, progress: str | None = None) -> Evaluation | TextEvaluation:
        """Answers the rows of a split made by `with_texts` and scores the answers."""
        if self.task.is_text:
            written, right = self.write(split[TEXT_IDS][:], progress), split["target"][:]
            found = compute_text_metrics(self.task.metrics, written, right)
            return TextEvaluation({**found, "loss": self.loss(split)}, written, right)
        answers, references = self.answer(split[TEXT_IDS][:], progress), split["label"][:]
        predictions = [answer.label for answer in answers]
        numbers = [answer.number for answer in answers if answer.number is not None]
        right = split[NUMBER][:] if numbers else ()
        scores = compute_metrics(
            self.task.metrics,
            predictions,
            references,
            len(self.labels),
            values=self.task.values,
            numbers=(numbers, right) if numbers else None,
            groups=split[GROUP][:] if GROUP in split.column_names else None,
        )
        metrics = {**scores, "unparsable": predictions.count(UNPARSABLE) / max(len(predictions), 1)}
        return Evaluation(metrics, answers, references, self.task.label_words, bool(self.task.values), right)

    def _batch(self, inputs: Sequence[list[int]], answer: Sequence[int] = ()) -> dict[str, torch.Tensor]:
        """Pads ids and mask, and for a decoder, which may have an `answer` after each text, also the text mask."""
        left = self.task_type == "CAUSAL_LM"
        batch = {
            "input_ids": pad([[*ids, *answer] for ids in inputs], self.tokenizer.pad_token_id, left),
            "attention_mask": pad([[1] * (len(ids) + len(answer)) for ids in inputs], 0, left),
        }
        check_vocabulary(batch["input_ids"], self.rows_of_table())  # while the ids are on the CPU
        if left:
            batch["text_mask"] = pad([[1] * len(ids) + [0] * len(answer) for ids in inputs], 0, left).bool()
        return {name: tensor.to(self.model.device) for name, tensor in batch.items()}

    def rows_of_table(self) -> int:
        """Returns the number of rows in the model's embedding."""
        return rows_of(input_embedding(self.model.get_base_model()))

    def _before_end(self, answer: list[int]) -> tuple[int, ...]:
        """Returns an answer's tokens up to its end token, if any."""
        end = self.tokenizer.eos_token_id
        return tuple(answer[: answer.index(end)] if end in answer else answer)

    def _text(self, answer: Sequence[int]) -> str:
        return str(self.tokenizer.decode(answer, skip_special_tokens=True)).strip()

    def _number(self, row: list[int]) -> str | None:
        """Takes the number that a decoder's answer begins with, as what follows does not count; None for none.

        A number without a point that the end of the answer may have cut is none, nor is one with a comma in it.
        """
        answer = self._before_end(row)
        text = self._text(answer)
        found = re.match(r"[-+]?\d+(\.\d+)?(?![.,]?\d)", text)
        if found is None or (found[1] is None and found.end() == len(text) and len(answer) == len(row)):
            return None
        return found[0]

    def _nearest(self, answer: Any, clamp: bool = False) -> int:
        """Finds the label of a regression nearest to a number; `UNPARSABLE` for anything else."""
        found = nearest_value(answer, self.task.values, clamp) if self.task.values else None
        return UNPARSABLE if found is None else found


def _ranked(scores: torch.Tensor) -> list[Answer]:
    """Takes the best of each row's scores, `[B, labels]` logits or log-likelihoods; all become probabilities."""
    chosen, probabilities = scores.argmax(-1).tolist(), scores.float().softmax(-1).tolist()
    return [Answer(label, tuple(row)) for label, row in zip(chosen, probabilities)]


def open_run(run_dir: Path, overrides: Sequence[str] = ()) -> Predictor:
    """Loads the model of a run's folder, with `overrides` of its configuration; raises as `trained_run` does."""
    config, adapter = trained_run(run_dir, overrides)
    task_type, tokenizer = task_type_of(config.model), load_tokenizer(config.model)
    task = task_of(config.data, tokenizer)
    pad_token_id, max_length = int(tokenizer.pad_token_id), max_length_of(config.data, task)
    model = load_trained(config, adapter, task_type, task.num_outputs, pad_token_id, max_length)
    return Predictor(config=config, task=task, task_type=task_type, tokenizer=tokenizer, model=model)


def trained_run(run_dir: Path, overrides: Sequence[str] = ()) -> tuple[RunConfig, Path]:
    """Returns the configuration of a run's folder, with `overrides` applied, and its adapter's folder.

    Raises FileNotFoundError if the folder holds no run, or one without an adapter.
    """
    folder = RunFolder(run_dir)
    if not folder.config.is_file():
        raise FileNotFoundError(f"{run_dir} holds no run: there is no config.yaml (`ept train --output` makes one)")
    config = load_run_config(folder.config, overrides)
    if not folder.adapter.is_dir():
        command = f"ept train --output {shlex.quote(str(run_dir))} --resume"
        raise FileNotFoundError(f"the run in {run_dir} has no adapter yet: `{command}` finishes it")
    return config, folder.adapter
