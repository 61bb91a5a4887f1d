"""How many damaged files the fuzz tests try: as many as `EPT_FUZZ_CASES` says, 2,400 without it."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.strategies import SearchStrategy

CASES = int(os.environ.get("EPT_FUZZ_CASES", "2400"))
RANDOM = "EPT_FUZZ_CASES" in os.environ  # a long search tries new files every time, the normal suite the same ones


@pytest.fixture
def fuzz(request: pytest.FixtureRequest) -> Callable[[SearchStrategy[Any], float, Callable[[Any], str]], Counter[str]]:
    """Calls a property, which returns what became of its case, with a share of all cases; returns the outcomes."""

    def run(strategy: SearchStrategy[Any], share: float, holds: Callable[[Any], str]) -> Counter[str]:
        outcomes: Counter[str] = Counter()
        cases = round(CASES * share)

        @settings(
            max_examples=cases,
            derandomize=not RANDOM,
            database=None,
            deadline=None,
            phases=[Phase.generate, Phase.shrink],
            suppress_health_check=list(HealthCheck),
        )
        @given(strategy)
        def hold(case: Any) -> None:
            outcomes[holds(case)] += 1

        hold()
        print(f"\n{request.node.name}: {outcomes.total()} cases, {dict(outcomes)}")
        assert outcomes.total() >= cases
        return outcomes

    return run
