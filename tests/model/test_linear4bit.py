"""One 4-bit layer of ours against bitsandbytes' own, through the operators' references on the CPU."""

from __future__ import annotations

import copy
import io
import pickle
from itertools import product
from typing import Any

import bitsandbytes
import pytest
import torch
from accelerate.hooks import AlignDevicesHook, ModelHook, add_hook_to_module, remove_hook_from_module
from torch import nn
from torch.utils.checkpoint import checkpoint

from ept.model.linear4bit import Linear4bit, restore_linear4bit, swap_linear4bit

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Both multiply the same dequantised weights and round once to the type computed in; sums differ in their order.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def make_layer(
    columns: int = 64, rows: int = 32, *, bias: bool = True, cls: Any = bitsandbytes.nn.Linear4bit, **options: Any
) -> Any:
    torch.manual_seed(0)
    if cls is bitsandbytes.nn.Linear4bit:
        options.setdefault("quant_type", "nf4")
    options.setdefault("compute_dtype", torch.float32)
    layer = cls(columns, rows, bias=bias, **options).to("cpu").train()
    layer.requires_grad_(False)
    return layer


def swapped(layer: Any, **options: Any) -> Any:
    layer = copy.deepcopy(layer)
    assert swap_linear4bit(layer, **{"always": True, **options}) == 1
    return layer


