"""A warm kernel cache: filled by `aot.py` on one machine, without a GPU, for another one that has it.

It is Triton's own cache, binaries and metadata only, and is unpacked into the cache of the machine at hand, wherever
that lies. `docs/kernels.md` lists what Triton finds a kernel by; driver, CUDA runtime and PyTorch are no part of that.
"""

from __future__ import annotations

import hashlib
import json
import platform
import shutil
import tempfile
from importlib.metadata import version
from pathlib import Path

from .compile_only import TARGETS

MADE_WITH = "made_with.json"
PACKED = (".cubin", ".hsaco", ".json")


def made_with(target: str) -> dict[str, str]:
    """Names what a cache for `target` is found by on this machine, the kernels aside."""
    from triton._C.libtriton import get_cache_invalidating_env_vars
    from triton.backends.compiler import GPUTarget
    from triton.compiler.compiler import make_backend

    try:
        from triton.runtime.cache import triton_key
    except ImportError:  # before triton 3.5
        from triton.compiler.compiler import triton_key

    backend = make_backend(GPUTarget(*TARGETS[target][:3]))
    found_by = f"{triton_key()}-{backend.hash()}-{sorted(get_cache_invalidating_env_vars().items())}"
    return {
        "target": target,
        "triton": version("triton"),
        "python": ".".join(platform.python_version_tuple()[:2]),
        "found_by": hashlib.sha256(found_by.encode()).hexdigest(),
    }


def pack(folder: Path, target: str) -> Path:
    """Packs the cache in `folder`, filled on this machine, into a file beside it; removes all else from the folder."""
    for path in folder.glob("*/*"):
        if path.suffix not in PACKED:
            path.unlink()
    (folder / MADE_WITH).write_text(json.dumps(made_with(target)), encoding="utf-8")
    return Path(shutil.make_archive(str(folder), "xztar", folder))


def unpack(archive: Path) -> int:
    """Puts the packed kernels into this machine's cache, `TRITON_CACHE_DIR` if set; returns how many there are.

    Raises:
        ValueError: the file is none of `pack`'s, or was made with what finds nothing here.
    """
    from triton.runtime.cache import FileCacheManager

    with tempfile.TemporaryDirectory() as folder:
        shutil.unpack_archive(archive, folder, filter="data")
        about = Path(folder, MADE_WITH)
        made = json.loads(about.read_text(encoding="utf-8")) if about.is_file() else {}
        if made.get("target") not in TARGETS:
            raise ValueError(f"{archive} holds no kernels: make it with `python -m ept_kernels.dev.aot --warm`")
        here = made_with(made["target"])
        if made != here:
            theirs, ours = (f"triton {x['triton']} for Python {x['python']}" for x in (made, here))
            other = f"here is {ours}" if theirs != ours else "here is another build of it, or other TRITON_ variables"
            raise ValueError(
                f"{archive} was made with {theirs}, {other}: nothing of it would be found. Make it with the same"
            )
        kernels = [path for path in Path(folder).iterdir() if path.is_dir()]
        for kernel in kernels:
            cache = FileCacheManager(kernel.name)
            # A group names its folder; it is written anew.
            files = [path for path in kernel.iterdir() if not path.name.startswith("__grp__")]
            paths = {path.name: cache.put(path.read_bytes(), path.name) for path in files}
            cache.put_group(next(name for name in paths if name.endswith(".json")), paths)
    return len(kernels)
