"""Digests of transformers' code, and the trial of what is known by them."""

from __future__ import annotations

import functools
import importlib
import operator
import sys

import pytest
import torch
import transformers
from tiny_models import make_model
from transformers.models.cohere import modeling_cohere as cohere
from transformers.models.gemma import modeling_gemma as gemma
from transformers.models.llama import modeling_llama as llama
from transformers.models.t5 import modeling_t5 as t5

from ept.model import frozen
from ept.model.frozen import is_swapped, swap_frozen
from ept.model.frozen_trial import computes_the_same, is_on_trial
from ept.model.known_forwards import KNOWN, digest_of, known_as

NAMES = sorted({name for row in KNOWN.values() for name in row.names})


@pytest.fixture
def untried():
    frozen._fused_class.cache_clear()
    yield
    frozen._fused_class.cache_clear()


@pytest.mark.parametrize("family", sorted({name.partition(".")[0] for name in NAMES}))
def test_installed_transformers_is_known(family):
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    for name in (name for name in NAMES if name.startswith(f"{family}.")):
        function = operator.attrgetter(name.partition(".")[2])(module)
        (kind,) = {(row.kind, row.constant) for row in KNOWN.values() if name in row.names}
        known = known_as(function)
        assert known is not None, (
            f"transformers {transformers.__version__} has changed {name}, which runs unfused now. See what it "
            f"computes: if the fused form {kind} still does, add its digest {digest_of(function)} to the table"
        )
        assert (known.kind, known.constant) == kind
        assert name in known.names


def plain(self, x, *, scale=None):
    return x * self.weight if scale is None else x[..., 1:] * scale


def test_a_digest_is_of_what_is_computed():
    def dressed(
        self: torch.nn.Module,
        x: torch.Tensor,
        *,
        scale: float | None = None,  # a comment
    ) -> torch.Tensor:
        """A docstring."""
        return x * self.weight if scale is None else x[..., 1:] * scale

    def other_default(self, x, *, scale=1):
        return x * self.weight if scale is None else x[..., 1:] * scale

    def other_constant(self, x, *, scale=None):
        return x * self.weight if scale is None else x[..., 2:] * scale

    def other_order(self, x, *, scale=None):
        return x * scale if scale is None else x[..., 1:] * self.weight

    # The same with every version of Python.
    assert digest_of(plain) == "d21d1c9fa2ffc853c27b7068a74551b77e0b829c81c2d21689d88023fd984747"
    assert digest_of(plain) == digest_of(dressed)
    assert len({digest_of(f) for f in (plain, other_default, other_constant, other_order)}) == 4
    assert {digest_of(f) for f in (len, None, lambda x: x)} == {None}


# A class, the function of it whose row in the table is wrong, and what is wrong in it.
MISTAKES = {
    "Gemma's norm for another": (gemma.GemmaRMSNorm, "GemmaRMSNorm.forward", {"constant": "llama"}),
    "T5's gated MLP for the plain one": (t5.T5DenseGatedActDense, "T5DenseGatedActDense.forward", {"kind": "t5_mlp"}),
    "Llama's MLP for T5's": (llama.LlamaMLP, "LlamaMLP.forward", {"kind": "t5_gated_mlp"}),
    "T5's feed-forward for its attention": (t5.T5LayerFF, "T5LayerFF.forward", {"kind": "t5_self_attention"}),
    "T5's attention for its feed-forward": (
        t5.T5LayerSelfAttention,
        "T5LayerSelfAttention.forward",
        {"kind": "t5_feed_forward"},
    ),
    "Llama's layer for T5's": (llama.LlamaDecoderLayer, "LlamaDecoderLayer.forward", {"kind": "t5_feed_forward"}),
    "halves for pairs": (llama.LlamaAttention, "rotate_half", {"constant": True}),
    "pairs for halves": (cohere.CohereAttention, "rotate_half", {"constant": False}),
    "any dtype of the angles": (llama.LlamaAttention, "apply_rotary_pos_emb", {"constant": True}),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_code_that_is_taken_for_other_code_fails_its_trial(case, untried, monkeypatch, caplog):
    theirs, name, mistake = MISTAKES[case]
    assert frozen._fused_class(theirs) is not None
    assert not caplog.records
    frozen._fused_class.cache_clear()
    digest = digest_of(operator.attrgetter(name)(sys.modules[theirs.__module__]))
    monkeypatch.setitem(KNOWN, digest, KNOWN[digest]._replace(**mistake))
    assert frozen._fused_class(theirs) is None
    assert "keeps its own code" in caplog.text


def test_what_decorates_an_attention_still_runs(monkeypatch):
    def counted(function):
        @functools.wraps(function)
        def count(*args, **kwargs):
            calls.append(kwargs)
            return function(*args, **kwargs)

        return count

    class Kept:  # a decorator that keeps the function elsewhere than in a closure
        def __init__(self, function):
            self.__wrapped__ = function

    calls, rotary = [], frozen.functional.rotary
    attention = type("Attention", (llama.LlamaAttention,), {"forward": counted(llama.LlamaAttention.forward)})
    unknown = type("Attention", (llama.LlamaAttention,), {"forward": Kept(llama.LlamaAttention.forward)})
    model = make_model("llama")
    model.model.layers[0].self_attn.__class__ = attention
    expected = model(torch.arange(5)[None]).logits
    assert swap_frozen(model) == 11
    monkeypatch.setattr(frozen.ept_kernels, "backend", lambda device: "triton")
    monkeypatch.setattr(frozen.functional, "rotary", lambda *x: calls.append("rotary") or rotary(*x))
    calls.clear()
    torch.testing.assert_close(model(torch.arange(5)[None]).logits, expected, rtol=1e-4, atol=1e-5)
    assert calls[1:] == ["rotary", "rotary"]
    assert "position_embeddings" in calls[0]
    assert frozen._fused_class(unknown) is None


def test_a_class_that_cannot_be_tried_is_left_alone_and_named(untried, caplog):
    class Fixed(llama.LlamaRMSNorm):
        variance_epsilon = property(lambda self: 1e-6, lambda self, value: None if value == 1e-6 else 1 / 0)

    model = torch.nn.Sequential(Fixed(8), llama.LlamaRMSNorm(8))
    assert swap_frozen(model) == 1
    assert not is_swapped(model[0])
    assert "Fixed keeps its own code instead of the fused code: the trial failed: division by zero" in caplog.text


def test_a_trial_leaves_no_trace(untried, monkeypatch):
    tried = []
    monkeypatch.setattr(frozen, "computes_the_same", lambda *x: tried.append(x[0]) or computes_the_same(*x))
    with torch.device("meta"), torch.inference_mode():
        models = [make_model("llama"), make_model("llama")]
        torch.manual_seed(0)
        expected, seeded = torch.random.get_rng_state(), list[int]()
        monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
        for model in models:
            assert swap_frozen(model) == 11
        assert torch.equal(torch.random.get_rng_state(), expected)
        assert not seeded  # nor are the numbers of accelerators others
    assert sorted(theirs.__name__ for theirs in tried) == ["LlamaDecoderLayer", "LlamaMLP", "LlamaRMSNorm"]
    assert not is_on_trial()
