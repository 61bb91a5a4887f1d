"""SIGTERM and Ctrl-C while a run goes on: the step is finished and saved, and the run says how to continue it."""

from __future__ import annotations

import os
import shlex
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState

from .run_folder import RunFolder

_NAMES: dict[int, str] = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}
_NOTED = "\n{}: finishing this step and saving; a second Ctrl-C stops at once\n"


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
    """Within `with`, SIGINT and SIGTERM raise :class:`Interrupted`; within :meth:`noted` the first is only noted.

    The handlers that were there before come back at the end. In a thread other than the main one, and for signals that
    the process ignores, nothing changes.
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
    def noted(self) -> Iterator[None]:
        """Within, whoever trains asks :attr:`received` after each step."""
        self._only_note = True
        try:
            yield
        finally:
            self._only_note = False
        if self.received is not None:  # after the last step
            raise self._stopped(self.received)

    def resume_command(self) -> str:
        return f"`ept train --resume --output {shlex.quote(str(self.folder.path))}`"

    def _receive(self, number: int, frame: Any) -> None:
        if self._only_note and self.received is None:
            self.received = number
            os.write(2, _NOTED.format(_NAMES[number]).encode())  # print could be at work just now
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
    """Saves a checkpoint at the end of the step in which a signal came, and ends the run there.

    Args:
        signals: where the signal is noted.
        anywhere: of this process's flag, whether it is set in any process of the run.
    """

    def __init__(self, signals: StopSignals, anywhere: Callable[[bool], bool] = bool) -> None:
        self.signals, self.anywhere = signals, anywhere
        self.stopping = False

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.stopping = self.anywhere(self.signals.received is not None)
        if self.stopping:
            control.should_save = True

    def on_save(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if not self.stopping:
            return
        number = self.signals.received or signal.SIGTERM
        raise Interrupted(
            f"stopped by {_NAMES[number]} after step {state.global_step} of {state.max_steps}, which is "
            f"saved: {self.signals.resume_command()} continues",
            number,
        )
