"""`ept export`"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from typer import Argument, Option

from .common import JSON, SET, answer, quiet


def export(
    source: Path = Argument(help="Folder of a finished run, or of an adapter."),
    output: Path = Option(help="Folder to write into; made if missing."),
    texts: Path | None = Option(None, help="A text file: also write the embeddings of each line, as a model's input."),
    model: str | None = Option(None, help="With --texts: the base model, a folder or hub name; a run names its own."),
    overwrite: bool = Option(False, "--overwrite", help="Replace what an earlier export wrote there."),
    set_: list[str] | None = SET,
    json: bool = JSON,
) -> None:
    """Fold an adapter for other engines, and embed texts with it.

    The folded form is one prompt and one table.
    """
    if texts is None and model is not None:
        raise ValueError("--model is for the embeddings of texts: give --texts too, or leave it out")
    with quiet():
        from ept.model.adapter_files import CONFIG_NAME
        from ept.model.base_model import input_embedding
        from ept.model.export import EMBEDS_NAME, INFO_NAME, TENSORS_NAME, FoldedAdapter, write_embeds, write_folded
        from ept.runs.config import ModelConfig
        from ept.runs.folder import RunFolder
        from ept.runs.loading import load_base_model, load_tokenizer, task_type_of
        from ept.runs.predict import trained_run
        from ept.tasks.encoding import encode_texts
        from ept.tasks.files import read_text

        there = [name for name in (TENSORS_NAME, INFO_NAME, EMBEDS_NAME) if (output / name).exists()]
        if there and not overwrite:
            raise FileExistsError(f"{output} already holds {', '.join(there)}: --overwrite replaces them")
        config, folder = None, source
        if not (source / CONFIG_NAME).is_file():
            if not RunFolder(source).config.is_file():
                raise FileNotFoundError(f"{source} holds neither a run (config.yaml) nor an adapter ({CONFIG_NAME})")
            config, folder = trained_run(source, set_ or [])
        elif set_:
            raise ValueError(f"--set changes a run's configuration, and {source} is an adapter: use --model")
        adapter = FoldedAdapter.read(folder)
        embeds: list[Any] = []
        if texts is not None:
            text = read_text(texts).replace("\r\n", "\n").replace("\r", "\n").removesuffix("\n")
            if not text:
                raise ValueError(f"{texts} is empty: every line is one input text")
            lines = text.split("\n")  # not splitlines, which breaks a text at U+2028 and the like
            if empty := [number for number, line in enumerate(lines, 1) if not line.strip()]:
                raise ValueError(f"{texts}, line {empty[0]} is empty: every line is one input text")
            # Never the base model that an adapter names: it may come from anywhere.
            described = config.model if config is not None else ModelConfig(dtype="auto")
            described.name_or_path = model or described.name_or_path
            if described.name_or_path is None:
                raise ValueError("the embeddings of texts need the base model: give --model")
            task_type = adapter.layer.config.task_type or task_type_of(described)
            tokenizer = load_tokenizer(described)
            base = load_base_model(described, task_type, num_labels=2, pad_token_id=int(tokenizer.pad_token_id))
            embeds = adapter.embed(encode_texts(tokenizer, lines, task_type), input_embedding(base))
        (output / EMBEDS_NAME).unlink(missing_ok=True)  # an earlier export's, of other texts
        files = write_folded(adapter, output)
        if embeds:
            files.append(write_embeds(embeds, output))
    paths = [str(file) for file in files]
    answer(json, {"files": paths, "texts": len(embeds), **adapter.info()}, *paths)
