"""Label smoothing by transformers' Trainer, which takes the labels out of a batch: refused with one sentence."""

from __future__ import annotations

import sys

_FRAMES = 12  # from `forward` up to the Trainer's `compute_loss`, through wrappers of accelerate and torch


def refuse_label_smoothing() -> None:
    """Raises ValueError if the caller is a Trainer with `label_smoothing_factor`.

    The Trainer would compute the loss itself, and fail deep inside: it looks for the class of a PEFT model where LoRA
    keeps it, and does not know of the prompt's rows in the logits. A model is not told why its labels are missing, so
    this inspects the caller.
    """
    frame = sys._getframe(1)
    for _ in range(_FRAMES):
        if getattr(frame.f_locals.get("self"), "label_smoother", None) is not None:
            raise ValueError(
                "label_smoothing_factor does not work with prompts: the Trainer computes that loss without knowing of "
                "the prompt's rows; set it to 0, or give the Trainer a compute_loss_func (a decoder's logits begin "
                "with the prompt's rows)"
            )
        if frame.f_back is None:
            return
        frame = frame.f_back
