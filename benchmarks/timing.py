"""Clocks. On a GPU: device events behind a queue that is kept full, so that launch gaps of the host do not count; on a
CPU: the wall clock around each call.

All versions of one case are timed in turn, round by round and in alternating order, so that a machine whose speed
drifts slows all alike. Every call takes the next of several input sets, which together are larger than the last-level
cache.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import count, pairwise
from typing import Any

import torch

Call = Callable[[int], Any]  # takes the number of an input set

WARMUP = 3
SPIN_HERTZ = 2.0e9  # cycles a second assumed for the spin kernel: a slower clock only spins longer


@dataclass(frozen=True)
class Timing:
    """Seconds of one call.

    Attributes:
        median, p20, p80: of the single calls; on a GPU the device's time only.
        call: median over rounds of back-to-back calls with the host's work included; None on a CPU, where it is the
            same thing.
        samples: number of calls timed.
        host_bound: the queue ran empty while timing, so that launch gaps are in `median`.
        clock: `device events` or `wall clock`.
    """

    median: float
    p20: float
    p80: float
    call: float | None
    samples: int
    host_bound: bool
    clock: str

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def time_in_turn(calls: dict[str, Call], device: str, sets: int, seconds: float) -> dict[str, Timing]:
    """Times every call of `calls` for about `seconds`, warm-up not counted.

    Raises what a call raises; try each once before.
    """
    clock = _DeviceClock() if device == "cuda" else _WallClock()
    numbers = count()

    def rotated(call: Call) -> Callable[[], Any]:
        return lambda: call(next(numbers) % sets)

    rotating = {name: rotated(call) for name, call in calls.items()}
    for call in rotating.values():
        for _ in range(WARMUP):
            call()
    once = {name: clock.estimate(call) for name, call in rotating.items()}
    batch = {name: max(1, min(clock.largest_batch, round(2e-3 / t))) for name, t in once.items()}
    rounds = {name: max(5, min(100, round(seconds / (batch[name] * t)))) for name, t in once.items()}

    samples: dict[str, list[float]] = {name: [] for name in calls}
    host: dict[str, list[float]] = {name: [] for name in calls}
    host_bound = dict.fromkeys(calls, False)
    for index in range(max(rounds.values())):
        for name in list(calls) if index % 2 else reversed(list(calls)):
            if index >= rounds[name]:
                continue
            times, gap = clock.sample(rotating[name], batch[name])
            samples[name] += times
            host_bound[name] |= gap
            if index < 10 and clock.separate_host_time:
                host[name].append(clock.back_to_back(rotating[name], batch[name]))
    return {
        name: Timing(
            *_median_and_quintiles(samples[name]),
            call=statistics.median(host[name]) if host[name] else None,
            samples=len(samples[name]),
            host_bound=host_bound[name],
            clock=clock.name,
        )
        for name in calls
    }


def _median_and_quintiles(samples: list[float]) -> tuple[float, float, float]:
    quintiles = statistics.quantiles(samples, n=5)
    return statistics.median(samples), quintiles[0], quintiles[3]


class _WallClock:
    name = "wall clock"
    largest_batch = 20
    separate_host_time = False

    def estimate(self, call: Callable[[], Any]) -> float:
        return max(min(self.sample(call, 2)[0]), 1e-7)

    def sample(self, call: Callable[[], Any], batch: int) -> tuple[list[float], bool]:
        times = []
        for _ in range(batch):
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
        return times, False

    def back_to_back(self, call: Callable[[], Any], batch: int) -> float:
        return statistics.median(self.sample(call, batch)[0])


class _DeviceClock:
    name = "device events"
    largest_batch = 40
    separate_host_time = True

    def estimate(self, call: Callable[[], Any]) -> float:
        return max(self.back_to_back(call, 3), 1e-7)

    def sample(self, call: Callable[[], Any], batch: int) -> tuple[list[float], bool]:
        """Device seconds of `batch` calls, and whether the queue ran empty between them.

        A spin kernel holds the device while the host enqueues; where it was too short the batch is taken once more
        behind a spin that is certainly long enough.
        """
        spin = 1.5 * batch * self.back_to_back(call, 2)
        times, enqueued = self._behind_spin(call, batch, spin)
        if times is None:
            times, enqueued = self._behind_spin(call, batch, 4 * enqueued)
        if times is None:
            return self._from_events(call, batch), True
        return times, False

    def _behind_spin(self, call: Callable[[], Any], batch: int, spin: float) -> tuple[list[float] | None, float]:
        torch.cuda.synchronize()
        torch.cuda._sleep(int(spin * SPIN_HERTZ))
        start = time.perf_counter()
        events = self._enqueue(call, batch)
        enqueued = time.perf_counter() - start
        kept_full = not events[0].query()
        torch.cuda.synchronize()
        return (_elapsed(events) if kept_full else None), enqueued

    def _from_events(self, call: Callable[[], Any], batch: int) -> list[float]:
        events = self._enqueue(call, batch)
        torch.cuda.synchronize()
        return _elapsed(events)

    def _enqueue(self, call: Callable[[], Any], batch: int) -> list[torch.cuda.Event]:
        events = [torch.cuda.Event(enable_timing=True) for _ in range(batch + 1)]
        events[0].record()
        for event in events[1:]:
            call()
            event.record()
        return events

    def back_to_back(self, call: Callable[[], Any], batch: int) -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(batch):
            call()
        torch.cuda.synchronize()
        return (time.perf_counter() - start) / batch


def _elapsed(events: list[torch.cuda.Event]) -> list[float]:
    return [1e-3 * before.elapsed_time(after) for before, after in pairwise(events)]


def peak_bytes(call: Call, device: str) -> int:
    """The most bytes that one call holds at a time beyond what it was given: outputs and temporaries."""
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call(0)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        result = call(0)
    del result
    held = most = 0
    assert profiled.profiler is not None
    events = profiled.profiler.kineto_results.events()  # the summary of profiled.events() drops the single allocations
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def device_launches(call: Call, device: str) -> int | None:
    """Number of kernels the device runs for one call, memory copies and fills not counted; None on a CPU."""
    if device != "cuda":
        return None
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        call(0)
        torch.cuda.synchronize()
    on_device = [e for e in profiled.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    return sum(not e.name.startswith(("Memcpy", "Memset")) for e in on_device)
