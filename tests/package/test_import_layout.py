"""From the repository root: no `kernels` package in the way, imports that point one way, a light `import ept`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run_from_root(code: str) -> str:
    """Runs `code` in a fresh interpreter started in the repository root (which is then on `sys.path`)."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels" / "torch-ext")])}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{code}\nfailed with:\n{done.stderr}"
    return done.stdout.strip()


def modules_loaded_by(statement: str) -> set[str]:
    """Top-level names in `sys.modules` after `statement` alone."""
    code = f"import json, sys\n{statement}\nprint(json.dumps([name.partition('.')[0] for name in sys.modules]))"
    return set(json.loads(run_from_root(code).splitlines()[-1]))


@pytest.mark.parametrize(
    "statement",
    [
        "from transformers import LlamaForCausalLM, T5ForConditionalGeneration",
        "import transformers.integrations.hub_kernels",
        "import ept; from transformers import LlamaForCausalLM",
    ],
)
def test_transformers_imports_from_the_repository_root(statement: str) -> None:
    assert run_from_root(f"{statement}\nprint('imported')") == "imported"


def test_kernels_is_no_package() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not (ROOT / "kernels" / "torch-ext" / "__init__.py").exists()


def test_hugging_face_kernels_is_not_shadowed(tmp_path: Path) -> None:
    """A regular package named `kernels` later on the path wins over the folder in the repository root."""
    package = tmp_path / "kernels"
    package.mkdir()
    (package / "__init__.py").write_text("CUDAProperties = 'from the real package'\n", encoding="utf-8")
    code = f"import sys; sys.path.append({str(tmp_path)!r}); from kernels import CUDAProperties; print(CUDAProperties)"
    assert run_from_root(code) == "from the real package"


def test_ept_kernels_needs_neither_ept_nor_model_libraries() -> None:
    loaded = modules_loaded_by("import ept_kernels")
    assert "ept_kernels" in loaded
    assert not loaded & {"ept", "transformers", "peft", "datasets", "bitsandbytes"}


def test_bare_import_of_ept_loads_no_model_library() -> None:
    loaded = modules_loaded_by("import ept")
    assert "ept" in loaded
    assert not loaded & {"transformers", "peft", "datasets", "bitsandbytes", "accelerate", "sklearn", "matplotlib"}


def test_public_names_resolve() -> None:
    names = ["EPTConfig", "EPTLayer", "EPTModel", "get_ept_model"]
    statement = f"from ept import {', '.join(names)}\nprint(EPTConfig.__name__, EPTLayer.__name__, EPTModel.__name__)"
    assert run_from_root(statement) == "EPTConfig EPTLayer EPTModel"
    assert run_from_root(f"import ept; print(sorted(set({names!r}) - set(ept.__all__)))") == "[]"


def test_kernel_metadata_agrees_with_the_build_file() -> None:
    metadata = json.loads((ROOT / "kernels/torch-ext/ept_kernels/metadata.json").read_text(encoding="utf-8"))
    build = (ROOT / "kernels" / "build.toml").read_text(encoding="utf-8")
    assert {"name", "id", "version", "license", "backend", "python-depends"} <= set(metadata)
    assert f'name = "{metadata["name"]}"' in build
    assert f"version = {metadata['version']}\n" in build
    assert f'license = "{metadata["license"]}"' in build
    assert metadata["id"] == metadata["name"].replace("-", "_") == "ept_kernels"


@pytest.mark.parametrize(
    "imports", ["from ept import EPTConfig; from peft import PeftConfig", "from peft import PeftConfig; import ept"]
)
def test_peft_knows_the_adapter_type_once_ept_is_imported(tmp_path: Path, imports: str) -> None:
    run_from_root(f"from ept import EPTConfig; EPTConfig(task_type='CAUSAL_LM').save_pretrained({str(tmp_path)!r})")
    code = f"{imports}\nprint(type(PeftConfig.from_pretrained({str(tmp_path)!r})).__name__)"
    assert run_from_root(code) == "EPTConfig"
