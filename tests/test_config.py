"""EPTConfig: counts, budgets, and what it refuses."""

from __future__ import annotations

import numpy
import pytest
from peft import PeftConfig
from tiny_models import make_model

from ept import EPTConfig, EPTLayer


@pytest.mark.parametrize(
    "config, count",
    [
        (EPTConfig(), 76_801),
        (EPTConfig.prompt_tuning(), 76_800),
        (EPTConfig.dept(), 76_800),
        (EPTConfig(num_spaces=1), 64_513),
    ],
    ids=["ept", "prompt tuning", "dept", "one space has no gate"],
)
def test_parameter_count_at_d_768(config, count):
    assert config.parameter_count(768) == count


@pytest.mark.parametrize(
    "fields", [{}, {"fusion_dim": 4}, {"r": 0}, {"num_virtual_tokens": 0}, {"num_spaces": 0}], ids=str
)
def test_parameter_count_is_that_of_the_layer(fields):
    config = EPTConfig(**{"num_virtual_tokens": 5, "max_length": 9, "r": 3, **fields})
    layer = EPTLayer(config, make_model("llama").get_input_embeddings())
    assert config.parameter_count(32) == sum(p.numel() for p in layer.parameters())


@pytest.mark.parametrize("method", ["ept", "dept", "pt"])
@pytest.mark.parametrize(
    "d, m, budget", [(768, 256, 76_800), (768, 348, 76_800), (576, 64, 5_760), (4096, 256, 409_600)]
)
def test_budget_is_kept_and_nearly_used(method, d, m, budget):
    config = EPTConfig.for_budget(d, m, budget, method)
    assert 0.9 * budget <= config.parameter_count(d) <= budget


def test_budget_finds_the_published_sizes():
    dept, pt = (EPTConfig.for_budget(768, 256, 76_800, method) for method in ("dept", "pt"))
    assert (dept.num_virtual_tokens, dept.r) == (60, 30)
    assert pt.num_virtual_tokens == 100


@pytest.mark.parametrize(
    "d, m, tokens, sizes",
    [
        (768, 256, 100, (41, 4)),
        (576, 64, 40, (16, 2)),
        (576, 64, 30, (15, 2)),
        (576, 64, 20, (14, 1)),
        (768, 256, 10, (5, 1)),
    ],
)
def test_a_small_budget_goes_to_the_prompt_first(d, m, tokens, sizes):
    config = EPTConfig.for_budget(d, m, tokens * d)
    assert (config.num_virtual_tokens, config.num_spaces) == sizes


def test_budget_takes_a_model_and_keeps_given_fields():
    config = EPTConfig.for_budget(make_model("llama"), 16, 2_000, num_virtual_tokens=7, num_spaces=2)
    assert (config.num_virtual_tokens, config.num_spaces, config.max_length) == (7, 2, 16)
    assert config.parameter_count(32) <= 2_000


@pytest.mark.parametrize("method", ["ept", "dept", "pt", "ulpt", "adept", "residual"])
@pytest.mark.parametrize("kind", ["trained", "stored"])
@pytest.mark.parametrize("d, m, budget", [(384, 64, 12_000), (768, 256, 70_000)])
def test_either_budget_is_spent_and_not_exceeded(method, kind, d, m, budget):
    if method == "residual" and kind == "trained":
        budget *= 3  # its network alone is as large
    config = EPTConfig.for_budget(d, m, budget, method, kind)
    count = config.parameter_count(d) if kind == "trained" else config.stored_count(d)
    assert 0.9 * budget <= count <= budget
    assert (
        EPTConfig(**{**config.to_dict(), "folded": True}).parameter_count(d) == config.stored_count(d)
        or config.prompt_rank
    )


def test_spaces_cost_nothing_stored():
    ept, dept = (EPTConfig.for_budget(384, 64, 7_680, method, "stored") for method in ("ept", "dept"))
    assert (ept.num_virtual_tokens, ept.r, ept.stored_count(384)) == (
        dept.num_virtual_tokens, dept.r, dept.stored_count(384)
    )  # fmt: skip
    assert ept.num_spaces


