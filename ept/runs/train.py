"""Training an adapter as a configuration says: Trainer, two learning rates, held-out scores before and after."""

from __future__ import annotations

import importlib.util
import json
import math
import statistics
import time
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from accelerate.data_loader import prepare_data_loader
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import (
    EarlyStoppingCallback,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from transformers.integrations import TensorBoardCallback

from .checkpoints import PREFIX, being_saved, delete_surplus
from ..model.compilation import check_lengths, compile_layers, uncompiled
from .processes import Processes, join
from ..utils.files import write_atomically
from ..tasks.encoding import Collator, encode_labels, encode_split
from ..utils.environment import hardware, peak_memory, versions
from .predict import evaluate
from .failures import check_finite, check_writable, explained, writing
from .stop import StopAfterStep, StopSignals
from .loading import default_device, load_tokenizer, load_untrained, task_type_of
from .method_table import METHODS
from .report import learning_curve
from .resumption import GoOn, is_over, load_result, losses_since_log
from .config import RunConfig
from .data import RunData, load_run_data
from .folder import MetricsLog, RunFolder, save_adapter
from .sampling import FILLER_LABELS, EpochLengthGroupedSampler, FillingCollator, SharedBatches

# transformers renames the argument on its way to version 6.
_CHECKPOINTING = next(
    field.name
    for field in fields(TrainingArguments)
    if field.name in ("activation_checkpointing", "gradient_checkpointing")
)
_ROLES = {"prompt": "prompt", "U": "prompt", "D": "map", "G": "map", "W_q": "map", "W_k": "map"}


@dataclass
class PreparedRun:
    """Everything that a run needs before its first step."""

    model: Any
    tokenizer: PreTrainedTokenizerBase
    task_type: str
    run_data: RunData
    processes: Processes = field(default_factory=Processes)

    def score(self, config: RunConfig, split: str, progress: str | None = None) -> dict[str, float]:
        """The task's metrics on a split, with the model as it is now."""
        data = self.run_data.data
        with uncompiled():  # evaluation has shapes of its own, each of which would be compiled
            return evaluate(
                self.model,
                self.tokenizer,
                getattr(data, split),
                data.labels,
                data.task.metrics,
                self.task_type,
                self.run_data.max_length,
                config.training.eval_batch_size,
                scoring=config.training.scoring,
                progress=progress,
                values=data.task.values,
                processes=self.processes,
            )


def prepare(config: RunConfig, processes: Processes | None = None) -> PreparedRun:
    """Loads tokenizer, data and model, with a fresh adapter; writes nothing."""
    set_seed(config.seed)  # a new classification head is drawn while loading
    task_type = task_type_of(config.model)
    tokenizer = load_tokenizer(config.model)
    run_data = load_run_data(config.data, tokenizer, task_type, config.seed)
    model = load_untrained(config, task_type, run_data.data.task.num_outputs, run_data.max_length, tokenizer)
    if config.training.compile_layers:
        compile_layers(model.get_base_model(), cuda_graphs=config.training.cuda_graphs)
    return PreparedRun(model, tokenizer, task_type, run_data, processes or Processes())


def train(config: RunConfig, *, resume: bool = False, overwrite: bool = False) -> dict[str, Any]:
    """Trains, evaluates and saves a run into `config.output_dir`; returns what `results.json` holds.

    The folder gets `config.yaml`, `metrics.jsonl`, `checkpoints/`, `adapter/`, `results.json` and
    `learning_curve.png`. The best checkpoint by the task's first metric on the validation split is the one that is
    saved and scored on the test split.

    Started by `torchrun` or `accelerate launch`, the processes share the rows of each step and of each evaluation; the
    first one writes. The weights are those of one process with as large a batch.

    Args:
        resume: continue from the last whole checkpoint (from the start where there is none).
        overwrite: delete the run that the folder holds.

    Raises:
        FileExistsError: the folder holds a run and neither argument is set.
        ValueError: the configuration or the data is wrong. Nothing has been written then.
        FloatingPointError: the loss or a parameter became infinite or NaN.
        MemoryError, OSError: there is no memory left, or a file cannot be written.
        Interrupted: SIGTERM or Ctrl-C came; the step was finished and saved.
    """
    if config.output_dir is None:
        raise ValueError("output_dir is not set: give --output DIR")
    if config.training.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise ValueError(
            "training.tensorboard needs the package tensorboard: pip install tensorboard, or set it to false"
        )
    folder = RunFolder(Path(config.output_dir))
    with StopSignals(folder) as signals, explained(config, folder):
        return _train(config, folder, signals, resume, overwrite)


def _train(config: RunConfig, folder: RunFolder, signals: StopSignals, resume: bool, overwrite: bool) -> dict[str, Any]:
    processes = join()
    processes.from_main(lambda: check_writable(folder))
    processes.from_main(lambda: folder.check(config, resume, overwrite, processes.count))
    run = processes.together(lambda: prepare(config, processes))
    data = run.run_data.data
    metric = data.task.metrics[0]
    log = MetricsLog(folder.metrics, writes=processes.main)
    recorder = Recorder(log)
    trainer = processes.together(lambda: PromptTrainer(config, run, folder, recorder))

    checkpoint = processes.from_main(lambda: folder.begin(config, resume))
    step = int(checkpoint.name.removeprefix("checkpoint-")) if checkpoint else 0
    log.keep_until(step)
    before = _score_before(log, run, config)
    if config.training.tensorboard and processes.main:
        trainer.add_callback(_tensorboard(folder))
    recorder.seconds_before = max((event.get("seconds", 0.0) for event in log.read()), default=0.0)

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    trainer.add_callback(StopAfterStep(signals, processes))
    if checkpoint is not None and is_over(checkpoint):  # it was ended while scoring, or just before
        load_result(trainer, checkpoint)
        if processes.main:
            delete_surplus(checkpoint, config.training.save_total_limit, trainer.state.best_global_step)
    else:
        if checkpoint is not None:
            trainer.add_callback(GoOn(trainer, checkpoint))
        with signals.noted(processes), trainer.progress:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    memory, memory_kind = peak_memory()
    with writing(folder.adapter):
        processes.from_main(lambda: save_adapter(run.model, folder.adapter))
    after = run.score(config, "test", progress="scoring the trained adapter")

    results = {
        "method": config.method.name,
        "model": config.model.name_or_path,
        "task": data.task.name,
        "metric": metric,
        "score": after[metric],
        "score_before": before.get(metric),
        "majority": data.majority(),
        "seed": config.seed,
        "steps": trainer.state.global_step,
        "best_step": trainer.state.best_global_step,
        "best_validation": trainer.state.best_metric,
        "train_seconds": recorder.seconds(),
        "step_time_ms": recorder.step_time_ms(),
        "peak_memory_bytes": max(processes.gather(memory)),
        "peak_memory_kind": memory_kind,
        "processes": processes.count,
        "global_batch_size": config.training.batch_size * config.training.gradient_accumulation_steps * processes.count,
        "trainable_parameters": run.model.get_nb_trainable_parameters()[0],
        "test_metrics": after,
        "test_metrics_before": before,
        "rows": {name: len(getattr(data, name)) for name in ("train", "validation", "test")},
        "truncation_rate": run.run_data.truncation_rate,
        "max_length": run.run_data.max_length,
        "versions": versions(),
        "hardware": hardware(),
        "config": config.to_dict(),
    }
    if processes.main:
        _write_results(results, folder, log)
    processes.leave()
    return results


def _write_results(results: dict[str, Any], folder: RunFolder, log: MetricsLog) -> None:
    metric, before = results["metric"], results["test_metrics_before"]
    learning_curve(
        log.read(),
        folder.curve,
        metric=metric,
        majority=results["majority"],
        title=f"{METHODS[results['method']].title} on {results['task']}: "
        f"{results['trainable_parameters']:,} parameters",
        test=[
            *([(0, before[metric])] if before else []),
            (results["best_step"] or results["steps"], results["score"]),
        ],
    )
    write_atomically(folder.results, json.dumps(results, indent=2) + "\n")


def _score_before(log: MetricsLog, run: PreparedRun, config: RunConfig) -> dict[str, float]:
    """Test metrics of the untrained adapter, if wanted; a resumed run reads them from its log."""
    if not config.training.score_before:
        return {}
    logged = run.processes.from_main(lambda: [event["before"] for event in log.read() if "before" in event])
    if logged:
        return logged[0]
    before = run.score(config, "test", progress="scoring the untrained adapter")
    log.append({"step": 0, "before": before})
    return before


def _tensorboard(folder: RunFolder) -> TrainerCallback:
    from torch.utils.tensorboard import SummaryWriter

    return TensorBoardCallback(SummaryWriter(log_dir=str(folder.tensorboard)))


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
        scores = self.run.score(self.run_config, "validation")
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in scores.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


def collator(config: RunConfig, run: PreparedRun) -> Collator:
    """Makes the batches as the configuration's options of the step say."""
    training = config.training
    answer_tokens = 0
    if training.pad_to_multiple_of is not None and run.task_type != "SEQ_CLS":
        answers = encode_labels(run.tokenizer, run.run_data.data.labels, run.task_type)
        answer_tokens = max(len(answer) for answer in answers)
    return Collator(
        run.task_type,
        int(run.tokenizer.pad_token_id),
        pad_to_multiple_of=training.pad_to_multiple_of,
        answer_tokens=answer_tokens,
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


class Recorder(TrainerCallback):
    """Writes every log event to `metrics.jsonl` and measures the time of the steps.

    On a GPU the clock stops only where the Trainer logs, after a synchronisation, and the steps in between share the
    time; on a CPU each step is timed alone.
    """

    def __init__(self, log: MetricsLog) -> None:
        self.file = log
        self.seconds_before = 0.0
        self.started: float | None = None
        self.ended: float | None = None
        self.step_started: float | None = None
        self.steps_open = 0
        self.step_times: list[float] = []
        self.rates: list[float] = []

    def seconds(self) -> float:
        """Wall time of the training loop with its evaluations, over all sittings of a resumed run."""
        if self.started is None:
            return self.seconds_before
        return self.seconds_before + (self.ended or time.perf_counter()) - self.started

    def step_time_ms(self) -> float | None:
        """Median over the steps of this sitting; None when there was none."""
        return statistics.median(self.step_times) * 1e3 if self.step_times else None

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.started = time.perf_counter()

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.ended = time.perf_counter()

    def on_step_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.step_started is None:
            self.step_started = time.perf_counter()

    def on_pre_optimizer_step(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.rates = [group["lr"] for group in kwargs["optimizer"].param_groups]

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step >= state.max_steps:
            control.should_log = control.should_evaluate = True
        self.steps_open += 1
        on_gpu = args.device.type == "cuda"
        if self.step_started is None or (on_gpu and not (control.should_log or control.should_evaluate)):
            return
        if on_gpu:
            torch.cuda.synchronize()
        elapsed = time.perf_counter() - self.step_started
        self.step_times += [elapsed / self.steps_open] * self.steps_open
        self.step_started, self.steps_open = None, 0

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any) -> None:
        if "train_runtime" in logs:  # the Trainer's closing summary
            return
        event = {"step": state.global_step, "seconds": round(self.seconds(), 3), **logs}
        if "loss" in logs:
            event["learning_rate"] = self.rates[0]
            event["low_rank_learning_rate"] = self.rates[-1]
            if not math.isfinite(logs["loss"]):
                raise FloatingPointError(
                    f"the loss became {logs['loss']} by step {state.global_step}: lower training.learning_rate "
                    f"({args.learning_rate}) or training.low_rank_learning_rate, or add training.warmup_steps"
                )
        self.file.append(event)


class ProgressBar(TrainerCallback):
    """A bar with loss, score and remaining time on standard error; without a terminal, one line an evaluation."""

    def __init__(self, metric: str, shown: bool = True) -> None:
        self.metric = metric
        self.console = Console(stderr=True, quiet=not shown)
        self.loss = self.score = ""
        self.bar: Progress | None = None

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, *exception: Any) -> None:
        if self.bar is not None:
            self.bar.stop()

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if not self.console.is_terminal or self.console.quiet:
            return
        columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        self.bar = Progress(TextColumn("{task.description}"), *columns, console=self.console)
        self.task = self.bar.add_task("training", total=state.max_steps, completed=state.global_step)
        self.bar.start()

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.update(self.task, completed=state.global_step)

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any) -> None:
        if "loss" in logs:
            self.loss = f"loss {logs['loss']:.4f}"
        if f"eval_{self.metric}" in logs:
            self.score = f"{self.metric} {logs[f'eval_{self.metric}']:.3f}"
            if self.bar is None:
                self.console.print(f"step {state.global_step}/{state.max_steps}  {self.loss}  {self.score}")
        if self.bar is not None:
            self.bar.update(self.task, description=f"training  {self.loss}  {self.score}")
