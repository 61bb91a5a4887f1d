"""Summary of a run before training, as a dictionary and as a table."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.table import Table

from ..tasks.metrics import metric_name
from ..utils.messages import listed, shares
from ..utils.tables import properties
from .data import describe
from .loading import weights_of

if TYPE_CHECKING:
    from .train import PreparedRun


def run_summary(run: PreparedRun) -> dict[str, Any]:
    """Describes what is going to be trained: data, labels, texts, method and parameters."""
    config, task = run.config, run.task
    adapter = run.model.active_peft_config.to_dict()
    return {
        "model": config.model.name_or_path,
        **weights_of(run.model.get_base_model()),
        "task": task.name,
        "task_type": run.task_type,
        "kind": "free text" if task.is_text else "regression" if task.values else "classification",
        "text_columns": list(task.columns),
        "unread_columns": list(run.run_data.data.unread),
        "label_column": task.label_column if task.is_chat else ", ".join(task.target_columns),
        "template": task.template,
        "labels": list(run.labels),
        "metric": task.metrics[0],
        "metrics": list(task.metrics),
        **describe(run.run_data.data),
        "max_length": run.max_length,
        "truncation_rate": run.run_data.truncation_rate,
        "unread_texts": run.run_data.unread_texts,
        "cut_answers": run.run_data.cut_answers,
        "method": config.method.name,
        "trainable_parameters": run.model.get_nb_trainable_parameters()[0],
        "adapter": {key: value for key, value in adapter.items() if value is not None},
        "output_dir": config.output_dir,
    }


def summary_table(summary: dict[str, Any], title: str) -> Table:
    """Makes a table from the result of `run_summary`."""
    labels = []
    if summary["kind"] == "regression":
        first, last, count = summary["labels"][0], summary["labels"][-1], len(summary["labels"])
        rounded = f", rounded to the nearest of {count}" if summary["task_type"] != "SEQ_CLS" else ""
        labels = [("labels", f"{first} .. {last}{rounded}")]
    elif summary["kind"] == "classification":
        labels = [("labels", f"{len(summary['labels'])}: {listed(map(repr, summary['labels']))}")]
    balance = [("label balance", shares(summary["label_balance"]))] if labels else []
    names = [metric_name(metric, summary["labels"]) for metric in summary["metrics"]]
    rows = [
        ("model", f"{summary['model']} ({summary['task_type']})"),
        ("weights", f"{summary['dtype']}, {summary['attention']} attention"),
        ("text", f"{listed(summary['text_columns'])}, as {summary['template']!r}"),
        ("label", f"{summary['label_column']}, {summary['kind']}"),
        *([("columns not read", listed(map(repr, summary["unread_columns"])))] if summary["unread_columns"] else []),
        *labels,
        ("metric", listed(names) + (", the first decides" if len(names) > 1 else "")),
        ("rows", ", ".join(f"{name} {count:,}" for name, count in summary["rows"].items())),
        *(
            ("left out", f"{count:,} {'row' if count == 1 else 'rows'} with {why}")
            for why, count in summary["left_out"].items()
        ),
        *balance,
        ("commonest answer", f"{names[0]} {summary['majority']:.4f}"),
        (f"texts cut to {summary['max_length']} tokens", shares(summary["truncation_rate"])),
        *([("texts with unknown tokens", shares(unread))] if any((unread := summary["unread_texts"]).values()) else []),
        *([("answers cut (data.max_answer)", shares(cut))] if (cut := summary["cut_answers"]) else []),
        ("trainable parameters", f"{summary['trainable_parameters']:,}"),
        *([("folder", summary["output_dir"])] if summary["output_dir"] is not None else []),
    ]
    return properties(rows, f"{title}: {summary['method']} on {summary['task']}")
