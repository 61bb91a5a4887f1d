"""Operator inputs in one place, for the tuner, the ahead-of-time compiler, tests, opcheck and benchmarks.

A problem is one call of one operator: sizes and types, arguments made from a seed, the right result, and how far from
it a kernel may be. `problem.inputs(device, seed)` are the arguments as the schema and the launcher take them.
Letters as in the method; a size of 0 switches its part off.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..four_bit.reference import dequantize_parts
from ..four_bit.weight import BLOCK_SIZES, FourBitWeight
from ..library import reference_of

# Largest error of a result, in units of its largest magnitude: one unit in the last place of 16 bits.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2**-10, torch.bfloat16: 2**-7}
TOLERANCE |= {torch.int32: 0.0, torch.uint8: 0.0}
TF32 = 2**-9  # error of a product of two factors that are cut off after ten bits, in units of its magnitude

NESTED_BLOCK_SIZE = 256
PRODUCT_DTYPES = (torch.bfloat16, torch.float16)  # that a 4-bit weight is multiplied with by a kernel of ours

Device = torch.device | str
_P = TypeVar("_P", bound="Problem")


@dataclass(frozen=True)
class Problem(ABC):
    """One call of the operator `operator`."""

    operator: str = field(default="", kw_only=True)
    strided: bool = field(default=False, kw_only=True)  # whether tensors have gaps in every dimension

    @property
    def sizes(self) -> str:
        """Names what differs from the defaults."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}
        changed = (f"{name}={value}" for name, value in values.items() if name not in ("operator", "vocabulary"))
        return ",".join(changed).replace("torch.", "")

    @property
    def name(self) -> str:
        return f"{self.operator} {self.sizes}".strip()

    @property
    def backward(self: _P) -> _P:
        """Returns the problem of the gradients of this one's operator."""
        return replace(self, operator=f"{self.operator}_backward")

    @property
    def small(self: _P) -> _P:
        """Returns the same kernels on little data: fewer texts, since nothing is compiled for their number."""
        return self

    def laid_out(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Puts gaps between the elements of `tensors`, if asked for."""
        return tuple(strided(x) for x in tensors) if self.strided else tensors

    @abstractmethod
    def inputs(self, device: Device = "cpu", seed: int = 0) -> tuple[Any, ...]:
        """Makes arguments of the operator, of realistic content; equal for equal devices and seeds."""

    def expected(self, *inputs: Any) -> tuple[Tensor, ...]:
        """Computes the results for `inputs` by the operator's reference in float64."""
        return as_tuple(reference_of(self.operator)(*in_float64(inputs)))

    def tolerance(self, dtype: torch.dtype) -> float:
        """Bounds the error of a result in `dtype`, in units of its largest magnitude; 0: every bit is equal."""
        return TOLERANCE[dtype]

    def errors_allowed(
        self, actual: Sequence[Tensor], expected: Sequence[Tensor], inputs: tuple[Any, ...]
    ) -> list[float]:
        """Bounds the largest error of each of the `actual` results for `inputs`, of which the exact ones are known."""
        return [self.tolerance(a.dtype) * largest(e) for a, e in zip(actual, expected, strict=True)]


class _InTF32(Problem):
    """A problem whose kernel multiplies in TF32 where its results are rounded to 16 bits."""

    def errors_allowed(
        self, actual: Sequence[Tensor], expected: Sequence[Tensor], inputs: tuple[Any, ...]
    ) -> list[float]:
        """Adds what truncated factors make of the sum of magnitudes, since what was added up may cancel."""
        allowed = super().errors_allowed(actual, expected, inputs)
        if all(a.dtype.itemsize != 2 for a in actual):
            return allowed
        magnitudes = (x.abs() if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs)
        sums = self.expected(*magnitudes)
        return [x + TF32 * largest(e) * (a.dtype.itemsize == 2) for x, a, e in zip(allowed, actual, sums, strict=True)]


@dataclass(frozen=True)
class PromptedEmbedding(_InTF32):
    """A padded batch.

    Attributes:
        padding: `none`, `left`, `right`, or `shuffled`: on the right, and positions in no order. Row by row there is
            more of it, from none to nothing but padding.
        dtype: of table and gradient. parameters: of prompt, A and B. ids: of ids and positions.
        adapters: how many, mixed, some rows with none; 0: one, without `adapter_ids`.
    """

    n: int = 63
    d: int = 64
    s: int = 5
    m: int = 70
    r: int = 3
    batch: int = 3
    padding: str = "right"
    dtype: torch.dtype = torch.float32
    parameters: torch.dtype = torch.float32
    ids: torch.dtype = torch.int64
    adapters: int = 0
    vocabulary: int = 37
    scale: float = 1.7
    operator: str = field(default="prompted_embedding", kw_only=True)

    @property
    def packed(self) -> PackedEmbedding:
        """Returns as many texts of that length without padding."""
        sizes = {name: getattr(self, name) for name in ("s", "d", "r", "dtype", "ids", "vocabulary", "scale")}
        return PackedEmbedding((self.n,) * self.batch, **sizes)

    @property
    def small(self) -> PromptedEmbedding:
        return replace(self, n=min(self.n, 32), batch=min(self.batch, 2), vocabulary=min(self.vocabulary, 64))

    def inputs(self, device: Device = "cpu", seed: int = 0, table: Tensor | None = None) -> tuple[Any, ...]:
        """Makes arguments; `table` in place of a new one, should many sets of inputs share a large one."""
        g = torch.Generator(device).manual_seed(seed)
        positions = self.positions().to(device, self.ids)
        prompt, A, B = low_rank_prompt(g, self.s, self.m, self.r, self.d, self.parameters, self.adapters)
        adapter_ids = None
        if self.adapters:  # none, the last one, …, the first, none, …
            adapter_ids = (-torch.arange(self.batch) % (self.adapters + 1) - 1).to(device, self.ids)
        if self.operator == "prompted_embedding_backward":
            grad = normal(g, self.batch, self.s + self.n, self.d).to(self.dtype)
            return *self.laid_out(grad, positions, A, B), self.scale, adapter_ids
        ids = random_ids(g, self.batch * self.n, self.vocabulary).view(self.batch, self.n).to(self.ids)
        table = normal(g, self.vocabulary, self.d).to(self.dtype) if table is None else table
        return *self.laid_out(ids, positions, table, prompt, A, B), self.scale, adapter_ids

    def positions(self) -> Tensor:
        """Counts the real tokens of each text: `[batch, n]`."""
        rows = torch.full((self.batch, self.n), -1)
        for b in range(self.batch):
            padding = 0 if self.padding == "none" else min(b * (self.n + 1) // max(self.batch - 1, 1), self.n)
            text = torch.arange(min(self.n - padding, self.m))
            if self.padding == "shuffled":
                text = torch.randperm(self.m, generator=torch.Generator().manual_seed(b))[: text.numel()]
            start = self.n - text.numel() if self.padding == "left" else 0
            rows[b, start : start + text.numel()] = text
        return rows


@dataclass(frozen=True)
class TokenAt(Problem):
    """Positions of the tokens of a padded batch, of which the first `m` are asked for."""

    n: int = 5
    m: int = 6
    operator: str = field(default="token_at", kw_only=True)

    def inputs(self, device: Device = "cpu", seed: int = 0) -> tuple[Any, ...]:
        return PromptedEmbedding(n=self.n).positions().to(device), self.m


@dataclass(frozen=True)
class PackedEmbedding(_InTF32):
    """Texts of so many tokens each, one after another; fields as of `PromptedEmbedding`."""

    lengths: tuple[int, ...] = (3, 1, 70)
    s: int = 5
    d: int = 64
    r: int = 3
    dtype: torch.dtype = torch.float32
    ids: torch.dtype = torch.int64
    vocabulary: int = 37
    scale: float = 1.7
    operator: str = field(default="prompted_embedding_packed", kw_only=True)

    @property
    def small(self) -> PackedEmbedding:
        return replace(self, lengths=self.lengths[:2], vocabulary=min(self.vocabulary, 64))

    def inputs(self, device: Device = "cpu", seed: int = 0, table: Tensor | None = None) -> tuple[Any, ...]:
        g = torch.Generator(device).manual_seed(seed)
        ids = random_ids(g, sum(self.lengths), self.vocabulary).to(self.ids)
        cu_seqlens = torch.tensor([0, *self.lengths]).cumsum(0).to(device, self.ids)
        table = normal(g, self.vocabulary, self.d).to(self.dtype) if table is None else table
        parameters = low_rank_prompt(g, self.s, max(self.lengths, default=0), self.r, self.d)
        return *self.laid_out(ids, cu_seqlens, table, *parameters), self.scale


@dataclass(frozen=True)
class JointPrompt(Problem):
    """Sizes of a joint prompt: `K` spaces of width `h`, maps of width `a`.

    Scores, gates and activations are of order one. `scale` is that of the entries of prompt, A and B.
    """

    s: int = 5
    d: int = 64
    m: int = 7
    r: int = 3
    K: int = 4
    h: int = 2
    a: int = 0
    fusion: bool = True
    activation: str = "gelu"
    dtype: torch.dtype = torch.float32
    scale: float = 1.0
    operator: str = field(default="joint_prompt", kw_only=True)

    def inputs(self, device: Device = "cpu", seed: int = 0) -> tuple[Any, ...]:
        arguments = (*self.parameters(device, seed), *self.options())
        return (self.grad_output(device, seed), *arguments) if self.operator.endswith("backward") else arguments

    def parameters(self, device: Device = "cpu", seed: int = 0) -> list[Tensor]:
        """Draws prompt, A, B, beta, W_q, W_k, D, U, G."""
        g = torch.Generator(device).manual_seed(seed)
        columns, gates, small = self.K * self.h, self.K if self.K > 1 else 0, self.d**-0.5
        tensors = [self.scale * x for x in low_rank_prompt(g, self.s, self.m, self.r, self.d)]
        tensors += [normal(g, int(self.fusion)), small * normal(g, self.d, self.a), small * normal(g, self.d, self.a)]
        tensors += [small * normal(g, self.d, columns), normal(g, columns, self.d), small * normal(g, self.d, gates)]
        return [*self.laid_out(*(x.to(self.dtype) for x in tensors))]

    def options(self) -> tuple[float, float, float, str]:
        """Returns lowrank_scale, embedding_scale, score_scale, activation; the softmax is not saturated."""
        return 1.3, 0.7, 2.0 / self.a**0.5 if self.a else 8.0 / self.d, self.activation

    def grad_output(self, device: Device = "cpu", seed: int = 0) -> Tensor:
        grad = normal(torch.Generator(device).manual_seed(seed + 1), self.s, self.d)
        return self.laid_out(grad.to(self.dtype))[0]

    def tolerance(self, dtype: torch.dtype) -> float:
        """Allows ten times as much in float32: gradients' summands cancel, and a wrong kernel is off by far more."""
        return max(super().tolerance(dtype), 1e-4)


@dataclass(frozen=True)
class FourBit(Problem):
    """A 4-bit weight, and `tokens`, the leading dimensions of what it is multiplied with.

    The bytes are drawn, not quantised: every level occurs, and no quantiser is needed.

    Attributes:
        dtype: of tokens and results. bias: its type; None: there is none.
        strided: of the tokens. shift: bytes by which the packed weight is off a whole word's address.
    """

    rows: int
    columns: int
    tokens: tuple[int, ...] = (5,)
    quant_type: str = "nf4"
    block_size: int = 64
    nested: bool = True
    dtype: torch.dtype = torch.float16
    bias: torch.dtype | None = None
    shift: int = 0
    operator: str = field(default="matmul_4bit", kw_only=True)

    def inputs(self, device: Device = "cpu", seed: int = 0) -> tuple[Any, ...]:
        weight = self.weight(device, seed)
        if self.operator == "dequantize_4bit":
            return *weight.tensors, *weight.sizes, self.dtype
        if self.operator == "matmul_4bit_backward":
            return self.random(self.rows, device, seed), *weight.tensors, *weight.sizes
        bias = self.bias_tensor(device, seed)
        return self.random(self.columns, device, seed), *weight.tensors, bias, *weight.sizes

    def weight(self, device: Device = "cpu", seed: int = 0) -> FourBitWeight:
        g = torch.Generator(device).manual_seed(seed)
        elements = self.rows * self.columns
        blocks = -(-elements // self.block_size)

        def random_bytes(count: int) -> Tensor:
            return torch.randint(0, 256, (count,), generator=g, device=device, dtype=torch.uint8)

        parts: dict[str, Any] = {"packed": random_bytes(self.shift + -(-elements // 2))[self.shift :]}
        if self.nested:
            parts["absmax"] = random_bytes(blocks)
            groups = -(-blocks // NESTED_BLOCK_SIZE)
            parts["nested_absmax"] = torch.rand(groups, generator=g, device=device) / 2
            parts["nested_code"] = torch.linspace(-1, 1, 256, device=device)
            parts["nested_offset"] = torch.ones((), device=device)
            parts["nested_block_size"] = NESTED_BLOCK_SIZE
        else:
            parts["absmax"] = torch.rand(blocks, generator=g, device=device) + 0.5
        sizes = {name: getattr(self, name) for name in ("quant_type", "block_size", "rows", "columns")}
        return FourBitWeight(**parts, **sizes)

    def random(self, width: int, device: Device = "cpu", seed: int = 0) -> Tensor:
        """Draws what the weight is multiplied with: `[*tokens, width]`."""
        x = normal(torch.Generator(device).manual_seed(seed + 1), *self.tokens, width)
        return self.laid_out(x.to(self.dtype))[0]

    def bias_tensor(self, device: Device = "cpu", seed: int = 0) -> Tensor | None:
        if self.bias is None:
            return None
        return normal(torch.Generator(device).manual_seed(seed + 2), self.rows).to(self.bias)

    def expected(self, *inputs: Any) -> tuple[Tensor, ...]:
        """Dequantises the weight, rounds it to the tokens' type and multiplies in float64."""
        if self.operator == "dequantize_4bit":
            return (dequantize_parts(*inputs),)
        x, *weight = inputs
        bias = weight.pop(5) if self.operator == "matmul_4bit" else None
        W = dequantize_parts(*weight, x.dtype).double()  # type: ignore[call-arg]
        out = x.double() @ (W.T if self.operator == "matmul_4bit" else W)
        return (out if bias is None else out + bias.double(),)

    def tolerance(self, dtype: torch.dtype) -> float:
        return 0.0 if self.operator == "dequantize_4bit" else super().tolerance(dtype)


@dataclass(frozen=True)
class RMSNorm(Problem):
    """Rows of a frozen norm.

    Attributes:
        weight: its dtype; None: that of the rows. residual: whether one is added, or, backward, a gradient of it.
    """

    rows: int = 5
    d: int = 64
    form: str = "llama"
    dtype: torch.dtype = torch.float32
    weight: torch.dtype | None = None
    residual: bool = False
    operator: str = field(default="rms_norm", kw_only=True)

    @property
    def small(self) -> RMSNorm:
        return replace(self, rows=min(self.rows, 64))

    def tolerance(self, dtype: torch.dtype) -> float:
        """Allows three roundings: of the sum, of the normalised rows, and of these times the weight."""
        return 3 * super().tolerance(dtype)

    def inputs(self, device: Device = "cpu", seed: int = 0) -> tuple[Any, ...]:
        g = torch.Generator(device).manual_seed(seed)
        x, other, residual = (normal(g, 1, self.rows, self.d).to(self.dtype) for _ in range(3))
        weight = (normal(g, self.d) / 8 + (0 if self.form == "gemma" else 1)).to(self.weight or self.dtype)
        x, other, weight, residual = self.laid_out(x, other, weight, residual)
        if self.operator == "rms_norm":
            return x, weight, residual if self.residual else None, 1e-6, self.form
        rstd = reference_of("rms_norm")(x, weight, None, 1e-6, self.form)[2]
        return (
            other.to(weight.dtype if self.form == "t5" else x.dtype),
            x,
            weight,
            rstd,
            (residual if self.residual else None),
            self.form,
        )


@dataclass(frozen=True)
class Rotary(Problem):
    """Queries and keys; `columns` of their `width` are rotated. shared: all texts have the same angles."""

    batch: int = 2
    q_heads: int = 4
    k_heads: int = 2
    n: int = 5
    width: int = 16
    columns: int = 16
    dtype: torch.dtype = torch.float32
    shared: bool = False
    interleaved: bool = False
    is_backward: bool = False
    operator: str = field(default="rotary", kw_only=True)

    @property
    def small(self) -> Rotary:
        return replace(self, n=min(self.n, 16))

    def inputs(self, device: Device = "cpu", seed: int = 0) -> tuple[Any, ...]:
        g = torch.Generator(device).manual_seed(seed)
        q, k = (normal(g, self.batch, self.n, h, self.width).to(self.dtype) for h in (self.q_heads, self.k_heads))
        angles = normal(g, 1 if self.shared else self.batch, self.n, self.columns)
        q, k, cos, sin = self.laid_out(q, k, angles.cos().to(self.dtype), angles.sin().to(self.dtype))
        return q.transpose(1, 2), k.transpose(1, 2), cos, sin, self.interleaved, self.is_backward


@dataclass(frozen=True)
class Activation(Problem):
    """Elements of an activation: `gated_activation`, or `relu`, which has no gate."""

    shape: tuple[int, ...] = (3, 43)
    activation: str = "silu"
    dtype: torch.dtype = torch.float32
    operator: str = field(default="gated_activation", kw_only=True)

    def inputs(self, device: Device = "cpu", seed: int = 0) -> tuple[Any, ...]:
        g = torch.Generator(device).manual_seed(seed)
        grad, gate, up = self.laid_out(*(2 * normal(g, *self.shape).to(self.dtype) for _ in range(3)))
        if self.operator.startswith("relu"):
            return (gate,) if self.operator == "relu" else (grad, reference_of("relu")(gate)[1])
        return (gate, up, self.activation) if self.operator == "gated_activation" else (grad, gate, up, self.activation)


# Training batches without padding, joint prompts and frozen weights (rows, columns) of known models.
T5_BASE = PromptedEmbedding(256, 768, 40, 256, 30, 32, "none", torch.bfloat16, vocabulary=32128)
LLAMA_7B = PromptedEmbedding(512, 4096, 40, 512, 60, 32, "none", torch.bfloat16, vocabulary=32000)
T5_BASE_JOINT = JointPrompt(s=40, d=768, m=256, r=30)
LLAMA_7B_JOINT = JointPrompt(s=100, d=4096, m=512, r=60, K=8, h=4)
WEIGHTS = ((4096, 4096), (14336, 4096), (4096, 14336), (768, 768), (3072, 768))


def opcheck_problems() -> list[Problem]:
    """Lists every operator in every form of its arguments, at sizes that take no time."""
    embedding = PromptedEmbedding(n=5, d=8, s=2, m=6, r=2)
    mixed = replace(embedding, adapters=2)
    joint = JointPrompt(s=3, d=12, r=2)
    product = FourBit(5, 67, (2,), dtype=torch.float32, bias=torch.float32)
    dequantized = FourBit(5, 67, operator="dequantize_4bit")
    return [
        *(x for problem in (embedding, mixed, joint) for x in (problem, problem.backward)),
        PackedEmbedding((5, 0, 3), s=2, d=8, r=2, ids=torch.int32),
        TokenAt(),
        *(replace(dequantized, nested=nested) for nested in (False, True)),
        *(replace(product, nested=nested, bias=bias) for nested in (False, True) for bias in (torch.float32, None)),
        *(replace(product, nested=nested, operator="matmul_4bit_backward") for nested in (False, True)),
        *(x for p in (RMSNorm(form="gemma"), RMSNorm(residual=True), Activation()) for x in (p, p.backward)),
        *(Rotary(columns=8, interleaved=interleaved, is_backward=interleaved) for interleaved in (False, True)),
        *(Activation(operator=operator) for operator in ("relu", "relu_backward")),
    ]


def compiled_problems() -> list[Problem]:
    """Lists every kernel in each form that a compiler makes something else of, at sizes of known models."""
    bf16, f16, f32, f64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
    embeddings = [
        T5_BASE,
        LLAMA_7B,
        replace(LLAMA_7B, r=30, adapters=2),
        replace(LLAMA_7B, r=0, dtype=f16),
        replace(T5_BASE, dtype=f32, adapters=2, ids=torch.int32),
        replace(LLAMA_7B, dtype=f32),
    ]
    joints = [
        *(replace(problem, a=a) for problem in (T5_BASE_JOINT, LLAMA_7B_JOINT) for a in (0, 16)),
        replace(T5_BASE_JOINT, dtype=bf16),
        replace(LLAMA_7B_JOINT, fusion=False, m=0, r=0, dtype=f16),
    ]
    # dtype, block size, nested, shift
    kinds = [(bf16, 64, False, 0), (bf16, 64, True, 0), (bf16, 4096, True, 0), (bf16, 64, True, 1)]
    kinds += [(f16, 64, True, 0), (f32, 32, True, 0), (f32, 64, False, 1), (f64, 64, True, 0)]
    products = [
        FourBit(4096, 4096, dtype=bf16, nested=False),
        FourBit(256, 256, dtype=bf16, bias=bf16),  # not split
        FourBit(4096, 4096, block_size=4096, dtype=bf16),
        FourBit(4096, 4096, block_size=32),
    ]
    products = [replace(problem, tokens=(tokens,)) for problem in products for tokens in (16, 32, 64)]
    return [
        *(x for problem in [*embeddings, *joints] for x in (problem.small, problem.small.backward)),
        *products,
        *(problem.packed.small for problem in embeddings if not problem.adapters),
        *frozen_problems(),
        *(
            FourBit(4096, 4096, (), "nf4", size, nested, dtype, shift=shift, operator="dequantize_4bit")
            for dtype, size, nested, shift in kinds
        ),
    ]


def frozen_problems() -> list[Problem]:
    """Lists the frozen model's element-wise kernels in each form that a compiler makes something else of."""
    bf16, f16, f32 = torch.bfloat16, torch.float16, torch.float32
    norms = [
        RMSNorm(64, 4096, dtype=bf16, residual=True),
        RMSNorm(64, 768, "t5", bf16),
        RMSNorm(64, 768, "t5", f32, weight=bf16),
        RMSNorm(64, 3072, "gemma", bf16),
        RMSNorm(64, 128, dtype=f16),
        RMSNorm(64, 16384, dtype=f32, residual=True),
        RMSNorm(64, 2048, "olmo", bf16),
    ]
    rotaries = [Rotary(2, 32, 32, 16, 128, 128, bf16), Rotary(2, 32, 8, 16, 128, 128, f32, shared=True)]
    rotaries += [Rotary(2, 16, 16, 16, 256, 64, f16, interleaved=interleaved) for interleaved in (False, True)]
    gated = [
        Activation((64, 4096), name, dtype) for name in ("silu", "gelu", "gelu_tanh", "relu") for dtype in (bf16, f32)
    ]
    relus = [Activation((64, 4096), dtype=dtype, operator="relu") for dtype in (bf16, f32)]
    return [
        *(x for problem in [*norms, *gated, *relus] for x in (problem, problem.backward)),
        *(replace(problem, is_backward=is_backward) for problem in rotaries for is_backward in (False, True)),
    ]


def every_four_bit_problem() -> list[FourBit]:
    """Lists the 4-bit operators for every type, block size, nesting and address there is, and for tokens with and
    without a bias, for odd numbers of rows and strides that 16 does not divide.
    """
    found = []
    for size, nested in itertools.product(BLOCK_SIZES, (False, True)):
        weight = FourBit(4096, 4096, block_size=size, nested=nested)
        for dtype, shift in itertools.product((*PRODUCT_DTYPES, torch.float32, torch.float64), (0, 1)):
            found.append(replace(weight, tokens=(), dtype=dtype, shift=shift, operator="dequantize_4bit"))
        for dtype, tokens, bias, odd in itertools.product(PRODUCT_DTYPES, (16, 32, 64), (False, True), (False, True)):
            problem = replace(weight, tokens=(tokens,), dtype=dtype, bias=dtype if bias else None)
            found.append(replace(problem, rows=4095, strided=True) if odd else problem)
    return found


def normal(g: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=g, device=g.device)


def low_rank_prompt(
    g: torch.Generator, s: int, m: int, r: int, d: int, dtype: torch.dtype = torch.float32, adapters: int = 0
) -> list[Tensor]:
    """Draws the short prompt `[s, d]`, A `[m, r]` and B `[r, d]`, of so many adapters."""
    lead = (adapters,) if adapters else ()
    return [normal(g, *lead, *shape).to(dtype) for shape in ((s, d), (m, r), (r, d))]


def random_ids(g: torch.Generator, count: int, vocabulary: int) -> Tensor:
    """Draws rows of the table, each at most once where there are enough."""
    if count <= vocabulary:
        return torch.randperm(vocabulary, generator=g, device=g.device)[:count]
    return torch.randint(vocabulary, (count,), generator=g, device=g.device)


def strided(x: Tensor) -> Tensor:
    """Lays the same values out with gaps in every dimension; NaN, or an index far outside, lies between them."""
    poison = float("nan") if x.is_floating_point() else torch.iinfo(x.dtype).max // 2
    wide = torch.full([2 * size + 1 for size in x.shape], poison, dtype=x.dtype, device=x.device)
    gaps = tuple(slice(1, None, 2) for _ in x.shape)
    wide[gaps] = x
    return wide[gaps]


def in_float64(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Converts the floating-point tensors among `inputs` to float64."""
    return tuple(x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs)


def largest(x: Tensor) -> float:
    """Returns the largest magnitude in `x`, 0 for none."""
    return float(x.double().abs().max()) if x.numel() else 0.0


def as_tuple(result: Any) -> tuple[Tensor, ...]:
    """Lists an operator's results, also where there is only one."""
    return (result,) if isinstance(result, Tensor) else tuple(result)
