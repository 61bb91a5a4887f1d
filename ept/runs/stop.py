"""SIGTERM and Ctrl-C while a run goes on: the step is finished and saved, and the run says how to continue it."""

from __future__ import annotations

import os
import shlex
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState

from .folder import RunFolder
from .launched import is_main, mark_told, several, started_alike
from .processes import Processes

_NAMES: dict[int, str] = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}
_ALONE = Processes()


class Interrupted(KeyboardInterrupt):
    """A signal ended the run. As with Ctrl-C elsewhere, `except Exception` does not catch it."""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.number = number

    @property
    def exit_code(self) -> int:
        """What shells give to a program that the signal ended."""
        return 128 + self.number


class StopSignals:
    """Within `with`, SIGINT and SIGTERM raise `Interrupted`; within `noted` the first is only noted.

    The handlers that were there before come back at the end. In a thread other than the main one, and for signals that
    the process ignores, nothing changes.

    Of several processes, any may get the signal: what one has noted, all agree on before they stop. A second signal
    stops a process at once only where it is alone. Launchers repeat them: a job manager signals the launcher and its
    processes, the launcher passes its own signal on, and it ends all processes as soon as one has ended.
    """

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder
        self.received: int | None = None
        self._only_note = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in _NAMES:
                before = signal.getsignal(number)
                if before not in (signal.SIG_IGN, None):  # None: set from C, and could not be put back
                    self._before[number] = before
                    signal.signal(number, self._receive)
        return self

    def __exit__(self, *exception: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    @contextmanager
    def noted(self, processes: Processes = _ALONE) -> Iterator[None]:
        """Within, whoever trains asks after each step what has been `agreed`."""
        self._only_note = True
        try:
            yield
            number = self.agreed(processes)  # on what came after the last step
        finally:
            self._only_note = False
        if number:
            raise in_all(processes, self._stopped(number))
        if self.received is not None:
            raise self._stopped(self.received)

    def agreed(self, processes: Processes) -> int:
        """The signal that has come to any of the processes, 0 for none: the same in all of them."""
        return processes.largest(self.received or 0)

    def resume_command(self) -> str:
        return started_alike(f"train --resume --output {shlex.quote(str(self.folder.path))}")

    def _receive(self, number: int, frame: Any) -> None:
        if self._only_note and (self.received is None or several()):
            if self.received is None and is_main():
                second = "" if several() else "; a second Ctrl-C stops at once"
                notice = f"\n{_NAMES[number]}: finishing this step and saving{second}\n"
                os.write(2, notice.encode())  # print could be at work just now
            self.received = number
            return
        self.received = number
        raise self._stopped(number)

    def _stopped(self, number: int) -> Interrupted:
        name = _NAMES[number]
        if not self.folder.holds_run():
            return Interrupted(f"stopped by {name}: nothing has been written", number)
        return Interrupted(
            f"stopped by {name}: {self.resume_command()} continues from the last checkpoint, or from the start", number
        )


class StopAfterStep(TrainerCallback):
    """Saves a checkpoint at the end of the step in which a signal came to any process, and ends all of them there."""

    def __init__(self, signals: StopSignals, processes: Processes = _ALONE) -> None:
        self.signals, self.processes = signals, processes
        self.number = 0

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.number = self.signals.agreed(self.processes)
        if self.number:
            control.should_save = True

    def on_save(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if not self.number:
            return
        self.processes.wait()  # until the checkpoint is whole: with the first process that ends, a launcher ends all
        stop = Interrupted(
            f"stopped by {_NAMES[self.number]} after step {state.global_step} of {state.max_steps}, which is "
            f"saved: {self.signals.resume_command()} continues",
            self.number,
        )
        raise in_all(self.processes, stop)


def in_all(processes: Processes, stop: Interrupted) -> Interrupted:
    """The stop on which all processes have agreed: the first one tells it, and none ends before that is done."""
    processes.end_together()
    return stop if processes.main else mark_told(stop)
