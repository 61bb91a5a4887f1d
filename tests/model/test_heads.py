"""What an adapter trains of the base model's own modules: in float32 on a 16-bit model, there and after saving."""

import copy
import warnings

import pytest
import torch
from tiny_models import SMALL, make_batch, make_model, randomise
from transformers import (
    BertForMaskedLM,
    BertForSequenceClassification,
    BertLMHeadModel,
    BertModel,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    MarianConfig,
    MarianMTModel,
)

from ept import EPTConfig, EPTModel, get_ept_model
from ept.model.base_model import absent_modules

HALF = [torch.bfloat16, torch.float16]


def adapted(family, dtype=torch.bfloat16, **fields):
    model = get_ept_model(make_model(family).to(dtype), EPTConfig(**{**SMALL, **fields}))
    randomise(model)
    return model


def heads_of(model):
    return {name: p for name, p in model.named_parameters() if "modules_to_save" in name}


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("family", ["bert", "roberta", "llama_classifier", "bart"])
def test_heads_of_a_16_bit_model_are_float32(family, dtype):
    fields = {"task_type": "SEQ_CLS"} if family != "bart" else {"modules_to_save": ["lm_head"]}
    model, batch = adapted(family, dtype, **fields), make_batch(family)
    heads = heads_of(model)
    assert heads
    assert all(p.dtype == torch.float32 and p.requires_grad for p in heads.values())
    output = model(**batch)
    assert output.logits.dtype == output.loss.dtype == torch.float32
    output.loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in heads.values())
    with torch.no_grad(), model.disable_adapter():  # the model's own head stays as it was
        assert model(input_ids=batch["input_ids"], labels=batch["labels"]).logits.dtype == dtype


def test_a_step_that_bfloat16_would_lose_counts():
    model, batch = adapted("bert"), make_batch("bert")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-6, weight_decay=0.0)
    before = {name: p.detach().clone() for name, p in heads_of(model).items()}
    model(**batch).loss.backward()
    optimizer.step()
    for name, parameter in heads_of(model).items():
        moved = (parameter - before[name]).abs()
        assert (moved > 5e-7).float().mean() > 0.9, name
        lost = parameter.detach().bfloat16() == before[name].bfloat16()
        assert lost.float().mean() > 0.9, name


def test_modules_that_others_read_give_the_models_own_type():
    model, batch = adapted("bert", modules_to_save=["LayerNorm", "word_embeddings"]), make_batch("bert")
    heads = heads_of(model)
    assert len(heads) > 8
    assert all(p.dtype == torch.float32 for p in heads.values())
    output = model(**batch)
    assert output.logits.dtype == torch.bfloat16  # by the head, which is not trained
    output.loss.backward()
    assert sum(p.grad is not None for p in heads.values()) >= 8
    wide = get_ept_model(make_model("bert").to(torch.bfloat16), EPTConfig(**SMALL, modules_to_save=["pooler"]))
    assert wide(**batch).logits.dtype == torch.bfloat16


@pytest.mark.parametrize("trained", [None, ["LayerNorm"]])
def test_the_whole_model_can_be_converted_afterwards(trained):
    batch = make_batch("bert")
    for dtype in (torch.bfloat16, torch.float32):
        model = copy.deepcopy(adapted("bert", modules_to_save=trained)).to(dtype).eval()
        with torch.no_grad():
            assert model(**batch).logits.dtype == dtype


def test_other_models_heads_keep_their_type():
    for dtype in (torch.float32, torch.float64):
        model = adapted("bert", dtype)
        assert {p.dtype for p in heads_of(model).values()} == {dtype}
        assert model(**make_batch("bert")).logits.dtype == dtype


@pytest.mark.parametrize("family", ["bert", "llama_classifier"])
def test_logits_after_saving_and_loading_are_equal(family, tmp_path):
    model, batch = adapted(family).eval(), make_batch(family)
    model.save_pretrained(tmp_path)
    loaded = EPTModel.from_pretrained(make_model(family).to(torch.bfloat16), tmp_path)
    assert {p.dtype for p in heads_of(loaded).values()} == {torch.float32}
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, model(**batch).logits)


def test_heads_saved_in_bfloat16_are_read(tmp_path):
    import safetensors.torch

    model, batch = adapted("bert").eval(), make_batch("bert")
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    state = safetensors.torch.load_file(path)
    narrow = {name: t.bfloat16() if "classifier" in name else t for name, t in state.items()}
    safetensors.torch.save_file(narrow, path)
    loaded = EPTModel.from_pretrained(make_model("bert").to(torch.bfloat16), tmp_path)
    assert {p.dtype for p in heads_of(loaded).values()} == {torch.float32}
    with torch.no_grad():
        torch.testing.assert_close(loaded(**batch).logits, model(**batch).logits, rtol=0.05, atol=0.05)


