"""Many adapters in one model: mixed batches, a hundred of them, and changes while other threads generate."""

from __future__ import annotations

import copy
import pickle
import threading
import time
from contextlib import contextmanager, nullcontext

import pytest
import torch
from tiny_models import ONE_A_TASK, TASK_OF, make_batch, make_model, randomise

from ept import EPTConfig, EPTModel, get_ept_model

GREEDY = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "eos_token_id": None}
# Every adapter has another size; one has no prompt, one no low-rank update, one only a prompt, one a token-dependent
# update.
SIZES = [
    {"num_virtual_tokens": 5, "r": 3, "max_length": 12},
    {"num_virtual_tokens": 2, "r": 1, "max_length": 30, "alpha": 3.0},
    {"num_virtual_tokens": 7, "r": 0, "max_length": 8, "fusion": False},
    {"num_virtual_tokens": 0, "r": 2, "max_length": 9},
    {"num_virtual_tokens": 6, "r": 0, "fusion": False, "num_spaces": 0},
    {"num_virtual_tokens": 3, "r": 2, "max_length": 6, "update": "token"},
]


@pytest.fixture
def folders(tmp_path):
    """Saves adapters of the given sizes for a family, one a folder."""

    def save(name, sizes):
        base = make_model(name)
        made = []
        for seed, size in enumerate(sizes):
            model = get_ept_model(copy.deepcopy(base), EPTConfig(**size, seed=seed))
            randomise(model, seed)
            made.append(tmp_path / f"{name}-{seed}")
            model.save_pretrained(made[-1])
        return made

    return save


def load_all(name, folders):
    model = EPTModel.from_pretrained(make_model(name), folders[0], "a0")
    for number, folder in enumerate(folders[1:], 1):
        model.load_adapter(folder, f"a{number}")
    return model.eval()


@contextmanager
def active(model, adapter):
    """Lets the adapter answer, or for `__base__` the bare model."""
    with model.disable_adapter() if adapter == "__base__" else nullcontext():
        if adapter != "__base__":
            model.set_adapter(adapter, inference_mode=True)
        yield


@pytest.mark.parametrize("name", [*ONE_A_TASK, "bart", "gpt2", "mistral", "gemma3", "llama_classifier"])
def test_mixed_batch_of_saved_adapters_of_every_size(name, folders):
    """Logits, and for what generates tokens, are those of each adapter alone, heads included."""
    model = load_all(name, folders(name, SIZES))
    decoder = TASK_OF[name] == "CAUSAL_LM"
    names = ["a1", "a0", "__base__", "a3", "a2", "a5", "a4"]
    batch = make_batch(name, (8, 4, 9, 6, 5, 8, 7), "left" if decoder else "right")
    inputs = {k: batch[k] for k in ("input_ids", "attention_mask")}
    with torch.no_grad():
        mixed = model(**batch, adapter_names=names).logits
    for row, adapter in enumerate(names):
        one = {k: v[row : row + 1] for k, v in batch.items()}
        if decoder and adapter == "__base__":  # whose positions nobody counts from the mask
            one["position_ids"] = (one["attention_mask"].cumsum(1) - 1).clamp(min=0)
        with torch.no_grad(), active(model, adapter):
            expected = model(**one).logits[0]
        last = int(one["attention_mask"].sum()) if decoder else len(expected)
        torch.testing.assert_close(mixed[row][-last:], expected[-last:], rtol=1e-4, atol=1e-5)
    if TASK_OF[name] == "SEQ_CLS":
        return
    generated = model.generate(**inputs, adapter_names=names, **GREEDY)
    for row, adapter in enumerate(names):
        with active(model, adapter):
            assert torch.equal(
                generated[row], model.generate(**{k: v[row : row + 1] for k, v in inputs.items()}, **GREEDY)[0]
            )


def test_a_folded_adapter_answers_in_a_mixed_batch_as_before(folders):
    model, batch = load_all("llama", folders("llama", SIZES[:2])), make_batch("llama")
    names = ["a0", "a1"]
    expected = model(**batch, adapter_names=names).logits
    assert torch.equal(model.fold("a1")(**batch, adapter_names=names).logits, expected)


