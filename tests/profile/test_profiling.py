"""`profile` on tiny models: the same work for every method, phases that add up, a record that is whole."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import bitsandbytes
import pytest
import torch
from tiny_models import TASK_OF, VOCAB, make_model
from torch.autograd import DeviceType

import ept_kernels
from ept.model import linear4bit
from ept.model.frozen import is_swapped
from ept.profile.batches import make_batches, random_rows
from ept.profile.clock import PHASES, StepTime, summary, time_step
from ept.profile.methods import PROFILE_METHODS, MethodSpec, make_method
from ept.profile.profile import ProfileConfig, _statistics, profile, sweep
from ept.profile.report import draw_phases, draw_sweep, phases_table, steps_table
from ept.profile.shapes import build_shape
from ept.profile.trace import allocated_by, shares_of
from ept.runs.config import ModelConfig
from ept_kernels import FourBitWeight

CPU = torch.device("cpu")
FAMILIES = ("llama", "t5")


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Takes the steps in one thread: so small a model waits for the others longer than it computes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def config(**changes: Any) -> ProfileConfig:
    given = {"batch": 3, "length": 12, "steps": 4, "warmup": 1, **changes}
    return ProfileConfig(model=ModelConfig(name_or_path="tiny"), **given)


def batch_of(name: str, padding: str = "none", all_logits: bool = False) -> dict[str, Any]:
    rows = random_rows(3, TASK_OF[name], VOCAB, 12, padding != "none", seed=0)
    how: dict[str, Any] = {"pad_token_id": 0, "padding": padding, "width": 12, "all_logits": all_logits}
    return make_batches(rows, batch=3, count=1, task_type=TASK_OF[name], device=CPU, **how)[0]


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("padding", ["none", "longest", "max_length"])
def test_a_record_is_whole(name: str, padding: str) -> None:
    base = make_model(name)
    before = {n: p.clone() for n, p in base.named_parameters()}
    record = profile(config(padding=padding, methods=PROFILE_METHODS), base=base)
    assert json.loads(json.dumps(record)) == record
    assert [method["label"] for method in record["methods"]] == list(PROFILE_METHODS)
    counts = {method["method"]: method["trainable_parameters"] for method in record["methods"]}
    assert counts["pt"] == counts["peft-pt"] == 100 * 32
    assert counts["dept"] == 60 * 32 + 30 * (12 + 32)
    assert counts["ept"] == 40 * 32 + 30 * (12 + 32) + 1 + 2 * 32 * 8 + 32 * 4
    assert counts["ept-token"] == 40 * 32 + 2 * 30 * 32 + 30 + 32 + 1 + 2 * 32 * 8 + 32 * 4
    for method in record["methods"]:
        step = method["step_ms"]
        assert len(step["samples"]) == 4
        assert 0 < step["p20"] <= step["median"] <= step["p80"]
        assert tuple(method["phases_ms"]) == PHASES
        assert all(time > 0 for time in method["phases_ms"].values())
        assert 0.95 <= method["phases_over_step"] <= 1.0
        tokens = record["data"]["text_tokens_a_batch"]
        assert method["tokens_per_second"] == pytest.approx(1e3 * tokens / step["median"])
        assert sum(method["shares"].values()) == pytest.approx(1)
        assert all(share >= 0 for share in method["shares"].values())
        assert all(method["shares"][kind] > 0 for kind in ("products", "element-wise", "prompt path", "launches"))
        assert method["shares"]["attention"] > 0 == method["shares"]["dequantisation"]
    peak = {method["method"]: method["peak_memory_bytes"] for method in record["methods"]}
    assert 0 < peak["ept"] < peak["dept"] < peak["pt"]
    data = record["data"]
    assert data["text_tokens_a_batch"] == 36 if padding == "none" else data["text_tokens_a_batch"] < 36
    assert data["padded_tokens_a_batch"] == 36 if padding != "longest" else data["padded_tokens_a_batch"] <= 36
    assert record["reference"] == "pt"
    assert record["methods"][0]["speedup"] == {"median": 1.0, "p20": 1.0, "p80": 1.0}
    for n, parameter in base.named_parameters():
        assert torch.equal(parameter, before[n]), n
    assert not base._forward_pre_hooks


@pytest.mark.parametrize("name", FAMILIES)
def test_every_method_gives_the_base_model_the_same_work(name: str) -> None:
    base = make_model(name)
    methods = [make_method(MethodSpec.parse(text), base, TASK_OF[name], 12) for text in PROFILE_METHODS]
    batch = batch_of(name, "longest")
    seen: dict[str, Any] = {}

    def look(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        seen["positions"] = kwargs["inputs_embeds"].shape[1]
        seen["real"] = int(kwargs["attention_mask"].sum())
        seen["logits"] = tuple(output.logits.shape)
        seen["modes"] = {m.training for m in base.modules()}
        seen["cache"] = output.past_key_values

    base.register_forward_hook(look, with_kwargs=True)
    work = {}
    for method in methods:
        time_step(method, base, batch, CPU)
        owner, maker = method.prompt_of
        assert maker not in owner.__dict__  # the marks leave nothing behind
        assert not base._forward_pre_hooks
        s, n = method.spec.num_virtual_tokens, batch["input_ids"].shape[1]
        assert seen["positions"] == s + n
        assert seen["real"] == 3 * s + int(batch["attention_mask"].sum())
        assert seen["modes"] == {False}
        assert seen["cache"] is None
        work[method.spec.name] = seen["logits"]
    assert set(work.values()) == {(3, 3 if name == "llama" else 2, VOCAB)}


@pytest.mark.parametrize("kind", ["cuda", "xpu"])
def test_an_accelerator_tells_the_time_of_the_phases_and_is_waited_for(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It works behind the processor, whose clock knows nothing of a phase. Here every mark comes after two seconds."""
    marks: list[Any] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            marks.append(self)

        def elapsed_time(self, later: Any) -> float:
            return 2e3 * (marks.index(later) - marks.index(self))

    waited: list[torch.device] = []
    method = make_method(MethodSpec.parse("ept"), base := make_model("llama"), "CAUSAL_LM", 12)
    monkeypatch.setattr(torch, "get_device_module", lambda *device: SimpleNamespace(Event=Event, is_available=bool))
    monkeypatch.setattr(torch.accelerator, "synchronize", waited.append)
    time = time_step(method, base, batch_of("llama"), device := torch.device(kind, 1))
    assert waited == [device] * 2
    assert time.phases == dict.fromkeys(PHASES, 2e3) | {"embedding": 4e3}  # before and after the prompt is made


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("all_logits", [False, True])
def test_prompt_tuning_and_pefts_have_one_loss_and_one_step(name: str, all_logits: bool) -> None:
    base = make_model(name)
    ours, theirs = (make_method(MethodSpec(n, 6), base, TASK_OF[name], 12) for n in ("pt", "peft-pt"))
    layer = ours.model.prompt_encoder["default"]
    embedding = theirs.model.prompt_encoder["default"].embedding.weight
    with torch.no_grad():
        embedding.copy_(layer.prompt * layer.embedding_scale)
    batch = batch_of(name, all_logits=all_logits)
    losses = [method.loss(batch) for method in (ours, theirs)]
    torch.testing.assert_close(losses[0], losses[1])
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(layer.prompt.grad, embedding.grad * layer.embedding_scale, rtol=1e-4, atol=1e-6)
    before = embedding.detach().clone()
    theirs.update()
    assert not torch.equal(embedding, before)
    assert embedding.grad is None


