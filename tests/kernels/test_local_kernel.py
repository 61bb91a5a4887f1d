"""The kernel repository as Hugging Face's `kernels` package loads it.

That package is not among this project's requirements: bitsandbytes looks for it when it is imported and then fetches
code from the model hub. `make test` installs it aside and runs these tests with it.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "kernels" / "torch-ext" / "ept_kernels"

LOAD = """
import json, sys
from pathlib import Path
import torch
import kernels
{before}
loaded = kernels.get_local_kernel(Path({path!r}))
ids, positions = torch.tensor([[2, 0]]), torch.tensor([[0, -1]])
table, prompt = torch.eye(3), torch.full((1, 3), 5.0)
A, B = torch.tensor([[2.0]]), torch.tensor([[1.0, 0.0, 1.0]])
out = loaded.prompted_embedding(ids, positions, table, prompt, A, B, 0.5)
print(json.dumps([kernels.__file__, loaded.__file__, loaded.backend("cpu"), out.tolist()]))
"""


def load(path: str, before: str = "") -> list:
    """Returns what a fresh interpreter in the repository root gets; `ept_kernels` is not on its path by itself."""
    spec = importlib.util.find_spec("kernels")
    if spec is None or spec.origin is None:  # None: the folder of this repository
        pytest.skip("Hugging Face's kernels package is not installed; `make test` runs this with it")
    env = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "EPT_KERNELS")}
    env |= {"PYTHONPATH": os.pathsep.join([str(ROOT), str(Path(spec.origin).parents[1])]), "HF_HUB_OFFLINE": "1"}
    code = LOAD.format(path=path, before=before)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("path", ["kernels", "kernels/torch-ext/ept_kernels"], ids=["repository", "source"])
def test_local_kernel_loads_and_runs(path):
    kernels_file, file, backend, out = load(path)
    assert Path(kernels_file).parent.parent != ROOT
    assert Path(file).resolve() == PACKAGE / "__init__.py"
    assert backend == "reference"
    assert out == [[[5.0, 5.0, 5.0], [1.0, 0.0, 2.0], [1.0, 0.0, 0.0]]]


def test_a_second_copy_in_one_process_uses_the_operators_that_are_there():
    before = f"sys.path.insert(0, {str(PACKAGE.parent)!r}); import ept_kernels"
    *_, out = load("kernels", before)
    assert out[0][1] == [1.0, 0.0, 2.0]


def test_layout_is_that_of_a_torch_noarch_build():
    """One package without compiled parts under `torch-ext`, and the variant that loads on every backend."""
    tomllib = pytest.importorskip("tomllib", reason="needs Python 3.11")
    assert (ROOT / "kernels/build/torch-universal").resolve() == PACKAGE
    assert [p.name for p in (ROOT / "kernels/torch-ext").iterdir() if p.name != "__pycache__"] == ["ept_kernels"]
    build = tomllib.loads((ROOT / "kernels/build.toml").read_text(encoding="utf-8"))
    assert build["general"]["name"].replace("-", "_") == PACKAGE.name
    assert set(build["general"]["backends"]) == {"cuda", "rocm", "xpu", "cpu"}
    assert set(build["torch-noarch"]["pyext"]) >= {p.suffix[1:] for p in PACKAGE.rglob("*.*") if p.suffix != ".pyc"}
    imports = [line for p in PACKAGE.glob("*.py") for line in p.read_text(encoding="utf-8").splitlines()]
    absolute = [line for line in imports if line.lstrip().startswith(("from ept_kernels", "import ept_kernels"))]
    assert absolute == [], "a kernel package is loaded under a name of the loader's choice"
