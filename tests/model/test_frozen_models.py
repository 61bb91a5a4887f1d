"""Whole models with their element-wise work fused, against the same models as they were."""

from __future__ import annotations

import collections
import copy
import pickle
from typing import Any

import accelerate
import pytest
import torch
import transformers
from tiny_models import SMALL, TASK_OF, make_batch, make_model, randomise
from torch.utils._python_dispatch import TorchDispatchMode

from ept import EPTConfig, EPTModel, get_ept_model
from ept.model import frozen
from ept.model.frozen import restore_frozen, swap_frozen
from ept.model.linear4bit import swap_linear4bit

# Of each: changes to the tiny model, and the operators that it takes, forward.
FUSED = {"ept.rms_norm", "ept.rotary", "ept.gated_activation"}
T5 = {"ept.rms_norm", "ept.relu"}
FAMILIES: dict[str, tuple[str, dict[str, Any], set[str]]] = {
    "llama": ("llama", {}, FUSED),
    "llama_classifier": ("llama_classifier", {}, FUSED),
    "mistral": ("mistral", {}, FUSED),
    "qwen2": ("qwen2", {}, FUSED),
    "gemma": ("gemma", {}, FUSED),
    "gemma3": ("gemma3", {}, FUSED),
    "gpt_neox": ("gpt_neox", {}, {"ept.rotary"}),
    "t5": ("t5", {}, T5),
    "t5 v1.1": ("t5", {"feed_forward_proj": "gated-gelu"}, {"ept.rms_norm", "ept.gated_activation"}),
    **{name: (name, {}, set()) for name in ("gpt2", "opt", "bart", "bert")},
}
_SIZES = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": 1}
_SIZES |= {"num_key_value_heads": 2, "intermediate_size": 48, "initializer_range": 0.1}
OTHERS = {  # not among the tiny models: rotary pairs of neighbouring columns; norms of the heads
    "cohere": (transformers.CohereForCausalLM, transformers.CohereConfig, {}, FUSED - {"ept.rms_norm"}),
    "qwen3": (transformers.Qwen3ForCausalLM, transformers.Qwen3Config, {"head_dim": 8}, FUSED),
    "olmo2": (transformers.Olmo2ForCausalLM, transformers.Olmo2Config, {}, FUSED),
}
ALL = [*FAMILIES, *OTHERS]
BATCHES = {**{family: row[0] for family, row in FAMILIES.items()}, **dict.fromkeys(OTHERS, "llama")}


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets CPU tensors go through the operators, whose references compute there."""
    monkeypatch.setattr(frozen.ept_kernels, "backend", lambda device: "triton")


class Operators(TorchDispatchMode):
    """Counts the calls of this project's operators."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[str(function.overloadpacket)] += 1
        return function(*args, **(kwargs or {}))


def base(family: str, **sizes: int) -> tuple[Any, set[str]]:
    if family in OTHERS:
        model_class, config_class, changes, operators = OTHERS[family]
        torch.manual_seed(0)
        return model_class(config_class(**{**_SIZES, **changes, **sizes})).eval(), operators
    name, changes, operators = FAMILIES[family]
    return make_model(name, **changes, **sizes), operators


def adapted(model: Any, **options: Any) -> EPTModel:
    model = get_ept_model(model, EPTConfig(**SMALL), **options)
    randomise(model)
    return model.train()


def results(model: EPTModel, name: str) -> dict[str, torch.Tensor]:
    output = model(**make_batch(name))
    output.loss.backward()
    gradients = {n: p.grad for n, p in model.prompt_encoder.named_parameters()}
    model.zero_grad(set_to_none=True)
    return {"logits": output.logits.detach(), **gradients}


