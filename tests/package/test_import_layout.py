"""From the repository root: no `kernels` package in the way, imports that point one way, a light `import ept`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from checkout import ROOT, run_python

LIBRARIES = {"transformers", "peft", "datasets", "bitsandbytes", "accelerate", "sklearn", "matplotlib"}


OURS_FIRST = """
import json, sys
def loaded(): return sorted({name.partition('.')[0] for name in sys.modules})
import ept_kernels
answers = {'ept_kernels': loaded()}
import ept
answers['ept'] = loaded()
import ept.tasks
answers['ept.tasks'] = loaded()
from ept import EPTConfig, EPTLayer, EPTModel, get_ept_model
answers['names'] = [public.__name__ for public in (EPTConfig, EPTLayer, EPTModel, get_ept_model)]
answers['all'] = list(ept.__all__)
from transformers import LlamaForCausalLM
from peft import PeftConfig
EPTConfig(task_type='CAUSAL_LM').save_pretrained(FOLDER)
answers['adapter'] = type(PeftConfig.from_pretrained(FOLDER)).__name__
from peft import PeftModel
answers['model'] = PeftModel.from_pretrained.__func__.__code__.co_filename
print(json.dumps(answers))
"""
THEIRS_FIRST = """
from transformers import LlamaForCausalLM, T5ForConditionalGeneration
import transformers.integrations.hub_kernels
IMPORTS
print(type(PeftConfig.from_pretrained(FOLDER)).__name__)
print(PeftModel.from_pretrained.__func__.__code__.co_filename)
"""
BOTH_ORDERS = (
    "from peft import PeftConfig, PeftModel; import ept",
    "import ept; from peft import PeftConfig, PeftModel",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("adapter")


@pytest.fixture(scope="module")
def answers(folder: Path) -> dict[str, Any]:
    """Asks one interpreter in the repository root that imports our packages before any other."""
    return json.loads(run_python("-c", OURS_FIRST.replace("FOLDER", repr(str(folder)))).stdout.splitlines()[-1])


@pytest.mark.parametrize(
    "package, strangers",
    [("ept_kernels", {"ept", *LIBRARIES}), ("ept", LIBRARIES), ("ept.tasks", {"datasets", "sklearn", "transformers"})],
)
def test_an_import_loads_no_model_library(answers: dict[str, Any], package: str, strangers: set[str]) -> None:
    assert package.partition(".")[0] in answers[package]
    assert not strangers & set(answers[package])


def test_public_names_resolve(answers: dict[str, Any]) -> None:
    assert answers["names"] == ["EPTConfig", "EPTLayer", "EPTModel", "get_ept_model"]
    assert set(answers["names"]) <= set(answers["all"])


@pytest.mark.parametrize("imports", BOTH_ORDERS)
def test_transformers_and_peft_import_in_either_order(answers: dict[str, Any], folder: Path, imports: str) -> None:
    """PEFT's functions know the adapter type once ept is imported, before PEFT or after it."""
    code = THEIRS_FIRST.replace("FOLDER", repr(str(folder))).replace("IMPORTS", imports)
    for config, function in ((answers["adapter"], answers["model"]), run_python("-c", code).stdout.splitlines()[-2:]):
        assert config == "EPTConfig"
        assert Path(function).name == "registration.py"


def test_kernels_is_no_package() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not (ROOT / "kernels" / "torch-ext" / "__init__.py").exists()


def test_hugging_face_kernels_is_not_shadowed(tmp_path: Path) -> None:
    """A regular package named `kernels` later on the path wins over the folder in the repository root."""
    package = tmp_path / "kernels"
    package.mkdir()
    (package / "__init__.py").write_text("CUDAProperties = 'from the real package'\n", encoding="utf-8")
    code = f"import sys; sys.path.append({str(tmp_path)!r}); from kernels import CUDAProperties; print(CUDAProperties)"
    assert run_python("-c", code).stdout.strip() == "from the real package"


def test_kernel_metadata_agrees_with_the_build_file() -> None:
    metadata = json.loads((ROOT / "kernels/torch-ext/ept_kernels/metadata.json").read_text(encoding="utf-8"))
    build = (ROOT / "kernels" / "build.toml").read_text(encoding="utf-8")
    assert {"name", "id", "version", "license", "backend", "python-depends"} <= set(metadata)
    assert f'name = "{metadata["name"]}"' in build
    assert f"version = {metadata['version']}\n" in build
    assert f'license = "{metadata["license"]}"' in build
    assert metadata["id"] == metadata["name"].replace("-", "_") == "ept_kernels"
