"""The prompted input of the model, `[P; W[id] + scale·A[pos]·B]`, in one pass, and its backward.

Letters as in the method: `W` the frozen embedding table, `P` the (joint) prompt, `A·B` the low-rank update of the input
embeddings, indexed by the token's position among the real tokens of its text. Position −1 means no update.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from ..library import compute_dtype, register

_PARAMETERS = "A {adapter_ids}m r, B {adapter_ids}r d, adapter_ids batch"
FORWARD = "input_ids batch n, positions batch n, table rows d, prompt {adapter_ids}s d, " + _PARAMETERS
BACKWARD = "grad_output batch all d, positions batch n, " + _PARAMETERS


def prompted_embedding_reference(
    input_ids: Tensor,
    positions: Tensor,
    table: Tensor,
    prompt: Tensor,
    A: Tensor,
    B: Tensor,
    scale: float,
    adapter_ids: Tensor | None = None,
    token_at: Tensor | None = None,
) -> Tensor:
    """Computes prompt rows followed by the updated embeddings of the tokens.

    Args:
        input_ids: `[batch, n]` integer rows of `table`.
        positions: `[batch, n]` integer rows of `A`; −1 (any negative) leaves the token's embedding as it is.
        table: `[vocabulary, d]` the frozen embeddings `W`, any floating dtype.
        prompt: `[s, d]`, or `[adapters, s, d]` with `adapter_ids`.
        A: `[m, r]`, or `[adapters, m, r]` with `adapter_ids`. `r` may be 0.
        B: `[r, d]`, or `[adapters, r, d]` with `adapter_ids`.
        scale: factor of `A·B`, in the table's units.
        adapter_ids: `[batch]` integers choosing the adapter of each row; negative: no update (the caller masks the
            prompt).
        token_at: `token_at(positions, m)` if the caller has it, for the kernels; not used here.

    Returns:
        `[batch, s + n, d]` in the table's dtype, accumulated in float32 (float64 for float64 inputs), rounded once.
    """
    dtype = compute_dtype(table, prompt, A)
    tokens = F.embedding(input_ids, table).to(dtype)  # [batch, n, d]
    if adapter_ids is None:
        prompt_rows = prompt.to(dtype).expand(input_ids.shape[0], -1, -1)  # [batch, s, d]
    else:
        prompt_rows = prompt.to(dtype)[adapter_ids]
    if A.numel():
        is_updated, index, A, B = positions >= 0, positions.clamp(min=0), A.to(dtype), B.to(dtype)
        if adapter_ids is None:
            rows = A[index]  # [batch, n, r]
        else:
            is_updated = is_updated & (adapter_ids >= 0)[:, None]
            rows, B = A[adapter_ids[:, None], index], B[adapter_ids]
        tokens = torch.where(is_updated[..., None], tokens + scale * (rows @ B), tokens)
    return torch.cat([prompt_rows, tokens], dim=1).to(table.dtype)


def prompted_embedding_packed_reference(
    input_ids: Tensor, cu_seqlens: Tensor, table: Tensor, prompt: Tensor, A: Tensor, B: Tensor, scale: float
) -> Tensor:
    """Computes the same for a padding-free batch: every text is preceded by the prompt's rows.

    Args:
        input_ids: `[tokens]`, the texts one after another.
        cu_seqlens: `[texts + 1]` int32 or int64, where each text begins in `input_ids`, and the end: `0 … tokens`.
            Checked on a CPU; kernels trust the values, because reading them would synchronise with the device.
        table, prompt, A, B, scale: as for `prompted_embedding_reference`; every token is updated.

    Returns:
        `[tokens + texts·s, d]` in the table's dtype.
    """
    if cu_seqlens.device.type == "cpu":
        ends = cu_seqlens.tolist()
        if ends[:1] != [0] or ends[-1] != len(input_ids) or ends != sorted(ends):
            raise ValueError(f"cu_seqlens must rise from 0 to the number of tokens, {len(input_ids)}, got {ends}")
    starts = cu_seqlens.to(torch.int64)
    s, texts = prompt.shape[0], starts.numel() - 1
    index = torch.arange(input_ids.shape[0], device=input_ids.device)
    text_of = torch.searchsorted(starts[1:].contiguous(), index, right=True)  # [tokens]
    positions = index - starts[text_of]
    rows = prompted_embedding_reference(input_ids[None], positions[None], table, prompt, A, B, scale)[0]
    out = rows.new_empty(input_ids.shape[0] + texts * s, table.shape[1])
    out[index + (text_of + 1) * s] = rows[s:]
    prompt_at = (starts[:-1] + torch.arange(texts, device=starts.device) * s)[:, None]  # [texts, 1]
    out[prompt_at + torch.arange(s, device=starts.device)] = rows[:s]
    return out


def token_at_reference(positions: Tensor, m: int) -> Tensor:
    """Inverts positions: which token of a row is at each of the `m` positions, −1 for none.

    Args:
        positions: `[batch, n]` integers, each at most once in a row; those below 0 or from `m` on are ignored.

    Returns:
        `[batch, m]` int32.
    """
    batch, n = positions.shape
    index = torch.arange(n, dtype=torch.int32, device=positions.device).expand(batch, n)
    slot = torch.where((positions >= 0) & (positions < m), positions, m).to(torch.int64)  # m: a spare one
    found = torch.full((batch, m + 1), -1, dtype=torch.int32, device=positions.device).scatter(1, slot, index)
    return found[:, :m].contiguous()


def prompted_embedding_backward_reference(
    grad_output: Tensor,
    positions: Tensor,
    A: Tensor,
    B: Tensor,
    scale: float,
    adapter_ids: Tensor | None = None,
    token_at: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes gradients of the prompt, `A` and `B`; the table is frozen and gets none.

    Args:
        grad_output: `[batch, s + n, d]`, gradient of the forward's output.
        positions: `[batch, n]` as in the forward; a position occurs at most once in a row.
        A, B, scale, adapter_ids, token_at: as in the forward.

    Returns:
        `grad_prompt` `[s, d]`, `grad_A` like `A`, `grad_B` like `B` (with a leading adapter axis where
        `A` has one), summed over the batch in row order, in A's dtype.
    """
    dtype = compute_dtype(grad_output, A)
    n = positions.shape[1]
    of_prompt, of_text = grad_output.to(dtype).split([grad_output.shape[1] - n, n], dim=1)
    m, r = A.shape[-2:]
    grad_prompt = _sum_rows(of_prompt, adapter_ids, A)
    if r == 0 or n == 0:
        return grad_prompt.to(A.dtype), A.new_zeros(A.shape), A.new_zeros(B.shape)
    # Every text's gradient rows are gathered at their positions (no atomics; by whole rows, which is faster than
    # `take_along_dim` entry by entry), then summed in row order.
    token_at = token_at_reference(positions, m) if token_at is None else token_at
    text = torch.arange(len(positions), device=positions.device)[:, None]
    at_position = of_text[text, token_at.clamp(min=0).long()]  # [batch, m, d]
    summed = _sum_rows(at_position * (token_at >= 0)[..., None], adapter_ids, A)  # [m, d], or [adapters, m, d]
    grad_A = scale * (summed @ B.to(dtype).mT)
    grad_B = scale * (A.to(dtype).mT @ summed)
    return grad_prompt.to(A.dtype), grad_A.to(A.dtype), grad_B.to(A.dtype)


