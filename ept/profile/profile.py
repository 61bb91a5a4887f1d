"""Whole training steps of prompt tuning, DePT, EPT and PEFT's prompt tuning, side by side on one frozen model."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..embedding import rows_of
from ..model.base_model import input_embedding
from ..model.ept_model import EPTModel
from ..model.reading import infer_task_type
from ..runs.cpu import choose_attention, keep_freed_memory
from ..runs.loading import default_device, load_base_model, task_type_of
from ..utils.environment import hardware, versions
from .batches import Row, make_batches, random_rows
from .clock import PHASES, StepTime, summary, take_step, time_step
from .methods import USUAL_METHODS, Method, MethodSpec, make_method
from .shapes import build_shape
from .trace import allocated_by, shares_by_kind, trace_step

if TYPE_CHECKING:
    from ..runs.config import ModelConfig

CHOICES: dict[str, tuple[str | None, ...]] = {
    "dtype": ("float32", "bfloat16"),
    "quantization": (None, "nf4", "fp4"),
    "padding": ("none", "longest", "max_length"),
    "logits": ("labels", "all"),
}
MINIMA = {"batch": 1, "steps": 2, "warmup": 1}


@dataclass
class ProfileConfig:
    """Settings of a profile; `shape` or `model` names the base model."""

    shape: str | None = None  # a key of `shapes.SHAPES`, with random weights
    model: ModelConfig | None = None  # except its dtype and quantisation, which are set below
    dtype: str = "float32"
    quantization: str | None = None  # "nf4" or "fp4"
    # With quantization, PT, DePT and EPT use this project's 4-bit layers if these have kernels here, as in
    # `get_ept_model`, and PEFT's methods use bitsandbytes'. False: all use bitsandbytes'.
    fast_4bit: bool = True
    # The same for fused norms, rotary embeddings and activations; False: the model's own.
    fast_frozen: bool = True
    shared_prompt: bool | None = None  # our methods read a decoder's prompt once per batch, as in `ept train`
    attn_implementation: str | None = None  # None: as `ept train` chooses, which is recorded
    layers: int | None = None  # number of a shape's layers to keep, from the first; None: all
    methods: tuple[str, ...] = USUAL_METHODS  # `name` or `name:num_virtual_tokens`
    batch: int = 8  # rows
    length: int = 128  # maximum text tokens of a row: max_length of the adapters
    # "none": every row has `length` tokens; "longest": lengths vary and each batch is padded to its longest row;
    # "max_length": they vary and every batch is padded to `length`.
    padding: str = "none"
    logits: str = "labels"  # of a decoder, for all methods: at the "labels", or "all"
    steps: int = 10  # measured rounds
    warmup: int = 2  # rounds before them
    seed: int = 0

    def check(self) -> list[MethodSpec]:
        """Returns the methods; raises ValueError for a wrong value."""
        if (self.shape is None) == (self.model is None or self.model.name_or_path is None):
            raise ValueError("give exactly one of a shape (random weights) and a model to load")
        if self.layers is not None and self.shape is None:
            raise ValueError("layers shortens a shape; a loaded model is measured whole")
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r}: choose one of {', '.join(map(str, allowed))}")
        for name, minimum in MINIMA.items():
            if getattr(self, name) < minimum:
                raise ValueError(f"{name} must be at least {minimum}, got {getattr(self, name)}")
        specs = [MethodSpec.parse(text) for text in self.methods]
        if len(set(specs)) < len(specs) or not specs:
            raise ValueError(f"methods {','.join(self.methods)!r}: name at least one, each once")
        return specs


def profile(
    config: ProfileConfig,
    *,
    rows: Sequence[Row] | None = None,
    base: Any = None,
    traces: Path | None = None,
    progress: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Measures the methods and returns the record, ready for JSON.

    Args:
        rows: of a real dataset, as from `encode_split`, used in order; None: random ids.
        base: an already loaded model instead of the one that `config` names (whose name is recorded).
        traces: a folder for one Chrome trace per method (`trace_<method>.json`); None: none are kept.
        progress: called with a line on what is being done.

    Raises:
        ValueError: a setting is wrong, the rows do not fit the model, or the model has no language-model head.
    """
    specs = config.check()
    device = default_device()
    progress("building the model")
    if base is None:
        base = load(config, device)
    task_type = task_type_of_base(base)
    turns, vocabulary = config.warmup + config.steps, rows_of(input_embedding(base))
    if rows is None:
        varied = config.padding != "none"
        count = config.batch * (turns if varied else 1)
        rows = random_rows(count, task_type, vocabulary, config.length, varied, config.seed)
    elif max(max(row["input_ids"]) for row in rows) >= vocabulary:
        raise ValueError(f"the data has token ids beyond the model's vocabulary of {vocabulary}: use its own tokenizer")
    longest = max(config.length, *(len(row["input_ids"]) for row in rows))
    if config.attn_implementation is None and (config.model is None or config.model.attn_implementation is None):
        choose_attention(base, longest)  # as in `ept train`
    if device.type == "cpu":
        keep_freed_memory()
    batches = make_batches(
        rows,
        batch=config.batch,
        count=turns,
        task_type=task_type,
        pad_token_id=getattr(base.config, "pad_token_id", None) or 0,
        padding=config.padding,
        width=longest,
        all_logits=config.logits == "all",
        device=device,
    )
    fast_4bit = None if config.quantization is None else config.fast_4bit
    how = fast_4bit, config.fast_frozen, config.shared_prompt
    methods = [make_method(spec, base, task_type, longest, *how) for spec in specs]

    # In rounds, A B C D A B C D ..., so that a machine whose speed drifts slows all alike; speed-ups are taken within
    # a round.
    times: list[list[StepTime]] = [[] for _ in methods]
    for turn, batch in enumerate(batches):
        progress(f"turn {turn + 1} of {turns}")
        for method, own in zip(methods, times):
            method.enter(base)
            step = time_step(method, base, batch, device)
            if turn >= config.warmup:
                own.append(step)

    widest = max(batches, key=lambda batch: batch["input_ids"].numel())
    memory, shares = [], []
    for method in methods:
        progress(f"peak memory and kinds of work of {method.spec.label}")
        method.enter(base)
        memory.append(_peak_memory(method, widest, device, traces))
        shares.append(shares_by_kind(functools.partial(take_step, method, widest)))

    measured = batches[config.warmup :]
    # A batch without padding has no mask.
    text_tokens = statistics.mean(int(batch.get("attention_mask", batch["input_ids"] >= 0).sum()) for batch in measured)
    # Speed-ups are over prompt tuning at its default length, else at another, else over the first method.
    reference = min(range(len(specs)), key=lambda i: (specs[i].label != "pt", specs[i].name != "pt"))
    on_gpu = device.type == "cuda"
    return {
        "model": {
            "name": config.model.name_or_path
            if config.model and not config.shape
            else f"{config.shape} (random weights)",
            "class": type(base).__name__,
            "task_type": task_type,
            "layers": config.layers,
            "dtype": config.dtype,
            "quantization": config.quantization,
            "fast_4bit": fast_4bit,
            "fast_frozen": config.fast_frozen,
            "attention": base.config._attn_implementation,
        },
        "device": torch.cuda.get_device_name(device) if on_gpu else device.type.upper(),
        "batch": config.batch,
        "length": config.length,
        "data": {
            "padding": config.padding,
            "padding_side": "left" if task_type == "CAUSAL_LM" else "right",
            "text_tokens_a_batch": text_tokens,
            "padded_tokens_a_batch": statistics.mean(batch["input_ids"].numel() for batch in measured),
            "longest_answer": max(len(row["labels"]) for row in rows),
        },
        "logits": config.logits if task_type == "CAUSAL_LM" else "labels",
        "steps": config.steps,
        "warmup": config.warmup,
        "reference": specs[reference].label,
        "peak_memory_kind": "most CUDA memory allocated during a step, weights included"
        if on_gpu
        else "most memory allocated by a step above what was there before it (torch profiler)",
        "methods": [
            {
                "label": method.spec.label,
                "method": method.spec.name,
                "num_virtual_tokens": method.spec.num_virtual_tokens,
                "shared_prompt": isinstance(method.model, EPTModel)
                and method.model.shares_prompt_of(config.batch, config.length),
                "trainable_parameters": sum(parameter.numel() for parameter in method.parameters),
                "tokens_per_second": 1e3 * text_tokens / statistics.median(t.step for t in own),
                "peak_memory_bytes": peak,
                "shares": by_kind,
                **_statistics(own, times[reference]),
            }
            for method, own, peak, by_kind in zip(methods, times, memory, shares)
        ],
        "hardware": hardware(),
        "versions": versions(),
    }


