"""PEFT's own methods under the same trainer: prompt tuning, p-tuning, multitask prompt tuning and LoRA at a budget.

The models take what `EPTModel` takes, and are treated alike: a frozen model without dropout, logits where labels are,
a loss divided over all accumulated batches. What PEFT does with masks and positions is left as it is.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from peft import (
    LoraConfig,
    MultitaskPromptTuningConfig,
    PeftConfig,
    PeftModel,
    PeftModelForCausalLM,
    PeftModelForSeq2SeqLM,
    PeftModelForSequenceClassification,
    PeftType,
    PromptEncoderConfig,
    PromptTuningConfig,
)
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..embedding import embedding_width
from ..model.base_model import input_embedding
from ..model.inputs import divide_loss
from .config import MethodConfig

ENCODER_FILE = "prompt_encoder.safetensors"
DEFAULT_TOKENS = {"prompt-tuning": 100, "p-tuning": 20, "mpt": 100}
DEFAULT_RANK = 8
PROMPT_SHARE = 0.4
"""Of a p-tuning budget; the rest goes to its encoder."""


def peft_config(name: str, method: MethodConfig, base: Any, task_type: str) -> PeftConfig:
    """PEFT's configuration of the method `name` for `base`, within `method.budget` where that is set.

    Raises:
        ValueError: nothing fits the budget; the message names the smallest that would do.
    """
    if name == "lora":
        return _lora(method, base, task_type)
    d, budget = embedding_width(input_embedding(base)), method.budget
    tokens = method.num_virtual_tokens
    common: dict[str, Any] = {"task_type": task_type, "num_transformer_submodules": 1}
    if name == "prompt-tuning":
        tokens = _fitting(name, tokens, budget, fixed=0, each=d)
        return PromptTuningConfig(num_virtual_tokens=tokens, prompt_tuning_init="SAMPLE_VOCAB", **common)
    if name == "mpt":  # one task: a shared prompt times the product of a column and a row
        tokens = _fitting(name, tokens, budget, fixed=d, each=d + 1)
        return MultitaskPromptTuningConfig(num_virtual_tokens=tokens, num_tasks=1, num_ranks=1, **common)
    if tokens is None and budget is not None:
        tokens = max(1, int(PROMPT_SHARE * budget / d))
    tokens = tokens or DEFAULT_TOKENS[name]
    hidden = d if budget is None else _encoder_width(d, tokens, budget)
    return PromptEncoderConfig(num_virtual_tokens=tokens, encoder_hidden_size=hidden, **common)


def _fitting(name: str, tokens: int | None, budget: int | None, fixed: int, each: int) -> int:
    """Virtual tokens: those asked for, checked against the budget, or as many as fit it."""
    if budget is None:
        return tokens or DEFAULT_TOKENS[name]
    smallest = fixed + (tokens or 1) * each
    if smallest > budget:
        raise ValueError(f"{name} with {tokens or 1} virtual tokens has {smallest} parameters, method.budget={budget}")
    return tokens or (budget - fixed) // each


def _encoder_width(d: int, tokens: int, budget: int) -> int:
    """The widest encoder of p-tuning, linear layers d → h → h → d with biases, that fits the budget."""

    def count(h: int) -> int:
        return tokens * d + (d * h + h) + (h * h + h) + (h * d + d)

    if count(1) > budget:
        raise ValueError(f"p-tuning with {tokens} virtual tokens has at least {count(1)} parameters, budget={budget}")
    linear = 2 * d + 2
    h = int((math.sqrt(linear**2 + 4 * (budget - tokens * d - d)) - linear) / 2)
    return h if count(h) <= budget else h - 1


def _lora(method: MethodConfig, base: Any, task_type: str) -> LoraConfig:
    """LoRA on PEFT's default modules of that architecture; of rank 1 on the last ones where the budget has no more."""
    suffixes = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(base.config.model_type)
    if suffixes is None:
        raise ValueError(f"PEFT has no default LoRA modules for {base.config.model_type}: leave lora out")
    costs = {
        name: module.in_features + module.out_features
        for name, module in base.named_modules()
        if isinstance(module, nn.Linear) and name.split(".")[-1] in suffixes
    }
    names, rank = list(costs), method.r or DEFAULT_RANK
    if method.budget is not None:
        rank = method.r or max(1, method.budget // sum(costs.values()))
        while names and rank * sum(costs[name] for name in names) > method.budget:
            names.pop(0)  # the layers next to the input go first
        if not names:
            raise ValueError(
                f"LoRA of rank {rank} on {list(costs)[-1]} alone has {rank * list(costs.values())[-1]} parameters, "
                f"method.budget={method.budget}: raise the budget or lower method.r"
            )
    alpha = {} if method.alpha is None else {"lora_alpha": method.alpha}
    return LoraConfig(task_type=task_type, r=rank, target_modules=names, **alpha)


class _LikeEPTModel:
    """PEFT's model for a task, called as `EPTModel` is."""

    def forward(  # type: ignore[misc]
        self: Any,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        text_mask: Tensor | None = None,
        logits_to_keep: int | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> Any:
        """`text_mask` is EPT's alone and ignored; the other arguments are those of `EPTModel.forward`."""
        kwargs = self._with_task(input_ids, kwargs)
        causal = self.active_peft_config.task_type == "CAUSAL_LM"
        if not causal or labels is None:
            if logits_to_keep is not None:
                kwargs["logits_to_keep"] = logits_to_keep
            output = super().forward(  # type: ignore[misc]
                input_ids=input_ids, attention_mask=attention_mask, labels=labels, **kwargs
            )
            if labels is not None and num_items_in_batch is not None:
                divide_loss(output, labels, num_items_in_batch, shifted=False)
            return output
        # PEFT extends the labels to the prompt, which does not fit logits of the last positions only.
        keep = logits_to_keep or labels.shape[1]
        output = super().forward(  # type: ignore[misc]
            input_ids=input_ids, attention_mask=attention_mask, logits_to_keep=keep, **kwargs
        )
        targets = labels[:, -keep:][:, 1:].reshape(-1)
        scores = output.logits[:, :-1].float().flatten(0, 1)
        total = nn.functional.cross_entropy(scores, targets, ignore_index=-100, reduction="sum")
        output["loss"] = total / (targets.ne(-100).sum() if num_items_in_batch is None else num_items_in_batch)
        return output

    def generate(self: Any, *args: Any, **kwargs: Any) -> Any:  # type: ignore[misc]
        kwargs.pop("text_mask", None)
        return super().generate(*args, **self._with_task(kwargs.get("input_ids"), kwargs))  # type: ignore[misc]

    def train(self: Any, mode: bool = True) -> Any:  # type: ignore[misc]
        """The adapter's mode; the frozen model, and with it its dropout, stays in eval mode."""
        super().train(mode)  # type: ignore[misc]
        self.get_base_model().eval()
        return self

    def save_pretrained(self: Any, save_directory: str, *args: Any, **kwargs: Any) -> None:  # type: ignore[misc]
        """As PEFT does; of p-tuning also the encoder, in a file beside.

        PEFT saves the prompt that comes out of the encoder, from which neither training nor the choice of the best
        checkpoint can go on: loaded back, it would pass through the encoder once more.
        """
        super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]
        if self.active_peft_config.peft_type == PeftType.P_TUNING:
            state = {name: tensor.contiguous() for name, tensor in self._prompt_encoder().state_dict().items()}
            save_file(state, Path(save_directory) / ENCODER_FILE)

    def load_adapter(self: Any, model_id: str, *args: Any, **kwargs: Any) -> Any:  # type: ignore[misc]
        result = super().load_adapter(model_id, *args, **kwargs)  # type: ignore[misc]
        if self.active_peft_config.peft_type == PeftType.P_TUNING:
            self._prompt_encoder().load_state_dict(load_file(Path(model_id) / ENCODER_FILE))
        return result

    def _prompt_encoder(self: Any) -> Any:  # type: ignore[misc]
        return self.prompt_encoder[self.active_adapter]

    def _with_task(self: Any, input_ids: Tensor | None, kwargs: dict[str, Any]) -> dict[str, Any]:  # type: ignore[misc]
        """Multitask prompt tuning wants to know each row's task: there is one."""
        if self.active_peft_config.peft_type != PeftType.MULTITASK_PROMPT_TUNING or input_ids is None:
            return kwargs
        return {"task_ids": input_ids.new_zeros(input_ids.shape[0]), **kwargs}


class _CausalLM(_LikeEPTModel, PeftModelForCausalLM):
    pass


class _Seq2SeqLM(_LikeEPTModel, PeftModelForSeq2SeqLM):
    pass


class _Classifier(_LikeEPTModel, PeftModelForSequenceClassification):
    pass


_CLASSES: dict[str, Any] = {"CAUSAL_LM": _CausalLM, "SEQ_2_SEQ_LM": _Seq2SeqLM, "SEQ_CLS": _Classifier}


def attach(base: Any, config: PeftConfig, seed: int = 0) -> PeftModel:
    """`base` with a fresh adapter of PEFT's, drawn with `seed`."""
    torch.manual_seed(seed)
    return _CLASSES[str(getattr(config.task_type, "value", config.task_type))](base, config)


def attach_trained(base: Any, folder: Path) -> PeftModel:
    """`base` with the adapter that a run saved in `folder`."""
    config = PeftConfig.from_pretrained(str(folder))
    config.inference_mode = False  # PEFT would leave p-tuning's encoder out
    model = attach(base, config)
    model.load_adapter(str(folder), "default")
    return model
