"""The program of each process that test_processes.py starts with `torchrun`: two whole runs, a sharded 4-bit model, and
a run in which rank 1 breaks.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from four_bit_helpers import load_4bit
from run_checks import break_at, kill
from test_linear4bit_models import adapted, results
from tiny_runs import run_config
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from ept.cli.main import app
from ept.model.linear4bit import Linear4bit
from ept.runs.predict import Predictor
from ept.runs.processes import join
from ept.runs.train import train
from ept.runs.trainer import PromptTrainer

RANK = int(os.environ["RANK"])


def spy(seen: dict[str, Any]) -> None:
    """Notes which texts this process scores, and on which of its own states it ends."""
    seen["scored"], score, load = [], Predictor.predict_batch, PromptTrainer.train

    def noted(self: Predictor, inputs: Sequence[list[int]]) -> list[int]:
        seen["scored"] += [list(ids) for ids in inputs]
        return score(self, inputs)

    def trained(self: PromptTrainer, *args: Any, **kwargs: Any) -> Any:
        output = load(self, *args, **kwargs)
        parameters = [p for p in self.run.model.parameters() if p.requires_grad]
        seen["weights"] = sum(float(p.detach().double().sum()) for p in parameters)
        seen["stopped_at"], seen["best"] = self.state.global_step, self.state.best_global_step
        seen["find_unused"] = self.model_wrapped.find_unused_parameters
        return output

    Predictor.predict_batch, PromptTrainer.train = noted, trained  # type: ignore[method-assign]


def sharded(folder: Path, storage: torch.dtype) -> dict[str, Any]:
    """Measures how far logits and gradients over 4-bit layers of a decoder, sharded with FSDP2, are from whole layers',
    and which share of each layer's packed weight this process keeps.
    """
    expected = results(adapted(load_4bit("llama", folder)), "llama")
    base = load_4bit("llama", folder, bnb_4bit_quant_storage=storage)
    model = adapted(base)
    layers = [module for module in base.modules() if isinstance(module, Linear4bit)]
    whole = [layer.weight.numel() for layer in layers]
    for block in base.model.layers:
        fully_shard(block, mesh=init_device_mesh("cpu", (2,)))
    actual = results(model, "llama")
    apart = {key: float((actual[key] - expected[key]).abs().max()) for key in expected}
    kept = [layer.weight.to_local().numel() / size for layer, size in zip(layers, whole, strict=True)]
    return {"apart": apart, "kept": kept, "dtypes": sorted({str(layer.weight.dtype) for layer in layers})}


def main(folder: Path) -> None:
    plan = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
    configs = {name: run_config(*map(Path, paths), *settings) for name, (paths, settings) in plan.items()}
    seen: dict[str, Any] = {}
    spy(seen)
    finished = train(configs["grouped"])
    seen |= {key: finished[key] for key in ("score", "best_validation", "steps", "processes", "global_batch_size")}
    (folder / f"seen_{RANK}.json").write_text(json.dumps(seen), encoding="utf-8")

    kill(configs["resumed"], step=14)  # in step 7, after the checkpoint of step 5
    (folder / f"killed_{RANK}").touch()
    train(configs["resumed"], resume=True)

    processes = join()
    found = {str(storage): sharded(folder / "four_bit", storage) for storage in (torch.float32, torch.bfloat16)}
    (folder / f"sharded_{RANK}.json").write_text(json.dumps(found), encoding="utf-8")
    processes.leave()

    if RANK == 1:
        break_at(3, ValueError("it breaks here"), pytest.MonkeyPatch())
    configs["broken"].output_dir = None
    file = folder / f"broken_{RANK}.yaml"
    file.write_text(configs["broken"].to_yaml(), encoding="utf-8")
    app(["train", "--config", str(file), "--output", str(folder / "broken")])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
