"""Adapters on disk, which may come from strangers: `adapter_config.json`, `adapter_model.safetensors`, `README.md`.

Reading an adapter runs no code from its files (JSON and safetensors only), follows no link out of its folder, looks up
nothing that its configuration names, and builds nothing before the header of the weights has confirmed the sizes in
the configuration. Each file is written atomically, the configuration last.
"""

from __future__ import annotations

import json
import os
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..config import PEFT_TYPE, EPTConfig
from ..embedding import embedding_width
from ..utils.files import write_atomically
from ..utils.messages import listed, reason, shown, shown_name
from .base_model import head_shapes, input_embedding, trained_heads
from .facts import TASKS_WITH_HEAD
from .reading import infer_task_type

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
SCALE_NAME = "embedding_scale"
MAX_CONFIG_BYTES = 1 << 20  # a configuration has about two thousand

# PEFT's own fields, which EPTConfig does not check, and their types.
_PEFT_FIELDS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("base_model_name_or_path", "revision", "peft_version"), (str, type(None))),
    **dict.fromkeys(("prompt_tuning_init_text", "tokenizer_name_or_path"), (str, type(None))),
    **dict.fromkeys(("token_dim", "num_layers", "num_attention_heads"), (int, type(None))),
    "num_transformer_submodules": (int, type(None)),
    "inference_mode": (bool,),
    **dict.fromkeys(("auto_mapping", "tokenizer_kwargs"), (dict, type(None))),
}
HUB_ARGUMENTS = ("subfolder", "revision", "cache_dir", "token", "local_files_only")
# By safetensors' names.
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)


def read_config(folder: str | os.PathLike[str], /, **hub: Any) -> EPTConfig:
    """Reads the configuration in `folder`, a local folder or a repository on the Hub.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged, or of another adapter type.
    """
    path = _locate(folder, CONFIG_NAME, hub)
    if (size := path.stat().st_size) > MAX_CONFIG_BYTES:
        raise ValueError(
            f"{path} has {size:,} bytes, but a configuration has at most {MAX_CONFIG_BYTES:,}: it is damaged"
        )

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        counts = Counter(name for name, _ in pairs)
        if repeated := sorted(name for name, count in counts.items() if count > 1):
            raise ValueError(f"duplicate key {listed(map(shown_name, repeated))}")
        return dict(pairs)

    def refuse(constant: str) -> Any:
        raise ValueError(f"{constant} is not a JSON number")

    try:
        values = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=unique, parse_constant=refuse)
    except (ValueError, RecursionError) as error:  # also not UTF-8, or over 4300 digits
        raise ValueError(f"{path} is damaged: it is not JSON ({reason(error)})") from error
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
    fields.pop("auto_mapping", None)  # names of classes to import, which EPT does not use
    try:
        return EPTConfig(**fields)
    except TypeError as error:
        raise ValueError(f"{path} has a field of the wrong type: {reason(error)}") from error


def is_same_name(ours: str, theirs: str) -> bool:
    """Checks whether two names may refer to the same model: a path may have been given from another folder."""
    one, other = ([part for part in Path(name).parts if part not in ("..", ".")] for name in (ours, theirs))
    length = min(len(one), len(other))
    return one[-length:] == other[-length:]


