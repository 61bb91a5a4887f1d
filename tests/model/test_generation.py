"""`generate` after a prompt: every option works as in the bare model, or is refused before anything runs."""

from __future__ import annotations

import inspect
import itertools
from typing import Any

import pytest
import torch
import transformers
from classes import VOCABULARY, tiny
from tiny_models import DECODERS, SMALL, VOCAB, adapted, make_batch, make_model, randomise
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertLMHeadModel,
    CodeGenForCausalLM,
    GenerationConfig,
    GenerationMixin,
    GPTJForCausalLM,
    LogitsProcessorList,
    MaxTimeCriteria,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedTokenizerFast,
    StaticCache,
    StoppingCriteriaList,
    WatermarkingConfig,
)
from transformers.generation.streamers import BaseStreamer

from ept import EPTConfig, get_ept_model
from ept.model.generation import REFUSED as REFUSED_OPTIONS

# transformers 5.24 calls `cache` what was `past_key_values`.
CACHE = "cache" if "cache" in inspect.signature(Phi3ForCausalLM.forward).parameters else "past_key_values"
GREEDY = {"max_new_tokens": 6, "do_sample": False}
SAMPLED = {"max_new_tokens": 6, "do_sample": True}
BEAMS = {"max_new_tokens": 6, "num_beams": 3, "do_sample": False}
SCORES = {**GREEDY, "return_dict_in_generate": True}


def make_tokenizer() -> PreTrainedTokenizerFast:
    words = ["abcdef", *(f"t{i}" for i in range(1, VOCAB))]  # transformers puts the first before what it looks at
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="abcdef"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="abcdef", pad_token="t1")


