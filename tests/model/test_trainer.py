"""The Trainer that people know, without this project's command line: checkpoints, resuming, evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import DECODERS, ONE_A_TASK, SMALL, make_batch, make_model
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer, TrainerCallback, TrainingArguments

from ept import EPTConfig, get_ept_model


class Rows(torch.utils.data.Dataset):
    """Single rows of one fixed batch."""

    def __init__(self, name: str, count: int = 16) -> None:
        lengths = tuple(3 + i % 6 for i in range(count))
        self.batch = make_batch(name, lengths, "left" if name in DECODERS else "right")
        if name == "t5":  # labels of unequal number, where a mean of means would differ
            for row in range(count):
                self.batch["labels"][row, 1 + row % 3 :] = -100

    def __len__(self) -> int:
        return len(self.batch["input_ids"])

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {name: values[index] for name, values in self.batch.items()}


class Stop(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        control.should_training_stop = state.global_step >= self.step
        return control


def make_trainer(name: str, folder: Path, trainer_class: Any = Trainer, callbacks: Any = None, **arguments: Any) -> Any:
    arguments = {
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.01,
        "save_steps": 3,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 3,
        **arguments,
    }
    arguments_class = Seq2SeqTrainingArguments if trainer_class is Seq2SeqTrainer else TrainingArguments
    model = get_ept_model(make_model(name), EPTConfig(**SMALL))
    return trainer_class(
        model,
        arguments_class(output_dir=str(folder), **arguments),
        train_dataset=Rows(name),
        eval_dataset=Rows(name, 5),
        callbacks=callbacks,
    )


def adapter_of(trainer: Any) -> dict[str, torch.Tensor]:
    parameters = trainer.model.named_parameters()
    return {n: p.detach().clone() for n, p in parameters if "prompt_encoder" in n or "modules_to_save" in n}


@pytest.mark.parametrize("name", ONE_A_TASK)
def test_checkpoint_holds_only_the_adapter_and_resumes_bit_for_bit(name, tmp_path):
    whole = make_trainer(name, tmp_path / "whole")
    whole.train()
    stopped = make_trainer(name, tmp_path / "stopped", callbacks=[Stop(3)])
    stopped.train()
    checkpoint = tmp_path / "stopped" / "checkpoint-3"
    names = {path.name for path in checkpoint.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= names
    assert not names & {"model.safetensors", "pytorch_model.bin"}
    assert (checkpoint / "adapter_model.safetensors").stat().st_size < 25_000
    resumed = make_trainer(name, tmp_path / "stopped")
    resumed.train(resume_from_checkpoint=str(checkpoint))
    expected, actual = adapter_of(whole), adapter_of(resumed)
    assert all(torch.equal(actual[n], expected[n]) for n in expected)
    assert not all(torch.equal(adapter_of(stopped)[n], expected[n]) for n in expected)


@pytest.mark.parametrize("name", ONE_A_TASK)
def test_accumulated_small_batches_give_the_gradient_of_the_large_one(name, tmp_path):
    """1×8 and 4×2; T5's and BERT's own losses drop Trainer's count and would come out several times too large."""
    gradients = []
    for batch_size, accumulation in ((8, 1), (2, 4)):
        trainer = make_trainer(
            name,
            tmp_path,
            max_steps=1,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            max_grad_norm=0.0,
            save_strategy="no",
            optim="sgd",
            lr_scheduler_type="constant",
            learning_rate=1.0,
        )
        before = adapter_of(trainer)
        trainer.train()
        after = adapter_of(trainer)
        loss = torch.tensor(trainer.state.log_history[-1]["train_loss"])
        gradients.append({"loss": loss, **{n: before[n] - after[n] for n in before}})
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


def test_best_checkpoint_is_restored(tmp_path):
    """ "Best" is the highest loss here, so that it is not simply the last checkpoint."""
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True}
    trainer = make_trainer("llama", tmp_path, eval_strategy="steps", eval_steps=2, save_steps=2, **best)
    trainer.train()
    losses = {entry["step"]: entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry}
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")
    assert losses[2] > losses[4] > losses[6]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(losses[2], rel=1e-6)


def test_seq2seq_trainer_predicts_with_generate(tmp_path):
    trainer = make_trainer("t5", tmp_path, Seq2SeqTrainer, predict_with_generate=True, max_steps=1)
    trainer.train()
    rows = Rows("t5", 5)
    predictions = trainer.predict(rows, max_new_tokens=4).predictions
    inputs = {k: rows.batch[k] for k in ("input_ids", "attention_mask")}
    expected = trainer.model.generate(**inputs, max_new_tokens=4)
    assert predictions[:, : expected.shape[1]].tolist() == expected.tolist()


def test_gradient_checkpointing_gives_the_same_weights(tmp_path):
    weights = []
    for checkpointing in (False, True):
        trainer = make_trainer("llama", tmp_path, gradient_checkpointing=checkpointing, save_strategy="no")
        trainer.train()
        weights.append(adapter_of(trainer))
    torch.testing.assert_close(*weights)


@pytest.mark.parametrize("name", ONE_A_TASK)
def test_label_smoothing_is_refused(name, tmp_path):
    """The Trainer takes the labels out for it, and for a custom loss function, which works."""
    with pytest.raises(ValueError, match="label_smoothing_factor does not work with prompts"):
        make_trainer(name, tmp_path / "smoothed", label_smoothing_factor=0.1, max_steps=1).train()


def test_a_loss_function_of_ones_own_is_that_of_the_model(tmp_path):
    def loss_of(outputs, labels, num_items_in_batch=None):
        return torch.nn.functional.cross_entropy(outputs.logits, labels, reduction="sum") / num_items_in_batch

    usual, own = (make_trainer("bert", tmp_path / name, logging_steps=1) for name in ("usual", "own"))
    own.compute_loss_func = loss_of
    usual.train()
    own.train()
    losses = [[event["loss"] for event in trainer.state.log_history if "loss" in event] for trainer in (usual, own)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