def test_a_mixed_batch_takes_each_rows_head():
    model = adapted("bert").eval()
    model.add_adapter("other", EPTConfig(**SMALL))
    randomise(model, seed=3)
    batch = make_batch("bert", lengths=(7, 7, 7))
    del batch["labels"]
    with torch.no_grad():
        mixed = model(**batch, adapter_names=["default", "__base__", "other"]).logits
        alone = []
        for name in ("default", "other"):
            model.set_adapter(name)
            alone.append(model(**batch).logits)
        with model.disable_adapter():
            alone.insert(1, model(**batch).logits.float())
    assert mixed.dtype == torch.float32
    for row, logits in enumerate(alone):
        torch.testing.assert_close(mixed[row], logits[row], rtol=0.02, atol=0.05)


@torch.no_grad()
def test_a_mixed_batch_of_a_16_bit_model_takes_the_base_models_heads_too():
    sizes = {"vocab_size": 99, "dim": 32, "n_layers": 1, "n_heads": 4, "hidden_dim": 48, "num_labels": 3}
    torch.manual_seed(0)
    base = DistilBertForSequenceClassification(DistilBertConfig(**sizes, pad_token_id=1)).to(torch.bfloat16)
    model = get_ept_model(base, EPTConfig(**SMALL)).eval()  # two heads, one behind the other
    randomise(model)
    ids = make_batch("bert", (6, 6))["input_ids"]
    found = model(ids, adapter_names=["__base__", "default"]).logits
    for row, name in enumerate(["__base__", "default"]):
        expected = model(ids[row : row + 1], adapter_names=[name]).logits[0].float()
        torch.testing.assert_close(found[row], expected, rtol=0.05, atol=0.05)


def test_heads_beside_pefts_methods_are_float32():
    from ept.runs.adapters import adapter_config
    from ept.runs.config import MethodConfig
    from ept.runs.peft_models import attach

    for name, budget in (("lora", 2000), ("prompt-tuning", 320)):
        base = make_model("bert").to(torch.bfloat16)
        config = adapter_config(MethodConfig(name=name, budget=budget), base, "SEQ_CLS", 16, seed=0)
        model = attach(base, config)
        heads = heads_of(model)
        assert heads
        assert all(p.dtype == torch.float32 and p.requires_grad for p in heads.values())
        model(**make_batch("bert")).loss.backward()


@pytest.mark.parametrize("own", [None, {0: "NEGATIVE", 1: "NEUTRAL", 2: "POSITIVE"}])
def test_labels_have_the_active_adapters_names(own, tmp_path):
    base = make_model("bert", **({} if own is None else {"id2label": own}))
    plain = dict(base.config.id2label)
    model = get_ept_model(base, EPTConfig(**SMALL, label_words=["a", "b", "c"]))
    assert base.config.id2label == {0: "a", 1: "b", 2: "c"}
    assert base.config.label2id == {"a": 0, "b": 1, "c": 2}
    model.add_adapter("other", EPTConfig(**SMALL, label_words=["x", "y", "z"]))
    model.add_adapter("unnamed", EPTConfig(**SMALL))
    model.add_adapter("more", EPTConfig(**SMALL, label_words=["1", "2", "3", "4"]))
    assert base.config.id2label[0] == "a"
    for name, first in (("other", "x"), ("unnamed", plain[0]), ("default", "a")):
        model.set_adapter(name)
        assert base.config.id2label[0] == first
    model.set_adapter("other")
    model.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="'default' is active now"):
        model.delete_adapter("other")
    assert base.config.id2label[0] == "a"
    for name in ("default", "unnamed", "more"):
        model.set_adapter(name)
        model.delete_adapter(name)
    assert base.config.id2label == plain
    again = make_model("bert", **({} if own is None else {"id2label": own}))
    EPTModel.from_pretrained(again, tmp_path / "other")
    assert again.config.id2label == {0: "x", 1: "y", 2: "z"}


@pytest.fixture
def load_masked(tmp_path):
    """Loads a model from the checkpoint of a BERT as it is trained on masked words, without a pooler."""
    language_model = BertForMaskedLM(make_model("bert").config)
    language_model.save_pretrained(tmp_path / "masked")
    return lambda cls=BertForSequenceClassification: cls.from_pretrained(tmp_path / "masked")


def test_a_pooler_that_the_checkpoint_lacks_is_trained_and_saved(load_masked, tmp_path):
    model, batch = get_ept_model(load_masked(), EPTConfig(**SMALL)), make_batch("bert")
    model.add_adapter("other", EPTConfig(**SMALL))
    for name in ("default", "other"):
        assert model.peft_config[name].modules_to_save == ["classifier", "bert.pooler.dense"]
    randomise(model)
    model(**batch).loss.backward()
    assert all(p.grad is not None for name, p in heads_of(model).items() if ".default." in name)
    assert any(name.endswith("bert.pooler.dense.modules_to_save.default.weight") for name in heads_of(model))
    model.save_pretrained(tmp_path / "adapter")
    expected = model.eval()(**batch).logits
    again = EPTModel.from_pretrained(load_masked(), tmp_path / "adapter")
    assert torch.equal(again.eval()(**batch).logits, expected)


