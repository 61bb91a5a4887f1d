"""Base models that `device_map` has spread over devices, as far as a machine without accelerators can: CPU and disk.

Weights on disk are meta tensors between calls, so that anything placed or computed by where a weight lies shows.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from tiny_models import FAMILIES, SMALL, TASK_OF, make_batch, make_model, randomise

from ept import EPTConfig, EPTModel, get_ept_model

# family and what of it lies on disk, all the rest on the CPU. (accelerate cannot put T5's tied embeddings there.)
CASES = {
    "llama-layer": ("llama", ("model.layers.1",)),
    "llama-embeddings": ("llama", ("model.layers.1", "model.embed_tokens")),
    "t5-layers": ("t5", ("encoder.block.0", "decoder.block.1")),
    "bert-embeddings": ("bert", ("bert.encoder.layer.1", "bert.embeddings")),
}


def spread(name: str, folder: Any, on_disk: tuple[str, ...], offload: Any) -> Any:
    """The model of `folder`; hooks of accelerate bring the parts `on_disk` in for their calls."""
    model_class = getattr(transformers, FAMILIES[name][1])
    plain = model_class.from_pretrained(folder)
    places = {module: "cpu" for module, child in plain.named_modules() if module and not list(child.children())}
    places = {m: p for m, p in places.items() if not any(m == d or m.startswith(f"{d}.") for d in on_disk)}
    covered = {**places, **dict.fromkeys(on_disk, "disk")}
    loose = [n for n, _ in plain.named_parameters() if not any(n == m or n.startswith(f"{m}.") for m in covered)]
    device_map = {**covered, **dict.fromkeys(loose, "cpu")}
    return model_class.from_pretrained(folder, device_map=device_map, offload_folder=str(offload)).eval()


def answers(base: Any, name: str) -> tuple[dict[str, torch.Tensor], EPTModel]:
    """Loss, logits and gradients of an adapter that is away from its start, and generated tokens."""
    model = get_ept_model(base, EPTConfig(**SMALL))
    randomise(model, scale=0.1)
    assert all(p.device.type == "cpu" for p in model.prompt_encoder.parameters())
    side = "left" if TASK_OF[name] == "CAUSAL_LM" else "right"
    batch = make_batch(name, (8, 5), side)
    output = model.train()(**batch)
    output.loss.backward()
    found = {"loss": output.loss.detach(), "logits": output.logits.detach()}
    found |= {f"gradient of {n}": p.grad for n, p in model.prompt_encoder.named_parameters()}
    if TASK_OF[name] != "SEQ_CLS":
        inputs = {k: batch[k] for k in ("input_ids", "attention_mask")}
        found["tokens"] = model.eval().generate(**inputs, max_new_tokens=3, do_sample=False)
    return found, model


@pytest.mark.parametrize("case", CASES)
def test_as_on_one_device(case: str, tmp_path: Any) -> None:
    name, on_disk = CASES[case]
    make_model(name).save_pretrained(tmp_path / "base")
    expected, _ = answers(getattr(transformers, FAMILIES[name][1]).from_pretrained(tmp_path / "base").eval(), name)
    base = spread(name, tmp_path / "base", on_disk, tmp_path / "offload")
    away = [n for n, p in base.named_parameters() if p.is_meta]
    assert all(any(n.startswith(f"{place}.") for n in away) for place in on_disk), away
    actual, model = answers(base, name)
    torch.testing.assert_close(actual, expected)
    assert [n for n, p in base.named_parameters() if p.is_meta] == away  # nothing was held on to
    model.save_pretrained(tmp_path / "adapter")
    again = EPTModel.from_pretrained(spread(name, tmp_path / "base", on_disk, tmp_path / "again"), tmp_path / "adapter")
    assert torch.equal(again.get_prompt(), model.get_prompt())
