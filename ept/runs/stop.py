"""SIGTERM and Ctrl-C during a run: the current step is finished and saved, and a message says how to continue."""

from __future__ import annotations

import os
import shlex
import signal
import threading
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState

from .folder import RunFolder
from .processes import Processes, world_size

NAMES: dict[int, str] = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}


class Interrupted(KeyboardInterrupt):
    """The end of a run by a signal. Like Ctrl-C elsewhere, it is not caught by `except Exception`."""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + number  # as a shell reports a program that the signal ended


class StopSignals(TrainerCallback):
    """Handlers that raise `Interrupted` on SIGINT and SIGTERM: immediately, or during training after the current step.

    Any rank may get the signal; after each step all agree on whether one has come. A second signal stops the run at
    once only if it is a single process, because launchers repeat signals: a job manager signals the launcher and its
    processes, the launcher passes its own signal on, and ends all processes as soon as one has ended.

    The handlers are active inside `with`; the previous ones are restored at its end. Nothing changes in a thread other
    than the main one, and for signals that the process ignores. As a callback this comes after the one that completes
    checkpoints.
    """

    def __init__(self, folder: RunFolder, processes: Processes) -> None:
        self.folder, self.processes = folder, processes
        self.received: int | None = None
        self.agreed = 0
        self.training = False
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in NAMES:
                before = signal.getsignal(number)
                if before not in (signal.SIG_IGN, None):  # None: set from C, and could not be restored
                    self._handlers[number] = before
                    signal.signal(number, self._receive)
        return self

    def __exit__(self, *exception: Any) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers.clear()

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.training = True

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.agreed = max(self.processes.gather(self.received or 0))
        if self.agreed:
            control.should_save = True

    def on_save(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.agreed:
            saved = f"after step {state.global_step} of {state.max_steps}, which is saved"
            raise self._stop_all(f"stopped by {NAMES[self.agreed]} {saved}: {self.resume_command()} continues")

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.agreed = max(self.processes.gather(self.received or 0))  # a signal may have come after the last step
        self.training = False
        if self.agreed:
            raise self._stop_all(self._message(self.agreed))
        if self.received:  # since the agreement
            raise Interrupted(self._message(self.received), self.received)

    def resume_command(self) -> str:
        """Returns the command that continues the run in the present number of processes."""
        words = f"ept train --resume --output {shlex.quote(str(self.folder.path))}"
        if world_size() == 1:
            return f"`{words}`"
        if os.environ.get("LOCAL_WORLD_SIZE") != str(world_size()):
            return f"the same launch with `-m {words}`"
        return f"`torchrun --nproc-per-node {world_size()} -m {words}`"

    def _receive(self, number: int, frame: Any) -> None:
        alone = self.processes.world_size == 1
        if not self.training or (alone and self.received):
            self.received = number
            raise Interrupted(self._message(number), number)
        if not self.received and self.processes.is_rank_zero:
            second = "; a second Ctrl-C stops at once" if alone else ""
            notice = f"\n{NAMES[number]}: finishing this step and saving{second}\n"
            os.write(2, notice.encode())  # a print may be in progress
        self.received = number

    def _message(self, number: int) -> str:
        if self.folder.holds_other or not self.folder.holds_run():
            return f"stopped by {NAMES[number]}: nothing has been written"
        return (
            f"stopped by {NAMES[number]}: {self.resume_command()} continues from the last checkpoint, or from the start"
        )

    def _stop_all(self, message: str) -> Interrupted:
        if self.processes.world_size > 1:
            for number in self._handlers:  # when the first process ends, the launcher signals the others again
                signal.signal(number, signal.SIG_IGN)
            self._handlers.clear()
        self.processes.leave()  # waits until rank 0 has completed the checkpoint
        return Interrupted(message, self.agreed)
