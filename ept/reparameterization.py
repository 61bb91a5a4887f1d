"""Reparametrised short prompts: in a random basis, through a residual network, or with a scale and a shift.

Each is a field of `EPTConfig`. With `r=0`, `num_spaces=0` and `fusion=False` the basis with scale and shift is ULPT,
and the network is residual prompt tuning, as far as the papers specify them (arXiv 2502.04501 and 2305.03937);
initialisation and units are this project's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from .config import EPTConfig


def frozen_basis(config: EPTConfig, d: int) -> Tensor | None:
    """Draws the frozen rows R `[prompt_rank, d]` that the prompt mixes; None if `prompt_rank` is 0.

    The rows follow from the seed, so an adapter does not store them. Their scale is 1/√prompt_rank: a step of Adam then
    moves the prompt's entries about as far as if they were trained directly.
    """
    if not config.prompt_rank:
        return None
    # Not the random stream of the initial parameters, which have the same seed.
    generator = torch.Generator().manual_seed(config.seed ^ 0x5EED)
    rows = torch.randn((config.prompt_rank, d), generator=generator, device="cpu", dtype=torch.float32)
    return rows / math.sqrt(config.prompt_rank)


def short_prompt(part: Callable[[str], Tensor], basis: Tensor | None, present: Mapping[str, object]) -> Tensor:
    """Makes the short prompt `[s, d]`, in units of ρ, from its own rows or from `Z·R`.

    Then, if present, `p·scale + shift` and `p + LayerNorm(relu(p·W_down + b_down)·W_up)` are applied. All is
    computed in the parameters' dtype even under autocast, like the rest of the layer.

    Args:
        part: returns a parameter by name. basis: from `frozen_basis`. present: the existing parameters, by name.
    """
    prompt = part("prompt") if basis is None else part("Z")
    kind = prompt.device.type
    with torch.autocast(kind if torch.amp.is_autocast_available(kind) else "cpu", enabled=False):
        if basis is not None:
            prompt = prompt @ basis.to(prompt)
        if "scale" in present:
            prompt = prompt * part("scale") + part("shift")
        if "W_down" in present:
            hidden = F.relu(prompt @ part("W_down") + part("b_down"))
            prompt = prompt + F.layer_norm(hidden @ part("W_up"), prompt.shape[-1:], part("gain"))
    return prompt
