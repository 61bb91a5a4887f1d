"""`generate` after a cached prompt gives what `generate` gives without, and is refused where it could not."""

from __future__ import annotations

import pytest
import torch
from tiny_models import DECODERS, SMALL, adapted, make_batch, make_model, randomise
from transformers import GenerationConfig

from ept import EPTConfig, EPTModel
from ept.model.prompt_cache import PromptCache

GREEDY = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "eos_token_id": None}
# Windowed attention, or positions by index: padding may not stand between prompt and text.
ONLY_ONE_LENGTH = ["mistral", "gemma3"]


def inputs_for(name, lengths=(8, 3)):
    batch = make_batch(name, lengths, "left")
    return {k: batch[k] for k in ("input_ids", "attention_mask")}


def count_prompts(monkeypatch):
    """Counts how often a prompt is run through the model for its cache."""
    calls = []
    compute = PromptCache.compute.__func__
    monkeypatch.setattr(PromptCache, "compute", classmethod(lambda cls, *args: calls.append(1) or compute(cls, *args)))
    return calls


@pytest.mark.parametrize("lengths", [(8, 3), (6, 6), (1,)], ids=["padded", "equal", "one token"])
@pytest.mark.parametrize("name", DECODERS)
def test_same_tokens_and_logits_as_without(name, lengths):
    model, inputs = adapted(name), inputs_for(name, lengths)
    options = {**GREEDY, "return_dict_in_generate": True, "output_logits": True}
    plain = model.generate(**inputs, **options)
    if name in ONLY_ONE_LENGTH and len(set(lengths)) > 1:
        with pytest.raises(ValueError, match="give rows of one length, or call generate without use_prompt_cache"):
            model.generate(**inputs, **options, use_prompt_cache=True)
        return
    for _ in range(2):  # the second time from the kept cache, which the first must not have changed
        cached = model.generate(**inputs, **options, use_prompt_cache=True)
        assert torch.equal(cached.sequences, plain.sequences)
        torch.testing.assert_close(cached.logits, plain.logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("s", [12, 20], ids=["as long as the window", "longer than the window"])
@pytest.mark.parametrize("name", ["mistral", "gemma3"])
def test_prompt_that_fills_a_sliding_window(name, s):
    model, inputs = adapted(name, num_virtual_tokens=s), inputs_for(name, (6, 6))
    assert torch.equal(model.generate(**inputs, **GREEDY, use_prompt_cache=True), model.generate(**inputs, **GREEDY))


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": True, "max_new_tokens": 6},
        {"do_sample": True, "max_new_tokens": 6, "num_return_sequences": 3},
        {"num_beams": 3, "do_sample": False, "max_new_tokens": 6},
        {"generation_config": GenerationConfig(num_beams=2, num_return_sequences=2, max_new_tokens=4, pad_token_id=1)},
    ],
    ids=["sampling", "several samples", "beams", "generation_config"],
)
def test_sampling_and_beams(options):
    model, inputs = adapted(), inputs_for("llama")
    results = []
    for use_prompt_cache in (False, True):
        torch.manual_seed(0)
        results.append(model.generate(**inputs, **options, use_prompt_cache=use_prompt_cache))
    assert torch.equal(*results)


def test_beams_of_the_models_own_configuration_beside_a_given_one():
    """`generate` takes from the model's configuration what the given one leaves open."""
    model, inputs = adapted(), inputs_for("llama")
    model.base_model.generation_config.num_beams = 3
    options = {"generation_config": GenerationConfig(max_new_tokens=6, do_sample=False, pad_token_id=1)}
    plain, cached = (model.generate(**inputs, **options, use_prompt_cache=use) for use in (False, True))
    assert torch.equal(plain, cached)


def test_max_length_still_counts_the_text_and_not_the_prompt():
    model, inputs = adapted(), inputs_for("llama", (6,))
    options = {"max_length": 9, "do_sample": False, "eos_token_id": None}
    assert model.generate(**inputs, **options, use_prompt_cache=True).shape == (1, 9)


def test_computed_once_and_again_after_every_change(monkeypatch, tmp_path):
    calls = count_prompts(monkeypatch)
    model, inputs = adapted(), inputs_for("llama")

    def same():
        expected = model.generate(**inputs, **GREEDY)
        return torch.equal(model.generate(**inputs, **GREEDY, use_prompt_cache=True), expected)

    assert same()
    assert same()
    assert len(calls) == 1
    model.save_pretrained(tmp_path)
    optimizer = torch.optim.SGD(model.prompt_encoder.parameters(), lr=1.0)
    model.train()(**make_batch("llama")).loss.backward()
    optimizer.step()
    model.eval()
    assert same()
    assert len(calls) == 2
    model.load_adapter(tmp_path, "default")
    assert same()
    assert len(calls) == 3
    with torch.no_grad():
        model.base_model.model.layers[0].self_attn.k_proj.weight.mul_(2)
    assert same()
    assert len(calls) == 4
    model.fold()
    assert same()
    model.to(torch.bfloat16)
    count = len(calls)
    model.generate(**inputs, **GREEDY, use_prompt_cache=True)
    assert len(calls) == count + 1
    model.clear_prompt_caches()
    model.generate(**inputs, **GREEDY, use_prompt_cache=True)
    assert len(calls) == count + 2


def test_each_adapter_has_its_own(monkeypatch):
    calls = count_prompts(monkeypatch)
    model, inputs = adapted(), inputs_for("llama")
    model.add_adapter("other", EPTConfig(num_virtual_tokens=3, max_length=12, r=1, seed=5))
    randomise(model, seed=3)
    for _ in range(2):
        for adapter in ("default", "other"):
            model.set_adapter(adapter, inference_mode=True)
            expected = model.generate(**inputs, **GREEDY)
            assert torch.equal(model.generate(**inputs, **GREEDY, use_prompt_cache=True), expected)
    assert len(calls) == 2
    model.set_adapter("default")
    model.delete_adapter("other")
    assert list(model._prompt_caches) == ["default"]
    with model.disable_adapter():  # the base model has no prompt to cache
        bare = model.generate(**inputs, **GREEDY)
        assert torch.equal(model.generate(**inputs, **GREEDY, use_prompt_cache=True), bare)


def test_an_adapter_without_a_prompt_needs_no_cache():
    model, inputs = adapted(num_virtual_tokens=0), inputs_for("llama")
    assert torch.equal(model.generate(**inputs, **GREEDY, use_prompt_cache=True), model.generate(**inputs, **GREEDY))


REFUSED = [
    ("llama", {"use_cache": False}, {}, "use_cache=False and use_prompt_cache=True exclude each other"),
    ("llama", {"adapter_names": ["default"] * 2}, {}, "a prompt cache holds one adapter's prompt"),
    ("t5", {}, {}, "is part of the encoder's input and changes with it: use_prompt_cache is for decoder-only"),
    (
        "llama",
        {},
        {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
        r"depends on the length of the whole text \(dynamic RoPE\)",
    ),
    ("gemma3", {}, {"use_bidirectional_attention": True}, "sees the text after each token"),
]


@pytest.mark.parametrize("name, options, changes, message", REFUSED, ids=[message[:30] for *_, message in REFUSED])
def test_refused_where_it_could_not_be_the_same(name, options, changes, message):
    model = EPTModel(make_model(name, **changes), EPTConfig(**SMALL)).eval()
    with pytest.raises(ValueError, match=message):
        model.generate(**inputs_for(name, (4, 4)), use_prompt_cache=True, **options)
