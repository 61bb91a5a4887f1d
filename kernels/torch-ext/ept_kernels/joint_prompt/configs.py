"""How the joint prompt's kernels are launched."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from ..launch import Config, all_registers, cached_choice, config_for, padded, precision
from .shape import Shape

# Meta-parameters by kernel, used where nothing was measured. The first launch, of the inner products, belongs to both
# operators; BLOCK_M and PARTS of the second one hold for it too.
CONFIGS: dict[str, Config] = {
    "joint_prompt_products": {"BLOCK_N": 32, "BLOCK_K": 16, "num_warps": 4, "num_stages": 2},
    "joint_prompt": {"BLOCK_S": 16, "BLOCK_D": 64, "BLOCK_M": 32, "PARTS": 2, "num_warps": 4, "num_stages": 1},
    "joint_prompt_backward": {
        "BLOCK_S": 16,
        "BLOCK_D": 32,
        "BLOCK_M": 32,
        "BLOCK_R": 16,
        "PARTS": 2,
        "num_warps": 4,
        "num_stages": 1,
    },
}
# Up to this width the programs take narrower tiles: otherwise there are too few of them to fill a GPU.
NARROW = 1024


class Sizes(NamedTuple):
    """What a shape is made from: the parameters' sizes as they are."""

    s: int
    d: int
    m: int
    r: int
    a: int
    columns: int
    K: int
    fusion: bool


# From this rank on the backward reads inner products in a single part.
LARGE_RANK = 33


def heuristic(kernel: str, d: int, a: int = 0, r: int = 0) -> Config:
    """Meta-parameters of `kernel` at width `d`, with maps of width `a` and rank `r`, where nothing was
    measured.
    """
    config = dict(CONFIGS[kernel])
    if kernel == "joint_prompt" and d <= NARROW:
        config["BLOCK_D"] = 32
    # With maps or a large rank the kernels hold more at a time; larger tiles, or sums of several parts, would overflow
    # the registers.
    if "PARTS" in config and (a or (kernel == "joint_prompt_backward" and r >= LARGE_RANK)):
        config["PARTS"] = 1
    if kernel == "joint_prompt_backward" and a:
        config |= {"BLOCK_D": 16, "BLOCK_M": 16, "num_warps": 8}
    return config


def key(kernel: str, a: int) -> str:
    """Name of `kernel` in a file of measured configurations, with maps of width `a`: they need smaller tiles."""
    return f"{kernel}/maps" if a and kernel != "joint_prompt_products" else kernel


def meta(kernel: str, config: dict[str, Config], sizes: Sizes, activation: str, input_precision: str) -> Shape:
    """The `Shape` that both launches of the operator `kernel` are compiled for; `config` by kernel."""
    blocks = {**config["joint_prompt_products"], **config[kernel]}
    fields: dict[str, Any] = {name: value for name, value in blocks.items() if name in Shape.__dataclass_fields__}
    on = _switched_on(sizes)
    fields["BLOCK_R"] = min(fields.get("BLOCK_R", 16), padded(on.r))
    fields["BLOCK_S"] = min(fields["BLOCK_S"], padded(on.s))
    fields["BLOCK_M"] = min(fields["BLOCK_M"], padded(on.m))
    fields["BLOCK_D"] = min(fields["BLOCK_D"], padded(on.d))
    return Shape(
        **on._asdict(),
        backward=kernel == "joint_prompt_backward",
        activation=activation,
        PRECISION=input_precision,
        **fields,
    )


def _switched_on(x: Sizes) -> Sizes:
    """Sizes of what is switched off set to 0: an update that nothing attends to, a gate without spaces, …"""
    update = x.fusion and x.r > 0 and x.m > 0
    return x._replace(
        m=x.m if update else 0,
        r=x.r if update else 0,
        a=x.a if x.fusion else 0,
        K=x.K if x.columns else 0,
    )


@cached_choice
def chosen(kernel: str, sizes: Sizes, activation: str, device: torch.device) -> tuple[Shape, Config, Config]:
    """The shape, and warps and stages of both launches."""
    size = (sizes.d, padded(sizes.r))
    config = {
        name: config_for(key(name, sizes.a), size, device, heuristic(name, sizes.d, sizes.a, sizes.r))
        for name in ("joint_prompt_products", kernel)
    }
    z = meta(kernel, config, sizes, activation, precision(torch.float32, device))
    products, second = (
        {**{k: c[k] for k in ("num_warps", "num_stages")}, **all_registers(device)} for c in config.values()
    )
    return z, products, second
