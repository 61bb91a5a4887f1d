"""Whole runs on tiny models: they learn, they leave what they promise, and they resume bit for bit."""

from __future__ import annotations

import importlib.util
import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import safetensors.torch
import torch
from run_checks import assert_same_weights, events, kill, losses, weights
from tiny_runs import save_model
from transformers import TrainerCallback
from transformers.integrations import integration_utils

from ept.runs import predict
from ept.runs import train as training
from ept.runs.callbacks import Recorder
from ept.runs.config import RunConfig, load_run_config
from ept.runs.folder import MetricsLog, RunFolder
from ept.runs.schedules import schedules
from ept.runs.train import prepare, train
from ept.runs.trainer import BalancedSampler, PromptTrainer, parameter_groups
from ept.tasks.encoding import TEXT_IDS

TESTS = Path(__file__).parents[1]
Configure = Callable[..., RunConfig]
RESULT_KEYS = {
    "method", "model", "task", "metric", "score", "score_before", "majority", "seed", "steps", "best_step",
    "best_validation", "train_seconds", "step_time_ms", "peak_memory_bytes", "peak_memory_kind", "processes",
    "global_batch_size", "stored_parameters", "trainable_parameters", "test_metrics", "test_metrics_before", "rows",
    "truncation_rate", "max_length", "versions", "hardware", "config", "verdict", "answers", "constant", "by_label",
    "calibration_error", "dtype", "attention",
}  # fmt: skip


def test_a_run_learns_and_leaves_its_results(runs: dict[str, Path], family: str) -> None:
    results = json.loads((runs[family] / "results.json").read_text(encoding="utf-8"))
    assert set(results) == RESULT_KEYS
    assert (results["dtype"], results["attention"]) == ("float32", "sdpa")
    assert results["score"] >= 0.95
    assert results["score"] > results["score_before"]
    assert results["majority"] == pytest.approx(21 / 32)  # 96 train rows, halves: the lower label; 21 of 32 test rows
    assert results["steps"] == 40
    assert results["rows"] == {"train": 96, "validation": 24, "test": 32}
    assert 0 < results["step_time_ms"] * 40 / 1e3 < results["train_seconds"]
    assert results["peak_memory_bytes"] > 2**20
    for figure in ("learning_curve.png", "confusion.png"):
        assert (runs[family] / figure).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert (results["verdict"], results["constant"]) == (None, False)
    assert results["by_label"]["negative"]["rows"] + results["by_label"]["positive"]["rows"] == 32
    report = (runs[family] / "report.md").read_text(encoding="utf-8")
    for part in ("| accuracy after training |", "| negative | 21 |", "![confusion]", f"ept predict {family} 'a text'"):
        assert part in report
    saved = load_run_config(runs[family] / "config.yaml")
    assert saved.to_dict() == results["config"]
    assert {path.name for path in runs[family].iterdir()} == {
        "config.yaml", "splits.json", "metrics.jsonl", "adapter", "results.json", "learning_curve.png", "confusion.png",
        "report.md", "checkpoints",
    }  # fmt: skip


