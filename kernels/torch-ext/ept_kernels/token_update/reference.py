"""The prompted input `[P; e + scale·(relu(e/scale·W_in + b_in)·W_out + b_out)]`, `e = W[id]`, and its backward.

The token-dependent update of ADePT (ICLR 2025), a function of the token alone; letters as in the method. Position −1
means no update. `scale` is the unit of the parameters, the embeddings' root mean square.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from ..library import compute_dtype, register

FORWARD = "input_ids batch n, positions batch n, table rows d, prompt s d, W_in d r, b_in r, W_out r d, b_out d"
BACKWARD = "grad_output batch all d, input_ids batch n, positions batch n, table rows d, W_out r d, hidden batch n r"


def prompted_embedding_by_token_reference(
    input_ids: Tensor,
    positions: Tensor,
    table: Tensor,
    prompt: Tensor,
    W_in: Tensor,
    b_in: Tensor,
    W_out: Tensor,
    b_out: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Computes prompt rows followed by the updated embeddings of the tokens.

    Args:
        input_ids: `[batch, n]` integer rows of `table`.
        positions: `[batch, n]` integers; a negative one leaves the token's embedding as it is.
        table: `[vocabulary, d]` the frozen embeddings `W`, any floating dtype.
        prompt: `[s, d]`.
        W_in, b_in, W_out, b_out: `[d, r]`, `[r]`, `[r, d]` and `[d]`, of the bottleneck.
        scale: unit of the update, in the table's units.

    Returns:
        `[batch, s + n, d]` in the table's dtype, accumulated in float32 (float64 for float64 inputs), rounded once; and
        for the backward the bottleneck's activations, `[batch, n, r]` in the accumulation dtype, 0 without an update.
    """
    dtype = compute_dtype(table, prompt, W_in)
    W_in, b_in, W_out, b_out = (x.to(dtype) for x in (W_in, b_in, W_out, b_out))
    tokens = F.embedding(input_ids, table).to(dtype)  # [batch, n, d]
    is_updated = (positions >= 0)[..., None]
    hidden = torch.where(is_updated, torch.relu(tokens @ W_in / scale + b_in), 0.0)
    tokens = torch.where(is_updated, tokens + scale * (hidden @ W_out + b_out), tokens)
    prompt_rows = prompt.to(dtype).expand(input_ids.shape[0], -1, -1)
    return torch.cat([prompt_rows, tokens], dim=1).to(table.dtype), hidden.contiguous()


def prompted_embedding_by_token_backward_reference(
    grad_output: Tensor,
    input_ids: Tensor,
    positions: Tensor,
    table: Tensor,
    W_out: Tensor,
    hidden: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Computes gradients of the prompt and of the bottleneck; the table is frozen and gets none.

    Args:
        grad_output: `[batch, s + n, d]`, gradient of the forward's first output.
        hidden: the forward's second output. The others as in the forward.

    Returns:
        gradients of `prompt`, `W_in`, `b_in`, `W_out` and `b_out`, summed over the batch, in W_out's dtype; and that of
        the activation's input, `[batch, n, r]` in hidden's dtype, which a gradient of the table would need.
    """
    dtype = compute_dtype(grad_output, table, W_out)
    n = positions.shape[1]
    of_prompt, of_text = grad_output.to(dtype).split([grad_output.shape[1] - n, n], dim=1)
    of_text = torch.where((positions >= 0)[..., None], of_text, 0.0)
    hidden = hidden.to(dtype)
    before = torch.where(hidden > 0, scale * (of_text @ W_out.to(dtype).mT), 0.0)
    tokens = F.embedding(input_ids, table).to(dtype)
    grad_W_in = tokens.flatten(0, 1).mT @ before.flatten(0, 1) / scale
    grad_W_out = scale * (hidden.flatten(0, 1).mT @ of_text.flatten(0, 1))
    of_all = (of_prompt.sum(0), grad_W_in, before.sum((0, 1)), grad_W_out, scale * of_text.sum((0, 1)))
    grad_prompt, grad_W_in, grad_b_in, grad_W_out, grad_b_out = (x.to(W_out.dtype) for x in of_all)
    return grad_prompt, grad_W_in, grad_b_in, grad_W_out, grad_b_out, before.contiguous()


def _fake(input_ids, positions, table, prompt, W_in, b_in, W_out, b_out, scale):
    batch, n = input_ids.shape
    hidden = table.new_empty(batch, n, W_in.shape[1], dtype=compute_dtype(table, prompt, W_in))
    return table.new_empty(batch, prompt.shape[0] + n, table.shape[1]), hidden


def _backward_fake(grad_output, input_ids, positions, table, W_out, hidden, scale):
    r, d = W_out.shape
    shapes = (grad_output.shape[1] - positions.shape[1], d), (d, r), (r,), (r, d), (d,)
    before = hidden.new_empty(hidden.shape, dtype=compute_dtype(grad_output, table, W_out))
    return *(W_out.new_empty(shape) for shape in shapes), before


prompted_embedding_by_token = register(
    "prompted_embedding_by_token(Tensor input_ids, Tensor positions, Tensor table, Tensor prompt, Tensor W_in, "
    "Tensor b_in, Tensor W_out, Tensor b_out, float scale) -> (Tensor, Tensor)",
    prompted_embedding_by_token_reference,
    _fake,
    launcher="token_update.launchers",
    shapes=FORWARD,
)
prompted_embedding_by_token_backward = register(
    "prompted_embedding_by_token_backward(Tensor grad_output, Tensor input_ids, Tensor positions, Tensor table, "
    "Tensor W_out, Tensor hidden, float scale) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    prompted_embedding_by_token_backward_reference,
    _backward_fake,
    launcher="token_update.launchers",
    shapes=BACKWARD,
)