def sweep(text: str, methods: Sequence[str]) -> tuple[str, ...]:
    """Lists every method at every prompt length of `text`, for `ProfileConfig.methods`; its own length is ignored.

    Raises:
        ValueError: `text` does not look like `num_virtual_tokens=10,20,40`.
    """
    key, _, listed = text.partition("=")
    lengths = [length.strip() for length in listed.split(",")]
    if key != "num_virtual_tokens" or not all(length.isdecimal() and int(length) for length in lengths):
        raise ValueError(f"cannot read --sweep {text!r}: write it as num_virtual_tokens=10,20,40")
    names = [MethodSpec.parse(method).name for method in methods]
    return tuple(f"{name}:{length}" for name in names for length in lengths)


def load(config: ProfileConfig, device: torch.device) -> Any:
    """Loads the configured base model, frozen, on `device`."""
    if config.shape is not None:
        return build_shape(
            config.shape,
            dtype=getattr(torch, config.dtype),
            device=device,
            quantization=config.quantization,
            attn_implementation=config.attn_implementation,
            layers=config.layers,
        )
    assert config.model is not None, "`check` refuses such a configuration"
    model = config.model.model_copy()
    model.dtype = config.dtype  # type: ignore[assignment]
    model.attn_implementation = config.attn_implementation or model.attn_implementation
    model.load_in_4bit = config.quantization is not None
    model.quant_type = config.quantization or model.quant_type  # type: ignore[assignment]
    return load_base_model(model, task_type_of(model), num_labels=2, pad_token_id=0, device=device)


