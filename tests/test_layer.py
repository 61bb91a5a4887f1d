"""EPTLayer alone: in a plain loop, on plain and unusual embeddings, and what it refuses."""

from __future__ import annotations

import copy
import math

import bitsandbytes
import pytest
import torch
from accelerate import cpu_offload
from tiny_models import make_model
from torch import nn

from ept import EPTConfig, EPTLayer
from ept.embedding import embedding_rms

SMALL = {"num_virtual_tokens": 4, "max_length": 8, "r": 2}


def make_embedding(scale: float = 1.0, kind: type[nn.Embedding] = nn.Embedding) -> nn.Embedding:
    torch.manual_seed(0)
    embedding = kind(50, 16)
    embedding.weight.requires_grad_(False).mul_(scale)
    return embedding


class ScaledEmbedding(nn.Embedding):
    """As in Gemma and BART: the module multiplies what it looks up."""

    def forward(self, ids):
        return super().forward(ids) * 4


def test_output_is_prompt_then_updated_text():
    embedding = make_embedding()
    layer = EPTLayer(EPTConfig(**SMALL), embedding)
    nn.init.normal_(layer.B)
    ids = torch.tensor([[0, 0, 5, 6, 7], [8, 9, 10, 11, 12]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    embeds, full_mask, position_ids = layer(ids, mask)
    C = layer.embedding_scale * 8 / math.sqrt(2) * layer.A @ layer.B
    torch.testing.assert_close(embeds[:, :4], layer.joint_prompt().expand(2, -1, -1))
    torch.testing.assert_close(embeds[0, 6:], embedding.weight[ids[0, 2:]] + C[:3])  # positions count real tokens
    assert torch.equal(embeds[0, 4:6], embedding.weight[ids[0, :2]])  # padding gets no update
    torch.testing.assert_close(embeds[1, 4:], embedding.weight[ids[1]] + C[:5])
    assert full_mask.tolist() == [[1, 1, 1, 1, 0, 0, 1, 1, 1], [1] * 9]
    assert position_ids.tolist() == [[0, 1, 2, 3, 3, 3, 4, 5, 6], list(range(9))]


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.float32])
def test_mask_keeps_its_dtype(dtype):
    layer = EPTLayer(EPTConfig(**SMALL), make_embedding())
    _, mask, _ = layer(torch.ones(1, 3, dtype=torch.long), torch.ones(1, 3, dtype=dtype))
    assert mask.dtype == dtype
    assert mask.shape == (1, 7)


@pytest.mark.parametrize("scale", [0.02, 10.0])
def test_scale_is_the_root_mean_square_of_the_embeddings(scale):
    embedding = make_embedding(scale)
    layer = EPTLayer(EPTConfig(**SMALL), embedding)
    assert layer.embedding_scale == pytest.approx(float(embedding.weight.double().square().mean().sqrt()), rel=1e-6)
    assert layer.prompt.detach().square().mean().sqrt() == pytest.approx(1, abs=0.3)  # parameters are in units of it
    assert EPTLayer(EPTConfig(**SMALL, embedding_scale=1.0), embedding).embedding_scale == 1.0


def test_embedding_that_scales_inside_is_honoured():
    embedding = make_embedding(kind=ScaledEmbedding)
    assert embedding_rms(embedding) == pytest.approx(4 * embedding_rms(make_embedding()))
    layer = EPTLayer(EPTConfig.prompt_tuning(0), embedding)
    ids = torch.tensor([[3, 4]])
    assert torch.equal(layer(ids)[0], 4 * embedding.weight[ids])


def test_hooked_resized_and_trainable_embeddings_are_honoured():
    embedding = make_embedding()
    layer = EPTLayer(EPTConfig.prompt_tuning(0), embedding)
    ids = torch.tensor([[3, 4]])
    handle = embedding.register_forward_hook(lambda module, args, output: output + 1)
    assert torch.equal(layer(ids)[0], embedding.weight[ids] + 1)
    handle.remove()
    embedding.weight = nn.Parameter(torch.ones(60, 16))
    output = layer(torch.tensor([[59]]))[0]
    assert torch.equal(output, torch.ones(1, 1, 16))
    output.sum().backward()
    assert embedding.weight.grad[59].tolist() == [1.0] * 16
    assert not embedding.weight.grad[:59].any()


