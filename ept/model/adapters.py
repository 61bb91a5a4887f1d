"""The adapters of a frozen model: adding, activating, disabling, deleting, saving and loading them."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils.other import _set_adapter
from torch import Tensor, nn

from ..config import OUTPUT_FIELDS, PEFT_TYPE, EPTConfig
from ..embedding import embedding_width, scaled_embedding
from ..prompt import EPTLayer
from ..utils.messages import listed, shown
from .adapter_files import (
    HUB_ARGUMENTS,
    SCALE_NAME,
    check_weights,
    read_adapter,
    read_config,
    read_weights,
    write_adapter,
)
from .adapter_lock import exclusive, transactional
from .base_model import (
    check_heads,
    input_embedding,
    label_names,
    lost_modules,
    name_labels,
    set_mode,
    train_in_float32,
    trained_heads,
    wrapped_heads,
)
from .facts import TASKS_WITH_HEAD, BaseModelFacts
from .mixed import BASE, follow_rows
from .prompt_cache import PromptCache
from .reading import infer_task_type
from .undone import undone_if_raised

if TYPE_CHECKING:
    from typing_extensions import Self

# PEFT finds the code that names an adapter's state by the adapter's type.
PEFT_TYPE_TO_TUNER_MAPPING[PEFT_TYPE] = EPTLayer

_PEFT_SIZES = {
    "num_layers": ("num_hidden_layers", "num_layers", "n_layer"),
    "num_attention_heads": ("num_attention_heads", "n_head", "num_heads", "encoder_attention_heads"),
}


def check_adapter(adapter_name: str, config: Any) -> None:
    """Raises `ValueError` for a name that no adapter can have, and for a configuration of another kind."""
    if not isinstance(config, EPTConfig):
        raise ValueError(f"an EPT model takes EPTConfig adapters, got {type(config).__name__}")
    if not adapter_name or "." in adapter_name or adapter_name == BASE or hasattr(nn.ModuleDict, adapter_name):
        raise ValueError(
            f"an adapter cannot be named {adapter_name!r}: choose a name without a dot that is neither {BASE!r}, "
            "which names rows without an adapter, nor an attribute of a module (keys, type, ...)"
        )


class ModelWithAdapters(PeftModel):
    """A frozen base model with one or more EPT adapters, one of them active; `EPTModel` adds the calls."""

    base_model: Any
    active_adapter: Any  # a name; an empty list if there is none, as in PEFT
    prompt_encoder: nn.ModuleDict
    _adapters_disabled = False
    _facts: BaseModelFacts
    _layer_options: dict[str, Any]
    _prompt_caches: dict[str, PromptCache]
    _own_labels: list[str]

    @property
    def active_peft_config(self) -> EPTConfig:
        """The configuration of the active adapter; raises `ValueError` if there is no adapter."""
        self._layer()
        return self.peft_config[self.active_adapter]

    @property
    def text_limit(self) -> int | None:
        """Maximum number of text tokens for which positions are left after the active prompt; None: no limit."""
        limit = self._facts.position_limit
        return None if limit is None else limit - self.active_peft_config.num_virtual_tokens

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Makes the bare base model answer, with its own heads, within the context."""
        wrappers, active = list(wrapped_heads(self.base_model)), self.active_adapter
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
            for parameter, requires_grad in required:  # enabling and disabling adapters changes it
                parameter.requires_grad_(requires_grad)
            if self.active_adapter != active:  # another one was activated inside the context
                for name, layer in self.prompt_encoder.items():
                    self._require_gradients(name, any(p.requires_grad for p in layer.parameters()))

    def get_prompt(self, batch_size: int = 1, *args: Any, **kwargs: Any) -> Tensor:
        """Returns the active adapter's joint prompt, repeated for every row: `[batch, s, d]` float32."""
        return self._layer().joint_prompt().expand(batch_size, -1, -1)

    def get_prompt_embedding_to_save(self, adapter_name: str) -> Tensor:
        """Returns the joint prompt of `adapter_name`, `[s, d]` float32 on the CPU."""
        with torch.no_grad():
            return self._layer(adapter_name).joint_prompt().cpu()

    def train(self, mode: bool = True) -> Self:
        """Puts adapters and heads in training mode; the frozen model stays in `eval` mode without `base_dropout`."""
        self.training = mode
        for name, child in self.named_children():
            if name != "base_model":
                child.train(mode)
        config = self.active_peft_config if self.peft_config else None
        set_mode(self.base_model, mode, dropout=bool(config and config.base_dropout))
        for wrapper in wrapped_heads(self.base_model):
            wrapper.train(mode)
        return self

    @transactional
    def fold(self, adapter_name: str | None = None) -> Self:
        """Turns an adapter (default: the active one) into its inference form: one prompt and the factors of the update.

        Works in place and returns the model. Outputs stay bit-identical. A folded adapter can be saved and loaded but
        not trained.
        """
        name = adapter_name or self.active_adapter
        self._layer(name).fold()
        folded = copy.copy(self.peft_config[name])  # other models may use the original
        folded.folded = True
        self.peft_config[name] = folded
        return self

    @transactional
    def add_adapter(self, adapter_name: str, peft_config: EPTConfig, **kwargs: Any) -> None:
        """Adds a fresh adapter. The active adapter stays active; the new one is frozen until it is set active.

        Raises:
            ValueError: the name is taken, or the configuration does not fit the model.
        """
        check_adapter(adapter_name, peft_config)
        if adapter_name in self.peft_config:
            raise ValueError(
                f"an adapter named {adapter_name!r} already exists: choose another name, or delete it first"
            )
        base, first = self.base_model, not self.peft_config
        limit, prompt = self._facts.position_limit, peft_config.num_virtual_tokens
        if limit is not None and prompt >= limit:
            raise ValueError(
                f"num_virtual_tokens={prompt} leaves no room for text in the {limit} positions of "
                f"{type(base).__name__}: use fewer"
            )
        task_type = peft_config.task_type or infer_task_type(base)
        if not first and task_type != self.active_peft_config.task_type:
            raise ValueError(
                f"adapter {adapter_name!r} is for {task_type}, but the model's adapters are for "
                f"{self.active_peft_config.task_type}"
            )
        peft_config.task_type = task_type
        if self._layer_options.get("initialise", True) or peft_config.base_model_name_or_path is None:
            peft_config.base_model_name_or_path = getattr(base, "name_or_path", None) or None
        if task_type in TASKS_WITH_HEAD and peft_config.modules_to_save is None:
            peft_config.modules_to_save = trained_heads(base)
        heads = peft_config.modules_to_save
        if heads and not any(part.endswith(tuple(heads)) for part, _ in base.named_modules()):
            raise ValueError(
                f"{type(base).__name__} has no module named {' or '.join(heads)}: change modules_to_save, or use a "
                "new configuration that leaves it None"
            )
        check_heads(base, heads)
        # Few use the pooled output of a model without a head, and many checkpoints have no weights for it.
        if task_type != "FEATURE_EXTRACTION" and (lost := lost_modules(base, heads)):
            warnings.warn(
                f"the checkpoint of {type(base).__name__} has no weights for {listed(lost)}, which are initialised "
                "anew at each load: name them in modules_to_save, or give a checkpoint that has them",
                stacklevel=3,
            )
        # PEFT looks for sizes by certain names in the model's configuration; EPT needs only the first, and measures it.
        peft_config.token_dim = embedding_width(input_embedding(base))
        sizes = base.config.to_dict()
        sizes = {**sizes, **(sizes.get("text_config") or {}), **vars(base.config)}
        for field, names in _PEFT_SIZES.items():
            if getattr(peft_config, field) is None and not any(name in sizes for name in names):
                setattr(peft_config, field, 1)
        if first:
            self._own_labels = label_names(base)
        trainable = not first and any(p.requires_grad for p in self._layer().parameters())
        super().add_adapter(adapter_name, peft_config, **kwargs)
        train_in_float32(base, adapter_name)
        follow_rows(base)
        if first:
            self.active_adapter = adapter_name
            _set_adapter(base, adapter_name)
            self._follow_active()
        else:
            self._require_gradients(adapter_name, False)
            _set_adapter(base, self.active_adapter, inference_mode=not trainable)

    @exclusive
    def set_adapter(self, adapter_name: str, inference_mode: bool = False) -> None:
        """Makes `adapter_name` the active adapter, trainable unless `inference_mode`; all others are frozen.

        Raises:
            ValueError: there is no such adapter, or several are named.
        """
        if not isinstance(adapter_name, str):
            raise ValueError(
                f"only one adapter can be active, got {shown(adapter_name)}: name one, or pass adapter_names to the "
                "call, one per row"
            )
        self._layer(adapter_name)
        self.active_adapter = adapter_name
        _set_adapter(self.base_model, adapter_name, inference_mode=inference_mode)
        for name in self.prompt_encoder:
            self._require_gradients(name, name == adapter_name and not inference_mode, heads=False)
        self._follow_active()

    @transactional
    def delete_adapter(self, adapter_name: str) -> None:
        """Deletes an adapter; if it was active, the first of the remaining ones becomes active.

        If none is left, the model can only be given a new one; its base model is the bare one.

        Raises:
            ValueError: there is no such adapter.
        """
        was_active = adapter_name == self.active_adapter
        is_trained = any(p.requires_grad for p in self._layer(adapter_name).parameters())
        del self.peft_config[adapter_name]
        if not self.peft_config:
            self.active_adapter = []
        elif was_active:
            self.active_adapter = next(iter(self.peft_config))
            warnings.warn(f"{adapter_name!r} was active; {self.active_adapter!r} is active now", stacklevel=4)
        self._forget(adapter_name)
        if self.peft_config and was_active:
            self._require_gradients(self.active_adapter, is_trained)
        self._follow_active()

    def _forget(self, adapter_name: str) -> None:
        """Removes everything of an adapter except its configuration."""
        for kept in (self.prompt_encoder, self.prompt_tokens, self._prompt_caches):
            if adapter_name in kept:
                del kept[adapter_name]
        for wrapper in wrapped_heads(self.base_model):
            # PEFT's own delete_adapter passes all remaining adapters to each head, which accepts only one.
            if adapter_name in wrapper.modules_to_save:
                wrapper.delete_adapter(adapter_name, [self.active_adapter] if self.peft_config else [])

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
            ValueError: pickles were requested, an adapter does not exist, or `save_directory` is a file.
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
        fast_frozen: bool = True,
        **kwargs: Any,
    ) -> Self:
        """Wraps the base model with the adapter saved in `model_id`, a local folder or a repository on the Hub.

        Args:
            model: the base model the adapter was made for; it is frozen in place.
            is_trainable: whether the adapter is to be trained further.
            config: used instead of the saved configuration.
            fast_4bit, dequantized_cache_bytes, fast_frozen: as for `get_ept_model`.
            kwargs: `subfolder`, `revision`, `cache_dir`, `token`, `local_files_only` for the Hub.

        Raises:
            FileNotFoundError, ValueError: the files are missing, damaged, or made for another base model.
        """
        for name in kwargs:  # they may also be for the model, as AutoPeftModel passes those on
            ours = ("is_trainable", "adapter_name", "config", "fast_4bit", "dequantized_cache_bytes", "fast_frozen")
            close = get_close_matches(name, (*ours, *HUB_ARGUMENTS), n=1, cutoff=0.85)
            if close and close[0] != name:
                raise ValueError(f"from_pretrained has no argument {name}: did you mean {close[0]}?")
        config, state = read_adapter(model_id, model, is_trainable, config, **kwargs)
        options: dict[str, Any] = {"fast_4bit": fast_4bit, "dequantized_cache_bytes": dequantized_cache_bytes}
        options["fast_frozen"] = fast_frozen
        with undone_if_raised(model, config):
            wrapped = cls(model, config, adapter_name, initialise=False, **options)
            set_peft_model_state_dict(wrapped, state, adapter_name)
            return wrapped if is_trainable else wrapped.eval()

    @transactional
    def load_adapter(
        self, model_id: str | os.PathLike[str], adapter_name: str, is_trainable: bool = False, **kwargs: Any
    ) -> Any:
        """Loads a saved adapter under a new name, or its weights into the existing adapter of that name.

        The active adapter stays the same.

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
            state = read_weights(model_id, self._shapes(adapter_name), **kwargs)
            self._check_alike(adapter_name, read_config(model_id, **kwargs))
        result = set_peft_model_state_dict(self, state, adapter_name)
        result.missing_keys.clear()  # PEFT lists the base model's weights here, which are not part of the adapter
        if not is_trainable and added:
            self.eval()
        return result

    @exclusive
    def swap_weights(self, adapter_name: str, config: EPTConfig, state: Mapping[str, Tensor]) -> None:
        """Replaces the weights of `adapter_name` by those of another adapter, given with its configuration.

        Raises:
            ValueError: there is no such adapter, or the other one has other sizes or options.
        """
        self._layer(adapter_name)
        check_weights(state, self._shapes(adapter_name), "the adapter to swap in")
        self._check_alike(adapter_name, config)
        set_peft_model_state_dict(self, dict(state), adapter_name)

    def _shapes(self, adapter_name: str) -> dict[str, tuple[int, ...]]:
        state = get_peft_model_state_dict(self, None, adapter_name, save_embedding_layers=False)
        return {name: tuple(tensor.shape) for name, tensor in state.items() if name != SCALE_NAME}

    def _check_alike(self, adapter_name: str, other: EPTConfig) -> None:
        config = self.peft_config[adapter_name]
        from_seed = ["seed"] if config.prompt_rank else []  # it determines ULPT's frozen rows
        for name in [*OUTPUT_FIELDS, *from_seed]:
            ours, theirs = getattr(config, name), getattr(other, name)
            if ours != theirs:
                raise ValueError(
                    f"the adapter was made with {name}={shown(theirs)}, but {adapter_name!r} has {shown(ours)}: load "
                    "it under a new name"
                )

    def _layer(self, adapter_name: str | None = None) -> EPTLayer:
        """Returns the layer of an adapter (default: the active one); a `ValueError` names the loaded ones."""
        name = adapter_name or self.active_adapter
        if not self.peft_config:
            raise ValueError("the model has no adapter: add or load one, or use its base_model")
        if name not in self.peft_config:
            raise ValueError(f"no adapter is named {name!r}: the loaded ones are {', '.join(self.peft_config)}")
        layer = self.prompt_encoder[name]
        assert isinstance(layer, EPTLayer)
        return layer

    def _embedding(self) -> nn.Module:
        """Returns the module that embeds text as the base model does."""
        return scaled_embedding(input_embedding(self.base_model), self._facts.embedding_factor)

    def _follow_active(self) -> None:
        """Sets the base model's label names and dropout to the active adapter's, or to its own if there is none."""
        config = self.active_peft_config if self.peft_config else None
        words = config.label_words if config is not None and config.task_type in ("SEQ_CLS", "TOKEN_CLS") else None
        name_labels(self.base_model, words or self._own_labels)
        self.train(self.training)

    def _setup_prompt_encoder(self, adapter_name: str) -> None:
        """Makes the adapter's parameters; called by PEFT in `add_adapter`."""
        if "prompt_encoder" not in self._modules:
            self.prompt_encoder = nn.ModuleDict()
            self.prompt_tokens: dict[str, Tensor] = {}
        config = self.peft_config[adapter_name]
        embedding: Any = input_embedding(self.base_model)  # another adapter may have trained a copy of it
        original = scaled_embedding(getattr(embedding, "original_module", embedding), self._facts.embedding_factor)
        layer = EPTLayer(config, original, **self._layer_options)
        config.token_dim = layer.d
        self.prompt_encoder[adapter_name] = layer
        self.prompt_tokens[adapter_name] = torch.arange(config.num_virtual_tokens)

    def _prepare_model_for_gradient_checkpointing(self, model: Any) -> Any:
        return model  # the embeddings require a gradient anyway

    def _require_gradients(self, adapter_name: str, required: bool, heads: bool = True) -> None:
        layer = self._layer(adapter_name)
        layer.requires_grad_(required and not layer.config.folded)
        if heads:
            for wrapper in wrapped_heads(self.base_model):
                if adapter_name in wrapper.modules_to_save:
                    wrapper.modules_to_save[adapter_name].requires_grad_(required)