@pytest.mark.parametrize("kind", ["trained", "stored"])
@pytest.mark.parametrize("tokens", [0, 1, 2])
@pytest.mark.parametrize("method", ["ept", "dept", "pt", "ulpt", "adept", "residual"])
def test_a_size_that_costs_nothing_does_not_end_the_search(method, tokens, kind):
    config = EPTConfig.for_budget(64, 32, 3_000, method, kind, num_virtual_tokens=tokens)
    count = config.parameter_count if kind == "trained" else config.stored_count
    assert config.num_virtual_tokens == tokens
    assert count(64) <= 3_000


def test_budget_takes_the_width_as_any_kind_of_integer():
    assert EPTConfig.for_budget(numpy.int64(64), 32, 3_000) == EPTConfig.for_budget(64, 32, 3_000)


def test_impossible_budget_names_the_smallest():
    for budget in (1_000, 0):
        refused = rf"no ept configuration has at most {budget} parameters with width 768.*the smallest has 3329;"
        with pytest.raises(ValueError, match=refused):
            EPTConfig.for_budget(768, 256, budget)
    assert EPTConfig.for_budget(768, 256, 3_329).parameter_count(768) == 3_329
    with pytest.raises(ValueError, match="unknown method 'lora': use one of ept, dept, pt, ulpt"):
        EPTConfig.for_budget(768, 256, 76_800, "lora")
    with pytest.raises(ValueError, match="unknown kind of budget 'saved': use one of trained, stored"):
        EPTConfig.for_budget(768, 256, 76_800, kind="saved")


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"num_virtual_tokens": -1}, "num_virtual_tokens must be at least 0, got -1"),
        ({"r": 1.5}, "r must be an integer, got 1.5"),
        ({"max_length": 0}, "max_length must be at least 1, got 0"),
        ({"alpha": float("nan")}, "alpha must be a finite number"),
        ({"fusion": "yes"}, "fusion must be true or false, got 'yes'"),
        ({"embedding_scale": 0}, "embedding_scale must be 'auto' or a number above 0"),
        ({"embedding_scale": "big"}, "embedding_scale must be a finite number, got 'big'"),
        ({"space_activation": "swish"}, "space_activation must be one of gelu, relu"),
        ({"prompt_tuning_init": "ZERO"}, "prompt_tuning_init must be one of SAMPLE_VOCAB"),
        ({"prompt_tuning_init": "TEXT"}, "needs prompt_tuning_init_text"),
        ({"task_type": "MULTIPLE_CHOICE"}, "task_type must be one of SEQ_2_SEQ_LM"),
        (
            {"update": "token", "lowrank_init": "svd"},
            "lowrank_init='svd' is for the position-dependent update: leave it out",
        ),
    ],
    ids=str,
)
def test_bad_field_is_named(fields, message):
    with pytest.raises((TypeError, ValueError), match=message):
        EPTConfig(**fields)


def test_numbers_of_numpy_are_numbers(tmp_path):
    config = EPTConfig(
        num_virtual_tokens=numpy.int64(3), r=numpy.int32(2), alpha=numpy.float32(0.5), fusion=numpy.True_
    )
    assert [type(getattr(config, name)) for name in ("num_virtual_tokens", "r", "alpha", "fusion")] == [
        int,
        int,
        float,
        bool,
    ]
    config.save_pretrained(tmp_path)
    assert EPTConfig.from_pretrained(tmp_path) == config


def test_every_field_has_help():
    own = set(EPTConfig.__dataclass_fields__) - set(PeftConfig.__dataclass_fields__)
    assert all(EPTConfig.__dataclass_fields__[name].metadata.get("help") for name in own)


def test_peft_config_reads_a_saved_configuration(tmp_path):
    EPTConfig(task_type="CAUSAL_LM", r=7, fusion_dim=3).save_pretrained(str(tmp_path))
    config = PeftConfig.from_pretrained(str(tmp_path))
    assert isinstance(config, EPTConfig)
    assert (config.r, config.fusion_dim, config.peft_type) == (7, 3, "EPT")
