"""Adapters of random configurations against the method's formulas, written out here independently in float64.

Each row is read alone and unpadded by the raw model, from embeddings that no code of the project made.
"""

from __future__ import annotations

import math
import random

import pytest
import torch
from tiny_models import VOCAB, make_model, randomise
from torch.nn import functional as F

from ept import EPTConfig, get_ept_model

PHI = {"gelu": F.gelu, "relu": torch.relu, "silu": F.silu, "tanh": torch.tanh, "linear": lambda x: x}
CHOICES = {
    "num_virtual_tokens": (1, 2, 4),
    "max_length": (8, 12),
    "r": (0, 1, 2, 3),
    "update": ("position", "position", "token"),
    "update_scope": ("text", "all"),
    "prompt_rank": (0, 0, 2),
    "prompt_scale_shift": (False, True),
    "residual_dim": (0, 0, 3),
    "num_spaces": (0, 1, 2, 3),
    "space_dim": (1, 2),
    "space_activation": tuple(PHI),
    "space_gate": ("learned", "uniform"),
    "fusion": (True, True, False),
    "fusion_dim": (0, 3),
    "fusion_score_scale": (None, 0.7),
    "fusion_weight": (None, 0.6, -0.4),
    "embedding_scale": ("auto", 1.0, 0.3),
}


def normalised(x):
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def table_of(config, p):
    return config.alpha / math.sqrt(config.r) * p["A"] @ p["B"]


def prompt_of(config, p, rho, d):
    """P = ρ·(p + β·ω·[C; p] + M), `[s, d]`."""
    if config.prompt_rank:
        generator = torch.Generator().manual_seed(config.seed ^ 0x5EED)
        x = p["Z"] @ torch.randn((config.prompt_rank, d), generator=generator).double() / math.sqrt(config.prompt_rank)
    else:
        x = p["prompt"]
    x = x * p.get("scale", 1) + p.get("shift", 0)
    if config.residual_dim:
        hidden = torch.relu(x @ p["W_down"] + p["b_down"]) @ p["W_up"]
        x = (
            x
            + p["gain"] * (hidden - hidden.mean(-1, keepdim=True)) / (hidden.var(-1, False, keepdim=True) + 1e-5).sqrt()
        )
    total, x_hat, eye = x, normalised(x), torch.eye(d).double()
    if config.fusion:
        sources = torch.cat([table_of(config, p), x]) if "A" in p else x
        query, key = x_hat @ p.get("W_q", eye), normalised(sources) @ p.get("W_k", eye)
        scale = config.fusion_score_scale or 1 / math.sqrt(config.fusion_dim or d)
        total = total + p.get("beta", config.fusion_weight) * torch.softmax(scale * query @ key.T, -1) @ sources
    K, h = config.num_spaces, config.space_dim
    gate = torch.softmax(x_hat @ p["G"], -1) if "G" in p else torch.ones(len(x), max(K, 1)).double() / max(K, 1)
    for k in range(K):
        own = slice(k * h, (k + 1) * h)
        total = total + gate[:, k : k + 1] * (PHI[config.space_activation](x_hat @ p["D"][:, own]) @ p["U"][own])
    return rho * total


def updated(config, p, rho, words, is_text):
    """E' of a text's vectors `[n, d]`."""
    if not config.r:
        return words
    if config.update == "token":
        change = torch.relu(words / rho @ p["W_in"] + p["b_in"]) @ p["W_out"] + p["b_out"]
    else:
        change = table_of(config, p)[: len(words)]
    return words + rho * change * is_text[:, None]


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "gemma"])
@pytest.mark.parametrize("seed", range(5))
def test_loss_logits_and_gradients_are_those_of_the_formulas(name, seed):
    draw = random.Random(f"{name}{seed}")
    config = EPTConfig(**{field: draw.choice(values) for field, values in CHOICES.items()})
    raw = make_model(name).double()
    model = get_ept_model(make_model(name).double(), config).eval()
    randomise(model, seed)
    layer = model.prompt_encoder["default"].double()
    p = {key: value.detach().clone().requires_grad_() for key, value in layer.named_parameters()}
    table = raw.get_input_embeddings()(torch.arange(VOCAB)).detach()
    rho = float(table.square().mean().sqrt()) if config.embedding_scale == "auto" else config.embedding_scale
    prompt = prompt_of(config, p, rho, table.shape[1])
    lengths, n, s = [draw.randint(2, 8) for _ in range(3)], 9, config.num_virtual_tokens
    ids = torch.randint(4, VOCAB, (3, n), generator=torch.Generator().manual_seed(seed))
    mask, labels, losses, expected = torch.zeros_like(ids), torch.full_like(ids, -100), [], []
    for row, length in enumerate(lengths):
        start = draw.choice([0, n - length])
        own, answer = slice(start, start + length), draw.randint(1, length - 1)
        mask[row, own], labels[row, start + answer : start + length] = 1, 5
        is_text = torch.arange(length) < (answer if config.update_scope == "text" else length)
        embeds = torch.cat([prompt, updated(config, p, rho, table[ids[row, own]], is_text)])
        logits = raw(inputs_embeds=embeds[None]).logits[0, s:]
        losses += list(F.cross_entropy(logits[answer - 1 : -1], labels[row, own][answer:].clone(), reduction="none"))
        expected.append((row, own, logits))
    loss = torch.stack(losses).mean()
    if seed % 2:
        model.share_prompt()  # which reads such texts side by side in a row
    output = model(ids, attention_mask=mask, labels=labels)
    for row, own, logits in expected:
        torch.testing.assert_close(output.logits[row, s:][own], logits, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(output.loss.double(), loss, rtol=1e-5, atol=1e-5)  # transformers takes it in float32
    found = torch.autograd.grad(output.loss, list(layer.parameters()))
    wanted = torch.autograd.grad(loss, list(p.values()), allow_unused=True, materialize_grads=True)
    for key, actual, gradient in zip(p, found, wanted, strict=True):
        torch.testing.assert_close(actual, gradient, rtol=1e-4, atol=1e-5, msg=lambda text, key=key: f"{key}: {text}")
