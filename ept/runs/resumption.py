"""Going on from a checkpoint as if nothing had happened: what the Trainer does not restore by itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState

from .checkpoints import PREFIX, read_seal


def is_over(checkpoint: Path) -> bool:
    """Whether the training had come to its end, by the number of steps or an early stop, when this was saved."""
    state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    control = state.get("stateful_callbacks", {}).get("TrainerControl", {})
    return bool(control.get("args", {}).get("should_training_stop"))


def losses_since_log(trainer: Any, gather: Callable[[float], list[float]]) -> dict[str, Any]:
    """The part of the next logged loss that each process has added up already, for the checkpoint to keep.

    `gather` gives the values of all processes, in their order.
    """
    return {"loss_sums": gather(float(trainer._tr_loss)), "loss_since": trainer._globalstep_last_logged}


class GoOn(TrainerCallback):
    """Restores, as the training begins, the sum of losses not yet logged and where the best checkpoint is."""

    def __init__(self, trainer: Any, checkpoint: Path) -> None:
        self.trainer, self.checkpoint = trainer, checkpoint

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        restore_best(state, self.checkpoint.parent)
        kept = read_seal(self.checkpoint)
        if "loss_sums" in kept:
            self.trainer._tr_loss.fill_(kept["loss_sums"][args.process_index])
            self.trainer._globalstep_last_logged = kept["loss_since"]


def load_result(trainer: Any, checkpoint: Path) -> None:
    """What the Trainer does at the end of a training, for one that is over: the best weights, and the state."""
    trainer.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
    restore_best(trainer.state, checkpoint.parent)
    if trainer.state.best_model_checkpoint is None:
        trainer._load_from_checkpoint(str(checkpoint))
    else:
        trainer._load_best_model()


def restore_best(state: TrainerState, checkpoints: Path) -> None:
    """The state names the best checkpoint by a path, which is another one where the folder has been moved since."""
    best = checkpoints / f"{PREFIX}{state.best_global_step}"
    state.best_model_checkpoint = str(best) if state.best_global_step and best.is_dir() else None
