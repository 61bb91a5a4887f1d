"""The element-wise work of a frozen model: RMSNorm, rotary position embedding, gated activation, ReLU.

The weights are frozen, so every backward computes only the gradient of the inputs. All it needs beyond what the model
holds anyway is one number per row of a norm and one bit per element of a ReLU.

    h = x + residual                     [..., d]
    y = h / rms(h) · weight              [..., d]    rms(h) = √(mean(h²) + ε)
    q·cos + rotate(q)·sin                [batch, heads, n, width]
    φ(gate) ⊙ up                         [..., width]
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from ..library import Choices, check_shapes, compute_dtype, register

# By family: the number that its norm adds to the weight, and True if normalised rows are rounded before the product.
FORMS = Choices(
    "form",
    llama=(0.0, True),  # Llama, Mistral, Qwen
    t5=(0.0, True),  # as Llama, but the result has the weight's dtype
    olmo=(0.0, False),
    gemma=(1.0, False),
)

# φ by name, and the gradient of φ(x) from that of its result.
ACTIVATIONS = Choices(
    "activation",
    silu=(F.silu, torch.ops.aten.silu_backward),
    gelu=(F.gelu, torch.ops.aten.gelu_backward),
    gelu_tanh=(
        lambda x: F.gelu(x, approximate="tanh"),
        lambda grad, x: torch.ops.aten.gelu_backward(grad, x, approximate="tanh"),
    ),
    relu=(F.relu, lambda grad, x: torch.ops.aten.threshold_backward(grad, x, 0)),
)

NORM = "x *rows d, weight d, residual *rows d"
NORM_BACKWARD = "h *rows d, grad_output *rows d, weight d, rstd *rows 1, grad_h *rows d"
ROTARY = "q batch heads n width, k batch fewer n width, cos rows n columns, sin rows n columns"
ACTIVATION = "grad_output *shape, gate *shape, up *shape"


def rms_norm_reference(
    x: Tensor, weight: Tensor, residual: Tensor | None = None, eps: float = 1e-6, form: str = "llama"
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes RMSNorm of `x`, or of `x + residual`.

    Args:
        x: `[..., d]`. residual: of x's shape, or None.
        weight: `[d]`.
        eps: added to the mean square.
        form: `llama`, `t5`, `olmo` or `gemma`, which differ in where they round.

    Returns:
        The normalised rows in x's dtype (`t5`: in the weight's); `x + residual`, rounded to x's dtype, or an empty
        tensor; and 1/rms `[..., 1]` in float32, for the backward. Computed in float32 (float64 if any input is).
    """
    dtype = compute_dtype(x, weight)
    offset, rounds_first = FORMS[form]
    out_dtype = weight.dtype if form == "t5" else x.dtype
    total = x if residual is None else (x + residual).to(x.dtype).contiguous()
    h = total.to(dtype)
    rstd = torch.linalg.vector_norm(h, dim=-1, keepdim=True).square_().div_(h.shape[-1]).add_(eps).rsqrt_()
    out = h.contiguous() * rstd
    if rounds_first:
        out = out.to(out_dtype).to(dtype)
    out = out.mul_(offset + weight.to(dtype)).to(out_dtype)
    return out, x.new_empty(0) if residual is None else total, rstd


def rms_norm_backward_reference(
    grad_output: Tensor, h: Tensor, weight: Tensor, rstd: Tensor, grad_h: Tensor | None = None, form: str = "llama"
) -> Tensor:
    """Computes the gradient of the rows that were normalised.

    Args:
        grad_output: `[..., d]`, gradient of the normalised rows.
        h: the rows that were normalised: `x`, or `x + residual`, whose gradients are the same.
        weight, rstd, form: as in the forward.
        grad_h: gradient that reaches `h` past the norm, or None.

    Returns:
        The sum of both gradients, like `h`.
    """
    dtype = compute_dtype(grad_output, h, weight)
    rows, grad = h.to(dtype), grad_output.to(dtype) * (FORMS[form][0] + weight.to(dtype))
    along = torch.linalg.vecdot(grad, rows)[..., None]  # [..., 1]
    grad = grad.mul_(rstd).addcmul_(rows, rstd.pow(3).mul_(along).div_(-h.shape[-1]))
    return (grad if grad_h is None else grad.add_(grad_h)).to(h.dtype).contiguous()


def rotary_reference(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False, backward: bool = False
) -> tuple[Tensor, Tensor]:
    """Rotates pairs of columns of queries and keys by their position's angles.

    Args:
        q: `[batch, heads, n, width]`. k: `[batch, at most that many heads, n, width]`.
        cos, sin: `[batch or 1, n, columns]`, for an even number of leading columns; the others stay the same.
        interleaved: column 2i makes a pair with 2i + 1 (GPT-J, Cohere) instead of i with i + columns / 2 (Llama).
        backward: `q` and `k` are gradients of the results; computes those of the inputs.

    Returns:
        Both, rotated, in their dtype, laid out as `[batch, n, heads, width]`.
    """
    dtype, half = compute_dtype(q, cos), cos.shape[-1] // 2
    check_shapes(f"cos rows n {2 * min(half, q.shape[-1] // 2)}", cos=cos)
    first, second = (slice(0, None, 2), slice(1, None, 2)) if interleaved else (slice(half), slice(half, None))
    angles = cos[:, None].to(dtype), sin[:, None].to(dtype)
    (cos_1, cos_2), (sin_1, sin_2) = ((x[..., first], x[..., second]) for x in angles)
    if backward:  # the transposed matrix
        sin_1, sin_2 = -sin_2, -sin_1

    def rotated(x: Tensor) -> Tensor:
        out = _by_token(x, dtype)
        rows, turned = x[..., : 2 * half].to(dtype), out[..., : 2 * half]
        a, b = rows[..., first], rows[..., second]
        torch.mul(a, cos_1, out=turned[..., first]).addcmul_(b, sin_1, value=-1)
        torch.mul(b, cos_2, out=turned[..., second]).addcmul_(a, sin_2)
        out[..., 2 * half :] = x[..., 2 * half :]
        return out.to(x.dtype)

    return rotated(q), rotated(k)