def read_adapter(
    folder: str | os.PathLike[str], model: Any, is_trainable: bool, config: EPTConfig | None = None, /, **hub: Any
) -> tuple[EPTConfig, dict[str, Tensor]]:
    """Reads configuration and weights of an adapter that fits `model`; arguments and errors as in `from_pretrained`."""
    config = config if config is not None else read_config(folder, **hub)
    config.inference_mode = not is_trainable
    width = embedding_width(input_embedding(model))
    ours, theirs = getattr(model, "name_or_path", None), config.base_model_name_or_path
    if config.token_dim is not None and config.token_dim != width:
        raise ValueError(
            f"the adapter was made for embeddings of width {shown(config.token_dim)} ({shown(theirs or 'unnamed')}), "
            f"but {ours or type(model).__name__} has {width}: load it with its own base model"
        )
    if config.folded and is_trainable:
        raise ValueError(
            "the adapter is folded into its inference form and cannot be trained: load the adapter that it was "
            "folded from"
        )
    if ours and theirs and not is_same_name(str(ours), str(theirs)):
        warnings.warn(
            f"the adapter was made for {shown(theirs)}, but this base model is {ours!r}: its results hold only if "
            "the weights are the same",
            stacklevel=3,
        )
    heads = config.modules_to_save
    if heads is None:
        heads = trained_heads(model) if (config.task_type or infer_task_type(model)) in TASKS_WITH_HEAD else []
    # Read before anything is made from the configuration, which may claim sizes that the weights do not have.
    return config, read_weights(folder, {**config.parameter_shapes(width), **head_shapes(model, heads)}, **hub)


def weight_shapes(folder: str | os.PathLike[str]) -> dict[str, tuple[int, ...]]:
    """Reads name and shape of every tensor in `folder` from the header alone; errors as in `read_weights`."""
    with _opened(_locate(folder, WEIGHTS_NAME, {})) as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118


def read_weights(
    folder: str | os.PathLike[str], expected: dict[str, tuple[int, ...]], /, **hub: Any
) -> dict[str, Tensor]:
    """Reads the tensors in `folder`, on the CPU in the file's dtype: those `expected`, and `embedding_scale`.

    Raises:
        FileNotFoundError: there is no safetensors file.
        ValueError: it is damaged or truncated, or holds other tensors or values that are not finite float32 numbers.
    """
    path = _locate(folder, WEIGHTS_NAME, hub)
    with _opened(path) as file:
        found = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        described = {name: (tuple(found[name].get_shape()), str(found[name].get_dtype())) for name in found}
        _check_described(described, expected, str(path))
        state = {name: file.get_tensor(name) for name in found}
    _check_values(state, str(path))
    return state


def check_weights(state: Mapping[str, Tensor], expected: dict[str, tuple[int, ...]], source: str) -> None:
    """Raises the `ValueError` of `read_weights` for tensors that it would refuse; `source` names their origin."""
    names = {dtype: name for name, dtype in _DTYPES.items()}
    described = {name: (tuple(t.shape), names.get(t.dtype, str(t.dtype))) for name, t in state.items()}
    _check_described(described, expected, source)
    _check_values(state, source)


def _check_described(
    found: Mapping[str, tuple[tuple[int, ...], str]], expected: Mapping[str, tuple[int, ...]], source: str
) -> None:
    """Compares shapes and dtypes of the tensors found with those expected."""
    expected = {**expected, SCALE_NAME: ()}
    problems = [f"{name} is missing" for name in expected if name not in found]
    problems += [f"{shown_name(name)} is not part of it" for name in found if name not in expected]
    for name in found.keys() & expected.keys():
        shape, dtype = found[name]
        if shape != tuple(expected[name]):
            problems.append(f"{name} has shape {list(shape)} instead of {list(expected[name])}")
        elif dtype not in _DTYPES:
            problems.append(f"{name} has dtype {dtype} instead of one of {', '.join(_DTYPES)}")
    if problems:
        raise ValueError(f"{source} does not hold what its configuration describes: {listed(problems, '; ')}")


def _check_values(state: Mapping[str, Tensor], source: str) -> None:
    for name, tensor in state.items():
        if not bool(torch.isfinite(tensor.float()).all()):
            raise ValueError(f"{source}: tensor {name} holds values that are not finite numbers")
    if not float(state[SCALE_NAME].float()) > 0:
        raise ValueError(f"{source}: {SCALE_NAME} is {float(state[SCALE_NAME])}, but must be above 0")


