"""Cases to measure, from the shapes of known models, in the order in which they are measured.

Cases with goals come first, so that a run that is cut short has them. Three tables: `gpu` (everything),
`cpu` (a small subset that two cores finish in minutes) and `reduced` (tiny sizes, to test the code; their figures
mean nothing).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple


class ModelShape(NamedTuple):
    """Embedding width, vocabulary, and `(rows, columns)` of the distinct frozen linear layers."""

    width: int
    vocabulary: int
    layers: tuple[tuple[int, int], ...]


KNOWN = {
    "T5-base": ModelShape(768, 32128, ((768, 768), (3072, 768), (768, 3072))),
    "T5-large": ModelShape(1024, 32128, ((1024, 1024), (4096, 1024), (1024, 4096))),
    "T5-11B": ModelShape(1024, 32128, ((16384, 1024), (1024, 16384), (65536, 1024), (1024, 65536))),
    "Llama-2-7B": ModelShape(4096, 32000, ((4096, 4096), (11008, 4096), (4096, 11008))),
    "Llama-3-8B": ModelShape(4096, 128256, ((4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336))),
}
# On a CPU, bitsandbytes 0.50 is wrong if a row is shorter than a block.
MODELS = {**KNOWN, "tiny": ModelShape(32, 128, ((128, 64),))}

# Versions of a case that are compared. "ours again" is ours a second time, which shows the noise.
OURS, OURS_AGAIN, EAGER, COMPILED = "ours", "ours again", "reference", "torch.compile"
BITSANDBYTES, PEFT, DENSE = "bitsandbytes", "PEFT", "unquantised"
MODEL, LIGER = "the model's own", "Liger"
COPY = "a copy"  # of as many bytes as the case must move: the ceiling at its size
PROMPT_PROVIDERS = (OURS, OURS_AGAIN, EAGER)
FOUR_BIT_PROVIDERS = (OURS, OURS_AGAIN, BITSANDBYTES)
PRODUCTS = ("matmul_4bit", "matmul_4bit_backward")
FROZEN = ("rms_norm", "rotary", "gated_activation")
EMBEDDINGS = ("prompted_embedding", "prompted_embedding_backward", "prompted_embedding_packed")
BY_TOKEN = ("prompted_embedding_by_token", "prompted_embedding_by_token_backward")


@dataclass(frozen=True)
class Case:
    """One operator at one size, and its versions, which are measured side by side.

    Attributes:
        kernel: the operator; `joint_prompt` is its forward and backward together.
        model: whose shape it is.
        size: the numbers that define it, by name.
        dtype: of the output.
        providers: the versions.
        scheme: of a 4-bit weight, `nf4`, `nf4 nested`, `fp4`; empty otherwise.
    """

    kernel: str
    model: str
    size: dict[str, int] = field(hash=False)
    dtype: str = "bfloat16"
    providers: tuple[str, ...] = PROMPT_PROVIDERS
    scheme: str = ""

    @property
    def id(self) -> str:
        size = ",".join(f"{name}={value}" for name, value in self.size.items())
        return "/".join(filter(None, (self.kernel, self.model, self.dtype, self.scheme, size)))

    def only(self, *providers: str) -> Case:
        return replace(self, providers=providers)

    def without(self, provider: str) -> Case:
        return self.only(*(name for name in self.providers if name != provider))


def embedding(kernel: str, model: str, batch: int, length: int, **how: Any) -> Case:
    """Makes a case of `prompted_embedding`, its packed or token-dependent form, or a backward.

    Args:
        how: `prompt` (40) and `rank` (30; 0 is prompt tuning, which PEFT has), `dtype`, and whether it is `compiled`.
    """
    shape, size = MODELS[model], {"prompt": 40, "rank": 30}
    size |= {name: how.pop(name) for name in size if name in how}
    compiled = (COMPILED,) if how.pop("compiled", False) else ()
    providers = (*PROMPT_PROVIDERS, *compiled, *((PEFT,) if size["rank"] == 0 else ()))
    text = {"batch": batch, "length": length, "width": shape.width, "vocabulary": shape.vocabulary}
    return Case(kernel, model, text | size, providers=providers, **how)


def joint(model: str, compiled: bool = True, **size: int) -> Case:
    """Makes a case of `joint_prompt`, forward and backward."""
    usual = {"prompt": 40, "width": MODELS[model].width, "rank": 30, "spaces": 4, "space_width": 2, "positions": 256}
    return Case("joint_prompt", model, usual | size, "float32", (*PROMPT_PROVIDERS, *((COMPILED,) if compiled else ())))


def dequantize(
    model: str, rows: int, columns: int, *, dtype: str = "bfloat16", scheme: str = "nf4 nested", compiled: bool = False
) -> Case:
    providers = (*FOUR_BIT_PROVIDERS, EAGER, *((COMPILED,) if compiled else ()))
    return Case("dequantize_4bit", model, {"rows": rows, "columns": columns}, dtype, providers, scheme)


def products(model: str, rows: int, columns: int, tokens: tuple[int, ...], dtype: str = "bfloat16") -> list[Case]:
    """Makes cases of `matmul_4bit` and its backward for every number of tokens M."""
    providers = (*FOUR_BIT_PROVIDERS, DENSE)
    return [
        Case(kernel, model, {"m": m, "rows": rows, "columns": columns}, dtype, providers, "nf4 nested")
        for kernel in PRODUCTS
        for m in tokens
    ]


# Cases with goals.
ALL_M = tuple(2**power for power in range(14))  # 1 … 8192
FEW_M = (1, 32, 256, 2048)
GOAL_FORWARD, GOAL_BACKWARD = (embedding(kernel, "Llama-2-7B", 32, 512, compiled=True) for kernel in EMBEDDINGS[:2])
GOAL_JOINT = (joint("T5-base"), joint("Llama-2-7B"))
GOAL_DEQUANTIZE = dequantize("Llama-3-8B", 4096, 4096, compiled=True)
GOAL_DEQUANTIZE_LARGE = dequantize("Llama-3-8B", 14336, 4096, compiled=True)
GOAL_LAYERS = ((4096, 4096), (4096, 14336), (14336, 4096))
ALL_PRODUCTS = [case for layer in GOAL_LAYERS for case in products("Llama-3-8B", *layer, ALL_M)]
GOAL_PRODUCTS = [case for case in ALL_PRODUCTS if case.kernel == "matmul_4bit"]
# The rows of a training step of Llama-2-7B: 8 texts of 40 + 256 positions.
FROZEN_PROVIDERS = (OURS, OURS_AGAIN, EAGER, MODEL, LIGER)
GOAL_FROZEN = tuple(
    Case(kernel, "Llama-2-7B", {"rows": 8 * 296, "width": 4096}, providers=FROZEN_PROVIDERS) for kernel in FROZEN
)


GOAL_CASES = (
    GOAL_FORWARD,
    GOAL_BACKWARD,
    *GOAL_JOINT,
    GOAL_DEQUANTIZE,
    GOAL_DEQUANTIZE_LARGE,
    *GOAL_FROZEN,
    *GOAL_PRODUCTS,
)


def gpu_cases() -> list[Case]:
    """Returns everything, for a GPU."""
    cases = [*GOAL_CASES, *ALL_PRODUCTS]
    for kernel in EMBEDDINGS:
        cases += [embedding(kernel, model, 32, 256, compiled=model == "T5-base") for model in KNOWN]
        cases += [embedding(kernel, "T5-base", 32, 256, dtype=dtype) for dtype in ("float32", "float16")]
    for kernel in BY_TOKEN:
        cases += [
            embedding(kernel, model, 32, length, compiled=True)
            for model, length in (("T5-base", 256), ("Llama-2-7B", 512))
        ]
    for kernel in EMBEDDINGS[:2]:
        cases += [embedding(kernel, "Llama-2-7B", batch, 512) for batch in (1, 2, 4, 8, 16, 64)]
        cases += [embedding(kernel, model, 32, 256, prompt=100, rank=0) for model in ("T5-base", "Llama-2-7B")]
    cases.append(joint("T5-large", compiled=False))
    cases.append(joint("Llama-3-8B", prompt=100, rank=60, spaces=8, space_width=4, compiled=False))
    cases += [dequantize(model, *layer) for model, shape in KNOWN.items() for layer in shape.layers]
    cases += [dequantize("Llama-2-7B", 4096, 4096, dtype=dtype) for dtype in ("float16", "float32")]
    cases += [dequantize("Llama-2-7B", 4096, 4096, scheme=scheme) for scheme in ("nf4", "fp4", "fp4 nested")]
    for model in ("Llama-2-7B", "T5-base", "T5-large", "T5-11B"):
        for layer in KNOWN[model].layers:
            if layer != (4096, 4096):  # measured above for every M
                cases += products(model, *layer, FEW_M)
    for dtype in ("float16", "float32"):
        cases += products("T5-base", 3072, 768, FEW_M, dtype)
    return [case.only(*case.providers, COPY) for case in _distinct(cases)]


def cpu_cases() -> list[Case]:
    """Returns the subset that `make bench` measures: T5-base and the narrow layers of Llama-3-8B, float32. The first
    case of every kernel comes before all others, so that a run that is cut short has each.
    """
    cases = []
    for kernel in EMBEDDINGS:
        cases.append(embedding(kernel, "T5-base", 8, 128, compiled=True, dtype="float32"))
        cases.append(embedding(kernel, "Llama-2-7B", 2, 128, dtype="float32"))
    cases += [embedding(kernel, "T5-base", 8, 128, compiled=True, dtype="float32") for kernel in BY_TOKEN]
    for kernel in EMBEDDINGS[:2]:
        cases.append(embedding(kernel, "T5-base", 8, 128, prompt=100, rank=0, dtype="float32"))
        cases += [embedding(kernel, "T5-base", batch, 128, dtype="float32") for batch in (1, 4, 16)]
    cases += [joint("T5-base"), joint("Llama-2-7B", compiled=False)]
    for model, rows, columns in (("T5-base", 768, 768), ("T5-base", 3072, 768), ("Llama-3-8B", 1024, 4096)):
        cases += [dequantize(model, rows, columns, dtype="float32")]
        cases += products(model, rows, columns, (1, 64), "float32")
    first = {case.kernel: case for case in reversed(cases)}
    return _distinct([*reversed(first.values()), *cases])


def reduced_cases() -> list[Case]:
    """Returns every kernel once or twice at sizes that take no time."""
    tiny: dict[str, Any] = {"model": "tiny", "batch": 2, "length": 8, "prompt": 3, "dtype": "float32"}
    cases = [embedding(kernel, rank=4, **tiny) for kernel in (*EMBEDDINGS, *BY_TOKEN)]
    cases += [embedding(kernel, rank=0, **tiny) for kernel in EMBEDDINGS[:2]]
    cases += [Case(kernel, "tiny", {"rows": 16, "width": 256}, "float32", FROZEN_PROVIDERS) for kernel in FROZEN]
    cases.append(joint("tiny", prompt=3, rank=4, spaces=2, positions=8, compiled=False))
    (layer,) = MODELS["tiny"].layers
    cases += [dequantize("tiny", *layer, dtype="float32"), *products("tiny", *layer, (1, 4), "float32")]
    return [case.only(*case.providers, COPY) for case in cases]


def rehearsal_cases() -> list[Case]:
    """Returns the cases with goals, with only small numbers of tokens for products."""
    return [case for case in GOAL_CASES if case.size.get("m", 1) in (1, 16, 64, 2048)]


TABLES = {"gpu": gpu_cases, "cpu": cpu_cases, "reduced": reduced_cases, "rehearsal": rehearsal_cases}


def _distinct(cases: list[Case]) -> list[Case]:
    first: dict[str, Case] = {}
    for case in cases:
        first.setdefault(case.id, case)
    return list(first.values())