def test_4bit_embedding_is_honoured():
    embedding = bitsandbytes.nn.Embedding4bit(50, 64)
    embedding.load_state_dict({"weight": torch.randn(50, 64, generator=torch.Generator().manual_seed(0))})
    embedding = embedding.to("cpu")
    layer = EPTLayer(EPTConfig.prompt_tuning(4), embedding)
    ids = torch.tensor([[3, 4, 49]])
    torch.testing.assert_close(layer(ids)[0][:, 4:], embedding(ids))
    assert layer.embedding_scale == pytest.approx(1, abs=0.05)


def test_offloaded_embedding_is_honoured():
    """accelerate keeps the weights elsewhere and brings them in for each call; between calls they are meta tensors."""
    embedding = make_embedding()
    weight = embedding.weight.clone()
    cpu_offload(embedding, execution_device=torch.device("cpu"))
    assert embedding.weight.is_meta
    layer = EPTLayer(EPTConfig.prompt_tuning(4), embedding)
    ids = torch.tensor([[3, 4]])
    assert torch.equal(layer(ids)[0][:, 4:], weight[ids])
    assert layer.embedding_scale == pytest.approx(float(weight.double().square().mean().sqrt()), rel=1e-6)


def test_given_embeddings_take_the_place_of_ids():
    embedding = make_embedding()
    layer = EPTLayer(EPTConfig(**SMALL), embedding)
    nn.init.normal_(layer.B)
    ids = torch.tensor([[3, 4, 5]])
    assert torch.equal(layer(inputs_embeds=embedding(ids))[0], layer(ids)[0])


