"""Adapters as a release saved them, with what they answered, for later releases to load.

    python tests/versions/release_fixtures.py    writes adapter_<version>/ for this version; refuses to change one

Nothing in them depends on a random generator: base model and adapter are filled by a formula.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

HERE = Path(__file__).resolve().parent
EXPECTED_NAME = "expected.safetensors"
# name: (family, fields of the configuration)
ADAPTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "decoder": ("llama", {"num_virtual_tokens": 3, "max_length": 6, "r": 2, "fusion_dim": 2}),
    "classifier": ("bert", {"num_virtual_tokens": 2, "max_length": 6, "r": 1, "num_spaces": 1}),
    "encoder_decoder": ("t5", {"num_virtual_tokens": 2, "max_length": 6, "r": 2, "fusion": False, "num_spaces": 0}),
}


def fill(model: torch.nn.Module, size: float = 0.3) -> None:
    """Gives every parameter values between −size and size that depend on its shape and its place alone."""
    with torch.no_grad():
        for number, (_, parameter) in enumerate(sorted(model.named_parameters())):
            index = torch.arange(parameter.numel(), dtype=torch.float64)
            parameter.copy_((size * torch.sin(1.7 * index + number)).view(parameter.shape))


def base_model(family: str) -> Any:
    from tiny_models import make_model

    model = make_model(family)
    fill(model)
    return model


def batch_for(family: str) -> dict[str, torch.Tensor]:
    """Two texts of unequal length, padded on the right, written out."""
    batch = {"input_ids": torch.tensor([[5, 17, 40, 62], [9, 33, 1, 1]]), "attention_mask": torch.ones(2, 4).long()}
    batch["attention_mask"][1, 2:] = 0
    if family == "t5":
        batch["decoder_input_ids"] = torch.tensor([[1, 8], [1, 11]])
    return batch


def answers(model: Any, family: str) -> dict[str, torch.Tensor]:
    """The prompt that the adapter joins, and the model's logits with it."""
    with torch.no_grad():
        logits = model(**batch_for(family)).logits
        return {"prompt": model.get_prompt()[0].clone(), "logits": logits.contiguous()}


def write(folder: Path) -> None:
    from ept import EPTConfig, get_ept_model

    for name, (family, fields) in ADAPTERS.items():
        model = get_ept_model(base_model(family), EPTConfig(**fields)).eval()
        fill(model.prompt_encoder)
        for _, head in model.base_model.named_modules():
            if hasattr(head, "modules_to_save"):
                fill(head.modules_to_save, size=0.5)
        model.save_pretrained(folder / name)
        save_file(answers(model, family), folder / name / EXPECTED_NAME)


def expected(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / EXPECTED_NAME)


if __name__ == "__main__":
    import ept

    sys.path.insert(0, str(HERE.parent))
    target = HERE / f"adapter_{ept.__version__}"
    if target.exists():
        sys.exit(f"{target.name} exists: a release's adapters never change; raise ept.__version__ first")
    write(target)
    print(target)
