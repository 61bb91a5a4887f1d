"""The clock of a profile: one training step, timed as a whole and in phases."""

from __future__ import annotations

import functools
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from .methods import Method

# The phases follow one another without gaps, so that they add up to the step.
PHASES = (
    "embedding",  # from the call to the base model, except the prompt: modes, positions, look-up, low-rank update
    "joint prompt",  # making the prompt (EPT: fusion and spaces; PEFT: repeating the prompt for every row)
    "base forward",  # the frozen model and the loss
    "base backward",  # from the loss to the gradient of the input embeddings
    "prompt backward",  # from there to the gradients of the prompt's parameters
    "optimizer",  # freeing the graph, clipping, AdamW, clearing the gradients
)


@dataclass(frozen=True)
class StepTime:
    """Milliseconds of one step, and of its phases."""

    step: float
    phases: dict[str, float]


def summary(values: Sequence[float]) -> dict[str, float]:
    """Returns the median and the 20 % and 80 % quantiles, interpolated linearly."""
    quintiles = statistics.quantiles(values, n=5, method="inclusive")
    return {"median": statistics.median(values), "p20": quintiles[0], "p80": quintiles[3]}


def time_step(method: Method, base: Any, batch: dict[str, Any], device: torch.device) -> StepTime:
    """Times one training step; on a GPU the clock runs until the device has finished."""
    on_gpu = device.type != "cpu"
    module: Any = torch.get_device_module(device)
    marks: list[tuple[str, Any]] = []  # each ends the phase that began at the previous mark

    def mark(phase: str) -> None:
        if on_gpu:  # events, so that nothing waits for the device within the step
            now: Any = module.Event(enable_timing=True)
            now.record()
        else:
            now = time.perf_counter()
        marks.append((phase, now))

    wait = functools.partial(torch.accelerator.synchronize, device) if on_gpu else lambda: None
    with _marked(method, base, mark):
        wait()
        start = time.perf_counter()
        take_step(method, batch, mark)
        wait()
        elapsed = 1e3 * (time.perf_counter() - start)
    phases = dict.fromkeys(PHASES, 0.0)
    for (_, before), (phase, now) in itertools.pairwise(marks):
        phases[phase] += before.elapsed_time(now) if on_gpu else 1e3 * (now - before)
    return StepTime(elapsed, phases)


def take_step(method: Method, batch: dict[str, Any], mark: Callable[[str], None] = lambda phase: None) -> None:
    """Runs forward, backward and update, calling `mark` at the end of each phase that ends between them."""
    mark("start")
    loss = method.loss(batch)
    mark("base forward")
    loss.backward()
    mark("prompt backward")
    del loss  # and with it the graph, which belongs to the step but to no other phase
    method.update()
    mark("optimizer")


@contextmanager
def _marked(method: Method, base: Any, mark: Callable[[str], None]) -> Iterator[None]:
    """Installs the marks inside the model, and removes them at the end."""
    owner, name = method.prompt_of
    called = False
    make_prompt = getattr(owner, name)

    def marked_prompt(*args: Any, **kwargs: Any) -> Any:
        mark("embedding")
        prompt = make_prompt(*args, **kwargs)
        mark("joint prompt")
        return prompt

    def before_base(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        nonlocal called
        mark("base forward" if called else "embedding")  # called twice if the prompt is read once
        called = True
        kwargs["inputs_embeds"].register_hook(lambda gradient: mark("base backward"))

    setattr(owner, name, marked_prompt)
    handle = base.register_forward_pre_hook(before_base, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
        delattr(owner, name)