def test_a_plain_loop_learns():
    """No PEFT, no transformers: the layer in front of any network."""
    torch.manual_seed(0)
    embedding, network = make_embedding(), nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 2))
    network.requires_grad_(False)
    layer = EPTLayer(EPTConfig(**SMALL), embedding)
    ids, labels = torch.randint(0, 50, (16, 6)), torch.ones(16, dtype=torch.long)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.05)
    losses = []
    for _ in range(100):
        embeds, mask, _ = layer(ids)
        hidden = (embeds * mask[..., None]).mean(1)
        loss = nn.functional.cross_entropy(network(hidden), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert all(p.grad is not None for p in layer.parameters())


def test_same_seed_same_parameters_and_methods_share_the_prompt():
    embedding = make_embedding()
    a, b, other = (EPTLayer(EPTConfig(**SMALL, seed=seed), embedding) for seed in (1, 1, 2))
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    assert not torch.equal(a.prompt, other.prompt)
    pt = EPTLayer(EPTConfig.prompt_tuning(4, seed=1), embedding)
    assert torch.equal(pt.prompt, a.prompt)
    assert torch.equal(pt.joint_prompt(), a.joint_prompt())  # at the start EPT is prompt tuning, bit for bit


@pytest.mark.parametrize("ids", [[7, 8], [7, 8, 9, 10, 11]])
def test_initialisation_from_text_takes_what_is_missing_from_the_vocabulary(ids):
    embedding = make_embedding()
    config = EPTConfig(**SMALL, prompt_tuning_init="TEXT", prompt_tuning_init_text="a b c")
    layer = EPTLayer(config, embedding, tokenizer=lambda text, add_special_tokens: {"input_ids": ids})
    sampled = EPTLayer(EPTConfig(**SMALL), embedding)
    n = min(len(ids), 4)
    torch.testing.assert_close(layer.prompt[:n] * layer.embedding_scale, embedding.weight[ids[:n]])
    assert torch.equal(layer.prompt[n:], sampled.prompt[n:])


@pytest.mark.parametrize("r", [3, 12])  # of 8 positions and 16 numbers
def test_update_starts_from_waves_or_a_long_prompt(r):
    embedding, sizes = make_embedding(3.0), {"num_virtual_tokens": 0, "max_length": 8, "r": r}
    waves = EPTLayer(EPTConfig(**sizes, lowrank_init="cosine"), embedding)
    gram = (waves.A.T @ waves.A)[: min(r, 8), : min(r, 8)].detach()
    torch.testing.assert_close(gram, torch.eye(len(gram)) * 8 / (3 * r))  # of the size of a uniform start
    assert torch.equal(waves.A[:, 0], waves.A[:1, 0].expand(8))
    assert not waves.B.any()
    svd = EPTLayer(EPTConfig(**sizes, lowrank_init="svd"), embedding)
    ids = torch.randint(50, (8,), generator=torch.Generator().manual_seed(0))
    left, values, right = torch.linalg.svd(embedding.weight[ids].double(), full_matrices=False)
    expected = 0.1 * (left[:, :r] * values[:r]) @ right[:r]
    torch.testing.assert_close(svd.position_table().double(), expected, rtol=1e-4, atol=1e-4)


def test_random_initialisation_has_unit_variance():
    layer = EPTLayer(EPTConfig(num_virtual_tokens=500, prompt_tuning_init="RANDOM"), make_embedding())
    assert layer.prompt.detach().std() == pytest.approx(1, abs=0.05)


FORMS = {
    "ept": EPTConfig(**SMALL, fusion_dim=3),
    "ept, scaled and shifted": EPTConfig(**SMALL, prompt_scale_shift=True),
    "ept-token": EPTConfig(**SMALL, update="token"),
    "ulpt": EPTConfig.ulpt(4, 3, max_length=8),
    "adept": EPTConfig.adept(4, 2, max_length=8),
    "residual": EPTConfig.residual_prompt_tuning(4, 5, max_length=8),
}


@pytest.mark.parametrize("config", FORMS.values(), ids=FORMS)
def test_fold_keeps_the_outputs_and_leaves_what_is_stored(config):
    layer = EPTLayer(config, make_embedding(10.0))
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    ids, mask = torch.tensor([[3, 4, 5], [6, 7, 0]]), torch.tensor([[1, 1, 1], [1, 1, 0]])
    before = layer(ids, mask)[0]
    layer.fold()
    layer.fold()  # a second time changes nothing
    assert sum(p.numel() for p in layer.parameters()) == layer.config.parameter_count(16) >= config.stored_count(16)
    torch.testing.assert_close(layer(ids, mask)[0], before, rtol=0, atol=0)
    assert not any(p.requires_grad for p in layer.parameters())


def test_an_adapter_smaller_as_it_is_trained_is_stored_so():
    config = EPTConfig.ulpt(100, 4)
    assert config.stored_count(64) == config.parameter_count(64) == 100 * 4 + 2 * 64
    assert EPTConfig(space_dim=64).stored_count(768) == EPTConfig.dept(40, 30).parameter_count(768)


def with_random_parameters(config):
    layer = EPTLayer(config, make_embedding(3.0))
    for number, parameter in enumerate(layer.parameters()):
        nn.init.normal_(parameter, generator=torch.Generator().manual_seed(number))
    return layer


def test_a_frozen_basis_outlives_casts_and_places_without_data():
    layer = with_random_parameters(EPTConfig.ulpt(4, 3, seed=5))
    state, expected = layer.state_dict(), layer.joint_prompt()
    layer.to(torch.bfloat16).to(torch.float32)
    layer.to("meta").to_empty(device="cpu")
    layer.load_state_dict(state)
    assert torch.equal(layer.joint_prompt(), expected)
    layer.to("meta")
    layer.load_state_dict(state, assign=True)  # which moves nothing, as loaders of large models do
    assert torch.equal(layer.joint_prompt(), expected)


def test_ulpt_is_a_mixture_of_frozen_rows_that_follow_from_the_seed():
    layer = with_random_parameters(EPTConfig.ulpt(4, 3, seed=5))
    generator = torch.Generator().manual_seed(5 ^ 0x5EED)
    R = torch.randn((3, 16), generator=generator).double() / math.sqrt(3)
    expected = (layer.Z.double() @ R * layer.scale.double() + layer.shift.double()) * layer.embedding_scale
    torch.testing.assert_close(layer.joint_prompt().double(), expected, rtol=1e-5, atol=1e-5)
    assert set(layer.state_dict()) == {"Z", "scale", "shift", "_extra_state"}
    loaded = EPTLayer(layer.config, make_embedding(3.0), initialise=False)
    loaded.load_state_dict(layer.state_dict())
    assert torch.equal(loaded.joint_prompt(), layer.joint_prompt())


def test_residual_prompt_tuning_adds_a_normalised_network_of_the_prompt():
    layer = with_random_parameters(EPTConfig.residual_prompt_tuning(4, 5))
    p, W_down, b_down, W_up, gain = (
        layer.part(name).double() for name in ("prompt", "W_down", "b_down", "W_up", "gain")
    )
    x = (p @ W_down + b_down).clamp(min=0) @ W_up
    x = (x - x.mean(1, keepdim=True)) / (x.var(1, correction=0, keepdim=True) + 1e-5).sqrt()
    expected = (p + x * gain) * layer.embedding_scale
    torch.testing.assert_close(layer.joint_prompt().double(), expected, rtol=1e-4, atol=1e-4)


def test_adept_updates_a_token_by_itself_and_only_where_there_is_text():
    layer = with_random_parameters(EPTConfig.adept(4, 2, max_length=3))
    ids = torch.tensor([[0, 5, 6, 7, 5], [6, 7, 5, 9, 9]])  # longer than max_length, which limits positions only
    mask = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 0]])
    text = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    found = layer(ids, mask, text_mask=text)[0][:, 4:].double()
    rho, W = layer.embedding_scale, layer._embedding[0].weight.double()
    W_in, b_in, W_out, b_out = (layer.part(name).double() for name in ("W_in", "b_in", "W_out", "b_out"))
    update = rho * ((W[ids] / rho @ W_in + b_in).clamp(min=0) @ W_out + b_out)
    torch.testing.assert_close(found, W[ids] + update * (mask & text)[..., None], rtol=1e-5, atol=1e-4)
    layer(ids, mask)[0].square().sum().backward()
    assert all(float(parameter.grad.abs().sum()) > 0 for parameter in layer.parameters())