def answer(layer: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    x = x.clone().requires_grad_()
    out = layer(x)
    out.float().square().sum().backward()
    return out.detach(), x.grad


@pytest.mark.parametrize("compute_dtype", [*DTYPES, None], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_computes_as_bitsandbytes(dtype, compute_dtype):
    for nested, bias, tokens in product((False, True), (False, True), ((1,), (3, 5))):
        theirs = make_layer(bias=bias, compress_statistics=nested, compute_dtype=compute_dtype)
        ours = swapped(theirs)
        x = torch.randn(*tokens, 64, dtype=dtype)
        tolerance = TOLERANCE[max(dtype, compute_dtype or dtype, key=TOLERANCE.__getitem__)]
        actual = answer(ours, x)
        assert [a.dtype for a in actual] == [dtype, dtype]
        torch.testing.assert_close(actual, answer(theirs, x), rtol=tolerance, atol=10 * tolerance)
        assert ours.compute_dtype == theirs.compute_dtype


@pytest.mark.parametrize("enabled", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_computes_as_bitsandbytes(enabled):
    theirs = make_layer()
    ours, x = swapped(theirs), torch.randn(4, 64)
    with torch.autocast("cpu", dtype=enabled):
        expected, actual = answer(theirs, x), answer(ours, x)
    assert [a.dtype for a in (*actual, *expected)] == [torch.float32] * 4
    torch.testing.assert_close(actual, expected, rtol=TOLERANCE[enabled], atol=10 * TOLERANCE[enabled])
    assert torch.equal(actual[0], actual[0].to(enabled).float())  # it was computed in that type


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_storage_types_of_sharding(storage):
    plain, stored = make_layer(), make_layer(quant_storage=storage)
    assert stored.weight.dtype == storage
    ours, x = swapped(stored), torch.randn(4, 64)
    assert torch.equal(ours(x), swapped(plain)(x))
    state = ours.weight.quant_state
    ours.weight = nn.Parameter(ours.weight.data.clone(), requires_grad=False)  # the state is lost, the layer keeps it
    ours.quant_state = state
    assert torch.equal(ours(x), swapped(plain)(x))


def test_empty_input():
    layer = swapped(make_layer())
    out, grad = answer(layer, torch.randn(0, 3, 64))
    assert out.shape == (0, 3, 32)
    assert grad.shape == (0, 3, 64)


@pytest.mark.parametrize("cls", [bitsandbytes.nn.Linear4bit, bitsandbytes.nn.LinearNF4, bitsandbytes.nn.LinearFP4])
def test_swap_changes_the_class_alone(cls):
    model = nn.Sequential(make_layer(cls=cls), nn.Linear(32, 64), make_layer(cls=cls))
    parameters, state = list(model.parameters()), {k: v.clone() for k, v in model.state_dict().items()}
    attributes = [dict(layer.__dict__) for layer in model]
    assert swap_linear4bit(model) == 2
    assert [type(layer) for layer in model] == [Linear4bit, nn.Linear, Linear4bit]
    assert isinstance(model[0], bitsandbytes.nn.Linear4bit)
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    after = model.state_dict()
    assert list(after) == list(state)
    assert all(torch.equal(after[k], state[k]) for k in state)
    assert swap_linear4bit(model) == 2  # once more changes nothing
    model(torch.randn(2, 64))
    assert restore_linear4bit(model) == 2
    assert [type(layer) for layer in model] == [cls, nn.Linear, cls]
    assert [layer.__dict__.keys() for layer in model] == [a.keys() for a in attributes]
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert restore_linear4bit(model) == 0


def test_classes_derived_by_others_are_left_alone():
    class Derived(bitsandbytes.nn.Linear4bit):
        def forward(self, x):
            return 2 * super().forward(x)

    layer = make_layer(cls=Derived)
    assert swap_linear4bit(layer) == 0
    assert type(layer) is Derived


def test_falls_through_to_bitsandbytes_where_no_kernels_run(monkeypatch):
    calls = []
    theirs = bitsandbytes.matmul_4bit
    monkeypatch.setattr(bitsandbytes, "matmul_4bit", lambda *a, **k: calls.append(1) or theirs(*a, **k))
    layer, x = make_layer(), torch.randn(3, 64)
    expected = layer(x)
    for always, expected_calls in ((False, 1), (True, 0)):
        calls.clear()
        swap_linear4bit(layer, always=always)
        torch.testing.assert_close(layer(x), expected)
        assert len(calls) == expected_calls


@pytest.mark.filterwarnings("ignore:matmul_4bit. weight was quantized:DeprecationWarning")
def test_a_weight_quantised_the_other_way_round_goes_to_bitsandbytes():
    layer = make_layer(bias=False)
    other = make_layer(32, 64, bias=False)  # quantised as [in_features, out_features]
    layer.weight = other.weight
    layer.quant_state = other.weight.quant_state
    x = torch.randn(3, 64)
    assert torch.equal(swapped(layer)(x), layer(x))


def test_a_damaged_or_trainable_weight_is_refused():
    layer = swapped(make_layer(quant_storage=torch.float32))
    layer(torch.randn(2, 64))
    layer.weight.quant_state.absmax = layer.weight.quant_state.absmax[:-1]
    with pytest.raises(ValueError, match=r"absmax\.shape"):
        layer(torch.randn(2, 64))
    with pytest.raises(ValueError, match="no quant state"):
        swapped(bitsandbytes.nn.Linear4bit(64, 32).requires_grad_(False))(torch.randn(2, 64))
    layer = swapped(make_layer(quant_storage=torch.float32))
    layer.weight.requires_grad_()
    with pytest.raises(ValueError, match="cannot be trained"):
        layer(torch.randn(2, 64))
    with torch.no_grad():
        layer(torch.randn(2, 64))


def test_the_bias_can_be_trained():
    layer = swapped(make_layer())
    layer.bias.requires_grad_()
    for shape, rows in (((2, 3, 64), 6.0), ((64,), 1.0)):
        layer.bias.grad = None
        layer(torch.randn(shape)).sum().backward()
        torch.testing.assert_close(layer.bias.grad, torch.full((32,), rows))


def saved_bytes(run: Any, held: set[int]) -> int:
    """Bytes that autograd keeps for `run`, beyond storages in `held`."""
    total = 0

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal total
        if tensor.untyped_storage().data_ptr() not in held:
            total += tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return total


def storages(model: nn.Module) -> set[int]:
    """Where the parameters and quant states of `model` lie."""
    found = list(model.parameters())
    for parameter in model.parameters():
        if (state := getattr(parameter, "quant_state", None)) is not None:
            found += [state.absmax, state.state2.absmax, state.state2.code, state.offset]
    return {tensor.untyped_storage().data_ptr() for tensor in found}


def test_nothing_but_the_packed_weight_is_saved():
    layer = swapped(make_layer())
    layer(torch.randn(2, 64))
    x = torch.randn(5, 64, requires_grad=True)
    assert saved_bytes(lambda: layer(x), storages(layer)) == 0
    assert saved_bytes(lambda: layer(x), set()) > 0  # the count does see what is saved


def test_checkpointing_gives_the_same_gradient():
    layer, x = swapped(make_layer()), torch.randn(3, 64)
    checkpointed = answer(lambda y: checkpoint(layer, y, use_reentrant=False), x)
    torch.testing.assert_close(checkpointed, answer(layer, x), rtol=0, atol=0)


@pytest.mark.parametrize("checkpointed", [False, True], ids=["", "checkpointed"])
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16], ids=str)
def test_compiles_as_one_graph(storage, checkpointed):
    torch._dynamo.reset()
    model = nn.Sequential(make_layer(quant_storage=storage), nn.GELU(), make_layer(32, 64, quant_storage=storage))
    swap_linear4bit(model, always=True)
    function = (lambda x: checkpoint(model, x, use_reentrant=False)) if checkpointed else model
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 64)
    torch.testing.assert_close(answer(compiled, x), answer(model, x))
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x))


