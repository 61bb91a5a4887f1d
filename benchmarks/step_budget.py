"""Counts launches, bytes and operations of a training step on meta tensors, by kind of work: no GPU, no weights.

python -m benchmarks.step_budget [--models t5-base:32 llama-2-7b:8] [--length 256] [--prompt 40] [--operators]

A step is forward and backward of the frozen model in bfloat16, starting from the input embeddings and ending with their
gradient. Every operator that is not a view counts as one launch, and its bytes are those of its tensors, each read or
written once. Attention counts as one launch forward and one backward, as on a GPU, and not as the products and the
softmax that run on meta tensors. With 4-bit weights there is also a dequantisation for every product and its gradient.
"""

from __future__ import annotations

import argparse
import collections
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ept.model.frozen import restore_frozen, swap_frozen
from ept.profile.kinds import ATTENTION, ELEMENT_WISE, KINDS, PRODUCTS, kind_of
from ept.profile.shapes import shape_config

from .tables import markdown

LABELS = 2  # per row
MODULES = ("its own", "fused")

# Operators that move nothing.
_VIEWS = {
    "view", "_unsafe_view", "t", "transpose", "permute", "expand", "slice", "select", "unsqueeze", "squeeze", "split",
    "as_strided", "detach", "alias", "_reshape_alias", "unbind", "unsafe_split", "split_with_sizes", "view_as",
    "empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "_local_scalar_dense",
}  # fmt: skip


class Counted(TorchDispatchMode):
    """Counts launches and bytes of every operator, and the operations of products."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: collections.Counter[str] = collections.Counter()
        self.bytes: collections.Counter[str] = collections.Counter()
        self.operations = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        if name == "_local_scalar_dense":  # a model checks whether anything is masked
            return True
        out = function(*args, **(kwargs or {}))
        if name not in _VIEWS:
            tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, Tensor)]
            self.count(name, *tensors)
            if kind_of(name) == PRODUCTS:
                self.operations += 2 * args[-2].numel() * args[-1].shape[-1]
        return out

    def count(self, name: str, *tensors: Tensor) -> None:
        """Counts a launch that reads or writes `tensors`; an expanded tensor counts only its real elements."""
        self.launches[name] += 1
        self.bytes[name] += sum(min(x.nbytes, x.untyped_storage().nbytes()) for x in tensors)

    def by_kind(self) -> dict[str, tuple[int, int]]:
        """Returns launches and bytes by kind of work."""
        totals = dict.fromkeys(KINDS, (0, 0))
        for name, launches in self.launches.items():
            before = totals[kind_of(name)]
            totals[kind_of(name)] = before[0] + launches, before[1] + self.bytes[name]
        return totals


class _Attention(torch.autograd.Function):
    """An attention that computes nothing, counted as one launch in each direction."""

    @staticmethod
    def forward(ctx: Any, counted: Counted, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        ctx.counted, ctx.mask = counted, mask
        ctx.save_for_backward(q, k, v)
        out = q.new_empty(*q.transpose(1, 2).shape[:-1], v.shape[-1]).transpose(1, 2)
        counted.count(ATTENTION, q, k, v, out, *([] if mask is None else [mask]))
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        tensors = ctx.saved_tensors
        grads = [torch.empty_like(x) for x in tensors]
        ctx.counted.count(ATTENTION, grad, *tensors, *grads, *([] if ctx.mask is None else [ctx.mask]))
        return None, *grads, None


class _OneLaunchAttention(TorchFunctionMode):
    def __init__(self, counted: Counted) -> None:
        super().__init__()
        self.counted = counted

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is torch.nn.functional.scaled_dot_product_attention:
            mask = kwargs.get("attn_mask", args[3] if len(args) > 3 else None)
            return _Attention.apply(self.counted, *args[:3], mask)
        return function(*args, **kwargs)


def count_step(model: Any, batch: int, positions: int) -> Counted:
    """Counts one step of a frozen model on the meta device."""
    embeds = torch.empty(
        batch, positions, model.config.hidden_size, dtype=torch.bfloat16, device="meta", requires_grad=True
    )
    labels = torch.empty(batch, LABELS, dtype=torch.long, device="meta")
    inputs: dict[str, Any] = {"inputs_embeds": embeds, "labels": labels, "use_cache": False}
    if not model.config.is_encoder_decoder:
        inputs |= {"logits_to_keep": LABELS, "position_ids": torch.empty(batch, positions, device="meta").long()}
    with Counted() as counted:
        with _OneLaunchAttention(counted):
            loss = model(**inputs).loss
        loss.backward()
    return counted


def build(name: str) -> Any:
    """Builds a frozen model of a known shape without memory for its weights."""
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    config = shape_config(name)
    auto: Any = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    with torch.device("meta"):
        return auto.from_config(config, dtype=torch.bfloat16).eval().requires_grad_(False)


def compare(name: str, batch: int, positions: int) -> tuple[Counted, Counted]:
    """Counts a step of the model as it is, and with its element-wise work fused."""
    model = build(name)
    restore_frozen(model)
    before = count_step(model, batch, positions)
    swap_frozen(model)
    return before, count_step(model, batch, positions)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["t5-base:32", "llama-2-7b:8"], help="shape:batch")
    parser.add_argument("--length", type=int, default=256, help="text tokens per row")
    parser.add_argument("--prompt", type=int, default=40, help="virtual tokens before them")
    parser.add_argument("--operators", action="store_true", help="also list every operator that moves much")
    options = parser.parse_args()
    counted: dict[str, tuple[Counted, Counted]] = {}
    for text in options.models:
        name, _, batch = text.partition(":")
        positions = options.length + options.prompt
        counted[f"{name}, {batch} × {positions}"] = compare(name, int(batch or 8), positions)
    print(table(counted))
    for step, both in counted.items() if options.operators else ():
        for modules, found in zip(MODULES, both):
            for operator, number in found.bytes.most_common(12):
                print(f"{step}, {modules}: {operator} {found.launches[operator]} launches, {number / 1e9:.2f} GB")


def table(counted: dict[str, tuple[Counted, Counted]]) -> str:
    """Returns the counts by step, with the model's own modules and with fused ones, as a Markdown table."""
    lines = []
    for step, both in counted.items():
        for modules, found in zip(MODULES, both):
            kinds = found.by_kind()
            launches = sum(found.launches.values()), kinds[ELEMENT_WISE][0]
            gigabytes = [f"{kinds[kind][1] / 1e9:.1f}" for kind in (ELEMENT_WISE, ATTENTION)]
            lines.append([step, modules, *map(str, launches), *gigabytes, f"{found.operations / 1e12:.1f}"])
    columns = ["model", "modules", "launches", "element-wise", "element-wise GB", "attention GB", "TFLOP in products"]
    return markdown(columns, lines)


if __name__ == "__main__":
    main()