def test_modules_that_the_checkpoint_lacks_and_no_adapter_holds_get_a_warning(load_masked):
    with pytest.warns(UserWarning, match=r"has no weights for bert\.pooler\.dense, which .*: name them in modules_to"):
        get_ept_model(load_masked(), EPTConfig(**SMALL, modules_to_save=["classifier"]))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        get_ept_model(load_masked(), EPTConfig(**SMALL, modules_to_save=["classifier", "pooler"]))
        get_ept_model(load_masked(BertModel), EPTConfig(**SMALL, task_type="FEATURE_EXTRACTION"))
        get_ept_model(copy.deepcopy(load_masked()), EPTConfig(**SMALL))  # without transformers' marks
    headless = load_masked(BertModel)
    headless.save_pretrained(headless.name_or_path)
    with pytest.warns(UserWarning, match=r"BertLMHeadModel has no weights for cls\.predictions"):
        get_ept_model(load_masked(BertLMHeadModel), EPTConfig(**SMALL, task_type="CAUSAL_LM"))


def test_what_a_class_never_stores_is_not_missed(tmp_path):
    sizes = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    tokens = {"vocab_size": 50, "pad_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    MarianMTModel(MarianConfig(**sizes, **heads, **tokens)).save_pretrained(tmp_path)
    base, loaded = MarianMTModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not loaded["missing_keys"]
    assert absent_modules(base) == []
    language_model = BertForMaskedLM(make_model("bert").config)
    language_model.save_pretrained(tmp_path)
    base = BertForSequenceClassification.from_pretrained(tmp_path)
    assert absent_modules(base) == ["bert.pooler.dense", "classifier"]


class WithNumbers(BertForSequenceClassification):
    def __init__(self, config):
        super().__init__(config)
        self.numbers = torch.nn.Parameter(torch.zeros(3))
        self.post_init()


def test_numbers_of_the_model_itself_that_the_checkpoint_lacks_get_a_warning(load_masked):
    with pytest.warns(UserWarning, match="WithNumbers has no weights for numbers, which are initialised anew"):
        model = get_ept_model(load_masked(WithNumbers), EPTConfig(**SMALL))
    assert model.peft_config["default"].modules_to_save == ["classifier", "bert.pooler.dense"]


def test_a_trained_head_of_another_model_is_not_taken_over():
    base = make_model("bert")
    first = get_ept_model(base, EPTConfig(**SMALL))
    with pytest.warns(UserWarning, match="another EPT model has classifier of this BertForSequenceClassification too"):
        get_ept_model(base, EPTConfig(**SMALL))  # untrained so far
    randomise(first)
    for config in (EPTConfig(**SMALL), EPTConfig(**SMALL, modules_to_save=["bert.pooler"])):
        with pytest.raises(ValueError, match=r"another EPT model has trained classifier of this Bert.*add_adapter or"):
            get_ept_model(base, config)


def test_a_trained_decoders_head_is_not_answered_through():
    base = make_model("llama")
    randomise(get_ept_model(base, EPTConfig(**SMALL, modules_to_save=["lm_head"])))
    with pytest.raises(ValueError, match="another EPT model has trained lm_head of this LlamaForCausalLM"):
        get_ept_model(base, EPTConfig(**SMALL))


@pytest.mark.parametrize("family, name", [
    ("llama_classifier", "score"), ("bert", "classifier"), ("bert", "weight"), ("roberta", "dense"),
])  # fmt: skip
def test_an_adapter_may_have_a_heads_name(tmp_path, family, name):
    batch = make_batch(family)
    model = get_ept_model(make_model(family), EPTConfig(**SMALL), name).eval()
    randomise(model)
    model.save_pretrained(tmp_path)
    loaded = EPTModel.from_pretrained(make_model(family), tmp_path / name, name, is_trainable=True).eval()
    assert torch.equal(loaded(**batch).logits, model(**batch).logits)
    with torch.no_grad():
        for parameter in loaded.parameters():
            if parameter.requires_grad:
                parameter.zero_()
    loaded.load_adapter(tmp_path / name, name)  # as the Trainer resumes
    assert torch.equal(loaded(**batch).logits, model(**batch).logits)


def test_an_adapter_set_while_none_answers_is_the_one_that_is_trained():
    model = get_ept_model(make_model("bert"), EPTConfig(**SMALL), "a")
    model.add_adapter("b", EPTConfig(**SMALL))

    def trained():
        return {name.split(".")[-2] for name, p in model.named_parameters() if p.requires_grad and "classifier" in name}

    assert trained() == {"a"}
    with model.disable_adapter():
        model.set_adapter("b")
    assert trained() == {"b"}
    with model.disable_adapter():
        model.set_adapter("a", inference_mode=True)
    assert trained() == set()


def test_an_adapter_that_is_set_brings_its_dropout():
    model = get_ept_model(make_model("bert"), EPTConfig(**SMALL, base_dropout=True), "a")
    model.add_adapter("b", EPTConfig(**SMALL))
    model.train()
    assert model.base_model.bert.training
    model.set_adapter("b")
    assert not model.base_model.bert.training
    model.set_adapter("a")
    assert model.base_model.bert.training