@pytest.mark.parametrize("filled", [False, True], ids=["empty", "filled"])
def test_compiles_with_a_cache(filled):
    """A compiled call uses what an uncompiled one has kept, and keeps nothing itself."""
    torch._dynamo.reset()
    layer, x = swapped(make_layer(), dequantized_cache_bytes=1 << 20), torch.randn(3, 64)
    expected = answer(swapped(make_layer()), x)
    if filled:
        layer(x)
    actual = answer(torch.compile(layer, fullgraph=True, backend="aot_eager"), x)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-4)
    assert ("_dequantized" in layer.__dict__) == filled


def test_compiles_where_it_falls_through():
    torch._dynamo.reset()
    layer = swapped(make_layer(), always=False)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(torch.ones(3, 64)), layer(torch.ones(3, 64)))


@pytest.mark.parametrize("when", ["before", "after"])
def test_hooks_of_accelerate_keep_working(when):
    class Double(ModelHook):
        def post_forward(self, module, output):
            return 2 * output

    layer, x = make_layer(), torch.randn(2, 64)
    expected = swapped(layer)(x)
    if when == "after":
        swap_linear4bit(layer, always=True)
    add_hook_to_module(layer, AlignDevicesHook("cpu"))
    add_hook_to_module(layer, Double(), append=True)
    if when == "before":
        swap_linear4bit(layer, always=True)
    for factor in (2, 1):
        assert _goes_through_operators(layer, x)
        assert torch.equal(layer(x), factor * expected)
        restore_linear4bit(layer)
        assert not _goes_through_operators(layer, x)
        swap_linear4bit(layer, always=True)
        remove_hook_from_module(layer)


@pytest.mark.parametrize("hooks", [1, 2])
def test_nothing_is_kept_of_an_offloaded_weight(hooks):
    """accelerate brings such a weight in for each call and takes it away; what is kept of it would stay in memory."""

    class Offload(ModelHook):
        offload = True  # as an AlignDevicesHook says it

    layer, x = swapped(make_layer(), dequantized_cache_bytes=1 << 20), torch.randn(2, 64)
    expected = swapped(make_layer())(x)
    for hook in (Offload(), ModelHook())[:hooks]:
        add_hook_to_module(layer, hook, append=True)
    for _ in range(2):
        assert torch.equal(layer(x), expected)
        assert layer.__dict__["_four_bit"][1] is None
        assert "_dequantized" not in layer.__dict__
    remove_hook_from_module(layer)
    torch.testing.assert_close(layer(x), expected)
    assert "_dequantized" in layer.__dict__


def test_memory_that_sharding_has_freed_is_not_read():
    layer, x = swapped(make_layer()), torch.randn(2, 64)
    expected, data = layer(x), layer.weight.data.clone()
    layer.weight.untyped_storage().resize_(0)
    layer.weight.data = data
    assert torch.equal(layer(x), expected)


def _goes_through_operators(layer: nn.Module, x: torch.Tensor) -> bool:
    with torch.profiler.profile() as profile:
        layer(x)
    return any(event.key == "ept::matmul_4bit" for event in profile.key_averages())


def test_copies_pickles_and_files():
    layer, x = swapped(make_layer(), dequantized_cache_bytes=1 << 20), torch.randn(2, 64)
    expected = layer(x)
    assert "_dequantized" in layer.__dict__
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    pickled, loaded = pickle.loads(pickle.dumps(layer)), torch.load(buffer, weights_only=False)
    for other in (copy.copy(layer), copy.deepcopy(layer), pickled, loaded):
        assert type(other) is Linear4bit
        assert not {"_dequantized", "_four_bit"} & other.__dict__.keys()
        assert torch.equal(other(x), expected)
    assert not any("dequantized" in key for key in layer.state_dict())
    restored = make_layer()
    restored.weight = bitsandbytes.nn.Params4bit.from_prequantized(
        layer.state_dict()["weight"],
        {k.removeprefix("weight."): v for k, v in layer.state_dict().items() if k.startswith("weight.")},
        device="cpu",
        module=restored,
    )
    restored.bias.data.copy_(layer.bias)
    assert torch.equal(swapped(restored)(x), swapped(layer)(x))