def forbid_two(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """Depends on the text's first token, so that a processor has to see it."""
    return scores.index_fill(1, ids[0, :1] % VOCAB, -1e4)


# The options that work: a call for each.
SAME: dict[str, dict[str, Any]] = {
    "max_length": {"max_length": 12, "do_sample": False},
    "max_new_tokens": GREEDY,
    "min_length": {**GREEDY, "min_length": 11, "eos_token_id": list(range(2, 60))},
    "min_new_tokens": {**GREEDY, "min_new_tokens": 4, "eos_token_id": list(range(2, 60))},
    "early_stopping": {**BEAMS, "early_stopping": True, "eos_token_id": list(range(2, 60))},
    "max_time": {**GREEDY, "max_time": 1e4},
    "stop_strings": {**GREEDY, "stop_strings": ["t5", "t7", "t9"], "tokenizer": make_tokenizer()},
    "do_sample": SAMPLED,
    "num_beams": BEAMS,
    "use_cache": {**GREEDY, "use_cache": False},
    "cache_implementation": {**GREEDY, "cache_implementation": "static"},
    "cache_config": GREEDY,  # of the quantized cache, which needs a package
    "max_cache_len": {**GREEDY, "cache_implementation": "static", "max_cache_len": 40},
    "temperature": {**SAMPLED, "temperature": 0.5},
    "top_k": {**SAMPLED, "top_k": 3},
    "top_p": {**SAMPLED, "top_p": 0.5},
    "min_p": {**SAMPLED, "min_p": 0.2},
    "top_h": {**SAMPLED, "top_h": 0.5},
    "typical_p": {**SAMPLED, "typical_p": 0.5},
    "epsilon_cutoff": {**SAMPLED, "epsilon_cutoff": 0.05},
    "eta_cutoff": {**SAMPLED, "eta_cutoff": 0.05},
    "repetition_penalty": {**SCORES, "output_scores": True, "repetition_penalty": 1.7},
    "encoder_repetition_penalty": {**SCORES, "output_scores": True, "encoder_repetition_penalty": 1.7},
    "length_penalty": {**BEAMS, "length_penalty": -2.0, "eos_token_id": list(range(2, 60))},
    "no_repeat_ngram_size": {**GREEDY, "no_repeat_ngram_size": 1},
    "encoder_no_repeat_ngram_size": {**GREEDY, "encoder_no_repeat_ngram_size": 1},
    "bad_words_ids": {**GREEDY, "bad_words_ids": [[i] for i in range(20, 70)]},
    "renormalize_logits": {**SCORES, "output_scores": True, "renormalize_logits": True},
    "forced_bos_token_id": {**GREEDY, "forced_bos_token_id": 7},
    "forced_eos_token_id": {**GREEDY, "forced_eos_token_id": 7},
    "remove_invalid_values": {**GREEDY, "remove_invalid_values": True},
    "exponential_decay_length_penalty": {**GREEDY, "exponential_decay_length_penalty": (1, 3.0)},
    "suppress_tokens": {**GREEDY, "suppress_tokens": list(range(20, 70))},
    "begin_suppress_tokens": {**GREEDY, "begin_suppress_tokens": list(range(4, 90))},
    "sequence_bias": {**GREEDY, "sequence_bias": [[[7], 50.0]]},
    "watermarking_config": {**GREEDY, "watermarking_config": WatermarkingConfig(bias=20.0, context_width=2)},
    "num_return_sequences": {**SAMPLED, "num_return_sequences": 3},
    "output_attentions": {**SCORES, "output_attentions": True},
    "output_hidden_states": {**SCORES, "output_hidden_states": True},
    "output_scores": {**SCORES, "output_scores": True},
    "output_logits": {**SCORES, "output_logits": True},
    "return_dict_in_generate": SCORES,
    "pad_token_id": {**GREEDY, "pad_token_id": 0, "eos_token_id": list(range(2, 60))},
    "bos_token_id": GREEDY,
    "eos_token_id": {**GREEDY, "eos_token_id": list(range(2, 60))},
    "decoder_start_token_id": {**GREEDY, "decoder_start_token_id": 5},
    # Of drafted tokens, compilation and continuous batching, without which they say nothing.
    **dict.fromkeys(
        ("num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold"), GREEDY
    ),
    **dict.fromkeys(("max_matching_ngram_size", "assistant_lookbehind", "target_lookbehind"), GREEDY),
    **dict.fromkeys(
        ("assistant_ensemble_weight", "compile_config", "continuous_batching_config", "low_memory"), GREEDY
    ),
    "disable_compile": {**GREEDY, "disable_compile": True},
    # Arguments of `generate` itself.
    "generation_config": {"generation_config": GenerationConfig(max_new_tokens=5, repetition_penalty=1.7)},
    "logits_processor": {**GREEDY, "logits_processor": LogitsProcessorList([forbid_two])},
    "stopping_criteria": {**GREEDY, "stopping_criteria": StoppingCriteriaList([MaxTimeCriteria(1e4)])},
    "prefix_allowed_tokens_fn": {
        **GREEDY,
        "prefix_allowed_tokens_fn": lambda row, ids: [(int(ids[-1]) + row + len(ids)) % VOCAB],
    },
    "synced_gpus": {**GREEDY, "synced_gpus": False},
    "streamer": GREEDY,  # a test of its own
    "negative_prompt_ids": {**GREEDY, "negative_prompt_ids": torch.tensor([[5]])},
    "negative_prompt_attention_mask": {**GREEDY, "negative_prompt_attention_mask": torch.tensor([[1]])},
}
# A value for each of those that do not.
REFUSED: dict[str, Any] = {
    "assistant_model": make_model("llama"),
    "assistant_early_exit": 1,
    "prompt_lookup_num_tokens": 2,
    "speculation_type": "dflash",
    "use_mtp": True,
    "is_assistant": True,
    "guidance_scale": 1.5,
    "token_healing": True,
    "prefill_chunk_size": 4,
    "custom_generate": "someone/something",
    "penalty_alpha": 0.5,
    "dola_layers": "low",
    "constraints": [1],
    "force_words_ids": [[5]],
    "num_beam_groups": 2,
    "diversity_penalty": 0.5,
}
_NO_OPTIONS = {"self", "inputs", "kwargs", "transformers_version"}


def inputs_of(name, lengths=(8, 3)):
    batch = make_batch(name, lengths, "right" if name == "t5" else "left")
    return {k: batch[k] for k in ("input_ids", "attention_mask")}


def without_prompt(name):
    return get_ept_model(make_model(name), EPTConfig.prompt_tuning(0)).eval()


def test_every_option_of_generate_is_one_or_the_other():
    known = {*vars(GenerationConfig()), *inspect.signature(GenerationMixin.generate).parameters}
    missing = {name for name in known - _NO_OPTIONS - set(SAME) - set(REFUSED) if not name.startswith("_")}
    assert not missing, f"say of {missing} in this file that they work, or refuse them in ept/model/generation.py"
    assert set(REFUSED) == set(REFUSED_OPTIONS)


@pytest.mark.parametrize("option", SAME)
@pytest.mark.parametrize("name", ["llama", "t5"])
def test_option_does_without_a_prompt_what_it_does_to_the_bare_model(name, option):
    if not hasattr(GenerationConfig(), option) and option not in inspect.signature(GenerationMixin.generate).parameters:
        pytest.skip(f"this transformers has no option {option}")
    inputs, outputs = inputs_of(name), []
    for model in (make_model(name), without_prompt(name)):
        torch.manual_seed(0)
        outputs.append(model.generate(**inputs, **SAME[option]))
    if isinstance(outputs[0], torch.Tensor):
        assert torch.equal(*outputs)
        return
    assert outputs[0].keys() == outputs[1].keys()
    for key in outputs[0].keys() - {"past_key_values", "cache"}:
        torch.testing.assert_close(outputs[1][key], outputs[0][key], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("option", REFUSED)
def test_option_is_refused_before_anything_runs(option, monkeypatch):
    if not hasattr(GenerationConfig(), option) and option not in inspect.signature(GenerationMixin.generate).parameters:
        pytest.skip(f"this transformers has no option {option}")
    model = adapted("llama")
    monkeypatch.setattr(model.base_model, "forward", lambda *a, **k: pytest.fail("the base model was called"))
    with pytest.raises(ValueError, match=f"{option}=.*: leave it out"):
        model.generate(**inputs_of("llama"), **GREEDY, **{option: REFUSED[option]})
    if hasattr(GenerationConfig(), option) and option not in ("speculation_type", "constraints", "force_words_ids"):
        setattr(model.base_model.generation_config, option, REFUSED[option])
        with pytest.raises(ValueError, match=f"{option}=.*: leave it out"):
            model.generate(**inputs_of("llama"), **GREEDY)


@pytest.mark.parametrize(
    "options", [GREEDY, BEAMS, {**SAMPLED, "num_return_sequences": 2}], ids=["greedy", "beams", "s"]
)
@pytest.mark.parametrize("extra", [{"repetition_penalty": 1.7}, {"no_repeat_ngram_size": 2}], ids=str)
def test_processors_behind_a_prompt_see_the_text(options, extra):
    """As if the scores of the forward were processed by hand, with the ids of the text and the new tokens."""
    model, inputs = adapted("llama"), inputs_of("llama")
    seen = []
    see = LogitsProcessorList([lambda ids, scores: seen.append(ids.clone()) or scores])
    torch.manual_seed(0)
    output = model.generate(**inputs, **options, **extra, logits_processor=see, eos_token_id=None)
    rows = len(output) // 2 if "num_beams" not in options else 3
    assert torch.equal(seen[0][:, :8], inputs["input_ids"].repeat_interleave(rows, 0))
    assert torch.equal(output[:, :8], inputs["input_ids"].repeat_interleave(len(output) // 2, 0))
    if "no_repeat_ngram_size" in extra:
        for row in output.tolist():
            row = [token for token in row if token != 1]  # padding
            pairs = list(itertools.pairwise(row))
            assert len(set(pairs)) == len(pairs)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_without_a_mask_is_told_by_the_padding_token(side):
    """The case of most scripts: `generate(ids)` of a padded batch."""
    batch = make_batch("llama", (8, 3), side)
    options = {**SCORES, "output_logits": True}
    model = adapted("llama")
    expected = model.generate(**{k: batch[k] for k in ("input_ids", "attention_mask")}, **options)
    actual = model.generate(batch["input_ids"], **options)
    assert torch.equal(actual.logits[0], expected.logits[0])
    assert torch.equal(actual.sequences, expected.sequences)
    everything = model.generate(batch["input_ids"], attention_mask=torch.ones_like(batch["input_ids"]), **options)
    # A padding token that also ends a text cannot tell: as in the bare model, everything is text.
    told = model.generate(batch["input_ids"], **options, eos_token_id=1)
    assert torch.equal(told.logits[0], everything.logits[0])
    assert not torch.equal(everything.logits[0], expected.logits[0])


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"adapter_names": ["other", "default"]}], ids=str)
@pytest.mark.parametrize("name", DECODERS)
def test_a_text_goes_on_alike_whatever_the_side_of_its_padding(name, options):
    model = adapted(name)
    model.add_adapter("other", EPTConfig(num_virtual_tokens=2, max_length=12, r=1, seed=5))
    new = {}
    for side in ("left", "right"):
        batch = {k: v for k, v in make_batch(name, (8, 3), side).items() if k != "labels"}
        output = model.generate(**batch, **GREEDY, **options, return_dict_in_generate=True).sequences
        assert torch.equal(output[:, :8], batch["input_ids"])  # as they were given
        new[side] = output[:, 8:]
    assert torch.equal(new["left"], new["right"])


class Kept(BaseStreamer):
    def __init__(self):
        self.put_in, self.ended = [], False

    def put(self, value):
        self.put_in.append(value.tolist())

    def end(self):
        self.ended = True


def test_streamer_gets_the_text_and_then_each_new_token():
    model, streamer = adapted("llama"), Kept()
    ids = inputs_of("llama", (5,))["input_ids"]
    output = model.generate(ids, **GREEDY, streamer=streamer)
    assert streamer.put_in == [ids.tolist(), *([token] for token in output[0, 5:].tolist())]
    assert streamer.ended


def test_second_turn_reads_the_text_again_and_refuses_the_first_turns_cache():
    model = adapted("llama", max_length=24)
    ids = inputs_of("llama", (5,))["input_ids"]
    first = model.generate(ids, **SCORES)
    second = torch.cat([first.sequences, torch.tensor([[7, 8]])], dim=1)
    with pytest.raises(ValueError, match="cannot use past_key_values of an earlier call: pass the whole text's ids"):
        model.generate(second, **GREEDY, **{CACHE: first[CACHE]})
    new = model.generate(second, **GREEDY)
    assert torch.equal(new[:, :13], second)
    # The first turn's answer is text in the second.
    with torch.no_grad():
        assert torch.equal(model(second).logits[:, -1].argmax(-1), new[:, 13])


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"max_new_tokens": 60},
            "5 prompt tokens, 8 text tokens and 60 new ones are more than the 64 positions of GPT2",
        ),
        ({"max_length": 64}, "ask for at most 52 new tokens"),
        ({"generation_config": GenerationConfig(max_new_tokens=53)}, "ask for at most 52 new tokens"),
    ],
    ids=str,
)
def test_more_new_tokens_than_positions_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        adapted("gpt2").generate(**inputs_of("gpt2"), **options)