def _sum_rows(rows: Tensor, adapter_ids: Tensor | None, A: Tensor) -> Tensor:
    """Sums `rows` `[batch, …]` over the batch, or over each adapter's part of it, in row order."""
    if adapter_ids is None:
        return rows.sum(0)
    chosen = adapter_ids[None, :] == torch.arange(A.shape[0], device=adapter_ids.device)[:, None]  # [adapters, batch]
    return torch.tensordot(chosen.to(rows.dtype), rows, dims=1)


def _backward_fake(grad_output, positions, A, B, scale, adapter_ids=None, token_at=None):
    s = grad_output.shape[1] - positions.shape[1]
    shapes = (*A.shape[:-2], s, grad_output.shape[2]), A.shape, B.shape
    return tuple(A.new_empty(shape) for shape in shapes)


prompted_embedding = register(
    "prompted_embedding(Tensor input_ids, Tensor positions, Tensor table, Tensor prompt, Tensor A, Tensor B, "
    "float scale, Tensor? adapter_ids=None, Tensor? token_at=None) -> Tensor",
    prompted_embedding_reference,
    lambda input_ids, positions, table, prompt, *_: table.new_empty(
        input_ids.shape[0], prompt.shape[-2] + input_ids.shape[1], table.shape[1]
    ),
    launcher="prompted_embedding.launchers",
    shapes=FORWARD,
)
prompted_embedding_packed = register(
    "prompted_embedding_packed(Tensor input_ids, Tensor cu_seqlens, Tensor table, Tensor prompt, Tensor A, Tensor B, "
    "float scale) -> Tensor",
    prompted_embedding_packed_reference,
    lambda input_ids, cu_seqlens, table, prompt, *_: table.new_empty(
        input_ids.shape[0] + (cu_seqlens.shape[0] - 1) * prompt.shape[0], table.shape[1]
    ),
    launcher="prompted_embedding.launchers",
    shapes="input_ids tokens, cu_seqlens ends, table rows d, prompt s d, A m r, B r d",
)
prompted_embedding_backward = register(
    "prompted_embedding_backward(Tensor grad_output, Tensor positions, Tensor A, Tensor B, float scale, "
    "Tensor? adapter_ids=None, Tensor? token_at=None) -> (Tensor, Tensor, Tensor)",
    prompted_embedding_backward_reference,
    _backward_fake,
    launcher="prompted_embedding.launchers",
    shapes=BACKWARD,
)
token_at = register(
    "token_at(Tensor positions, int m) -> Tensor",
    token_at_reference,
    lambda positions, m: positions.new_empty(positions.shape[0], m, dtype=torch.int32),
    launcher="prompted_embedding.launchers",
    shapes="positions batch n",
)
