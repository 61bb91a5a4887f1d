"""Real bitsandbytes 4-bit base models: train, generate, save and load; on the CPU here, on a GPU alike."""

from __future__ import annotations

from contextlib import nullcontext

import bitsandbytes
import pytest
import torch
from four_bit_helpers import SIZES, dequantize, load_4bit, write_checkpoints
from tiny_models import SMALL, TASK_OF, make_batch, make_model, randomise

from ept import EPTConfig, EPTModel, get_ept_model
from ept_kernels import FourBitWeight, dequantize_4bit


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    return write_checkpoints(tmp_path_factory)


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("name", SIZES)
def test_trains_generates_saves_and_loads(name, kind, nested, checkpoints, tmp_path):
    base = load_4bit(name, checkpoints[name], kind, nested)
    quantized = [n for n, m in base.named_modules() if type(m).__name__ == "Linear4bit"]
    assert len(quantized) >= 14
    weights = {n: p.detach().clone() for n, p in base.named_parameters()}
    model = get_ept_model(base, EPTConfig(**SMALL)).train()
    side = "left" if TASK_OF[name] == "CAUSAL_LM" else "right"
    batch = make_batch(name, (8, 5, 6, 3), side)
    inputs = {k: batch[k] for k in ("input_ids", "attention_mask")}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05, weight_decay=0)
    losses = []
    for step in range(12):
        if step == 6:  # evaluating in between must not change what training sees
            model.eval()
            model.generate(**inputs, max_new_tokens=3, do_sample=False)
            model.train()
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None for p in model.prompt_encoder.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[6] < losses[0]
    assert all(torch.equal(p, weights[n]) for n, p in model.base_model.named_parameters())
    model.eval()
    generated = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    model.save_pretrained(tmp_path)
    again = EPTModel.from_pretrained(load_4bit(name, checkpoints[name], kind, nested), tmp_path)
    assert torch.equal(again.generate(**inputs, max_new_tokens=4, do_sample=False), generated)


@pytest.mark.parametrize("name", SIZES)
def test_bfloat16_compute(name, checkpoints):
    model = get_ept_model(load_4bit(name, checkpoints[name], "nf4", True, torch.bfloat16), EPTConfig(**SMALL)).train()
    randomise(model, scale=0.1)
    model(**make_batch(name)).loss.backward()
    assert all(p.dtype == torch.float32 for p in model.prompt_encoder.parameters())
    assert all(torch.isfinite(p.grad).all() for p in model.prompt_encoder.parameters())


def test_gradients_are_those_of_the_dequantised_model(checkpoints):
    """The 4-bit layers compute with their dequantised weights, in float32: so does a plain model with these."""
    quantized = load_4bit("llama", checkpoints["llama"], "nf4", True)
    plain = make_model("llama", **SIZES["llama"])
    with torch.no_grad():
        for name, module in quantized.named_modules():
            if type(module).__name__ == "Linear4bit":
                weight = bitsandbytes.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
                plain.get_submodule(name).weight.copy_(weight)
    gradients = []
    for base in (quantized, plain):
        model = get_ept_model(base, EPTConfig(**SMALL))
        randomise(model)
        model.train()(**make_batch("llama")).loss.backward()
        gradients.append({n: p.grad for n, p in model.prompt_encoder.named_parameters()})
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-5)


def test_counts_4bit_parameters_as_peft_does(checkpoints):
    plain = make_model("llama", **SIZES["llama"])
    model = get_ept_model(load_4bit("llama", checkpoints["llama"], "nf4", True), EPTConfig(**SMALL))
    trainable, total = model.get_nb_trainable_parameters()
    assert trainable == EPTConfig(**SMALL).parameter_count(64)
    assert total == trainable + sum(p.numel() for p in plain.parameters())


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
def test_weights_repacked_by_an_earlier_inference_are_unpacked(nested, checkpoints):
    """On some CPUs bitsandbytes repacks at the first inference; no gradient passes through that layout."""
    base = load_4bit("llama", checkpoints["llama"], "nf4", nested).eval()
    layers = [m for m in base.modules() if type(m).__name__ == "Linear4bit"]
    exact = [dequantize(layer.weight, torch.float32) for layer in layers]
    with torch.no_grad():
        base(torch.tensor([[5, 6, 7]]))
    repacked = any(getattr(layer.weight.quant_state, "packing_format_for_cpu", False) for layer in layers)
    with pytest.warns(UserWarning, match="repacked for CPU inference") if repacked else nullcontext():
        model = get_ept_model(base, EPTConfig(**SMALL))
    for layer, weight in zip(layers, exact):  # but for the scales, which were rounded to bfloat16 (and nested again)
        unpacked = dequantize_4bit(FourBitWeight.from_bitsandbytes(layer), torch.float32)
        torch.testing.assert_close(unpacked, weight, rtol=0.02 if nested else 2**-8, atol=0)
    model.train()
    model(**make_batch("llama")).loss.backward()
    assert model.prompt_encoder["default"].prompt.grad.abs().sum() > 0


@pytest.mark.parametrize("name, head", [("llama_classifier", "score"), ("llama", "lm_head")])
def test_a_quantised_head_is_named_with_the_remedy(name, head, tmp_path):
    make_model(name).save_pretrained(tmp_path)
    remedy = rf"load the model with BitsAndBytesConfig\(..., llm_int8_skip_modules=\[..., '{head}'\]\)"
    base = load_4bit(name, tmp_path, llm_int8_skip_modules=["something_else"])
    if head == "score":  # which is trained
        with pytest.raises(
            ValueError, match=f"score of LlamaForSequenceClassification is quantised and cannot be trained: {remedy}"
        ):
            get_ept_model(base, EPTConfig(**SMALL))
    else:
        with pytest.warns(UserWarning, match=f"the head lm_head of LlamaForCausalLM is quantised: .*: {remedy}"):
            model = get_ept_model(base, EPTConfig(**SMALL))
        assert model(**make_batch(name)).loss.isfinite()
    right = load_4bit(name, tmp_path, llm_int8_skip_modules=[head])
    assert get_ept_model(right, EPTConfig(**SMALL))(**make_batch(name)).loss.isfinite()
