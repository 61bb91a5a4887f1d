"""Adapters on disk: `adapter_config.json`, `adapter_model.safetensors`, `README.md`.

An adapter may come from a stranger. Reading one runs no code from its files, JSON and safetensors only; follows no link
out of its folder; looks nothing up that its configuration names; and builds nothing before the header of the weights
has shown that they have the sizes which the configuration claims. Writing is atomic file by file, the configuration
last.
"""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..config import PEFT_TYPE, EPTConfig
from ..embedding import embedding_width
from ..utils.messages import listed, reason, shown, shown_name
from .base_model import head_shapes, infer_task_type, input_embedding, trained_heads

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
SCALE_NAME = "embedding_scale"
LARGEST_CONFIG = 1 << 20  # bytes; a configuration has about two thousand

# What PEFT's configurations have beside the fields that EPTConfig checks itself, and what may stand in them.
_PEFT_FIELDS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("base_model_name_or_path", "revision", "peft_version"), (str, type(None))),
    **dict.fromkeys(("prompt_tuning_init_text", "tokenizer_name_or_path"), (str, type(None))),
    **dict.fromkeys(
        ("token_dim", "num_layers", "num_attention_heads", "num_transformer_submodules"), (int, type(None))
    ),
    "inference_mode": (bool,),
    "auto_mapping": (dict, type(None)),
}
_HUB_ARGUMENTS = ("subfolder", "revision", "cache_dir", "token", "local_files_only")
_DTYPES = ("F64", "F32", "F16", "BF16")  # safetensors' names
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)

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
    """The configuration in `folder`, a local folder or a repository on the hub.

    Raises:
        FileNotFoundError: there is none. ValueError: it is damaged, or of another adapter type.
    """
    path = _locate(folder, CONFIG_NAME, hub)
    values = _read_json(path)
    if not isinstance(values, dict) or values.get("peft_type") != PEFT_TYPE:
        found = values.get("peft_type") if isinstance(values, dict) else type(values).__name__
        raise ValueError(f"{path} is not the configuration of an {PEFT_TYPE} adapter: its peft_type is {shown(found)}")
    known = EPTConfig.__dataclass_fields__
    if unknown := sorted(set(values) - set(known)):
        warnings.warn(
            f"{path} has keys that this version does not know and ignores: {listed(map(shown_name, unknown))}",
            stacklevel=3,
        )
    fields = {name: value for name, value in values.items() if name in known}
    for name, types in _PEFT_FIELDS.items():
        if name in fields and type(fields[name]) not in types:
            allowed = " or ".join("null" if t is type(None) else t.__name__ for t in types)
            raise ValueError(
                f"{path} has a field of the wrong type: {name} must be {allowed}, got {shown(fields[name])}"
            )
    fields.pop("auto_mapping", None)  # names of classes to import, which EPT has no use for
    try:
        return EPTConfig(**fields)
    except TypeError as error:
        raise ValueError(f"{path} has a field of the wrong type: {reason(error)}") from error


def weight_shapes(folder: str | os.PathLike[str], **hub: Any) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor in `folder`, from the header alone; errors as `read_weights`."""
    with _opened(_locate(folder, WEIGHTS_NAME, hub)) as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118


def read_weights(folder: str | os.PathLike[str], expected: dict[str, tuple[int, ...]], **hub: Any) -> dict[str, Tensor]:
    """The tensors in `folder`, on the CPU in the file's dtype; exactly those `expected`.

    The header is checked first: no tensor is made of a file that does not hold what is expected.

    Args:
        folder: a local folder or a repository on the hub.
        expected: name and shape of every tensor that must be there; `embedding_scale` always must.

    Raises:
        FileNotFoundError: there is no safetensors file. ValueError: it is damaged, truncated, holds other tensors, or
            values that are not finite float32 numbers.
    """
    path = _locate(folder, WEIGHTS_NAME, hub)
    with _opened(path) as file:
        header = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        found = {name: (tuple(entry.get_shape()), str(entry.get_dtype())) for name, entry in header.items()}
        if problems := _mismatches(found, {**expected, SCALE_NAME: ()}):
            raise ValueError(f"{path} does not hold what its configuration describes: {listed(problems, '; ')}")
        state = {name: file.get_tensor(name) for name in found}
    for name, tensor in state.items():
        if not bool(torch.isfinite(tensor.float()).all()):
            raise ValueError(f"{path}: tensor {name} holds values that are not finite numbers")
    if not float(state[SCALE_NAME].float()) > 0:
        raise ValueError(f"{path}: {SCALE_NAME} is {float(state[SCALE_NAME])}, it must be above 0")
    return state


def read_fitting(
    config: EPTConfig, model: Any, is_trainable: bool, model_id: str | os.PathLike[str], hub: dict[str, Any]
) -> dict[str, Tensor]:
    """The weights of an adapter that fits `model`. Nothing is made of it before its files are known to be whole: a
    configuration may claim sizes that its weights do not have.
    """
    _check_fits(config, model, is_trainable)
    task_type = config.task_type or infer_task_type(model)
    heads = config.modules_to_save
    if heads is None:
        heads = trained_heads(model) if task_type == "SEQ_CLS" else []
    expected = {**config.parameter_shapes(_width(model)), **head_shapes(model, heads)}
    return read_weights(model_id, expected, **hub)


def write_adapter(folder: str | os.PathLike[str], config: EPTConfig, state: dict[str, Tensor]) -> None:
    """Writes one adapter into `folder`; each file appears whole or not at all, the configuration last."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    write_whole(folder / WEIGHTS_NAME, lambda path: save_file(contiguous, path, metadata={"format": "pt"}))
    card = _model_card(config, sum(t.numel() for name, t in state.items() if name != SCALE_NAME))
    if not (folder / "README.md").exists():
        write_whole(folder / "README.md", lambda path: Path(path).write_text(card, encoding="utf-8"))
    values = {name: sorted(v) if isinstance(v, set) else v for name, v in config.to_dict().items()}
    text = json.dumps({**values, "inference_mode": True}, indent=2, sort_keys=True)
    write_whole(folder / CONFIG_NAME, lambda path: Path(path).write_text(text, encoding="utf-8"))


