"""The options of the training step: the same gradients, the same accumulation, the same weights after a resume."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from run_checks import Step, assert_same_step, assert_same_weights, first_step, kill
from tiny_models import make_model
from tiny_runs import FAMILIES, run_config
from torch import nn
from waits import Waits

from ept.model.compilation import compile_layers
from ept.runs.config import RunConfig
from ept.runs.folder import RunFolder
from ept.runs.train import prepare, train
from ept.runs.trainer import EpochLengthGroupedSampler, PromptTrainer
from ept.tasks.encoding import Collator

Configure = Callable[..., RunConfig]
# What leaves the order of the rows alone, away from its default.
OPTIONS = {
    "all-logits": ["training.label_only_logits=false"],
    "shared-prompt": ["training.shared_prompt=true"],
    "plain-adamw": ["training.optim=adamw_torch"],
    "buckets": ["training.pad_to_multiple_of=8"],
    "compiled": ["training.compile_layers=true", "training.pad_to_multiple_of=8"],
}
GROUPED = {"grouped": ["training.group_by_length=true"]}
ONE_STEP = ["training.max_steps=1", "training.max_grad_norm=0", "training.logging_steps=1"]


@pytest.fixture(scope="module")
def plain(models: dict[str, Path], data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Step]:
    """Each family's first step with the default options."""
    folder = tmp_path_factory.mktemp("plain")
    return {name: first_step(run_config(models[name], data, None, *ONE_STEP), folder / name) for name in FAMILIES}


@pytest.mark.parametrize("option", [pytest.param(o, marks=pytest.mark.slow) if o == "compiled" else o for o in OPTIONS])
def test_gradients_and_accumulation_stay_the_same(
    plain: dict[str, Step], configure: Configure, tmp_path: Path, option: str, family: str
) -> None:
    """With a batch whole and in parts. Compiling is slow, and each shape is compiled: only one family takes both."""
    if option == "shared-prompt" and family != "llama":
        pytest.skip("for decoders only")
    for name, batch_size, accumulation in (("whole", 8, 1), ("parts", 2, 4)):
        if (option, name) == ("compiled", "whole") and family != "bert":
            continue
        config = configure(family, *ONE_STEP, *OPTIONS[option])
        if option == "compiled":
            config.training.pad_to_multiple_of = 16
        assert_same_step(first_step(config, tmp_path / name, batch_size, accumulation), plain[family])


# Away from the defaults of the other tests, and with other gradients.
OTHERWISE = {
    **GROUPED,
    "labels of several lengths": [
        *("data.task=null", "data.data_dir=null", "data.template='review : {sentence}'", "data.labels=words"),
        "data.label_words=['no', 'very good and so long']",
    ],
}


@pytest.mark.parametrize("settings", OTHERWISE.values(), ids=OTHERWISE)
def test_parts_of_a_batch_accumulate_to_the_same(
    configure: Configure, data: Path, tmp_path: Path, settings: list[str], family: str
) -> None:
    if "data.task=null" in settings:
        files = [f"data.{split}_file={data}/{split}.jsonl" for split in ("train", "validation", "test")]
        settings = [*settings, *files]
    whole = first_step(configure(family, *ONE_STEP, *settings), tmp_path / "whole", 8, 1)
    assert_same_step(first_step(configure(family, *ONE_STEP, *settings), tmp_path / "parts", 2, 4), whole)


@pytest.mark.parametrize(
    "option", [pytest.param(o, marks=pytest.mark.slow) if o == "compiled" else o for o in OPTIONS | GROUPED]
)
def test_a_killed_run_resumes_to_the_same_weights(configure: Configure, tmp_path: Path, option: str) -> None:
    """Past the end of an epoch of 6 steps, and from the middle of the second one."""
    settings = ["training.max_steps=12", "training.eval_steps=4", *(OPTIONS | GROUPED)[option]]
    train(configure("llama", *settings, name="whole"))
    config = configure("llama", *settings, name="killed")
    kill(config, step=11)
    torch._dynamo.reset()  # as in a new process: what was compiled before must not matter
    train(config, resume=True)
    for part in ("checkpoints/checkpoint-12", "adapter"):
        assert_same_weights(tmp_path / "killed" / part, tmp_path / "whole" / part)


def test_compiled_layers_are_compiled_and_evaluation_is_not(configure: Configure) -> None:
    from torch._dynamo.testing import CompileCounter

    counter = CompileCounter()
    run = prepare(configure("llama"))
    expected = run.score(run.run_data.data.test)
    run.model.compile_layers(backend=counter)
    batch = {"input_ids": torch.tensor([[5, 6, 7, 8]]), "labels": torch.tensor([[-100, -100, -100, 8]])}
    assert run.score(run.run_data.data.test) == expected
    assert counter.frame_count == 0
    run.model.train()(**batch).loss.backward()
    assert counter.frame_count == 1  # one for both layers
    run.model.train()(**batch).loss.backward()
    assert counter.frame_count == 1


@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_layers_get_the_mode_and_every_call_of_the_model_begins_a_step(
    monkeypatch: pytest.MonkeyPatch, cuda_graphs: bool
) -> None:
    compiled: list[dict[str, Any]] = []
    begun: list[int] = []
    monkeypatch.setattr(nn.Module, "compile", lambda module, **options: compiled.append(options))
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: begun.append(1))
    model = make_model("llama")
    with monkeypatch.context() as patch:
        on_cuda = SimpleNamespace(device=torch.device("cuda"))  # as the model would say where there is one
        patch.setattr(model, "parameters", lambda: iter([on_cuda]))
        count = compile_layers(model, cuda_graphs=cuda_graphs)
    mode = {"mode": "reduce-overhead"} if cuda_graphs else {}
    assert compiled == [{"dynamic": False, **mode}] * count
    for _ in range(3):
        model(input_ids=torch.tensor([[5, 6, 7]]))
    assert len(begun) == (3 if cuda_graphs else 0)


