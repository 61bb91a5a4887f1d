"""Tiny random models, a tokenizer and separable data, in files, for whole runs in seconds."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from ept.runs.config import RunConfig, load_run_config
from ept.tasks.encoding import Collator

GOOD = ("good", "great", "fine", "lovely")
BAD = ("bad", "awful", "poor", "dreadful")
OTHER = ("the", "film", "was", "story", "and", "plot", "cast", "very", "so", "long")
WORDS = ("0", "1", "no", "yes", "review", ":", "?", "a", "sentence", *GOOD, *BAD, *OTHER)
SPECIAL = ("<pad>", "</s>", "<unk>")
VOCABULARY = {word: index for index, word in enumerate((*SPECIAL, *WORDS))}
FAMILIES = {"llama": "CAUSAL_LM", "t5": "SEQ_2_SEQ_LM", "bert": "SEQ_CLS"}


def save_tokenizer(folder: Path, end_token: bool) -> None:
    """One token a word; `end_token`: every text ends with </s>, as T5's do."""
    tokenizer = Tokenizer(models.WordLevel(VOCABULARY, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if end_token:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="$A </s>", special_tokens=[("</s>", VOCABULARY["</s>"])]
        )
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )
    wrapped.save_pretrained(folder)


def save_model(family: str, folder: Path) -> Path:
    """A tiny model in a folder, with its tokenizer."""
    torch.manual_seed(1)
    shared = {"vocab_size": len(VOCABULARY), "pad_token_id": 0, "eos_token_id": 1}
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes["max_position_embeddings"] = 128
    model: Any
    if family == "llama":
        own = {"num_key_value_heads": 2, "initializer_range": 0.05, "tie_word_embeddings": False, "bos_token_id": None}
        model = LlamaForCausalLM(LlamaConfig(**shared, **sizes, **own))
    elif family == "t5":
        own = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "initializer_factor": 1.0}
        model = T5ForConditionalGeneration(
            T5Config(**shared, **own, decoder_start_token_id=0, tie_word_embeddings=False)
        )
    else:
        model = BertForSequenceClassification(BertConfig(**shared, **sizes, initializer_range=0.3))
    teach(model, family)
    model.save_pretrained(folder)
    save_tokenizer(folder, end_token=family != "llama")
    return folder


def sentence(chance: random.Random, label: int) -> str:
    """Three to seven neutral words and a last one that says whether the review is good (1) or bad (0)."""
    return " ".join([*chance.choices(OTHER, k=chance.randint(3, 7)), chance.choice(GOOD if label else BAD)])


def teach(model: Any, family: str, steps: int = 150) -> None:
    """Pre-trains: "review : sentence" is answered by 0 or 1, a bare sentence by "?": what a prompt can bring out.

    A classifier learns the sentences' labels and then gets a fresh head.
    """
    chance = random.Random(7)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(steps):
        rows = []
        for index in range(32):
            label, asked = index % 2, index % 4 < 2 or family == "bert"
            text = ("review : " if asked else "") + "sentence : " + sentence(chance, label)
            rows.append((text.split(), ["01"[label] if asked else "?", "</s>"]))
        ids = [[VOCABULARY.get(word, VOCABULARY["<unk>"]) for word in text] for text, _ in rows]
        answers = [[VOCABULARY[word] for word in answer] for _, answer in rows]
        inputs = [[*text, *answer] if family == "llama" else [*text, 1] for text, answer in zip(ids, answers)]
        targets = [int(answer[0] == VOCABULARY["1"]) if family == "bert" else answer for answer in answers]
        batch = [{"input_ids": text, "labels": target} for text, target in zip(inputs, targets)]
        made = Collator(FAMILIES[family], VOCABULARY["<pad>"])(batch)
        for ours in ("logits_to_keep", "text_mask"):
            made.pop(ours, None)
        model(**made).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    if family == "bert":
        torch.nn.init.normal_(model.classifier.weight, std=0.05)
        torch.nn.init.zeros_(model.classifier.bias)
    model.eval()


def save_data(folder: Path, rows: int = 96) -> Path:
    """{train,validation,test}.jsonl of `glue/sst2`'s columns: the last word says whether the review is good."""
    folder.mkdir(parents=True, exist_ok=True)
    chance = random.Random(0)
    for split, count in (("train", rows), ("validation", 24), ("test", 32)):
        lines = []
        for index in range(count):
            label = index % 2 if split != "test" else int(index % 3 == 0)
            lines.append(json.dumps({"sentence": sentence(chance, label), "label": label}))
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def run_config(model: Path, data: Path, output: Path | None, *overrides: str) -> RunConfig:
    """A short run on `glue/sst2`'s form, with the position-dependent update."""
    settings = [
        f"model.name_or_path={model}",
        "data.task=glue/sst2",
        f"data.data_dir={data}",
        "data.max_length=16",
        "method.name=ept",
        "method.num_virtual_tokens=6",
        "method.r=2",
        "training.max_steps=40",
        "training.batch_size=16",
        "training.eval_steps=20",
        "training.logging_steps=5",
        "training.warmup_steps=2",
        "training.low_rank_learning_rate=0.03",
        f"output_dir={output or 'null'}",
        *overrides,
    ]
    return load_run_config(None, settings)
