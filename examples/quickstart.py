"""EPT on a tiny random Llama in a few lines: train, generate, save, load. Runs offline in seconds."""

from __future__ import annotations

import tempfile

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from ept import EPTConfig, EPTModel, get_ept_model
from ept.runs.trainer import parameter_groups


def main(steps: int = 100) -> tuple[float, float]:
    """Teaches the frozen model to answer every text with token 7; returns the loss of the first and the last step."""
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=200, pad_token_id=0, bos_token_id=1, eos_token_id=2, **shape))
    model = get_ept_model(base, EPTConfig(task_type="CAUSAL_LM", num_virtual_tokens=8, max_length=16, r=4))
    model.print_trainable_parameters()

    text = torch.randint(10, 200, (16, 12))
    answer = torch.full((16, 1), 7)
    input_ids = torch.cat([text, answer], dim=1)
    labels = torch.cat([torch.full_like(text, -100), answer], dim=1)  # -100: input text, not to be learned
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.05, 0.01))  # the rates of `ept train`
    losses = []
    for _ in range(steps):
        loss = model(input_ids=input_ids, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())

    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        base = model.get_base_model()
        model = EPTModel.from_pretrained(base, folder)
    generated = model.generate(input_ids=text[:2], max_new_tokens=1)
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}; the loaded adapter answers {generated[:, -1].tolist()}")
    return losses[0], losses[-1]


if __name__ == "__main__":
    main()
