"""Runs PEFT's own tests with `EPTConfig` in the place of its `PromptTuningConfig`, on tiny models made here.

    python tests/integrations/peft_suite.py CHECKOUT [pytest's arguments]

CHECKOUT holds PEFT's sources and its `tests/`. The models lie in a folder laid out as the hub's cache is, under the
names that the tests ask the hub for. Tests of what EPT does otherwise by design are listed in `BY_DESIGN` with the
reason; they must fail, and no other one may.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import shutil
import sys
import tempfile
import types
from pathlib import Path
from typing import Any

import pytest

TESTS = Path(__file__).resolve().parents[1]
FILES = (
    "test_config.py",
    "test_decoder_models.py",
    "test_encoder_decoder_models.py",
    "test_seq_classifier.py",
    "test_feature_extraction_models.py",
    "test_token_classification_qa.py",
)
PICKLE = "adapters are saved as safetensors only: a pickle could run code when it is loaded"
# name of the test, with its class where that matters: the reason
BY_DESIGN = {
    "test_save_pretrained_pickle": PICKLE,
    "test_save_pretrained_selected_adapters_pickle": PICKLE,
    "test_prompt_tuning_prepare_inputs_for_generation_4d_attention_mask": (
        "the embeddings are made once, before the base model's `generate`, whose own preparation stays as it is"
    ),
    "test_invalid_task_type": "the message has other words: it names the field, the value and what is allowed",
    # These expect an error where EPT works.
    "test_set_requires_grad_prompt_learning_raises": "`set_requires_grad` works",
    "TestEncoderDecoderModels.test_generate_pos_args": "`generate` takes the ids by position as well",
}
# They fetch the configuration of a LoRA from the hub, and none of EPT's.
FETCHING = {"test_from_pretrained", "test_from_pretrained_cache_dir", "test_save_pretrained_with_runtime_config"}
# name on the hub: the family in `tiny_models`, and what is changed
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "peft-internal-testing/tiny-random-OPTForCausalLM": ("opt", {}),
    "peft-internal-testing/tiny-random-GPT2LMHeadModel": ("gpt2", {}),
    "hf-internal-testing/tiny-random-gpt2": ("gpt2", {}),
    "peft-internal-testing/tiny-random-GPTJForCausalLM": ("gptj", {}),
    "trl-internal-testing/tiny-random-LlamaForCausalLM": ("llama", {}),
    "peft-internal-testing/tiny-dummy-qwen2": ("qwen2", {}),
    "hf-internal-testing/tiny-random-Gemma3ForCausalLM": ("gemma3", {}),
    "hf-internal-testing/tiny-random-MistralForCausalLM": ("mistral", {}),
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration-calibrated": ("t5", {}),
    "peft-internal-testing/tiny-random-BartForConditionalGeneration": ("bart", {}),
    "peft-internal-testing/tiny-random-BertForSequenceClassification": ("bert", {}),
    "peft-internal-testing/tiny-random-RobertaForSequenceClassification": ("roberta", {}),
    "trl-internal-testing/tiny-LlamaForSequenceClassification-3.2": ("llama_classifier", {"num_labels": 1}),
    "peft-internal-testing/tiny-random-BertModel": ("bert_model", {}),
    "peft-internal-testing/tiny-random-RobertaModel": ("roberta_model", {}),
    "peft-internal-testing/tiny-random-DebertaModel": ("deberta_model", {}),
    "peft-internal-testing/tiny-random-DebertaV2Model": ("deberta_v2_model", {}),
}


def save_models(cache: Path) -> None:
    """Fills `cache` with the models, each with a tokenizer."""
    import tiny_models
    from tiny_runs import save_tokenizer

    encoder = {**tiny_models.FAMILIES["bert"][3]}
    tiny_models.FAMILIES |= {
        "gptj": ("CAUSAL_LM", "GPTJForCausalLM", "GPTJConfig", {**tiny_models.FAMILIES["gpt2"][3], "rotary_dim": 4}),
        "bert_model": ("FEATURE_EXTRACTION", "BertModel", "BertConfig", encoder),
        "roberta_model": ("FEATURE_EXTRACTION", "RobertaModel", "RobertaConfig", encoder),
        "deberta_model": ("FEATURE_EXTRACTION", "DebertaModel", "DebertaConfig", encoder),
        "deberta_v2_model": ("FEATURE_EXTRACTION", "DebertaV2Model", "DebertaV2Config", encoder),
    }
    for name, (family, changes) in MODELS.items():
        repository = cache / f"models--{name.replace('/', '--')}"
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text("0" * 40)
        folder = repository / "snapshots" / ("0" * 40)
        tiny_models.make_model(family, **changes).save_pretrained(folder)
        save_tokenizer(folder, end_token=False)


class PointedAtEPT:
    """A plugin that leaves the tests of prompt tuning, and names those that are refused."""

    def pytest_collection_modifyitems(self, config: Any, items: list[Any]) -> None:
        from ept import EPTConfig

        kept, dropped = [], []
        for item in items:
            given = item.callspec.params if hasattr(item, "callspec") else {}
            kind = given.get("config_cls", given.get("config_class"))
            ours = kind is EPTConfig or (kind is None and "prompt_tuning" in item.name)
            ours = ours and item.originalname not in FETCHING
            (kept if ours else dropped).append(item)
            names = (item.originalname, f"{item.cls and item.cls.__name__}.{item.originalname}")
            if reason := next((BY_DESIGN[name] for name in names if name in BY_DESIGN), None):
                item.add_marker(pytest.mark.xfail(strict=True, reason=reason))
        config.hook.pytest_deselected(items=dropped)
        items[:] = kept


def main(checkout: Path, arguments: list[str]) -> int:
    if not (checkout / "tests" / "testing_common.py").is_file():
        sys.exit(f"{checkout} holds no tests of PEFT: give its checkout, or its unpacked source distribution")
    with tempfile.TemporaryDirectory() as place:
        cache, package = Path(place, "hub"), Path(place, "peft_tests")
        os.environ.update(HF_HUB_CACHE=str(cache), HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")
        sys.path[:0] = [str(TESTS), place]
        if importlib.util.find_spec("diffusers") is None:  # the tests of text models import it and do not use it
            diffusers = sys.modules["diffusers"] = types.ModuleType("diffusers")
            diffusers.__dict__["StableDiffusionPipeline"] = type("StableDiffusionPipeline", (), {})
        import datasets
        import peft

        from ept import EPTConfig

        save_models(cache)
        quotes = datasets.Dataset.from_dict({"quote": ["the film was good and long"] * 16})
        datasets.load_dataset = lambda *_, **__: datasets.DatasetDict(train=quotes)
        peft.PromptTuningConfig = EPTConfig  # before the tests import it
        shutil.copytree(checkout / "tests", package, ignore=shutil.ignore_patterns("conftest.py", "regression"))
        (package / "__init__.py").touch()
        importlib.import_module("peft_tests.testing_utils").hub_online_once = contextlib.nullcontext  # never online
        files = [str(package / name) for name in FILES]
        options = ["-p", "no:cacheprovider", "--rootdir", place, "-c", os.devnull, "-q", "-rxX"]
        return int(pytest.main([*files, *options, *arguments], plugins=[PointedAtEPT()]))


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