def assert_alike(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    for name, e in expected.items():
        assert (actual[name] - e).abs().max() <= 2e-5 * (1 + e.abs().max()), name


def swapped(model: Any) -> list[Any]:
    return [module for module in model.modules() if frozen.is_swapped(module)]


@pytest.mark.parametrize("family", ALL)
def test_logits_and_gradients_stay_and_the_operators_compute_them(family):
    model, operators = base(family)
    name = BATCHES[family]
    theirs = adapted(model, fast_frozen=False)
    names, classes = [*model.state_dict()], [type(module).__name__ for module in model.modules()]
    assert not swapped(theirs)
    expected = results(theirs, name)
    count = swap_frozen(theirs)
    assert (count == len(swapped(theirs)) > 0) == bool(operators)
    assert swap_frozen(theirs) == 0
    assert [*model.state_dict()] == names
    assert [type(module).__name__ for module in model.modules()] == classes
    with Operators() as seen:
        assert_alike(results(theirs, name), expected)
    ours = {call for call in seen.calls if call.startswith("ept.")}
    backward = {f"{operator}_backward" for operator in operators - {"ept.rotary"}}
    method = {call for call in ours if "prompt" in call or "token_at" in call}
    assert ours - method == operators | backward
    assert restore_frozen(theirs) == count
    again = results(theirs, name)
    assert all(torch.equal(again[key], e) for key, e in expected.items())


@pytest.mark.parametrize("family", [family for family in ALL if TASK_OF[BATCHES[family]] != "SEQ_CLS"])
def test_generated_tokens_stay(family):
    batch = make_batch(BATCHES[family], side="right" if family.startswith("t5") else "left")
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    model = adapted(base(family)[0]).eval()
    actual = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    restore_frozen(model)
    assert torch.equal(actual, model.generate(**inputs, max_new_tokens=6, do_sample=False))


@pytest.mark.parametrize("family", ["t5 v1.1", *OTHERS])
def test_training_goes_the_same_way(family):
    model, losses = adapted(base(family)[0]), {}
    start = copy.deepcopy(model.prompt_encoder.state_dict())
    for fast in (True, False):
        swap_frozen(model) if fast else restore_frozen(model)
        model.prompt_encoder.load_state_dict(start)
        optimizer = torch.optim.AdamW(model.prompt_encoder.parameters(), lr=0.03)
        losses[fast] = []
        for _ in range(6):
            loss = model(**make_batch(BATCHES[family])).loss
            losses[fast].append(loss.item())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert losses[True] == pytest.approx(losses[False], rel=1e-3)
    assert losses[True][-1] < losses[True][0] - 0.02


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", ["llama", "gemma", "t5", "t5 v1.1", *OTHERS])
def test_16_bit_results_are_no_further_from_float64_than_they_were(family, dtype):
    name = BATCHES[family]
    exact = adapted(base(family)[0].double())
    found = {}
    for fast in (True, False):
        model = adapted(base(family)[0].to(dtype), fast_frozen=fast)
        model.prompt_encoder.load_state_dict(exact.prompt_encoder.state_dict())
        found[fast] = results(model, name)
    assert found[True]["logits"].dtype == found[False]["logits"].dtype
    wanted = results(exact, name)
    logits = wanted.pop("logits")
    ours, theirs = ((found[fast].pop("logits").double() - logits).norm() for fast in (True, False))
    assert ours <= 1.3 * theirs
    ours, theirs = ([(found[fast][key].double() - e).norm() for key, e in wanted.items()] for fast in (True, False))
    assert torch.stack(ours).norm() <= 1.5 * torch.stack(theirs).norm()


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_checkpointing_compiling_and_autocast(family, monkeypatch):
    name = BATCHES[family]
    model = adapted(base(family)[0])
    expected = results(model, name)
    model.base_model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    with Operators() as seen:
        assert_alike(results(model, name), expected)
    assert seen.calls["ept.rms_norm"] > seen.calls["ept.rms_norm_backward"]  # once more for the backward
    model.base_model.gradient_checkpointing_disable()
    model.train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = results(model, name)
        restore_frozen(model)
        exact = results(model, name)
    assert (actual["logits"] - exact["logits"]).norm() <= 0.02 * exact["logits"].norm()
    swap_frozen(model)
    model.compile_layers(backend="aot_eager")
    outside: list[int] = []
    rms_norm = frozen.functional.rms_norm
    monkeypatch.setattr(frozen.functional, "rms_norm", lambda *x: outside.append(1) or rms_norm(*x))
    assert_alike(results(model, name), expected)
    assert len(outside) == (2 if family == "t5" else 1)  # the last norm of a stack: in layers the compiler fuses


def test_a_norm_whose_weight_becomes_trainable_goes_back_by_itself():
    model = adapted(base("llama")[0])
    weight = model.base_model.model.layers[0].post_attention_layernorm.weight.requires_grad_()
    gradients = []
    for _ in range(2):
        model(**make_batch("llama")).loss.backward()
        gradients.append(weight.grad)
        weight.grad = None
        restore_frozen(model)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)
    assert gradients[0].abs().max() > 0


def test_what_is_unknown_is_left_alone():
    class Doubled(transformers.models.llama.modeling_llama.LlamaRMSNorm):
        def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(hidden_states)

    model = base("llama")[0]
    layer = model.model.layers[0]
    layer.input_layernorm.__class__ = Doubled
    layer.mlp.forward = lambda x: x
    expected = model(torch.arange(5)[None]).logits
    swap_frozen(model)
    assert not {layer.input_layernorm, layer.mlp} & {*swapped(model)}
    assert layer in swapped(model)
    torch.testing.assert_close(model(torch.arange(5)[None]).logits, expected, rtol=1e-4, atol=1e-5)


