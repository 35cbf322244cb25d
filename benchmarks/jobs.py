"""How many lines a job takes: here, counted in the blocks of docs/jobs.md, and in other tools by their documentation.

The rows of other tools are in ``other_tools.csv``: examples chosen by hand, at the commit that a row names, and counted
in the same way.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pandas as pd

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "jobs.md"
JOB = re.compile(r"^## (?P<number>\d+)\. (?P<name>.+)\n(?P<text>(?:(?!^## ).*\n)*)", re.M)
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.M | re.S)
SHOWN = re.compile(r"  # .+$")
TOOLS = ["PEFT", "Flower + flwr-datasets", "PFLlib", "pfl-research", "mergekit"]


def lines_of(source: str) -> int:
    """The statements of Python code, however broken or joined, without imports, docstrings and what only shows.

    A whole statement that is one expression with a comment behind it shows a result.
    """
    tree, lines = ast.parse(source), source.splitlines()
    shown = {node for node in tree.body if isinstance(node, ast.Expr) and SHOWN.search(lines[node.end_lineno - 1])}
    return sum(isinstance(node, ast.stmt) and node not in shown and counts(node) for node in ast.walk(tree))


def counts(node: ast.stmt) -> bool:
    is_text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    return not (is_text or isinstance(node, ast.Import | ast.ImportFrom))


def jobs(page: str) -> pd.DataFrame:
    """The number, the name and the lines of each job of the page: its blocks, but for those that begin with a check."""
    found = []
    for job in JOB.finditer(page):
        blocks = [source for source in BLOCK.findall(job["text"]) if not source.startswith("# check")]
        found.append({"job": int(job["number"]), "name": job["name"], "lines": sum(map(lines_of, blocks))})
    return pd.DataFrame(found).set_index("job")


def overview(found: pd.DataFrame, tried: pd.DataFrame, others: pd.DataFrame) -> pd.DataFrame:
    """A row for each job: its lines and minutes here, its lines in each other tool, with * for a part of the job."""
    part = others["covers"].eq("part").map({True: " *", False: ""})
    lines = others.assign(shown=others["lines"] + part).pivot(index="job", columns="tool", values="shown")[TOOLS]
    table = found[["lines"]].join(tried["minutes"]).join(lines)
    return table.set_axis((found.index.astype(str) + ". " + found["name"]).rename("job"))


def sources(others: pd.DataFrame) -> pd.DataFrame:
    """Where each count of another tool is from, and what of the job it does."""
    counted = others[others["covers"].ne("none") | others["lines"].eq("not found")]
    return counted[["job", "tool", "lines", "source", "note"]].set_index("job")
