"""The Trainer of a run: its arguments, the batches of a step, and a learning rate for each kind of parameter."""

from __future__ import annotations

import math
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.data_loader import prepare_data_loader
from transformers import EarlyStoppingCallback, PrinterCallback, Trainer, TrainerControl, TrainingArguments

from ..model.compilation import check_lengths
from ..tasks.encoding import Collator, encode_split
from .callbacks import ProgressBar, Recorder
from .checkpoints import PREFIX, being_saved
from .config import RunConfig
from .failures import check_finite, writing
from .folder import RunFolder
from .loading import default_device
from .method_table import METHODS
from .resumption import losses_since_log
from .sampling import FILLER_LABELS, EpochLengthGroupedSampler, FillingCollator, SharedBatches

if TYPE_CHECKING:
    from .train import PreparedRun

# transformers renames the argument on its way to version 6.
_CHECKPOINTING = next(
    field.name
    for field in fields(TrainingArguments)
    if field.name in ("activation_checkpointing", "gradient_checkpointing")
)
_ROLES = {"prompt": "prompt", "U": "prompt", "D": "map", "G": "map", "W_q": "map", "W_k": "map"}


class PromptTrainer(Trainer):
    """The Trainer with one learning rate for the prompt, one for everything else, and the task's own score."""

    optimizer: torch.optim.Optimizer | None
    control: TrainerControl

    def __init__(self, config: RunConfig, run: PreparedRun, folder: RunFolder, recorder: Recorder) -> None:
        self.run_config, self.run, self.recorder = config, run, recorder
        data = run.run_data.data
        patience = config.training.early_stopping_patience
        encoded = encode_split(data.train, run.tokenizer, data.labels, run.task_type, data.task.values)
        if config.training.compile_layers and config.training.pad_to_multiple_of is not None:
            check_lengths(max(encoded["length"]), config.training.pad_to_multiple_of)
        self.progress = ProgressBar(data.task.metrics[0], shown=run.processes.main)
        super().__init__(
            model=run.model,
            args=training_arguments(config, folder, metric=data.task.metrics[0]),
            train_dataset=encoded,
            eval_dataset=data.validation,
            data_collator=collator(config, run),
            callbacks=[
                recorder,
                self.progress,
                *([EarlyStoppingCallback(early_stopping_patience=patience)] if patience is not None else []),
            ],
        )
        self.remove_callback(PrinterCallback)  # prints to standard output
        # EPTModel.forward divides by num_items_in_batch for every model, whatever the base model's signature says.
        self.model_accepts_loss_kwargs = True

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        if not self.run_config.training.group_by_length:
            return super()._get_train_sampler(train_dataset)
        rows = self.args.train_batch_size * self.args.world_size * self.args.gradient_accumulation_steps
        lengths = list((train_dataset or self.train_dataset)["length"])
        return EpochLengthGroupedSampler(rows, lengths, self.run_config.seed)

    def get_train_dataloader(self) -> Any:
        count, args = self.run.processes.count, self.args
        if count == 1:
            return super().get_train_dataloader()
        rows: Any = self.train_dataset
        batches = SharedBatches(
            self._get_train_sampler(), args.train_batch_size * count, self.run.processes.index, count
        )
        loader = torch.utils.data.DataLoader(
            rows,
            batch_sampler=batches,
            collate_fn=FillingCollator(self.data_collator, rows[0]),
            pin_memory=args.dataloader_pin_memory,
        )
        return prepare_data_loader(  # as accelerate prepares them for one process: the batches are shared already
            loader,
            device=self.accelerator.device,
            num_processes=1,
            process_index=0,
            put_on_device=True,
            use_seedable_sampler=True,
            non_blocking=torch.cuda.is_available(),
        )

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        filler = inputs.pop(FILLER_LABELS, None)
        if filler is None:
            return super().compute_loss(model, inputs, *args, **kwargs)
        return super().compute_loss(model, {**inputs, "labels": filler}, *args, **kwargs) * 0.0

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        self.run.processes.wait()  # trainer_state.json, which comes next, says that everything is there

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        check_finite(self.run.model, self.state.global_step, self.run_config)
        checkpoint = Path(self.args.output_dir, f"{PREFIX}{self.state.global_step}")
        self.recorder.file.sync()
        saving = being_saved(
            checkpoint,
            limit=self.run_config.training.save_total_limit,
            best=self.state.best_global_step,
            main=self.args.should_save,
            wait=self.run.processes.wait,
            **losses_since_log(self, self.run.processes.gather),
        )
        with writing(checkpoint), saving:
            super()._save_checkpoint(model, trial)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            model = model or self.model
            optimizer, options = self.get_optimizer_cls_and_kwargs(self.args, model)
            training, method = self.run_config.training, self.run_config.method.name
            rates = (training.learning_rate, training.low_rank_learning_rate, training.weight_decay)
            self.optimizer = optimizer(parameter_groups(model, *rates, method), **options)
        return self.optimizer

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        scores = self.run.score(self.run.run_data.data.validation)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in scores.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


