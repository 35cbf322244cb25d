"""What the checks of arguments and data cost: their share of the seconds of the command's default run.

    python benchmarks/door.py       # writes door.json

Every check is timed where the library calls it, a check inside another one with the outer one.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from types import FunctionType

from pages import facts

from potara_lite import Setting, checks as door, compare
from potara_lite.adapters.lora import state as stacks
from potara_lite.federation.inputs import check_alike, check_examples, check_pairs
from potara_lite.training import train as training

CHECKS = (
    door.checked, check_alike, check_examples, check_pairs, training.check_clients, training.check_labels,
    training.check_losses, training._check_finite, stacks.all_finite, stacks.fitting,
)  # fmt: skip


@contextmanager
def timed(checks: tuple[Callable, ...]) -> Iterator[list[float]]:
    """Seconds of each outermost call of a check, in every module of the library that has it."""
    calls: list[float] = []
    depth = 0

    def watched(check: Callable) -> Callable:
        @wraps(check)
        def call(*args, **kwargs):
            nonlocal depth
            began, depth = time.perf_counter(), depth + 1
            try:
                return check(*args, **kwargs)
            finally:
                depth -= 1
                if not depth:
                    calls.append(time.perf_counter() - began)

        return call

    places = [
        (module, name, one)
        for module in [module for name, module in sys.modules.items() if name.startswith("potara_lite")]
        for name, one in vars(module).items()
        if isinstance(one, FunctionType) and one in checks
    ]
    watchers = {check: watched(check) for check in checks}
    try:
        for module, name, check in places:
            setattr(module, name, watchers[check])
        yield calls
    finally:
        for module, name, check in places:
            setattr(module, name, check)


def main(repeats: int = 5) -> None:
    compare(Setting(rounds=1, local_steps=1), [0])  # imports, caches
    runs = []
    for _ in range(repeats):
        began = time.perf_counter()
        with timed(CHECKS) as calls:
            compare(Setting(), [0])
        runs.append({"seconds": time.perf_counter() - began, "in checks": sum(calls), "checks": len(calls)})
    share = statistics.median(run["in checks"] / run["seconds"] for run in runs)
    found = {"share": share, "runs": runs} | facts()
    Path(__file__).with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps({"share": round(share, 4)} | runs[0]))


if __name__ == "__main__":
    main()