def hub_arguments(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {name: kwargs[name] for name in _HUB_ARGUMENTS if kwargs.get(name) is not None}


def write_whole(path: Path, write: Callable[[str], Any]) -> None:
    """Calls `write` with the name of a file beside `path` and moves that into place: `path` is never half
    written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.unlink(missing_ok=True)  # a link of that name must not be written through
        write(str(temporary))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _width(model: Any) -> int:
    return embedding_width(input_embedding(model))


def _check_fits(config: EPTConfig, model: Any, is_trainable: bool) -> None:
    width = _width(model)
    ours, theirs = getattr(model, "name_or_path", None), config.base_model_name_or_path
    if config.token_dim is not None and config.token_dim != width:
        raise ValueError(
            f"the adapter was made for embeddings of width {shown(config.token_dim)} ({shown(theirs or 'unnamed')}), "
            f"{ours or type(model).__name__} has {width}: load it with its own base model"
        )
    if config.folded and is_trainable:
        raise ValueError(
            "the adapter is folded into its inference form and cannot be trained: load the one it was folded from"
        )
    if ours and theirs and str(ours) != str(theirs):
        warnings.warn(
            f"the adapter was made for {shown(theirs)}, this base model is {ours!r}; results are those of the adapter "
            "only if the weights are the same",
            stacklevel=3,
        )


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or truncated: {reason(error)}; copy or download it again") from error


def _read_json(path: Path) -> Any:
    """What `path` holds.

    Raises:
        ValueError: it is too large or no JSON, or says something twice.
    """
    if (size := path.stat().st_size) > LARGEST_CONFIG:
        raise ValueError(f"{path} has {size:,} bytes, a configuration at most {LARGEST_CONFIG:,}: it is damaged")

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) < len(pairs):
            names = [name for name, _ in pairs]
            twice = sorted(name for name in values if names.count(name) > 1)
            raise ValueError(f"{listed(map(shown_name, twice))} stands there twice")
        return values

    def refuse(constant: str) -> Any:
        raise ValueError(f"{constant} is no JSON number")

    try:
        return json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=once, parse_constant=refuse)
    except (ValueError, RecursionError) as error:  # what is not UTF-8, and integers of more than 4300 digits, included
        raise ValueError(f"{path} is damaged, it is not JSON: {reason(error)}") from error


def _mismatches(found: dict[str, tuple[tuple[int, ...], str]], expected: dict[str, tuple[int, ...]]) -> list[str]:
    problems = [f"{name} is missing" for name in expected if name not in found]
    problems += [f"{shown_name(name)} is not part of it" for name in found if name not in expected]
    for name in found.keys() & expected.keys():
        shape, dtype = found[name]
        if shape != tuple(expected[name]):
            problems.append(f"{name} has shape {list(shape)} instead of {list(expected[name])}")
        elif dtype not in _DTYPES:
            problems.append(f"{name} has dtype {dtype} instead of one of {', '.join(_DTYPES)}")
    return problems


def _locate(folder: str | os.PathLike[str], name: str, hub: dict[str, Any]) -> Path:
    """The file `name` of an adapter, downloaded from the hub if `folder` is no local path."""
    subfolder = hub.get("subfolder")
    local = Path(folder, subfolder) if subfolder else Path(folder)
    if local.is_dir():
        if (local / name).is_file():
            return _inside(local / name, Path(folder))
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


def _inside(path: Path, folder: Path) -> Path:
    """`path`, unless it is a link out of `folder`. The hub's cache keeps files as links into its `blobs`.

    Raises:
        ValueError: it leads elsewhere.
    """
    root, target = folder.resolve(), path.resolve()
    allowed = [root, *(parent.parent / "blobs" for parent in (root, *root.parents) if parent.name == "snapshots")]
    if not any(target.is_relative_to(place) for place in allowed):
        raise ValueError(
            f"{path} is a link out of the adapter's folder and is not followed: if you trust it, copy the file it "
            "leads to in its place"
        )
    return path


def _model_card(config: EPTConfig, count: int) -> str:
    method = "EPT" if config.num_spaces or config.fusion else ("DePT" if config.r else "prompt tuning")
    base = config.base_model_name_or_path
    # A name that a stranger chose goes into the card's YAML only if it is one that the hub allows.
    named = isinstance(base, str) and _HUB_NAME.fullmatch(base) is not None and not os.path.exists(base)
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