def test_hooks_of_a_norm_see_what_they_saw():
    model = base("llama")[0]
    seen: list[tuple[torch.Size, type]] = []
    norm = model.model.layers[1].post_attention_layernorm
    norm.register_forward_hook(lambda module, inputs, output: seen.append((inputs[0].shape, type(output))))
    swap_frozen(model)
    model(torch.arange(5)[None])
    assert seen == [(torch.Size([1, 5, 32]), torch.Tensor)]
    recorded = model(torch.arange(5)[None], output_hidden_states=True, output_attentions=False).hidden_states
    restore_frozen(model)
    expected = model(torch.arange(5)[None], output_hidden_states=True).hidden_states
    torch.testing.assert_close(recorded, expected, rtol=1e-4, atol=1e-5)


def test_copied_pickled_saved_and_dispatched(tmp_path):
    model = adapted(base("llama")[0]).eval()
    batch = make_batch("llama")
    expected = model(**batch).logits
    for again in (copy.deepcopy(model.base_model), pickle.loads(pickle.dumps(model.base_model))):
        assert len(swapped(again)) == len(swapped(model))
        assert torch.equal(again(batch["input_ids"]).logits, model.base_model(batch["input_ids"]).logits)
    model.save_pretrained(tmp_path)
    for fast in (True, False):
        loaded = EPTModel.from_pretrained(base("llama")[0], tmp_path, fast_frozen=fast)
        assert bool(swapped(loaded)) == fast
        torch.testing.assert_close(loaded(**batch).logits, expected, rtol=1e-4, atol=1e-5)
    hooked = base("llama")[0].requires_grad_(False)
    accelerate.cpu_offload(hooked, torch.device("cpu"))
    assert swap_frozen(hooked) == len(swapped(model))
    with Operators() as seen:
        hooked(batch["input_ids"])
    assert seen.calls["ept.rms_norm"] == 5
    restore_frozen(hooked)
    with Operators() as seen:
        hooked(batch["input_ids"])
    assert seen.calls["ept.rms_norm"] == 0


@pytest.mark.parametrize("family", ["llama", "t5", "t5 v1.1", *OTHERS])
def test_over_4_bit_weights(family, tmp_path):
    is_t5 = family.startswith("t5")  # widths that bitsandbytes' blocks of 64 divide
    sizes = {"d_model": 64, "d_kv": 16, "d_ff": 128} if is_t5 else {"hidden_size": 64, "intermediate_size": 128}
    plain, operators = base(family, **sizes)
    plain.save_pretrained(tmp_path)
    how = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    how.bnb_4bit_compute_dtype = torch.float32
    loaded = type(plain).from_pretrained(tmp_path, quantization_config=how, dtype=torch.float32, device_map="cpu")
    swap_linear4bit(loaded, always=True)
    model, batch = adapted(loaded), make_batch(BATCHES[family], side="right" if is_t5 else "left")
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    with Operators() as seen:
        actual = results(model, BATCHES[family])
    assert {*operators, "ept.matmul_4bit_backward"} <= {*seen.calls}
    tokens = model.eval().generate(**inputs, max_new_tokens=4, do_sample=False)
    restore_frozen(model)
    assert torch.equal(tokens, model.generate(**inputs, max_new_tokens=4, do_sample=False))
    assert_alike(actual, results(model.train(), BATCHES[family]))


def test_a_model_on_the_meta_device_counts_as_on_an_accelerator():
    with torch.device("meta"):
        model = make_model("t5")
    model.requires_grad_(False)
    swap_frozen(model)
    inputs = {"inputs_embeds": torch.empty(2, 3, 32, device="meta"), "labels": torch.empty(2, 2, device="meta").long()}
    with Operators() as seen:
        model(**inputs)
    assert {"ept.rms_norm", "ept.relu"} <= {*seen.calls}


def test_on_a_cpu_the_models_own_code_runs(monkeypatch):
    monkeypatch.undo()
    model, batch = adapted(base("llama")[0]).eval(), make_batch("llama")
    with Operators() as seen, torch.no_grad():
        actual = model(**batch).logits
    assert "ept.rms_norm" not in seen.calls
    assert swapped(model)
    restore_frozen(model)
    assert torch.equal(actual, model(**batch).logits)
