"""Named shapes: the published sizes, layers left out, 4-bit weights, and what is refused."""

from __future__ import annotations

from types import SimpleNamespace

import psutil
import pytest
import torch
import transformers
from bitsandbytes.nn import Linear4bit

from ept.model.base_model import set_mode
from ept.profile.shapes import SHAPES, build_shape, shape_config

CPU = torch.device("cpu")

# Trainable and frozen parameters of the published models.
PUBLISHED = {
    "t5-small": 60_506_624,
    "t5-base": 222_903_552,
    "t5-large": 737_668_096,
    "t5-3b": 2_851_598_336,
    "t5-11b": 11_307_321_344,
    "smollm2-135m": 134_515_008,
    "llama-3.2-1b": 1_235_814_400,
    "llama-2-7b": 6_738_415_616,
    "llama-3-8b": 8_030_261_248,
}


@pytest.mark.parametrize("name", {**SHAPES, **PUBLISHED})
def test_parameters_are_those_of_the_published_model(name: str) -> None:
    config = shape_config(name)
    model_class = transformers.AutoModelForSeq2SeqLM if config.is_encoder_decoder else transformers.AutoModelForCausalLM
    with torch.device("meta"):
        model = model_class.from_config(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == PUBLISHED[name]


@pytest.mark.parametrize("name, kept", [("t5-small", {"wo", "lm_head"}), ("smollm2-135m", {"lm_head"})])
@pytest.mark.parametrize("quantization", [None, "nf4", "fp4"])
def test_a_shape_takes_a_step(name: str, kept: set[str], quantization: str | None) -> None:
    model = build_shape(name, dtype=torch.bfloat16, device=CPU, quantization=quantization, layers=1)
    assert model.config.num_hidden_layers == 1
    plain = {n.rpartition(".")[2] for n, m in model.named_modules() if type(m) is torch.nn.Linear}
    if quantization is not None:
        assert plain == kept
        four_bit = [m for m in model.modules() if isinstance(m, Linear4bit)]
        assert {m.weight.quant_type for m in four_bit} == {quantization}
        assert all(m.weight.quant_state.nested for m in four_bit)
    assert not any(p.is_meta or p.requires_grad for p in model.parameters())
    set_mode(model, training=True, dropout=False)
    embeds = torch.randn(2, 5, 512 if name == "t5-small" else 576, dtype=torch.bfloat16, requires_grad=True)
    loss = model(inputs_embeds=embeds, labels=torch.ones(2, 5, dtype=torch.int64)).loss
    loss.backward()
    assert loss.isfinite()
    assert float(embeds.grad.abs().max()) > 0


def test_the_attention_implementation_is_the_one_asked_for() -> None:
    for name in ("eager", "sdpa"):
        model = build_shape("t5-small", dtype=torch.float32, device=CPU, attn_implementation=name, layers=1)
        assert model.config._attn_implementation == name


def test_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="unknown shape 't5': choose one of t5-small, t5-base"):
        build_shape("t5", dtype=torch.float32, device=CPU)
    with pytest.raises(ValueError, match=r"layers=7 is out of range: t5-small has 6 layers"):
        build_shape("t5-small", dtype=torch.float32, device=CPU, layers=7)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=8 * 2**30))
    too_large = r"weights of llama-2-7b take 25\.1 GiB, but cpu has 8\.0 GiB free: choose bfloat16"
    with pytest.raises(ValueError, match=too_large):
        build_shape("llama-2-7b", dtype=torch.float32, device=CPU)
