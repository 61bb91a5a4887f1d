"""Tiny random models of the supported families, and batches for them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

VOCAB = 99
PAD = 1

_SPECIAL = {"pad_token_id": PAD, "bos_token_id": 2, "eos_token_id": 3}
_SIZES = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
_DECODER = {**_SIZES, **_SPECIAL, "intermediate_size": 48}
_GROUPED = {**_DECODER, "num_key_value_heads": 2}
_GEMMA = {**_GROUPED, "head_dim": 8}
_WINDOW = {"sliding_window": 12}
_GPT2 = {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, **_SPECIAL}
_OPT = {**_SIZES, **_SPECIAL, "ffn_dim": 48, "max_position_embeddings": 64, "word_embed_proj_dim": 16}
_BLOOM = {"vocab_size": VOCAB, "hidden_size": 32, "n_layer": 2, "n_head": 4, **_SPECIAL}
_T5 = {"vocab_size": VOCAB, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
_T5_SPECIAL = {"pad_token_id": PAD, "eos_token_id": 3, "decoder_start_token_id": PAD}
_LAYERS = {"layers": 2, "attention_heads": 4, "ffn_dim": 48}
_BART = {
    **{"vocab_size": VOCAB, "d_model": 32, "max_position_embeddings": 64, "scale_embedding": True, **_SPECIAL},
    **{f"{side}_{name}": size for side in ("encoder", "decoder") for name, size in _LAYERS.items()},
    **{"decoder_start_token_id": 2, "forced_eos_token_id": None},
}
_CLASSIFIER = {**_SIZES, "intermediate_size": 48, "max_position_embeddings": 64, "num_labels": 3, "pad_token_id": PAD}

_LM, _S2S, _CLS = "CAUSAL_LM", "SEQ_2_SEQ_LM", "SEQ_CLS"
# name: (task type, model class, configuration class, its arguments)
FAMILIES: dict[str, tuple[str, str, str, dict[str, Any]]] = {
    "llama": (_LM, "LlamaForCausalLM", "LlamaConfig", _GROUPED),
    "mistral": (_LM, "MistralForCausalLM", "MistralConfig", {**_GROUPED, **_WINDOW}),
    "qwen2": (_LM, "Qwen2ForCausalLM", "Qwen2Config", _GROUPED),
    "gemma": (_LM, "GemmaForCausalLM", "GemmaConfig", _GEMMA),
    "gemma3": (_LM, "Gemma3ForCausalLM", "Gemma3TextConfig", {**_GEMMA, **_WINDOW}),
    "gpt2": (_LM, "GPT2LMHeadModel", "GPT2Config", _GPT2),
    "opt": (_LM, "OPTForCausalLM", "OPTConfig", _OPT),
    "gpt_neox": (_LM, "GPTNeoXForCausalLM", "GPTNeoXConfig", _DECODER),
    "bloom": (_LM, "BloomForCausalLM", "BloomConfig", _BLOOM),
    "t5": (_S2S, "T5ForConditionalGeneration", "T5Config", {**_T5, **_T5_SPECIAL}),
    "bart": (_S2S, "BartForConditionalGeneration", "BartConfig", _BART),
    "bert": (_CLS, "BertForSequenceClassification", "BertConfig", _CLASSIFIER),
    "roberta": (
        _CLS,
        "RobertaForSequenceClassification",
        "RobertaConfig",
        {**_CLASSIFIER, "max_position_embeddings": 66},
    ),
    "llama_classifier": (_CLS, "LlamaForSequenceClassification", "LlamaConfig", {**_GROUPED, "num_labels": 3}),
}
TASK_OF = {name: family[0] for name, family in FAMILIES.items()}
DECODERS = [name for name, task in TASK_OF.items() if task == "CAUSAL_LM"]
ONE_A_TASK = ["llama", "t5", "bert"]
SMALL = {"num_virtual_tokens": 5, "max_length": 12, "r": 3}


def make_model(name: str, **changes: Any) -> Any:
    """Makes a tiny random model of family `name` in eval mode, the same at each call."""
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


def add_lora(base: Any, adapter_name: str = "default", **options: Any) -> None:
    """Gives `base` an adapter as transformers does, or skips: transformers 5.24 asks for a PEFT yet to come."""
    from peft import LoraConfig

    try:
        base.add_adapter(LoraConfig(**options), adapter_name)
    except ValueError as error:
        if "version of PEFT" not in str(error):
            raise
        pytest.skip(str(error))


def make_batch(
    name: str, lengths: tuple[int, ...] = (7, 4), side: str = "right", seed: int = 0
) -> dict[str, torch.Tensor]:
    """Draws ids of the given lengths, padded on `side`, with the labels of the family's task."""
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


def adapted(name: str = "llama", seed: int | None = 1, model_changes: Any = None, **fields: Any) -> Any:
    """Makes an EPT model in eval mode, every parameter away from its start (`seed=None`: at its start)."""
    from ept import EPTConfig, get_ept_model

    model = get_ept_model(make_model(name, **(model_changes or {})), EPTConfig(**{**SMALL, **fields}))
    if seed is not None:
        randomise(model, seed)
    return model.eval()
