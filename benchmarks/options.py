"""EPT's step with all options of `ept train`, one at a time and together, against PEFT's prompt tuning.

PEFT's step is that of a plain Trainer: a decoder's logits at every position, rows in the given order, padded to the
longest of their batch. It is measured with the dtype and attention that transformers uses by default, with those of
EPT's step, and with every option of EPT's step, so that only the prompts differ: the last decides the goal. The frozen
model's dropout is always off, although a plain Trainer would have to pay for it.

All take their steps in turn; on a CPU with one thread, in CPU time.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ept.model.compilation import compile_layers
from ept.model.frozen import swap_frozen
from ept.profile.batches import make_batches, random_rows
from ept.profile.clock import take_step
from ept.profile.methods import Method, MethodSpec, make_method
from ept.profile.shapes import build_shape
from ept.runs.cpu import fastest_dtype, keep_freed_memory
from ept.runs.loading import default_device, load_base_model

from .attention import as_glibc_starts
from .goals import EPT_EVERYTHING, PEFT_EVERYTHING
from .headlines import BATCH, LENGTH, headline_rows
from .record import Row
from .timing import Call, Clock, ThreadClock, one_thread, ratio, time_in_turn

EPOCH = 25  # batches that are grouped by length; the one of median size is measured
TOKENS = {"ept": 40, "peft-pt": 100}
STARTED, PEFT_ALIKE = "PEFT, as a user starts it", "PEFT, dtype and attention of EPT's"
NOTHING = "EPT, no option"


@dataclass(frozen=True)
class Version:
    """A method's step, and the options that are on. `only_on`: the type of device that the version is for."""

    name: str
    method: str = "ept"
    setting: str = ""
    only_on: str = ""
    decoder_only: bool = False
    label_only: bool = False
    shared: bool = False  # our prompt is read once per batch
    grouped: bool = False
    kept: bool = False  # freed memory, on a CPU
    half: bool = False  # the fastest dtype
    eager: bool = False  # attention, on a CPU in bfloat16
    fused: bool = False  # norms, rotary embeddings, activations, where kernels run
    multiple: int = 1  # to which the lengths of batches are rounded up
    compiled: bool = False
    graphs: bool = False


ALL: dict[str, Any] = dict.fromkeys(("label_only", "shared", "grouped", "kept", "half", "eager", "fused"), True)
COMPILED: dict[str, Any] = {"multiple": 64, "compiled": True}
VERSIONS = (
    Version(STARTED, "peft-pt"),
    Version(PEFT_ALIKE, "peft-pt", half=True, eager=True),
    Version(PEFT_EVERYTHING, "peft-pt", **ALL),
    Version(NOTHING),
    Version("label-only logits", setting="training.label_only_logits=true", decoder_only=True, label_only=True),
    Version(
        "label-only logits, one prompt a batch",
        setting="training.shared_prompt=true",
        decoder_only=True,
        label_only=True,
        shared=True,
    ),
    Version("rows grouped by length", setting="training.group_by_length=true", grouped=True),
    Version("buckets of 32 tokens", setting="training.pad_to_multiple_of=32", multiple=32),
    Version("compiled layers", setting="training.compile_layers=true", **COMPILED),
    Version("CUDA graphs", setting="training.cuda_graphs=true", only_on="cuda", graphs=True, **COMPILED),
    Version("fused modules", setting="model.fast_frozen=true", only_on="cuda", fused=True),
    Version("freed memory kept", setting="always so", only_on="cpu", kept=True),
    Version("the fastest dtype", setting="model.dtype=fastest", half=True),
    Version("the fastest dtype, eager attention", "ept", "model.dtype=fastest", "cpu", half=True, eager=True),
    Version("all in float32", setting="all but the dtype", **ALL | {"half": False, "eager": False}),
    Version(EPT_EVERYTHING, setting="all", **ALL),
)


