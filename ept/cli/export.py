"""`ept export`"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from typer import Argument, Option

from .common import JSON, SET, answer, quiet


def export(
    source: Path = Argument(help="Folder of a finished run, or of an adapter."),
    output: Path = Option(help="Folder to write into; made if missing."),
    texts: Path | None = Option(
        None,
        help="Also write the input embeddings of each line of a text file, or of each row of a data file (csv, "
        "jsonl, …) in the task's template.",
    ),
    as_tokens: bool = Option(
        False,
        "--as-tokens",
        help="Write the base model with the adapter in its vocabulary; every engine can serve it.",
    ),
    model: str | None = Option(
        None, help="With --texts or --as-tokens: the base model, a folder or hub name. Default: the run's."
    ),
    overwrite: bool = Option(False, "--overwrite", help="Replace what an earlier export wrote there."),
    set_: list[str] | None = SET,
    json: bool = JSON,
) -> None:
    """Fold an adapter for other engines, and embed texts with it.

    The folded form is one prompt and the update: a table, or the small network of a token-dependent update. With
    --as-tokens an adapter without an update, or with a token-dependent one, becomes part of the base model's
    vocabulary. Plain transformers and other engines serve it; `prompt_tokens.json` says what to write around a text.
    """
    if texts is None and model is not None and not as_tokens:
        raise ValueError("--model is only for --texts and --as-tokens: give one of them, or leave --model out")
    if texts is not None and as_tokens:
        raise ValueError("--texts and --as-tokens exclude each other: give one")
    if output.is_file():
        raise FileExistsError(f"{output} is a file: give a folder")
    with quiet():
        from ept.model.adapter_files import CONFIG_NAME
        from ept.model.export import EMBEDS_NAME, INFO_NAME, TENSORS_NAME, FoldedAdapter, write_embeds, write_folded
        from ept.runs.exporting import TOKENS_NAME, base_of, embed_texts, texts_of, write_as_tokens
        from ept.runs.failures import check_writable
        from ept.runs.folder import RunFolder
        from ept.runs.loading import load_tokenizer
        from ept.runs.predict import trained_run
        from ept.tasks.encoding import encode_texts

        check_writable(output)
        names = (TOKENS_NAME, "config.json") if as_tokens else (TENSORS_NAME, INFO_NAME, EMBEDS_NAME)
        there = [name for name in names if (output / name).exists()]
        if there and not overwrite:
            raise FileExistsError(f"{output} already holds {', '.join(there)}: --overwrite replaces them")
        config, folder = None, source
        if not (source / CONFIG_NAME).is_file():
            if not RunFolder(source).config.is_file():
                raise FileNotFoundError(f"{source} holds neither a run (config.yaml) nor an adapter ({CONFIG_NAME})")
            config, folder = trained_run(source, set_ or [])
        elif set_:
            raise ValueError(f"--set changes a run's configuration, but {source} is an adapter: use --model")
        adapter = FoldedAdapter.read(folder)
        if as_tokens:
            described, task_type = base_of(adapter, config, model)
            text = write_as_tokens(adapter, described, task_type, output)
            around = f"write {text['before']!r} before a text"
            if text["after"]:
                around += f" and {text['after']!r} after it"
            if not text["add_special_tokens"]:
                around += ", and tokenize it all with add_special_tokens=False"
            answer(json, {"folder": str(output), **text}, f"{output}: {around}")
            return
        embeds: list[Any] = []
        if texts is not None:
            described, task_type = base_of(adapter, config, model)
            tokenizer = load_tokenizer(described)
            lines = texts_of(texts, config, adapter.layer.config.template, tokenizer)
            encoded = encode_texts(tokenizer, lines, task_type)
            embeds = embed_texts(adapter, described, task_type, encoded, int(tokenizer.pad_token_id))
        (output / EMBEDS_NAME).unlink(missing_ok=True)  # left by an earlier export of other texts
        files = write_folded(adapter, output)
        if embeds:
            files.append(write_embeds(embeds, output))
    paths = [str(file) for file in files]
    answer(json, {"files": paths, "texts": len(embeds), **adapter.info()}, *paths)
