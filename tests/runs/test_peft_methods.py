"""PEFT's methods under our trainer: sizes at a budget, equal calls, best checkpoints and resuming."""

from pathlib import Path

import pytest
import safetensors.torch
import torch
from run_checks import kill
from tiny_models import ONE_A_TASK, TASK_OF, make_batch, make_model

from ept.runs.adapters import adapter_config
from ept.runs.config import MethodConfig
from ept.runs.data import load_run_data
from ept.runs.method_table import METHODS
from ept.runs.peft_models import attach
from ept.runs.predict import open_run
from ept.runs.train import train

NAMES = [name for name, method in METHODS.items() if method.built_by.startswith("peft_models:")]
BUDGET = 2000


def attached(name, family, **settings):
    base = make_model(family)
    config = adapter_config(MethodConfig(name=name, **settings), base, TASK_OF[family], 16, seed=0)
    return attach(base, config)


@pytest.mark.parametrize("family", ["llama", "t5"])
@pytest.mark.parametrize("name", NAMES)
def test_sizes_at_a_budget(name, family):
    count = attached(name, family, budget=BUDGET).get_nb_trainable_parameters()[0]
    step = {"lora": 768}.get(name, 200)  # of LoRA one rank more, of the others one token more
    assert BUDGET - step < count <= BUDGET


@pytest.mark.parametrize("settings", [{}, {"budget": BUDGET}])
def test_lora_without_linear_layers_is_refused(settings):
    with pytest.raises(
        ValueError, match="LoRA modules of gpt2, c_attn, are not linear layers of GPT2LMHeadModel: leave"
    ):
        attached("lora", "gpt2", **settings)


def test_lora_of_rank_one_keeps_the_last_layers_when_there_is_no_more():
    base = make_model("llama")  # 2 layers, q: 32 + 32, v: 32 + 16
    config = adapter_config(MethodConfig(name="lora", budget=120), base, "CAUSAL_LM", 16, seed=0)
    assert config.r == 1
    assert sorted(config.target_modules) == [
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.self_attn.v_proj",
    ]


@pytest.mark.parametrize(
    "name, settings, message",
    [
        (
            "prompt-tuning",
            {"budget": 20},
            "prompt-tuning with 1 virtual tokens has 32 parameters, but method.budget is 20",
        ),
        ("prompt-tuning", {"budget": 64, "num_virtual_tokens": 3}, "with 3 virtual tokens has 96 parameters"),
        (
            "p-tuning",
            {"budget": 100},
            "p-tuning with 1 virtual tokens has at least 131 parameters, but method.budget is 100",
        ),
        ("mpt", {"budget": 40}, "mpt with 1 virtual tokens has 65 parameters"),
        ("lora", {"budget": 40}, "LoRA of rank 1 on .*v_proj alone has 48 parameters, but method.budget is 40"),
    ],
)
def test_nothing_fits(name, settings, message):
    with pytest.raises(ValueError, match=message):
        attached(name, "llama", **settings)


@pytest.mark.parametrize("family", ONE_A_TASK)
@pytest.mark.parametrize("name", NAMES)
def test_logits_at_the_labels_give_the_same_loss(name, family):
    model = attached(name, family, **({} if name == "lora" else {"num_virtual_tokens": 6})).eval()
    batch = make_batch(family, side="left" if family == "llama" else "right")
    with torch.no_grad():
        whole = model(**batch).loss
        items = batch["labels"].ne(-100).sum()
        again = model(**batch, num_items_in_batch=items).loss
        halves = [{key: value[i : i + 1] for key, value in batch.items()} for i in range(2)]
        parts = sum(model(**half, num_items_in_batch=items).loss for half in halves)
    torch.testing.assert_close(again, whole)
    torch.testing.assert_close(parts, whole)
    if family == "llama":
        with torch.no_grad():
            torch.testing.assert_close(model(**batch, logits_to_keep=4).loss, whole)


@pytest.mark.parametrize("name", NAMES)
def test_frozen_dropout_is_off_in_training(name):
    model = attached(name, "t5")
    batch = make_batch("t5")
    model.train()
    torch.testing.assert_close(model(**batch).logits, model(**batch).logits)
    assert [p for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize("name", NAMES)
def test_gradient_checkpointing_is_on_in_training_and_changes_no_gradient(name):
    found = []
    for checkpointing in (False, True):
        model = attached(name, "llama")
        if checkpointing:
            model.get_base_model().gradient_checkpointing_enable()
        model.train()
        assert model.get_base_model().model.layers[0].training is checkpointing
        model(**make_batch("llama")).loss.backward()
        found.append([p.grad for p in model.parameters() if p.requires_grad])
    torch.testing.assert_close(*found)


RATES = {"prompt-tuning": 0.05, "p-tuning": 0.003, "mpt": 0.3, "lora": 0.01}


@pytest.fixture
def configure_method(configure):
    """Makes the configuration of a short run of a method."""

    def make(name, family, folder):
        length = "method.num_virtual_tokens=null" if name == "lora" else "method.r=null"
        settings = [f"method.name={name}", f"training.learning_rate={RATES[name]}", length]
        return configure(family, *settings, "training.eval_steps=10", "training.max_steps=20", name=folder)

    return make


def assert_loads_back(results):
    """Scores the adapter that a finished run has saved: the score is that of the run."""
    run = open_run(Path(results["config"]["output_dir"]))
    test = load_run_data(run.config.data, run.tokenizer, run.task_type).data.test
    assert run.score(test)["accuracy"] == results["score"]


@pytest.mark.parametrize("family", ["t5", "bert"])
@pytest.mark.parametrize("name", NAMES)
def test_a_run_loads_back_to_its_score(name, family, configure_method):
    results = train(configure_method(name, family, "run"))
    assert_loads_back(results)
    assert results["config"]["method"]["name"] == name


@pytest.mark.parametrize("name", NAMES)
def test_a_killed_run_resumes_to_the_same_weights(name, configure_method, tmp_path):
    """P-tuning's checkpoints must hold its encoder, not only the prompt it produces."""
    whole = train(configure_method(name, "llama", "whole"))
    assert_loads_back(whole)
    killed = configure_method(name, "llama", "killed")
    kill(killed, step=14)
    resumed = train(killed, resume=True)
    assert (resumed["score"], resumed["best_step"]) == (whole["score"], whole["best_step"])
    files = [tmp_path / folder / "checkpoints/checkpoint-20" for folder in ("whole", "killed")]
    for file in [path.name for path in files[0].glob("*.safetensors")]:
        one, two = (safetensors.torch.load_file(folder / file) for folder in files)
        assert one.keys() == two.keys()
        assert all(torch.equal(one[key], two[key]) for key in one), file
