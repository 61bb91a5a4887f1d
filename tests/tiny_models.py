"""Tiny random models of the supported families, and batches for them."""

from __future__ import annotations

from typing import Any

import torch

VOCAB = 99
PAD = 1

_DECODER = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
_SPECIAL = {"pad_token_id": PAD, "bos_token_id": 2, "eos_token_id": 3}
_CLASSIFIER = {**_DECODER, "max_position_embeddings": 64, "num_labels": 3, "pad_token_id": PAD}

# name: (task type, model class, configuration class, its arguments)
FAMILIES: dict[str, tuple[str, str, str, dict[str, Any]]] = {
    "llama": ("CAUSAL_LM", "LlamaForCausalLM", "LlamaConfig", {**_DECODER, **_SPECIAL, "num_key_value_heads": 2}),
    "mistral": (
        "CAUSAL_LM",
        "MistralForCausalLM",
        "MistralConfig",
        {**_DECODER, **_SPECIAL, "num_key_value_heads": 2, "sliding_window": 12},
    ),
    "qwen2": ("CAUSAL_LM", "Qwen2ForCausalLM", "Qwen2Config", {**_DECODER, **_SPECIAL, "num_key_value_heads": 2}),
    "gemma": (
        "CAUSAL_LM",
        "GemmaForCausalLM",
        "GemmaConfig",
        {**_DECODER, **_SPECIAL, "num_key_value_heads": 2, "head_dim": 8},
    ),
    "gemma3": (
        "CAUSAL_LM",
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        {**_DECODER, **_SPECIAL, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 12},
    ),
    "gpt2": (
        "CAUSAL_LM",
        "GPT2LMHeadModel",
        "GPT2Config",
        {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, **_SPECIAL},
    ),
    "opt": (
        "CAUSAL_LM",
        "OPTForCausalLM",
        "OPTConfig",
        {
            "vocab_size": VOCAB,
            "hidden_size": 32,
            "ffn_dim": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 64,
            "word_embed_proj_dim": 16,
            **_SPECIAL,
        },
    ),
    "gpt_neox": ("CAUSAL_LM", "GPTNeoXForCausalLM", "GPTNeoXConfig", {**_DECODER, **_SPECIAL}),
    "bloom": (
        "CAUSAL_LM",
        "BloomForCausalLM",
        "BloomConfig",
        {"vocab_size": VOCAB, "hidden_size": 32, "n_layer": 2, "n_head": 4, **_SPECIAL},
    ),
    "t5": (
        "SEQ_2_SEQ_LM",
        "T5ForConditionalGeneration",
        "T5Config",
        {
            "vocab_size": VOCAB,
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 48,
            "num_layers": 2,
            "num_heads": 4,
            "pad_token_id": PAD,
            "eos_token_id": 3,
            "decoder_start_token_id": PAD,
        },
    ),
    "bart": (
        "SEQ_2_SEQ_LM",
        "BartForConditionalGeneration",
        "BartConfig",
        {
            "vocab_size": VOCAB,
            "d_model": 32,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 48,
            "decoder_ffn_dim": 48,
            "max_position_embeddings": 64,
            "scale_embedding": True,
            "decoder_start_token_id": 2,
            "forced_eos_token_id": None,
            **_SPECIAL,
        },
    ),
    "bert": ("SEQ_CLS", "BertForSequenceClassification", "BertConfig", _CLASSIFIER),
    "roberta": (
        "SEQ_CLS",
        "RobertaForSequenceClassification",
        "RobertaConfig",
        {**_CLASSIFIER, "max_position_embeddings": 66},
    ),
    "llama_classifier": (
        "SEQ_CLS",
        "LlamaForSequenceClassification",
        "LlamaConfig",
        {**_DECODER, **_SPECIAL, "num_key_value_heads": 2, "num_labels": 3},
    ),
}
TASK_OF = {name: family[0] for name, family in FAMILIES.items()}
DECODERS = [name for name, task in TASK_OF.items() if task == "CAUSAL_LM"]
ONE_A_TASK = ["llama", "t5", "bert"]


def make_model(name: str, **changes: Any) -> Any:
    """A tiny random model of family `name` in eval mode, the same at each call; embeddings are made distinct and
    non-trivial.
    """
    import transformers

    _, model_class, config_class, arguments = FAMILIES[name]
    torch.manual_seed(0)
    config = getattr(transformers, config_class)(**{**arguments, **changes})
    model = getattr(transformers, model_class)(config)
    if name != "t5":  # whose initialisation is large already
        with torch.no_grad():  # so that differences show in the logits
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.mul_(4)
    return model.eval()


def make_batch(
    name: str, lengths: tuple[int, ...] = (7, 4), side: str = "right", seed: int = 0
) -> dict[str, torch.Tensor]:
    """Random ids of the given lengths padded on `side`, with the labels of the family's task."""
    generator = torch.Generator().manual_seed(seed)
    n = max(lengths)
    input_ids = torch.full((len(lengths), n), PAD)
    attention_mask = torch.zeros_like(input_ids)
    labels = torch.full_like(input_ids, -100)
    for row, length in enumerate(lengths):
        start = n - length if side == "left" else 0
        input_ids[row, start : start + length] = torch.randint(4, VOCAB, (length,), generator=generator)
        attention_mask[row, start : start + length] = 1
        labels[row, start + length - 2 : start + length] = input_ids[row, start + length - 2 : start + length]
    task = TASK_OF[name]
    if task == "SEQ_CLS":
        labels = torch.arange(len(lengths)) % 3
    elif task == "SEQ_2_SEQ_LM":
        labels = torch.randint(4, VOCAB, (len(lengths), 3), generator=generator)
        labels[0, -1] = -100
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def randomise(model: Any, seed: int = 1, scale: float = 0.3) -> None:
    """Gives every adapter parameter a value, so that no part is at its neutral start."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "prompt_encoder" in name or "modules_to_save" in name:
                parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
