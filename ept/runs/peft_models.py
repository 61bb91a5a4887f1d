"""PEFT's own methods under the same trainer: prompt tuning, p-tuning, multitask prompt tuning and LoRA at a budget.

The models take the arguments of `EPTModel` and are treated alike: a frozen model without dropout, logits only where
there are labels, a loss divided over all accumulated batches. PEFT's own handling of masks and positions is unchanged.
"""

from __future__ import annotations

from bisect import bisect
from pathlib import Path
from typing import TYPE_CHECKING, Any

import peft
import torch
from peft import PeftConfig, PeftModel, PeftType
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..embedding import embedding_width
from ..model.base_model import input_embedding, set_mode, train_in_float32
from ..model.inputs import divide_loss
from ..model.reading import examine
from ..utils.messages import listed
from .method_table import Method

if TYPE_CHECKING:
    from .config import MethodConfig

ENCODER_FILE = "prompt_encoder.safetensors"
DEFAULT_RANK = 8
PROMPT_SHARE = 0.4
"""The prompt's share of a p-tuning budget; the rest goes to the prompt encoder."""


def attach(
    base: Any, config: PeftConfig, *, seed: int = 0, tokenizer: Any = None, text: str = "", **_: Any
) -> PeftModel:
    """Puts a fresh PEFT adapter, drawn with `seed`, on `base`; plain prompt tuning starts from `text`, if given."""
    torch.manual_seed(seed)
    kind = peft.MODEL_TYPE_TO_PEFT_MODEL_MAPPING[config.task_type]
    model = type(kind.__name__, (_LikeEPTModel, kind), {})(base, config)
    train_in_float32(base, "default")
    if text and config.peft_type == PeftType.PROMPT_TUNING:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"][: config.num_virtual_tokens]
        with torch.no_grad():
            rows = input_embedding(base)(torch.tensor(ids, device=base.device))
            model.prompt_encoder["default"].embedding.weight[: len(ids)] = rows.float()
    return model


def attach_trained(base: Any, folder: Path, **_: Any) -> PeftModel:
    """Puts the PEFT adapter that a run saved in `folder` on `base`."""
    config = PeftConfig.from_pretrained(str(folder))
    config.inference_mode = False  # otherwise PEFT leaves out p-tuning's encoder
    model = attach(base, config)
    model.load_adapter(str(folder), "default")
    return model


# The configuration of each method, within `settings.budget` if set; ValueError if nothing fits.


def prompt_tuning(method: Method, settings: MethodConfig, base: Any, task_type: str, **_: Any) -> PeftConfig:
    """Uses the configured number of virtual tokens, or else as many as fit the budget."""
    d, tokens, budget = embedding_width(input_embedding(base)), settings.num_virtual_tokens, settings.budget
    # Multitask with one task: a shared prompt times the product of a column and a row, saved as one prompt.
    fixed, each = (d, d + 1) if method.name == "mpt" and settings.budget_kind == "trained" else (0, d)
    if budget is None:
        tokens = tokens or method.usual_tokens
    elif (smallest := fixed + (tokens or 1) * each) > budget:
        raise ValueError(
            f"{method.name} with {tokens or 1} virtual tokens has {smallest} parameters, but method.budget is "
            f"{budget}: raise it"
        )
    else:
        tokens = tokens or (budget - fixed) // each
    options: Any = {"task_type": task_type, "num_virtual_tokens": tokens, "num_transformer_submodules": 1}
    if method.name == "mpt":
        return peft.MultitaskPromptTuningConfig(**options, num_tasks=1, num_ranks=1)
    return peft.PromptTuningConfig(**options, prompt_tuning_init="SAMPLE_VOCAB")


