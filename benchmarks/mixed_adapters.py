"""Rows per second with many adapters in one model: mixed batches against switching with `set_adapter`.

The same rows are answered in two ways: in batches in which every row names its own adapter (`adapter_names`), and
sorted by adapter, with `set_adapter` before each adapter's rows, in batches of the same size if an adapter has that
many rows. The adapters alternate from row to row, as with requests from many users.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from ept import EPTConfig, EPTModel, get_ept_model
from ept.profile.shapes import build_shape
from ept.runs.loading import default_device

from .record import Row
from .timing import Call, Clock, ratio, summary, time_in_turn

SHAPE = "smollm2-135m"
LENGTH, VIRTUAL_TOKENS, RANK = 12, 4, 4


@torch.no_grad()
def measure(
    *, adapters: tuple[int, ...], rows: int, batch: int, rounds: int, layers: int | None = None
) -> Iterator[Row]:
    """Yields both ways for every number of adapters, on the shape of SmolLM2-135M with random weights."""
    device = default_device()
    size = {"rows": rows, "batch": batch, "length": LENGTH, "num_virtual_tokens": VIRTUAL_TOKENS, "rank": RANK}
    config = EPTConfig(task_type="CAUSAL_LM", num_virtual_tokens=VIRTUAL_TOKENS, max_length=LENGTH, r=RANK)
    for number in adapters:
        model = get_ept_model(
            build_shape(SHAPE, dtype=torch.float32, device=device, layers=layers), config, "a0"
        ).eval()
        for other in range(1, number):
            model.add_adapter(f"a{other}", config)
        for parameter in model.prompt_encoder.parameters():  # none stays at its neutral start
            parameter.add_(0.1 * torch.randn(parameter.shape, device="cpu").to(device))
        ids = torch.randint(model.config.vocab_size, (rows, LENGTH), generator=torch.Generator().manual_seed(0))
        calls = ways(model, ids.to(device), batch)
        torch.testing.assert_close(calls["mixed"](0), calls["switching"](0), rtol=1e-3, atol=1e-3)
        times = time_in_turn(calls, Clock(device.type), rounds=rounds, warmup=0)
        for way, timing in times.items():
            yield {
                "case": f"steps/adapters, {number}",
                "provider": way,
                **timing.as_dict(),
                "rows_per_second": summary([rows / seconds for seconds in timing.samples]),
                "mixed_over_switching": ratio(times["switching"], times["mixed"]),
                "model": SHAPE,
                "size": size,
                "dtype": "float32",
            }


def ways(model: EPTModel, ids: torch.Tensor, batch: int) -> dict[str, Call]:
    """Returns the two ways to answer all rows of `ids` `[rows, n]`, each with the last logits `[rows, vocabulary]`."""
    adapters = list(model.peft_config)
    names = [adapters[row % len(adapters)] for row in range(len(ids))]

    def answer(rows: list[int], **options: Any) -> torch.Tensor:
        return model(ids[rows], logits_to_keep=1, use_cache=False, **options).logits[:, -1]

    def in_batches(rows: list[int]) -> list[list[int]]:
        return [rows[start : start + batch] for start in range(0, len(rows), batch)]

    def mixed(_: int) -> torch.Tensor:
        batches = in_batches(list(range(len(ids))))
        return torch.cat([answer(rows, adapter_names=[names[row] for row in rows]) for rows in batches])

    def switching(_: int) -> torch.Tensor:
        answers = torch.empty(len(ids), model.config.vocab_size, device=ids.device)
        for adapter in adapters:
            model.set_adapter(adapter, inference_mode=True)
            for rows in in_batches([row for row, name in enumerate(names) if name == adapter]):
                answers[rows] = answer(rows)
        return answers

    return {"mixed": mixed, "switching": switching}
