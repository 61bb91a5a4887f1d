"""The evaluation harness scores what the model generates, token by token."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from ept import EPTConfig, get_ept_model

pytest.importorskip("lm_eval", reason="needs lm_eval: `make integrations` runs it")
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from ept.integrations.lm_eval import EPTLM

REQUESTS = [
    ("the film was", " very good"),
    ("review : the plot and the cast was so", " bad"),
    ("awful", " so very long and dreadful"),
    ("the film was", " bad"),
    ("the film", " was bad"),  # the same tokens as the one before, with another context
]


def make_model(models: Any, family: str = "llama", **fields: Any) -> tuple[Any, Any]:
    kind = AutoModelForCausalLM if family == "llama" else AutoModelForSeq2SeqLM
    model = get_ept_model(kind.from_pretrained(models[family]), EPTConfig(num_virtual_tokens=4, r=2, **fields))
    with torch.no_grad():
        model.prompt_encoder["default"].B.normal_(std=0.3, generator=torch.Generator().manual_seed(0))
    return model.eval(), AutoTokenizer.from_pretrained(models[family])


def instances(kind: str, *arguments: Any) -> list[Instance]:
    return [Instance(kind, {}, given, number) for number, given in enumerate(arguments)]


def by_generation(model: Any, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """One generated token at a time: what `generate` gives each token of the continuation, forced upon it."""
    ids = torch.tensor([context])
    forced = {"prefix_allowed_tokens_fn": lambda row, seen: [continuation[len(seen) - len(context)]]}
    options = {"max_new_tokens": len(continuation), "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    output = model.generate(ids, **options, **forced, return_dict_in_generate=True, output_logits=True)
    likelihoods = torch.stack(output.logits, dim=1)[0].log_softmax(-1)
    tokens = torch.tensor(continuation)
    total = float(likelihoods.gather(1, tokens[:, None]).sum())
    return total, bool((likelihoods.argmax(-1) == tokens).all())


@pytest.mark.parametrize("batch_size", [1, 3, "auto"])
@pytest.mark.parametrize("fields", [{}, {"update_scope": "all"}, {"r": 0}], ids=str)
def test_log_likelihoods_are_those_of_generation(models, fields, batch_size):
    fields = {"max_length": 32, **fields}
    if fields.get("r") == 0:
        model = get_ept_model(AutoModelForCausalLM.from_pretrained(models["llama"]), EPTConfig.prompt_tuning(4)).eval()
        tokenizer = AutoTokenizer.from_pretrained(models["llama"])
    else:
        model, tokenizer = make_model(models, **fields)
    lm = EPTLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, device="cpu", max_batch_size=4)
    found = lm.loglikelihood(instances("loglikelihood", *REQUESTS), disable_tqdm=True)
    for (context, continuation), answer in zip(REQUESTS, found, strict=True):
        ids, more = (tokenizer(text)["input_ids"] for text in (context, continuation))
        assert answer == pytest.approx(by_generation(model, ids, more), abs=1e-4)
    if not fields.get("update_scope") and fields.get("r") != 0:
        with pytest.warns(UserWarning, match="which tokens are input text"):
            plain = HFLM(pretrained=model, tokenizer=tokenizer, device="cpu").loglikelihood(
                instances("loglikelihood", *REQUESTS), disable_tqdm=True
            )
        assert abs(plain[2][0] - found[2][0]) > 1e-2  # the continuation has got the update


def test_rolling_log_likelihood_and_generation(models):
    model, tokenizer = make_model(models, max_length=32)
    lm = EPTLM(pretrained=model, tokenizer=tokenizer, batch_size=2, device="cpu")
    text = "the film was so long and the plot was good"
    (rolling,) = lm.loglikelihood_rolling(instances("loglikelihood_rolling", (text,)), disable_tqdm=True)
    ids = tokenizer(text)["input_ids"]
    assert rolling == pytest.approx(by_generation(model, [lm.prefix_token_id], ids)[0], abs=1e-4)
    options = {"until": ["?"], "max_gen_toks": 5}
    asked = [("the film was", options), ("review : the plot and the cast was so bad", options)]
    answers = lm.generate_until(instances("generate_until", *asked), disable_tqdm=True)
    for (context, _), answer in zip(asked, answers, strict=True):
        ids = tokenizer(context, return_tensors="pt")["input_ids"]
        new = model.generate(ids, max_new_tokens=5, do_sample=False)[0, ids.shape[1] :]
        assert answer == tokenizer.decode(new, skip_special_tokens=True).split("?")[0]


def test_limits_are_the_models_and_the_adapters(models):
    model, tokenizer = make_model(models, max_length=6)
    lm = EPTLM(pretrained=model, tokenizer=tokenizer, batch_size=2, device="cpu")
    assert lm.max_length == 128 - 4
    request = instances("loglikelihood", ("the film was so long and very", " bad"))
    with pytest.raises(ValueError, match="input has 7 tokens, the adapter was made for max_length=6"):
        lm.loglikelihood(request, disable_tqdm=True)
    lm = EPTLM(pretrained=model, tokenizer=tokenizer, batch_size=2, device="cpu", max_length=6)
    ids = tokenizer("film was so long and very")["input_ids"]
    expected = by_generation(model, ids, tokenizer("bad")["input_ids"])
    assert lm.loglikelihood(request, disable_tqdm=True)[0] == pytest.approx(expected, abs=1e-4)


def test_encoder_decoder_and_adapter_from_a_folder(models, tmp_path):
    model, tokenizer = make_model(models, "t5", max_length=32)
    model.save_pretrained(tmp_path)
    for lm in (
        EPTLM(pretrained=model, tokenizer=tokenizer, batch_size=2, device="cpu"),
        EPTLM(pretrained=str(models["t5"]), peft=str(tmp_path), batch_size=2, device="cpu", dtype="float32"),
    ):
        found = lm.loglikelihood(instances("loglikelihood", *REQUESTS), disable_tqdm=True)
        for (context, continuation), (total, _) in zip(REQUESTS, found, strict=True):
            ids = tokenizer(context, return_tensors="pt")["input_ids"]
            labels = tokenizer(continuation, return_tensors="pt", add_special_tokens=False)["input_ids"]
            with torch.no_grad():
                loss = model(ids, labels=labels).loss
            assert total == pytest.approx(-float(loss) * labels.shape[1], abs=1e-3)


def test_a_model_without_an_adapter_is_refused(models):
    base = AutoModelForCausalLM.from_pretrained(models["llama"])
    with pytest.raises(ValueError, match="LlamaForCausalLM has no EPT adapter"):
        EPTLM(pretrained=base, tokenizer=AutoTokenizer.from_pretrained(models["llama"]), device="cpu")
