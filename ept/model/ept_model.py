"""EPTModel: a frozen Hugging Face model with EPT adapters that behaves as PEFT users expect."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor, nn

from ..config import EPTConfig
from ..embedding import check_mask, lookup
from .adapter_lock import AdapterLock, shared
from .adapters import ModelWithAdapters, check_adapter
from .base_model import freeze, swap_4bit, without_checkpointing
from .compilation import compile_layers
from .frozen import swap_frozen
from .generation import (
    GenerationOptions,
    bound_length,
    check_options,
    choose_positions,
    embedding_new_tokens,
    encoder_processors,
    infer_mask,
    start_of_text,
)
from .inputs import (
    OF_TOKENS,
    BaseInputs,
    cache_name,
    cached_length,
    call_inputs,
    contiguously,
    divide_loss,
    extend,
    length_of,
    shortened,
)
from .layout import FRONT, arrangement, moved
from .mixed import BASE, check_heads_are_ours, check_recomputed, embed_following, heads_of_rows
from .outputs import of_tokens, span_loss
from .packing import LONGEST, Packing, packing_of, reads_masks, second_call
from .prompt_cache import cached_prompt, check_cacheable, check_shareable, is_shareable, read_prompt_once
from .reading import can_pack_texts, can_share_prompt, examine, infer_task_type, with_forward_of
from .smoothing import refuse_label_smoothing
from .texts import SeparateTexts, predicted, targets, text_before_answer
from .undone import undone_if_raised


def get_ept_model(
    model: nn.Module,
    config: EPTConfig,
    adapter_name: str = "default",
    *,
    tokenizer: Any = None,
    fast_4bit: bool = True,
    dequantized_cache_bytes: int = 0,
    fast_frozen: bool = True,
) -> EPTModel:
    """Wraps a Hugging Face model with a fresh EPT adapter; the model is frozen in place.

    Args:
        model: any model that takes `inputs_embeds`: T5 family, Llama family and other decoders, BERT family
            classifiers.
        config: the adapter's configuration, not copied; `task_type` is inferred from the model if it is None.
        adapter_name: the adapter's name.
        tokenizer: for `prompt_tuning_init="TEXT"`; None loads the one that the configuration names.
        fast_4bit: replace bitsandbytes' 4-bit layers by this project's in place
            (`ept.model.linear4bit.swap_linear4bit`); False leaves them alone.
        dequantized_cache_bytes: memory budget for keeping dequantised weights of 4-bit layers.
        fast_frozen: replace norms, rotary embeddings and activations of known families by fused ones in place
            (`ept.model.frozen.swap_frozen`); False leaves them alone.

    Raises:
        ValueError: the model or the configuration cannot be used; the message says why.
    """
    options: dict[str, Any] = {"fast_4bit": fast_4bit, "dequantized_cache_bytes": dequantized_cache_bytes}
    return EPTModel(model, config, adapter_name, tokenizer=tokenizer, fast_frozen=fast_frozen, **options)


class EPTModel(ModelWithAdapters):
    """A frozen base model with one or more EPT adapters, one of them active.

    It works like any `peft.PeftModel`: `Trainer` saves only the adapter, and `add_adapter`, `load_adapter`,
    `set_adapter`, `delete_adapter`, `disable_adapter()`, `get_nb_trainable_parameters` and `modules_to_save` are there.
    The base model is called with ordinary `inputs_embeds`, mask and positions. All that changes in it is the class of
    the modules that `fast_4bit` and `fast_frozen` replace in place by equivalent ones. Adapters may be added, loaded,
    deleted, set and folded from any thread: a change waits for running calls, and new calls wait for the change.
    """

    _checked_labels = _warned_of_scoring = False
    _shared_from: int | None = None  # positions that a call must save for the prompt to be read separately; None: never
    _packs_texts = False  # with a shared prompt: several texts may share a row

    def __init__(
        self,
        model: nn.Module,
        peft_config: EPTConfig,
        adapter_name: str = "default",
        *,
        initialise: bool = True,
        tokenizer: Any = None,
        fast_4bit: bool = True,
        dequantized_cache_bytes: int = 0,
        fast_frozen: bool = True,
        **kwargs: Any,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise ValueError(
                f"model is {model!r:.80}, not a model: load it first, as with AutoModelForCausalLM.from_pretrained"
            )
        if isinstance(model, PeftModel):
            remedy = "use its add_adapter" if isinstance(model, EPTModel) else "pass its merge_and_unload()"
            raise ValueError(f"the model already carries an adapter: pass the base model, or {remedy}")
        check_adapter(adapter_name, peft_config)
        check_heads_are_ours(model)
        self.adapter_lock = AdapterLock()
        self._prompt_caches = {}
        with undone_if_raised(model, peft_config):
            peft_config.task_type = peft_config.task_type or infer_task_type(model)
            self._facts = examine(model, str(peft_config.task_type))
            freeze(model)
            swap_4bit(model, fast_4bit, dequantized_cache_bytes)
            if fast_frozen:
                swap_frozen(model)
            self._layer_options = {"initialise": initialise, "tokenizer": tokenizer}
            super().__init__(model, peft_config, adapter_name, **kwargs)
            self._layer_options = {}  # they are for the first adapter only
            if peft_config.inference_mode:
                self._require_gradients(adapter_name, False)
            self.train(self.training)

    @shared
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        text_mask: Tensor | None = None,
        logits_to_keep: Tensor | int = 0,
        num_items_in_batch: Tensor | int | None = None,
        adapter_names: Sequence[str] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Runs the base model on the prompt and the updated text.

        Args:
            input_ids: `[batch, n]`, or `inputs_embeds` `[batch, n, d]`.
            attention_mask: `[batch, n]`, nonzero at real tokens; None: all are real, and the base model gets no mask
                either, so that it need not synchronise with an accelerator to find that nothing is masked. A decoder's
                classifier then uses the last token that is not the padding token, as without an adapter.
            labels: as for the base model, without the prompt: `[batch, n]` for CAUSAL_LM (−100: no label),
                `[batch, m]` for SEQ_2_SEQ_LM, `[batch]` for SEQ_CLS, `[batch, n]` for TOKEN_CLS. QUESTION_ANS takes
                `start_positions` and `end_positions` `[batch]`, columns of the input.
            text_mask: CAUSAL_LM: `[batch, n]`, nonzero at input-text tokens, which get the embedding update; by
                default the tokens before a label, or all real tokens if there are no labels. A row with several
                labelled answers (several turns) is read once per answer.
            logits_to_keep: CAUSAL_LM: compute logits, and the loss of their predictions, at this many of the last
                positions only; 0: at prompt and text. A tensor: at these positions of the text, without labels.
            num_items_in_batch: divide the loss by this number of labels, counted over all accumulated batches
                (`Trainer` passes it); None: the mean over this batch.
            adapter_names: one adapter per row (`"__base__"` for none) instead of the active one.
            kwargs: passed on to the base model. `position_ids` `[batch, n]` that restart within a row of a CAUSAL_LM
                mark several texts: each is read behind its own prompt.

        Returns:
            The base model's output; for CAUSAL_LM with `s` prompt tokens before each row, for other tasks with the
            columns of the input.

        Raises:
            ValueError: shapes do not fit, a text is too long, or arguments exclude each other.
        """
        if self._adapters_disabled:
            given = {"attention_mask": attention_mask, "inputs_embeds": inputs_embeds, "labels": labels, **kwargs}
            given |= {"num_items_in_batch": num_items_in_batch, "logits_to_keep": logits_to_keep}
            if not isinstance(logits_to_keep, Tensor) and logits_to_keep == 0:
                del given["logits_to_keep"]  # not every model takes it
            return self.base_model(input_ids, **{k: v for k, v in given.items() if v is not None})
        check_mask(attention_mask)
        if labels is None and num_items_in_batch is not None and not torch.compiler.is_compiling():
            refuse_label_smoothing()
        self._facts = with_forward_of(self._facts, self.base_model)
        causal = self.active_peft_config.task_type == "CAUSAL_LM"
        if causal and labels is not None:
            if isinstance(logits_to_keep, Tensor):
                raise ValueError(
                    "logits_to_keep as a tensor ignores where the labels are: leave logits_to_keep or labels out"
                )
            if not self._facts.shifts_labels:
                raise ValueError(
                    f"{type(self.base_model).__name__} compares each label with the prediction at its own position, "
                    "not at the one before it, and would learn to repeat the text: leave labels out, and compute "
                    "the loss from the logits and the next tokens' labels"
                )
            tokens = input_ids if inputs_embeds is None else inputs_embeds
            if tokens is not None and labels.shape != tokens.shape[:2]:
                shapes = f"{list(tokens.shape[:2])}, got {list(labels.shape)}"
                raise ValueError(f"labels must have the shape of the input, without the prompt, {shapes}")
        follows_cache = bool(cached_length(self._facts, kwargs))
        if causal and not follows_cache:
            given = {"input_ids": input_ids, "inputs_embeds": inputs_embeds, "labels": labels, "text_mask": text_mask}
            given |= {"attention_mask": attention_mask, "adapter_names": adapter_names, **kwargs}
            updates_text = self._updates_text_alone(adapter_names)
            texts = SeparateTexts.find(given, split_answers=updates_text)
            if texts is not None:
                return self._forward_separately(texts, given, logits_to_keep, num_items_in_batch)
            if text_mask is None and updates_text:
                self._warn_of_scope(labels, attention_mask, logits_to_keep)
            if labels is not None:
                labels = targets(labels, attention_mask)
                text_mask = text_before_answer(labels) if text_mask is None else text_mask
                labels = predicted(labels, cast(int, logits_to_keep))
        is_shared = self.shares_prompt and not follows_cache and adapter_names is None
        if is_shared:
            tokens = input_ids if inputs_embeds is None else inputs_embeds
            is_shared = (
                tokens is not None
                and tokens.shape[1] > 0
                and is_shareable(self, attention_mask, logits_to_keep, kwargs)
                and self.shares_prompt_of(*tokens.shape[:2])
            )
        if adapter_names is not None and torch.is_grad_enabled():
            check_recomputed(self.base_model)
        with heads_of_rows(adapter_names):
            inputs = call_inputs(
                self, input_ids, attention_mask, inputs_embeds, text_mask, adapter_names, kwargs, prompt_cache=is_shared
            )
        if labels is not None and self.active_peft_config.task_type in ("CAUSAL_LM", "TOKEN_CLS"):
            labels = moved(extend(labels, inputs.s, -100), inputs.order)
        if isinstance(logits_to_keep, Tensor):  # the text follows the prompt
            logits_to_keep = torch.where(logits_to_keep < 0, logits_to_keep, logits_to_keep + inputs.s)
        if is_shared:
            labels, logits_to_keep = self._share(inputs, labels, cast(int, logits_to_keep))
        with heads_of_rows(adapter_names):
            return self._call_base(inputs, labels, logits_to_keep, num_items_in_batch)

    def _share(self, inputs: BaseInputs, labels: Tensor | None, logits_to_keep: int) -> tuple[Tensor | None, int]:
        """Makes `inputs` read the prompt once; returns labels and number of logits for the remaining call."""
        rows, n = len(inputs["inputs_embeds"]), inputs["inputs_embeds"].shape[1] - inputs.s
        few = logits_to_keep if 0 < logits_to_keep <= n else 0
        if (packing := self._packing_of(rows, n)) is not None:
            packing.pack(self._facts, inputs, few)
            return None if labels is None else packing.labels(labels, few), 0 if few else logits_to_keep
        read_prompt_once(self.base_model, self._facts, inputs, with_logits=not few)
        return None if labels is None else labels[:, inputs.s :], logits_to_keep

    def _forward_separately(
        self, texts: SeparateTexts, given: dict[str, Any], logits_to_keep: Tensor | int, num_items: Tensor | int | None
    ) -> Any:
        """Runs `forward` on a batch separated into `texts`; returns the output in the form of the batch as `given`."""
        if given.get("output_attentions"):
            raise ValueError("rows with several texts or answers are read one by one: leave out output_attentions")
        options = {"num_items_in_batch": num_items, "return_dict": True, "use_cache": False}
        taken = texts.take_arguments(given)
        if (labels := given["labels"]) is not None and logits_to_keep:
            if taken["text_mask"] is None:  # from all labels, before some are removed
                taken["text_mask"] = text_before_answer(targets(taken["labels"], taken["attention_mask"]))
            lost = labels != predicted(labels, cast(int, logits_to_keep))
            taken["labels"] = taken["labels"].masked_fill(texts.take(lost), -100)
        output = self.forward(**{**taken, **options})
        names = [self.active_adapter] if given["adapter_names"] is None else given["adapter_names"]
        s = max(self.peft_config[name].num_virtual_tokens if name != BASE else 0 for name in names)
        output = shortened(texts.put_together(output, s), logits_to_keep)
        return output.to_tuple() if given.get("return_dict") is False else output

    def _call_base(
        self,
        inputs: BaseInputs,
        labels: Tensor | None,
        logits_to_keep: Tensor | int,
        num_items: Tensor | int | None,
    ) -> Any:
        """Calls the base model, with the loss divided by `num_items` and as many logits as requested."""
        causal, arguments = self.active_peft_config.task_type == "CAUSAL_LM", self._facts.forward_arguments
        asks_for_few = isinstance(logits_to_keep, Tensor) or bool(logits_to_keep)
        asks_for_few = asks_for_few and inputs.prompt_logits is None and inputs.packing is None
        if asks_for_few and "logits_to_keep" in arguments and inputs.order is None:
            inputs["logits_to_keep"] = contiguously(logits_to_keep, inputs.get("inputs_embeds"))
            labels = labels[:, -logits_to_keep:] if causal and labels is not None else labels
            logits_to_keep = 0
        if labels is not None:
            inputs["labels"] = labels.contiguous()
            if self.training and "use_cache" in arguments:
                inputs.setdefault("use_cache", False)
        config = self.base_model.config
        as_tuple = not inputs.get("return_dict", getattr(config, "return_dict", True))
        if as_tuple:
            inputs["return_dict"] = True
        span = [inputs.pop(name, None) for name in ("start_positions", "end_positions")]
        output = of_tokens(self.base_model(**inputs), self.base_model, self._facts, inputs.order, inputs.s)
        if (packing := inputs.packing) is not None and output.get("logits") is not None:
            output["logits"] = packing.unpacked(output["logits"])
        if (first := inputs.prompt_logits) is not None and output.get("logits") is not None:
            output["logits"] = torch.cat([first.expand(len(output["logits"]), -1, -1), output["logits"]], dim=1)
        if span[0] is not None and span[1] is not None:
            output = type(output)(**{"loss": span_loss(output, *span), **output})  # which comes first in a tuple
        if num_items is not None and labels is not None:
            weight = getattr(config.get_text_config(), "router_aux_loss_coef", 0.0)
            divide_loss(output, inputs["labels"], num_items, shifted=causal, auxiliary=weight)
        output = shortened(output, logits_to_keep) if causal else output
        return output.to_tuple() if as_tuple else output

    def _updates_text_alone(self, adapter_names: Sequence[str] | None) -> bool:
        """Checks whether in any row of a batch input text gets an update that answers do not get."""
        names = [self.active_adapter] if adapter_names is None else adapter_names
        configs = [self.peft_config[name] for name in names if name in self.peft_config]
        return any(config.r and config.update_scope == "text" for config in configs)

    def _warn_of_scope(
        self, labels: Tensor | None, attention_mask: Tensor | None, logits_to_keep: Tensor | int
    ) -> None:
        """Warns once of a call that cannot tell text from answer, and of labels that leave no text."""
        if torch.compiler.is_compiling():
            return
        if labels is None:
            # Generation starts from the last logits of a text.
            if not self._warned_of_scoring and not (isinstance(logits_to_keep, int) and logits_to_keep == 1):
                self._warned_of_scoring = True
                warnings.warn(
                    "neither labels nor text_mask say which tokens are input text, so all of them get the update, "
                    "while generated tokens get none: pass text_mask, nonzero at input text (through the Trainer "
                    'with remove_unused_columns=False), or labels, or train with update_scope="all"; this is shown '
                    "once",
                    stacklevel=6,  # the caller of the module
                )
        elif self.training and not self._checked_labels:
            self._checked_labels = True  # only at the first training batch, because it waits for an accelerator
            is_text = labels == -100
            if not bool((is_text if attention_mask is None else is_text & attention_mask.bool()).any()):
                warnings.warn(
                    "every token is a label, and labels get no low-rank update, so A and B learn nothing: mask the "
                    "input text with -100 in labels, mark it with text_mask (which the Trainer passes on only with "
                    'remove_unused_columns=False), or set r=0 or update_scope="all"',
                    stacklevel=6,  # the caller of the module
                )

    @shared
    @torch.no_grad()
    def generate(self, input_ids: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """Calls the base model's `generate` after the prompt; takes its arguments. `labels` are ignored.

        Decoder-only models return the input's ids followed by the new tokens, as without an adapter. Lengths,
        penalties and streamers see the text and not the prompt. Without a mask, padding is recognised by the padding
        token wherever the base model does so. It may be on either side.

        With `use_prompt_cache=True` the prompt's keys and values are computed at the first call, cached per adapter,
        and recomputed when adapter or model change. The tokens are the same. `clear_prompt_caches()` frees the memory.

        Raises:
            ValueError: the base model cannot generate, an option cannot work behind a prompt, `max_length` leaves no
                room for a new token, more tokens are requested than the model has positions, or a prompt cache cannot
                work for this model and batch; the message says why. It is raised before anything runs.
        """
        base = self.base_model
        if not hasattr(base, "generate"):
            raise ValueError(f"{type(base).__name__} cannot generate")
        use_prompt_cache = kwargs.pop("use_prompt_cache", False)
        ids = kwargs.pop("inputs", None) if input_ids is None else input_ids
        names = ("attention_mask", "inputs_embeds", "text_mask", "adapter_names")
        kwargs.pop("labels", None)
        if self._adapters_disabled:
            return base.generate(ids, *args, **{k: v for k, v in kwargs.items() if k not in names[2:]})
        self._facts = with_forward_of(self._facts, base)
        causal = self.active_peft_config.task_type == "CAUSAL_LM"
        mask, embeds, text_mask, adapter_names = (kwargs.pop(name, None) for name in names)
        if "generation_config" in self.__dict__:  # set on the wrapper by a user
            kwargs.setdefault("generation_config", self.__dict__["generation_config"])
        options = GenerationOptions(base, args, kwargs)
        check_options(base, options, self._facts)
        if causal and ids is None and embeds is None:
            ids = start_of_text(options, base.device)
        if causal and ids is not None and mask is None:
            mask = infer_mask(ids, options)
        given, order = ids, None
        text = embeds if ids is None else ids
        if (
            causal and isinstance(mask, Tensor) and mask.shape == text.shape[:2]
        ):  # a row continues after its last column
            order, shape = arrangement(mask, 0, FRONT), mask.shape
            for name in ("position_ids", *OF_TOKENS):
                if getattr(options.given.get(name), "shape", ())[:2] == shape:
                    options.given[name] = moved(options.given[name], order)
            ids, embeds, mask = (x if x is None else moved(x, order) for x in (ids, embeds, mask))
            text_mask = moved(text_mask, order) if getattr(text_mask, "shape", ()) == shape else text_mask
        if use_prompt_cache:
            if adapter_names is not None:
                raise ValueError(
                    "a prompt cache holds one adapter's prompt: leave out adapter_names or use_prompt_cache"
                )
            padded = mask is not None and not bool(mask[:, 0].all())
            check_cacheable(base, self._facts, options, padded)
        # A cached prompt stays first, followed by padding.
        with heads_of_rows(adapter_names):
            inputs = call_inputs(
                self, ids, mask, embeds, text_mask, adapter_names, options.given, True, prompt_cache=use_prompt_cache
            )
        encoder_processors(inputs, options, ids)
        if causal:
            n = length_of(ids, embeds)
            s = inputs["inputs_embeds"].shape[1] - n
            if use_prompt_cache:
                offset = self._facts.position_offset or 0
                caches, embeds = self._prompt_caches, inputs["inputs_embeds"]
                made = cached_prompt(caches, self.active_adapter, base, embeds, s, offset, options)
                inputs[cache_name(self._facts)] = made
            choose_positions(inputs, self._facts, base, mask)
            longest = n if mask is None else int(mask.bool().sum(1).max())
            bound_length(inputs, options, n, s, longest, self._facts, base)
            if ids is not None:
                inputs["input_ids"] = ids
        updating = self._updating_new_tokens(causal, adapter_names, inputs)
        with without_checkpointing(base), heads_of_rows(adapter_names), updating:
            output = base.generate(**inputs)
        if order is not None and given is not None:
            sequences = output if isinstance(output, Tensor) else output.sequences
            sequences[:, : given.shape[1]] = given.repeat_interleave(len(sequences) // len(given), 0)
        return output

    def generate_batch(self, *args: Any, **kwargs: Any) -> Any:
        """Refuses continuous batching, which would answer without the adapter: it reads only ids, without a prompt.

        Within `disable_adapter()` use the `base_model`.
        """
        raise ValueError("continuous batching reads only ids, without a prompt: call generate with a padded batch")

    continuous_batching_context_manager = init_continuous_batching = generate_batch

    def __getattr__(self, name: str) -> Any:
        """Names alternatives to PEFT's merging functions, which EPT, like PEFT's prompt tuning, does not have."""
        if name in ("merge_and_unload", "unload", "merge_adapter", "unmerge_adapter", "add_weighted_adapter"):
            raise AttributeError(
                "a prompt and an update of the input cannot be merged into weights: call fold(), or write a model "
                "with them in its vocabulary with `ept export --as-tokens`; base_model is the model without them"
            )
        return super().__getattr__(name)

    def _updating_new_tokens(
        self, causal: bool, adapter_names: Sequence[str] | None, inputs: BaseInputs
    ) -> AbstractContextManager[None]:
        """Applies the update to tokens that a decoder's `generate` embeds itself, if the scope covers them."""
        names = [self.active_adapter] if adapter_names is None else list(adapter_names)
        configs = [self.peft_config[name] for name in names if name in self.peft_config]
        if not causal or not any(config.r and config.update_scope == "all" for config in configs):
            return nullcontext()
        layers: Any = dict(self.prompt_encoder.items())

        def embed(ids: Tensor, positions: Tensor) -> Tensor:
            table_ids, table, _ = lookup(self._embedding(), ids, None, None, self._layer().d)
            rows = [name for name in names for _ in range(len(ids) // len(names))]  # beams, or several samples
            return embed_following(layers, rows, table_ids, table, positions)

        mask = inputs.get("attention_mask", inputs["inputs_embeds"].new_ones(inputs["inputs_embeds"].shape[:2]))
        return embedding_new_tokens(self.base_model, embed, mask.bool().sum(1))

    def compile_layers(self, **options: Any) -> EPTModel:
        """Compiles the frozen model's layers in place with `ept.model.compilation.compile_layers`; returns the model.

        Each row is then read after its own prompt again: a compiled layer takes no cache.
        """
        compile_layers(self.base_model, **options)
        self._shared_from = None
        return self

    @property
    def shares_prompt(self) -> bool:
        """Checks whether a decoder's prompt is read once for all rows of a batch."""
        return self._shared_from is not None

    def shares_prompt_of(self, rows: int, length: int) -> bool:
        """Checks whether a call on texts `[rows, length]` would read the prompt once for several of them, or for all,
        unless its arguments forbid it.
        """
        saved = (rows - 1) * self.active_peft_config.num_virtual_tokens
        enough = self._shared_from is not None and saved >= max(self._shared_from, 1)
        return enough or self._packing_of(rows, length) is not None

    def _packing_of(self, rows: int, length: int) -> Packing | None:
        if self._shared_from is None or not self._packs_texts or not reads_masks(self.base_model):
            return None
        s, limit = self.active_peft_config.num_virtual_tokens, self._facts.position_limit
        return packing_of(rows, s, length, self._layer().d, second_call(), LONGEST if limit is None else limit)

    def share_prompt(self, least: int = 1) -> EPTModel:
        """Lets a decoder read the prompt once for all rows of a batch, in training too; returns the model.

        No token of a prompt sees the text after it, so its keys and values are the same for every row: a step of b
        rows saves up to (b - 1)·s positions. Loss, logits and gradients stay the same up to rounding. Calls that
        request a cache, attentions or hidden states, or pass arguments whose entries for the prompt are unknown, are
        not shared. `logits_to_keep`, as a number of last positions, saves the most: it omits the prompt's logits.

        If the model accepts a mask for each pair of positions, several short texts share a row after one prompt.
        Others are read after the prompt's keys and values, which a separate call computes.

        Args:
            least: the minimum number of positions that a separate call for the prompt must save; below it each row has
                its own prompt. On a CPU that call costs about as much as 64 positions per thread.

        Raises:
            ValueError: the model would read texts differently after a shared prompt; the message says why.
        """
        base = self.base_model
        check_shareable(base, self._facts)
        if not can_share_prompt(base, self._facts):
            name = type(base).__name__
            raise ValueError(f"{name} reads texts differently after a prompt that they share: leave share_prompt out")
        self._shared_from, self._packs_texts = least, can_pack_texts(base, self._facts)
        return self

    def clear_prompt_caches(self) -> None:
        """Frees what `generate(..., use_prompt_cache=True)` keeps."""
        self._prompt_caches.clear()
