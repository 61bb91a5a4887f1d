"""One training step, timed as a whole and in phases, without a wait for the device inside it.

The phases follow one another without gaps, so that they add up to the step:

    embedding         from the call to the base model, but for the prompt: modes, positions, look-up, low-rank update
    joint prompt      making the prompt (EPT: fusion and spaces; PEFT: repeating the prompt for every row)
    base forward      the frozen model and the loss
    base backward     from the loss to the gradient of the input embeddings
    prompt backward   from there to the gradients of the prompt's parameters
    optimizer         letting the graph go, clipping, AdamW, clearing the gradients
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from .methods import Method

PHASES = ("embedding", "joint prompt", "base forward", "base backward", "prompt backward", "optimizer")


@dataclass(frozen=True)
class StepTime:
    """Milliseconds of one step, and of its phases."""

    step: float
    phases: dict[str, float]


class PhaseClock:
    """Attributes the time since the last mark to the phase that has just ended: the processor's, or a GPU's events."""

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self.marks: list[tuple[str, Any]] = []

    def mark(self, phase: str) -> None:
        self.marks.append((phase, self._now()))

    def phases(self) -> dict[str, float]:
        """Milliseconds by phase; a GPU must have been waited for."""
        times = dict.fromkeys(PHASES, 0.0)
        for (_, before), (phase, now) in zip(self.marks, self.marks[1:]):
            times[phase] += before.elapsed_time(now) if self.on_gpu else 1e3 * (now - before)
        return times

    def _now(self) -> Any:
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def time_step(method: Method, base: Any, batch: dict[str, Any], device: torch.device) -> StepTime:
    """Takes one training step and times it; on a GPU the clock runs until the device has finished."""
    clock = PhaseClock(device)
    with _marking(method, base, clock):
        _synchronize(device)
        start = time.perf_counter()
        take_step(method, batch, clock)
        _synchronize(device)
        elapsed = 1e3 * (time.perf_counter() - start)
    return StepTime(elapsed, clock.phases())


def take_step(method: Method, batch: dict[str, Any], clock: PhaseClock | None = None) -> None:
    """Forward, backward and update."""
    mark = clock.mark if clock is not None else _no_mark
    mark("start")
    loss = method.loss(batch)
    mark("base forward")
    loss.backward()
    mark("prompt backward")
    del loss  # and with it the graph: a part of the step that belongs to no phase of its own
    method.update()
    mark("optimizer")


@contextmanager
def _marking(method: Method, base: Any, clock: PhaseClock) -> Iterator[None]:
    """Sets the marks that lie inside the model, and takes them away again."""
    owner, name = method.prompt_of
    make_prompt = getattr(owner, name)

    def marked_prompt(*args: Any, **kwargs: Any) -> Any:
        clock.mark("embedding")
        prompt = make_prompt(*args, **kwargs)
        clock.mark("joint prompt")
        return prompt

    def before_base(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        clock.mark("embedding")
        kwargs["inputs_embeds"].register_hook(lambda gradient: clock.mark("base backward"))

    setattr(owner, name, marked_prompt)
    handle = base.register_forward_pre_hook(before_base, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
        delattr(owner, name)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _no_mark(phase: str) -> None:
    pass
