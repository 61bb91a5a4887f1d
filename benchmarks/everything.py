"""EPT's step on a processor with all that `ept train` can do, option by option, against PEFT's prompt tuning.

PEFT's step is taken as a plain Trainer takes it: a decoder's logits at every position, rows in the order in which they
come, padded to the longest of their batch. Once it has the dtype and attention that transformers starts with, once
those of EPT's step, by which the goal is judged, and once every option that EPT's has, so that the prompts alone
differ. In all of them the frozen model's dropout is off, which a plain Trainer would have to pay for.

One thread, in time of the processor, all in turn.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ept.profile.batches import make_batches, random_rows
from ept.profile.clock import take_step
from ept.profile.methods import Method, MethodSpec, make_method
from ept.profile.shapes import build_shape
from ept.runs.cpu import fastest_dtype, keep_freed_memory
from ept.runs.loading import load_base_model
from ept.runs.trainer import EpochLengthGroupedSampler

from .attention import as_glibc_starts
from .goals import EPT_EVERYTHING
from .headlines import BATCH, LENGTH, headline_rows
from .record import Row
from .timing import Call, ThreadClock, ratio, time_in_turn

CPU = torch.device("cpu")
EPOCH = 25  # batches that are grouped by length; the one of median size is measured
TOKENS = {"ept": 40, "peft-pt": 100}
STARTED, PEFT_ALIKE = "PEFT, as a user starts it", "PEFT, dtype and attention of EPT's"
EQUIPPED, NOTHING = "PEFT, every option", "EPT, no option"


@dataclass(frozen=True)
class Version:
    """A method's step, and the options that are on."""

    name: str
    method: str = "ept"
    setting: str = ""
    label_only: bool = False
    grouped: bool = False
    kept: bool = False  # memory
    half: bool = False  # the fastest dtype
    eager: bool = False

    @property
    def is_peft(self) -> bool:
        return self.method != "ept"


ALL: dict[str, Any] = dict.fromkeys(("label_only", "grouped", "kept", "half", "eager"), True)
VERSIONS = (
    Version(STARTED, "peft-pt"),
    Version(PEFT_ALIKE, "peft-pt", half=True, eager=True),
    Version(EQUIPPED, "peft-pt", **ALL),
    Version(NOTHING),
    Version("label-only logits", setting="training.label_only_logits=true", label_only=True),
    Version("rows grouped by length", setting="training.group_by_length=true", grouped=True),
    Version("freed memory kept", setting="always so", kept=True),
    Version("the fastest dtype", setting="model.dtype=fastest", half=True),
    Version("the fastest dtype, eager attention", setting="model.dtype=fastest", half=True, eager=True),
    Version("all in float32", setting="all but the dtype", label_only=True, grouped=True, kept=True),
    Version(EPT_EVERYTHING, setting="all", **ALL),
)


def everything(
    *, shape: str, rounds: int, batch: int = BATCH, length: int = LENGTH, layers: Any = None
) -> Iterator[Row]:
    """Yields a row a version: its time, its gain over EPT without any option, and its time over PEFT's.

    Args:
        shape: one of `ept.profile.shapes`, with random weights; `headlines`: the demo's model and its headlines.
    """
    if shape == "headlines":
        model, rows = headline_rows(BATCH * EPOCH)
        base: Any = load_base_model(model, "CAUSAL_LM", num_labels=0, pad_token_id=0, device=CPU)
        task_type = "CAUSAL_LM"
    else:
        base = build_shape(shape, dtype=torch.float32, device=CPU, layers=layers)
        task_type = "SEQ_2_SEQ_LM" if base.config.is_encoder_decoder else "CAUSAL_LM"
        rows = random_rows(batch * EPOCH, task_type, base.config.vocab_size, length, varied=True, seed=0)
    half = fastest_dtype(CPU)
    bases = {torch.float32: base, half: base if half == torch.float32 else copy.deepcopy(base).to(half)}
    sampler = EpochLengthGroupedSampler(batch, [len(row["input_ids"]) for row in rows], seed=0)
    orders = {False: rows, True: [rows[index] for index in sampler]}
    methods: dict[tuple[str, torch.dtype], Method] = {}

    def step(version: Version) -> Call:
        dtype = half if version.half else torch.float32
        key = version.method, dtype
        if key not in methods:
            methods[key] = make_method(
                MethodSpec(version.method, TOKENS[version.method]), bases[dtype], task_type, length
            )
        batches = make_batches(
            orders[version.grouped],
            batch=batch,
            count=EPOCH,
            task_type=task_type,
            pad_token_id=0,
            padding="longest",
            width=1,
            all_logits=not version.label_only,
            device=CPU,
        )
        inputs = sorted(batches, key=lambda made: made["input_ids"].numel())[EPOCH // 2]

        def take(_: int) -> None:
            keep_freed_memory() if version.kept else as_glibc_starts()
            methods[key].enter(bases[dtype])
            bases[dtype].set_attn_implementation("eager" if version.eager and dtype == torch.bfloat16 else "sdpa")
            take_step(methods[key], inputs)

        return take

    versions = [version for version in VERSIONS if task_type == "CAUSAL_LM" or version.name != "label-only logits"]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        calls = {version.name: step(version) for version in versions}
        times = time_in_turn(calls, ThreadClock("cpu", 1), rounds=rounds, warmup=1)
    finally:
        torch.set_num_threads(threads)
    for version in versions:
        own = times[version.name]
        yield {
            "provider": version.name,
            "setting": version.setting,
            **own.as_dict(),
            **({} if version.is_peft else {"gain_alone": ratio(times[NOTHING], own)}),
            "over_started": ratio(own, times[STARTED]),
            **({"over_alike": ratio(own, times[alike])} if (alike := _alike(version)) else {}),
            "model": "SmolLM2-135M-Instruct" if shape == "headlines" else f"{shape} (random weights)",
            "size": {"batch": batch, "length": length},
            "dtype": str(half if version.half else torch.float32).removeprefix("torch."),
            "method": f"{version.method}, {TOKENS[version.method]} virtual tokens",
        }


def _alike(version: Version) -> str:
    """Names the step of PEFT's that has the dtype and attention of `version`; an empty text where none is measured."""
    return {(False, False): STARTED, (True, True): PEFT_ALIKE}.get((version.half, version.eager), "")
