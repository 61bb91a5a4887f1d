"""Every text class that transformers exports, as a tiny random model: with an adapter, right or refused.

`python tests/model/classes.py --page docs/models.md` tries all of them and writes the page.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from textwrap import shorten
from typing import Any
from unittest import mock

import torch
import transformers
from torch import Tensor
from transformers.models.auto import modeling_auto as auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from ept import EPTConfig, get_ept_model
from ept.model import ept_model
from ept.model.facts import TOKEN_OUTPUTS
from ept.model.miniature import ATTEMPTS, miniature
from ept.model.packing import Packing
from ept.model.questions import token_ids

KINDS = {
    "causal language models": auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "encoder-decoders": auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    "sequence classifiers": auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    "token classifiers": auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    "question answering": auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
    "base models": auto.MODEL_MAPPING_NAMES,
}
_TEXT = {
    model_type
    for names in (
        *list(KINDS.values())[:-1],
        auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
        auto.MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES,
    )
    for model_type in names
}
_THREE_AXES = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
# What a configuration needs beside its defaults, which alone make no model that runs.
CHANGES: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "esm": {
        "vocab_size": 33,
        "pad_token_id": 1,
        "mask_token_id": 32,
        "token_dropout": True,
        "position_embedding_type": "rotary",
    },
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128},
    "ministral": {"head_dim": 128},
    "nemotron": {"num_key_value_heads": 8},
    "reformer": {"is_decoder": True, "axial_pos_embds": False},
    **{key: {"text_config": {"rope_parameters": _THREE_AXES}} for key in ("qwen2_vl", "qwen2_5_vl")},
    "xmod": {"default_language": "en_XX"},
}
TOLERANCE = 2e-4  # of the largest value
VOCABULARY, SHORT, LONG = 24, 5, 9


@dataclass(frozen=True)
class Outcome:
    """Result of a trial: `pass`, `unpadded` (rows of one length only), `refused`, `unbuilt` or `wrong`."""

    name: str
    kind: str
    result: str
    detail: str = ""


def text_classes() -> Iterator[tuple[str, str, str]]:
    """Yields kind, model type and name of every class."""
    seen = set()
    for kind, names in KINDS.items():
        for model_type, classes in names.items():
            for name in (classes,) if isinstance(classes, str) else classes:
                if name not in seen and (kind != "base models" or model_type in _TEXT):
                    seen.add(name)
                    yield kind, model_type, name


def tiny(model_type: str, name: str, **changes: Any) -> Any:
    """Makes a tiny random model of a class that reads ids; raises what it raises where that cannot be."""
    model_class: Any = getattr(transformers, name)
    config_class = getattr(model_class, "config_class", None) or CONFIG_MAPPING[model_type]
    config = config_class(**{**CHANGES.get(model_type, {}), **changes})
    errors: list[Exception] = []
    for attempt in ATTEMPTS[:-1]:
        try:
            model: Any = miniature(model_class, config, *attempt)
            with torch.no_grad():
                model(**_inputs(model, plain_texts(config)[0][None]))
            return model
        except Exception as error:
            errors.append(error)
    raise errors[0]


def trial(kind: str, model_type: str, name: str, **changes: Any) -> Outcome:
    """Puts an adapter on a tiny model of the class, and compares."""
    try:
        bare = tiny(model_type, name, **changes)
    except Exception as error:
        return Outcome(name, kind, "unbuilt", _line(error))
    texts = plain_texts(bare.config)
    expected = _answers(bare, texts[0][None])
    try:
        model = get_ept_model(bare, EPTConfig.prompt_tuning(0)).eval()
    except ValueError as error:
        return Outcome(name, kind, "refused", _line(error))
    if (worst := difference(_answers(model, texts[0][None]), expected)) > TOLERANCE:
        return Outcome(name, kind, "wrong", f"without prompt and update it is off by {worst:.1e}")
    model.add_adapter("prompt", EPTConfig(num_virtual_tokens=3, r=2, max_length=LONG))
    model.set_adapter("prompt")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.prompt_encoder["prompt"].parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    model.eval()
    alone = [_answers(model, text[None]) for text in texts]
    generates = model.active_peft_config.task_type == "CAUSAL_LM"
    refusals, details = [], []
    for side in ("left", "right"):
        try:
            worst = _off_in_a_batch(model, texts, side, alone)
        except ValueError as error:
            refusals.append(_line(error))
            continue
        if worst > TOLERANCE:
            return Outcome(name, kind, "wrong", f"padded on the {side} it is off by {worst:.1e}")
    if generates:
        if worst := _off_with_a_shared_prompt(model, texts, alone, sides=[] if refusals else ["left", "right"]):
            return Outcome(name, kind, "wrong", f"with a prompt that is read once it is off by {worst:.1e}")
        try:
            new = torch.cat([_generated(model, text[None], None) for text in texts])
            if not torch.equal(_generated(model, *padded(texts, "left")), new):
                return Outcome(name, kind, "wrong", "generates otherwise when padded")
        except Exception as error:
            if not isinstance(error, ValueError) and _can_generate(bare, texts[0]):
                raise
            details.append(f"generate: {_line(error)}")
    return Outcome(name, kind, "unpadded" if refusals else "pass", "; ".join([*refusals[:1], *details]))


def _off_in_a_batch(model: Any, texts: list[Tensor], side: str, alone: list[dict[str, Tensor]]) -> float:
    """Returns the difference between the texts in a batch, padded on one side, and each alone."""
    together = _answers(model, *padded(texts, side))
    return max(
        difference({k: _row(v, row, len(text), side, k, model) for k, v in together.items()}, alone[row])
        for row, text in enumerate(texts)
    )


def _off_with_a_shared_prompt(
    model: Any, texts: list[Tensor], alone: list[dict[str, Tensor]], sides: list[str]
) -> float:
    """Returns the difference with texts side by side in a row, and behind a prompt that was read before; 0 if small."""
    try:
        model.share_prompt()
    except ValueError:
        return 0.0
    worst, longest = 0.0, texts[-1]
    for packed in (lambda texts, s, n, *others: Packing(texts, 2, s, n), lambda *sizes: None):
        with mock.patch.object(ept_model, "packing_of", packed):
            equal = _answers(model, longest.expand(3, -1))
            worst = max(worst, *(difference({k: v[i : i + 1] for k, v in equal.items()}, alone[-1]) for i in range(3)))
            worst = max([worst, *(_off_in_a_batch(model, texts, side, alone) for side in sides)])
    return worst if worst > TOLERANCE else 0.0


def plain_texts(config: Any) -> list[Tensor]:
    """Draws two texts of ordinary tokens, short and long."""
    special = {i for ids in token_ids(config) for i in (ids if isinstance(ids, (list, tuple)) else [ids])}
    plain = torch.tensor([i for i in range(VOCABULARY) if i not in special])
    generator = torch.Generator().manual_seed(2)
    return [plain[torch.randint(len(plain), (n,), generator=generator)] for n in (SHORT, LONG)]


def padded(texts: list[Tensor], side: str) -> tuple[Tensor, Tensor]:
    """Returns ids and mask `[2, n]` of texts padded on one side with an id that is also a word's."""
    n = max(map(len, texts))
    ids, mask = torch.full((len(texts), n), int(texts[0][0])), torch.zeros(len(texts), n, dtype=torch.int64)
    for row, text in enumerate(texts):
        place = slice(n - len(text), n) if side == "left" else slice(0, len(text))
        ids[row, place], mask[row, place] = text, 1
    return ids, mask


