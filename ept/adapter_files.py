"""Adapters on disk: ``adapter_config.json``, ``adapter_model.safetensors``, ``README.md``.

Reading runs no code from the files: JSON and safetensors only, and every tensor's name, shape and values are checked
    before
anything is built from them. Writing is atomic file by file, the configuration last.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .config import PEFT_TYPE, EPTConfig

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
SCALE_NAME = "embedding_scale"

_CARD = """---
library_name: peft
tags:
- ept
- {method}
{base_line}---

# {title}

A soft-prompt adapter for {base}, trained with Efficient Prompt Tuning ({method}).

| | |
|---|---|
| prompt tokens | {s} |
| rank of the embedding update | {r} |
| spaces | {spaces} |
| longest input text | {max_length} tokens |
| trained parameters | {count} |

```python
from ept import EPTModel
model = EPTModel.from_pretrained(base_model, "path/to/this/folder")
```
"""


def read_config(folder: str | os.PathLike[str], **hub: Any) -> EPTConfig:
    """The configuration in ``folder``, a local folder or a repository on the hub.

    Raises:
        FileNotFoundError: there is none. ValueError: it is damaged, or of another adapter type.
    """
    path = _locate(folder, CONFIG_NAME, hub)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged, it is not JSON: {error}") from error
    if not isinstance(values, dict) or values.get("peft_type") != PEFT_TYPE:
        found = values.get("peft_type") if isinstance(values, dict) else type(values).__name__
        raise ValueError(f"{path} is not the configuration of an {PEFT_TYPE} adapter: its peft_type is {found!r}")
    known = EPTConfig.__dataclass_fields__
    if unknown := sorted(set(values) - set(known)):
        warnings.warn(
            f"{path} has keys that this version does not know and ignores: {', '.join(unknown)}", stacklevel=3
        )
    try:
        return EPTConfig(**{name: value for name, value in values.items() if name in known})
    except TypeError as error:
        raise ValueError(f"{path} has a field of the wrong type: {error}") from error


def check_weights(
    folder: str | os.PathLike[str], expected: dict[str, tuple[int, ...]], heads: bool = False, **hub: Any
) -> Path:
    """Checks the header of the weights in ``folder`` and returns their path; no tensor is read and none is made.

    Args:
        folder: a local folder or a repository on the hub.
        expected: name and shape of every tensor that must be there; ``embedding_scale`` always must.
        heads: whether tensors of trained heads (``base_model.…``) may stand beside them.

    Raises:
        FileNotFoundError: there is no safetensors file. ValueError: it is damaged, truncated, or holds other tensors.
    """
    path = _locate(folder, WEIGHTS_NAME, hub)
    with _opened(path) as file:
        found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    if heads:
        found = {name: shape for name, shape in found.items() if name in expected or not name.startswith("base_model.")}
    if problems := _mismatches(found, {**expected, SCALE_NAME: ()}):
        raise ValueError(f"{path} does not hold what its configuration describes: {'; '.join(problems)}")
    return path


def read_weights(folder: str | os.PathLike[str], expected: dict[str, tuple[int, ...]], **hub: Any) -> dict[str, Tensor]:
    """The tensors in ``folder``, on the CPU; exactly those ``expected``.

    Raises:
        FileNotFoundError, ValueError: as :func:`check_weights`; also ValueError for values that are not finite.
    """
    path = check_weights(folder, expected, **hub)
    with _opened(path) as file:
        state = {name: file.get_tensor(name) for name in (*expected, SCALE_NAME)}
    for name, tensor in state.items():
        if not tensor.is_floating_point() or not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{path}: tensor {name} holds values that are not finite numbers")
    if not float(state[SCALE_NAME]) > 0:
        raise ValueError(f"{path}: {SCALE_NAME} is {float(state[SCALE_NAME])}, it must be above 0")
    return state


def write_adapter(folder: str | os.PathLike[str], config: EPTConfig, state: dict[str, Tensor]) -> None:
    """Writes one adapter into ``folder``; each file appears whole or not at all, the configuration last."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    _replace(folder / WEIGHTS_NAME, lambda path: save_file(contiguous, path, metadata={"format": "pt"}))
    card = _model_card(config, sum(t.numel() for name, t in state.items() if name != SCALE_NAME))
    if not (folder / "README.md").exists():
        _replace(folder / "README.md", lambda path: Path(path).write_text(card, encoding="utf-8"))
    values = {name: sorted(v) if isinstance(v, set) else v for name, v in config.to_dict().items()}
    text = json.dumps({**values, "inference_mode": True}, indent=2, sort_keys=True)
    _replace(folder / CONFIG_NAME, lambda path: Path(path).write_text(text, encoding="utf-8"))


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or truncated: {error}; copy or download it again") from error


def _replace(path: Path, write: Any) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(str(temporary))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _mismatches(found: dict[str, tuple[int, ...]], expected: dict[str, tuple[int, ...]]) -> list[str]:
    problems = [f"{name} is missing" for name in expected if name not in found]
    problems += [f"{name} is not part of it" for name in found if name not in expected]
    problems += [
        f"{name} has shape {list(found[name])} instead of {list(shape)}"
        for name, shape in expected.items()
        if name in found and found[name] != tuple(shape)
    ]
    return problems


def _locate(folder: str | os.PathLike[str], name: str, hub: dict[str, Any]) -> Path:
    """The file ``name`` of an adapter, downloaded from the hub if ``folder`` is no local path."""
    subfolder = hub.get("subfolder")
    local = Path(folder, subfolder) if subfolder else Path(folder)
    if local.is_dir():
        if (local / name).is_file():
            return local / name
        if name == WEIGHTS_NAME and (local / "adapter_model.bin").exists():
            raise FileNotFoundError(
                f"{local} holds adapter_model.bin, a pickle, which could run code when loaded and is refused: only "
                f"{WEIGHTS_NAME} is read"
            )
        raise FileNotFoundError(f"{local} holds no {name}: is it the folder that save_pretrained wrote?")
    if local.exists() or os.path.isabs(folder) or str(folder).startswith(".") or str(folder).count("/") != 1:
        raise FileNotFoundError(f"{local} is not a folder with an adapter")
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(str(folder), name, **hub))
    except (EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise FileNotFoundError(
            f"{folder} is no local folder, and {name} could not be fetched from the hub: {error}"
        ) from error


def _model_card(config: EPTConfig, count: int) -> str:
    method = "EPT" if config.num_spaces or config.fusion else ("DePT" if config.r else "prompt tuning")
    base = config.base_model_name_or_path
    named = bool(base) and "/" in str(base) and not os.path.exists(str(base))
    return _CARD.format(
        method=method,
        base_line=f"base_model: {base}\n" if named else "",
        title=f"{method} adapter",
        base=f"`{base}`" if named else "a model of its own (see the configuration)",
        s=config.num_virtual_tokens,
        r=config.r,
        spaces=f"{config.num_spaces} of width {config.space_dim}" if config.num_spaces else "none",
        max_length=config.max_length,
        count=f"{count:,}",
    )
