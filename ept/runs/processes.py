"""One run in several processes, as `torchrun` and `accelerate launch` start them.

Every process holds the whole model and a share of the rows of each step. What is written, the first process writes;
what is decided, all decide alike.
"""

from __future__ import annotations

import atexit
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState

from .launched import cpu_is_asked_for, is_on, local_index, mark_told, several, was_started_alone

T = TypeVar("T")

SHARDED = {"ACCELERATE_USE_FSDP": "FSDP", "ACCELERATE_USE_DEEPSPEED": "DeepSpeed"}
LONGEST_END = timedelta(seconds=10)  # torchrun kills what has not ended within 30


@dataclass(frozen=True)
class Processes:
    """This process among those of the run: `index` from 0, of `count`.

    Messages between them go through `group`, on CPUs and apart from the gradients: no accelerator is waited for.
    """

    index: int = 0
    count: int = 1
    group: Any = None

    @property
    def main(self) -> bool:
        """Whether this is the process that writes."""
        return self.index == 0

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """This process's part of `items`: every `count`-th one. Each item is in exactly one process's part."""
        return items[self.index :: self.count]

    def gather(self, value: T) -> list[T]:
        """The `value` of every process, in their order, in all of them."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        dist.all_gather_object(values, value, group=self.group)
        return values

    def largest(self, value: int) -> int:
        """The largest `value` of all processes."""
        if self.count == 1:
            return value
        found = torch.tensor(value)
        dist.all_reduce(found, op=dist.ReduceOp.MAX, group=self.group)
        return int(found)

    def wait(self) -> None:
        """Until every process is here."""
        if self.count > 1:
            dist.barrier(group=self.group)

    def together(self, make: Callable[[], T]) -> T:
        """`make()` in every process. An error in one of them ends all, and is raised in all of them."""
        if self.count == 1:
            return make()
        value, error = None, None
        try:
            value = make()
        except Exception as raised:
            error = raised
        for index, other in enumerate(self.gather(_portable(error))):
            if other is not None:
                failure = error if error is not None and index == self.index else mark_told(other)
                raise failure
        return value  # type: ignore[return-value]

    def from_main(self, make: Callable[[], T]) -> T:
        """`make()` in the first process; its result, or its error, in all of them."""
        value = self.together(lambda: make() if self.main else None)
        return self.gather(value)[0]  # type: ignore[return-value]

    def leave(self) -> None:
        """The end of a run that has gone well. The connection stays for another one, and ends with the process."""
        if self.count > 1:
            self.wait()
            _end_connection_at_exit()

    def end_together(self) -> None:
        """Has the processes, at their ends, wait until all have come there, or for ten seconds."""
        if self.count > 1:
            _end_connection_at_exit()
            atexit.register(_await_ends, self.group)


def join() -> Processes:
    """The processes that a launcher has started and names in WORLD_SIZE, RANK and LOCAL_RANK; without one, this alone.

    The accelerator that LOCAL_RANK counts becomes the current one.

    Raises:
        ValueError: they are to share one model (FSDP, DeepSpeed), or the launcher has not started them.
    """
    if was_started_alone():
        raise ValueError(
            "accelerate launch --cpu was asked for several processes and has started one: leave --cpu out and say "
            "--multi_gpu --num_processes N, which starts N on a machine without GPUs too, or use torchrun"
        )
    if not several():
        return Processes()
    for variable, name in SHARDED.items():
        if is_on(variable):
            raise ValueError(
                f"`ept train` keeps a whole model in each of its processes, {name} shares one among them: leave {name} "
                "out of the launcher's configuration, or use get_ept_model with the Trainer"
            )
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    on_cpu = accelerator is None or cpu_is_asked_for()
    if not on_cpu:
        torch.accelerator.set_device_index(local_index())
    state = PartialState(cpu=on_cpu)
    return Processes(state.process_index, state.num_processes, _message_group())


@cache
def _message_group() -> Any:
    return dist.new_group(backend="gloo")


def _await_ends(group: Any) -> None:
    with suppress(RuntimeError):  # another one has been killed, or goes on with something else
        dist.monitored_barrier(group, timeout=LONGEST_END)


@cache
def _end_connection_at_exit() -> None:
    """Not sooner: a second connection through the launcher's store would meet the addresses of the first."""
    atexit.register(dist.destroy_process_group)


def _portable(error: Exception | None) -> Exception | None:
    """The error as every process can build it: of the nearest built-in type, with its text."""
    if error is None:
        return None
    kind = next(cls for cls in type(error).__mro__ if cls.__module__ == "builtins")
    try:
        return kind(str(error))
    except TypeError:  # it takes other arguments than a text
        return RuntimeError(f"{type(error).__name__}: {error}")