def test_a_run_that_learned_nothing_is_called_so(
    configure: Configure, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its model gives the second label to every text, as one does whose rates are far too high."""
    answer = predict.Answer(1, (0.25, 0.75))
    monkeypatch.setattr(predict.Predictor, "predict_batch", lambda self, inputs: [answer] * len(inputs))
    results = train(configure("llama", "training.eval_steps=5", "training.max_steps=10"))
    shown = capsys.readouterr().err
    assert results["constant"]
    assert results["verdict"] == "answers 'positive' to 100% of the rows"
    assert re.search(r"in \d evaluations one after the other: lower training\.learning_rate \(", shown)


def test_metrics_log(runs: dict[str, Path], family: str) -> None:
    logged = events(runs[family])
    assert logged[0]["step"] == 0
    assert "before" in logged[0]
    losses = [event for event in logged if "loss" in event]
    assert [event["step"] for event in losses] == list(range(5, 45, 5))
    # linear with 2 warm-up steps over 40: the rate of the step that has just been made, number 5 counted from 0
    assert losses[0]["learning_rate"] == pytest.approx(0.05 * (40 - 4) / 38)
    assert losses[0]["low_rank_learning_rate"] == pytest.approx(0.03 * (40 - 4) / 38)
    assert [event["step"] for event in logged if "eval_accuracy" in event] == [20, 40]


def test_checkpoints_and_adapter_hold_no_base_weights(runs: Any, models: Any, family: str) -> None:
    base = (models[family] / "model.safetensors").stat().st_size
    trained = {"prompt", "A", "B", "beta", "D", "U", "G", "embedding_scale"}
    for folder in (runs[family] / "adapter", *(runs[family] / "checkpoints").iterdir()):
        names = {path.name for path in folder.iterdir()}
        extra = {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "training_args.bin"}
        extra.add("whole.json")
        assert names - extra == {"adapter_config.json", "adapter_model.safetensors", "README.md"}
        keys = {name for name in weights(folder) if "classifier" not in name}
        assert keys == trained
        assert (folder / "adapter_model.safetensors").stat().st_size < base / 2


def test_best_checkpoint_is_the_one_saved(runs: dict[str, Path], family: str) -> None:
    results = json.loads((runs[family] / "results.json").read_text(encoding="utf-8"))
    scores = {event["step"]: event["eval_accuracy"] for event in events(runs[family]) if "eval_accuracy" in event}
    assert results["best_validation"] == max(scores.values()) == scores[results["best_step"]]
    assert_same_weights(runs[family] / "adapter", runs[family] / "checkpoints" / f"checkpoint-{results['best_step']}")


def test_a_killed_run_resumes_to_the_same_weights(
    runs: dict[str, Path], configure: Configure, tmp_path: Path, family: str
) -> None:
    config = configure(family)
    kill(config, step=27)
    assert not RunFolder(tmp_path / "run").results.exists()
    with pytest.raises(FileExistsError, match="--resume continues it"):
        train(config)
    results = train(config, resume=True)

    whole = json.loads((runs[family] / "results.json").read_text(encoding="utf-8"))
    assert_same_weights(tmp_path / "run/checkpoints/checkpoint-40", runs[family] / "checkpoints/checkpoint-40")
    assert_same_weights(tmp_path / "run/adapter", runs[family] / "adapter")
    for key in ("score", "score_before", "steps", "best_step", "best_validation", "test_metrics", "majority"):
        assert results[key] == whole[key], key
    assert events(tmp_path / "run") == events(runs[family])


def test_resume_without_a_checkpoint_starts_anew(configure: Configure, tmp_path: Path) -> None:
    config = configure("bert", "training.max_steps=4")
    RunFolder(tmp_path / "run").begin(config, resume=False)
    assert train(config, resume=True)["steps"] == 4
    with pytest.raises(FileExistsError, match="is finished"):
        train(config, resume=True)
    assert train(config, overwrite=True)["steps"] == 4


def test_learning_rates_by_parameter(configure: Configure, family: str) -> None:
    run = prepare(configure(family))
    groups = parameter_groups(run.model, 0.05, 0.03)
    names = {parameter: name.rpartition(".")[2] for name, parameter in run.model.named_parameters()}
    found = {group["role"]: {names[parameter] for parameter in group["params"]} for group in groups}
    expected = {"prompt": {"prompt", "U"}, "map": {"D", "G"}, "other": {"A", "B", "beta"}}
    assert found == expected | ({"head": {"weight", "bias"}} if family == "bert" else {})
    rates = {"prompt": 0.05, "map": 0.03 / 32**0.5, "head": 4 / 32, "other": 0.03}
    assert {group["role"]: group["lr"] for group in groups} == pytest.approx({role: rates[role] for role in found})
    if family == "bert":
        named = parameter_groups(run.model, 0.05, 0.03, head_learning_rate=0.7)
        assert [group["lr"] for group in named if group["role"] == "head"] == [0.7]
    counted = sum(p.numel() for group in groups for p in group["params"])
    assert counted == run.model.get_nb_trainable_parameters()[0]


@pytest.mark.parametrize("method, parts", [("pt", {"prompt"}), ("dept", {"prompt", "A", "B"})])
def test_methods(configure: Configure, method: str, parts: set[str]) -> None:
    overrides = [f"method.name={method}", "method.r=null"]
    encoder = prepare(configure("llama", *overrides)).model.prompt_encoder["default"]
    assert {name for name, _ in encoder.named_parameters()} == parts
    with pytest.raises(ValueError, match=rf"method\.num_spaces cannot be set for method\.name={method}"):
        configure("llama", *overrides, "method.num_spaces=2")


def prompt_rows(run: Any) -> torch.Tensor:
    """The prompt of an untrained run, in the units of the table."""
    return run.model.get_prompt(1)[0].detach()


@pytest.mark.parametrize("method", ["pt", "dept", "ept", "adept", "residual", "prompt-tuning"])
def test_every_prompt_can_start_from_the_task_in_a_line(configure: Configure, method: str) -> None:
    run = prepare(configure("llama", f"method.name={method}", "method.r=null", "method.prompt_tuning_init=TEXT"))
    assert run.task.summary() == "sentence: sentence 0 or 1"
    ids = run.tokenizer(run.task.summary(), add_special_tokens=False)["input_ids"]
    found = prompt_rows(run)
    n = min(len(ids), len(found))
    torch.testing.assert_close(found[:n], run.model.get_input_embeddings().weight[ids[:n]].detach())


def test_prompt_from_another_text_or_none(configure: Configure) -> None:
    run = prepare(configure("llama", "method.prompt_tuning_init_text=the film was good"))
    ids = run.tokenizer("the film was good", add_special_tokens=False)["input_ids"][: len(prompt_rows(run))]
    expected = run.model.get_input_embeddings().weight[ids]
    torch.testing.assert_close(prompt_rows(run)[: len(ids)], expected.detach())
    sampled = prepare(configure("llama"))
    assert not torch.equal(prompt_rows(sampled)[0], prompt_rows(run)[0])


def test_budget(configure: Configure) -> None:
    config = configure("llama", "method.budget=800", "method.num_virtual_tokens=null", "method.r=null")
    assert 600 < prepare(config).model.get_nb_trainable_parameters()[0] <= 800


@pytest.mark.parametrize("name", schedules())
def test_every_schedule_that_is_taken_trains(configure: Configure, tmp_path: Path, name: str) -> None:
    steps = ("training.max_steps=4", "training.eval_steps=2", "training.score_before=false", "data.max_test=4")
    warmup = "training.warmup_steps=0"  # not all have one
    config = configure("bert", f"training.lr_scheduler={name}", warmup, *steps)
    trainer = PromptTrainer(config, prepare(config), RunFolder(tmp_path / "run"))
    trainer.train()
    assert getattr(trainer.lr_scheduler, "mode", "max") == "max"  # a higher score is better
    assert trainer.state.global_step == 4


def test_early_stop(configure: Configure) -> None:
    stop = ("training.eval_steps=5", "training.early_stopping_patience=2")
    config = configure("t5", *stop, "training.learning_rate=0", "training.low_rank_learning_rate=0")
    assert train(config)["steps"] == 15  # the first evaluation is the best, two without a better one follow


def test_text_too_long_is_cut_and_counted_or_refused(configure: Configure, tmp_path: Path) -> None:
    config = configure("t5", "data.max_length=8")
    rate = prepare(config).run_data.truncation_rate
    assert 0.2 < rate["train"] < 0.8  # "sentence : ", 4 to 8 words and the end token
    config.data.on_too_long = "error"
    with pytest.raises(
        ValueError, match=r"train, row \d+: the text has (9|10|11) tokens, but the limit is data\.max_length=8"
    ):
        train(config)
    assert not (tmp_path / "run").exists()


def test_infinite_loss_is_an_error(configure: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: PromptTrainer, *args: Any, **kwargs: Any) -> torch.Tensor:
        return torch.tensor(float("nan"))

    monkeypatch.setattr(PromptTrainer, "training_step", broken)
    message = r"the loss became nan by step 5: lower training\.learning_rate \(0\.05\)"
    with pytest.raises(FloatingPointError, match=message):
        train(configure("bert"))


@pytest.mark.parametrize("kind", ["cuda", "xpu"])
def test_steps_on_an_accelerator_share_the_time_until_it_is_waited_for(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[torch.device] = []
    monkeypatch.setattr(torch.accelerator, "synchronize", waited.append)
    recorder = Recorder(RunConfig(), MetricsLog(tmp_path / "metrics.jsonl"))
    args: Any = SimpleNamespace(device=torch.device(kind, 1))
    state: Any = SimpleNamespace(global_step=1, max_steps=9)
    for logs in (False, False, True):
        control: Any = SimpleNamespace(should_log=logs, should_evaluate=False)
        recorder.on_step_begin(args, state, control)
        recorder.on_step_end(args, state, control)
        assert len(recorder.step_times) == (3 if logs else 0)
    assert waited == [args.device]
    assert len(set(recorder.step_times)) == 1


def test_ids_that_the_model_has_no_rows_for_are_refused_before_a_device_sees_them(
    configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A CPU's look-up refuses them as well; a GPU's makes NaN of them, and the learning rate would be blamed."""
    config, message = configure("bert"), "input_ids contain 9, but the model's embedding has rows 0 to 8"
    run = prepare(config)
    largest = max(max(ids) for ids in run.run_data.data.train[TEXT_IDS])
    monkeypatch.setattr(predict, "rows_of", lambda embedding: largest)
    with pytest.raises(ValueError, match=f"input_ids contain {largest}, but the model's embedding has rows 0 to "):
        prepare(config)
    monkeypatch.setattr(predict, "rows_of", lambda embedding: 9)
    with pytest.raises(ValueError, match=message):
        run.predict([[4, 5], [4, 9]])


@pytest.mark.parametrize("overrides, message", [
    (["output_dir=null"], "output_dir is not set"),
    (["data.task=glue/sst"], "did you mean 'glue/sst2'"),
    (["data.task=null", "data.data_dir=null"], "no data: give a file, as in `ept train FILE --model NAME`"),
    (["model.name_or_path=null"], "model.name_or_path is not set"),
    (["model.name_or_path=nowhere/at-all"], "cannot load 'nowhere/at-all' with AutoConfig"),
    (["model.name_or_path=/no/where"], "/no/where: no such model folder: check the path (model.name_or_path)"),
    ([f"model.name_or_path={TESTS}"], "holds no model (no config.json)"),
    ([f"model.name_or_path={TESTS}/versions/adapter_0.1.0.dev0/decoder"], "holds an adapter: give its base model here"),
    (["data.max_length=128", "method.num_virtual_tokens=125"], "leaves no room for text within max_length=2"),
    (["method.num_virtual_tokens=128"], "num_virtual_tokens=128 leaves no room for text in the"),
    (["model.gguf_file=a.gguf"], "there is no a.gguf in"),
    pytest.param(
        ["model.attn_implementation=flash_attention_2"],
        "with AutoModelForSequenceClassification: FlashAttention2 has been toggled on, but it cannot be used",
        marks=pytest.mark.skipif(importlib.util.find_spec("flash_attn") is not None, reason="the package is there"),
    ),
    (["model.task_type=SEQ_2_SEQ_LM"], "with AutoModelForSeq2SeqLM: Unrecognized configuration class"),
    pytest.param(
        ["training.compile_layers=true", "training.pad_to_multiple_of=16", "training.cuda_graphs=true"],
        "cuda_graphs needs a CUDA device, but the model is on cpu: set cuda_graphs=false",
        marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device"),
    ),
])  # fmt: skip
def test_refused_before_anything_is_written(
    configure: Configure, tmp_path: Path, overrides: list[str], message: str
) -> None:
    with pytest.raises(ValueError) as error:
        train(configure("bert", *overrides))
    assert message in str(error.value)
    assert not (tmp_path / "run").exists()


def test_nothing_to_train_is_refused(configure: Configure) -> None:
    none = [f"method.{name}=0" for name in ("num_virtual_tokens", "r", "num_spaces")]
    with pytest.raises(ValueError, match="there is nothing to train: give the method prompt tokens"):
        train(configure("llama", *none, "method.fusion=false"))


@pytest.mark.parametrize("precision", ["model.dtype=bfloat16", "training.bf16=true", "model.load_in_4bit=true"])
def test_precisions_of_the_base(configure: Configure, tmp_path: Path, family: str, precision: str) -> None:
    assert train(configure(family, "training.max_steps=6", "training.eval_steps=3", precision))["steps"] == 6
    logged = losses(tmp_path / "run")
    assert logged[-1] < logged[0]
    saved = weights(tmp_path / "run" / "adapter")
    kept = {name: saved[name].dtype for name in ("prompt", "A", "B", "beta", "D", "U", "G")}
    assert set(kept.values()) == {torch.float32}, kept  # a head stays in the model's dtype


def test_length_grouping_and_gradient_checkpointing(configure: Configure, tmp_path: Path) -> None:
    one_batch = ("training.max_steps=5", "training.batch_size=96")  # the whole set: the order does not matter
    train(configure("llama", *one_batch, name="plain"))
    both = ("training.group_by_length=true", "training.gradient_checkpointing=true")
    train(configure("llama", *one_batch, *both, name="both"))
    assert losses(tmp_path / "plain") == pytest.approx(losses(tmp_path / "both"), rel=1e-4)


def test_balanced_sampling_draws_every_label_as_often(configure: Configure, tmp_path: Path) -> None:
    labels = [0] * 70 + [1] * 20 + [2] * 10
    sampler = BalancedSampler(labels, seed=3)
    orders = []
    for epoch in (0, 0, 1):
        sampler.set_epoch(epoch)
        orders.append(list(sampler))
    assert orders[0] == orders[1] != orders[2]
    drawn = Counter(labels[row] for epoch in range(30) for row in (sampler.set_epoch(epoch), list(sampler))[1])
    assert [drawn[label] / 3000 for label in range(3)] == pytest.approx([1 / 3] * 3, abs=0.03)
    # A killed run goes on with the same rows.
    settings = ("training.balanced_sampling=true", "training.max_steps=10", "training.eval_steps=4")
    train(configure("bert", *settings, name="whole"))
    kill(configure("bert", *settings), step=7)
    train(configure("bert", *settings), resume=True)
    assert_same_weights(tmp_path / "whole" / "adapter", tmp_path / "run" / "adapter")
    assert losses(tmp_path / "whole") == losses(tmp_path / "run")


def test_save_model_is_deterministic(tmp_path: Path, models: dict[str, Path]) -> None:
    again = save_model("llama", tmp_path / "again")
    one, two = (safetensors.torch.load_file(f / "model.safetensors") for f in (again, models["llama"]))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_tensorboard_needs_its_package(configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"training\.tensorboard needs the package tensorboard: pip install"):
        train(configure("bert", "training.tensorboard=true"))
    with pytest.raises(ValueError, match=r"training\.report_to=wandb needs the package wandb: pip install wandb"):
        train(configure("bert", "training.report_to=[wandb]"))
    assert not (tmp_path / "run").exists()


def test_a_run_reports_to_the_services_of_the_trainer(
    configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in for MLflow's callback is told losses, scores and the run's name."""
    told: dict[str, Any] = {}

    class Service(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            told.update(logs, run_name=args.run_name)

    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "mlflow", Service)
    find = training.importlib.util.find_spec
    monkeypatch.setattr(training.importlib.util, "find_spec", lambda name, *rest: name == "mlflow" or find(name, *rest))
    train(configure("bert", "training.report_to=[mlflow]", "training.max_steps=5"))
    assert told.keys() >= {"loss", "eval_accuracy"}
    assert told["run_name"] == "run"
