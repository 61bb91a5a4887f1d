"""One run in several processes, as `torchrun` and `accelerate launch` start them.

Every rank holds the whole model and takes a share of the rows of each step. Rank 0 writes; all decide alike.
"""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar

T = TypeVar("T")

SHARDED = {"ACCELERATE_USE_FSDP": "FSDP", "ACCELERATE_USE_DEEPSPEED": "DeepSpeed"}


@dataclass(frozen=True)
class Processes:
    """The processes of a run, of which this one is number `rank` of `world_size`.

    Messages between them go through `group`, on CPUs and apart from the gradients: no accelerator is waited for.
    """

    rank: int = 0
    world_size: int = 1
    group: Any = None

    @property
    def is_rank_zero(self) -> bool:
        return self.rank == 0

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """Returns every `world_size`-th of `items`: each is in exactly one rank's share."""
        return items[self.rank :: self.world_size]

    def gather(self, value: T) -> list[T]:
        """Returns the `value` of every rank, in their order, on all ranks; waits until each has come here."""
        if self.world_size == 1:
            return [value]
        import torch.distributed as dist

        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def together(self, make: Callable[[], T]) -> T:
        """Returns `make()`, called on every rank.

        Raises what it raised, on the first of the ranks where it failed, and SystemExit on all others.
        """
        value, error = None, None
        try:
            value = make()
        except Exception as raised:
            error = raised
        failed = self.gather(error is not None)
        if any(failed):
            raise error if error is not None and failed.index(True) == self.rank else SystemExit(1)
        return value  # type: ignore[return-value]

    def from_rank_zero(self, make: Callable[[], T]) -> T:
        """Returns on all ranks what `make()` returns on rank 0; errors as `together`."""
        value = self.together(lambda: make() if self.is_rank_zero else None)
        return self.gather(value)[0]  # type: ignore[return-value]

    def leave(self) -> None:
        """Waits until every rank has come to the end of its run. The connection ends with the process."""
        if self.world_size > 1:
            self.gather(None)
            _disconnect_at_exit()


@cache
def _disconnect_at_exit() -> None:
    """Ends the connection with the process, once, whatever number of runs there were.

    No sooner: a second connection through the launcher's store would meet the addresses of the first.
    """
    from torch.distributed import destroy_process_group

    atexit.register(destroy_process_group)


def exit_rank(end: SystemExit) -> None:
    """Ends this rank after what is registered for the end; does nothing where there is one process.

    The libraries' static destructors are left out: gloo's threads at times abort a rank there that has done all.
    """
    if world_size() > 1:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(end.code if isinstance(end.code, int) else int(end.code is not None))


def join() -> Processes:
    """Connects the processes that a launcher has started; returns this one alone where none has.

    The accelerator of this process becomes the current one. Raises ValueError where the processes are to share one
    model (FSDP, DeepSpeed), or the launcher has not started them.
    """
    # `accelerate launch --cpu --num_processes N` starts N processes only under mpirun.
    if is_cpu_requested() and "MASTER_ADDR" in os.environ and "WORLD_SIZE" not in os.environ:
        raise ValueError(
            "accelerate launch --cpu was asked for several processes and has started one: leave --cpu out and say "
            "--multi_gpu --num_processes N, which starts N on a machine without GPUs too, or use torchrun"
        )
    if world_size() == 1:
        return Processes()
    for variable, name in SHARDED.items():
        if _is_on(variable):
            raise ValueError(
                f"`ept train` keeps a whole model in each of its processes, {name} shares one among them: leave {name} "
                "out of the launcher's configuration, or use get_ept_model with the Trainer"
            )
    import torch
    from accelerate import PartialState

    on_cpu = is_cpu_requested() or torch.accelerator.current_accelerator(check_available=True) is None
    if not on_cpu:
        torch.accelerator.set_device_index(accelerator_index())
    state = PartialState(cpu=on_cpu)
    return Processes(state.process_index, state.num_processes, _message_group())


def world_size() -> int:
    """Returns how many processes the launcher has started, on all machines."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """Returns the number of this process in the launch."""
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    """Returns the number of this process on its machine."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def accelerator_index() -> int:
    """Returns the number of this process' accelerator: that of the process, but 0 where it is shown one alone."""
    import torch

    return local_rank() % max(torch.accelerator.device_count(), 1)


def is_cpu_requested() -> bool:
    """Tells whether `accelerate launch --cpu` has started this process."""
    return _is_on("ACCELERATE_USE_CPU")


def _is_on(variable: str) -> bool:
    return os.environ.get(variable, "").lower() in ("1", "true", "yes")


@cache
def _message_group() -> Any:
    import torch.distributed as dist

    return dist.new_group(backend="gloo")
