"""`ept profile`"""

from __future__ import annotations

import shlex
from dataclasses import fields
from pathlib import Path
from typing import Any

import typer
from typer import Option

from .common import JSON, SET, TEXT_COLUMN, answer, overrides, quiet

RECORD = "profile.json"


def profile(
    context: typer.Context,
    shape: str | None = Option(
        None, help="A model's shape with random weights, such as t5-base or llama-2-7b; no download."
    ),
    model: str | None = Option(None, help="A model to load: a folder or a hub name."),
    methods: str = Option(
        "pt,dept,ept-token,ept,peft-pt",
        help="Comma-separated names; :LENGTH sets another prompt length, as in pt,ept:20.",
    ),
    sweep: str | None = Option(
        None,
        metavar="num_virtual_tokens=10,20,...",
        help="Measure every method at each of these prompt lengths, in place of its own.",
    ),
    dtype: str | None = Option(None, help="float32 or bfloat16; default: model.dtype, else float32."),
    quantization: str | None = Option(None, help="nf4 or fp4: 4-bit weights through bitsandbytes."),
    fast_4bit: bool = Option(
        True, help="With 4-bit weights: run our methods on our own layers, PEFT's on bitsandbytes'."
    ),
    fast_frozen: bool = Option(True, help="Run our methods on fused norms, rotary embeddings and activations."),
    shared_prompt: bool | None = Option(
        None,
        "--shared-prompt/--no-shared-prompt",
        help="Our methods read a decoder's prompt once per batch; default: on a CPU.",
    ),
    attn_implementation: str | None = Option(None, help="eager, sdpa, ... Default: as `ept train` chooses."),
    layers: int | None = Option(None, help="Keep only this many of a shape's layers, from the first. Default: all."),
    batch: int = Option(8, help="Rows per batch."),
    length: int = Option(128, help="Maximum number of text tokens per row."),
    padding: str | None = Option(
        None,
        help="none: all rows have --length tokens; longest or max_length: lengths vary, and batches are padded to "
        "their longest row or to --length. Default: none; with data, longest.",
    ),
    logits: str = Option("labels", help="A decoder's logits: at the labels only, or at all positions."),
    task: str | None = Option(None, help="Take the lengths from a task's train split (see `ept tasks`)."),
    data_dir: Path | None = Option(None, help="Folder of the task's data."),
    data: Path | None = Option(
        None, help="Take the lengths from the texts of a file (csv, tsv, jsonl, json, parquet)."
    ),
    text_column: list[str] | None = TEXT_COLUMN,
    tokenizer: str | None = Option(None, help="With --task or --data: the tokenizer, if it is not the model's."),
    config: Path | None = Option(None, metavar="FILE.yaml", help="Take model and data from a run's configuration."),
    set_: list[str] | None = SET,
    steps: int = Option(10, help="Measured steps of each method, at least 2."),
    warmup: int = Option(2, help="Unmeasured steps before them, at least 1."),
    seed: int = Option(0, help="Draws lengths, ids and rows."),
    output: Path | None = Option(
        None, metavar="DIR", help=f"Write {RECORD}, the plots and (without --sweep) Chrome traces here."
    ),
    overwrite: bool = Option(False, "--overwrite", help="Replace the profile in the folder."),
    json: bool = JSON,
) -> None:
    """Measure training steps of several methods side by side.

    Prompt tuning, DePT, EPT with the token-dependent and the position-dependent update, and PEFT's prompt tuning take
    whole steps in turn. Shows time with spread, throughput, memory, and where a step's time goes. Runs on a CPU too.
    """
    if output is not None and (output / RECORD).exists() and not overwrite:
        raise FileExistsError(f"{output} holds a profile: choose another --output, or replace it with --overwrite")
    if data is not None and task is not None:
        raise ValueError("--data and --task exclude each other: give one")
    given: dict[str, object] = {"model.name_or_path": model, "model.tokenizer_name_or_path": tokenizer}
    given |= {"data.task": task, "data.data_dir": data_dir, "data.text_columns": text_column}
    with quiet():
        from rich.console import Console

        from ept.profile.batches import data_rows
        from ept.profile.profile import ProfileConfig, load, task_type_of_base
        from ept.profile.profile import profile as measure
        from ept.profile.profile import sweep as at_lengths
        from ept.profile.report import draw_phases, draw_sweep, phases_table, shares_table, steps_table
        from ept.runs.config import ModelConfig, load_run_config
        from ept.runs.failures import check_writable
        from ept.runs.loading import default_device, dtype_of
        from ept.utils.files import json_record, write_atomically

        if output is not None:
            check_writable(output)
        run = load_run_config(config, overrides(set_, given))
        has_data = data is not None or run.data.task is not None or run.data.is_local
        names = tuple(methods.split(","))
        # Most settings are options of the same name.
        same: dict[str, Any] = {field.name: context.params.get(field.name) for field in fields(ProfileConfig)}
        own = run.model if shape is None or config is None else ModelConfig()  # --config then gives only the data
        others = {
            "model": own,
            "dtype": dtype or str(dtype_of(own, default_device())).removeprefix("torch."),
            "quantization": quantization or (own.quant_type if own.load_in_4bit else None),
            "fast_4bit": fast_4bit and own.fast_4bit,
            "fast_frozen": fast_frozen and own.fast_frozen,
            "methods": at_lengths(sweep, names) if sweep is not None else names,
            "padding": padding or ("longest" if has_data else "none"),
        }
        settings = ProfileConfig(**same | others)
        settings.check()
        traces = None if sweep is not None else output  # a trace of every method at every length would be too much
        with Console(stderr=True).status("building the model") as status:
            base = load(settings, default_device())
            rows = None
            if has_data:
                rows = data_rows(run, data, task_type_of_base(base), length, seed, batch * (steps + warmup))
            record = measure(settings, rows=rows, base=base, traces=traces, progress=status.update)
        words = ["ept", "profile"]  # and the given options, except for where the record goes
        for option in context.command.params:
            value = context.params.get(str(option.name))
            if value is None or value == option.default or option.name in ("output", "overwrite", "json"):
                continue
            if isinstance(value, bool):
                words.append(option.opts[0] if value else option.secondary_opts[0])
            else:
                for item in value if isinstance(value, (list, tuple)) else [value]:
                    words += [option.opts[0], str(item)]
        record = {"command": shlex.join(words), **record}
        if output is not None:
            output.mkdir(parents=True, exist_ok=True)
            draw_phases(record, output / "phases.png")
            if sweep is not None:
                draw_sweep(record, output / "sweep.png")
            write_atomically(output / RECORD, json_record(record, indent=2))
    saved = [f"saved in {output}"] if output is not None else []
    answer(json, record, steps_table(record), phases_table(record), shares_table(record), *saved)