@pytest.mark.parametrize("fast_4bit", [True, False])
def test_pefts_prompt_tuning_runs_on_bitsandbytes_layers(fast_4bit: bool) -> None:
    base = build_shape("smollm2-135m", dtype=torch.float32, device=CPU, quantization="nf4", layers=1)
    linear = base.model.layers[0].mlp.up_proj
    used: list[type] = []
    base.register_forward_pre_hook(lambda module, args: used.append(type(linear)))
    methods: dict[str, Any] = {"methods": ("ept:4", "peft-pt:4"), "shared_prompt": False}
    record = profile(config(**methods, quantization="nf4", fast_4bit=fast_4bit, steps=2), base=base)
    ours = linear4bit.Linear4bit if fast_4bit else bitsandbytes.nn.Linear4bit
    assert used == [ours, bitsandbytes.nn.Linear4bit] * 3 + [ours] * 2 + [bitsandbytes.nn.Linear4bit] * 2
    assert record["model"]["fast_4bit"] is fast_4bit


def test_no_step_looks_at_the_4_bit_weights_that_were_swapped_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU that would wait for the device, layer by layer, as the first step of a run does and no other."""
    monkeypatch.setattr(ept_kernels, "backend", lambda device: "triton")
    base = build_shape("smollm2-135m", dtype=torch.float32, device=CPU, quantization="nf4", layers=1)
    looked: list[bool] = []
    in_step = False

    def timed(*arguments: Any) -> StepTime:
        nonlocal in_step
        in_step = True
        step = time_step(*arguments)
        in_step = False
        return step

    def look(*arguments: Any, **options: Any) -> Any:
        looked.append(in_step)
        return of_bitsandbytes(*arguments, **options)

    of_bitsandbytes = FourBitWeight.from_bitsandbytes
    monkeypatch.setattr(FourBitWeight, "from_bitsandbytes", look)
    monkeypatch.setattr("ept.profile.profile.time_step", timed)
    profile(config(methods=("pt:4", "ept:4"), quantization="nf4", fast_frozen=False, steps=2), base=base)
    assert looked
    assert not any(looked)


@pytest.mark.parametrize("fast_frozen", [True, False])
def test_pefts_prompt_tuning_runs_on_the_models_own_norms(fast_frozen: bool) -> None:
    base = make_model("llama")
    fused: list[bool] = []
    base.register_forward_pre_hook(lambda module, args: fused.append(is_swapped(base.model.norm)))
    methods: dict[str, Any] = {"methods": ("ept:4", "peft-pt:4"), "shared_prompt": False}
    record = profile(config(**methods, fast_frozen=fast_frozen, steps=2), base=base)
    assert fused == [fast_frozen, False] * 3 + [fast_frozen] * 2 + [False] * 2  # then memory and kinds of work
    assert record["model"]["fast_frozen"] is fast_frozen


@pytest.mark.parametrize("shared", [True, False, None])
def test_our_methods_read_a_prompt_once_a_batch(shared: bool | None) -> None:
    base = make_model("llama")
    read: list[tuple[int, ...]] = []

    def hook(module: Any, arguments: Any, given: Any) -> None:
        read.append(tuple(given["inputs_embeds"].shape[:2]))

    base.register_forward_pre_hook(hook, with_kwargs=True)
    record = profile(config(methods=("ept:4", "peft-pt:4"), shared_prompt=shared, steps=2), base=base)
    assert [method["shared_prompt"] for method in record["methods"]] == [bool(shared), False]
    ours = [(1, 4), (3, 12)] if shared else [(3, 16)]  # 8 positions saved are too few by themselves
    assert read[: len(ours) + 1] == [*ours, (3, 16)]
    assert all(0.95 <= method["phases_over_step"] <= 1.0 for method in record["methods"])
    for method in record["methods"]:
        assert all(time > 0 for time in method["phases_ms"].values())


def event(name: str, parent: Any = None, kernels: dict[str, float] | None = None, **times: float) -> SimpleNamespace:
    launched = [SimpleNamespace(name=kernel, duration=time) for kernel, time in (kernels or {}).items()]
    given = {"cpu_time_total": 0.0, "self_cpu_time_total": 0.0, **times}
    return SimpleNamespace(name=name, cpu_parent=parent, kernels=launched, device_type=DeviceType.CPU, **given)


def test_a_steps_kernels_are_counted_by_the_kind_of_work_of_their_operator() -> None:
    step = event("training step", cpu_time_total=100.0)
    product = event("ept::matmul_4bit_backward", step, {"dequantize_4bit_kernel": 5.0})
    events = [
        step,
        product,
        event("aten::mm", product, {"gemm": 40.0}),
        event("aten::scaled_dot_product_attention", step),
        event("ept::prompted_embedding", step, {"prompted_embedding_kernel": 2.0}),
        event("aten::mul", step, {"elementwise": 13.0}, self_cpu_time_total=50.0),
        SimpleNamespace(name="gemm", device_type=DeviceType.CUDA),
    ]
    events.append(event("aten::bmm", events[3], {"gemm": 10.0}))
    shares = shares_of(events, on_gpu=True)
    expected = {"products": 0.4, "element-wise": 0.13, "attention": 0.1, "dequantisation": 0.05, "prompt path": 0.02}
    assert shares == pytest.approx({**expected, "launches": 0.3})
    assert shares_of(events, on_gpu=False)["element-wise"] == 0.5


def test_statistics_pair_the_steps_of_a_turn() -> None:
    def steps(*times: float) -> list[StepTime]:
        return [StepTime(t, {phase: t / len(PHASES) for phase in PHASES}) for t in times]

    found = _statistics(steps(10, 20, 40), steps(20, 40, 20))
    assert found["step_ms"]["median"] == 20
    assert found["speedup"]["median"] == 2
    assert found["speedup"]["p20"] == pytest.approx(1.1)  # of 2, 2 and 0.5
    assert found["phases_ms"]["optimizer"] == pytest.approx(20 / 6)
    assert found["phases_over_step"] == pytest.approx(1)
    assert summary([1, 2, 3, 4, 5, 6]) == {"median": 3.5, "p20": 2.0, "p80": 5.0}


def test_a_cpu_step_counts_what_it_allocates(tmp_path: Path) -> None:
    kept: list[torch.Tensor] = []

    def step() -> None:
        torch.empty(1000, 1000)  # freed at once
        kept.extend(torch.empty(1000, 500) for _ in range(3))

    assert 6_000_000 <= allocated_by(step, tmp_path / "trace.json") < 6_100_000
    assert (tmp_path / "trace.json").is_file()


def test_traces_name_our_operators(tmp_path: Path) -> None:
    profile(config(methods=("ept", "peft-pt")), base=make_model("t5"), traces=tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {"trace_ept.json", "trace_peft-pt.json"}
    events = json.loads((tmp_path / "trace_ept.json").read_text(encoding="utf-8"))["traceEvents"]
    ours = {f"ept::{name}{end}" for name in ("joint_prompt", "prompted_embedding") for end in ("", "_backward")}
    assert ours <= {event.get("name") for event in events}


def test_a_sweep_takes_every_length_in_the_same_turns(tmp_path: Path) -> None:
    names = sweep("num_virtual_tokens=4,40", ["ept", "pt:7"])
    assert names == ("ept:4", "ept:40", "pt:4", "pt:40")
    record = profile(config(methods=names), base=make_model("llama"))
    assert [method["label"] for method in record["methods"]] == ["ept:4", "ept", "pt:4", "pt:40"]
    assert record["reference"] == "pt:4"
    for draw in (draw_phases, draw_sweep):
        draw(record, tmp_path / "plot.png")
        assert (tmp_path / "plot.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert steps_table(record).row_count == phases_table(record).row_count == 4


@pytest.mark.parametrize("changes, message", [
    ({"shape": "t5-small"}, "give exactly one of a shape"),
    ({"model": ModelConfig()}, "give exactly one of a shape"),
    ({"layers": 2}, "layers shortens a shape"),
    ({"dtype": "float16"}, "dtype='float16': choose one of float32, bfloat16"),
    ({"quantization": "int8"}, "quantization='int8': choose one of None, nf4, fp4"),
    ({"padding": "left"}, "padding='left': choose one of none, longest, max_length"),
    ({"logits": "few"}, "logits='few': choose one of labels, all"),
    ({"steps": 1}, "steps must be at least 2, got 1"),
    ({"warmup": 0}, "warmup must be at least 1, got 0"),
    ({"batch": 0}, "batch must be at least 1, got 0"),
    ({"length": 4}, "length=4 is too short: at least 5 tokens"),
    ({"methods": ("pt", "lora")}, "unknown method 'lora': choose from pt, dept, ept, peft-pt, ept-token"),
    ({"methods": ("pt:0",)}, "'pt:0': the prompt length after the colon must be a positive whole number"),
    ({"methods": ("pt", "pt:100")}, "name at least one, each once"),
])  # fmt: skip
def test_refused(changes: dict[str, Any], message: str) -> None:
    given = {"model": ModelConfig(name_or_path="tiny"), "batch": 2, "length": 12, **changes}
    with pytest.raises(ValueError) as error:
        profile(ProfileConfig(**given), base=make_model("llama"))
    assert message in str(error.value)


def test_data_that_does_not_fit_is_refused() -> None:
    rows = [{"input_ids": [5] * n, "labels": [6]} for n in (4, 9)]
    with pytest.raises(ValueError, match="2 rows do not fill a batch of 3"):
        profile(config(padding="longest"), rows=rows, base=make_model("t5"))
    with pytest.raises(ValueError, match="padding=none needs rows of one length"):
        profile(config(batch=2), rows=rows, base=make_model("t5"))
    rows[0]["input_ids"][0] = VOCAB
    with pytest.raises(ValueError, match=f"beyond the model's vocabulary of {VOCAB}"):
        profile(config(batch=2), rows=rows, base=make_model("t5"))
    with pytest.raises(ValueError, match="cannot profile BertForSequenceClassification"):
        profile(config(), base=make_model("bert"))
