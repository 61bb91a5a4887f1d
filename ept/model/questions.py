"""Experiments with a small model: which outputs agree if a text is given as ids or embeddings, alone or padded."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import product
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import logging

from ..config import TASK_TYPES
from ..embedding import device_of, rows_of
from .base_model import input_embedding
from .facts import TOKEN_OUTPUTS, BaseModelFacts
from .inputs import BaseInputs
from .layout import APART, BEHIND, BESIDE, FRONT, arrangement, moved, moved_back, numbered
from .packing import Packing
from .prompt_cache import read_prompt_once

WITHOUT_LANGUAGE_MODEL = "is an encoder-decoder without a language-model head: use the class for conditional generation"
TOLERANCE = 1e-4  # relative to the largest value in the answer to a row alone; rounding errors are a hundredth of it
_S, _SHORT, _LONG, _ANSWER = 3, 7, 11, 2  # prompt rows, tokens of the two texts, tokens of a decoder's input


class Subject:
    """A model to test, with two texts."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.embedding: Any = input_embedding(model)
        self.arguments = inspect.signature(model.forward).parameters
        self.encoder_decoder = bool(getattr(model.config, "is_encoder_decoder", False))
        self.device: Any = device_of(self.embedding)
        # Tokens with a special meaning to the model are not used in the texts.
        special = {i for v in token_ids(model.config) for i in (v if isinstance(v, (list, tuple)) else [v])}
        rows, padding = rows_of(self.embedding), getattr(model.config, "pad_token_id", None)
        self.special = sorted(i for i in special if type(i) is int and 0 <= i < rows and i != padding)
        plain = [i for i in range(min(rows, 4096)) if i not in special] or [0]
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.tensor(plain)[torch.randint(len(plain), (2, _LONG), generator=generator)].to(self.device)
        self.answer = self.ids[:1, :_ANSWER].flip(1)
        with self.quiet():
            self.embeds = self.embedding(self.ids)
            if not isinstance(self.embeds, Tensor):
                raise TypeError(f"its embedding gives a {type(self.embeds).__name__}, not vectors")
            # Not rows of the table: some models look up the ids to which embeddings belong.
            self.prompt = self.embedding(self.ids.flip(1)[:1, :_S])[0] * 1.1
            self.padding = self.embedding(self.ids.flip(1)[:1, -1:])[0, 0] * 2
            self.output = self.run(input_ids=self.ids[:1, :_SHORT])
        eps = torch.finfo(self.embeds.dtype).eps
        self.tolerance = max(TOLERANCE, 8 * eps if eps > 1e-6 else 0.0)
        self.task_type = ""
        self.factor = 1.0

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """Runs in eval mode without gradients or warnings; restores modes and random states afterwards."""
        modes = [(module, module.training) for module in self.model.modules()]
        state, verbosity = numpy.random.get_state(), logging.get_verbosity()
        # A copy is on a CPU; the model itself may be on an accelerator, which has its own generator.
        kind = self.device.type if self.device.type in ("cuda", "xpu") else None
        forked = torch.random.fork_rng([self.device], device_type=kind) if kind else torch.random.fork_rng([])
        with forked, torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                self.model.eval()
                logging.set_verbosity_error()
                yield
            finally:
                numpy.random.set_state(state)
                logging.set_verbosity(verbosity)
                for module, mode in modes:
                    module.training = mode

    def run(self, **inputs: Any) -> dict[str, Tensor]:
        """Calls the model and returns its outputs by name."""
        torch.default_generator.manual_seed(0)
        if self.encoder_decoder:
            rows = len(next(iter(inputs.values())))
            inputs["decoder_input_ids"] = self.answer.expand(rows, -1)
        if "use_cache" in self.arguments:
            inputs["use_cache"] = False
        if "return_dict" in self.arguments:
            inputs["return_dict"] = True
        output = self.model(**inputs)
        return {name: value for name, value in output.items() if isinstance(value, Tensor)}

    def facts(self, facts: BaseModelFacts) -> BaseModelFacts:
        """Determines all facts about the model."""
        self.task_type = self._head()
        if self.task_type not in TASK_TYPES:
            return replace(facts, refusal=self.task_type)
        facts = replace(facts, task_type=self.task_type)
        try:
            with _PositionTables(self.model, _SHORT) as tables:
                self._alone(0, 0)
            self._alone(0, _S)
            self.factor = self._embedding_factor()
        except Exception as error:
            reason = str(error).strip().splitlines() or [type(error).__name__]
            return replace(facts, refusal=f"cannot be called with inputs_embeds ({reason[0][:200]})")
        if not self.factor:
            refusal = (
                "needs input_ids besides embeddings, for more than a look-up; prompt rows have no ids, so no prompt "
                "can be put before its input"
            )
            return replace(facts, refusal=refusal)
        offset = self._position_offset()
        facts = replace(
            facts,
            embedding_factor=self.factor,
            ids_alone=self._ids_alone(),
            has_pooler=self._has_pooler(),
            position_table=tables.found,
            is_causal=self._is_causal(),
            shifts_labels=self._shifts_labels(),
            needs_mask="attention_mask" in self.arguments
            and not self._same(self._alone(0, _S, mask=False), self._alone(0, _S)),
        )
        if self.task_type == "CAUSAL_LM":  # its columns stay in place, if possible
            candidates = [(BESIDE, offset), (BESIDE, None), (BEHIND, None)]
        else:
            candidates = [(BEHIND, None), (BEHIND, offset), (FRONT, offset), (FRONT, None)]
        for padding, position_offset in dict.fromkeys(candidates):
            if all(self._padded_as_alone(padding, position_offset, s) for s in (_S, 0)):
                splits = self._padded_as_alone(APART, position_offset, _S)
                return replace(facts, padding=padding, position_offset=position_offset, splits_prompt=splits)
        return replace(facts, position_offset=offset)

    def generation(self, facts: BaseModelFacts) -> str | None:
        """Finds out how padded rows are continued as if alone, and as `forward` continues them; see `generation_of`."""
        self.task_type, self.factor = facts.task_type, facts.embedding_factor
        embeds, mask, _ = self._padded(BESIDE, 0, left=True)
        ids = torch.where(mask.bool(), self.ids, self.ids[:1, :1])
        ids[0, -_SHORT:] = self.ids[0, :_SHORT]
        expected = [self._alone(row, 0)[0][:, -1] for row in (0, 1)]
        for way in ("mask", "positions"):
            inputs: dict[str, Any] = {"input_ids": ids, "inputs_embeds": embeds, "attention_mask": mask}
            if way == "positions":
                if facts.position_offset is None:
                    continue
                inputs["position_ids"] = numbered(mask, facts.position_offset)
            logits = self._generated(**inputs)
            alone = [
                self._generated(**{key: x[row : row + 1, -length:] for key, x in inputs.items()})
                for row, length in enumerate((_SHORT, _LONG))
            ]
            together = [[x[row : row + 1] for x in logits] for row in (0, 1)]
            if all(self._same(together[row], alone[row]) for row in (0, 1)) and self._same(
                [steps[0] for steps in alone], expected
            ):
                return way
        return None

    def sharing(self, facts: BaseModelFacts) -> bool:
        """Checks whether two texts are read after a prompt that is read once as after a prompt for each."""
        for inputs, real in self._behind_prompts(facts):
            expected = self.run(**inputs)["logits"][:, _S:]
            read_prompt_once(self.model, facts, inputs)
            of_texts = real[:, _S:]
            if not self._same([self.run(**inputs)["logits"][of_texts]], [expected[of_texts]]):
                return False
        return True

    def packing(self, facts: BaseModelFacts) -> bool:
        """Checks whether texts side by side in a row, longer than any window, are read as in rows of their own."""
        for inputs, real in self._behind_prompts(facts):
            expected, n = self.run(**inputs)["logits"], real.shape[1] - _S
            for rows, few in product(([0, 1], [0, 1, 1]), (0, 2)):  # second: the last row lacks a text
                packing, packed = Packing(len(rows), 2, _S, n), BaseInputs({k: x[rows] for k, x in inputs.items()})
                packing.pack(facts, packed, few)
                last = few or _S + n
                logits, counts = packing.unpacked(self.run(**packed)["logits"]), real[rows, -last:]
                if not self._same([logits[counts]], [expected[rows, -last:][counts]]):
                    return False
        return True

    def _behind_prompts(self, facts: BaseModelFacts) -> Iterator[tuple[BaseInputs, Tensor]]:
        """Yields both texts, each after its own prompt, without and with a mask and padding, and the real places."""
        self.task_type, self.factor = facts.task_type, facts.embedding_factor
        texts = self.embeds[:, :_SHORT] * self.factor
        plain = torch.cat([self.prompt[:_S].expand(2, -1, -1), texts], dim=1)
        ones = torch.ones(plain.shape[:2], dtype=torch.int64, device=self.device)
        batches = [(plain, ones, False), (plain, ones, True)]
        if facts.splits_prompt:
            batches += [(*self._padded(APART, _S, left)[:2], True) for left in (True, False)]
        for embeds, mask, is_masked in batches:
            inputs = BaseInputs(inputs_embeds=embeds)
            inputs.s = _S
            if is_masked:
                inputs["attention_mask"] = mask
                if facts.position_offset is not None and "position_ids" in facts.forward_arguments:
                    inputs["position_ids"] = numbered(mask, facts.position_offset)
            yield inputs, mask.bool()

    def _generated(self, **inputs: Tensor) -> list[Tensor]:
        """Generates a few tokens, and returns the logits of each step."""
        torch.default_generator.manual_seed(0)
        options = {"do_sample": False, "num_beams": 1, "return_dict_in_generate": True, "output_logits": True}
        return list(self.model.generate(**inputs, **options, max_new_tokens=3, min_new_tokens=3).logits)

    def _head(self) -> str:
        """Returns the task type to which the outputs belong, or the reason why there is none."""
        shapes = {name: tuple(value.shape) for name, value in self.output.items()}
        logits = shapes.get("logits", ())
        if self.encoder_decoder:
            if logits[:2] == (1, _ANSWER) and len(logits) == 3:
                return "SEQ_2_SEQ_LM"
            return WITHOUT_LANGUAGE_MODEL
        if shapes.get("start_logits") == shapes.get("end_logits") == (1, _SHORT):
            return "QUESTION_ANS"
        if len(logits) == 2 and logits[0] == 1:
            return "SEQ_CLS"
        if logits[:2] == (1, _SHORT) and len(logits) == 3:
            can_generate: Any = getattr(self.model, "can_generate", None)
            if can_generate is not None and can_generate():
                return "CAUSAL_LM"
            if getattr(self.model, "get_output_embeddings", lambda: None)() is None:
                return "TOKEN_CLS"
            return "predicts tokens at their own positions, which fits none of the task types " + ", ".join(TASK_TYPES)
        if not logits and len(hidden := shapes.get("last_hidden_state", ())) == 3 and hidden[:2] == (1, _SHORT):
            return "FEATURE_EXTRACTION"
        found = ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items()) or "nothing"
        return f"gives {found} for a text of {_SHORT} tokens, which fits none of the task types {', '.join(TASK_TYPES)}"

    def _alone(self, row: int, s: int, mask: bool = True, positions: Tensor | None = None) -> list[Tensor]:
        """Reads one text after `s` rows of the prompt, without padding."""
        text = self.embeds[row : row + 1, : (_SHORT, _LONG)[row]] * self.factor
        embeds = torch.cat([self.prompt[None, :s], text], dim=1)
        inputs = {"inputs_embeds": embeds}
        if mask and "attention_mask" in self.arguments:
            inputs["attention_mask"] = torch.ones(embeds.shape[:2], dtype=torch.int64, device=self.device)
        if positions is not None:
            inputs["position_ids"] = positions
        return self._answers(self.run(**inputs), s)

    def _answers(self, output: dict[str, Tensor], s: int) -> list[Tensor]:
        if self.task_type in TOKEN_OUTPUTS:
            return [output[name][:, s:] for name in TOKEN_OUTPUTS[self.task_type]]
        return [output["logits"]]

    def _same(self, actual: list[Tensor], expected: list[Tensor]) -> bool:
        return all(
            a.shape == e.shape and bool((a - e).abs().max() <= self.tolerance * e.abs().max())
            for a, e in zip(actual, expected, strict=True)
        )

    def _embedding_factor(self) -> float:
        """Finds the factor by which embeddings must be multiplied to be read as ids are; 0 if there is none."""
        expected = self._answers(self.output, 0)
        if self._same(self._alone(0, 0), expected):
            return 1.0
        # Many models scale what they look up, but not embeddings that they are given.
        with _Multiples(self.embeds[:1, :_SHORT]) as multiples:
            self.run(input_ids=self.ids[:1, :_SHORT])
        for self.factor in multiples.found:
            if self._same(self._alone(0, 0), expected):
                return self.factor
        return 0.0

    def _ids_alone(self) -> tuple[int, ...]:
        """Finds special tokens, except padding, that are read differently inside a text as embeddings and as ids."""

        def is_same(tokens: list[int]) -> bool:
            ids = self.ids[:1].clone()
            ids[0, 1 : 1 + len(tokens)] = torch.tensor(tokens, device=self.device)
            embeds = self.embedding(ids) * self.factor
            mask = {"attention_mask": torch.ones_like(ids)} if "attention_mask" in self.arguments else {}
            expected = self._answers(self.run(input_ids=ids, **mask), 0)
            return self._same(self._answers(self.run(inputs_embeds=embeds, **mask), 0), expected)

        def is_unlike(token: int) -> bool:
            try:
                return not is_same([token])
            except Exception:  # such as the placeholder of an image that is missing
                return False

        try:
            if is_same(self.special[: _LONG - 2]) and len(self.special) <= _LONG - 2:
                return ()
        except Exception:
            pass
        return tuple(token for token in self.special if is_unlike(token))

    def _position_offset(self) -> int | None:
        """Finds the position of the first token with which a text is read as without positions."""
        if "position_ids" not in self.arguments:
            return None
        pad = getattr(self.model.config, "pad_token_id", None)
        expected, count = self._alone(0, _S), torch.arange(_S + _SHORT, device=self.device)[None]
        for offset in dict.fromkeys((0, pad + 1 if isinstance(pad, int) else 0, 1, 2)):
            try:
                if self._same(self._alone(0, _S, positions=count + offset), expected):
                    return offset
            except Exception:  # positions have another shape, or exceed a table
                continue
        return None

    def _is_causal(self) -> bool:
        if self.task_type not in TOKEN_OUTPUTS:
            return False
        whole, part = self._alone(1, 0), self.run(inputs_embeds=self.embeds[1:, :_SHORT] * self.factor)
        return self._same([x[:, :_SHORT] for x in whole], self._answers(part, 0))

    def _shifts_labels(self) -> bool:
        """Checks whether labels are shifted to the next token, in which case the first label makes no difference."""
        if self.task_type != "CAUSAL_LM":
            return True
        losses = []
        for token in (0, 1):
            labels = torch.full_like(self.ids[:1, :_SHORT], -100)
            labels[:, 0] = token
            try:
                output = self.run(inputs_embeds=self.embeds[:1, :_SHORT] * self.factor, labels=labels)
                losses.append(float(output["loss"]))
            except Exception:  # it takes no labels, or other ones
                return True
        return losses[0] == losses[1] or not all(map(math.isfinite, losses))  # a mean over no labels is NaN

    def _has_pooler(self) -> bool:
        if self.task_type != "FEATURE_EXTRACTION" or "pooler_output" not in self.output:
            return False
        try:
            return self._same([self.model.pooler(self.output["last_hidden_state"])], [self.output["pooler_output"]])
        except Exception:  # no such module, or it takes other arguments
            return False

    def _padded(self, padding: str, s: int, left: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        """Makes embeddings and mask of both texts in a batch, and the order that put padding where it may be."""
        rest = _LONG - _SHORT
        short = [self.padding.expand(rest, -1), self.embeds[0, :_SHORT] * self.factor]
        texts = torch.stack([torch.cat(short if left else short[::-1]), self.embeds[1] * self.factor])
        mask = torch.ones(2, s + _LONG, dtype=torch.int64, device=self.device)
        mask[0, s : s + rest] = 0 if left else 1
        mask[0, s + _SHORT :] = 1 if left else 0
        embeds = torch.cat([self.prompt[:s].expand(2, -1, -1), texts], dim=1)
        order = arrangement(mask, s, padding)
        return moved(embeds, order), moved(mask, order), order

    def _padded_as_alone(self, padding: str, offset: int | None, s: int) -> bool:
        """Checks whether each text of a padded batch is read as if alone, with padding where `padding` puts it."""
        for left in (True, False):
            embeds, placed, order = self._padded(padding, s, left)
            inputs = {"inputs_embeds": embeds}
            if "attention_mask" in self.arguments:
                inputs["attention_mask"] = placed
            if offset is not None:
                inputs["position_ids"] = numbered(placed, offset)
            try:
                output = self.run(**inputs)
            except Exception:
                return False
            for row, length in enumerate((_SHORT, _LONG)):
                answers = [x[row : row + 1] for x in self._answers(output, 0)]
                if self.task_type in TOKEN_OUTPUTS:
                    columns = None if order is None else order[row : row + 1]
                    answers = [moved_back(x, columns)[:, s:] for x in answers]
                    answers = [x[:, -length:] if left else x[:, :length] for x in answers]
                if not self._same(answers, self._alone(row, s)):
                    return False
        return True


def token_ids(config: Any) -> Iterator[Any]:
    """Yields ids, or lists of ids, of the tokens named in a configuration and its sub-configurations."""
    for name, value in config.__dict__.items():
        if hasattr(value, "to_dict"):
            yield from token_ids(value)
        elif "token" in name or name.endswith(("_id", "_index")):
            yield value


class _Multiples(TorchDispatchMode):
    """Watches all results in a model for multiples of `embeds`; `found` has their factors, each once."""

    def __init__(self, embeds: Tensor) -> None:
        super().__init__()
        self.embeds, self.found = embeds, list[float]()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = function(*args, **(kwargs or {}))
        if isinstance(output, Tensor) and output.shape == self.embeds.shape and output.dtype == self.embeds.dtype:
            factor = float((output.double() * self.embeds.double()).sum() / self.embeds.double().square().sum())
            error = float((output - factor * self.embeds).abs().max() / self.embeds.abs().max())
            if error <= 1e-3 * abs(factor) and factor not in (1.0, *self.found):
                self.found.append(factor)
        return output


class _PositionTables(TorchDispatchMode):
    """Finds the parameter in which `n` to `2·n` consecutive places are looked up, and the first of these places."""

    def __init__(self, model: nn.Module, n: int) -> None:
        super().__init__()
        self.names = {p.data_ptr(): name for name, p in model.named_parameters() if p.dim() > 1}
        self.n = n
        self.found: tuple[str, int, int] | None = None

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        table = args[0] if args and isinstance(args[0], Tensor) else None
        if self.found is None and table is not None and table.data_ptr() in self.names:
            places: Any = None
            dimension = 0
            if name == "embedding":
                places = args[1]
            elif name == "index":
                places = args[1][0] if len(args[1]) == 1 else None
            elif name == "index_select":
                dimension, places = args[1], args[2]
            elif name == "slice" and len(args) > 3:
                dimension, places = args[1], torch.arange(args[2] or 0, args[3])
            if isinstance(places, Tensor) and self.n <= places.numel() <= 2 * self.n and not places.is_floating_point():
                places = places.flatten()
                if bool((places.diff() == 1).all()):
                    self.found = (self.names[table.data_ptr()], dimension, int(places[0]))
        return function(*args, **(kwargs or {}))
