"""TRL's trainers on a tiny model and the CPU: they train, and what they compute is what generation has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from ept import EPTConfig, get_ept_model

trl = pytest.importorskip("trl", reason="needs trl: `make integrations` runs it")

COMPLETIONS = [
    {"prompt": "the film was very good", "completion": " yes"},
    {"prompt": "awful", "completion": " no and no"},
    {"prompt": "so long", "completion": " no"},
    {"prompt": "a lovely story and a great plot", "completion": " yes yes"},
]
PAIRS = [{**row, "chosen": row["completion"], "rejected": " so so"} for row in COMPLETIONS]
RATED = [{**row, "label": number % 2 == 0} for number, row in enumerate(COMPLETIONS)]
MESSAGES = [
    {
        "messages": [
            {"role": "user", "content": "the film"},
            {"role": "assistant", "content": "good"},
            {"role": "user", "content": "the long story"},
            {"role": "assistant", "content": "very bad"},
        ]
    }
] * 4
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'assistant' %}review {% generation %}{{ m.content }} ?{% endgeneration %}"
    " {% else %}sentence {{ m.content }} {% endif %}{% endfor %}"
)


def make_trainer(models: Any, folder: Path, kind: str, rows: Any, options: Any = None, **arguments: Any) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(models["llama"])
    tokenizer.chat_template = TEMPLATE
    config = EPTConfig(num_virtual_tokens=4, max_length=32, r=2, seed=0)
    model = get_ept_model(AutoModelForCausalLM.from_pretrained(models["llama"]), config)
    with torch.no_grad():
        model.prompt_encoder["default"].B.normal_(std=0.3, generator=torch.Generator().manual_seed(0))
    settings = {"max_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 0.01, "logging_steps": 1}
    settings |= {"report_to": "none", "use_cpu": True, "bf16": False, "save_strategy": "no", "disable_tqdm": True}
    settings |= {"optim": "sgd", **(options or {})}
    settings_class, trainer_class = getattr(trl, f"{kind}Config"), getattr(trl, f"{kind}Trainer")
    settings = settings_class(output_dir=str(folder), shuffle_dataset=False, **settings) if kind == "SFT" else (
        settings_class(output_dir=str(folder), **settings)
    )  # fmt: skip
    return trainer_class(
        model=model, args=settings, train_dataset=Dataset.from_list(rows), processing_class=tokenizer, **arguments
    )


def trained(trainer: Any) -> list[dict[str, float]]:
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.train()
    after = dict(trainer.model.named_parameters())
    assert all(torch.isfinite(after[name]).all() for name in before)
    assert any(not torch.equal(after[name], before[name]) for name in before)
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def test_packing_and_padding_free_train_as_padded_rows_do(models, tmp_path):
    losses = {}
    for name, options in {
        "padded": {"max_length": 32},
        "padding-free": {"max_length": None, "padding_free": True},
        "packed": {"max_length": 64, "packing": True},
    }.items():
        losses[name] = [entry["loss"] for entry in trained(make_trainer(models, tmp_path, "SFT", COMPLETIONS, options))]
    assert losses["padding-free"] == pytest.approx(losses["padded"], rel=1e-4)
    assert losses["packed"] == pytest.approx(losses["padded"], rel=1e-4)


def test_answers_of_several_turns_are_scored_as_they_are_generated(models, tmp_path):
    options = {"max_length": 64, "assistant_only_loss": True, "max_steps": 1}
    trainer = make_trainer(models, tmp_path, "SFT", MESSAGES, options)
    model, row = trainer.model, trainer.train_dataset[0]
    ids, labels = (torch.tensor([row[name]]) for name in ("input_ids", "labels"))
    losses = []
    for column in (labels[0] != -100).nonzero().flatten().tolist():
        turn = max(i for i in range(column) if labels[0, i] == -100) + 1  # where this answer begins
        text = (torch.arange(column) < turn).long()[None]
        logits = model(ids[:, :column], text_mask=text).logits[0, -1]
        losses.append(torch.nn.functional.cross_entropy(logits, ids[0, column]).item())
    assert len(losses) == 5
    assert trained(trainer)[0]["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-4)


def test_dpo_and_kto_train(models, tmp_path):
    pairs = trained(make_trainer(models, tmp_path, "DPO", PAIRS, {"max_length": 32}))
    assert pairs[0]["loss"] == pytest.approx(0.6931, abs=1e-3)  # the reference is the adapter as it was
    assert pairs[1]["loss"] < pairs[0]["loss"]
    rated = trained(make_trainer(models, tmp_path, "KTO", RATED, {"max_length": 32}))
    assert rated[0]["loss"] == pytest.approx(0.5, abs=1e-3)


def test_grpo_scores_its_completions_as_it_generated_them(models, tmp_path):
    options = {"num_generations": 4, "max_completion_length": 4, "beta": 0.1}
    reward = lambda completions, **_: [float(len(set(text))) for text in completions]  # noqa: E731
    trainer = make_trainer(models, tmp_path, "GRPO", COMPLETIONS, options, reward_funcs=reward)
    trainer.train()
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())
    ids = torch.tensor([[0, 0, 14, 15], [20, 14, 15, 9]])
    mask = (ids != 0).long()
    generated = trainer.model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=4, do_sample=False, eos_token_id=None,
        return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    new = generated.sequences[:, 4:]
    whole = torch.cat([mask, torch.ones_like(new)], dim=1)
    scored, *_ = trainer._get_per_token_logps_and_entropies(trainer.model, generated.sequences, whole, 4)
    expected = torch.stack(generated.logits, dim=1).div(trainer.temperature).log_softmax(-1)
    torch.testing.assert_close(scored, expected.gather(-1, new[..., None])[..., 0], rtol=1e-4, atol=1e-5)
