"""Runs that go on: with more steps, and from the adapter of another run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from run_checks import events, weights

from ept.runs.config import RunConfig
from ept.runs.folder import RunFolder
from ept.runs.train import prepare, train

Configure = Callable[..., RunConfig]
pytestmark = pytest.mark.usefixtures("no_curves")


def test_a_finished_run_is_trained_on_with_more_steps(
    configure: Configure, runs: dict[str, Path], tmp_path: Path
) -> None:
    shutil.copytree(runs["llama"], tmp_path / "run")
    with pytest.raises(FileExistsError, match=r"is finished: .* a larger training\.max_steps continues it"):
        train(configure("llama"), resume=True)
    results = train(configure("llama", "training.max_steps=60"), resume=True)
    assert results["steps"] == 60
    logged = events(tmp_path / "run")
    assert logged[: len(events(runs["llama"]))] == events(runs["llama"])
    # Linear with 2 warm-up steps over 60 now, from where the run stands: step 45 is counted from 0.
    later = next(event for event in logged if event.get("step") == 45)
    assert later["learning_rate"] == pytest.approx(0.05 * (60 - 44) / 58)
    assert json.loads((tmp_path / "run/results.json").read_text("utf-8"))["steps"] == 60


def test_a_run_trained_on_is_resumed_after_it_was_killed(
    configure: Configure, runs: dict[str, Path], tmp_path: Path
) -> None:
    """It was killed once its configuration was written, and before its first new checkpoint."""
    shutil.copytree(runs["bert"], tmp_path / "run")
    config = configure("bert", "training.max_steps=44")
    RunFolder(tmp_path / "run").begin(config, resume=True)
    assert not (tmp_path / "run/results.json").exists()
    assert train(config, resume=True)["steps"] == 44


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_a_run_starts_from_another_ones_adapter(configure: Configure, runs: dict[str, Path], family: str) -> None:
    for source in (runs[family], runs[family] / "adapter"):
        run = prepare(configure(family, f"method.init_from={source}", "seed=5"))
        old = weights(runs[family] / "adapter")
        layer = run.model.prompt_encoder["default"]
        assert all(torch.equal(parameter, old[name]) for name, parameter in layer.named_parameters())
        assert all(parameter.requires_grad for parameter in layer.parameters())
    if family == "bert":  # whose head is new
        (head,) = (
            p for name, p in run.model.named_parameters() if name.endswith("classifier.modules_to_save.default.weight")
        )
        assert not torch.equal(head, old["base_model.classifier.weight"])


@pytest.mark.parametrize("overrides, message", [
    (("method.name=dept",), "of another method than method.name=dept"),
    (("method.r=5",), r"method\.r is 5, but the adapter in .* has \d+: leave method\.r out"),
    (("method.budget=900", "method.r=null"), r"takes the old adapter's sizes: leave method\.budget out"),
    (("data.max_length=40",), r"for texts of up to \d+ tokens, but data\.max_length is 40: lower it"),
])  # fmt: skip
def test_an_adapter_that_does_not_fit_is_refused(
    configure: Configure, runs: dict[str, Path], overrides: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        prepare(configure("llama", f"method.init_from={runs['llama']}", *overrides))


def test_peft_s_methods_start_anew(configure: Configure, runs: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match=r"method\.init_from cannot be set for method\.name=lora"):
        configure("llama", "method.name=lora", f"method.init_from={runs['llama']}", "method.num_virtual_tokens=null")
