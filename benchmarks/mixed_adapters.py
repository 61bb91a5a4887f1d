"""Rows per second with many adapters in one model: mixed batches against switching with `set_adapter`.

For 1, 10 and 100 adapters the same rows are answered in two ways: in batches in which every row names its own adapter
(`adapter_names`), and sorted by adapter, with `set_adapter` before each adapter's rows, in batches of the same size
as far as an adapter has rows. Rows go round the adapters, as requests of many users would. Both ways take turns, round
by round, so that a machine whose speed drifts slows both alike.

    python benchmarks/mixed_adapters.py                       the shape of SmolLM2-135M, random weights
    python benchmarks/mixed_adapters.py --output FILE.json    the record as JSON too
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ept import EPTConfig, EPTModel, get_ept_model
from ept.profile.shapes import build_shape, shape_config
from ept.runs.loading import default_device
from ept.utils.environment import hardware, versions

SHAPE = "smollm2-135m"


def build(layers: int | None, adapters: int, length: int, s: int, r: int, device: torch.device) -> EPTModel:
    """A model of random weights with `adapters` adapters a0, a1, …, none at its neutral start."""
    base = build_shape(SHAPE, dtype=torch.float32, device=device, layers=layers)
    config = EPTConfig(task_type="CAUSAL_LM", num_virtual_tokens=s, max_length=length, r=r)
    model = get_ept_model(base, config, "a0")
    for number in range(1, adapters):
        model.add_adapter(f"a{number}", config)
    with torch.no_grad():
        for parameter in model.prompt_encoder.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, device="cpu").to(device))
    return model.eval()


def ways(model: EPTModel, ids: torch.Tensor, batch: int) -> dict[str, Callable[[], torch.Tensor]]:
    """The two ways to answer all rows of `ids` `[rows, n]`; each returns the last logits `[rows, vocabulary]`."""
    adapters = list(model.peft_config)
    names = [adapters[row % len(adapters)] for row in range(len(ids))]

    def answer(rows: list[int], **options: Any) -> torch.Tensor:
        return model(ids[rows], logits_to_keep=1, use_cache=False, **options).logits[:, -1]

    def mixed() -> torch.Tensor:
        starts = range(0, len(ids), batch)
        chunks = [list(range(start, min(start + batch, len(ids)))) for start in starts]
        return torch.cat([answer(rows, adapter_names=[names[row] for row in rows]) for rows in chunks])

    def switching() -> torch.Tensor:
        answers = torch.empty(len(ids), model.config.vocab_size, device=ids.device)
        for adapter in adapters:
            model.set_adapter(adapter, inference_mode=True)
            own = [row for row, name in enumerate(names) if name == adapter]
            for start in range(0, len(own), batch):
                answers[own[start : start + batch]] = answer(own[start : start + batch])
        return answers

    return {"mixed": mixed, "switching": switching}


@torch.no_grad()
def measure(model: EPTModel, ids: torch.Tensor, batch: int, rounds: int) -> dict[str, Any]:
    """Rows per second of both ways: median and 20 and 80 % over the rounds. Their answers are compared first."""
    calls = ways(model, ids, batch)
    answers = {name: call() for name, call in calls.items()}  # also the warm-up
    torch.testing.assert_close(answers["mixed"], answers["switching"], rtol=1e-3, atol=1e-3)
    synchronize = torch.accelerator.synchronize if ids.device.type != "cpu" else (lambda: None)
    rates: dict[str, list[float]] = {name: [] for name in calls}
    for index in range(rounds):
        for name in list(calls) if index % 2 else reversed(list(calls)):
            synchronize()
            start = time.perf_counter()
            calls[name]()
            synchronize()
            rates[name].append(len(ids) / (time.perf_counter() - start))
    ratios = [mixed / switching for mixed, switching in zip(rates["mixed"], rates["switching"], strict=True)]
    spread = {name: summary(values) for name, values in rates.items()}
    return {**{f"{name}_rows_per_second": value for name, value in spread.items()}, "ratio": summary(ratios)}


def summary(values: list[float]) -> dict[str, float]:
    quintiles = statistics.quantiles(values, n=5, method="inclusive")
    return {"median": statistics.median(values), "p20": quintiles[0], "p80": quintiles[3]}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, help="only the first so many layers")
    parser.add_argument("--adapters", type=int, nargs="+", default=[1, 10, 100])
    parser.add_argument("--rows", type=int, default=100)
    parser.add_argument("--batch", type=int, default=10)
    parser.add_argument("--length", type=int, default=12, help="text tokens a row")
    parser.add_argument("--num-virtual-tokens", type=int, default=4)
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--output", type=Path, help="write the record here as JSON")
    given = parser.parse_args(arguments)

    device = default_device()
    options = {name: value for name, value in vars(given).items() if name != "output" and value is not None}
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(shape_config(SHAPE).vocab_size, (given.rows, given.length), generator=generator).to(device)
    results = []
    for adapters in given.adapters:
        model = build(given.layers, adapters, given.length, given.num_virtual_tokens, given.rank, device)
        results.append({"adapters": adapters, **measure(model, ids, given.batch, given.rounds)})
    words = (
        f"--{n.replace('_', '-')} {' '.join(map(str, v)) if isinstance(v, list) else v}" for n, v in options.items()
    )
    record = {
        "command": " ".join(["python benchmarks/mixed_adapters.py", *words]),
        "model": f"{SHAPE} shape, random weights",
        "dtype": "float32",
        "device": device.type,
        **options,
        "results": results,
        "hardware": hardware(),
        "versions": versions(),
    }
    text = json.dumps(record, indent=2)
    print(text)
    if given.output:
        given.output.parent.mkdir(parents=True, exist_ok=True)
        given.output.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
