"""Launchers of the joint prompt and its backward: at most four and five launches, no atomics, sums in a fixed order.

All sizes except d and the number of gates are run-time arguments: one compiled kernel serves all lengths and ranks.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from .. import launch
from ..library import check_shapes
from .expand import joint_prompt_expand_kernel
from .products import joint_prompt_products_kernel, joint_prompt_sum_kernel
from .reference import ACTIVATIONS, SHAPES, joint_prompt_backward_reference, joint_prompt_reference
from .scores import joint_prompt_rows_kernel, joint_prompt_sides_kernel
from .tiles import UNIT, layout

# Meta-parameters by kernel, used without a measurement. PROGRAMS: wanted number of programs of products, which
# determines the number of parts.
CONFIGS: dict[str, launch.Config] = {
    "joint_prompt_products": {"BLOCK_K": 32, "PROGRAMS": 264, "num_warps": 8, "num_stages": 3},
    "joint_prompt_sum": {"num_warps": 4, "num_stages": 1},
    "joint_prompt_rows": {"BLOCK_S": 16, "num_warps": 8, "num_stages": 1},
    "joint_prompt_sides": {"BLOCK_S": 16, "num_warps": 8, "num_stages": 1},
    "joint_prompt_expand": {"BLOCK_D": 64, "num_warps": 8, "num_stages": 1},
}
MAX_GATES = 128  # that a program holds at once; with more it spills, or runs out of memory


def joint_prompt(*arguments: Any) -> Tensor:
    """Computes `ept_kernels.joint_prompt_reference` in four launches, or none without fusion and spaces."""
    if arguments[8].shape[-1] > MAX_GATES:
        return joint_prompt_reference(*arguments)
    prompt, _, _, beta, _, _, D, *_ = parameters = [x.contiguous() for x in arguments[:9]]
    if not prompt.numel() or not (beta.numel() or D.shape[1]):
        return arguments[10] * prompt
    out = torch.empty_like(prompt)
    _run((*parameters, prompt), arguments[9:], (out, *[None] * 8))
    return out


def joint_prompt_backward(grad_output: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """Computes `ept_kernels.joint_prompt_backward_reference` in five launches, or four without fusion."""
    if arguments[8].shape[-1] > MAX_GATES:
        return joint_prompt_backward_reference(grad_output, *arguments)
    prompt, A, _, beta, _, _, D, *_ = parameters = [x.contiguous() for x in arguments[:9]]
    fusion, spaces = beta.numel() > 0, D.shape[1] > 0
    if not prompt.numel() or not (fusion or spaces):
        grad = (arguments[10] * grad_output.float()).to(prompt.dtype).contiguous()
        return grad, *(x.new_zeros(x.shape) for x in parameters[1:])
    update = fusion and A.numel() > 0
    is_used = (True, update, update, fusion, fusion, fusion, spaces, spaces, spaces)
    gradients = [(torch.empty_like if used else torch.zeros_like)(x) for x, used in zip(parameters, is_used)]
    _run((*parameters, grad_output.contiguous()), arguments[9:], gradients)
    return tuple(gradients)


def _run(tensors: tuple[Tensor, ...], options: tuple[Any, ...], results: Sequence[Tensor | None]) -> None:
    """Launches the kernels that write `results`: the joint prompt and eight times None, or the gradients.

    `tensors`: the parameters and the incoming gradient (in the forward the prompt instead), all contiguous.
    """
    kinds = launch.kinds(*tensors)  # the results have the parameters' types, and fresh addresses
    if kinds[1].count(kinds[1][0]) < 10:  # a program chooses among tensors, which must have the same type
        tensors = tuple([x.float() for x in tensors])
    prompt, A, B, beta, W_q, W_k, D, U, G, grad_output = tensors
    out, grad_A, grad_B, grad_beta, *gradients = results
    is_backward = grad_A is not None
    elements, launches = _prepared(kinds, options, is_backward)
    products, total, rows, sides, expand = launches
    with launch.on_device(prompt):
        workspace = prompt.new_empty(elements, dtype=torch.float32)
        calls: list[launch.Call] = [
            (products, (prompt, grad_output, B, W_q, W_k, D, U, G, workspace)),
            (total, (A, workspace)),
            (rows, (A, workspace)),
            (expand, (prompt, grad_output, A, B, beta, W_q, W_k, D, U, G, workspace, out, grad_B, *gradients)),
        ]
        if is_backward:
            calls.insert(3, (sides, (A, beta, workspace, grad_A, grad_beta)))
        launch.in_turn(calls)


@launch.cached_choice
def _prepared(kinds: launch.Kinds, options: tuple[Any, ...], is_backward: bool) -> tuple[int, list[launch.Prepared]]:
    """Counts the workspace's elements and prepares the launches; that of the sides has no programs if not needed."""
    check_shapes(SHAPES, **{entry.split()[0]: shape for entry, shape in zip(SHAPES.split(", "), kinds[3])})
    device, ((s, d), (m, r), _, (fusion,), (_, a), _, (_, columns), _, (_, K), _) = kinds[2:]
    whole = f"D {d} {columns // max(K, 1) * max(K, 1)}, beta {min(fusion, 1)}"
    check_shapes(whole, D=(d, columns), beta=(fusion,))
    m, r = (m, r) if fusion and m and r else (0, 0)
    sizes = (s, m, r, a if fusion else 0, columns, K if columns else 0)
    w = layout.fn(0, *sizes)
    if max(w.mix, w.slopes - w.scores, w.partial - w.normed) >= 2**31:  # the kernels' `layout` counts in 32 bits
        said = f"a joint prompt of {s} prompt rows, {m} positions and rank {r} has matrices of 2**31 numbers or more"
        raise ValueError(f"{said}, too many for the kernels: use a shorter prompt, or EPT_KERNELS=reference")
    scales, activation = tuple(map(float, options[:3])), options[3] if len(options) > 3 else "gelu"
    ACTIVATIONS[activation]  # refuses an unknown one
    configs = [launch.config_for(name, (d,), device, heuristic(name, device)) for name in CONFIGS]

    across, down = (w.width, w.at_q + w.at_B) if is_backward else (w.at_U, w.at_q)
    across, down, tiles_m, tiles_s = (size // UNIT for size in (across, down, w.at_p, w.at_B))
    tiles, block = across * down, configs[0]["BLOCK_K"]
    parts = min(triton.cdiv(configs[0].pop("PROGRAMS"), tiles), triton.cdiv(d, block))
    depth = triton.cdiv(triton.cdiv(d, parts), block) * block
    parts = triton.cdiv(d, depth)
    of_results = triton.cdiv(d, configs[4]["BLOCK_D"]), across if is_backward else tiles_s
    of_sides = tiles_m + w.at_B // configs[3]["BLOCK_S"] if is_backward and fusion else 0

    programs: dict[Any, tuple[tuple[int, ...], tuple[float, ...]]] = {
        joint_prompt_products_kernel: ((across, down, parts), (*sizes, d, depth)),
        joint_prompt_sum_kernel: ((tiles + tiles_m,), (scales[0], *sizes, d, parts, across, tiles)),
        joint_prompt_rows_kernel: ((w.at_B // configs[2]["BLOCK_S"],), (*scales, *sizes)),
        joint_prompt_sides_kernel: ((of_sides,), (*scales, *sizes, d)),
        joint_prompt_expand_kernel: (of_results, (*scales, *sizes, d)),
    }
    constants = {
        "MAPS": sizes[3] > 0,
        "GATES": max(32, launch.padded(K)) if columns else 0,
        "ACTIVATION": activation,
        "FUSION": fusion > 0,
        "BACKWARD": is_backward,
        "PRECISION": launch.precision(torch.float32, device),
    }
    launches = []
    for config, (kernel, (grid, numbers)) in zip(configs, programs.items(), strict=True):
        meta = config | {name: value for name, value in constants.items() if name in kernel.arg_names}
        launches.append(launch.Prepared(kernel, grid, numbers, meta | launch.all_registers(device), kinds))
    return w.partial + parts * (w.at_q + w.at_B) * w.width, launches


def heuristic(kernel: str, device: torch.device) -> launch.Config:
    """Chooses meta-parameters of `kernel` without a measurement."""
    config = dict(CONFIGS[kernel])
    if launch.architecture(device) in ("gfx942", "hip"):
        config["num_warps"] = 4  # a warp has twice as many threads
    return config
