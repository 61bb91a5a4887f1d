"""The goals, as data, and how a record is held against them.

A goal is met or missed only when everything it speaks of was measured on the kind of device it speaks of, at full size;
one measured miss is a miss at once. Otherwise it is not measured, and the verdict says how much of it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from . import shapes
from .shapes import BITSANDBYTES, COMPILED, EAGER, OURS, Case

Row = dict[str, Any]
Measure = Callable[[dict[str, Row]], float | None]

MET, MISSED, NOT_MEASURED = "met", "missed", "not measured"


@dataclass(frozen=True)
class Goal:
    """`measure` of every case, `at_least` or `at_most` the threshold.

    Attributes:
        what: is held. against: what it is held against.
        cases: identifiers of the cases it speaks of, all of which count.
        measure: the number of one case from its rows by provider; None where the record does not have it.
        unit: how the number is shown: `×` for ratios, `%`, `launches`, `yes` for a flag.
        device_type: `cuda` or `cpu`, or `any` where the device does not matter.
    """

    what: str
    against: str
    cases: tuple[str, ...]
    measure: Measure
    at_least: float | None = None
    at_most: float | None = None
    unit: str = "×"
    device_type: str = "cuda"

    def holds(self, value: float) -> bool:
        return (self.at_least is None or value >= self.at_least) and (self.at_most is None or value <= self.at_most)

    def worst(self, values: Iterable[float]) -> float:
        return max(values) if self.at_least is None else min(values)

    @property
    def threshold(self) -> str:
        """As a table shows it."""
        if self.unit == "yes":
            return "yes"
        return f"≥ {self.show(self.at_least)}" if self.at_least is not None else f"≤ {self.show(self.at_most)}"

    def show(self, value: float | None) -> str:
        """The number with its unit."""
        if value is None:
            return "–"
        if self.unit == "yes":
            return "yes" if value else "no"
        if self.unit == "%":
            return f"{100 * value:.0f} %"
        return f"{value:.2f} ×" if self.unit == "×" else f"{value:g} {self.unit}"


@dataclass(frozen=True)
class Verdict:
    """`status` of a goal: the `worst` number measured and the case it belongs to, of `measured` cases out of
    `wanted`.
    """

    goal: Goal
    status: str
    worst: float | None
    worst_case: str
    measured: int
    wanted: int


def judge(goal: Goal, rows: Iterable[Row]) -> Verdict:
    """Holds `rows` (results of a record, reduced ones not counted) against one goal."""
    by_case: dict[str, dict[str, Row]] = {case: {} for case in goal.cases}
    for row in rows:
        right_device = goal.device_type in ("any", row["device_type"])
        if row["status"] == "ok" and right_device and not row["reduced"] and row.get("case") in by_case:
            by_case[row["case"]][row["provider"]] = row
    measured = {case: goal.measure(providers) for case, providers in by_case.items()}
    values = {case: value for case, value in measured.items() if value is not None}
    if not values:
        return Verdict(goal, NOT_MEASURED, None, "", 0, len(goal.cases))
    worst = goal.worst(values.values())
    where = next(case for case, value in values.items() if value == worst)
    status = MISSED if not goal.holds(worst) else MET if len(values) == len(goal.cases) else NOT_MEASURED
    return Verdict(goal, status, worst, where, len(values), len(goal.cases))


def judge_all(rows: Iterable[Row]) -> list[Verdict]:
    rows = list(rows)
    return [judge(goal, rows) for goal in GOALS]


# Numbers of one case.


def speedup_over(peer: str) -> Measure:
    """Time of `peer` over ours, both medians of the same run."""

    def measure(providers: dict[str, Row]) -> float | None:
        if not _kernels_ran(providers) or peer not in providers:
            return None
        return providers[peer]["median"] / providers[OURS]["median"]

    return measure


def of_ours(field: str) -> Measure:
    """A field of our own row, where our kernels ran."""
    return lambda providers: field_of(OURS, field)(providers) if _kernels_ran(providers) else None


def field_of(provider: str, field: str) -> Measure:
    """A field of a version's row."""

    def measure(providers: dict[str, Row]) -> float | None:
        value = providers.get(provider, {}).get(field)
        return None if value is None else float(value)

    return measure


def _kernels_ran(providers: dict[str, Row]) -> bool:
    """A reference that stood in for a missing kernel is no result of ours."""
    return OURS in providers and providers[OURS]["backend"] == "triton"


def ratio(ours: str, peer: str, field: str) -> Measure:
    """`field` of `ours` over that of `peer`."""

    def measure(providers: dict[str, Row]) -> float | None:
        values = [providers.get(name, {}).get(field) for name in (ours, peer)]
        return values[0] / values[1] if None not in values else None

    return measure


# The goals.


