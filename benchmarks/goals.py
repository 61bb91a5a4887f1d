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
        """Shows the limit as a table does."""
        if self.unit == "yes":
            return "yes"
        return f"≥ {self.show(self.at_least)}" if self.at_least is not None else f"≤ {self.show(self.at_most)}"

    def show(self, value: float | None) -> str:
        """Shows the number with its unit."""
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
EQUAL_BITS: Row = {"field": f"bit_equal_to_{BITSANDBYTES}", "at_least": 1, "unit": "yes"}
DEQUANTIZE, DEQUANTIZE_LARGE = _ids(shapes.GOAL_DEQUANTIZE), _ids(shapes.GOAL_DEQUANTIZE_LARGE)


def _faster(what: str, peer: str, cases: tuple[str, ...], at_least: float) -> Goal:
    """Makes a goal of the time of `peer` over ours, both medians of the same run."""
    return Goal(what, peer, cases, "median", of=peer, over=OURS, at_least=at_least)


def _bandwidth(what: str, cases: tuple[str, ...], at_least: float) -> Goal:
    return Goal(what, "copy bandwidth", cases, "fraction_of_bandwidth", at_least=at_least, unit="%")


def _ept_step(what: str, against: str, case: str, at_most: float, field: str = "median") -> Goal:
    return Goal(what, against, (case,), field, of=EPT_METHOD, over=PEFT_PT, at_most=at_most)


def _bare(device: str, device_type: str) -> Goal:
    against = "the bare frozen model on as many positions"
    goal: Row = {"field": "ratio_to_bare", "of": EPT_METHOD, "at_most": 1.03, "device_type": device_type}
    return Goal(f"EPT's step, {device}", against, (BARE_STEP,), **goal)


def _score(ours: str, theirs: str) -> Goal:
    goal: Row = {"field": "score", "of": ours, "over": theirs, "at_least": 1.0, "device_type": "any"}
    return Goal(f"mean score at one budget, {ours}", theirs, (SCORES,), **goal)


GOALS: tuple[Goal, ...] = (
    _bandwidth("prompted_embedding, 32×512×4096 bf16", FORWARD, 0.90),
    _faster("prompted_embedding, 32×512×4096 bf16", COMPILED, FORWARD, 1.3),
    _faster("prompted_embedding, 32×512×4096 bf16", EAGER, FORWARD, 2.5),
    _bandwidth("its backward", BACKWARD, 0.85),
    _faster("its backward", COMPILED, BACKWARD, 1.5),
    _faster("its backward", EAGER, BACKWARD, 3.0),
    Goal("its backward, equal bits on two runs", "itself", BACKWARD, "repeats_bit_equal", at_least=1, unit="yes"),
    _faster("joint_prompt, forward and backward, d 768 and 4096", COMPILED, JOINT, 2.0),
    _faster("joint_prompt, forward and backward, d 768 and 4096", EAGER, JOINT, 6.0),
    Goal("joint_prompt, forward and backward", "launches", JOINT, "launches", at_most=6, unit="launches"),
    _faster("dequantize_4bit, nested NF4, 4096×4096", BITSANDBYTES, DEQUANTIZE, 1.5),
    _bandwidth("dequantize_4bit, nested NF4, 14336×4096", DEQUANTIZE_LARGE, 0.90),
    _faster("dequantize_4bit, nested NF4, 14336×4096", BITSANDBYTES, DEQUANTIZE_LARGE, 1.25),
    Goal("dequantize_4bit, equal bits", BITSANDBYTES, DEQUANTIZE + DEQUANTIZE_LARGE, **EQUAL_BITS),
    _faster("matmul_4bit, M 16 to 64", BITSANDBYTES, _products("matmul_4bit", 16, 64), 2.0),
    _faster("matmul_4bit, M 1 to 8192", BITSANDBYTES, _products("matmul_4bit", 1, 8192), 0.98),
    _faster("matmul_4bit_backward, M 1 to 64", BITSANDBYTES, _products("matmul_4bit_backward", 1, 64), 2.0),
    _faster("matmul_4bit_backward, M 1 to 512", BITSANDBYTES, _products("matmul_4bit_backward", 1, 512), 1.1),
    _faster("matmul_4bit_backward, M 1 to 8192", BITSANDBYTES, _products("matmul_4bit_backward", 1, 8192), 0.98),
    _ept_step("training step, T5-base shape, 32×256, bf16: EPT", "PEFT prompt tuning, 100 tokens", T5_STEP, 0.60),
    _ept_step(
        "training step, Llama-2-7B shape, NF4, 8×256: EPT", "PEFT prompt tuning + bitsandbytes", LLAMA_STEP, 0.70
    ),
    _ept_step("its peak memory", "PEFT prompt tuning + bitsandbytes", LLAMA_STEP, 0.80, "peak_bytes"),
    _bare("GPU", "cuda"),
    _bare("CPU", "cpu"),
    _score(EPT_METHOD, DEPT_METHOD),
    _score(DEPT_METHOD, PT_METHOD),
)
