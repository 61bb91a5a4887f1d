"""`EPTLayer` in a plain PyTorch loop: no PEFT model, no transformers. Runs offline in seconds.

A frozen random network reads 11 tokens and is to say whether most of them come from the upper half of the vocabulary.
Only the layer in front of it learns.
"""

from __future__ import annotations

import torch
from torch import nn

from ept import EPTConfig, EPTLayer

VOCABULARY, WIDTH, TOKENS = 200, 64, 11


def main(steps: int = 300) -> tuple[float, float]:
    """Trains, and returns the accuracy on 512 fresh rows before and after."""
    torch.manual_seed(0)
    embedding = nn.Embedding(VOCABULARY, WIDTH)
    block = nn.TransformerEncoderLayer(WIDTH, nhead=4, dim_feedforward=128, dropout=0.0, batch_first=True)
    encoder = nn.TransformerEncoder(block, num_layers=2)
    head = nn.Linear(WIDTH, 2)
    for frozen in (embedding, encoder, head):
        frozen.requires_grad_(False)

    config = EPTConfig(num_virtual_tokens=4, max_length=TOKENS, r=4, num_spaces=2, space_dim=2)
    layer = EPTLayer(config, embedding)
    others = [parameter for name, parameter in layer.named_parameters() if name != "prompt"]
    optimizer = torch.optim.AdamW([{"params": [layer.prompt], "lr": 0.05}, {"params": others, "lr": 0.01}])

    def logits(input_ids: torch.Tensor) -> torch.Tensor:
        inputs_embeds, attention_mask, _ = layer(input_ids)
        states = encoder(inputs_embeds, src_key_padding_mask=attention_mask == 0)
        return head(states.mean(dim=1))

    def accuracy() -> float:
        input_ids, labels = batch(512)
        with torch.no_grad():
            return (logits(input_ids).argmax(-1) == labels).float().mean().item()

    before = accuracy()
    for _ in range(steps):
        input_ids, labels = batch(64)
        loss = nn.functional.cross_entropy(logits(input_ids), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return before, accuracy()


def batch(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random ids [rows, 11] and labels [rows]: 1 where more than half of the ids are in the upper half."""
    input_ids = torch.randint(VOCABULARY, (rows, TOKENS))
    return input_ids, ((input_ids >= VOCABULARY // 2).sum(dim=1) > TOKENS // 2).long()


if __name__ == "__main__":
    before, after = main()
    print(f"accuracy before {before:.3f}, after {after:.3f}; the network itself never changed")