def collator(config: RunConfig, run: PreparedRun) -> Collator:
    """Makes the batches as the configuration's options of the step say."""
    training = config.training
    return Collator(
        run.task_type,
        int(run.tokenizer.pad_token_id),
        pad_to_multiple_of=training.pad_to_multiple_of,
        answer_tokens=max(map(len, run.answers), default=0) if training.pad_to_multiple_of is not None else 0,
        label_only_logits=training.label_only_logits,
    )


def parameter_groups(
    model: torch.nn.Module,
    learning_rate: float,
    low_rank_learning_rate: float,
    weight_decay: float = 0.0,
    method: str = "ept",
) -> list[dict[str, Any]]:
    """Groups of the optimizer, each at the rate that fits what a step of Adam does to the embeddings.

    * `prompt` and `U`, whose entries stand in the units of the prompt: `learning_rate`;
    * the maps `D`, `G`, `W_q`, `W_k`: `low_rank_learning_rate`/√d. A step changes each of a column's d entries by about
      the rate, and they add up: at the whole rate the gate saturates within some tens of steps;
    * all others (`A`, `B`, `beta`, heads), the last group: `low_rank_learning_rate`.

    PEFT's methods: all of the adapter at `learning_rate`, heads at `low_rank_learning_rate`.
    """
    groups: dict[str, list[torch.nn.Parameter]] = {"prompt": [], "map": [], "other": []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[_role(name, method)].append(parameter)
    maps = groups["map"]  # [d, …] each
    rates = {
        "prompt": learning_rate,
        "map": low_rank_learning_rate / math.sqrt(maps[0].shape[0]) if maps else 0.0,
        "other": low_rank_learning_rate,
    }
    return [
        {"params": parameters, "lr": rates[role], "weight_decay": weight_decay}
        for role, parameters in groups.items()
        if parameters
    ]


def _role(parameter: str, method: str) -> str:
    """Which learning rate a parameter has: that of the "prompt", of a "map", or the "other" one."""
    if METHODS[method].family == "peft":
        return "other" if "modules_to_save" in parameter else "prompt"
    if "prompt_encoder." not in parameter:
        return "other"
    return _ROLES.get(parameter.rpartition(".")[2], "other")


def training_arguments(config: RunConfig, folder: RunFolder, metric: str) -> TrainingArguments:
    training = config.training
    arguments = TrainingArguments(
        output_dir=str(folder.checkpoints),
        max_steps=training.max_steps or -1,
        num_train_epochs=training.num_train_epochs,
        per_device_train_batch_size=training.batch_size,
        per_device_eval_batch_size=training.eval_batch_size,
        gradient_accumulation_steps=training.gradient_accumulation_steps,
        learning_rate=training.learning_rate,
        weight_decay=training.weight_decay,
        warmup_steps=training.warmup_steps,
        lr_scheduler_type=training.lr_scheduler,
        max_grad_norm=training.max_grad_norm,
        eval_strategy="steps",
        eval_steps=training.eval_steps,
        save_strategy="steps",
        save_steps=training.eval_steps,
        logging_steps=training.logging_steps,
        logging_nan_inf_filter=False,
        load_best_model_at_end=True,
        metric_for_best_model=metric,
        greater_is_better=True,
        use_cpu=default_device().type == "cpu",
        bf16=training.bf16,
        fp16=training.fp16,
        **{_CHECKPOINTING: training.gradient_checkpointing},
        optim=training.optim,
        remove_unused_columns=False,
        label_names=["labels"],
        ddp_find_unused_parameters=False,  # every parameter of an adapter takes part in every step
        ddp_broadcast_buffers=False,  # those of a frozen model stay what they are
        dataloader_pin_memory=torch.cuda.is_available(),
        accelerator_config={"non_blocking": torch.cuda.is_available()},  # from pinned memory: no wait for the copy
        disable_tqdm=True,
        report_to="none",
        restore_callback_states_from_checkpoint=training.early_stopping_patience is not None,
        seed=config.seed,
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # one process, one device: never torch's DataParallel
    return arguments
