"""The places where a training step waits for an accelerator: none of ours, and of transformers' those named here."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from tiny_models import FAMILIES, ONE_A_TASK, TASK_OF, adapted, make_batch
from waits import Waits

# Without a mask a decoder looks in its positions for several texts in one row, and asks once.
WITHOUT_PADDING = {"llama": ["transformers.masking_utils.find_packed_sequence_indices"], "t5": [], "bert": []}


def step_of(name: str, lengths: tuple[int, int], device: str = "cpu") -> tuple[Any, dict[str, Any]]:
    """Returns a model after its first training step, and a batch as the collator makes it: without a needless mask."""
    model = adapted(name).to(device).train()
    batch: dict[str, Any] = {key: value.to(device) for key, value in make_batch(name, lengths).items()}
    if len(set(lengths)) == 1:
        del batch["attention_mask"]
    if TASK_OF[name] == "CAUSAL_LM":
        batch |= {"logits_to_keep": 3, "text_mask": batch["labels"] == -100}
    model(**batch).loss.backward()  # the first batch's labels are looked at
    return model, batch


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("lengths", [(7, 7), (7, 4)], ids=["unpadded", "padded"])
def test_nothing_of_ours_waits(name: str, lengths: tuple[int, int]) -> None:
    model, batch = step_of(name, lengths)
    with Waits() as waits:
        model(**batch).loss.backward()
    assert [place for place in waits.of_an_accelerator() if not place.startswith("transformers.")] == []
    if lengths == (7, 7) and name in WITHOUT_PADDING:
        assert waits.of_an_accelerator() == WITHOUT_PADDING[name]


@pytest.mark.parametrize("name", FAMILIES)
def test_no_mask_and_a_mask_of_ones_are_the_same(name: str) -> None:
    """For loss and gradients, although the base model gets a mask in only one case."""
    model, batch = step_of(name, (7, 7))
    model.eval()  # a head may drop out
    seen: list[bool] = []
    model.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs.get("attention_mask") is not None), with_kwargs=True
    )
    found = []
    for given in ({}, {"attention_mask": torch.ones(2, 7, dtype=torch.int64)}):
        model.zero_grad()
        loss = model(**batch, **given).loss
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    assert seen == [False, True]
    for without, with_ones in zip(*found, strict=True):
        torch.testing.assert_close(without, with_ones, rtol=1e-4, atol=1e-5)


def test_the_counter_counts_and_names_who_asks() -> None:
    with Waits() as waits:
        bool(torch.ones(1).any())
        torch.arange(3)[torch.tensor([True, False, True])]
    assert waits.found == ["torch", "torch"]


@pytest.mark.gpu
@pytest.mark.parametrize("name", ONE_A_TASK)
def test_a_step_on_a_gpu_waits_no_more_often(name: str) -> None:
    model, batch = step_of(name, (7, 7), "cuda")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            model(**batch).loss.backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    waited = [str(warning.message) for warning in caught if "called a synchronizing" in str(warning.message)]
    assert len(waited) == len(WITHOUT_PADDING[name]), waited
