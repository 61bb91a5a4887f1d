"""PEFT's own functions make, load and swap EPT adapters, and treat other methods' as before."""

from __future__ import annotations

import copy
import json

import peft
import pytest
import torch
import transformers
import yaml
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, TaskType, get_peft_model
from peft.utils.hotswap import hotswap_adapter
from safetensors.torch import load_file, save_file
from tiny_models import FAMILIES, ONE_A_TASK, SMALL, TASK_OF, make_batch, make_model, randomise
from transformers import AutoTokenizer

from ept import EPTConfig, EPTModel, get_ept_model

# PEFT's class for a task; for those that no family of `tiny_models` has, BERT's class
AUTO = {
    "llama": AutoPeftModelForCausalLM,
    "t5": peft.AutoPeftModelForSeq2SeqLM,
    "bert": peft.AutoPeftModelForSequenceClassification,
    "BertForTokenClassification": peft.AutoPeftModelForTokenClassification,
    "BertForQuestionAnswering": peft.AutoPeftModelForQuestionAnswering,
    "BertModel": peft.AutoPeftModelForFeatureExtraction,
}


def make_base(family):
    if family in FAMILIES:
        return make_model(family)
    torch.manual_seed(0)
    return getattr(transformers, family)(transformers.BertConfig(**{**FAMILIES["bert"][3], "num_labels": 2})).eval()


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Base model and adapter of each family in folders, and the adapter's answer to the family's batch."""
    made = {}
    for family in AUTO:
        base, adapter = (tmp_path_factory.mktemp(f"{family}_{part}") for part in ("base", "adapter"))
        make_base(family).save_pretrained(base)
        model = get_ept_model(from_folder(family, base), EPTConfig(**SMALL))
        randomise(model)
        model.eval().save_pretrained(adapter)
        made[family] = base, adapter, answer(model, family)
    return made


def from_folder(family, folder):
    return getattr(transformers, FAMILIES[family][1] if family in FAMILIES else family).from_pretrained(folder)


@torch.no_grad()
def answer(model, family):
    batch = make_batch(family if family in FAMILIES else "bert")
    if family not in FAMILIES:
        batch.pop("labels")
    output = model.eval()(**batch)
    return output.logits if "logits" in output else output[0]


@pytest.mark.parametrize("family", ONE_A_TASK)
@pytest.mark.parametrize("task", ["given", None])
def test_get_peft_model_gives_what_get_ept_model_gives(family, task):
    config = EPTConfig(**SMALL, task_type=TASK_OF[family] if task else None)
    model = get_peft_model(make_model(family), config)
    assert type(model) is EPTModel
    assert model.peft_config["default"] is config
    assert torch.equal(answer(model, family), answer(get_ept_model(make_model(family), EPTConfig(**SMALL)), family))


@pytest.mark.parametrize("name", ["PeftModel", "PeftModelForCausalLM"])
def test_peft_s_classes_make_ept_models(name):
    config = EPTConfig(**SMALL, task_type=TaskType.CAUSAL_LM)
    model = getattr(peft, name)(make_model("llama"), config, adapter_name="mine", low_cpu_mem_usage=False)
    assert (type(model), model.active_adapter) == (EPTModel, "mine")
    assert type(copy.deepcopy(model)) is EPTModel


@pytest.mark.parametrize("family", AUTO)
@pytest.mark.parametrize("is_trainable", [False, True])
def test_peft_loads_adapters(places, family, is_trainable):
    base, adapter, expected = places[family]
    for model in (
        PeftModel.from_pretrained(from_folder(family, base), adapter, "mine", is_trainable, torch_device="cpu"),
        AUTO[family].from_pretrained(str(adapter), is_trainable=is_trainable),
    ):
        assert type(model) is EPTModel
        assert torch.equal(answer(model, family), expected)
        assert all(p.requires_grad == is_trainable for p in model.prompt_encoder.parameters())


def test_a_configuration_given_to_from_pretrained_is_kept(places):
    base, adapter, expected = places["llama"]
    config = peft.PeftConfig.from_pretrained(str(adapter))
    model = PeftModel.from_pretrained(from_folder("llama", base), str(adapter), config=config)
    assert model.peft_config["default"] is config
    assert torch.equal(answer(model, "llama"), expected)


def test_damaged_files_are_refused_through_peft_as_well(places, tmp_path):
    base, adapter, _ = places["llama"]
    values = json.loads((adapter / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**values, "r": 10**9}))
    (tmp_path / "adapter_model.safetensors").write_bytes((adapter / "adapter_model.safetensors").read_bytes())
    with pytest.raises(ValueError, match=r"A has shape \[12, 3\] instead of \[12, 1000000000\]"):
        PeftModel.from_pretrained(from_folder("llama", base), tmp_path)
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    with pytest.raises(FileNotFoundError, match=r"adapter_model.bin, a pickle"):
        PeftModel.from_pretrained(from_folder("llama", base), tmp_path)


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_hotswap_puts_one_adapter_in_the_place_of_another(places, family):
    base, adapter, expected = places[family]
    model = get_peft_model(from_folder(family, base), EPTConfig(**SMALL, seed=9, task_type=TASK_OF[family]), "mine")
    assert not torch.equal(answer(model, family), expected)
    hotswap_adapter(model, str(adapter), "mine", torch_device="cpu")
    assert torch.equal(answer(model, family), expected)


UNLIKE = [
    ({"alpha": 4.0}, "alpha"),
    ({"num_virtual_tokens": 6}, "num_virtual_tokens"),
    ({"space_activation": "relu"}, "space_activation"),
]


@pytest.mark.parametrize("change, message", UNLIKE, ids=[name for _, name in UNLIKE])
def test_an_adapter_with_other_options_takes_no_other_s_place(places, change, message):
    base, adapter, _ = places["llama"]
    model = get_ept_model(from_folder("llama", base), EPTConfig(**{**SMALL, **change}))
    before = answer(model, "llama")
    with pytest.raises(ValueError, match=message):
        hotswap_adapter(model, str(adapter), "default", torch_device="cpu")
    with pytest.raises(ValueError, match="prompt has shape" if "num" in message else f"made with {message}="):
        model.load_adapter(adapter, "default")
    assert torch.equal(answer(model, "llama"), before)
    with pytest.raises(ValueError, match="no adapter is named 'other': the loaded ones are default"):
        hotswap_adapter(get_ept_model(from_folder("llama", base), EPTConfig(**SMALL)), str(adapter), "other", "cpu")


def test_hotswapped_numbers_are_checked(places, tmp_path):
    base, adapter, _ = places["llama"]
    state = load_file(adapter / "adapter_model.safetensors")
    state["A"][0, 0] = float("nan")
    save_file(state, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_bytes((adapter / "adapter_config.json").read_bytes())
    model = get_ept_model(from_folder("llama", base), EPTConfig(**SMALL))
    before = answer(model, "llama")
    with pytest.raises(ValueError, match="tensor A holds values that are not finite"):
        hotswap_adapter(model, str(tmp_path), "default", torch_device="cpu")
    assert torch.equal(answer(model, "llama"), before)


def test_other_methods_go_through_peft_as_before(tmp_path):
    model = get_peft_model(make_model("llama"), LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False))
    assert type(model) is peft.PeftModelForCausalLM
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_model("llama"), tmp_path, "default", True)
    assert type(loaded) is peft.PeftModelForCausalLM
    assert torch.equal(answer(loaded, "llama"), answer(model, "llama"))
    with pytest.raises(ValueError, match=r"Can't find 'adapter_config.json'"):
        PeftModel.from_pretrained(make_model("llama"), tmp_path / "nowhere")


REFUSED = [
    (lambda: peft.get_peft_model(make_model("llama"), EPTConfig(**SMALL, task_type="CAUSAL_LM"), mixed=True), "'EPT'"),
    (lambda: peft.inject_adapter_in_model(EPTConfig(), make_model("llama")), "does not support EPT"),
    (lambda: EPTConfig(prompt_tuning_init="RANDOM", tokenizer_kwargs={"use_fast": True}), "only valid when using"),
]


@pytest.mark.parametrize("call, message", REFUSED)
def test_refused_in_one_sentence(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_the_type_is_a_member_of_an_enumeration_and_a_text():
    config = EPTConfig()
    assert config.peft_type.value == config.peft_type == f"{config.peft_type}" == "EPT"
    assert json.loads(json.dumps(config.to_dict()))["peft_type"] == "EPT"


def test_tokenizer_arguments_are_passed_on_but_for_code(monkeypatch):
    calls = []

    def tokenizer(source, **options):
        calls.append((source, options))
        return lambda text, **_: {"input_ids": [5, 6]}

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", tokenizer)
    options = {"subfolder": "tokenizer", "trust_remote_code": True}
    text = {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "x", "tokenizer_name_or_path": "some/name"}
    model = get_peft_model(make_model("llama"), EPTConfig(**SMALL, **text, tokenizer_kwargs=options))
    assert calls == [("some/name", {"subfolder": "tokenizer"})]
    table = model.get_input_embeddings().weight
    torch.testing.assert_close(model.get_prompt()[0, :2], table[[5, 6]])
    assert options["trust_remote_code"], "the user's own dictionary changed"


@pytest.mark.parametrize("name", ["someone/else", "a folder: of mine"])
def test_model_cards_name_the_base_model(name, tmp_path):
    base = make_model("llama")
    base.name_or_path = name if "/" in name else str(tmp_path / name)
    base.save_pretrained(tmp_path / "a folder: of mine")
    get_ept_model(base, EPTConfig(**SMALL)).save_pretrained(tmp_path)
    _, header, text = (tmp_path / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(header) == {"library_name": "peft", "tags": ["ept", "EPT"], "base_model": base.name_or_path}
    assert (name in text) == ("/" in name)


def test_one_configuration_for_several_models():
    """It is kept by each, and folding one model's adapter leaves the others' alone."""
    config = EPTConfig(**SMALL)
    models = [get_ept_model(make_model("llama"), config) for _ in range(2)]
    models[0].fold()
    assert models[0].peft_config["default"].folded
    assert not config.folded
    assert models[1].peft_config["default"] is config
    assert torch.equal(answer(models[1], "llama"), answer(get_ept_model(make_model("llama"), config), "llama"))
    get_ept_model(make_model("bert"), config := EPTConfig(**SMALL))
    with pytest.raises(ValueError, match=r"LlamaForSequenceClassification has no module named classifier"):
        get_ept_model(make_model("llama_classifier"), config)


def test_ulpt_takes_no_place_of_another_seed(tmp_path):
    """Its frozen rows are drawn from the seed, which is all that a file has of them."""
    sizes = {"num_virtual_tokens": 4, "prompt_rank": 3}
    get_ept_model(make_model("llama"), EPTConfig.ulpt(**sizes, seed=1)).save_pretrained(tmp_path)
    model = get_ept_model(make_model("llama"), EPTConfig.ulpt(**sizes, seed=2))
    with pytest.raises(ValueError, match="made with seed=1, but 'default' has 2"):
        model.load_adapter(tmp_path, "default")
    model.load_adapter(tmp_path, "other")
    fresh = EPTModel.from_pretrained(make_model("llama"), tmp_path)
    assert torch.equal(model.get_prompt_embedding_to_save("other"), fresh.get_prompt_embedding_to_save("default"))
