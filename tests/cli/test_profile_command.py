"""`ept profile`: a small form of its comparison, what it writes, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_commands import as_json, refused, succeed

from ept.profile.methods import USUAL_METHODS

REDUCED = ("profile", "--shape", "t5-small", "--layers", 1, "--batch", 2, "--length", 16, "--warmup", 1)


def test_ept_is_faster_than_prompt_tuning_and_its_phases_add_up() -> None:
    report = as_json(*REDUCED, "--layers", 2, "--steps", 7, "--methods", "pt,dept,ept-token,ept,peft-pt")
    methods = {method["label"]: method for method in report["methods"]}
    assert list(methods) == ["pt", "dept", "ept-token", "ept", "peft-pt"] == list(USUAL_METHODS)
    step = {label: method["step_ms"]["median"] for label, method in methods.items()}
    assert methods["ept"]["speedup"]["median"] > 1, step
    assert step["ept"] < step["peft-pt"], step
    for label, method in methods.items():
        assert sum(method["phases_ms"].values()) == pytest.approx(step[label], rel=0.05), label
    assert report["command"] == ("ept profile --shape t5-small --layers 2 --batch 2 --length 16 --steps 7 --warmup 1")
    assert report["model"]["name"] == "t5-small (random weights)"


def test_a_loaded_model_on_a_tasks_rows(models: dict[str, Path], data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "profile"
    source = ("--model", models["llama"], "--task", "glue/sst2", "--data-dir", data)
    sizes = ("--methods", "pt:4,ept:2", "--batch", 4, "--length", 16, "--steps", 2)
    arguments = ("profile", *source, *sizes, "--output", folder)
    shown = succeed(*arguments).stdout
    assert shown.count("pt:4") == 4  # a row of each table, and the reference of the speed-up
    assert shown.count("ept:2") == 3
    names = {"profile.json", "phases.png", "trace_pt_4.json", "trace_ept_2.json"}
    assert {file.name for file in folder.iterdir()} == names
    report = json.loads((folder / "profile.json").read_text(encoding="utf-8"))
    assert report["data"]["padding"] == "longest"
    assert report["data"]["padding_side"] == "left"
    assert report["data"]["text_tokens_a_batch"] < report["data"]["padded_tokens_a_batch"] <= 4 * 17
    assert "holds a profile: choose another --output, or replace it with --overwrite" in refused(*arguments)
    report = as_json(*arguments, "--sweep", "num_virtual_tokens=2,4", "--overwrite")
    assert "--sweep num_virtual_tokens=2,4" in report["command"]
    assert str(folder) not in report["command"]
    assert [method["label"] for method in report["methods"]] == ["pt:2", "pt:4", "ept:2", "ept:4"]
    assert (folder / "sweep.png").is_file()


def test_a_shape_on_a_files_texts(models: dict[str, Path], tmp_path: Path) -> None:
    file = tmp_path / "texts.jsonl"
    file.write_text("\n".join(json.dumps({"text": "the film was " + "very " * n}) for n in range(9)), encoding="utf-8")
    source = ("--data", file, "--tokenizer", models["t5"])
    options = (*source, "--padding", "max_length", "--steps", 2, "--methods", "pt:3", "--no-fast-4bit")
    report = as_json(*REDUCED, *options)
    assert "--no-fast-4bit" in report["command"].split()
    assert report["data"]["padded_tokens_a_batch"] == 2 * 16
    assert 2 * 4 <= report["data"]["text_tokens_a_batch"] <= 2 * 12
    assert "name one with --tokenizer" in refused(*REDUCED, "--data", file)
    (tmp_path / "other.jsonl").write_text('{"n": 1}', encoding="utf-8")
    other = ("--tokenizer", models["t5"], "--data", tmp_path / "other.jsonl")
    assert "other.jsonl: none of 'n' holds text: name it with --text-column" in refused(*REDUCED, *other)
    assert "no column 'review'; columns found: 'n'" in refused(*REDUCED, *other, "--text-column", "review")


def test_the_precision_is_that_of_the_configuration(models: dict[str, Path]) -> None:
    source = ("profile", "--model", models["llama"], "--methods", "pt:2", "--batch", 2, "--length", 8, "--steps", 2)
    in_half = ("--set", "model.dtype=bfloat16", "--set", "model.fast_frozen=false")
    model = as_json(*source, *in_half)["model"]
    assert (model["dtype"], model["attention"], model["fast_frozen"]) == ("bfloat16", "eager", False)
    assert as_json(*source, *in_half, "--dtype", "float32")["model"]["dtype"] == "float32"
    model = as_json(*source, "--set", "model.load_in_4bit=true", "--set", "model.quant_type=fp4")["model"]
    assert (model["quantization"], model["fast_4bit"]) == ("fp4", True)
    assert "choose one of float32, bfloat16" in refused(*source, "--set", "model.dtype=float16")


@pytest.mark.parametrize("arguments, message", [
    ((), "give exactly one of a shape"),
    (("--shape", "t6"), "unknown shape 't6': choose one of t5-small"),
    (("--shape", "t5-small", "--methods", "pt,lora"), "unknown method 'lora'"),
    (("--shape", "t5-small", "--sweep", "r=2"), "write it as num_virtual_tokens=10,20,40"),
    (("--shape", "t5-small", "--sweep", "num_virtual_tokens=0"), "write it as num_virtual_tokens=10,20,40"),
    (("--shape", "t5-small", "--sweep", "num_virtual_tokens=ten"), "write it as num_virtual_tokens=10,20,40"),
    (("--shape", "t5-small", "--task", "glue/sst2", "--data", "a.jsonl"), "--data and --task exclude each other"),
])  # fmt: skip
def test_refused(arguments: tuple[str, ...], message: str) -> None:
    assert message in refused("profile", *arguments)
