"""The Trainer of a run: its arguments, the batches of a step, and learning rates by kind of parameter."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from accelerate.data_loader import prepare_data_loader
from torch.utils.data import BatchSampler, Sampler, WeightedRandomSampler
from transformers import EarlyStoppingCallback, PrinterCallback, Trainer, TrainerControl, TrainingArguments
from transformers.trainer_pt_utils import LengthGroupedSampler

from ..model.compilation import check_lengths
from ..tasks.encoding import IGNORE, WEIGHT, WEIGHTS, Collator, encode_split
from .callbacks import ProgressBar, Recorder, WholeCheckpoints
from .class_weights import added_loss, row_weights
from .config import RunConfig
from .failures import divergence_advice
from .folder import MetricsLog, RunFolder
from .loading import default_device
from .method_table import METHODS
from .processes import Processes
from .regression import in_units_of, last_layer, unit_of
from .schedules import schedules

if TYPE_CHECKING:
    from .train import PreparedRun

# transformers renames the argument on its way to version 6.
_CHECKPOINTING = "activation_checkpointing"
if not hasattr(TrainingArguments, _CHECKPOINTING):
    _CHECKPOINTING = "gradient_checkpointing"
# Settings with the same name in TrainingArguments.
SAME_NAME = {
    *("num_train_epochs", "gradient_accumulation_steps", "learning_rate", "weight_decay", "warmup_steps"),
    *("max_grad_norm", "eval_steps", "logging_steps", "bf16", "fp16", "optim"),
}
FILLER_LABELS = "filler_labels"
HEAD_STEP = 4.0
"""The most by which a step of Adam moves a head's output, for inputs of magnitude one."""
COLLAPSED_AFTER = 2
"""Number of successive constant evaluations before a warning says what to change."""