@pytest.mark.parametrize("name", ["generate_batch", "init_continuous_batching", "continuous_batching_context_manager"])
def test_continuous_batching_which_would_answer_without_the_adapter_is_refused(name):
    with pytest.raises(ValueError, match="continuous batching reads only ids, without a prompt"):
        getattr(adapted("llama"), name)([[5, 6, 7]])


def test_a_cache_of_a_fixed_size_needs_places_for_the_prompt():
    model, inputs = adapted("llama"), inputs_of("llama")
    needed = 5 + inputs["input_ids"].shape[1] + 5  # prompt, text, and new tokens but the last
    cache = StaticCache(config=model.base_model.config, max_cache_len=needed)
    assert torch.equal(model.generate(**inputs, **GREEDY, **{CACHE: cache}), model.generate(**inputs, **GREEDY))
    small = StaticCache(config=model.base_model.config, max_cache_len=needed - 1)
    with pytest.raises(ValueError, match=f"fill {needed} places, but the cache has {needed - 1}: make it with max_c"):
        model.generate(**inputs, **GREEDY, **{CACHE: small})


@pytest.mark.parametrize("kind, sizes", [(GPTJForCausalLM, {"rotary_dim": 4}), (CodeGenForCausalLM, {"rotary_dim": 4})])
def test_positions_that_are_computed_once_are_a_limit_too(kind, sizes):
    config = kind.config_class(
        vocab_size=VOCAB, n_embd=32, n_layer=1, n_head=4, n_positions=16, pad_token_id=1, **sizes
    )
    model, ids = get_ept_model(kind(config), EPTConfig(**SMALL)).eval(), inputs_of("llama", (8,))["input_ids"]
    assert model.generate(ids, max_new_tokens=4, eos_token_id=None).shape == (1, 12)
    with pytest.raises(ValueError, match=r"and 5 new ones are more than the 16 positions of .*: ask for at most 4 new"):
        model.generate(ids, max_new_tokens=5, eos_token_id=None)


