"""`training.cuda_graphs`: refused where there is no CUDA device, handed on where there is, and without influence on
what a run learns.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from run_checks import assert_same_step, first_step
from tiny_models import make_model
from tiny_runs import run_config
from torch import nn

from ept.model import compilation
from ept.model.compilation import compile_layers
from ept.runs.config import load_run_config
from ept.runs.train import train

COMPILED = ["training.compile_layers=true", "training.pad_to_multiple_of=16"]
GRAPHS = [*COMPILED, "training.cuda_graphs=true"]
NO_CUDA = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")


@NO_CUDA
def test_without_a_cuda_device_a_run_is_refused_before_anything_is_written(
    models: dict[str, Path], data: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="cuda_graphs needs a CUDA device, the model is on cpu: set cuda_graphs=false"):
        train(run_config(models["llama"], data, tmp_path / "run", *GRAPHS))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("overrides, message", [
    (["training.cuda_graphs=true"], "training.cuda_graphs replays compiled layers: set training.compile_layers=true"),
    ([*GRAPHS, "training.gradient_checkpointing=true"], "gradient_checkpointing exclude each other"),
])  # fmt: skip
def test_refused_values(overrides: list[str], message: str) -> None:
    with pytest.raises(ValueError) as error:
        load_run_config(None, overrides)
    assert message in str(error.value)


@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_layers_get_the_mode_and_every_call_of_the_model_begins_a_step(
    monkeypatch: pytest.MonkeyPatch, cuda_graphs: bool
) -> None:
    compiled: list[dict[str, Any]] = []
    begun: list[int] = []
    monkeypatch.setattr(nn.Module, "compile", lambda module, **options: compiled.append(options))
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: begun.append(1))
    monkeypatch.setattr(compilation, "_check_device", lambda device: None)
    model = make_model("llama")
    count = compile_layers(model, cuda_graphs=cuda_graphs)
    mode = {"mode": "reduce-overhead"} if cuda_graphs else {}
    assert compiled == [{"dynamic": False, **mode}] * count
    for _ in range(3):
        model(input_ids=torch.tensor([[5, 6, 7]]))
    assert len(begun) == (3 if cuda_graphs else 0)


@pytest.mark.gpu
@pytest.mark.slow
def test_gradients_stay_the_same(models: dict[str, Path], data: Path, tmp_path: Path) -> None:
    """Over four parts of a batch, all of one length: a layer is warmed up, recorded, and replayed twice."""
    from torch._dynamo.utils import counters

    settings = ["training.max_steps=1", "training.max_grad_norm=0", "training.logging_steps=1"]
    expected = first_step(run_config(models["llama"], data, None, *settings), tmp_path / "plain")
    counters.clear()
    config = run_config(models["llama"], data, None, *settings, *GRAPHS)
    assert_same_step(first_step(config, tmp_path / "graphs", batch_size=2, accumulation=4), expected)
    assert counters["inductor"]["cudagraph_skips"] == 0
