"""Methods by name: settings, sizes at a budget, and the parts that ablations take away."""

import sys
from types import SimpleNamespace

import pytest
import torch
from tiny_models import make_model
from torch import nn

from ept import EPTConfig, EPTLayer
from ept.runs.adapters import adapter_config, module_of
from ept.runs.config import MethodConfig, load_run_config
from ept.runs.method_table import METHODS, Method

D, M, BUDGET = 32, 24, 2400
OURS = [name for name, method in METHODS.items() if method.built_by == "adapters:ept"]
# ablation: the parameters of EPT that it has not
ABLATIONS = {
    "ept-no-fusion": {"beta"},
    "ept-no-spaces": {"D", "U", "G"},
    "ept-uniform-gate": {"G"},
    "ept-fixed-beta": {"beta"},
    "ept-cosine": set(),
    "ept-token": {"A", "B"},
    "ept-raw-scale": set(),
}


def config_of(name, **settings):
    return adapter_config(MethodConfig(name=name, **settings), make_model("llama"), "CAUSAL_LM", M, seed=3)


@pytest.mark.parametrize("name", OURS)
def test_ours_spend_one_budget(name):
    config = config_of(name, budget=BUDGET)
    layer = EPTLayer(config, nn.Embedding(50, D))
    count = sum(parameter.numel() for parameter in layer.parameters())
    assert count == config.parameter_count(D)
    assert 0.95 * BUDGET < count <= BUDGET
    assert (config.max_length, config.seed, config.task_type) == (M, 3, "CAUSAL_LM")


@pytest.mark.parametrize("name, missing", ABLATIONS.items())
def test_ablations_lack_one_part(name, missing):
    whole, ablated = config_of("ept"), config_of(name)
    assert set(whole.parameter_shapes(D)) - set(ablated.parameter_shapes(D)) == missing
    assert ablated.embedding_scale == (1.0 if name == "ept-raw-scale" else "auto")
    assert ablated.lowrank_init == ("cosine" if name == "ept-cosine" else "uniform")


def test_usual_lengths_are_those_of_the_configurations():
    assert [config_of(name).num_virtual_tokens for name in OURS] == [METHODS[name].usual_tokens for name in OURS]


def layers(**fields):
    """EPT with random parameters, and the same with `fields`."""
    embedding = nn.Embedding(50, D)
    found = []
    for extra in ({}, fields):
        config = EPTConfig(num_virtual_tokens=5, max_length=M, r=3, num_spaces=4, space_dim=2, **extra)
        layer = EPTLayer(config, embedding)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name in ("prompt", "A", "B", "D", "U"):
                parameter = layer.get_parameter(name)
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
        found.append(layer)
    return found


def test_uniform_gate_is_a_gate_of_equal_logits():
    learned, uniform = layers(space_gate="uniform")
    with torch.no_grad():
        learned.G.zero_()
    torch.testing.assert_close(uniform.joint_prompt(), learned.joint_prompt())
    uniform.joint_prompt().sum().backward()
    assert all(parameter.grad is not None for name, parameter in uniform.named_parameters() if name != "beta")


def test_fixed_weight_is_beta_at_that_value():
    learned, fixed = layers(fusion_weight=0.7)
    with torch.no_grad():
        learned.beta.fill_(0.7)
    torch.testing.assert_close(fixed.joint_prompt(), learned.joint_prompt())
    before = fixed.joint_prompt()
    fixed.fold()
    torch.testing.assert_close(fixed.joint_prompt(), before)


@pytest.mark.parametrize(
    "fields, message",
    [({"space_gate": "top1"}, "space_gate must be one of learned, uniform"), ({"fusion_weight": "x"}, "fusion_weight")],
)
def test_bad_fields(fields, message):
    with pytest.raises((ValueError, TypeError), match=message):
        EPTConfig(**fields)


REFUSED = [
    ("eptt", {}, "unknown method 'eptt': did you mean 'ept'"),
    ("pt", {"r": 4}, "method.r cannot be set for method.name=pt, which has no such part"),
    ("dept", {"num_spaces": 2}, "method.num_spaces cannot be set for method.name=dept"),
    ("lora", {"num_virtual_tokens": 5}, "method.num_virtual_tokens cannot be set for method.name=lora"),
    ("p-tuning", {"alpha": 5.0}, "method.alpha cannot be set for method.name=p-tuning"),
    ("ept-no-fusion", {"fusion": True}, "method.fusion cannot be set for method.name=ept-no-fusion, which fixes it"),
    ("ept-no-fusion", {"fusion_dim": 4}, "method.fusion_dim cannot be set"),
]


@pytest.mark.parametrize("name, settings, message", REFUSED)
def test_refused(name, settings, message):
    overrides = [f"method.name={name}", *(f"method.{key}={value}" for key, value in settings.items())]
    with pytest.raises(ValueError, match=message):
        load_run_config(None, overrides)


def test_a_new_method_is_a_row_and_a_file(monkeypatch):
    file = SimpleNamespace(configure=lambda method, *_, **__: method.title, attach=lambda base, config: (base, config))
    monkeypatch.setitem(sys.modules, "ept.runs.mine", file)
    mine = Method("mine", "Mine", "mine:configure", frozenset({"r"}), 12, roles={"Z": "map"})
    monkeypatch.setitem(METHODS, "mine", mine)
    settings = load_run_config(None, ["method.name=mine", "method.r=3"]).method
    config = adapter_config(settings, "base", "CAUSAL_LM", M, seed=0)
    assert module_of(mine).attach("base", config) == ("base", "Mine")
    assert [mine.role(name) for name in ("x.Z", "x.A", "head.modules_to_save.Z")] == ["map", "other", "head"]


def test_an_ablation_may_repeat_what_it_fixes():
    assert load_run_config(None, ["method.name=ept-no-spaces", "method.num_spaces=0"]).method.num_spaces == 0