def options(
    *,
    shape: str,
    rounds: int,
    batch: int = BATCH,
    length: int = LENGTH,
    layers: int | None = None,
    compile_allowed: bool = True,
) -> Iterator[Row]:
    """Yields a row per version: its time, its gain over EPT without any option, and its time over PEFT's.

    Args:
        shape: one of `ept.profile.shapes`, with random weights; `headlines`: the demo's model and headlines.
    """
    from ept.runs.trainer import EpochLengthGroupedSampler  # needs pydantic and datasets, which a GPU host may lack

    device = default_device()
    if shape == "headlines":
        model, rows = headline_rows(BATCH * EPOCH)
        base: Any = load_base_model(model, "CAUSAL_LM", num_labels=0, pad_token_id=0, device=device)
    else:
        base, rows = build_shape(shape, dtype=torch.float32, device=device, layers=layers), []
    task_type = "SEQ_2_SEQ_LM" if base.config.is_encoder_decoder else "CAUSAL_LM"
    rows = rows or random_rows(batch * EPOCH, task_type, base.config.vocab_size, length, varied=True, seed=0)
    sampler = EpochLengthGroupedSampler(batch, [len(row["input_ids"]) for row in rows], seed=0)
    orders = {False: rows, True: [rows[index] for index in sampler]}
    versions = [
        version
        for version in VERSIONS
        if version.only_on in ("", device.type)
        and (compile_allowed or not version.compiled)
        and (task_type == "CAUSAL_LM" or not version.decoder_only)
    ]
    dtypes = {False: torch.float32, True: fastest_dtype(device)}
    bases: dict[tuple[Any, ...], Any] = {}
    methods: dict[tuple[str, bool, tuple[Any, ...]], Method] = {}
    on_cpu = device.type == "cpu"

    def step(version: Version) -> Call:
        dtype = dtypes[version.half]
        attention = "eager" if version.eager and on_cpu and dtype == torch.bfloat16 else "sdpa"
        is_fused = version.fused and not on_cpu
        # A copy of the model for each of its states, because switching would count in the time of a step.
        kind = dtype, attention, is_fused, version.compiled, version.graphs
        if kind not in bases:
            bases[kind] = copy.deepcopy(base).to(dtype)
            bases[kind].set_attn_implementation(attention)
            if is_fused:
                swap_frozen(bases[kind])
            if version.compiled:
                compile_layers(bases[kind], cuda_graphs=version.graphs)
        is_shared = version.shared and task_type == "CAUSAL_LM"
        key = version.method, is_shared, kind
        if key not in methods:
            spec = MethodSpec(version.method, TOKENS[version.method])
            methods[key] = make_method(spec, bases[kind], task_type, length, shared_prompt=is_shared)
        batches = make_batches(
            orders[version.grouped],
            batch=batch,
            count=EPOCH,
            task_type=task_type,
            pad_token_id=0,
            padding="longest" if version.multiple == 1 else "max_length",
            width=version.multiple,
            all_logits=not version.label_only,
            device=device,
        )
        inputs = sorted(batches, key=lambda made: made["input_ids"].numel())[EPOCH // 2]

        def take(_: int) -> None:
            if on_cpu:
                keep_freed_memory() if version.kept else as_glibc_starts()
            take_step(methods[key], inputs)

        return take

    clock = ThreadClock("cpu", 1) if on_cpu else Clock(device.type)
    with one_thread():
        calls = {version.name: step(version) for version in versions}
        times = time_in_turn(calls, clock, rounds=rounds, warmup=1)
    # PEFT's step with the same dtype and attention as a version's, if measured.
    alike = {(False, False): STARTED, (True, True): PEFT_ALIKE}
    for version in versions:
        own = times[version.name]
        over = {"over_started": STARTED, "over_alike": alike.get((version.half, version.eager))}
        yield {
            "provider": version.name,
            "setting": version.setting,
            **own.as_dict(),
            **({"gain_alone": ratio(times[NOTHING], own)} if version.method == "ept" else {}),
            **{name: ratio(own, times[other]) for name, other in over.items() if other},
            "model": "SmolLM2-135M-Instruct" if shape == "headlines" else f"{shape} (random weights)",
            "size": {"batch": batch, "length": length},
            "dtype": str(dtypes[version.half]).removeprefix("torch."),
            "method": f"{version.method}, {TOKENS[version.method]} virtual tokens",
        }
