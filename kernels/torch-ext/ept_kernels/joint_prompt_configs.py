"""How the joint prompt's kernels are launched, and how they are compiled ahead of time."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from .joint_prompt_forward import joint_prompt_kernel
from .joint_prompt_gradients import joint_prompt_backward_kernel
from .joint_prompt_products import joint_prompt_products_kernel
from .joint_prompt_shape import Shape
from .launch import AotCase, all_registers, cached_choice, config_for, padded, precision

# Meta-parameters by kernel, used where nothing was measured; BLOCK_M and PARTS hold for both launches of an operator.
CONFIGS: dict[str, dict[str, int]] = {
    "joint_prompt_products": {"BLOCK_N": 32, "BLOCK_K": 16, "PARTS": 2, "num_warps": 4, "num_stages": 2},
    "joint_prompt": {"BLOCK_S": 16, "BLOCK_D": 64, "BLOCK_M": 32, "num_warps": 4, "num_stages": 1},
    "joint_prompt_backward": {
        "BLOCK_S": 16,
        "BLOCK_D": 32,
        "BLOCK_M": 32,
        "BLOCK_R": 16,
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


def heuristic(kernel: str, d: int, a: int = 0) -> dict[str, int]:
    """Meta-parameters of ``kernel`` at width ``d``, with maps of width ``a``, where nothing was measured."""
    config = dict(CONFIGS[kernel])
    if kernel == "joint_prompt" and d <= NARROW:
        config["BLOCK_D"] = 32
    # With maps the backward holds more at a time; larger tiles, or sums of several parts, would overflow the registers.
    if kernel == "joint_prompt_products" and a:
        config["PARTS"] = 1
    if kernel == "joint_prompt_backward" and a:
        config |= {"BLOCK_D": 16, "BLOCK_M": 16 if d <= NARROW else 32, "num_warps": 8}
    return config


def meta(kernel: str, config: dict[str, dict[str, int]], sizes: Sizes, activation: str, input_precision: str) -> Shape:
    """The :class:`Shape` that both launches of the operator ``kernel`` are compiled for; ``config`` by kernel."""
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
def chosen(
    kernel: str, sizes: Sizes, activation: str, device: torch.device
) -> tuple[Shape, dict[str, int], dict[str, int]]:
    """The shape, and warps and stages of both launches; a tuner clears this cache after it has changed one."""
    config = {
        name: config_for(name, sizes.d, device, heuristic(name, sizes.d, sizes.a))
        for name in ("joint_prompt_products", kernel)
    }
    z = meta(kernel, config, sizes, activation, precision(torch.float32, device))
    products, second = (
        {**{k: c[k] for k in ("num_warps", "num_stages")}, **all_registers(device)} for c in config.values()
    )
    return z, products, second


# Ahead of time.

# Sizes and the parameters' type: the defaults for T5 base, a wide model, with maps, prompt and spaces alone. Two cases
# with maps are left out, since the backward spills some tens of bytes on NVIDIA GPUs: beside a rank above 32, and in a
# narrow model on sm_100.
_AOT_PROBLEMS = (
    (Sizes(s=40, d=768, m=256, r=30, a=0, columns=8, K=4, fusion=True), "fp32"),
    (Sizes(s=100, d=4096, m=256, r=60, a=0, columns=32, K=8, fusion=True), "fp32"),
    (Sizes(s=100, d=4096, m=256, r=30, a=16, columns=32, K=8, fusion=True), "fp32"),
    (Sizes(s=40, d=768, m=256, r=30, a=0, columns=8, K=4, fusion=True), "bf16"),
    (Sizes(s=100, d=4096, m=0, r=0, a=0, columns=32, K=8, fusion=False), "fp16"),
)


def aot_cases() -> list[AotCase]:
    """Every kernel with representative sizes, for :mod:`ept_kernels.aot`."""
    kernels = {"joint_prompt": joint_prompt_kernel, "joint_prompt_backward": joint_prompt_backward_kernel}
    cases = []
    for sizes, dtype in _AOT_PROBLEMS:
        label = f"{dtype} s={sizes.s} d={sizes.d} r={sizes.r} a={sizes.a}"
        for kernel, fn in kernels.items():
            config = {name: heuristic(name, sizes.d, sizes.a) for name in ("joint_prompt_products", kernel)}
            z = meta(kernel, config, sizes, "gelu", "bf16x6")
            first = f"{kernel.replace('joint_prompt', 'joint_prompt_products')} {label}"
            cases.append(_case(first, joint_prompt_products_kernel, dtype, z, config["joint_prompt_products"]))
            cases.append(_case(f"{kernel} {label}", fn, dtype, z, config[kernel]))
    return cases


def _case(name: str, fn: Any, dtype: str, z: Shape, config: dict[str, int]) -> AotCase:
    constants: dict[str, Any] = {"z": z}
    if not z.backward:
        constants["grad_output"] = None
    scalars = ("lowrank_scale", "embedding_scale", "score_scale")
    signature = {
        name: "constexpr" if name in constants else "fp32" if name in scalars else f"*{dtype}" for name in fn.arg_names
    }
    constants = {name: value for name, value in constants.items() if name in signature}
    signature["products"] = "*fp32"
    warps, stages = config["num_warps"], config["num_stages"]
    return AotCase(name, fn, signature, constants, warps, stages, all_registers=True)