class PromptTrainer(Trainer):
    """Trainer with learning rates by kind of parameter, and the task's own score."""

    optimizer: torch.optim.Optimizer | None
    control: TrainerControl

    def __init__(self, config: RunConfig, run: PreparedRun, folder: RunFolder) -> None:
        self.run_config, self.run, self.folder = config, run, folder
        self.recorder = Recorder(config, MetricsLog(folder.metrics, writes=run.processes.is_rank_zero))
        data, training = run.run_data.data, config.training
        patience, multiple = training.early_stopping_patience, training.pad_to_multiple_of
        encoded = encode_split(
            data.train,
            run.tokenizer,
            data.labels,
            run.task_type,
            max_answer=config.data.max_answer,
            spaced=not data.task.is_chat,
            outputs=run.outputs,
        )
        self.unit = None  # of the numbers in a regression with a classifier's head
        if run.task_type == "SEQ_CLS" and data.task.values:
            self.unit = unit_of(encoded["labels"][:])
        if training.class_weights:
            encoded = encoded.add_column(WEIGHT, row_weights(data.train["label"][:]))
        if training.compile_layers and multiple is not None:
            check_lengths(max(encoded["length"]), multiple)
        collator = Collator(
            run.task_type,
            int(run.tokenizer.pad_token_id),
            pad_to_multiple_of=multiple,
            answer_tokens=max(map(len, run.answers), default=0) if multiple is not None else 0,
            label_only_logits=training.label_only_logits,
        )
        self.constant_evaluations = 0  # in succession
        self.progress = ProgressBar(data.task.metrics[0], shown=run.processes.is_rank_zero)
        super().__init__(
            model=run.model,
            args=training_arguments(config, folder, metric=data.task.metrics[0]),
            train_dataset=encoded,
            eval_dataset=data.validation,
            data_collator=collator,
            callbacks=[
                self.recorder,
                self.progress,
                *([EarlyStoppingCallback(early_stopping_patience=patience)] if patience is not None else []),
            ],
        )
        self.add_callback(WholeCheckpoints(self))
        self.remove_callback(PrinterCallback)  # it prints to standard output
        # EPTModel.forward divides by num_items_in_batch for every model, whatever the base model's signature.
        self.model_accepts_loss_kwargs = True

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        if self.run_config.training.balanced_sampling:
            return BalancedSampler(list(self.run.run_data.data.train["label"]), self.run_config.seed)
        if not self.run_config.training.group_by_length:
            return super()._get_train_sampler(train_dataset)
        rows = self.args.train_batch_size * self.args.world_size * self.args.gradient_accumulation_steps
        lengths = list((train_dataset or self.train_dataset)["length"])
        return EpochLengthGroupedSampler(rows, lengths, self.run_config.seed)

    def get_train_dataloader(self) -> Any:
        if self.run.processes.world_size == 1:
            return super().get_train_dataloader()
        rows: Any = self.train_dataset
        loader = torch.utils.data.DataLoader(
            rows,
            batch_sampler=SharedBatches(self._get_train_sampler(), self.args.train_batch_size, self.run.processes),
            collate_fn=partial(collate_share, self.data_collator, rows[0]),
            pin_memory=self.args.dataloader_pin_memory,
        )
        return prepare_data_loader(  # as for a single process: the batches are already shares
            loader,
            device=self.accelerator.device,
            num_processes=1,
            process_index=0,
            put_on_device=True,
            use_seedable_sampler=True,
            non_blocking=torch.cuda.is_available(),
        )

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        """Counts a regression's rows, including labels of -100, which the Trainer would leave out."""
        counted = [
            {**batch, "labels": torch.zeros_like(batch["labels"])} if batch["labels"].is_floating_point() else batch
            for batch in batch_samples
        ]
        return super()._get_num_items_in_batch(counted, device)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        filler, weights = inputs.pop(FILLER_LABELS, None), inputs.pop(WEIGHTS, None)
        given = inputs if filler is None else {**inputs, "labels": filler}
        loss, outputs = super().compute_loss(model, given, True, num_items_in_batch)
        if weights is not None:
            shifted = self.run.task_type == "CAUSAL_LM"
            added = added_loss(outputs["logits"], given["labels"], weights, num_items_in_batch, shifted)
            # The gradients are averaged over the ranks, but `num_items_in_batch` counts the labels of all ranks.
            loss = loss + added * (self.run.processes.world_size if num_items_in_batch is not None else 1)
        if self.unit is not None:
            loss = loss / self.unit**2
        loss = loss if filler is None else loss * 0.0
        return (loss, outputs) if return_outputs else loss

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            model = model or self.model
            optimizer, options = self.get_optimizer_cls_and_kwargs(self.args, model)
            training, method = self.run_config.training, self.run_config.method.name
            rates = (training.learning_rate, training.low_rank_learning_rate, training.weight_decay)
            groups = parameter_groups(model, *rates, method, training.head_learning_rate)
            if self.unit is not None and (layer := last_layer(model)) is not None:
                groups = in_units_of(self.unit, layer, groups)
            self.optimizer = optimizer(groups, **options)
        return self.optimizer

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        evaluation = self.run.evaluate(self.run.run_data.data.validation)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in evaluation.metrics.items()}
        metrics[f"{metric_key_prefix}_largest_share"] = max(evaluation.shares.values())  # share of the commonest answer
        self.constant_evaluations = self.constant_evaluations + 1 if evaluation.is_constant else 0
        self.progress.note = evaluation.constancy() or ""
        if self.constant_evaluations >= COLLAPSED_AFTER:
            times = f"in {self.constant_evaluations} evaluations one after the other"
            self.progress.note += f", {times}: {divergence_advice(self.run_config)}"
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


class _EpochSampler(Sampler[int]):
    """A sampler whose order within an epoch depends only on its seed and the epoch's number.

    The samplers it is mixed into draw from the global generator, whose state at the start of an epoch is unknown to a
    run that resumes within it.
    """

    seed: int
    epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Receives the number of the epoch from the data loader."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        self.generator = torch.Generator().manual_seed(self.seed + self.epoch)
        return super().__iter__()


class EpochLengthGroupedSampler(_EpochSampler, LengthGroupedSampler):
    """Sampler that puts rows of similar length next to each other.

    Args:
        batch_size: rows of an optimizer step, over all ranks.
        lengths: tokens of every row.
    """

    def __init__(self, batch_size: int, lengths: list[int], seed: int) -> None:
        super().__init__(batch_size, lengths=lengths)
        self.seed = seed


class BalancedSampler(_EpochSampler, WeightedRandomSampler):
    """Sampler that draws every label equally often on average.

    Rows of rare labels are drawn several times per epoch, others not in every epoch.

    Args:
        labels: of every row.
    """

    def __init__(self, labels: list[int], seed: int) -> None:
        super().__init__(row_weights(labels), len(labels))
        self.seed = seed


