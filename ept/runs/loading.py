"""The frozen base model and its tokenizer, loaded as the configuration says."""

from __future__ import annotations

import copy
import logging
import re
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
)

from ..model.base_model import absent_modules, trained_heads
from ..model.reading import infer_task_type
from ..utils.messages import listed
from .cpu import choose_attention, fastest_dtype
from .processes import accelerator_index, is_cpu_requested, world_size

if TYPE_CHECKING:
    from .config import ModelConfig

logger = logging.getLogger(__name__)

MODEL_CLASSES = {
    "SEQ_2_SEQ_LM": transformers.AutoModelForSeq2SeqLM,
    "CAUSAL_LM": transformers.AutoModelForCausalLM,
    "SEQ_CLS": AutoModelForSequenceClassification,
}
TASK_OF_HEAD = {"TokenClassification": "TOKEN_CLS", "QuestionAnswering": "QUESTION_ANS"}
"""Task types of heads that a run does not train, by part of the class name."""


def default_device() -> torch.device:
    """Returns this machine's accelerator (with several ranks, this rank's own), or the CPU if there is none."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None or is_cpu_requested():
        return torch.device("cpu")
    return torch.device(accelerator.type, accelerator_index()) if world_size() > 1 else accelerator


def task_type_of(model: ModelConfig) -> str:
    """Returns the configured task type, or else the one implied by the model's own configuration.

    Raises ValueError for a model whose head a run does not train.
    """
    if model.task_type is not None:
        return model.task_type
    if model.gguf_file is not None:
        return "CAUSAL_LM"  # GGUF files hold decoders
    config = _from_pretrained(AutoConfig, model)
    for name in config.architectures or ():
        if task := next((task for part, task in TASK_OF_HEAD.items() if part in name), None):
            raise ValueError(
                f"{model.name_or_path} is a {name}, but a run trains {', '.join(MODEL_CLASSES)}: use get_ept_model "
                f"and the Trainer for {task}, or set model.task_type=SEQ_CLS to give the model a new head for whole "
                "texts"
            )
    return infer_task_type(config)


def load_tokenizer(model: ModelConfig) -> PreTrainedTokenizerBase:
    """Loads the tokenizer, with a padding token (the end token if the model has none).

    Raises ValueError if it cannot be loaded or has neither token.
    """
    if model.tokenizer_name_or_path is not None:
        model = type(model)(name_or_path=model.tokenizer_name_or_path)
    tokenizer = _from_pretrained(transformers.AutoTokenizer, model)
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise ValueError(
                f"the tokenizer of {model.name_or_path} has neither a padding nor an end token: set "
                "model.tokenizer_name_or_path to another tokenizer"
            )
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def has_new_head(model: ModelConfig, num_labels: int) -> bool:
    """Checks whether a classifier loaded for this many labels gets an untrained head."""
    saved = _from_pretrained(AutoConfig, model)
    return saved.num_labels != num_labels or not _has_head(saved)


def head_order(model: ModelConfig, labels: Sequence[str]) -> list[str] | None:
    """Returns the labels in the order of a trained head's label names; None if that is the order of `labels`.

    If the names are other words, there is a warning and no order.
    """
    if has_new_head(model, len(labels)):
        return None
    saved = _from_pretrained(AutoConfig, model)
    names = [str(saved.id2label[output]).strip() for output in sorted(saved.id2label)]
    by_name = {label.strip().casefold(): label for label in labels}
    order = [by_name.get(name.casefold(), "") for name in names]
    if set(order) == set(labels):
        return order if order != list(labels) else None
    if not all(re.fullmatch(r"LABEL_\d+", name) for name in names):
        logger.warning(
            "the trained head of %s gives %s; the labels %s are taken to be in this order: set model.head_labels if "
            "their order differs",
            *(model.name_or_path, listed(map(repr, names)), listed(map(repr, labels))),
        )
    return None


def outputs_of(heads: Mapping[str, Tensor], model: ModelConfig) -> int:
    """Counts the labels of an adapter's trained `heads`, in a classifier of this base model.

    It is the dimension of a head that changes with a classifier's number of labels; without trained heads, the model's
    own number. Raises ValueError for heads of another model.
    """
    saved, shapes = _from_pretrained(AutoConfig, model), []
    if not heads:
        return int(saved.num_labels)
    for saved.num_labels in (2, 3):
        with torch.device("meta"):
            shapes.append(
                {k: p.shape for k, p in AutoModelForSequenceClassification.from_config(saved).named_parameters()}
            )
    for name, shape in shapes[0].items():
        axes = [axis for axis, (two, three) in enumerate(zip(shape, shapes[1][name])) if two != three]
        if axes and name in heads:
            return int(heads[name].shape[axes[0]])
    raise ValueError(
        f"the adapter's head, {', '.join(heads)}, does not belong to {model.name_or_path}: give the adapter's own "
        "base model"
    )


def _has_head(saved: Any) -> bool:
    return any("SequenceClass" in name for name in saved.architectures or ())


def load_base_model(
    model: ModelConfig,
    task_type: str,
    num_labels: int,
    pad_token_id: int,
    device: torch.device | None = None,
    max_length: int | None = None,
) -> PreTrainedModel:
    """Loads the base model in eval mode on `device` (None: the accelerator, else the CPU).

    `max_length`, the tokens of the longest text, selects the faster attention (`cpu.choose_attention`), unless the
    configuration names one.

    A GGUF file is unpacked into a plain float model of the same class; `load_in_4bit` quantises through bitsandbytes.
    Raises ValueError if it cannot be loaded.
    """
    device = device or default_device()
    options: dict[str, Any] = {"dtype": dtype_of(model, device)}
    if model.attn_implementation is not None:
        options["attn_implementation"] = model.attn_implementation
    if task_type == "SEQ_CLS":
        options["num_labels"] = num_labels
        saved = _from_pretrained(AutoConfig, model)
        if saved.num_labels != num_labels and _has_head(saved):
            logger.warning(
                "the head of %s is for %d labels, but the task has %d: it gets a new head",
                *(model.name_or_path, saved.num_labels, num_labels),
            )
            saved.problem_type, saved.num_labels = None, num_labels
            del options["num_labels"]
            options |= {"config": saved, "ignore_mismatched_sizes": True}
    if model.load_in_4bit:
        if model.gguf_file is not None:
            raise ValueError("model.load_in_4bit and model.gguf_file exclude each other: leave one out")
        heads = None
        if task_type == "SEQ_CLS":  # a classifier's heads are trained, so they must not be quantised
            config = _from_pretrained(AutoConfig, model)
            with torch.device("meta"):
                heads = trained_heads(AutoModelForSequenceClassification.from_config(config))
        compute_dtype = torch.bfloat16 if model.dtype == "auto" else options["dtype"]
        options["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=model.quant_type,
            bnb_4bit_use_double_quant=model.double_quant,
            bnb_4bit_compute_dtype=compute_dtype,
            llm_int8_skip_modules=heads,
        )
        options["device_map"] = {"": device}
    base = _from_pretrained(_class_for(model, task_type), model, **options)
    if model.gguf_file is not None:
        # transformers marks the models that it unpacks as quantized: make an unmarked one from their weights.
        config = copy.deepcopy(base.config)
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        plain = type(base).from_pretrained(None, config=config, state_dict=base.state_dict(), dtype=base.dtype)
        plain.generation_config = base.generation_config
        plain.name_or_path = plain.config._name_or_path = str(model.name_or_path)
        for name in absent_modules(base):
            for parameter in plain.get_submodule(name).parameters(recurse=False):
                parameter._is_hf_initialized = False
        base = plain
    if task_type == "SEQ_CLS" and base.config.pad_token_id is None:
        base.config.pad_token_id = pad_token_id  # for decoders, which pool at the last real token
    if not model.load_in_4bit:
        base.to(device)
    if model.attn_implementation is None:
        choose_attention(base, max_length)
    return base.eval()


def _class_for(model: ModelConfig, task_type: str) -> Any:
    """Returns the class that loads `model`; transformers has a separate one for language models that read images."""
    if task_type == "CAUSAL_LM" and model.gguf_file is None:
        kind = _from_pretrained(AutoConfig, model).model_type
        if kind in MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES and kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
            return transformers.AutoModelForMultimodalLM
    return MODEL_CLASSES[task_type]


def dtype_of(model: ModelConfig, device: torch.device) -> torch.dtype | Literal["auto"]:
    """Returns the configured dtype of the weights on `device`."""
    if model.dtype == "auto":
        return "auto"
    return fastest_dtype(device) if model.dtype == "fastest" else getattr(torch, model.dtype)


def weights_of(base: PreTrainedModel) -> dict[str, str]:
    """Describes how a loaded model computes: the dtype of its (unquantised) weights, and its attention."""
    return {"dtype": str(base.dtype).removeprefix("torch."), "attention": base.config._attn_implementation}


def _from_pretrained(cls: Any, model: ModelConfig, **options: Any) -> Any:
    """Calls `cls.from_pretrained`, never with trust_remote_code, and turns its errors into one clear message."""
    if (name := model.name_or_path) is None:
        raise ValueError("model.name_or_path is not set: give a model folder or hub name")
    path = Path(name)
    if not path.exists() and (path.is_absolute() or name.startswith(".") or name.count("/") > 1):
        raise ValueError(f"{name}: no such model folder: check the path (model.name_or_path)")
    if path.is_dir() and not (path / "config.json").is_file() and model.gguf_file is None:
        if any((path / part).is_file() for part in ("adapter_config.json", "config.yaml")):
            raise ValueError(
                f"{name} holds an adapter: give its base model here; --init-from RUN starts from an adapter"
            )
        raise ValueError(f"{name} holds no model (no config.json): check the path")
    if model.gguf_file is not None:
        options["gguf_file"] = model.gguf_file
        if Path(name).is_dir() and not (Path(name) / model.gguf_file).is_file():
            raise ValueError(f"there is no {model.gguf_file} in {name} (model.gguf_file)")
    if model.revision is not None:
        options["revision"] = model.revision
    try:
        return cls.from_pretrained(name, **options)
    except (OSError, ValueError, ImportError) as error:  # ImportError: a package that an option needs is missing
        reason = textwrap.shorten(str(error).strip().partition("\n")[0], 300, placeholder=" ...")
        raise ValueError(f"cannot load {name!r} with {cls.__name__}: {reason}") from error