def p_tuning(method: Method, settings: MethodConfig, base: Any, task_type: str, **_: Any) -> PeftConfig:
    """Uses the widest encoder, linear layers d → h → h → d with biases, that fits a trained budget; otherwise h = d."""
    d, budget = embedding_width(input_embedding(base)), settings.budget
    if budget is not None and settings.budget_kind == "stored":  # stored: the prompt that the encoder produces
        tokens, budget = max(1, budget // d), None
    else:
        tokens = method.usual_tokens if budget is None else max(1, int(PROMPT_SHARE * budget / d))
    tokens = settings.num_virtual_tokens or tokens

    def count(h: int) -> int:
        return tokens * d + (d * h + h) + (h * h + h) + (h * d + d)

    h = d if budget is None else bisect(range(budget), budget, key=count) - 1
    if h < 1:
        raise ValueError(
            f"p-tuning with {tokens} virtual tokens has at least {count(1)} parameters, but method.budget is "
            f"{budget}: raise it"
        )
    return peft.PromptEncoderConfig(
        task_type=task_type, num_virtual_tokens=tokens, num_transformer_submodules=1, encoder_hidden_size=h
    )


def lora(method: Method, settings: MethodConfig, base: Any, task_type: str, **_: Any) -> PeftConfig:
    """Uses PEFT's default modules of the architecture; if even rank 1 exceeds the budget, only the last of them."""
    suffixes = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(base.config.model_type)
    if suffixes is None:
        raise ValueError(f"PEFT has no default LoRA modules for {base.config.model_type}: leave lora out")
    costs = {
        name: module.in_features + module.out_features
        for name, module in base.named_modules()
        if isinstance(module, nn.Linear) and name.split(".")[-1] in suffixes
    }
    if not costs:
        raise ValueError(
            f"PEFT's LoRA modules of {base.config.model_type}, {listed(suffixes)}, are not linear layers of "
            f"{type(base).__name__}: leave lora out"
        )
    names, rank, budget = list(costs), settings.r or DEFAULT_RANK, settings.budget
    if budget is not None:
        rank = settings.r or max(1, budget // sum(costs.values()))
        while names and rank * sum(costs[name] for name in names) > budget:
            names.pop(0)  # drop the layers nearest to the input first
        if not names:
            last = list(costs)[-1]
            raise ValueError(
                f"LoRA of rank {rank} on {last} alone has {rank * costs[last]} parameters, but method.budget is "
                f"{budget}: raise it, or lower method.r"
            )
    alpha = {} if settings.alpha is None else {"lora_alpha": settings.alpha}
    return peft.LoraConfig(task_type=task_type, r=rank, target_modules=names, **alpha)


class _LikeEPTModel(PeftModel):
    """Mixin that makes PEFT's model for a task callable as `EPTModel` is; comes before the task's own class."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        text_mask: Tensor | None = None,
        logits_to_keep: int | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> Any:
        """Takes the arguments of `EPTModel.forward`; `text_mask`, which only EPT uses, is ignored."""
        kwargs = {"input_ids": input_ids, "attention_mask": attention_mask, **self._with_task(input_ids, kwargs)}
        causal = self.active_peft_config.task_type == "CAUSAL_LM"
        if not causal or labels is None or logits_to_keep == 0:
            if logits_to_keep is not None:
                kwargs["logits_to_keep"] = logits_to_keep
            output = super().forward(labels=labels, **kwargs)
            if labels is not None and num_items_in_batch is not None:
                divide_loss(output, labels, num_items_in_batch, shifted=causal)
            return output
        # PEFT extends the labels over the prompt, which fits only logits at all positions: compute the loss here.
        keep = logits_to_keep or labels.shape[1]
        output = super().forward(logits_to_keep=keep, **kwargs)
        targets = labels[:, -keep:][:, 1:].reshape(-1)
        scores = output.logits[:, :-1].float().flatten(0, 1)
        total = nn.functional.cross_entropy(scores, targets, ignore_index=-100, reduction="sum")
        output["loss"] = total / (targets.ne(-100).sum() if num_items_in_batch is None else num_items_in_batch)
        return output

    @property
    def text_limit(self) -> int | None:
        """The maximum number of text tokens for which the base model has positions after the prompt; None: no limit."""
        config = self.active_peft_config
        try:
            limit = examine(self.get_base_model(), config.task_type).position_limit
        except ValueError:  # a model that EPT cannot adapt
            limit = None
        return None if limit is None else limit - (config.num_virtual_tokens if config.is_prompt_learning else 0)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        kwargs.pop("text_mask", None)
        return super().generate(*args, **self._with_task(kwargs.get("input_ids"), kwargs))

    def train(self, mode: bool = True) -> Any:
        """Sets the adapter's mode; the frozen model stays in eval mode, without dropout."""
        super().train(mode)
        set_mode(self.get_base_model(), mode, dropout=False)
        return self

    def save_pretrained(self, save_directory: str, *args: Any, **kwargs: Any) -> None:
        """Saves as PEFT does, and p-tuning's encoder in a separate file.

        PEFT saves only the prompt that the encoder produces, from which neither training nor the choice of the best
        checkpoint
        can continue: when loaded, it would pass through the encoder again.
        """
        super().save_pretrained(save_directory, *args, **kwargs)
        if self.active_peft_config.peft_type == PeftType.P_TUNING:
            state = self.prompt_encoder[self.active_adapter].state_dict()
            save_file({name: t.contiguous() for name, t in state.items()}, Path(save_directory) / ENCODER_FILE)

    def load_adapter(self, model_id: str, *args: Any, **kwargs: Any) -> Any:
        result = super().load_adapter(model_id, *args, **kwargs)
        if self.active_peft_config.peft_type == PeftType.P_TUNING:
            self.prompt_encoder[self.active_adapter].load_state_dict(load_file(Path(model_id) / ENCODER_FILE))
        return result

    def _with_task(self, input_ids: Tensor | None, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Adds each row's task for multitask prompt tuning; there is only one."""
        if self.active_peft_config.peft_type != PeftType.MULTITASK_PROMPT_TUNING or input_ids is None:
            return kwargs
        return {"task_ids": input_ids.new_zeros(input_ids.shape[0]), **kwargs}