@pytest.mark.parametrize("config", FORMS.values(), ids=FORMS)
def test_all_forms_start_as_what_they_change(config):
    """The same prompt as prompt tuning, and the text unchanged; ULPT's prompt differs by its nature."""
    layer, ids = EPTLayer(config, make_embedding()), torch.tensor([[3, 4, 5]])
    plain = EPTLayer(EPTConfig.prompt_tuning(4), make_embedding())
    found, expected = layer(ids)[0], plain(ids)[0]
    assert torch.equal(found[:, 4:], expected[:, 4:])
    assert torch.equal(found, expected) != bool(config.prompt_rank)


def test_state_carries_the_unit():
    config = EPTConfig(**SMALL)
    layer, other = EPTLayer(config, make_embedding(10.0)), EPTLayer(config, make_embedding(0.02))
    other.load_state_dict(copy.deepcopy(layer.state_dict()))
    assert other.embedding_scale == layer.embedding_scale
    assert torch.equal(other.joint_prompt(), layer.joint_prompt())


def test_unit_survives_a_change_of_dtype():
    layer = EPTLayer(EPTConfig(**SMALL), make_embedding(0.02))
    scale = layer.embedding_scale
    layer.to(torch.bfloat16).to(torch.float32)
    assert layer.embedding_scale == scale


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_output_has_the_embeddings_dtype(dtype):
    layer = EPTLayer(EPTConfig(**SMALL), make_embedding().to(dtype))
    assert layer(torch.tensor([[1, 2]]))[0].dtype == dtype
    assert layer.prompt.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("config", FORMS.values(), ids=FORMS)
def test_every_form_may_be_cast_and_learns_and_folds(config, dtype):
    layer, ids = EPTLayer(config, make_embedding()).to(dtype), torch.tensor([[1, 2]])
    layer(ids)[0].square().sum().backward()
    assert all(parameter.grad.dtype == dtype for parameter in layer.parameters())
    layer.fold()
    assert layer(ids)[0].dtype == torch.float32


def test_padding_beyond_max_length_is_no_error():
    layer = EPTLayer(EPTConfig(**SMALL), make_embedding())
    ids = torch.ones(1, 12, dtype=torch.long)
    mask = torch.tensor([[0] * 4 + [1] * 8])
    assert layer(ids, mask)[0].shape == (1, 16, 16)