def test_as_many_new_tokens_as_there_are_positions():
    model, inputs = adapted("gpt2", max_length=64), inputs_of("gpt2", (50,))
    assert model.generate(**inputs, max_new_tokens=10, eos_token_id=None).shape == (1, 60)
    assert model.generate(**inputs, eos_token_id=None).shape == (1, 60)  # of the usual 20
    inputs = inputs_of("gpt2", (52, 20))
    assert model.generate(**inputs, max_new_tokens=8, eos_token_id=None).shape == (2, 60)


@pytest.mark.parametrize("scope", ["text", "all"])
@pytest.mark.parametrize(
    "model_type, name",
    [
        ("falcon", "FalconForCausalLM"),
        ("mpt", "MptForCausalLM"),
        ("olmo_hybrid", "OlmoHybridForCausalLM"),
        ("qwen3_next", "Qwen3NextForCausalLM"),
        ("rwkv", "RwkvForCausalLM"),
    ],
)
def test_what_is_generated_is_what_the_forward_scores(model_type, name, scope):
    """On decoders whose caches hold other things than keys and values, or that number positions in their own way."""
    if not hasattr(transformers, name):
        pytest.skip(f"this transformers has no {name}")
    model = get_ept_model(tiny(model_type, name), EPTConfig(**SMALL, update_scope=scope)).eval()
    randomise(model)
    ids = torch.randint(4, VOCABULARY, (1, 6), generator=torch.Generator().manual_seed(1))
    output = model.generate(ids, **GREEDY, eos_token_id=None, return_dict_in_generate=True, output_logits=True)
    for step, logits in enumerate(output.logits):
        text = (torch.arange(6 + step) < 6).long()[None]
        with torch.no_grad():
            scored = model(output.sequences[:, : 6 + step], text_mask=text).logits[:, -1]
        torch.testing.assert_close(scored, logits, rtol=1e-3, atol=1e-4 * float(logits.abs().max()))


