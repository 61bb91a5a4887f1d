"""One run in several processes, started by `torchrun` or `accelerate launch`.

Every rank holds the whole model and takes a share of the rows of each step. Rank 0 writes; all make the same decisions.
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
    """The processes of a run; this one is number `rank` of `world_size`.

    Messages between them go through `group` on the CPU, separate from the gradients, so that they never wait for an
    accelerator.
    """

    rank: int = 0
    world_size: int = 1
    group: Any = None

    @property
    def is_rank_zero(self) -> bool:
        return self.rank == 0

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """Returns every `world_size`-th of `items`, so that each is in exactly one rank's share."""
        return items[self.rank :: self.world_size]

    def gather(self, value: T) -> list[T]:
        """Returns the values of all ranks, in order, on every rank; waits until all have called it."""
        if self.world_size == 1:
            return [value]
        import torch.distributed as dist

        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def together(self, make: Callable[[], T]) -> T:
        """Returns `make()`, called on every rank.

        If it fails, the first rank on which it failed raises its exception, and all others raise SystemExit.
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
        """Returns on all ranks what `make()` returns on rank 0; errors as in `together`."""
        value = self.together(lambda: make() if self.is_rank_zero else None)
        return self.gather(value)[0]  # type: ignore[return-value]

    def leave(self) -> None:
        """Waits until every rank has reached the end of its run. The connection closes with the process."""
        if self.world_size > 1:
            self.gather(None)
            _disconnect_at_exit()


@cache
def _disconnect_at_exit() -> None:
    """Closes the connection when the process exits, however many runs there were.

    Not earlier: a second connection through the launcher's store would find the addresses of the first.
    """
    from torch.distributed import destroy_process_group

    atexit.register(destroy_process_group)


def exit_rank(end: SystemExit) -> None:
    """Exits this rank after running the exit handlers; does nothing in a single process.

    It skips the libraries' static destructors, where gloo's threads sometimes abort a rank that has finished its work.
    """
    if world_size() > 1:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(end.code if isinstance(end.code, int) else int(end.code is not None))


def join() -> Processes:
    """Connects the processes that a launcher has started; returns this one alone if there is no launcher.

    Makes the process's accelerator the current one. Raises ValueError if the processes are meant to share one model
    (FSDP, DeepSpeed), or if the launcher has not started them.
    """
    # `accelerate launch --cpu --num_processes N` starts N processes only under mpirun.
    if is_cpu_requested() and "MASTER_ADDR" in os.environ and "WORLD_SIZE" not in os.environ:
        raise ValueError(
            "accelerate launch --cpu was asked for several processes but started one: use --multi_gpu "
            "--num_processes N instead of --cpu, which also starts N without GPUs, or use torchrun"
        )
    if world_size() == 1:
        return Processes()
    for variable, name in SHARDED.items():
        if _is_on(variable):
            raise ValueError(
                f"`ept train` keeps a whole model in each process, but {name} splits one across them: leave {name} "
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
    """Returns the number of processes that the launcher has started, on all machines."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """Returns this process's number in the launch."""
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    """Returns this process's number on its machine."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def accelerator_index() -> int:
    """Returns the index of this process's accelerator: its local rank, modulo the number of visible accelerators."""
    import torch

    return local_rank() % max(torch.accelerator.device_count(), 1)


def is_cpu_requested() -> bool:
    """Checks whether `accelerate launch --cpu` has started this process."""
    return _is_on("ACCELERATE_USE_CPU")


def _is_on(variable: str) -> bool:
    return os.environ.get(variable, "").lower() in ("1", "true", "yes")


@cache
def _message_group() -> Any:
    import torch.distributed as dist

    return dist.new_group(backend="gloo")
