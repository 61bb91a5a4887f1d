"""EPTModel: a frozen Hugging Face model with EPT adapters, behaving as PEFT's users expect."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils.other import _set_adapter
from torch import Tensor, nn

from ..config import PEFT_TYPE, EPTConfig
from ..prompt import EPTLayer
from .adapter_files import read_adapter, read_weights, write_adapter
from .adapter_lock import AdapterLock, exclusive, shared
from .base_model import (
    examine,
    freeze,
    infer_task_type,
    input_embedding,
    set_mode,
    swap_4bit,
    trained_heads,
    wrapped_heads,
)
from .compilation import compile_layers
from .inputs import cache_name, call_inputs, count_new_tokens, divide_loss, extend, length_of
from .mixed import follow_rows, heads_of_rows
from .prompt_cache import PromptCache, cached_prompt, check_cacheable

# PEFT finds the code that names an adapter's state by the adapter's type.
PEFT_TYPE_TO_TUNER_MAPPING[PEFT_TYPE] = EPTLayer


def get_ept_model(
    model: nn.Module,
    config: EPTConfig,
    adapter_name: str = "default",
    *,
    tokenizer: Any = None,
    fast_4bit: bool = True,
    dequantized_cache_bytes: int = 0,
) -> EPTModel:
    """Wraps a Hugging Face model with a fresh EPT adapter; the model is frozen in place.

    Args:
        model: any model that takes `inputs_embeds`: T5 family, Llama family and other decoders, BERT family
            classifiers.
        config: copied; `task_type` is inferred from the model if it is None.
        adapter_name: the adapter's name.
        tokenizer: for `prompt_tuning_init="TEXT"`; None loads the one that the configuration names.
        fast_4bit: turn bitsandbytes' 4-bit layers into ours in place
            (`ept.model.linear4bit.swap_linear4bit`); False leaves them as they are.
        dequantized_cache_bytes: memory to spend on keeping dequantised weights of 4-bit layers, in bytes.

    Raises:
        ValueError: the model or the configuration cannot work; the message says why.
    """
    options = {"tokenizer": tokenizer, "fast_4bit": fast_4bit, "dequantized_cache_bytes": dequantized_cache_bytes}
    return EPTModel(model, config, adapter_name, **options)


class EPTModel(PeftModel):
    """A frozen base model and one or more EPT adapters, of which one is active.

    Everything a `peft.PeftModel` offers works: `Trainer` saves only the adapter, `add_adapter`, `load_adapter`,
    `set_adapter`, `delete_adapter`, `disable_adapter()`, `get_nb_trainable_parameters`, `modules_to_save`. The base
    model is called with ordinary `inputs_embeds`, mask and positions; nothing in it is patched. Adapters may be added,
    loaded, deleted, set and folded from other threads than those that call the model: such a change waits for the
    calls that are running, and new calls wait for it.
    """

    base_model: Any
    prompt_encoder: nn.ModuleDict
    _adapters_disabled = False
    _checked_labels = False

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
        **kwargs: Any,
    ) -> None:
        if isinstance(model, PeftModel):
            raise ValueError("the model already carries an adapter: pass the base model, or use add_adapter")
        self.adapter_lock = AdapterLock()
        self._prompt_caches: dict[str, PromptCache] = {}
        peft_config = copy.deepcopy(peft_config)
        peft_config.task_type = peft_config.task_type or infer_task_type(model)
        self._facts = examine(model, str(peft_config.task_type))
        freeze(model)
        swap_4bit(model, fast_4bit, dequantized_cache_bytes)
        self._layer_options = {"initialise": initialise, "tokenizer": tokenizer}
        super().__init__(model, peft_config, adapter_name, **kwargs)
        self._layer_options = {}  # theirs are the first adapter's
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
        logits_to_keep: int | None = None,
        num_items_in_batch: Tensor | int | None = None,
        adapter_names: Sequence[str] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Runs the base model on the prompt and the updated text.

        Args:
            input_ids: `[batch, n]`, or `inputs_embeds` `[batch, n, d]`.
            attention_mask: `[batch, n]`, nonzero at real tokens.
            labels: as for the base model, without the prompt: `[batch, n]` for CAUSAL_LM (−100 where there is none),
                `[batch, m]` for SEQ_2_SEQ_LM, `[batch]` for SEQ_CLS.
            text_mask: CAUSAL_LM: `[batch, n]`, nonzero at input-text tokens, which get the low-rank update; by
                default all real tokens without a label.
            logits_to_keep: CAUSAL_LM: compute logits (and the loss) for the last so many positions only; 0: for prompt
                and text. None: while training, with labels on the CPU, what the labels need, otherwise 0.
            num_items_in_batch: number of labels the loss is to be divided by, over all accumulated batches
                (`Trainer` passes it); None: the mean over this batch.
            adapter_names: one adapter a row (`"__base__"` for none) instead of the active one.
            kwargs: passed on to the base model.

        Returns:
            The base model's output.
        """
        if self._adapters_disabled:
            given = {"attention_mask": attention_mask, "inputs_embeds": inputs_embeds, "labels": labels, **kwargs}
            given |= {"logits_to_keep": logits_to_keep, "num_items_in_batch": num_items_in_batch}
            return self.base_model(input_ids, **{k: v for k, v in given.items() if v is not None})
        causal = self.active_peft_config.task_type == "CAUSAL_LM"
        if causal and text_mask is None and labels is not None:
            text_mask = labels == -100
            if self.training and not self._checked_labels and self.active_peft_config.r:
                self._checked_labels = True  # once, at the first training batch: an accelerator is waited for
                if not bool((text_mask if attention_mask is None else text_mask & attention_mask.bool()).any()):
                    warnings.warn(
                        "every token is a label, and labels get no low-rank update, so that A and B learn nothing: "
                        "mask the input text with -100 in labels, say which tokens are input text by text_mask, or "
                        "set r=0",
                        stacklevel=2,
                    )
        inputs = call_inputs(self, input_ids, attention_mask, inputs_embeds, text_mask, adapter_names, kwargs)
        if causal and labels is not None:
            s = inputs["attention_mask"].shape[1] - length_of(input_ids, inputs_embeds)
            labels = extend(labels, s, -100)
            if logits_to_keep is None and self.training and labels.device.type == "cpu":
                columns = (labels != -100).any(0).nonzero()
                if len(columns):  # the logits that the loss reads are those at the labels and one before
                    logits_to_keep = min(labels.shape[1] - int(columns[0]) + 1, labels.shape[1])
        if logits_to_keep and "logits_to_keep" in self._facts.forward_arguments:
            inputs["logits_to_keep"] = logits_to_keep
            if causal and labels is not None:
                labels = labels[:, -logits_to_keep:]
        if labels is not None:
            inputs["labels"] = labels.contiguous()
            if self.training and "use_cache" in self._facts.forward_arguments:
                inputs.setdefault("use_cache", False)
        with heads_of_rows(adapter_names):
            output = self.base_model(**inputs)
        if num_items_in_batch is not None and labels is not None:
            divide_loss(output, inputs["labels"], num_items_in_batch, shifted=causal)
        return output

    @shared
    @torch.no_grad()
    def generate(self, input_ids: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """Calls the base model's `generate` after the prompt; takes its arguments. `labels` are ignored.

        Decoder-only models return the input's ids followed by the new tokens, as without an adapter; `max_length`
        counts these and not the prompt. Logits processors that look at the text (`repetition_penalty`) see the new
        tokens only.

        With `use_prompt_cache=True` the model does not read the prompt again at every call: its keys and values are
        computed at the first, kept for each adapter, and made anew once adapter or model change. The tokens are the
        same. `clear_prompt_caches()` frees them.

        Raises:
            ValueError: the base model cannot generate, `max_length` leaves no room for a new token, or a prompt cache
                cannot work for this model and batch; the message says why.
        """
        if not hasattr(self.base_model, "generate"):
            raise ValueError(f"{type(self.base_model).__name__} cannot generate")
        use_prompt_cache = kwargs.pop("use_prompt_cache", False)
        if self._adapters_disabled:
            return self.base_model.generate(input_ids, *args, **kwargs)
        kwargs.pop("labels", None)
        ids = kwargs.pop("inputs", None) if input_ids is None else input_ids
        names = ("attention_mask", "inputs_embeds", "text_mask", "adapter_names")
        mask, embeds, text_mask, adapter_names = (kwargs.pop(name, None) for name in names)
        if "generation_config" in self.__dict__:  # set on the wrapper by a user
            kwargs.setdefault("generation_config", self.__dict__["generation_config"])
        if use_prompt_cache:
            if adapter_names is not None:
                raise ValueError(
                    "a prompt cache holds one adapter's prompt: leave out adapter_names or use_prompt_cache"
                )
            padded = mask is not None and not bool(mask[:, 0].all())
            check_cacheable(self.base_model, self._facts, kwargs, padded)
        # A cached prompt stays first, with padding behind it.
        inputs = call_inputs(self, ids, mask, embeds, text_mask, adapter_names, kwargs, generating=not use_prompt_cache)
        if self.active_peft_config.task_type != "CAUSAL_LM":
            return self.base_model.generate(*args, **inputs)
        if use_prompt_cache:
            s, name = self._layer().config.num_virtual_tokens, self.active_adapter
            inputs[cache_name(self._facts)] = cached_prompt(self._prompt_caches, name, self.base_model, inputs, s)
        # generate() counts positions from the mask itself, at every step.
        inputs.pop("position_ids", None)
        count_new_tokens(inputs, length_of(ids, embeds), self.base_model.generation_config)
        output = self.base_model.generate(*args, **inputs)
        if ids is None:
            return output
        generated = output if isinstance(output, Tensor) else output.sequences
        continued = ids.to(generated.device).repeat_interleave(len(generated) // len(ids), dim=0)
        sequences = torch.cat([continued, generated], dim=1)
        if isinstance(output, Tensor):
            return sequences
        output.sequences = sequences
        return output

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Lets the bare base model answer, with its own heads, as long as the context lasts."""
        wrappers = list(wrapped_heads(self.base_model))
        required = [(p, p.requires_grad) for wrapper in wrappers for p in wrapper.parameters()]
        was_disabled, self._adapters_disabled = self._adapters_disabled, True
        try:
            for wrapper in wrappers:
                wrapper.enable_adapters(False)
            yield
        finally:
            self._adapters_disabled = was_disabled
            for wrapper in wrappers:
                wrapper.enable_adapters(not was_disabled)
            for parameter, requires_grad in required:  # which switching adapters on and off changes
                parameter.requires_grad_(requires_grad)

    def get_prompt(self, batch_size: int = 1, *args: Any, **kwargs: Any) -> Tensor:
        """Returns the active adapter's joint prompt, once a row: `[batch, s, d]` float32."""
        return self._layer().joint_prompt().expand(batch_size, -1, -1)

    def get_prompt_embedding_to_save(self, adapter_name: str) -> Tensor:
        """Returns the joint prompt of `adapter_name`, `[s, d]` float32 on the CPU."""
        with torch.no_grad():
            return self._layer(adapter_name).joint_prompt().cpu()

    def train(self, mode: bool = True) -> EPTModel:
        """Puts adapters and heads in training mode; the frozen model stays in `eval` mode without `base_dropout`."""
        super().train(mode)
        config = self.peft_config.get(self.active_adapter)
        set_mode(self.base_model, mode, dropout=bool(config and config.base_dropout))
        for wrapper in wrapped_heads(self.base_model):
            wrapper.train(mode)
        return self

    def compile_layers(self, **options: Any) -> EPTModel:
        """Compiles the frozen model's layers in place, as `ept.model.compilation.compile_layers`; returns the model."""
        compile_layers(self.base_model, **options)
        return self

    @exclusive
    def fold(self, adapter_name: str | None = None) -> EPTModel:
        """Turns an adapter (the active one) into its inference form, one prompt and one table, in place.

        Outputs stay the same up to rounding. A folded adapter can be saved and loaded, and not trained. Returns the
        model.
        """
        name = adapter_name or self.active_adapter
        self._layer(name).fold()
        self.peft_config[name].folded = True
        return self

    @exclusive
    def add_adapter(self, adapter_name: str, peft_config: EPTConfig, **kwargs: Any) -> None:
        """Adds a fresh adapter. The active one stays active; a further one starts frozen until it is set active.

        Raises:
            ValueError: the name is taken, or the configuration does not fit the model.
        """
        if not isinstance(peft_config, EPTConfig):
            raise ValueError(f"an EPT model takes EPTConfig adapters, got {type(peft_config).__name__}")
        peft_config = copy.deepcopy(peft_config)
        base, first = self.base_model, not self.peft_config
        task_type = peft_config.task_type or infer_task_type(base)
        if not first and task_type != self.active_peft_config.task_type:
            raise ValueError(
                f"adapter {adapter_name!r} is for {task_type}, the model for {self.active_peft_config.task_type}"
            )
        peft_config.task_type = task_type
        if self._layer_options.get("initialise", True) or peft_config.base_model_name_or_path is None:
            peft_config.base_model_name_or_path = getattr(base, "name_or_path", None) or None
        if task_type == "SEQ_CLS" and peft_config.modules_to_save is None:
            peft_config.modules_to_save = trained_heads(base)
        trainable = not first and any(p.requires_grad for p in self._layer().parameters())
        super().add_adapter(adapter_name, peft_config, **kwargs)
        follow_rows(base)
        if not first:
            self._require_gradients(adapter_name, False)
            _set_adapter(base, self.active_adapter, inference_mode=not trainable)

    @exclusive
    def set_adapter(self, adapter_name: str, inference_mode: bool = False) -> None:
        """Makes `adapter_name` the active adapter, trainable unless `inference_mode`; all others are frozen.

        Raises:
            ValueError: there is no such adapter.
        """
        self._layer(adapter_name)
        self.active_adapter = adapter_name
        _set_adapter(self.base_model, adapter_name, inference_mode=inference_mode)
        for name in self.prompt_encoder:
            self._require_gradients(name, name == adapter_name and not inference_mode, heads=False)

    @exclusive
    def delete_adapter(self, adapter_name: str) -> None:
        """Deletes an adapter; if it was active, the first of the remaining ones becomes active.

        Raises:
            ValueError: there is no such adapter, or no other one would be left.
        """
        self._layer(adapter_name)
        if len(self.peft_config) == 1:
            raise ValueError(f"{adapter_name!r} is the only adapter: use disable_adapter() or the base model itself")
        for kept in (self.peft_config, self.prompt_encoder, self.prompt_tokens):
            del kept[adapter_name]
        if adapter_name == self.active_adapter:
            self.active_adapter = next(iter(self.peft_config))
            warnings.warn(f"{adapter_name!r} was active; {self.active_adapter!r} is now", stacklevel=4)
        for wrapper in wrapped_heads(self.base_model):
            # PEFT's own delete_adapter hands all that remain to each head, which takes no more than one.
            wrapper.delete_adapter(adapter_name, [self.active_adapter])
        self._prompt_caches.pop(adapter_name, None)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Turns gradients of the named adapters on or off."""
        for name in [adapter_names] if isinstance(adapter_names, str) else adapter_names:
            self._require_gradients(name, requires_grad)

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        safe_serialization: bool = True,
        selected_adapters: list[str] | None = None,
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        **kwargs: Any,
    ) -> None:
        """Writes `adapter_config.json`, `adapter_model.safetensors` and `README.md`; adapters not named
        `default` go to sub-folders of their name. Each file appears whole or not at all.

        Raises:
            ValueError: pickles were asked for, an adapter does not exist, or `save_directory` is a file.
        """
        if not safe_serialization:
            raise ValueError("adapters are saved as safetensors only: leave safe_serialization=True")
        if os.path.isfile(save_directory):
            raise ValueError(f"{save_directory} is a file; give a folder to save into")
        names = list(self.peft_config) if selected_adapters is None else selected_adapters
        for name in names:
            self._layer(name)
            state = get_peft_model_state_dict(self, state_dict, name, save_embedding_layers=False)
            if is_main_process:
                folder = save_directory if name == "default" else os.path.join(save_directory, name)
                write_adapter(folder, self.peft_config[name], state)

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        model_id: str | os.PathLike[str],
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: EPTConfig | None = None,
        *,
        fast_4bit: bool = True,
        dequantized_cache_bytes: int = 0,
        **kwargs: Any,
    ) -> EPTModel:
        """Wraps the base model with the adapter saved in `model_id`, a local folder or a repository on the hub.

        Args:
            model: the base model the adapter was made for; it is frozen in place.
            is_trainable: whether the adapter is to be trained further.
            config: instead of the saved configuration.
            fast_4bit, dequantized_cache_bytes: as for `get_ept_model`.
            kwargs: `subfolder`, `revision`, `cache_dir`, `token`, `local_files_only` for the hub.

        Raises:
            FileNotFoundError, ValueError: the files are missing, damaged, or made for another base model.
        """
        config, state = read_adapter(model_id, model, is_trainable, config, **kwargs)
        options: dict[str, Any] = {"fast_4bit": fast_4bit, "dequantized_cache_bytes": dequantized_cache_bytes}
        wrapped = cls(model, config, adapter_name, initialise=False, **options)
        set_peft_model_state_dict(wrapped, state, adapter_name)
        return wrapped if is_trainable else wrapped.eval()

    @exclusive
    def load_adapter(
        self, model_id: str | os.PathLike[str], adapter_name: str, is_trainable: bool = False, **kwargs: Any
    ) -> Any:
        """Loads a saved adapter under a new name, or its weights into the existing adapter of that name.

        The active adapter stays the same. Nothing changes if the files are refused.

        Raises:
            FileNotFoundError, ValueError: the files are missing, damaged, or made for another base model.
        """
        added = adapter_name not in self.peft_config
        if added:
            config, state = read_adapter(model_id, self.base_model, is_trainable, None, **kwargs)
            self._layer_options = {"initialise": False}
            try:
                self.add_adapter(adapter_name, config)
            finally:
                self._layer_options = {}
            self._require_gradients(adapter_name, is_trainable)
        else:
            expected = get_peft_model_state_dict(self, None, adapter_name, save_embedding_layers=False)
            shapes = {name: tuple(t.shape) for name, t in expected.items() if name != "embedding_scale"}
            state = read_weights(model_id, shapes, **kwargs)
        result = set_peft_model_state_dict(self, state, adapter_name)
        result.missing_keys.clear()  # PEFT lists the base model's weights here, which are not the adapter's
        if not is_trainable and added:
            self.eval()
        return result

    def clear_prompt_caches(self) -> None:
        """Frees what `generate(..., use_prompt_cache=True)` keeps."""
        self._prompt_caches.clear()

    def _layer(self, adapter_name: str | None = None) -> EPTLayer:
        """Returns the layer of an adapter (the active one); a `ValueError` names those that are loaded."""
        name = adapter_name or self.active_adapter
        if name not in self.peft_config:
            raise ValueError(f"no adapter named {name!r}: loaded are {', '.join(self.peft_config)}")
        layer = self.prompt_encoder[name]
        assert isinstance(layer, EPTLayer)
        return layer

    def _setup_prompt_encoder(self, adapter_name: str) -> None:
        """Makes the adapter's parameters; PEFT calls it in `add_adapter`."""
        if "prompt_encoder" not in self._modules:
            self.prompt_encoder = nn.ModuleDict()
            self.prompt_tokens: dict[str, Tensor] = {}
        config = self.peft_config[adapter_name]
        layer = EPTLayer(config, input_embedding(self.base_model), **self._layer_options)
        config.token_dim = layer.d
        self.prompt_encoder[adapter_name] = layer
        self.prompt_tokens[adapter_name] = torch.arange(config.num_virtual_tokens)

    def _prepare_model_for_gradient_checkpointing(self, model: Any) -> Any:
        return model  # the embeddings require a gradient by themselves

    def _require_gradients(self, adapter_name: str, required: bool, heads: bool = True) -> None:
        layer = self._layer(adapter_name)
        layer.requires_grad_(required and not layer.config.folded)
        if heads:
            for wrapper in wrapped_heads(self.base_model):
                if adapter_name in wrapper.modules_to_save:
                    wrapper.modules_to_save[adapter_name].requires_grad_(required)