class SharedBatches(BatchSampler):
    """A rank's share of each batch, where the batches are those of a single process with an equally large batch size.

    accelerate hands out whole batches in turn, and completes the last round of an epoch with rows from its beginning.
    Here, a last batch with fewer rows than ranks leaves some ranks an empty list.

    Args:
        sampler: the order of the rows, the same on every rank.
        batch_size: rows of a share.
    """

    def __init__(self, sampler: Any, batch_size: int, processes: Processes) -> None:
        self.batch_sampler = BatchSampler(sampler, batch_size * processes.world_size, drop_last=False)
        self.sampler = sampler  # the data loader passes the epoch to it
        self.batch_size, self.drop_last, self.processes = batch_size, False, processes

    def __iter__(self) -> Iterator[list[int]]:
        return (list(self.processes.share(batch)) for batch in self.batch_sampler)

    def __len__(self) -> int:
        return len(self.batch_sampler)


def collate_share(collate: Callable[[Any], dict[str, Any]], filler: dict[str, Any], rows: Any) -> dict[str, Any]:
    """Collates a rank's share of a batch; an empty share becomes a batch of the row `filler`, which does not count.

    Its labels are all -100; the true ones, which the model is still called with, are kept beside them.
    """
    if rows:
        return collate(rows)
    batch = collate([filler])
    no_labels = torch.full_like(batch["labels"], IGNORE, dtype=torch.long)  # a float -100 would count
    return {**batch, "labels": no_labels, FILLER_LABELS: batch["labels"]}


def parameter_groups(
    model: torch.nn.Module,
    learning_rate: float,
    low_rank_learning_rate: float,
    weight_decay: float = 0.0,
    method: str = "ept",
    head_learning_rate: float | None = None,
) -> list[dict[str, Any]]:
    """Makes the optimizer's parameter groups, each with a rate that fits what a step of Adam does to the embeddings.

    * `prompt` and `U`, which have the units of the prompt: `learning_rate`;
    * the maps `D`, `G`, `W_q`, `W_k`: `low_rank_learning_rate`/√d. A step changes each of a column's d entries by about
      the rate, and they add up: at the full rate the gate saturates within some tens of steps;
    * heads and other trained parts of the model: `head_learning_rate`, or by default `HEAD_STEP` over the input width
      of the first matrix, for the same reason;
    * all others (`A`, `B`, `beta`): `low_rank_learning_rate`.

    Related methods' other parameters follow `Method.roles`. PEFT's methods: the whole adapter at `learning_rate`.
    """
    groups: dict[str, list[torch.nn.Parameter]] = {"prompt": [], "map": [], "head": [], "other": []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[METHODS[method].role(name)].append(parameter)
    maps = groups["map"]  # [d, …] each
    read = next((head.shape[-1] for head in groups["head"] if head.dim() > 1), 1)
    rates = {
        "prompt": learning_rate,
        "map": low_rank_learning_rate / math.sqrt(maps[0].shape[0]) if maps else 0.0,
        "head": HEAD_STEP / read if head_learning_rate is None else head_learning_rate,
        "other": low_rank_learning_rate,
    }
    return [
        {"params": parameters, "lr": rates[role], "weight_decay": weight_decay, "role": role}
        for role, parameters in groups.items()
        if parameters
    ]


def training_arguments(config: RunConfig, folder: RunFolder, metric: str) -> TrainingArguments:
    training = config.training
    arguments = TrainingArguments(
        output_dir=str(folder.checkpoints),
        max_steps=training.max_steps or -1,
        **training.model_dump(include=SAME_NAME),
        per_device_train_batch_size=training.batch_size,
        per_device_eval_batch_size=training.eval_batch_size,
        lr_scheduler_type=training.lr_scheduler,
        lr_scheduler_kwargs=schedules()[training.lr_scheduler].options,
        eval_strategy="steps",
        save_strategy="steps",
        save_steps=training.eval_steps,
        logging_nan_inf_filter=False,
        load_best_model_at_end=True,
        metric_for_best_model=metric,
        greater_is_better=True,
        use_cpu=default_device().type == "cpu",
        **{_CHECKPOINTING: training.gradient_checkpointing},
        remove_unused_columns=False,
        label_names=["labels"],
        ddp_find_unused_parameters=False,  # every parameter of an adapter takes part in every step
        ddp_broadcast_buffers=False,  # a frozen model's buffers do not change
        dataloader_pin_memory=torch.cuda.is_available(),
        accelerator_config={"non_blocking": torch.cuda.is_available()},  # copies from pinned memory need no wait
        disable_tqdm=True,
        report_to=list(training.report_to) or "none",
        run_name=folder.path.name,
        restore_callback_states_from_checkpoint=training.early_stopping_patience is not None,
        seed=config.seed,
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # one process, one device: never torch's DataParallel
    return arguments