def test_adapters_whose_updates_depend_on_the_token_are_trained_beside_each_other():
    """Gradients in a mixed batch are those of each adapter on its own rows."""
    by_token = {"num_virtual_tokens": 3, "r": 2, "update": "token"}
    model = get_ept_model(make_model("t5"), EPTConfig(**by_token))
    model.add_adapter("other", EPTConfig(**by_token, seed=1))
    model.add_adapter("plain", EPTConfig(num_virtual_tokens=2, r=1, max_length=9))
    randomise(model)
    model.prompt_encoder.requires_grad_(True)  # of inactive adapters, too
    names = ["other", "default", "plain", "other"]
    batch = make_batch("t5", (5, 6, 4, 5))
    logits = model(**batch, adapter_names=names).logits
    logits.square().sum().backward()
    layers = model.prompt_encoder
    mixed = {name: [p.grad.clone() for p in layers[name].parameters()] for name in layers}
    model.zero_grad()
    for row, name in enumerate(names):
        model.set_adapter(name)
        one = {key: value[row : row + 1] for key, value in batch.items()}
        model(**one).logits.square().sum().backward()
    for name in layers:
        torch.testing.assert_close(mixed[name], [p.grad for p in layers[name].parameters()], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_a_hundred_adapters_in_one_model(name, folders):
    """Parameters grow only by the adapters' own, and each still answers as in a model of its own."""
    paths = folders(name, [{"num_virtual_tokens": 2, "r": 1, "max_length": 8}] * 4)
    model = EPTModel.from_pretrained(make_model(name), paths[0], "a0")
    of_one = sum(p.numel() for p in model.parameters())
    for number in range(1, 100):
        model.load_adapter(paths[number % 4], f"a{number}")
    head = sum(p.numel() for p in model.base_model.classifier.original_module.parameters()) if name == "bert" else 0
    config = model.peft_config["a0"]
    own = config.parameter_count(32) + head
    assert sum(p.numel() for p in model.parameters()) - of_one == 99 * own
    batch = make_batch(name, (5,) * 8)
    names = [f"a{number}" for number in range(0, 100, 13)]  # neighbours of different weights
    with torch.no_grad():
        mixed = model(**batch, adapter_names=names).logits
    for row in (0, 3, 6, 7):
        fresh = EPTModel.from_pretrained(make_model(name), paths[13 * row % 4])
        with torch.no_grad():
            expected = fresh(**{k: v[row : row + 1] for k, v in batch.items()}).logits[0]
        torch.testing.assert_close(mixed[row], expected, rtol=1e-4, atol=1e-5)
    for number in range(1, 100):
        model.delete_adapter(f"a{number}")
    assert list(model.peft_config) == ["a0"]
    assert sum(p.numel() for p in model.parameters()) == of_one


@pytest.mark.parametrize("name", ["llama", "t5", "bert"])
def test_adapters_come_and_go_while_other_threads_call(name, folders):
    """Two threads call the model with adapters that stay; a third loads and deletes others, heads included."""
    paths = folders(name, SIZES)
    model = load_all(name, paths[:2])
    batch = make_batch(name, (6, 6))
    inputs = {k: batch[k] for k in ("input_ids", "attention_mask")}

    def answer(adapter):
        with torch.no_grad():
            if name == "bert":
                return model(**inputs, adapter_names=[adapter] * 2).logits
            return model.generate(**inputs, adapter_names=[adapter] * 2, **GREEDY)

    expected = {adapter: answer(adapter) for adapter in ("a0", "a1")}
    problems, done = [], threading.Event()

    def serve(adapter):
        try:
            while not done.is_set():
                assert torch.equal(answer(adapter), expected[adapter])
        except BaseException as error:  # handed to the test's thread
            problems.append(error)

    threads = [threading.Thread(target=serve, args=(adapter,), daemon=True) for adapter in expected]
    for thread in threads:
        thread.start()
    try:
        for _ in range(15):
            for number in (2, 3):
                model.load_adapter(paths[number], f"a{number}")
            for number in (2, 3):
                model.delete_adapter(f"a{number}")
    finally:
        done.set()
        for thread in threads:
            thread.join(timeout=60)
    assert not problems
    assert not any(thread.is_alive() for thread in threads)
    assert list(model.peft_config) == ["a0", "a1"]


def test_a_call_with_a_deleted_adapter_is_one_clear_error(folders):
    model = load_all("llama", folders("llama", SIZES[:2]))
    model.delete_adapter("a1")
    with pytest.raises(ValueError, match="no adapter is named 'a1': the loaded ones are a0"):
        model(**make_batch("llama"), adapter_names=["a0", "a1"])


def test_deleting_waits_for_a_call_that_names_the_adapter_and_holds_up_new_calls(folders):
    """A classifier looks up its head at the end of the call, when it must still be there."""
    model = load_all("bert", folders("bert", SIZES[:2]))
    inputs = {k: v for k, v in make_batch("bert", (6, 6)).items() if k != "labels"}
    expected = model(**inputs, adapter_names=["a1", "a1"]).logits
    problems = []

    def delete():
        model.delete_adapter("a1")

    def call_deleted():
        with pytest.raises(ValueError, match="no adapter is named 'a1'"):
            model(**inputs, adapter_names=["a1", "a1"])
        problems.remove("the late call has not come back")

    threads = [threading.Thread(target=target, daemon=True) for target in (delete, call_deleted)]

    def in_the_middle(*_):
        if threads[0].ident is None:
            threads[0].start()
            while not model.adapter_lock._waiting_changes:
                time.sleep(0.001)
            problems.append("the late call has not come back")
            threads[1].start()
            threads[1].join(timeout=0.2)
            assert all(thread.is_alive() for thread in threads)
            assert model(**inputs, adapter_names=["a1", "a1"]).logits.isfinite().all()  # nested, and not held up

    model.base_model.bert.register_forward_hook(in_the_middle)
    assert torch.equal(model(**inputs, adapter_names=["a1", "a1"]).logits, expected)
    for thread in threads:
        thread.join(timeout=10)
    assert not problems
    assert list(model.peft_config) == ["a0"]


def test_a_change_within_a_call_is_refused_and_not_waited_for(folders):
    model = load_all("llama", folders("llama", SIZES[:2]))
    handle = model.base_model.register_forward_hook(lambda *_: model.delete_adapter("a1"))
    with pytest.raises(RuntimeError, match="adapters cannot be changed from within a call of the model"):
        model(**make_batch("llama"))
    handle.remove()
    assert "a1" in model.peft_config
    assert model(**make_batch("llama")).logits.isfinite().all()


def test_copies_have_a_lock_of_their_own(folders):
    model = load_all("llama", folders("llama", SIZES[:1]))
    copied = copy.deepcopy(model)
    assert type(pickle.loads(pickle.dumps(model.adapter_lock))) is type(copied.adapter_lock)
    handle = model.base_model.register_forward_hook(lambda *_: copied.set_adapter("a0"))
    assert model(**make_batch("llama")).logits.isfinite().all()  # under the same lock the change would be refused
    handle.remove()
