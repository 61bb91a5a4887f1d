"""Units of work: what a record lacks is measured one by one, as long as there is time."""

from __future__ import annotations

import gc
import importlib.util
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch

from .record import Record, Row


@dataclass(frozen=True)
class Work:
    """One unit of a record.

    Attributes:
        unit: its name. rows: measures it. described: fields of all its rows.
        needs: a package without which it is skipped. on_request: measured only where `--only` names it.
    """

    unit: str
    rows: Callable[[], Iterable[Row]]
    described: Row = field(hash=False)
    needs: str = ""
    on_request: bool = False


def run(record: Record, works: Iterable[Work], about: Row, seconds: float) -> int:
    """Measures the works that `record` lacks, and returns how many are left when time is up.

    Args:
        about: `measured_with` of the device, which every row gets.
    """
    start = time.monotonic()
    left = [work for work in works if not record.finished(work.unit)]
    while left and time.monotonic() - start < seconds:
        work = left.pop(0)
        described = {"status": "ok", "reason": "", "provider": "all", **work.described, **about}
        if record.give_up(work.unit, described):
            continue
        began = time.monotonic()
        with record.unit(work.unit) as add:
            if work.needs and importlib.util.find_spec(work.needs) is None:
                add({**described, "status": "skipped", "reason": f"{work.needs} is not installed"})
                continue
            try:
                for row in work.rows():
                    add({**described, **row})
                    if "summary" in row:
                        print(f"{row['status']}: {row['summary']}", flush=True)
            except Exception as error:  # what cannot run is a result; the next one is still measured
                if torch.cuda.is_initialized():
                    torch.cuda.synchronize()  # raises where the device's context is broken: then this process must end
                add({**described, "status": "failed", "reason": f"{type(error).__name__}: {error}"})
                print(f"failed: {work.unit}: {error}", flush=True)
        print(f"{time.monotonic() - began:5.1f} s  {work.unit}", flush=True)
        gc.collect()  # the next one may need the device's memory
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
    return len(left)
