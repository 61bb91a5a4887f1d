"""The goals, as a table, and how a record is judged by them.

A goal is met only if every case it names was measured at full size on the kind of device it names; a single measured
miss already makes it missed. Otherwise it is not measured, and the verdict says how much of it was. Each card is
judged separately: the goals on GPUs are set for an H100 and an H200.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

from . import shapes
from .record import Row, by_case, is_measured
from .shapes import BITSANDBYTES, COMPILED, EAGER, LIGER, MODEL, OURS

MET, MISSED, NOT_MEASURED = "met", "missed", "not measured"


@dataclass(frozen=True)
class Goal:
    """A threshold (`at_least` or `at_most`) for a number of every case.

    Attributes:
        what: is judged.
        against: what it is compared with.
        cases: identifiers of the cases, all of which count.
        field: of a row.
        of, over: providers: the number is the field in the row of `of` (empty: of `against`),
            divided, unless `over` is empty, by that in the row of `over`.
        unit: how the number is shown: `×` for ratios, `%`, `yes` for a flag; anything else follows the number.
        device_type: `cuda` or `cpu`, or `any` if the device does not matter.
        proof: field without which a row does not count: what the profiler or the compiler saw of the device.
    """

    what: str
    against: str
    cases: tuple[str, ...]
    field: str = "median"
    of: str = ""
    over: str = OURS
    at_least: float | None = None
    at_most: float | None = None
    unit: str = "×"
    device_type: str = "cuda"
    proof: str = ""

    def show(self, value: float | None) -> str:
        """Shows the number with its unit."""
        if value is None:
            return "–"
        if self.unit == "yes":
            return "yes" if value else "no"
        if self.unit == "%":
            return f"{100 * value:.0f} %"
        return f"{value:.2f} ×" if self.unit == "×" else f"{value:.3g} {self.unit}".rstrip()


class Verdict(NamedTuple):
    """`status` of a goal: the `worst` measured number and its case, out of `measured` cases."""

    status: str
    worst: float | None
    worst_case: str
    measured: int


def judge(goal: Goal, rows: Iterable[Row]) -> Verdict:
    """Judges one goal by `rows` (results of one device; reduced and rehearsed ones do not count)."""
    counted = (row for row in rows if is_measured(row) and row.get("case") in goal.cases)
    cases = by_case(row for row in counted if goal.device_type in ("any", row["device_type"]))
    names = [goal.of or goal.against, *([goal.over] if goal.over else [])]
    found: dict[str, float] = {}
    for case in goal.cases:
        # A case that was measured twice counts as the last time, even if it failed then.
        providers = {name: row for name, row in cases.get(case, {}).items() if row["status"] == "ok"}
        values: list[Any] = [providers.get(name, {}).get(goal.field) for name in names]
        # A reference that replaced a missing kernel is not a result of ours.
        stood_in = OURS in names and providers.get(OURS, {}).get("backend") not in ("triton", "library")
        proven = not goal.proof or all(providers.get(name, {}).get(goal.proof) for name in names)
        if None not in values and not stood_in and proven:
            first = values[0]["median"] if isinstance(values[0], dict) else values[0]
            found[case] = float(first / values[1] if goal.over else first)
    if not found:
        return Verdict(NOT_MEASURED, None, "", 0)
    where = (max if goal.at_least is None else min)(found, key=found.__getitem__)
    worst = found[where]
    if (goal.at_least is not None and worst < goal.at_least) or (goal.at_most is not None and worst > goal.at_most):
        return Verdict(MISSED, worst, where, len(found))
    return Verdict(MET if len(found) == len(goal.cases) else NOT_MEASURED, worst, where, len(found))


def _products(low: int, high: int, layer: tuple[int, int] | None = None) -> tuple[str, ...]:
    cases = (case for case in shapes.GOAL_PRODUCTS if low <= case.size["m"] <= high)
    return tuple(case.id for case in cases if layer in (None, (case.size["rows"], case.size["columns"])))


T5_STEP = "steps/t5-base"
LLAMA_STEP = "steps/llama-2-7b nf4"
BARE_STEP = "steps/bare"
EVERYTHING, EPT_EVERYTHING, PEFT_EVERYTHING = "steps/everything", "EPT, every option", "PEFT, every option"
COLD_START, COMPILING = "cold/start", "cold/joint_prompt"
SCORES = "scores"
EPT_METHOD = "ept"
SET_FOR = {"cuda": "H100, H200", "cpu": "CPU", "any": "any"}  # by type of device

FORWARD, BACKWARD = (shapes.GOAL_FORWARD.id,), (shapes.GOAL_BACKWARD.id,)
JOINT = tuple(case.id for case in shapes.GOAL_JOINT)
DEQUANTIZE, DEQUANTIZE_LARGE = (shapes.GOAL_DEQUANTIZE.id,), (shapes.GOAL_DEQUANTIZE_LARGE.id,)
FROZEN = tuple(case.id for case in shapes.GOAL_FROZEN)

PEFT_CPU = "PEFT prompt tuning, 100 tokens, every option"
# Fields shared by goals of one kind.
OWN: Row = {"of": OURS, "over": ""}
BANDWIDTH: Row = {**OWN, "against": "copy bandwidth", "field": "fraction_of_bandwidth", "unit": "%"}
EQUAL: Row = {**OWN, "at_least": 1, "unit": "yes"}
EQUAL_TO_PEER: Row = {**EQUAL, "against": BITSANDBYTES, "field": f"bit_equal_to_{BITSANDBYTES}"}
STEP: Row = {"of": EPT_METHOD, "over": "peft-pt", "proof": "launches"}
CPU_STEP: Row = {"against": PEFT_CPU, "of": EPT_EVERYTHING, "over": PEFT_EVERYTHING, "device_type": "cpu"}
BARE: Row = {"field": "ratio_to_bare", "of": EPT_METHOD, "over": "", "at_most": 1.03, "cases": (BARE_STEP,)}
SCORE: Row = {"cases": (SCORES,), "field": "score", "of": EPT_METHOD, "at_least": 1.0, "device_type": "any"}
COMPILE: Row = {**OWN, "cases": (COMPILING,), "proof": "compiled"}
COLD: Row = {"of": "warm cache", "over": "empty cache", "device_type": "any"}

BARE_MODEL = "the bare frozen model on the same number of positions"
PEFT_100, PEFT_4BIT = "PEFT prompt tuning, 100 tokens", "PEFT prompt tuning + bitsandbytes"
ELEMENTWISE = "frozen RMSNorm, rotary, gated activation, 2368×4096 bf16"
SEVEN_TASKS = "seven tasks, position-dependent EPT"
MEAN_SCORE = f"{SEVEN_TASKS}: mean score at equal stored size, 3 seeds"
GOALS = (
    Goal("training step, T5-base shape, 32×256, bf16: EPT", PEFT_100, (T5_STEP,), at_most=0.60, **STEP),
    Goal("training step, Llama-2-7B shape, NF4, 8×256: EPT", PEFT_4BIT, (LLAMA_STEP,), at_most=0.65, **STEP),
    Goal("its peak memory", PEFT_4BIT, (LLAMA_STEP,), "peak_bytes", at_most=0.80, **STEP),
    Goal("CPU step, SmolLM2-135M on headlines: EPT", cases=(f"{EVERYTHING} smollm2",), at_most=0.50, **CPU_STEP),
    Goal("CPU step, T5-base shape: EPT", cases=(f"{EVERYTHING} t5-base",), at_most=0.75, **CPU_STEP),
    Goal("EPT's step, GPU", BARE_MODEL, **BARE),
    Goal("EPT's step, CPU", BARE_MODEL, device_type="cpu", **BARE),
    Goal(ELEMENTWISE, cases=FROZEN, at_least=0.85, **BANDWIDTH),
    Goal(ELEMENTWISE, MODEL, FROZEN, at_least=3.0),
    Goal(ELEMENTWISE, LIGER, FROZEN, at_least=1.2),
    Goal("prompted_embedding, 32×512×4096 bf16", cases=FORWARD, at_least=0.90, **BANDWIDTH),
    Goal("prompted_embedding, 32×512×4096 bf16", COMPILED, FORWARD, at_least=1.3),
    Goal("prompted_embedding, 32×512×4096 bf16", EAGER, FORWARD, at_least=2.5),
    Goal("its backward", cases=BACKWARD, at_least=0.80, **BANDWIDTH),
    Goal("its backward", COMPILED, BACKWARD, at_least=1.5),
    Goal("its backward", EAGER, BACKWARD, at_least=3.0),
    Goal("its backward, equal bits on two runs", "itself", BACKWARD, "repeats_bit_equal", **EQUAL),
    Goal("joint_prompt, forward and backward, d 768 and 4096", COMPILED, JOINT, at_least=2.0),
    Goal("joint_prompt, forward and backward, d 768 and 4096", EAGER, JOINT, at_least=6.0),
    Goal("joint_prompt, forward and backward", "launches", JOINT, "launches", at_most=9, unit="launches", **OWN),
    Goal("joint_prompt, first call", "compile time", field="compile_seconds", at_most=3, unit="s", **COMPILE),
    Goal(
        "joint_prompt, another shape", "kernels compiled", field="compiled_again", at_most=0, unit="kernels", **COMPILE
    ),
    Goal("dequantize_4bit, nested NF4, 4096×4096", BITSANDBYTES, DEQUANTIZE, at_least=1.5),
    Goal("dequantize_4bit, nested NF4, 14336×4096", cases=DEQUANTIZE_LARGE, at_least=0.90, **BANDWIDTH),
    Goal("dequantize_4bit, nested NF4, 14336×4096", BITSANDBYTES, DEQUANTIZE_LARGE, at_least=1.25),
    Goal("dequantize_4bit, equal bits", cases=DEQUANTIZE + DEQUANTIZE_LARGE, **EQUAL_TO_PEER),
    Goal("matmul_4bit, 4096×4096, M 16 to 64", BITSANDBYTES, _products(16, 64, (4096, 4096)), at_least=2.0),
    Goal("matmul_4bit, M 1 to 8192", BITSANDBYTES, _products(1, 8192), at_least=0.98),
    Goal(
        "cold start, first step of a process with a warm kernel cache",
        "an empty one",
        (COLD_START,),
        at_most=0.2,
        **COLD,
    ),
    Goal(MEAN_SCORE, "DePT", over="dept", **SCORE),
    Goal(MEAN_SCORE, "tuned prompt tuning", over="pt", **SCORE),
    Goal(MEAN_SCORE, "ULPT", over="ulpt", **SCORE),
    Goal(
        f"{SEVEN_TASKS}: above DePT",
        "p",
        (SCORES,),
        "p_value",
        EPT_METHOD,
        "",
        at_most=0.05,
        unit="",
        device_type="any",
    ),
    Goal(
        f"{SEVEN_TASKS}: steps to prompt tuning's final score",
        "prompt tuning",
        (SCORES,),
        "steps_to_score",
        EPT_METHOD,
        "pt",
        at_most=0.7,
        device_type="any",
    ),
)
