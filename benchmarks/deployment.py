"""The same small run five ways: the engine, and Flower's runtimes on one machine; do they agree, and how long is each?

    python benchmarks/deployment.py engine plain tls kill simulation

Three clients, two rounds, then the exchanges of the mixing weight. In ``tls`` a node that is not
registered also knocks, in ``kill`` a node is killed after its first round. A way that does not finish is reported as
what it said. The rows are compared with the engine's (of those who are left, where one was killed: their local models
alone are the engine's); writes what was asked for into ``deployment.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import pandas as pd
from pages import facts, markdown

from potara_lite import Setting, compare
from potara_lite.experiment import MODEL_PAIR_METHODS

HERE = Path(__file__).parent

SETTING = Setting(clients=3, rounds=2, round_steps=5, local_steps=20)
CONFIG = "rounds=2 round-steps=5 local-steps=20"
WAYS = {
    "plain": {},
    "tls": dict(tls=True, stranger=True),
    "kill": dict(tls=True, kill=1),
    "simulation": dict(simulation=True),
}
NAMES = {
    "engine": "engine, one process",
    "plain": "SuperLink and three SuperNodes",
    "tls": "SuperNodes, encrypted and authenticated; an unregistered node tries to connect",
    "kill": "the same without that node; one node is killed after its first round",
    "simulation": "simulation runtime (Ray)",
}
USUAL = dict(clients=3, tls=False, simulation=False, stranger=False, kill=None, config=CONFIG, limit=1200.0)


def engine() -> tuple[dict, pd.DataFrame]:
    """The run in this process."""
    began = time.perf_counter()
    methods = {name: MODEL_PAIR_METHODS[name] for name in ("federated", "local", "potara-calibrated")}
    rows = compare(SETTING, [0], methods)
    return {"seconds": {"from the start of the run to its result": round(time.perf_counter() - began, 1)}}, rows


def flower(way: str, reference: pd.DataFrame) -> dict:
    """The run in one of Flower's runtimes; how far its losses and weights are from the engine's."""
    sys.path.insert(0, str(HERE.parent / "examples" / "flower"))
    import loopback  # here, since it needs what the extra `flower` installs

    out = Path(tempfile.mkdtemp()) / "out"
    try:
        found = loopback.play(argparse.Namespace(out=out, **USUAL | WAYS[way]))
    except (RuntimeError, TimeoutError) as error:
        logs = "\n".join((out / "work" / log).read_text() for log in ("run.log", "link.log"))
        errors = list(dict.fromkeys(re.findall(r"^\w*(?:Error|Exception): .*", logs, re.M)))
        return {"failed": str(error).split(";")[0], "said": errors[:3]}
    keys = ["method", "client"]
    both = pd.read_csv(out / "results.csv").merge(reference, on=keys, suffixes=("", "_engine"))
    found["rows"] = len(both)
    found["events"] = [event["what"] for event in json.loads((out / "events.json").read_text())]
    if way == "kill":
        both = both[both.method == "local"]
    for column in ("loss", "weight", "bytes_up", "bytes_down"):
        found[f"{column}, largest difference"] = float((both[column] - both[f"{column}_engine"]).abs().max())
    shutil.rmtree(out.parent)
    return found


def table(ways: dict[str, dict]) -> str:
    """The page's table."""
    lines = {}
    for way, found in ways.items():
        seconds = found.get("seconds", {})
        rows = f"{found['rows']} rows" if "rows" in found else ""
        failure = [found["failed"], *found["said"]] if "failed" in found else []
        events = [rows, found.get("stranger", ""), *found.get("events", []), *failure]
        lines[NAMES[way]] = {
            "start": seconds.get("until all is started", float("nan")),
            "run": seconds.get("from the start of the run to its result", float("nan")),
            "load before": found["load average before"],
            "loss − engine's": f"{found['loss, largest difference']:.0e}" if "rows" in found else float("nan"),
            "events": "; ".join(one for one in events if one) or "–",
        }
    return markdown(pd.DataFrame(lines).T, digits=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ways", nargs="+", choices=["engine", *WAYS])
    ways = parser.parse_args().ways
    path = HERE / "deployment.json"
    result = json.loads(path.read_text()) if path.is_file() else {"ways": {}}
    result |= facts(flwr=version("flwr")) | {"processors": os.cpu_count()}
    found, reference = engine()
    for way in ways:
        load = round(os.getloadavg()[0], 1)
        result["ways"][way] = {"load average before": load} | (found if way == "engine" else flower(way, reference))
        print(json.dumps({way: result["ways"][way]}, indent=1), flush=True)
        path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
