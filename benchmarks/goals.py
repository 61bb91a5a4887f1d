"""The goals, as a table, and how a record is held against them.

A goal is met or missed only when everything it speaks of was measured on the kind of device it speaks of, at full size;
one measured miss is a miss at once. Otherwise it is not measured, and the verdict says how much of it was.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from . import shapes
from .record import Row
from .shapes import BITSANDBYTES, COMPILED, EAGER, OURS

MET, MISSED, NOT_MEASURED = "met", "missed", "not measured"


@dataclass(frozen=True)
class Goal:
    """A number of every case, `at_least` or `at_most` the threshold.

    Attributes:
        what: is held. against: what it is held against.
        cases: identifiers of the cases it speaks of, all of which count.
        field: of a row. of, over: providers: the number is the field in the row of `of`, divided, unless `over` is
            empty, by that in the row of `over`.
        unit: how the number is shown: `×` for ratios, `%`, `launches`, `yes` for a flag.
        device_type: `cuda` or `cpu`, or `any` where the device does not matter.
    """

    what: str
    against: str
    cases: tuple[str, ...]
    field: str
    of: str = OURS
    over: str = ""
    at_least: float | None = None
    at_most: float | None = None
    unit: str = "×"
    device_type: str = "cuda"

    def number(self, providers: dict[str, Row]) -> float | None:
        """Return the number of one case from its rows by provider; None where the record does not have it."""
        if OURS in (self.of, self.over) and providers.get(OURS, {}).get("backend") != "triton":
            return None  # a reference that stood in for a missing kernel is no result of ours
        names = [self.of, self.over] if self.over else [self.of]
        values = [providers.get(name, {}).get(self.field) for name in names]
        if None in values:
            return None
        return float(values[0] / values[1]) if self.over else float(values[0])

    def holds(self, value: float) -> bool:
        return (self.at_least is None or value >= self.at_least) and (self.at_most is None or value <= self.at_most)

    def worst(self, values: Iterable[float]) -> float:
        return max(values) if self.at_least is None else min(values)

    @property
    def threshold(self) -> str:
        """Show the limit as a table does."""
        if self.unit == "yes":
            return "yes"
        return f"≥ {self.show(self.at_least)}" if self.at_least is not None else f"≤ {self.show(self.at_most)}"

    def show(self, value: float | None) -> str:
        """Show the number with its unit."""
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
    measured = {case: goal.number(providers) for case, providers in by_case.items()}
    values = {case: value for case, value in measured.items() if value is not None}
    if not values:
        return Verdict(goal, NOT_MEASURED, None, "", 0, len(goal.cases))
    worst = goal.worst(values.values())
    where = next(case for case, value in values.items() if value == worst)
    status = MISSED if not goal.holds(worst) else MET if len(values) == len(goal.cases) else NOT_MEASURED
    return Verdict(goal, status, worst, where, len(values), len(goal.cases))


def judge_all(rows: Iterable[Row]) -> list[Verdict]:
    """Holds `rows` against every goal, in order."""
    rows = list(rows)
    return [judge(goal, rows) for goal in GOALS]


def _ids(*cases: shapes.Case) -> tuple[str, ...]:
    return tuple(case.id for case in cases)


def _products(kernel: str, low: int, high: int) -> tuple[str, ...]:
    return _ids(*(c for c in shapes.GOAL_PRODUCTS if c.kernel == kernel and low <= c.size["m"] <= high))


T5_STEP = "steps/t5-base"
LLAMA_STEP = "steps/llama-2-7b nf4"
BARE_STEP = "steps/bare"
SCORES = "scores"
PEFT_PT, EPT_METHOD, DEPT_METHOD, PT_METHOD = "peft-pt", "ept", "dept", "pt"

FORWARD, BACKWARD, JOINT = _ids(shapes.GOAL_FORWARD), _ids(shapes.GOAL_BACKWARD), _ids(*shapes.GOAL_JOINT)
DEQUANTIZE, DEQUANTIZE_LARGE = _ids(shapes.GOAL_DEQUANTIZE), _ids(shapes.GOAL_DEQUANTIZE_LARGE)
FORWARD_TEXT = "prompted_embedding, 32×512×4096 bf16"
JOINT_TEXT = "joint_prompt, forward and backward"
LARGE_TEXT = "dequantize_4bit, nested NF4, 14336×4096"
BANDWIDTH = "fraction_of_bandwidth"
PEFT_TEXT = "PEFT prompt tuning + bitsandbytes"
BARE_TEXT = "the bare frozen model on as many positions"


def _faster(what: str, peer: str, cases: tuple[str, ...], at_least: float) -> Goal:
    """Make a goal of the time of `peer` over ours, both medians of the same run."""
    return Goal(what, peer, cases, "median", of=peer, over=OURS, at_least=at_least)


GOALS: tuple[Goal, ...] = (
    Goal(FORWARD_TEXT, "copy bandwidth", FORWARD, BANDWIDTH, at_least=0.90, unit="%"),
    _faster(FORWARD_TEXT, COMPILED, FORWARD, 1.3),
    _faster(FORWARD_TEXT, EAGER, FORWARD, 2.5),
    Goal("its backward", "copy bandwidth", BACKWARD, BANDWIDTH, at_least=0.85, unit="%"),
    _faster("its backward", COMPILED, BACKWARD, 1.5),
    _faster("its backward", EAGER, BACKWARD, 3.0),
    Goal("its backward, equal bits on two runs", "itself", BACKWARD, "repeats_bit_equal", at_least=1, unit="yes"),
    _faster(f"{JOINT_TEXT}, d 768 and 4096", COMPILED, JOINT, 2.0),
    _faster(f"{JOINT_TEXT}, d 768 and 4096", EAGER, JOINT, 6.0),
    Goal(JOINT_TEXT, "launches", JOINT, "launches", at_most=6, unit="launches"),
    _faster("dequantize_4bit, nested NF4, 4096×4096", BITSANDBYTES, DEQUANTIZE, 1.5),
    Goal(LARGE_TEXT, "copy bandwidth", DEQUANTIZE_LARGE, BANDWIDTH, at_least=0.90, unit="%"),
    _faster(LARGE_TEXT, BITSANDBYTES, DEQUANTIZE_LARGE, 1.25),
    Goal(
        "dequantize_4bit, equal bits",
        BITSANDBYTES,
        DEQUANTIZE + DEQUANTIZE_LARGE,
        f"bit_equal_to_{BITSANDBYTES}",
        at_least=1,
        unit="yes",
    ),
    *(
        _faster(f"{kernel}, M {low} to {high}", BITSANDBYTES, _products(kernel, low, high), at_least)
        for kernel, low, high, at_least in (
            ("matmul_4bit", 16, 64, 2.0),
            ("matmul_4bit", 1, 8192, 0.98),
            ("matmul_4bit_backward", 1, 64, 2.0),
            ("matmul_4bit_backward", 1, 512, 1.1),
            ("matmul_4bit_backward", 1, 8192, 0.98),
        )
    ),
    Goal(
        "training step, T5-base shape, 32×256, bf16: EPT",
        "PEFT prompt tuning, 100 tokens",
        (T5_STEP,),
        "median",
        of=EPT_METHOD,
        over=PEFT_PT,
        at_most=0.60,
    ),
    Goal(
        "training step, Llama-2-7B shape, NF4, 8×256: EPT",
        PEFT_TEXT,
        (LLAMA_STEP,),
        "median",
        of=EPT_METHOD,
        over=PEFT_PT,
        at_most=0.70,
    ),
    Goal("its peak memory", PEFT_TEXT, (LLAMA_STEP,), "peak_bytes", of=EPT_METHOD, over=PEFT_PT, at_most=0.80),
    Goal("EPT's step, GPU", BARE_TEXT, (BARE_STEP,), "ratio_to_bare", of=EPT_METHOD, at_most=1.03),
    Goal("EPT's step, CPU", BARE_TEXT, (BARE_STEP,), "ratio_to_bare", of=EPT_METHOD, at_most=1.03, device_type="cpu"),
    *(
        Goal(
            f"mean score at one budget, {ours}",
            theirs,
            (SCORES,),
            "score",
            of=ours,
            over=theirs,
            at_least=1.0,
            device_type="any",
        )
        for ours, theirs in ((EPT_METHOD, DEPT_METHOD), (DEPT_METHOD, PT_METHOD))
    ),
)
