"""What the checks of arguments and data cost: their share of the seconds of the command's default run.

    python benchmarks/checks.py       # writes checks.json

A check is a function of the library whose name begins with ``check_``; ``check_arguments`` is the one that ``@checked``
calls. Each is timed wherever the library calls it, and a check inside another one as part of the outer one.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from types import FunctionType, ModuleType

from pages import facts

from potara_lite import Setting, compare

OTHER = "potara_lite.course", "potara_lite.files"  # they check exercises and checksums


def modules() -> list[ModuleType]:
    """The modules of the library that are imported."""
    return [module for name, module in list(sys.modules.items()) if name.startswith("potara_lite")]


def checks() -> set[Callable]:
    """The functions of the library that check arguments and data."""
    functions = [one for module in modules() for one in vars(module).values() if isinstance(one, FunctionType)]
    return {
        one
        for one in functions
        if one.__name__.lstrip("_").startswith("check_")
        and one.__module__.startswith("potara_lite")
        and not one.__module__.startswith(OTHER)
    }


@contextmanager
def timed(checks: Iterable[Callable]) -> Iterator[list[float]]:
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

    watchers = {check: watched(check) for check in checks}
    replaced = [
        (module, name, one)
        for module in modules()
        for name, one in vars(module).items()
        if isinstance(one, FunctionType) and one in watchers
    ]
    try:
        for module, name, check in replaced:
            setattr(module, name, watchers[check])
        yield calls
    finally:
        for module, name, check in replaced:
            setattr(module, name, check)


def main(repeats: int = 5) -> None:
    compare(Setting(rounds=1, local_steps=1), [0])  # imports, caches
    runs = []
    for _ in range(repeats):
        began = time.perf_counter()
        with timed(checks()) as calls:
            compare(Setting(), [0])
        runs.append({"seconds": time.perf_counter() - began, "in checks": sum(calls), "checks": len(calls)})
    share = statistics.median(run["in checks"] / run["seconds"] for run in runs)
    found = {"share": share, "runs": runs} | facts()
    Path(__file__).with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps({"share": round(share, 4)} | runs[0]))


if __name__ == "__main__":
    main()