@pytest.mark.gpu
@pytest.mark.slow
def test_cuda_graphs_leave_gradients_the_same(plain: dict[str, Step], configure: Configure, tmp_path: Path) -> None:
    """Over four parts of a batch, all of one length: a layer is warmed up, recorded, and replayed twice."""
    from torch._dynamo.utils import counters

    counters.clear()
    graphs = ("training.compile_layers=true", "training.pad_to_multiple_of=16", "training.cuda_graphs=true")
    config = configure("llama", *ONE_STEP, *graphs)
    assert_same_step(first_step(config, tmp_path / "graphs", batch_size=2, accumulation=4), plain["llama"])
    assert counters["inductor"]["cudagraph_skips"] == 0


def test_too_many_compiled_lengths_are_refused(
    configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ept.model.compilation.MAX_LENGTHS", 4)
    settings = ["training.compile_layers=true", "training.pad_to_multiple_of=2"]
    with pytest.raises(ValueError) as error:
        train(configure("llama", *settings))
    assert "training.pad_to_multiple_of=2 makes 6 lengths of up to 11 tokens" in str(error.value)
    assert "set it to 3 or more" in str(error.value)
    assert not (tmp_path / "run").exists()


def test_grouped_order_depends_on_seed_and_epoch_alone() -> None:
    lengths = [3 + (7 * index) % 11 for index in range(500)]

    def order(seed: int, epoch: int) -> list[int]:
        sampler = EpochLengthGroupedSampler(4, lengths, seed)
        sampler.set_epoch(epoch)
        torch.manual_seed(epoch)  # of no influence
        return list(sampler)

    assert order(0, 1) == order(0, 1)
    assert sorted(order(0, 1)) == list(range(500))
    assert len({tuple(order(seed, epoch)) for seed, epoch in ((0, 0), (0, 1), (5, 0))}) == 3
    batches = [order(0, 0)[start : start + 4] for start in range(0, 500, 4)]
    padding = sum(4 * max(lengths[i] for i in batch) - sum(lengths[i] for i in batch) for batch in batches)
    assert padding < 0.1 * sum(lengths)


def test_buckets_and_logits_of_the_collator() -> None:
    rows = [{"input_ids": list(range(3, 3 + n)), "labels": list(range(3 + n - k, 3 + n))} for n, k in ((9, 2), (5, 1))]
    causal = Collator("CAUSAL_LM", 0, pad_to_multiple_of=8, answer_tokens=3)(rows)
    assert causal["input_ids"].shape == causal["labels"].shape == causal["attention_mask"].shape == (2, 16)
    assert causal["attention_mask"].sum(1).tolist() == [9, 5]
    assert causal["labels"][0].tolist() == [-100] * 14 + [10, 11]
    assert causal["logits_to_keep"] == 4
    assert Collator("CAUSAL_LM", 0, label_only_logits=False)(rows)["logits_to_keep"] == 0
    seq2seq = Collator("SEQ_2_SEQ_LM", 0, pad_to_multiple_of=8, answer_tokens=3)(rows)
    assert seq2seq["input_ids"].shape == (2, 16)
    assert seq2seq["labels"].tolist() == [[10, 11, -100], [7, -100, -100]]


def test_a_step_waits_for_nothing(configure: Configure, tmp_path: Path) -> None:
    """A decoder's training step of the Trainer as `ept train` sets it up, from batch to gradient and clipping.

    With eager attention: to choose SDPA's fast path transformers looks whether there is padding, which is not ours.
    """
    config = configure("llama", "training.max_steps=2", "model.attn_implementation=eager")
    run = prepare(config)
    tmp_path.joinpath("run").mkdir()
    trainer = PromptTrainer(config, run, RunFolder(tmp_path / "run"))
    trainer.create_optimizer()
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.training_step(run.model, dict(batch), torch.tensor(8))  # looks at the labels once
    with Waits() as waits:
        trainer.training_step(run.model, dict(batch), torch.tensor(8))
        trainer._clip_grad_norm(run.model)
    assert waits.of_an_accelerator() == []
    assert not trainer.args.logging_nan_inf_filter
    with Waits() as waits:
        bool(torch.ones(1).any())
    assert waits.found  # the counter counts


def test_a_prompt_is_read_once_a_batch_where_it_can_be(configure: Configure, family: str) -> None:
    assert prepare(configure(family)).model.shares_prompt is (family == "llama")
    assert not prepare(configure(family, "training.shared_prompt=false")).model.shares_prompt
    compiled = configure(family, "training.compile_layers=true", "training.pad_to_multiple_of=16")
    assert not prepare(compiled).model.shares_prompt
    if family == "llama":
        assert prepare(configure(family, "training.shared_prompt=true")).model.shares_prompt
        peft = configure(family, "training.shared_prompt=true", "method.name=prompt-tuning", "method.r=null")
        with pytest.raises(ValueError, match=r"training\.shared_prompt is for this project's own methods"):
            prepare(peft)
    else:
        with pytest.raises(
            ValueError, match="cannot be read once for a batch: share_prompt is for decoder-only models"
        ):
            prepare(configure(family, "training.shared_prompt=true"))