def write_adapter(folder: str | os.PathLike[str], config: EPTConfig, state: dict[str, Tensor]) -> None:
    """Writes one adapter into `folder`; each file appears whole or not at all, the configuration last."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / WEIGHTS_NAME, state)
    if not (folder / "README.md").exists():
        count = sum(t.numel() for name, t in state.items() if name != SCALE_NAME)
        write_atomically(folder / "README.md", _model_card(config, count))
    values = {name: sorted(v) if isinstance(v, set) else v for name, v in config.to_dict().items()}
    text = json.dumps({**values, "inference_mode": True}, indent=2, sort_keys=True)
    write_atomically(folder / CONFIG_NAME, text)


def write_tensors(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes `tensors` as safetensors; the file appears whole or not at all."""
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_atomically(file, lambda path: save_file(contiguous, path, metadata={"format": "pt"}))


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or truncated: {reason(error)}; copy or download it again") from error


def _locate(folder: str | os.PathLike[str], name: str, hub: dict[str, Any]) -> Path:
    """Finds the file `name` of an adapter, downloading it from the Hub if `folder` is not a local path."""
    hub = {argument: hub[argument] for argument in HUB_ARGUMENTS if hub.get(argument) is not None}
    local = Path(folder, hub.get("subfolder") or "")
    if local.is_dir():
        if (path := local / name).is_file():
            # A link must not lead out of the folder, except in the Hub's cache, whose files are links into `blobs`.
            root, target = Path(folder).resolve(), path.resolve()
            caches = (parent.parent / "blobs" for parent in (root, *root.parents) if parent.name == "snapshots")
            if not any(target.is_relative_to(place) for place in (root, *caches)):
                raise ValueError(
                    f"{path} is a link to a file outside the adapter's folder and is not followed: if you trust it, "
                    "replace it with a copy of that file"
                )
            return path
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
            f"{folder} is not a local folder, and {name} could not be fetched from the hub: {error}"
        ) from error


def _method_name(config: EPTConfig) -> str:
    if config.num_spaces or config.fusion:
        return "EPT"
    if config.prompt_rank or config.residual_dim:
        return "ULPT" if config.prompt_rank else "residual prompt tuning"
    return ("ADePT" if config.update == "token" else "DePT") if config.r else "prompt tuning"


def _task_rows(config: EPTConfig) -> str:
    """Returns the model card's rows about the task, as code because the texts may come from anybody."""
    rows = {"text template": config.template, "labels": ", ".join(config.label_words or [])}
    plain = {name: " ".join((text or "").replace("`", "'").replace("|", "\\|").split()) for name, text in rows.items()}
    return "".join(f"| {name} | `{text}` |\n" for name, text in plain.items() if text)


def _model_card(config: EPTConfig, count: int) -> str:
    method = _method_name(config)
    base = config.base_model_name_or_path
    # A stranger may have chosen the name: only a valid Hub name or an existing folder goes into the card.
    is_folder = isinstance(base, str) and os.path.isdir(base)
    named = isinstance(base, str) and _HUB_NAME.fullmatch(base) is not None and not is_folder
    header = {"library_name": "peft", "tags": ["ept", method], **({"base_model": base} if named or is_folder else {})}
    return f"""---
{yaml.safe_dump(header, sort_keys=False)}---

# {method} adapter

A soft-prompt adapter for {f"`{base}`" if named else "a model of its own (see the configuration)"}, trained with \
Efficient Prompt Tuning ({method}).

| | |
|---|---|
| prompt tokens | {config.num_virtual_tokens} |
| rank of the embedding update | {config.r} |
| spaces | {f"{config.num_spaces} of width {config.space_dim}" if config.num_spaces else "none"} |
| longest input text | {config.max_length} tokens |
| trained parameters | {count:,} |
{_task_rows(config)}
```python
from ept import EPTModel
model = EPTModel.from_pretrained(base_model, "path/to/this/folder")
```
"""