def _kernel(
    what: str, cases: Iterable[Case], bandwidth: float | None = None, peers: dict[str, float] | None = None
) -> list[Goal]:
    identifiers = tuple(case.id for case in cases)
    goals = []
    if bandwidth is not None:
        goals.append(
            Goal(what, "copy bandwidth", identifiers, of_ours("fraction_of_bandwidth"), at_least=bandwidth, unit="%")
        )
    for peer, least in (peers or {}).items():
        goals.append(Goal(what, peer, identifiers, speedup_over(peer), at_least=least))
    return goals


def _products(kernel: str, least: float, low: int, high: int) -> Goal:
    cases = tuple(c.id for c in shapes.GOAL_PRODUCTS if c.kernel == kernel and low <= c.size["m"] <= high)
    tokens = f"M {low} to {high}"
    return Goal(f"{kernel}, {tokens}", BITSANDBYTES, cases, speedup_over(BITSANDBYTES), at_least=least)


T5_STEP = "steps/t5-base"
LLAMA_STEP = "steps/llama-2-7b nf4"
BARE_STEP = "steps/bare"
SCORES = "scores"
PEFT_PT, EPT_METHOD, DEPT_METHOD, PT_METHOD = "peft-pt", "ept", "dept", "pt"

GOALS: tuple[Goal, ...] = (
    *_kernel("prompted_embedding, 32×512×4096 bf16", [shapes.GOAL_FORWARD], 0.90, {COMPILED: 1.3, EAGER: 2.5}),
    *_kernel("its backward", [shapes.GOAL_BACKWARD], 0.85, {COMPILED: 1.5, EAGER: 3.0}),
    Goal(
        "its backward, equal bits on two runs",
        "itself",
        (shapes.GOAL_BACKWARD.id,),
        of_ours("repeats_bit_equal"),
        at_least=1,
        unit="yes",
    ),
    *_kernel(
        "joint_prompt, forward and backward, d 768 and 4096", shapes.GOAL_JOINT, None, {COMPILED: 2.0, EAGER: 6.0}
    ),
    Goal(
        "joint_prompt, forward and backward",
        "launches",
        tuple(case.id for case in shapes.GOAL_JOINT),
        of_ours("launches"),
        at_most=6,
        unit="launches",
    ),
    *_kernel("dequantize_4bit, nested NF4, 4096×4096", [shapes.GOAL_DEQUANTIZE], None, {BITSANDBYTES: 1.5}),
    *_kernel("dequantize_4bit, nested NF4, 14336×4096", [shapes.GOAL_DEQUANTIZE_LARGE], 0.90, {BITSANDBYTES: 1.25}),
    Goal(
        "dequantize_4bit, equal bits",
        BITSANDBYTES,
        (shapes.GOAL_DEQUANTIZE.id, shapes.GOAL_DEQUANTIZE_LARGE.id),
        of_ours(f"bit_equal_to_{BITSANDBYTES}"),
        at_least=1,
        unit="yes",
    ),
    _products("matmul_4bit", 2.0, 16, 64),
    _products("matmul_4bit", 0.98, 1, 8192),
    _products("matmul_4bit_backward", 2.0, 1, 64),
    _products("matmul_4bit_backward", 1.1, 1, 512),
    _products("matmul_4bit_backward", 0.98, 1, 8192),
    Goal(
        "training step, T5-base shape, 32×256, bf16: EPT",
        "PEFT prompt tuning, 100 tokens",
        (T5_STEP,),
        ratio(EPT_METHOD, PEFT_PT, "median"),
        at_most=0.60,
    ),
    Goal(
        "training step, Llama-2-7B shape, NF4, 8×256: EPT",
        "PEFT prompt tuning + bitsandbytes",
        (LLAMA_STEP,),
        ratio(EPT_METHOD, PEFT_PT, "median"),
        at_most=0.70,
    ),
    Goal(
        "its peak memory",
        "PEFT prompt tuning + bitsandbytes",
        (LLAMA_STEP,),
        ratio(EPT_METHOD, PEFT_PT, "peak_bytes"),
        at_most=0.80,
    ),
    *(
        Goal(
            f"EPT's step, {name}",
            "the bare frozen model on as many positions",
            (BARE_STEP,),
            field_of(EPT_METHOD, "ratio_to_bare"),
            at_most=1.03,
            device_type=device,
        )
        for name, device in (("GPU", "cuda"), ("CPU", "cpu"))
    ),
    *(
        Goal(
            f"mean score at one budget, {ours}",
            theirs,
            (SCORES,),
            ratio(ours, theirs, "score"),
            at_least=1.0,
            device_type="any",
        )
        for ours, theirs in ((EPT_METHOD, DEPT_METHOD), (DEPT_METHOD, PT_METHOD))
    ),
)