def _statistics(own: list[StepTime], reference: list[StepTime]) -> dict[str, Any]:
    step = summary([t.step for t in own])
    # A phase's mean share of its step, times the median step: shares do not follow a drift, and they add up. The
    # fastest and slowest fifth, but at least one step each, are left out as disturbed.
    cut = max(1, len(own) // 5) if len(own) > 2 else 0
    usual = sorted(own, key=lambda t: t.step)[cut : len(own) - cut]
    phases = {phase: step["median"] * statistics.mean(t.phases[phase] / t.step for t in usual) for phase in PHASES}
    return {
        "step_ms": {**step, "samples": [t.step for t in own]},
        "phases_ms": phases,
        "phases_over_step": sum(phases.values()) / step["median"],
        "speedup": summary([theirs.step / ours.step for ours, theirs in zip(own, reference)]),
    }


def _peak_memory(method: Method, batch: dict[str, Any], device: torch.device, traces: Path | None) -> int:
    file = traces / f"trace_{method.spec.label.replace(':', '_')}.json" if traces is not None else None
    if device.type != "cuda":
        return allocated_by(lambda: take_step(method, batch), file)
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    take_step(method, batch)
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device)
    if file is not None:
        trace_step(lambda: take_step(method, batch), file)
    return peak


def task_type_of_base(base: Any) -> str:
    """Returns SEQ_2_SEQ_LM or CAUSAL_LM; raises ValueError for a model without a language-model head."""
    if (task_type := infer_task_type(base)) not in ("SEQ_2_SEQ_LM", "CAUSAL_LM"):
        raise ValueError(
            f"cannot profile {type(base).__name__}: take an encoder-decoder, or a decoder with a language-model head"
        )
    return task_type
