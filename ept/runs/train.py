"""Training an adapter, from the configuration to results with scores before and after."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerState, set_seed
from transformers.integrations import TensorBoardCallback

from ..embedding import check_vocabulary
from ..model.compilation import compile_layers
from ..tasks import TaskData
from ..tasks.drawing import SPLITS
from ..tasks.encoding import TEXT_IDS
from ..tasks.rows import NUMBER
from ..utils.environment import hardware, peak_memory, versions
from ..utils.files import json_record, write_atomically
from .adapters import load_untrained, stored_parameters
from .callbacks import locate_best
from .class_weights import check_has_classes
from .config import RunConfig
from .cpu import keep_freed_memory
from .data import OwnRows, RunData, load_run_data, max_length_of, resolved, task_of, with_fitted_texts
from .failures import check_writable, with_advice, writing
from .folder import RunFolder, is_over, save_adapter
from .loading import default_device, has_new_head, head_order, load_tokenizer, task_type_of, weights_of
from .predict import Predictor
from .processes import Processes, join
from .regression import start_below
from .report import write_report
from .stop import StopSignals
from .trainer import PromptTrainer

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class PreparedRun(Predictor):
    """A predictor with a fresh adapter, and the data to train and score it on."""

    run_data: RunData


def prepare(config: RunConfig, processes: Processes | None = None, rows: OwnRows | None = None) -> PreparedRun:
    """Loads tokenizer, data, and model with a fresh adapter; writes nothing. `rows` as in `load_run_data`."""
    set_seed(config.seed)  # a new classification head is drawn while loading
    task_type = task_type_of(config.model)
    tokenizer = load_tokenizer(config.model)
    run_data = load_run_data(config.data, tokenizer, task_type, config.seed, rows)
    task = run_data.data.task
    if config.training.class_weights:
        check_has_classes(task)
    model = load_untrained(config, task_type, task, max_length_of(config.data, task), tokenizer)
    if task_type == "SEQ_CLS" and task.values and has_new_head(config.model, task.num_outputs):
        start_below(model, run_data.data.train[NUMBER][:])
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError("there is nothing to train: give the method prompt tokens (method.num_virtual_tokens)")
    if config.training.compile_layers:
        compile_layers(model.get_base_model(), cuda_graphs=config.training.cuda_graphs)
    parts: Any = {"task": task, "task_type": task_type, "tokenizer": tokenizer, "model": model}
    run = PreparedRun(config=config, run_data=run_data, processes=processes or Processes(), **parts)
    if run.max_length < (given := max_length_of(config.data, task)):
        message = "the model has positions for %d tokens of text: this is the limit, not data.max_length=%d"
        logger.warning(message, run.max_length, given)
        run_data.data, run_data.truncation_rate = with_fitted_texts(run_data.data, run.fit)
    _check_texts(run, run_data.data)
    return run


def _check_texts(run: PreparedRun, data: TaskData) -> None:
    """Refuses texts with token ids beyond the model's embedding. Otherwise the first would turn up in the middle of
    training, where an accelerator makes NaN of it.
    """
    largest = max(max(ids, default=0) for split in SPLITS for ids in getattr(data, split)[TEXT_IDS])
    check_vocabulary(torch.tensor([largest], device="cpu"), run.rows_of_table())


def with_data(config: RunConfig, rows: OwnRows) -> RunConfig:
    """Returns the configuration with whatever `ept.runs.data.resolved` infers from the rows.

    Adds the order of the labels in a trained head, if it differs from the task's.
    """
    task_type, data, model = task_type_of(config.model), config.data, config.model
    if data.is_local:
        data = resolved(data, task_type, rows)
    if task_type == "SEQ_CLS" and model.head_labels is None and data.chat_column is None:
        task = task_of(data)
        if not task.values and not task.is_text:
            model = model.model_copy(update={"head_labels": head_order(model, task.label_words)})
    return config.model_copy(update={"data": data, "model": model})


def train(
    config: RunConfig,
    *,
    resume: bool = False,
    overwrite: bool = False,
    on_ready: Callable[[PreparedRun], None] = lambda run: None,
) -> dict[str, Any]:
    """Trains, evaluates and saves a run into `config.output_dir`; returns the content of `results.json`.

    The folder gets `config.yaml`, `splits.json` (which rows are in which split), `metrics.jsonl`, `checkpoints/`,
    `adapter/`, `results.json`, and `report.md` with `learning_curve.png` and `confusion.png`. The best checkpoint, by
    the task's first metric on the validation split, is saved and scored on the test split.

    Under `torchrun` or `accelerate launch`, the ranks share the rows of each step and each evaluation, and rank 0
    writes. The weights are those of a single process with an equally large batch.

    Args:
        resume: continue from the last complete checkpoint (from the start if there is none). If `training.max_steps` is
            larger than the run's, finished or not, it is trained on, with the learning-rate schedule of the new number
            of steps from that point.
        overwrite: delete the run that the folder holds.
        on_ready: called on rank 0 with the prepared run, before the folder is touched.

    Raises:
        FileExistsError: the folder holds a run and neither argument is set.
        ValueError: the configuration or the data is wrong. Nothing has been written then.
        FloatingPointError: the loss or a parameter became NaN or infinite.
        MemoryError, OSError: there is no memory left, or a file cannot be written.
        Interrupted: SIGTERM or Ctrl-C came; the step was finished and saved.
    """
    if config.output_dir is None:
        raise ValueError("output_dir is not set: give --output DIR")
    wanted: dict[str, str] = {name: f"training.report_to={name}" for name in config.training.report_to}
    wanted |= {"tensorboard": "training.tensorboard"} if config.training.tensorboard else {}
    for package, key in wanted.items():
        if importlib.util.find_spec(package) is None:
            raise ValueError(f"{key} needs the package {package}: pip install {package}, or leave it out")
    folder, processes, rows = RunFolder(Path(config.output_dir)), join(), OwnRows()
    folder.holds_other = not resume
    with StopSignals(folder, processes) as signals, with_advice(config, folder):
        processes.from_rank_zero(lambda: check_writable(folder.path))
        config = processes.from_rank_zero(lambda: with_data(config, rows))
        return _train(config, rows, folder, signals, resume, overwrite, on_ready)


def _train(
    config: RunConfig,
    rows: OwnRows,
    folder: RunFolder,
    signals: StopSignals,
    resume: bool,
    overwrite: bool,
    on_ready: Callable[[PreparedRun], None],
) -> dict[str, Any]:
    processes = signals.processes
    if default_device().type == "cpu":
        keep_freed_memory()
    processes.from_rank_zero(lambda: folder.check(config, resume, overwrite, processes.world_size))
    trainer = processes.together(lambda: PromptTrainer(config, prepare(config, processes, rows), folder))
    trainer.add_callback(signals)
    run, recorder, log = trainer.run, trainer.recorder, trainer.recorder.log

    drawn = run.run_data.data.drawn()
    if resume:
        processes.from_rank_zero(lambda: folder.check_splits(drawn))
    if processes.is_rank_zero:
        on_ready(run)
    more = resume and processes.from_rank_zero(lambda: folder.wants_more_steps(config))
    folder.holds_other = False
    checkpoint = processes.from_rank_zero(lambda: folder.begin(config, resume))
    if processes.is_rank_zero:
        write_atomically(folder.splits, json_record(drawn))
    before: dict[str, float] = {}  # scores of the untrained adapter; a resumed run reads them from its log
    if config.training.score_before:
        logged = processes.from_rank_zero(lambda: [event["before"] for event in log.read() if "before" in event])
        before = logged[0] if logged else run.score(run.run_data.data.test, progress="scoring the untrained adapter")
        if not logged:
            log.append({"step": 0, "before": before})
    if config.training.tensorboard and processes.is_rank_zero:
        from torch.utils.tensorboard import SummaryWriter

        trainer.add_callback(TensorBoardCallback(SummaryWriter(log_dir=str(folder.tensorboard))))
    recorder.seconds_before = max((event.get("seconds", 0.0) for event in log.read()), default=0.0)

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with writing(folder, processes.is_rank_zero):
        if checkpoint and is_over(checkpoint) and not more:  # it was stopped during or just before scoring
            state = trainer.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
            locate_best(state, folder)
            trainer._load_from_checkpoint(state.best_model_checkpoint or str(checkpoint))
        else:
            with trainer.progress.bar:
                trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        memory, memory_kind = peak_memory()
        processes.from_rank_zero(lambda: save_adapter(run.model, folder.adapter))
    evaluation = run.evaluate(run.run_data.data.test, progress="scoring the trained adapter")

    data, training = run.run_data.data, config.training
    after, majority = evaluation.metrics, data.majority()
    metric, batch = data.task.metrics[0], training.batch_size * training.gradient_accumulation_steps
    results = {
        "method": config.method.name,
        "model": config.model.name_or_path,
        **weights_of(run.model.get_base_model()),
        "task": data.task.name,
        "metric": metric,
        "score": after[metric],
        "score_before": before.get(metric),
        "majority": majority,
        "verdict": evaluation.verdict(majority),
        **evaluation.summary(),
        "seed": config.seed,
        "steps": trainer.state.global_step,
        "best_step": trainer.state.best_global_step,
        "best_validation": trainer.state.best_metric,
        "train_seconds": recorder.seconds(),
        "step_time_ms": recorder.step_time_ms(),
        "peak_memory_bytes": max(processes.gather(memory)),
        "peak_memory_kind": memory_kind,
        "processes": processes.world_size,
        "global_batch_size": batch * processes.world_size,
        "stored_parameters": stored_parameters(run.model),
        "trainable_parameters": run.model.get_nb_trainable_parameters()[0],
        "test_metrics": after,
        "test_metrics_before": before,
        "rows": {name: len(getattr(data, name)) for name in SPLITS},
        "truncation_rate": run.run_data.truncation_rate,
        **({"cut_answers": run.run_data.cut_answers} if data.task.is_text else {}),
        "max_length": run.max_length,
        "versions": versions(),
        "hardware": hardware(),
        "config": config.to_dict(),
    }
    if processes.is_rank_zero:
        write_report(results, evaluation, data, log.read(), folder)
        write_atomically(folder.results, json_record(results, indent=2))
    processes.leave()
    return results