def test_moving_and_loading_are_noticed():
    layer, x = swapped(make_layer(), dequantized_cache_bytes=1 << 20), torch.randn(2, 64)
    before = layer(x)
    other = make_layer(bias=True)
    other.weight.data.copy_(other.weight.data.flip(0))
    layer.load_state_dict(other.state_dict(), strict=False)
    assert "_dequantized" not in layer.__dict__
    after = layer(x)
    assert not torch.equal(after, before)
    fresh = swapped(make_layer())
    fresh.weight.data.copy_(other.weight.data)
    torch.testing.assert_close(after, fresh(x))
    layer.weight.data.copy_(layer.weight.data.flip(0))  # in place: nobody is told
    layer.drop_caches()
    torch.testing.assert_close(layer(x), before)
    assert torch.equal(layer.to("cpu")(x), layer(x))


def test_a_changed_quant_state_is_noticed():
    layer = swapped(make_layer(bias=False, compress_statistics=False), dequantized_cache_bytes=1 << 20)
    x = torch.randn(2, 64)
    before, state = layer(x), layer.weight.quant_state
    state.absmax.mul_(2)
    assert torch.equal(layer(x), 2 * before)
    layer.weight.quant_state = other = copy.copy(state)  # the same absmax, for other levels
    other.quant_type, other.code = "fp4", bitsandbytes.functional.get_4bit_type("fp4", device="cpu")
    assert not torch.equal(layer(x), 2 * before)
    assert torch.equal(layer(x), swapped(layer, dequantized_cache_bytes=1 << 20)(x))


def test_the_cache_keeps_to_its_budget():
    layers = [make_layer(64, rows) for rows in (64, 32, 96, 16)]
    model, x = nn.ModuleList(layers), torch.randn(2, 64)
    expected = [swapped(layer)(x) for layer in layers]
    size = [4 * 64 * layer.out_features for layer in layers]
    for budget, kept in ((0, ()), (size[3], (3,)), (size[1] + size[3] + 1, (1, 3)), (10**6, (0, 1, 2, 3))):
        swap_linear4bit(model, always=True, dequantized_cache_bytes=budget)
        torch.testing.assert_close([layer(x) for layer in layers], expected, rtol=1e-5, atol=1e-5)
        used = [i for i, layer in enumerate(layers) if "_dequantized" in layer.__dict__]
        assert used == list(kept)
        assert sum(layers[i].__dict__["_dequantized"].nbytes for i in used) <= budget
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for layer in layers:
            layer(x)
            assert layer.__dict__["_dequantized"].dtype == torch.bfloat16
    torch.testing.assert_close(answer(layers[0], x), answer(swapped(layers[0]), x), rtol=1e-4, atol=1e-4)
    restore_linear4bit(model)
    assert all("_dequantized" not in layer.__dict__ for layer in layers)
    with pytest.raises(ValueError, match="dequantized_cache_bytes must be at least 0, got -1"):
        swap_linear4bit(model, dequantized_cache_bytes=-1)


def test_a_cache_filled_by_inference_serves_training():
    layer, x = swapped(make_layer(), dequantized_cache_bytes=1 << 20), torch.randn(2, 64)
    with torch.inference_mode():
        layer(x)
    kept = layer.__dict__["_dequantized"]
    torch.testing.assert_close(answer(layer, x), answer(make_layer(), x), rtol=1e-5, atol=1e-4)
    assert layer.__dict__["_dequantized"] is kept


def test_the_weight_is_examined_once():
    layer, x = swapped(make_layer()), torch.randn(2, 64)
    layer(x)
    first = layer.four_bit_weight()
    layer(x)
    assert layer.four_bit_weight() is first
    layer.weight.data = layer.weight.data.clone()
    assert layer.four_bit_weight() is not first
    assert layer.four_bit_weight().packed.data_ptr() == layer.weight.data_ptr()
