"""The configurations that the tuner may try, for every kernel: at which sizes, with which problem and surroundings."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch

from .. import launch
from ..four_bit import dequantize, matmul, paths
from ..four_bit.problems import FourBit
from ..frozen import launchers as frozen
from ..frozen.problems import Activation, RMSNorm, Rotary
from ..joint_prompt import launchers as joint_prompt
from ..joint_prompt.problems import JointPrompt
from ..launch import Config, Size, padded
from ..problem import Problem
from ..prompted_embedding import launchers as prompted_embedding
from ..prompted_embedding.problems import PromptedEmbedding
from ..token_update import launchers as token_update
from ..token_update.problems import TokenUpdate
from .problems import (
    LLAMA_7B,
    LLAMA_7B_BY_TOKEN,
    LLAMA_7B_JOINT,
    T5_BASE,
    T5_BASE_BY_TOKEN,
    T5_BASE_JOINT,
    WEIGHTS,
)


@dataclass(frozen=True)
class Tunable:
    """One kernel at one size, as the tuner measures it and as its shipped configurations are compiled ahead of time.

    Attributes:
        kernel, size: as the launcher passes them to `config_for`; together unique.
        default: the heuristic's configuration, which is measured first and kept unless another is faster.
        candidates: configurations to try; each replaces the values of `default` that it names. See `grid`.
        problem: its whole launcher is timed, even if the kernel is one of several in it. The launcher must get its
            configuration from `config_for`, and if it caches that, with `cached_choice`.
        variants: other problems served by the same configuration: the winner must give right results for them and not
            spill either.
        held: configurations of other kernels during the measurement.
    """

    kernel: str
    size: Size
    default: Config
    candidates: Sequence[Config]
    problem: Problem
    variants: Sequence[Problem] = ()
    held: dict[str, Config] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """The size as written in the file."""
        return "x".join(map(str, self.size))

    def trying(self, config: Config) -> dict[str, Config]:
        """Returns the argument of `launch.configured` to try `config`."""
        return {**self.held, self.kernel: {**self.default, **config}}


def grid(**values: Sequence[int]) -> list[Config]:
    """Lists every combination: `grid(BLOCK=(16, 32), num_warps=(4, 8))` gives four configurations."""
    return [dict(zip(values, combination, strict=True)) for combination in itertools.product(*values.values())]


def tunables(reduced: bool = False, device: torch.device | str = "cuda") -> list[Tunable]:
    """Lists everything to tune on `device`; `reduced`: at tiny sizes, with few candidates."""
    found = [
        *_prompted_embedding(reduced),
        *_by_token(reduced),
        *_joint_prompt(reduced, torch.device(device)),
        *_four_bit(reduced, torch.device(device)),
        *_frozen(reduced, torch.device(device)),
    ]
    if reduced:
        found = [replace(t, candidates=t.candidates[: 1 if t.kernel.startswith("joint") else 2]) for t in found]
    return found


# Kernels of the prompted embedding: the forward's, and those timed as part of the backward.
_EMBEDDING_GRIDS = {
    "prompted_embedding": grid(
        BLOCK_T=(16, 32), BLOCK_D=(64, 128, 256, 512), PROGRAMS=(256, 512, 1024), num_warps=(4, 8)
    ),
    "prompted_embedding_backward": grid(
        BLOCK_M=(32, 64, 128), BLOCK_D=(32, 64, 128), STAGES=(2, 4, 6), num_warps=(4, 8)
    ),
    "prompted_embedding_reduce": grid(BLOCK_E=(64, 256, 1024), BLOCK_P=(4, 16)),
}


def _prompted_embedding(reduced: bool) -> Iterator[Tunable]:
    tiny = PromptedEmbedding(n=5, d=40, s=2, m=5, r=3, batch=2, padding="none", dtype=torch.bfloat16, vocabulary=11)
    for p in [tiny] if reduced else [T5_BASE, replace(T5_BASE, dtype=torch.float32), LLAMA_7B]:
        for kernel, tried in _EMBEDDING_GRIDS.items():
            default = prompted_embedding.heuristic(kernel, p.d, p.r, p.dtype)
            complete = [{**default, **candidate} for candidate in tried]
            candidates = [c for c in complete if prompted_embedding.bounded(c, p.d, p.r) == c]
            problem, variants = (p, [p.packed]) if kernel == p.operator else (p.backward, [])
            yield Tunable(launch.key(kernel, p.dtype), (p.d, padded(p.r)), default, candidates, problem, variants)


_TOKENS: dict[str, Sequence[int]] = {"BLOCK_T": (16, 32, 64), "BLOCK_D": (16, 32, 64), "num_warps": (4, 8)}
_BY_TOKEN_GRIDS = {
    "prompted_embedding_by_token": grid(**_TOKENS),
    "prompted_embedding_by_token_before": grid(**_TOKENS),
    "prompted_embedding_by_token_backward": grid(**_TOKENS, PROGRAMS=(256, 1024)),
    "prompted_embedding_by_token_reduce": grid(BLOCK_E=(64, 256, 1024), BLOCK_P=(4, 16)),
}


def _by_token(reduced: bool) -> Iterator[Tunable]:
    tiny = TokenUpdate(n=5, d=40, s=2, r=3, batch=2, padding="none", dtype=torch.bfloat16, vocabulary=11)
    for p in [tiny] if reduced else [T5_BASE_BY_TOKEN, LLAMA_7B_BY_TOKEN]:
        for kernel, tried in _BY_TOKEN_GRIDS.items():
            default = token_update.heuristic(kernel, p.d, p.r, p.dtype)
            complete = [{**default, **candidate} for candidate in tried]
            candidates = [c for c in complete if token_update.bounded(kernel, c, p.d, p.r) == c]
            problem = p if kernel == p.operator else p.backward
            yield Tunable(launch.key(kernel, p.dtype), (p.d, padded(p.r)), default, candidates, problem)


# Kernels of the joint prompt, all timed as part of its backward.
_JOINT_GRIDS = {
    "joint_prompt_products": grid(BLOCK_K=(16, 32), PROGRAMS=(132, 264, 528), num_warps=(4, 8)),
    "joint_prompt_rows": grid(num_warps=(4, 8), num_stages=(1, 2)),
    "joint_prompt_sides": grid(num_warps=(4, 8), num_stages=(1, 2)),
    "joint_prompt_expand": grid(BLOCK_D=(32, 64), num_warps=(4, 8), num_stages=(1, 2)),
}


def _joint_prompt(reduced: bool, device: torch.device) -> Iterator[Tunable]:
    for p in [JointPrompt(s=2, d=20, m=5, K=2, h=1)] if reduced else [T5_BASE_JOINT, LLAMA_7B_JOINT]:
        variants = [p, replace(p, a=16).backward]
        for kernel, candidates in _JOINT_GRIDS.items():
            default = joint_prompt.heuristic(kernel, device)
            yield Tunable(kernel, (p.d,), default, candidates, p.backward, variants)


_DEQUANTIZE_GRID = grid(ITERS=(1, 2, 4, 8), num_warps=(2, 4, 8))  # UNITS follows: one word per thread
_PRODUCT_GRID = grid(BLOCK_N=(64, 128), BLOCK_K=(128, 256), SPLITS=(1, 2, 4, 8), num_warps=(4, 8))
_VARIANTS = ({"block_size": 32}, {"nested": False}, {"nested": False, "block_size": 128})  # share a configuration


def _four_bit(reduced: bool, device: torch.device) -> Iterator[Tunable]:
    """Lists the kernels, then the paths of a product, which are measured with the winning kernels."""
    dtype = torch.float16 if reduced else torch.bfloat16  # the interpreter truncates bfloat16
    weights = [FourBit(*shape, dtype=dtype) for shape in ([(32, 128)] if reduced else WEIGHTS)]
    for p in {p.rows * p.columns: p for p in weights}.values():  # a dequantisation depends on nothing else
        p = replace(p, tokens=(), operator="dequantize_4bit")
        odd = replace(p, rows=p.rows - 1, columns=p.columns - 1)  # not a whole number of words
        kernel, default = launch.key("dequantize_4bit", dtype), dequantize.heuristic(device)
        variants = [*(replace(p, **kind) for kind in _VARIANTS), odd]
        threads = default["UNITS"] // default["num_warps"]  # per warp
        candidates = [{**config, "UNITS": threads * config["num_warps"]} for config in _DEQUANTIZE_GRID]
        yield Tunable(kernel, (p.rows * p.columns,), default, candidates, p, variants)
    for p, tile in itertools.product(weights, matmul.TILES):
        p, name = replace(p, tokens=(tile,)), f"matmul_4bit/{tile}"
        kernel, default = launch.key(name, dtype), matmul.heuristic(name, p.rows, p.columns)
        variants = [replace(p, dtype=torch.float16, **kind) for kind in _VARIANTS]
        held = {launch.key("matmul_4bit.path", dtype): {"PATH": paths.FUSED}}
        yield Tunable(kernel, (p.rows, p.columns), default, _PRODUCT_GRID, p, variants, held)
    for p, count in itertools.product(weights, paths.COUNTS[: 4 if reduced else None]):
        for of_tokens in (dtype, torch.float32) if count <= 8 and not reduced else (dtype,):
            there = {paths.LIBRARY: True, paths.FUSED: paths.has_fused(of_tokens, device)}
            there[paths.BITSANDBYTES] = paths.has_bitsandbytes()
            default = {"PATH": paths.heuristic_path(count, of_tokens, device)}
            candidates = [{"PATH": path} for path, is_there in there.items() if is_there]
            if default not in candidates:  # an unavailable path is not measured
                default = candidates[-1]
            kernel, problem = launch.key("matmul_4bit.path", of_tokens), replace(p, tokens=(count,), dtype=of_tokens)
            if len(candidates) > 1:
                yield Tunable(kernel, (count, p.rows, p.columns), default, candidates, problem)


_ROWS = grid(TILE=(2048, 4096, 8192), num_warps=(4, 8))
_ELEMENTS = grid(BLOCK=(1024, 2048, 4096), num_warps=(4, 8))


def _frozen(reduced: bool, device: torch.device) -> Iterator[Tunable]:
    """Lists the frozen model's element-wise kernels, with the rows of a training step of known models."""
    tokens, dtype = (3, torch.float16) if reduced else (8 * 296, torch.bfloat16)  # the interpreter truncates bfloat16
    norms = [RMSNorm(tokens, d, dtype=dtype) for d in ((20,) if reduced else (768, 4096))]
    turned = Rotary(1, n=tokens, dtype=dtype) if reduced else Rotary(8, 32, 32, 296, 128, 128, dtype)
    gated, relu = (
        Activation((tokens, 40 if reduced else 11008), dtype=dtype, operator=o) for o in ("gated_activation", "relu")
    )
    of_all = [
        *((p, (p.d,), _ROWS) for norm in norms for p in (norm, norm.backward)),
        (turned, (turned.width,), grid(BLOCK_H=(4, 8, 16, 32), num_warps=(4, 8))),
        *((p, (1,), _ELEMENTS) for problem in (gated, relu) for p in (problem, problem.backward)),
    ]
    for problem, size, candidates in of_all:
        default = frozen.heuristic(problem.operator, size[0], device)
        yield Tunable(launch.key(problem.operator, dtype), size, default, candidates, problem)
