"""The rows of the splits that exist in a folder, in files or on the Hub."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..utils.messages import listed, reason
from .drawing import SPLITS
from .files import READERS, File, Row, name_labels, read_rows

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

OTHER_NAMES = {"train": ("training",), "validation": ("valid", "val", "dev"), "test": ("testing",)}
"""Other usual names of the splits' files."""
SHARDS = "train-*-of-*"
"""Files of the train split in a copy of a Hub dataset."""
TRAIN_FILE = f"train{{{','.join(READERS)}}}"
RawSplits = dict[str, tuple[str, list[Row]]]
"""Source (for messages) and rows, by split."""


def raw_splits(
    data_dir: File | None,
    files: Mapping[str, File | None],
    encoding: str | None = None,
    *,
    hub: tuple[str, str | None] | None = None,
    hub_names: Sequence[str] = SPLITS,
    columns: Sequence[str] = (),
    names_labels: bool = False,
) -> RawSplits:
    """Reads the splits that exist.

    Args:
        files: by split.
        hub: path and configuration of the dataset on the Hub, used if neither a folder nor a file is given.
        hub_names: the Hub's names of the splits; files in a folder may have these names too.
        columns: needed by the rows, named in an error message.
        names_labels: as in `read_rows`; also for Hub datasets and stored ones.
    """
    given = {split: Path(file) for split, file in files.items() if file is not None}
    names = ", ".join(f"{split}_file" for split in given)
    if data_dir is not None:
        folder = Path(data_dir)
        if given:
            raise ValueError(f"data_dir={str(data_dir)!r} and {names}: give one or the other")
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder}: no such folder: data_dir must hold {TRAIN_FILE}")
        there = [path for suffix in READERS for path in sorted(folder.iterdir()) if path.suffix.lower() == suffix]
        there = [path for path in there if path.is_file()]
        for split, hub_name in zip(SPLITS, hub_names):
            names_of_split = ((hub_name,), (split,), OTHER_NAMES[split])
            found = next(filter(None, ([p for p in there if p.stem.lower() in n] for n in names_of_split)), [])
            if len(found) > 1:
                raise ValueError(f"{folder} holds {', '.join(p.name for p in found)}: keep one file for each split")
            if found:
                given[split] = found[0]
        if not given and (loaded := _stored(folder)) is not None:
            return _rows_of(loaded, str(folder), hub_names, names_labels)
        if "train" not in given:
            present = ", ".join(sorted(path.name for path in folder.iterdir())) or "nothing"
            raise FileNotFoundError(f"{folder} has no train split: it needs {TRAIN_FILE}, it holds {present}")
        if unread := [path.name for path in there if path not in given.values()]:
            logger.warning("%s: %s is not a train, validation or test file and is not read", folder, listed(unread))
    elif given and "train" not in given:
        raise ValueError(f"{names} without train_file: give train_file as well")
    if given:
        return {split: (str(path), read_rows(path, encoding, names_labels)) for split, path in given.items()}
    if hub is None:
        raise ValueError("the task is not on the hub: give data_dir or train_file")
    from datasets import load_dataset

    path, config = hub
    name = f"{path} ({config})" if config is not None else path
    try:
        loaded = load_dataset(path, config)
    except OSError as error:  # what datasets raises for an unreachable Hub and for a missing dataset
        wanted = f" with the columns {', '.join(columns)}" if columns else ""
        raise ConnectionError(
            f"cannot load {name} from the hub: {error}. Without a connection give data_dir, a folder with "
            f"{TRAIN_FILE} and likewise validation and test,{wanted}"
        ) from error
    except ValueError as error:  # the dataset has several configurations, or none of this name
        raise ValueError(f"cannot load {name} from the hub: {reason(error)}") from error
    return _rows_of(loaded, name, hub_names, names_labels)


def _stored(folder: Path) -> Mapping[str, Dataset] | None:
    """Loads a dataset that `save_to_disk` wrote, or a copy of a Hub dataset; None if the folder is neither."""
    is_saved = (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file()
    if not is_saved and not [*folder.glob(SHARDS), *folder.glob(f"data/{SHARDS}")]:
        return None
    from datasets import Dataset, load_dataset, load_from_disk

    try:
        loaded = load_from_disk(str(folder)) if is_saved else load_dataset(str(folder))
    except Exception as error:  # depends on what is damaged
        raise ValueError(f"{folder} holds a dataset that cannot be loaded: {reason(error)}") from error
    return {"train": loaded} if isinstance(loaded, Dataset) else loaded


def _rows_of(loaded: Mapping[str, Dataset], name: str, hub_names: Sequence[str], names_labels: bool) -> RawSplits:
    splits: RawSplits = {}
    for split, hub_name in zip(SPLITS, hub_names):
        found = next((own for own in (hub_name, split, *OTHER_NAMES[split]) if own in loaded), None)
        if found is None:
            continue
        rows = loaded[found].to_list()
        if names_labels:
            name_labels(rows, loaded[found].features)
        splits[split] = (f"{name} {found}", rows)
    if "train" not in splits:
        raise FileNotFoundError(f"{name} has no split '{hub_names[0]}', only {', '.join(loaded)}")
    return splits