def _by_token(x: Tensor, dtype: torch.dtype) -> Tensor:
    batch, heads, n, width = x.shape
    return x.new_empty(batch, n, heads, width, dtype=dtype).transpose(1, 2)


def gated_activation_reference(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """Computes `φ(gate) ⊙ up`, rounded once.

    Args:
        gate, up: of one shape and dtype, which the result has too.
        activation: φ: `silu`, `gelu` (exact), `gelu_tanh` or `relu`.
    """
    dtype = compute_dtype(gate)
    return (ACTIVATIONS[activation][0](gate.to(dtype)) * up.to(dtype)).to(gate.dtype).contiguous()


def gated_activation_backward_reference(
    grad_output: Tensor, gate: Tensor, up: Tensor, activation: str
) -> tuple[Tensor, Tensor]:
    """Computes the gradients of `gate` and `up`, each rounded once; arguments as in the forward."""
    dtype = compute_dtype(gate)
    function, derivative = ACTIVATIONS[activation]
    grad, x = grad_output.to(dtype), gate.to(dtype)
    gradients = derivative(grad * up.to(dtype), x).to(gate.dtype), (grad * function(x)).to(up.dtype)
    return gradients[0].contiguous(), gradients[1].contiguous()


def relu_reference(x: Tensor) -> tuple[Tensor, Tensor]:
    """Computes `max(x, 0)`, and one bit per element for the backward: `[⌈elements / 8⌉]` uint8, lowest bit first."""
    passes = F.pad(~(x <= 0).reshape(-1), (0, -x.numel() % 8)).view(-1, 8)  # NaN passes
    return F.relu(x.contiguous()), (passes * _bits(x)).sum(1, dtype=torch.uint8)


def relu_backward_reference(grad_output: Tensor, passes: Tensor) -> Tensor:
    """Computes the gradient of x: that of the output where x was positive, else 0."""
    check_shapes(f"passes {-(-grad_output.numel() // 8)}", passes=passes)
    is_set = (passes[:, None] & _bits(passes)).bool().view(-1)[: grad_output.numel()]
    return torch.where(is_set.view(grad_output.shape), grad_output, 0)


def _bits(x: Tensor) -> Tensor:
    return torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=x.device)


def _rms_norm_fake(x, weight, residual=None, eps=1e-6, form="llama"):
    out = torch.empty_like(x, dtype=weight.dtype if form == "t5" else x.dtype, memory_format=torch.contiguous_format)
    total = x.new_empty(0 if residual is None else x.shape)
    return out, total, x.new_empty(*x.shape[:-1], 1, dtype=compute_dtype(x, weight))


rms_norm = register(
    'rms_norm(Tensor x, Tensor weight, Tensor? residual=None, float eps=1e-6, str form="llama") '
    "-> (Tensor, Tensor, Tensor)",
    rms_norm_reference,
    _rms_norm_fake,
    launcher="frozen.launchers",
    shapes=NORM,
)
rms_norm_backward = register(
    "rms_norm_backward(Tensor grad_output, Tensor h, Tensor weight, Tensor rstd, Tensor? grad_h=None, "
    'str form="llama") -> Tensor',
    rms_norm_backward_reference,
    lambda grad_output, h, *_, **__: h.new_empty(h.shape),
    launcher="frozen.launchers",
    shapes=NORM_BACKWARD,
)
rotary = register(
    "rotary(Tensor q, Tensor k, Tensor cos, Tensor sin, bool interleaved=False, bool backward=False) "
    "-> (Tensor, Tensor)",
    rotary_reference,
    lambda q, k, *_, **__: (_by_token(q, q.dtype), _by_token(k, k.dtype)),
    launcher="frozen.launchers",
    shapes=ROTARY,
)
gated_activation = register(
    "gated_activation(Tensor gate, Tensor up, str activation) -> Tensor",
    gated_activation_reference,
    lambda gate, up, activation: gate.new_empty(gate.shape),
    launcher="frozen.launchers",
    shapes=ACTIVATION,
)
gated_activation_backward = register(
    "gated_activation_backward(Tensor grad_output, Tensor gate, Tensor up, str activation) -> (Tensor, Tensor)",
    gated_activation_backward_reference,
    lambda grad_output, gate, up, activation: (gate.new_empty(gate.shape), up.new_empty(up.shape)),
    launcher="frozen.launchers",
    shapes=ACTIVATION,
)
relu = register(
    "relu(Tensor x) -> (Tensor, Tensor)",
    relu_reference,
    lambda x: (x.new_empty(x.shape), x.new_empty((x.numel() + 7) // 8, dtype=torch.uint8)),
    launcher="frozen.launchers",
)
relu_backward = register(
    "relu_backward(Tensor grad_output, Tensor passes) -> Tensor",
    relu_backward_reference,
    lambda grad_output, passes: grad_output.new_empty(grad_output.shape),
    launcher="frozen.launchers",
)
