"""Short prompts made from other parameters than their own rows: in a random basis, through a residual network, and with
a scale and a shift.

Each is a field of `EPTConfig`. With `num_spaces=0` and `fusion=False` the first is ULPT and the second residual prompt
tuning, as far as their papers say (arXiv 2502.04501 and 2305.03937); starts and units are this project's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from .config import EPTConfig


def frozen_basis(config: EPTConfig, d: int) -> Tensor | None:
    """Draws the frozen rows R `[prompt_rank, d]` that the prompt is a mixture of; None where it is none.

    They follow from the seed, which is all that an adapter has to hold of them. Their scale is 1/√prompt_rank: Adam
    then moves the prompt's entries about as far in a step as it would move them by themselves.
    """
    if not config.prompt_rank:
        return None
    # Another stream of numbers than that of the parameters' start, which has the same seed.
    generator = torch.Generator().manual_seed(config.seed ^ 0x5EED)
    rows = torch.randn((config.prompt_rank, d), generator=generator, device="cpu", dtype=torch.float32)
    return rows / math.sqrt(config.prompt_rank)


def short_prompt(part: Callable[[str], Tensor], basis: Tensor | None, present: Mapping[str, object]) -> Tensor:
    """Makes the short prompt `[s, d]` in units of ρ: `(Z·R)·scale + shift`, and `p + LayerNorm(relu(p·W_down)·W_up)`.

    In the parameters' type under autocast too, as the rest of the layer.

    Args:
        part: gives a parameter by its name. basis: of `frozen_basis`. present: the names of the parameters there are.
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