def test_a_model_that_sees_what_comes_is_no_decoder():
    config = BertConfig(
        vocab_size=VOCAB, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48
    )
    model = get_ept_model(BertLMHeadModel(config), EPTConfig(**SMALL)).eval()
    with pytest.raises(ValueError, match=r"BertLMHeadModel sees the text after each token, .*: load it as a decoder"):
        model.generate(**inputs_of("llama"), **GREEDY)


def test_length_at_which_rope_changes_is_not_crossed():
    factors = [1.0] * 4
    rope = {"rope_type": "longrope", "short_factor": factors, "long_factor": [3.0] * 4, "rope_theta": 1e4}
    config = Phi3Config(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        pad_token_id=1, max_position_embeddings=64, original_max_position_embeddings=16,
        rope_parameters={**rope, "original_max_position_embeddings": 16},
    )  # fmt: skip
    model = get_ept_model(Phi3ForCausalLM(config), EPTConfig(**{**SMALL, "max_length": 40})).eval()
    with pytest.raises(
        ValueError, match="beyond 16 positions, and prompt, text and new tokens go from 13 to 18: ask for at most 4"
    ):
        model.generate(**inputs_of("llama", (8,)), **GREEDY)
    for length, new in ((8, 4), (12, 6)):  # short of it, and beyond it from the start
        inputs = inputs_of("llama", (length,))
        generated = model.generate(**inputs, max_new_tokens=new, do_sample=False, eos_token_id=None)
        ids = inputs["input_ids"]
        for _ in range(new):
            text = (torch.arange(ids.shape[1]) < length).long()[None]
            with torch.no_grad():
                ids = torch.cat([ids, model(ids, text_mask=text).logits[:, -1:].argmax(-1)], dim=1)
        assert torch.equal(generated, ids)


def test_generation_without_a_text_begins_with_the_models_own_token():
    model = adapted("llama")
    assert torch.equal(model.generate(**GREEDY), model.generate(torch.tensor([[2]]), **GREEDY))
    model.base_model.generation_config.bos_token_id = None
    with pytest.raises(ValueError, match="generate needs input_ids"):
        model.generate(**GREEDY)


def test_embeddings_alone_give_the_new_tokens_alone():
    """As in the bare model, which cannot return ids that it does not know."""
    model, inputs = adapted("llama"), inputs_of("llama")
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    mask = inputs["attention_mask"]
    new = model.generate(inputs_embeds=embeds, attention_mask=mask, **GREEDY)
    assert torch.equal(new, model.generate(**inputs, **GREEDY)[:, 8:])
