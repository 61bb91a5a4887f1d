"""The clock of all benchmarks: calls are timed in turn, round by round, in alternating order, so that a machine whose
speed drifts slows all alike.
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count, pairwise
from typing import Any

import torch

from ept.profile.clock import summary
from ept.profile.trace import allocated_by

Call = Callable[[int], Any]  # takes the number of an input set

WARMUP = 3
HOST_ROUNDS = 10  # rounds in which the host's work is timed too
SPIN_HERTZ = 2.0e9  # cycles per second assumed for the spin kernel; a slower clock only spins longer


@dataclass(frozen=True)
class Timing:
    """Times of one version's calls, in seconds.

    Attributes:
        samples: of each call; with device events only the device's time.
        call: median over rounds of back-to-back calls including the host's work, if `samples` exclude it.
        host: median of the host's own time per call, while the device is busy with another; None on a CPU.
        host_bound: the queue ran empty while timing, so that `samples` include launch gaps.
        clock: `device events`, `wall clock` or `thread time`.
    """

    samples: list[float]
    call: float | None
    host_bound: bool
    clock: str
    host: float | None = None

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    def as_dict(self) -> dict[str, Any]:
        """Returns the fields of a record's row."""
        return {**summary(self.samples), **vars(self), "samples": len(self.samples)}


def ratio(over: Timing, under: Timing) -> dict[str, float]:
    """Summarises `over`'s time divided by `under`'s, taken round by round."""
    return summary([a / b for a, b in zip(over.samples, under.samples, strict=True)])


def time_in_turn(
    calls: dict[str, Call],
    clock: Clock,
    *,
    sets: int = 1,
    seconds: float = 0.0,
    rounds: int | None = None,
    warmup: int = WARMUP,
) -> dict[str, Timing]:
    """Times every call of `calls` for about `seconds`, or in exactly `rounds` rounds of one sample.

    Args:
        sets: number of input sets, through which the calls rotate. Together with as many outputs, which are kept so
            that later ones are elsewhere in memory, they should exceed the last-level cache.
        warmup: calls of each before anything is timed.

    Raises what a call raises; try each once before.
    """
    numbers, kept = count(), deque[Any](maxlen=sets - 1)

    def rotated(call: Call) -> Callable[[], Any]:
        return lambda: kept.append(call(next(numbers) % sets))

    rotating = {name: rotated(call) for name, call in calls.items()}
    for call in rotating.values():
        for _ in range(warmup):
            call()
    batch, turns = dict.fromkeys(calls, 1), dict.fromkeys(calls, rounds or 0)
    if rounds is None:
        for name, call in rotating.items():
            once = max(clock.back_to_back(call, 3), 1e-7)
            batch[name] = max(1, min(clock.max_batch, round(2e-3 / once)))
            turns[name] = max(5, min(100, round(seconds / (batch[name] * once))))

    samples: dict[str, list[float]] = {name: [] for name in calls}
    host: dict[str, list[float]] = {name: [] for name in calls}
    alone: dict[str, list[float]] = {name: [] for name in calls}
    host_bound = dict.fromkeys(calls, False)
    for index in range(max(turns.values())):
        for name in list(calls) if index % 2 else reversed(list(calls)):
            if index >= turns[name]:
                continue
            times, gap = clock.sample(rotating[name], batch[name])
            samples[name] += times
            host_bound[name] |= gap
            if index < HOST_ROUNDS and clock.separate_host_time:
                host[name].append(clock.back_to_back(rotating[name], batch[name]))
            alone[name] += clock.host_times
    with_host, only_host = ({n: statistics.median(x) if x else None for n, x in of.items()} for of in (host, alone))
    return {n: Timing(samples[n], with_host[n], host_bound[n], clock.name, only_host[n]) for n in calls}


@contextmanager
def one_thread() -> Iterator[None]:
    """Makes torch use one thread, whose time a `ThreadClock` counts, within the context."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class Clock:
    """Wall time of each call; on a GPU from an idle device until it has finished."""

    name = "wall clock"
    max_batch = 20
    separate_host_time = False

    def __init__(self, device: str) -> None:
        self.host_times: list[float] = []  # per call in the last sample: the time to enqueue it
        self.synchronize = (lambda: None) if device == "cpu" else torch.accelerator.synchronize

    def sample(self, call: Callable[[], Any], batch: int) -> tuple[list[float], bool]:
        """Returns the seconds of `batch` calls, and whether the device waited for the host between them."""
        return [self.back_to_back(call, 1) for _ in range(batch)], False

    def back_to_back(self, call: Callable[[], Any], batch: int) -> float:
        """Returns the wall seconds per call of `batch` calls."""
        self.synchronize()
        start = time.perf_counter()
        for _ in range(batch):
            call()
        self.synchronize()
        return (time.perf_counter() - start) / batch


class ThreadClock(Clock):
    """CPU time of the calling thread, for `calls` calls at a time; a GPU's queue is empty at each start."""

    name = "thread time"

    def __init__(self, device: str, calls: int) -> None:
        super().__init__(device)
        self.calls = calls

    def sample(self, call: Callable[[], Any], batch: int) -> tuple[list[float], bool]:
        self.synchronize()
        start = time.thread_time()
        for _ in range(self.calls):
            call()
        return [(time.thread_time() - start) / self.calls], False


class DeviceClock(Clock):
    """Device events behind a queue that is kept full, so that the host's launch gaps do not count."""

    name = "device events"
    max_batch = 40
    separate_host_time = True

    def sample(self, call: Callable[[], Any], batch: int) -> tuple[list[float], bool]:
        # A spin kernel holds the device while the host enqueues. If it was too short, the batch is repeated
        # behind a spin that is certainly long enough, and if even that was not, without one.
        spin = 1.5 * batch * self.back_to_back(call, 2)
        attempt = 0
        while True:
            attempt += 1
            torch.cuda.synchronize()
            if attempt < 3:
                torch.cuda._sleep(int(spin * SPIN_HERTZ))
            start = time.perf_counter()
            events = [torch.cuda.Event(enable_timing=True) for _ in range(batch + 1)]
            events[0].record()
            for event in events[1:]:
                call()
                event.record()
            enqueued = time.perf_counter() - start
            self.host_times, spin = [enqueued / batch], 4 * enqueued
            kept_full = not events[0].query()
            torch.cuda.synchronize()
            if kept_full or attempt == 3:
                return [1e-3 * before.elapsed_time(after) for before, after in pairwise(events)], attempt == 3


def peak_bytes(call: Call, device: str) -> int:
    """Returns the maximum bytes that one call holds at a time in addition to its arguments: outputs and temporaries."""
    if device != "cuda":
        return allocated_by(lambda: call(0))
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call(0)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def device_launches(call: Call, device: str) -> int | None:
    """Counts the kernels that the device runs for one call, without memory copies and fills; None on a CPU, and if
    the profiler reports none, as it does where it does not work.
    """
    if device != "cuda":
        return None
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        call(0)
        torch.cuda.synchronize()
    on_device = [e for e in profiled.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    return sum(not e.name.startswith(("Memcpy", "Memset")) for e in on_device) or None
