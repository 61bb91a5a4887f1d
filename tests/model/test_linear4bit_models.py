"""Whole 4-bit models with our layers, through the operators' references on the CPU, against bitsandbytes' layers."""

from __future__ import annotations

import copy
from typing import Any

import accelerate
import peft
import pytest
import torch
import transformers
from four_bit_helpers import SIZES, dequantize, load_4bit, write_checkpoints
from test_linear4bit import saved_bytes, storages
from tiny_models import SMALL, TASK_OF, make_batch, make_model, randomise
from torch.distributed.fsdp import fully_shard

from ept import EPTConfig, EPTModel, get_ept_model
from ept.model.linear4bit import Linear4bit, restore_linear4bit, swap_linear4bit


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    return write_checkpoints(tmp_path_factory)


def adapted(base: Any, always: bool = True, **options: Any) -> EPTModel:
    """`base` with a random adapter, all its 4-bit layers going through the operators."""
    if always:
        swap_linear4bit(base, always=True)
    model = get_ept_model(base, EPTConfig(**SMALL), fast_4bit=always, **options).train()
    randomise(model)
    return model


def results(model: EPTModel, name: str) -> dict[str, torch.Tensor]:
    output = model(**make_batch(name))
    output.loss.backward()
    gradients = {n: p.grad for n, p in model.prompt_encoder.named_parameters()}
    model.zero_grad(set_to_none=True)
    return {"logits": output.logits.detach(), **gradients}


def inputs_of(name: str) -> dict[str, torch.Tensor]:
    batch = make_batch(name, side="left" if TASK_OF[name] == "CAUSAL_LM" else "right")
    return {k: batch[k] for k in ("input_ids", "attention_mask")}


@pytest.mark.parametrize("kind, nested", [("nf4", True), ("fp4", False)], ids=str)
@pytest.mark.parametrize("name", SIZES)
def test_logits_and_gradients_are_those_of_bitsandbytes(name, kind, nested, checkpoints):
    theirs = adapted(load_4bit(name, checkpoints[name], kind, nested), always=False)
    expected = results(theirs, name)
    ours = adapted(load_4bit(name, checkpoints[name], kind, nested))
    assert sum(isinstance(m, Linear4bit) for m in ours.modules()) >= 14
    assert not any(isinstance(m, Linear4bit) for m in theirs.modules())
    torch.testing.assert_close(results(ours, name), expected, rtol=1e-4, atol=1e-5)
    restore_linear4bit(ours)
    assert not any(isinstance(m, Linear4bit) for m in ours.modules())
    torch.testing.assert_close(results(ours, name), expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", SIZES)
def test_bfloat16_compute(name, checkpoints):
    """T5 keeps one layer of each block in float32, so that 4-bit layers meet inputs of both types."""
    expected = results(adapted(load_4bit(name, checkpoints[name], dtype=torch.bfloat16), always=False), name)
    actual = results(adapted(load_4bit(name, checkpoints[name], dtype=torch.bfloat16)), name)
    assert actual["logits"].dtype == expected["logits"].dtype
    difference = (actual["logits"] - expected["logits"]).float().norm() / expected["logits"].float().norm()
    assert difference < 0.02


@pytest.mark.parametrize("name", SIZES)
def test_swapped_by_default_and_only_then(name, checkpoints, tmp_path):
    base = load_4bit(name, checkpoints[name])
    model = get_ept_model(base, EPTConfig(**SMALL))
    count = sum(isinstance(m, Linear4bit) for m in base.modules())
    assert count == sum(type(m).__name__ == "Linear4bit" for m in base.modules()) > 0
    model.save_pretrained(tmp_path)
    for fast in (True, False):
        again = EPTModel.from_pretrained(load_4bit(name, checkpoints[name]), tmp_path, fast_4bit=fast)
        assert sum(isinstance(m, Linear4bit) for m in again.modules()) == (count if fast else 0)
    with pytest.raises(ValueError, match="dequantized_cache_bytes=8 is only for fast_4bit=True"):
        get_ept_model(make_model("llama"), EPTConfig(**SMALL), fast_4bit=False, dequantized_cache_bytes=8)


@pytest.mark.parametrize("name", SIZES)
def test_generates_saves_and_loads(name, checkpoints, tmp_path):
    model = adapted(load_4bit(name, checkpoints[name])).eval()
    generated = model.generate(**inputs_of(name), max_new_tokens=4, do_sample=False)
    model.save_pretrained(tmp_path)
    base = load_4bit(name, checkpoints[name])
    theirs = EPTModel.from_pretrained(base, tmp_path, fast_4bit=False)
    assert torch.equal(theirs.generate(**inputs_of(name), max_new_tokens=4, do_sample=False), generated)


def test_the_base_model_saves_as_before(checkpoints, tmp_path):
    base = load_4bit("llama", checkpoints["llama"])
    expected = base.state_dict()
    model = adapted(base)
    model.base_model.save_pretrained(tmp_path)
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path, device_map="cpu")
    assert not any(isinstance(m, Linear4bit) for m in again.modules())
    assert expected.keys() == model.base_model.state_dict().keys()
    torch.testing.assert_close(dict(again.state_dict()), dict(expected), rtol=0, atol=0)


