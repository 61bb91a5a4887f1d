"""What each option of the training step gains on its own.

Every option is switched off and on in turn (off on off on ...), on the same model and the same rows, with everything
else at its default; the figure is the median of the pairs' ratios, off over on: above 1 the option gains.

    python benchmarks/step_options.py                        SmolLM2-135M's and T5-base's shapes, random weights
    python benchmarks/step_options.py --layers 2             the same with two layers, to try it out
    python benchmarks/step_options.py --only SDPA            the options of these names alone, comma-separated
    python benchmarks/step_options.py --output FILE.json     the record as JSON too

A loop without waits and CUDA graphs need a device that runs beside the processor: without one they have no figure, and
the record says so.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from step_records import command, write

from ept.model.compilation import compile_layers, uncompiled
from ept.profile.batches import Row, make_batches, random_rows
from ept.profile.clock import summary, take_step
from ept.profile.methods import Method, MethodSpec, make_method
from ept.profile.shapes import build_shape
from ept.runs.loading import default_device
from ept.runs.trainer import EpochLengthGroupedSampler
from ept.utils.environment import hardware, versions

DECODER, ENCODER_DECODER = "smollm2-135m", "t5-base"
DTYPES = ("float32", "bfloat16")
NO_WAITS, GRAPHS = "no waits in the loop", "CUDA graphs of compiled layers"
NEED_CUDA = {NO_WAITS: "there is no device to wait for", GRAPHS: "they need a CUDA device"}
PASS = 4  # batches of a measurement where the length of the batches matters


@dataclass
class Option:
    """One option: what sets it, and the work without and with it."""

    name: str
    setting: str
    shape: str
    off: Callable[[], None]
    on: Callable[[], None]


@dataclass
class Bench:
    """EPT on a shape, and the batches that its steps take."""

    shape: str
    layers: int | None
    batch: int
    length: int
    dtype: torch.dtype
    device: torch.device

    def __post_init__(self) -> None:
        self.base = build_shape(self.shape, dtype=self.dtype, device=self.device, layers=self.layers)
        self.task_type = "SEQ_2_SEQ_LM" if self.base.config.is_encoder_decoder else "CAUSAL_LM"
        self.method: Method = make_method(MethodSpec.parse("ept"), self.base, self.task_type, self.length)

    def rows(self, varied: bool) -> list[Row]:
        count = self.batch * PASS if varied else self.batch
        return random_rows(count, self.task_type, self.base.config.vocab_size, self.length, varied, seed=0)

    def batches(self, rows: list[Row], padding: str = "longest", width: int = 1, all_logits: bool = False) -> Any:
        return make_batches(
            rows,
            batch=self.batch,
            count=len(rows) // self.batch,
            task_type=self.task_type,
            pad_token_id=0,
            padding=padding,
            width=width,
            all_logits=all_logits,
            device=self.device,
        )

    def steps(self, batches: list[dict[str, Any]]) -> Callable[[], None]:
        def take() -> None:
            for batch in batches:
                take_step(self.method, batch)

        return take


def decoder_options(bench: Bench) -> Iterator[Option]:
    """Logits, grouping, padding, buckets, compilation, the optimizer."""
    rows, varied = bench.rows(varied=False), bench.rows(varied=True)
    one, many = bench.steps(bench.batches(rows)), bench.steps(bench.batches(varied))
    fixed = bench.steps(bench.batches(varied, "max_length", bench.length))
    yield Option(
        "label-only logits",
        "training.label_only_logits=true",
        bench.shape,
        bench.steps(bench.batches(rows, all_logits=True)),
        one,
    )
    yield Option("padding to the longest row", "training.pad_to_multiple_of=null", bench.shape, fixed, many)
    yield Option(
        "rows grouped by length",
        "training.group_by_length=true",
        bench.shape,
        many,
        bench.steps(bench.batches(grouped(varied, bench.batch))),
    )
    buckets = bench.steps(bench.batches(varied, "max_length", 32))
    yield Option("buckets of 32 tokens", "training.pad_to_multiple_of=32", bench.shape, many, buckets)
    compile_layers(bench.base)

    def plain() -> None:
        with uncompiled():
            one()

    yield Option("compiled layers", "training.compile_layers=true", bench.shape, plain, one)


def cuda_options(bench: Bench) -> Iterator[Option]:
    """What only a CUDA device shows; after `decoder_options`, which has compiled the layers."""
    if bench.device.type != "cuda":
        return
    many = bench.batches(bench.rows(varied=True), "max_length", bench.length)

    def waiting() -> None:
        for batch in many:
            take_step(bench.method, batch)
            synchronize(bench.device)

    yield Option(NO_WAITS, "always so", bench.shape, waiting, bench.steps(many))
    graphs = replace(bench)
    compile_layers(graphs.base, cuda_graphs=True)
    yield Option(GRAPHS, "training.cuda_graphs=true", bench.shape, bench.steps(many), graphs.steps(many))


def optimizer_options(bench: Bench) -> Iterator[Option]:
    """The optimizer's step alone, on EPT's parameters: fused, and over one flat tensor."""
    shapes = [parameter.shape for parameter in bench.method.parameters]
    plain, fused = (updates(shapes, fused, bench.device) for fused in (False, True))
    flat = updates([torch.Size([sum(shape.numel() for shape in shapes)])], True, bench.device)
    yield Option("fused AdamW (100 updates)", "training.optim=adamw_torch_fused", bench.shape, plain, fused)
    yield Option("one flat parameter (100 updates)", "not offered", bench.shape, fused, flat)


def attention_options(bench: Bench) -> Iterator[Option]:
    """SDPA in place of attention written out."""
    steps = bench.steps(bench.batches(bench.rows(varied=False)))

    def with_attention(name: str) -> Callable[[], None]:
        def take() -> None:
            bench.base.set_attn_implementation(name)
            steps()

        return take

    yield Option("SDPA", "model.attn_implementation=sdpa", bench.shape, with_attention("eager"), with_attention("sdpa"))


def grouped(rows: list[Row], batch: int) -> list[Row]:
    """The rows in the order in which `ept train` takes them with `group_by_length`."""
    sampler = EpochLengthGroupedSampler(batch, [len(row["input_ids"]) for row in rows], seed=0)
    return [rows[index] for index in sampler]


def updates(shapes: list[torch.Size], fused: bool, device: torch.device) -> Callable[[], None]:
    parameters = [torch.nn.Parameter(torch.randn(shape, device=device)) for shape in shapes]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=fused)

    def take() -> None:
        for _ in range(100):
            optimizer.step()

    return take


def measure(option: Option, pairs: int, warmup: int, device: torch.device) -> dict[str, Any]:
    """Off and on in turn."""
    times: dict[str, list[float]] = {"off": [], "on": []}
    for index in range(warmup + pairs):
        for name, work in (("off", option.off), ("on", option.on)):
            synchronize(device)
            start = time.perf_counter()
            work()
            synchronize(device)
            if index >= warmup:
                times[name].append(1e3 * (time.perf_counter() - start))
    ratios = [off / on for off, on in zip(times["off"], times["on"], strict=True)]
    return {
        "option": option.name,
        "setting": option.setting,
        "shape": option.shape,
        "off_ms": summary(times["off"]),
        "on_ms": summary(times["on"]),
        "gain": summary(ratios),
        "pairs": pairs,
    }


def synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=128, help="most text tokens a row")
    parser.add_argument("--layers", type=int, help="only the first so many layers of the shapes")
    parser.add_argument("--pairs", type=int, default=7, help="measured pairs, off and on")
    parser.add_argument("--warmup", type=int, default=1, help="pairs before them")
    parser.add_argument("--output", type=Path, help="write the record here as JSON")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the shapes' weights")
    parser.add_argument("--only", help="comma-separated names of options; default: all")
    arguments = parser.parse_args()
    only = set(arguments.only.split(",")) if arguments.only else None

    device = default_device()
    rows = []
    for shape, makers in (
        (DECODER, (decoder_options, cuda_options, optimizer_options)),
        (ENCODER_DECODER, (attention_options,)),
    ):
        dtype = getattr(torch, arguments.dtype)
        bench = Bench(shape, arguments.layers, arguments.batch, arguments.length, dtype, device)
        for make in makers:
            for option in make(bench):
                if only is not None and option.name not in only:
                    continue
                rows.append(measure(option, arguments.pairs, arguments.warmup, device))
                gain = rows[-1]["gain"]
                print(f"{option.name:32} {gain['median']:.3f} ({gain['p20']:.3f} to {gain['p80']:.3f})", flush=True)
    if not rows:
        parser.error(f"--only {arguments.only}: no option has such a name on {device.type}")
    record = {
        "command": command("step_options.py", arguments),
        "method": "ept, 40 virtual tokens",
        "dtype": arguments.dtype,
        "batch": arguments.batch,
        "length": arguments.length,
        "layers": arguments.layers,
        "batches_of_varied_lengths": PASS,
        "options": rows,
        "not_measured": {} if device.type == "cuda" else NEED_CUDA,
        "hardware": hardware(),
        "versions": versions(),
    }
    write(record, arguments.output)


if __name__ == "__main__":
    main()