def _inputs(model: Any, ids: Tensor) -> dict[str, Any]:
    inputs: dict[str, Any] = {"input_ids": ids}
    if getattr(model.config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = torch.tensor([[5, 6]]).expand(len(ids), -1)
    return inputs


def _answers(model: Any, ids: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
    inputs = _inputs(model, ids)
    if mask is not None:
        inputs["attention_mask"] = mask
    with torch.no_grad():
        torch.manual_seed(0)
        output = model(**inputs)
    names = {name for names in TOKEN_OUTPUTS.values() for name in names}
    found = {k: v for k, v in output.items() if k in names and isinstance(v, Tensor)}
    if "start_logits" not in found and "logits" in found:
        found = {"logits": found["logits"]}
    if getattr(model, "active_peft_config", None) is not None and model.active_peft_config.task_type == "CAUSAL_LM":
        found = {k: v[:, -ids.shape[1] :] for k, v in found.items()}
    return found


def _row(values: Tensor, row: int, length: int, side: str, name: str, model: Any) -> Tensor:
    values = values[row : row + 1]
    if name not in TOKEN_OUTPUTS.get(model.active_peft_config.task_type, ()):
        return values
    return values[:, -length:] if side == "left" else values[:, :length]


def _generated(model: Any, ids: Tensor, mask: Tensor | None) -> Tensor:
    torch.manual_seed(0)
    options = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "num_beams": 1}
    output = model.generate(ids, **({} if mask is None else {"attention_mask": mask}), **options)
    return output[:, -3:]


def _can_generate(model: Any, text: Tensor) -> bool:
    try:
        _generated(model, text[None], None)
    except Exception:
        return False
    return True


def difference(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    worst = 0.0
    for name, values in expected.items():
        if actual[name].shape != values.shape:
            return float("inf")
        difference = float((actual[name] - values).abs().max()) / float(values.abs().max().clamp(min=1e-9))
        worst = max(worst, difference if difference == difference else float("inf"))
    return worst


def _line(error: Exception) -> str:
    text = str(error).strip().splitlines() or [type(error).__name__]
    return text[0][:300]


MEANINGS = {
    "pass": "right: without prompt and update the bare model's answer; a row alone as in a batch padded on either side",
    "unpadded": "right for rows of one length; others are refused",
    "refused": "refused when it is wrapped",
    "unbuilt": "not tried: its configuration's defaults make no model that runs on ids alone",
}


INTRODUCTION = """# Models

Nothing is guessed from a model's name. Wrapping a model probes how it reads its input: a random copy of its class and
configuration, with few layers and small widths, reads a few tokens as ids and as embeddings, alone and padded on
either side, with and without rows in front. The call whose results agree is used (`ept/model/reading.py`). If none
agrees, wrapping raises a one-sentence error. If no copy can be made, the model itself is probed.

The outputs decide the task: `SEQ_2_SEQ_LM`, `CAUSAL_LM`, `SEQ_CLS`, `TOKEN_CLS`, `QUESTION_ANS`,
`FEATURE_EXTRACTION`. The last three return outputs for the text's own positions, without the prompt's: answer spans
are searched and pooled outputs computed among these. `SEQ_CLS` pools what the model pools, which in most encoders is
the prompt's first row, as in PEFT.

Arguments with one entry per token (`token_type_ids`, `bbox`, `langs`, `global_attention_mask`) follow the tokens.
Others that might, including images and audio, are refused by name, but the text of such a model is read. A token that
a model recognises by its id alone, such as ESM's mask token, is refused if a text contains it. Labels are those of
the next token: a class that compares them with the prediction at the same position, such as BartForCausalLM, accepts
none.

`make models` tries every text class that transformers exports, here {version}, at a tiny random size, and writes this
page: {totals}.
"""


def page(outcomes: list[Outcome]) -> str:
    """Draws the page of all classes."""
    counts = Counter((outcome.kind, outcome.result) for outcome in outcomes)
    total = Counter(outcome.result for outcome in outcomes)
    columns = (*MEANINGS, "wrong")
    lines = [
        INTRODUCTION.format(version=transformers.__version__, totals=", ".join(f"{total[r]} {r}" for r in columns)),
        *(f"* **{result}**: {meaning}" for result, meaning in MEANINGS.items()),
        "",
        f"| classes | {' | '.join(columns)} |",
        f"|---|{'---:|' * len(columns)}",
        *(f"| {kind} | {' | '.join(str(counts[kind, result]) for result in columns)} |" for kind in KINDS),
        "",
    ]
    for result, meaning in MEANINGS.items():
        lines += [f"## {result.capitalize()}", "", f"{meaning[0].upper()}{meaning[1:]}.", ""]
        chosen = [outcome for outcome in outcomes if outcome.result == result]
        if result == "pass":
            for kind in KINDS:
                names = [outcome.name for outcome in chosen if outcome.kind == kind and not outcome.detail]
                lines += [f"**{kind}** ({len(names)}): {', '.join(names)}", ""]
            lines += ["With a note:", ""]
            chosen = [outcome for outcome in chosen if outcome.detail]
        reasons: dict[str, list[str]] = {}
        for outcome in chosen:
            why = outcome.detail.replace(outcome.name, "the class").replace("|", "\\|")
            reasons.setdefault(shorten(why, 260, placeholder=" …"), []).append(outcome.name)
        lines += ["| why | classes |", "|---|---|"]
        lines += [f"| {why} | {', '.join(names)} |" for why, names in reasons.items()]
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="classes, or parts of their names; none: all")
    parser.add_argument("--kind", choices=KINDS)
    parser.add_argument(
        "--records", type=Path, help="a file of JSON lines, which is added to; known classes are left out"
    )
    parser.add_argument("--page", type=Path, help="the page to write")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    outcomes: dict[str, Outcome] = {}
    if arguments.records and arguments.records.exists():
        known = (Outcome(**json.loads(line)) for line in arguments.records.read_text(encoding="utf-8").splitlines())
        outcomes = {outcome.name: outcome for outcome in known}
    for kind, model_type, name in text_classes():
        asked_for = not arguments.names or any(part in name for part in arguments.names)
        if name in outcomes or not asked_for or arguments.kind not in (None, kind):
            continue
        try:
            outcomes[name] = trial(kind, model_type, name)
        except Exception as error:
            outcomes[name] = Outcome(name, kind, "wrong", f"{type(error).__name__}: {_line(error)}")
        print(name, outcomes[name].result, outcomes[name].detail, flush=True)
        if arguments.records:
            with arguments.records.open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(outcomes[name])) + "\n")
    print(dict(Counter(outcome.result for outcome in outcomes.values())))
    if arguments.page:
        order = {name: number for number, (_, _, name) in enumerate(text_classes())}
        arguments.page.write_text(page(sorted(outcomes.values(), key=lambda o: order[o.name])), encoding="utf-8")
    sys.exit(any(outcome.result == "wrong" for outcome in outcomes.values()))


if __name__ == "__main__":
    main()