def test_one_trainer_run(checkpoints, tmp_path):
    rows = [{k: v[0] for k, v in make_batch("llama", (6,), seed=i).items()} for i in range(8)]
    losses = {}
    for always in (False, True):
        model = adapted(load_4bit("llama", checkpoints["llama"]), always)
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path / str(always)),
            max_steps=4,
            per_device_train_batch_size=4,
            learning_rate=0.01,
            logging_steps=1,
            report_to=[],
            use_cpu=True,
            gradient_checkpointing=always,
        )
        trainer = transformers.Trainer(model, arguments, train_dataset=rows)
        trainer.train()
        losses[always] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        assert (tmp_path / str(always) / "checkpoint-4" / "adapter_model.safetensors").is_file()
    assert losses[True] == pytest.approx(losses[False], rel=1e-3)


def test_gradient_checkpointing(checkpoints):
    model = adapted(load_4bit("llama", checkpoints["llama"]))
    expected = results(model, "llama")
    model.base_model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    torch.testing.assert_close(results(model.train(), "llama"), expected)


def test_device_map_auto(checkpoints):
    bases = [load_4bit("t5", checkpoints["t5"], device_map=device_map) for device_map in ("auto", "cpu")]
    torch.testing.assert_close(*(results(adapted(base), "t5") for base in bases))


def test_dispatched_by_accelerate(checkpoints):
    """Every module has a hook, as over several devices."""
    inputs, logits = inputs_of("llama"), []
    for dispatched in (False, True):
        base = load_4bit("llama", checkpoints["llama"])
        if dispatched:
            base = accelerate.dispatch_model(base, {"": "cpu"}, force_hooks=True)
        swap_linear4bit(base, always=True)
        with torch.no_grad():
            logits.append(base(**inputs).logits)
    assert torch.equal(*logits)


@pytest.mark.parametrize("storage", [torch.float32, torch.bfloat16], ids=str)
def test_fully_sharded(storage, checkpoints):
    """FSDP2 in one process: parameters become shards, are put together for each block and freed again."""
    expected = results(adapted(load_4bit("llama", checkpoints["llama"])), "llama")
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=torch.distributed.HashStore())
    try:
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
        base = load_4bit("llama", checkpoints["llama"], bnb_4bit_quant_storage=storage)
        model = adapted(base)
        for block in base.model.layers:
            fully_shard(block, mesh=mesh)
        assert all(not hasattr(m.weight, "quant_state") for m in base.modules() if isinstance(m, Linear4bit))
        for _ in range(2):
            torch.testing.assert_close(results(model, "llama"), expected)
    finally:
        torch.distributed.destroy_process_group()


def test_compiled_layers(checkpoints):
    torch._dynamo.reset()
    model = adapted(load_4bit("llama", checkpoints["llama"]))
    expected = results(model, "llama")
    model.compile_layers(backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(results(model, "llama"), expected, rtol=1e-4, atol=1e-5)


def test_what_is_saved_does_not_grow_with_the_4bit_layers(tmp_path):
    """Beside what its layers hold anyway, a model saves for the backward pass what an unquantised one does."""
    beyond = {}
    for depth in (1, 3):
        make_model("llama", **SIZES["llama"], num_hidden_layers=depth).save_pretrained(tmp_path / str(depth))
        model = adapted(load_4bit("llama", tmp_path / str(depth)))
        batch = make_batch("llama")
        saved = saved_bytes(lambda: model(**batch), storages(model))  # noqa: B023
        plain = _with_dequantised_weights(model)
        held = {p.untyped_storage().data_ptr() for p in plain.parameters()}
        beyond[depth] = saved - saved_bytes(lambda: plain(**batch), held)  # noqa: B023
    assert beyond == {1: 0, 3: 0}


def _with_dequantised_weights(model: EPTModel) -> EPTModel:
    """The same model with plain linear layers of the same values."""
    plain = copy.deepcopy(model)
    for name, module in model.named_modules():
        if isinstance(module, Linear4bit):
            linear = torch.nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
            linear.requires_grad_(False).weight.copy_(dequantize(module.weight, torch.float32))
            plain.set_submodule(name, linear)
    return plain


def test_lora_on_top(checkpoints):
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    batch, gradients = make_batch("llama"), []
    for always in (False, True):
        base = load_4bit("llama", checkpoints["llama"])
        if always:
            swap_linear4bit(base, always=True)
        torch.manual_seed(0)
        model = peft.get_peft_model(base, config).train()
        assert type(model.base_model.model.model.layers[0].self_attn.q_proj).__module__ == "peft.tuners.lora.bnb"
        model(**batch).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


def test_dequantized_cache(checkpoints):
    model = adapted(load_4bit("t5", checkpoints["t5"]))
    expected = results(model, "t5")
    budget = 5 * 64 * 64 * 4
    swap_linear4bit(model, always=True, dequantized_cache_bytes=budget)
    torch.testing.assert_close(results(model, "t5"), expected, rtol=1e-4, atol=1e-5)
    kept = [m.__dict__["_dequantized"] for m in model.modules() if "_dequantized" in m.__dict__]
    assert len(kept) == 5
    assert sum(W.nbytes for W in kept) == budget