IDS = torch.ones(1, 3, dtype=torch.long)
BAD = [
    (
        {"input_ids": torch.ones(2, 9, dtype=torch.long)},
        "input has 9 tokens, the adapter was made for max_length=8: truncate to 8 or train with a larger max_length",
    ),
    ({}, "exactly one of input_ids and inputs_embeds"),
    ({"input_ids": torch.ones(3, dtype=torch.long)}, r"input_ids must be int32 or int64 of shape \[batch, length\]"),
    ({"input_ids": IDS.bool()}, r"input_ids must be int32 or int64 .* got torch.bool \[1, 3\]"),
    ({"inputs_embeds": torch.ones(1, 3, 16, dtype=torch.long)}, "inputs_embeds must be of a floating-point type, got"),
    ({"input_ids": torch.ones(1, 3)}, r"input_ids must be int32 or int64 .* torch.float32"),
    ({"inputs_embeds": torch.ones(1, 3, 15)}, r"inputs_embeds must have shape \[batch, length, 16\], got \[1, 3, 15\]"),
    (
        {"input_ids": IDS, "attention_mask": torch.ones(1, 1, 3, 3)},
        r"attention_mask must have the shape of the input, \[1, 3\], got \[1, 1, 3, 3\]",
    ),
    ({"input_ids": IDS, "text_mask": torch.ones(1, 2)}, r"text_mask must have shape \[1, 3\], got \[1, 2\]"),
]


@pytest.mark.parametrize("inputs, message", BAD, ids=[message[:30] for _, message in BAD])
def test_bad_input_is_named(inputs, message):
    layer = EPTLayer(EPTConfig(**SMALL), make_embedding())
    with pytest.raises(ValueError, match=message):
        layer(**inputs)


def test_embeddings_without_a_unit_are_refused():
    embedding = make_embedding()
    embedding.weight.zero_()
    with pytest.raises(ValueError, match=r"root mean square of the input embeddings is 0\.0"):
        EPTLayer(EPTConfig(**SMALL), embedding)


def test_embedding_is_no_part_of_the_layer():
    layer = EPTLayer(EPTConfig(**SMALL), make_model("llama").get_input_embeddings())
    assert set(layer.state_dict()) == {"prompt", "A", "B", "beta", "D", "U", "G", "_extra_state"}
    assert copy.deepcopy(layer)(torch.tensor([[4, 5]]))[0].shape == (1, 6, 32)


STARTS = [
    {},
    {"prompt_tuning_init": "RANDOM"},
    {"lowrank_init": "cosine"},
    {"lowrank_init": "svd"},
    {"prompt_rank": 2, "prompt_scale_shift": True},
    {"update": "token"},
    {"fusion_dim": 3, "fusion_weight": 0.5},
]


@pytest.fixture
def default_dtype():
    before = torch.get_default_dtype()
    yield torch.set_default_dtype
    torch.set_default_dtype(before)


@pytest.mark.parametrize("fields", STARTS, ids=map(str, STARTS))
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_parameters_follow_from_the_seed_whatever_the_default_type(default_dtype, fields, dtype):
    embedding, config = make_embedding(), EPTConfig(**SMALL, **fields)
    expected = EPTLayer(config, embedding)
    default_dtype(dtype)
    layer = EPTLayer(config, embedding)
    assert {p.dtype for p in layer.parameters()} == {torch.float32}
    for (name, parameter), own in zip(layer.named_parameters(), expected.parameters()):
        assert torch.equal(parameter, own), name
    assert torch.equal(layer.joint_prompt(), expected.joint_prompt())


RECIPES = [{"prompt_rank": 2, "prompt_scale_shift": True}, {"residual_dim": 3}, {"update": "token"}, {}]


@pytest.mark.parametrize("fields", RECIPES, ids=map(str, RECIPES))
def test_autocast_leaves_the_layer_in_float32(fields):
    layer = EPTLayer(EPTConfig(**SMALL, **fields), make_embedding())
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    ids = torch.tensor([[5, 6, 7]])

    def result(enabled):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            embeds = layer(ids)[0]
        return [embeds, *torch.autograd.grad(embeds.square().sum(), list(layer.parameters()), allow_unused=True)]

    for actual, expected in zip(result(True), result(False)):
        assert actual is expected or torch.equal(actual, expected)


@pytest.mark.parametrize("options", [{"padding_idx": 0}, {"scale_grad_by_freq": True}])
def test_a_trained_embedding_gets_its_own_gradient(options):
    torch.manual_seed(0)
    embedding = nn.Embedding(20, 8, **options)
    layer = EPTLayer(EPTConfig(num_virtual_tokens=2, max_length=8, r=2), embedding)
    ids = torch.tensor([[0, 5, 5, 7]])
    weights = torch.randn(1, 4, 8)
    (expected,) = torch.autograd.grad((embedding(ids) * weights).sum(), embedding.weight)
    (layer(ids)[0][:, 2:] * weights).sum().backward()
    torch.testing.assert_close(embedding.weight.grad, expected)
