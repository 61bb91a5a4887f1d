"""Checks of whole runs: saved weights, the log, the first step's gradients, a run killed midway."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from transformers import TrainerCallback

from ept.runs.config import RunConfig
from ept.runs.folder import MetricsLog, RunFolder
from ept.runs.train import prepare, train
from ept.runs.trainer import PromptTrainer


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(folder / "adapter_model.safetensors")


def assert_same_weights(first: Path, second: Path) -> None:
    one, two = weights(first), weights(second)
    assert one.keys() == two.keys()
    different = [name for name in one if not torch.equal(one[name], two[name])]
    assert not different, f"{different} differ between {first} and {second}"


def events(run: Path) -> list[dict[str, Any]]:
    """Reads the log, without the clock."""
    return [{k: v for k, v in e.items() if k != "seconds"} for e in MetricsLog(run / "metrics.jsonl").read()]


def losses(run: Path) -> list[float]:
    return [event["loss"] for event in events(run) if "loss" in event]


@dataclass
class Step:
    """The first optimiser step of a run: gradients and logged loss."""

    gradients: dict[str, torch.Tensor]
    loss: float


def first_step(config: RunConfig, folder: Path, batch_size: int = 8, accumulation: int = 1) -> Step:
    """Takes one step away from the start, where most gradients are zero."""
    config.training.batch_size, config.training.gradient_accumulation_steps = batch_size, accumulation
    found: dict[str, torch.Tensor] = {}

    class Grab(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            model = kwargs["model"]
            found.update({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})

    run = prepare(config)
    with torch.no_grad():
        for parameter in run.model.prompt_encoder.parameters():
            parameter.add_(
                torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel())) * 0.1
            )
    folder.mkdir()
    trainer = PromptTrainer(config, run, RunFolder(folder))
    trainer.add_callback(Grab())
    trainer.train()
    (loss,) = losses(folder)
    return Step(found, loss)


def assert_same_step(actual: Step, expected: Step) -> None:
    """Compares gradients, all of which must be above zero, and losses, up to rounding."""
    assert actual.gradients.keys() == expected.gradients.keys()
    assert len(expected.gradients) >= 7
    for name, gradient in expected.gradients.items():
        largest = float(gradient.abs().max())
        assert largest > 0, name
        torch.testing.assert_close(actual.gradients[name], gradient, rtol=1e-4, atol=1e-5 * largest, msg=name)
    assert actual.loss == pytest.approx(expected.loss, rel=1e-5)


class Killed(Exception):
    pass


def break_at(step: int, error: Exception, patch: pytest.MonkeyPatch) -> None:
    """Makes training raise `error` at the start of batch number `step`, counted from now on."""
    take, calls = PromptTrainer.training_step, 0

    def breaking(self: PromptTrainer, *args: Any, **kwargs: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == step:
            raise error
        return take(self, *args, **kwargs)

    patch.setattr(PromptTrainer, "training_step", breaking)


def kill(config: RunConfig, step: int) -> None:
    """Trains until the start of batch number `step`, where the run dies."""
    with pytest.MonkeyPatch.context() as patch:
        break_at(step, Killed(), patch)
        with pytest.raises(Killed):
            train(config)
