"""Every figure and table of the pages, computed from the committed rows.

    python benchmarks/figures.py       # writes them into README.md, docs/, benchmarks/ and data/

One function a page. Nothing is trained here: run a benchmark first, then this. A test compares all pages with what this
script makes of the committed rows.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import comparison
import deployment
import jobs
import language
import matrix
import numpy as np
import other_data
import pandas as pd
import peers
import privacy
import quick
import small_lm
import suite
import threads
import verdicts
import workload
from choose_default import admitted
from pages import difference, fill, listed, markdown
from safetensors import safe_open
from scipy.interpolate import CubicSpline

import notebooks
from potara_lite import lab_vit
from potara_lite.baselines.methods import METHODS
from potara_lite.experiment import ORACLE
from potara_lite.results import leaderboard, paired_differences

HERE = Path(__file__).parent
ROOT = HERE.parent
OURS, FROM_FEDERATED = "potara-calibrated", "potara-calibrated, local from federated"
EACH_STEP = "1000 clients: seconds a client's step, to those at 125"


def rows_of(name: str) -> pd.DataFrame:
    """The committed rows of a benchmark."""
    path = HERE / f"{name}.csv.gz"
    return pd.read_csv(path if path.exists() else HERE / f"{name}.csv")


def measured(name: str) -> dict:
    """The committed measurements of a benchmark."""
    return json.loads((HERE / f"{name}.json").read_text())


def percent(share: float, digits: int = 0) -> str:
    return f"{100 * share:.{digits}f} %"


# --- docs/mixing_weight.md ------------------------------------------------------------------------------------------
def mixing_weight() -> dict[str, str]:
    costs = measured("suite_timing")["share_of_training"]
    return {
        "cost": percent(costs[suite.DEFAULT], 1),
        "cost-paper": percent(costs[suite.PAPER], 1),
        **of_suite(rows_of("suite")),
        **of_other_data(rows_of("other_data")),
        **of_bound(rows_of("bound")),
    }


def of_suite(rows: pd.DataFrame) -> dict[str, str]:
    """The default against the other estimators, on all federations."""
    table = suite.report(rows)
    default = table.loc[suite.DEFAULT]
    each = suite.regret_by_federation(rows)
    lowest = each[suite.USABLE].idxmin(axis=1) == suite.DEFAULT
    by_seed = rows.groupby(["estimator", "seed"]).regret.mean()
    others = {"pooled": "pooled", "single": "best single λ, held-out", "uniform": "uniform", "paper": suite.PAPER}
    helped = suite.clients_helped(rows)
    misses = helped[~helped.beats_both]
    return {
        "suite": markdown(table, digits=4),
        "default": f"{default['regret (nats)']:.4f} ± {default['± over seeds']:.4f}",
        "worst": f"{default['worst federation']:.4f}",
        "lowest": str(lowest.sum()),
        "federations": str(len(each)),
        "offset-helps": str((each[suite.DEFAULT] < each["pooled"]).sum()),
        **{f"below-{name}": difference(by_seed[one], by_seed[suite.DEFAULT], 4) for name, one in others.items()},
        "beats": percent(helped.beats_both.mean(), 1),
        "beats-gain": percent(helped[helped.gain > other_data.WORTHWHILE].beats_both.mean(), 1),
        "misses": percent(len(misses) / len(helped), 1),
        "miss-mean": f"{(misses.regret - misses.gain).mean():.3f}",
        "miss-most": f"{(misses.regret - misses.gain).max():.2f}",
    }


def of_other_data(rows: pd.DataFrame) -> dict[str, str]:
    """The default on other images and another backbone."""
    fresh, design = (rows[rows.seed.isin(seeds)] for seeds in (other_data.FRESH, other_data.DESIGN))
    table, on_design = other_data.table(fresh), other_data.table(design)
    above_half = other_data.above_half(fresh)
    default = other_data.with_gain(fresh)
    default = default[default.estimator == "default"]
    *few, many = 100 * verdicts.thirty().tables["samples-shares"].loc["calibrated"]
    return {
        "other-fresh": markdown(table, digits=4),
        "other-design": markdown(on_design, digits=4),
        "fresh": f"{table.default.mean():.4f}",
        "design": f"{on_design.default.mean():.4f}",
        "fresh-worst": f"{table['default, worst'].max():.4f}",
        "fresh-better": str((above_half < 0).sum()),
        "fresh-federations": str(len(above_half)),
        "fresh-most": f"{above_half.max():.4f}",
        "fresh-beats": percent(default[default.oracle_beats_both].beats_both.mean()),
        "fresh-beats-gain": percent(default[default.gain > other_data.WORTHWHILE].beats_both.mean(), 1),
        "digits-federated": f"{table.federated['digits']:.3f}",
        "shares": listed([*few, many], digits=0),
    }


def of_bound(rows: pd.DataFrame) -> dict[str, str]:
    """The bound with the moments of repeated training."""
    texts = {"bound-holds": percent((rows.bound >= rows.measured).mean())}
    for regime, suffix in (("default", ""), ("over-fitted", "-over")):
        some = rows[rows.regime == regime]
        mean = some.groupby("weight")[["measured", "predicted"]].mean()
        curves = some.pivot(index="client", columns="weight", values="measured")
        spline = CubicSpline(curves.columns, curves, axis=1)
        least = spline(np.linspace(0, 1, 101)).min(axis=1)
        found = some.groupby("client")[["weight_predicted", "weight_bound"]].first()
        clients = range(len(found))
        in_loss, identity = ((spline(found[name])[clients, clients] - least).mean() for name in found)
        texts |= {
            f"bound-gap{suffix}": f"{(mean.measured - mean.predicted).abs().max():.2f}",
            f"bound-regret{suffix}": f"{in_loss:.3f}",
            f"bound-identity{suffix}": f"{identity:.3f}",
        }
        lowest = mean.idxmin().round(1)
        if regime == "over-fitted":
            texts |= {f"bound-lowest-{name}": str(weight) for name, weight in lowest.items()}
        else:
            texts["bound-lowest"] = str(lowest.measured)
    return texts


# --- docs/comparison.md ---------------------------------------------------------------------------------------------
def comparison_page() -> dict[str, str]:
    rows = rows_of("comparison-lab")
    run = measured("comparison-lab")
    setting = comparison.LAB
    tried = [len(comparison.tried(name)) for name in comparison.OPTIONS]
    return {
        "methods": str(len(METHODS)),
        "steps": str(setting.total_steps),
        "rounds": str(setting.rounds),
        "round-steps": str(setting.round_steps),
        "local-steps": str(setting.local_steps),
        "tried-least": str(min(tried)),
        "tried-most": str(max(tried)),
        "torch": run["versions"]["torch"].split("+")[0],
        "minutes": f"{run['minutes']:.0f}",
        **of_lab(rows),
        **of_grey_images(rows, rows_of("comparison-grey-cifar10")),
    }


def of_lab(rows: pd.DataFrame) -> dict[str, str]:
    """The methods on Fashion-MNIST."""
    board = leaderboard(rows)
    accuracy, sent = board.accuracy.unstack("federation"), board["bytes"].unstack("federation")
    skew, strong, shift = "label skew", "strong label skew", "label skew and feature shift"
    general = board.groupby("method")["union"].mean()
    weight = rows.groupby(["federation", "method"]).weight.mean()
    by_seed = rows.groupby(["method", "seed"]).accuracy.mean()
    share = sent[skew] / sent[skew]["FedIT"]
    gap = accuracy.loc["FedEx-LoRA"] - accuracy.loc["FedIT"]

    def best(federation: str) -> str:
        name = accuracy[federation].drop(ORACLE).idxmax()
        return f"{name} ({accuracy[federation][name]:.3f} at {sent[federation][name] / 1e6:.1f} MB)"

    def three(method: str) -> str:
        return listed(accuracy.loc[method, [skew, strong, shift]])

    texts = {
        "lab": markdown(comparison.overview(board)),
        "best-skew": best(skew),
        "best-strong": best(strong),
        "best-shift": best(shift),
        "fedit-mb": f"{sent[skew]['FedIT'] / 1e6:.1f}",
        "default": three(OURS),
        "default-share": percent(share[OURS]),
        "oracle": three(ORACLE),
        "oracle-gain": f"{(accuracy.loc[ORACLE] - accuracy.loc[OURS]).max():.3f}",
        "ours": three(FROM_FEDERATED),
        "local-skew": f"{accuracy[skew]['local']:.3f}",
        "local-shift": f"{accuracy[shift]['local']:.3f}",
        "part-skew": f"{accuracy[skew]['local part']:.3f}",
        "paper-weight": f"{weight[strong, 'potara-paper']:.2f}",
        "oracle-weight": f"{weight[strong, ORACLE]:.2f}",
        "fedit-general": f"{general['FedIT']:.3f}",
        "local-general": f"{general['local']:.3f}",
        "ours-general": f"{general[FROM_FEDERATED]:.3f}",
        "fedex-below": f"{-gap.min():.3f}",
        "fedex-above": f"{gap.max():.3f}",
        "fedex-bytes": f"{share['FedEx-LoRA']:.1f}",
        "flora-bytes": f"{share['FLoRA']:.1f}",
    }
    pairs = {
        "above-default": (FROM_FEDERATED, OURS),
        "above-fedper": (FROM_FEDERATED, "FedPer"),
        "above-wise": (FROM_FEDERATED, "WiSE-FT"),
        "above-local": (FROM_FEDERATED, "local"),
        "above-fedit": (FROM_FEDERATED, "FedIT, fine-tuned"),
        "uniform-below": (FROM_FEDERATED, "uniform, local from federated"),
        "default-uniform": (OURS, "uniform"),
        "default-paper": (OURS, "potara-paper"),
        "exact": (OURS, "potara-calibrated, factors"),
    }
    return texts | {name: difference(by_seed[one], by_seed[other]) for name, (one, other) in pairs.items()}


def of_grey_images(lab: pd.DataFrame, grey: pd.DataFrame) -> dict[str, str]:
    """The methods on grey CIFAR-10."""
    board = leaderboard(grey)
    accuracy, loss = board.accuracy.unstack("federation"), board.loss.groupby("method").mean()
    accuracy = accuracy[list(comparison.SCALES["grey-cifar10"])]
    ranks = accuracy.drop(ORACLE).rank(ascending=False).loc["FedIT"]
    by_seed = grey.groupby(["method", "seed"]).accuracy.mean()
    return {
        "survives": markdown(comparison.survives(lab, grey)),
        "grey-cifar10": markdown(comparison.overview(board)),
        "grey-fedit": listed(ranks, digits=0),
        "grey-default": listed(accuracy.loc[OURS]),
        "grey-oracle": listed(accuracy.loc[ORACLE]),
        "grey-default-loss": f"{loss[OURS]:.3f}",
        "grey-oracle-loss": f"{loss[ORACLE]:.3f}",
        "grey-independent": difference(by_seed[OURS], by_seed[FROM_FEDERATED]),
    }


# --- docs/language.md -----------------------------------------------------------------------------------------------
def language_page() -> dict[str, str]:
    rows, estimates, run = rows_of("language"), rows_of("language-weights"), measured("language")
    regrets = language.regrets(estimates)
    each, over_all = regrets.drop("all"), regrets.loc["all"]
    above_half, scatter = each.default - each["λ = ½"], each["its scatter"]
    loss = rows.groupby("method").loss.mean()
    best = loss.drop(ORACLE).nsmallest(2)
    by_seed = rows.groupby(["method", "seed"]).loss.mean()

    def gap(one: str, other: str) -> str:
        text = difference(by_seed[one], by_seed[other])
        return text if text.startswith("-") else f"+{text}"

    return {
        "language": markdown(comparison.overview(leaderboard(rows)).sort_values("loss")),
        "differences": markdown(language.differences(rows), digits=4),
        "regrets": markdown(regrets, digits=4),
        "steps": str(language.LAB.total_steps),
        "half-federated": gap("uniform", "federated part"),
        "half-local": gap("uniform", "local part"),
        "default-half": gap(OURS, "uniform"),
        "default-paper": gap(OURS, "potara-paper"),
        "start": gap("uniform, local from federated", "uniform"),
        "best": " and ".join(f"`{name}` ({value:.3f})" for name, value in best.items()),
        "fedit": f"{loss['FedIT']:.3f}",
        "local": f"{loss['local']:.3f}",
        "default-regret": f"{over_all.default:.4f}",
        "half-regret": f"{over_all['λ = ½']:.4f}",
        "paper-regret": f"{over_all[language.PAPERS]:.4f}",
        "least-difference": f"{above_half.min():+.4f}",
        "most-difference": f"{above_half.max():+.4f}",
        "least-scatter": f"{scatter.min():.2f}",
        "most-scatter": f"{scatter.max():.2f}",
        "most-scattered": scatter.idxmax(),
        "seeds": listed(map(str, sorted(rows.seed.unique()))),
        "seeds-weights": listed(map(str, sorted(estimates.seed.unique()))),
        "versions": ", ".join(f"{name} {version}" for name, version in run["versions"].items()),
        "threads": str(run["machine"]["threads"]),
        "processor": run["machine"]["processor"],
    }


# --- docs/reproduction.md -------------------------------------------------------------------------------------------
def reproduction() -> dict[str, str]:
    claims = [claim() for claim in verdicts.CLAIMS]
    tables = {name: markdown(table) for claim in claims for name, table in claim.tables.items()}
    runs = list(measured("paper").values())
    first = runs[0]
    return {
        "claims": markdown(verdicts.overview(claims)),
        **tables,
        "seeds": ", ".join(f"{part} {verdicts.read(part).seed.nunique()}" for part in verdicts.PARTS),
        "minutes": f"{sum(run['minutes'] for run in runs):.0f}",
        "processes": str(first["processes"]),
        "processor": first["machine"]["processor"],
        "torch": first["versions"]["torch"],
    }


# --- docs/deployment.md ---------------------------------------------------------------------------------------------
def deployment_page() -> dict[str, str]:
    rows = rows_of("privacy")
    mean = rows.groupby("epsilon").mean().sort_index(ascending=False)
    moment = (mean.moment / mean.moment_predicted).dropna()
    first, last = mean.iloc[0], mean.iloc[-1]
    return {
        "seconds": deployment.table(measured("deployment")["ways"]),
        "privacy": markdown(privacy.table(rows)),
        "moment-least": f"{moment.min():.2f}",
        "moment-most": f"{moment.max():.2f}",
        "epsilon": privacy.shown(last.name),
        "weight-first": f"{first.weight:.2f}",
        "weight-last": f"{last.weight:.2f}",
        "predicted-first": f"{first.weight_predicted:.2f}",
        "predicted-last": f"{last.weight_predicted:.2f}",
        "lost-federated": f"{first.federated_accuracy - last.federated_accuracy:.3f}",
        "lost-merged": f"{first.merged_accuracy - last.merged_accuracy:.3f}",
        "above-local": f"{last.merged_accuracy - last.local_accuracy:+.3f}",
    }


# --- docs/index.md, docs/teaching.md --------------------------------------------------------------------------------
def index() -> dict[str, str]:
    return {"course": notebooks.table(measured("notebooks")["notebooks"])}


def teaching() -> dict[str, str]:
    most = max(found["bytes"] for found in measured("notebooks")["notebooks"].values())
    return {"memory": f"{most / 1e9:.1f}"}


# --- docs/peers.md --------------------------------------------------------------------------------------------------
def peers_page() -> dict[str, str]:
    rows, layers = rows_of("peers"), rows_of("layers").set_index("network")
    found = rows[rows.comparisons > 0]
    in_double = found[found.bound == peers.DOUBLE]
    names = rows.peer + " " + rows.version
    table = rows.assign(peer=names.mask(rows.peer.duplicated(), "")).drop(columns="version").set_index("peer")
    for column in ("largest difference", "bound"):
        table[column] = table[column].map(scientific)
    for column in ("untrained", "adapter", "merged", "saved"):
        layers[column] = layers[column].map(scientific)
    return {
        "peers": markdown(table),
        "comparisons": f"{found.comparisons.sum():,}",
        "peers-found": str(found.peer.nunique()),
        "largest": scientific(in_double["largest difference"].max()),
        "layers": markdown(layers.drop(columns="effect")),
        "refusals": markdown(rows_of("refusals").set_index("what")),
    }


# --- docs/machines.md -----------------------------------------------------------------------------------------------
def machines_page() -> dict[str, str]:
    rows = rows_of("matrix")
    return {
        "matrix": markdown(matrix.table(rows)),
        "failures": matrix.failures(rows),
        "machine": listed(sorted(set(rows.machine))) if rows.machine.nunique() > 1 else rows.machine[0],
        "threads": markdown(threads.table(rows_of("threads"))),
    }


def scientific(value: float) -> str:
    return "–" if value != value else "0" if value == 0 else f"{value:.0e}"


# --- docs/performance.md --------------------------------------------------------------------------------------------
def performance_page() -> dict[str, str]:
    engine = measured("engine")
    text = measured("language_engine")["rows"]
    all_blocks, last_two = (row["seconds"]["engine"]["median"] / row["steps"] for row in text)
    choices = workload.ratios_of(32)
    compiled = {row["clients"]: row for row in measured("engine_compile")["rows"]}
    ratio = {clients: row["ratio to engine"]["compiled"]["median"] for clients, row in compiled.items()}
    return {
        "machine": f"{engine['machine']['threads']} cores of a shared {engine['machine']['processor']} machine",
        "loops": markdown(workload.grid(lambda ratio: ratio["sequential"]["median"]), 2),
        "bound": markdown(workload.grid(lambda ratio: 1 / ratio["frozen products"]["median"]), 1),
        "others": markdown(workload.others(), 2),
        "sizes": markdown(workload.sizes(), 2),
        "cached": f"{last_two / all_blocks:.2f}",
        "chunks": f"{choices['engine, chunk_size=8']:.2f}",
        "bf16": f"{choices['engine, autocast=bfloat16']:.2f}",
        "compiled-one": f"{ratio[1]:.2f}",
        "compiled-eight": f"{ratio[8]:.2f}",
        "compiled-many": f"{ratio[32]:.2f}",
        "compiling-least": f"{min(row['start-up'] for row in compiled.values()):.0f}",
    }


# --- docs/jobs.md ---------------------------------------------------------------------------------------------------
def jobs_page() -> dict[str, str]:
    found, tried = jobs.jobs(jobs.PAGE.read_text()), rows_of("jobs").set_index("job")
    others = rows_of("other_tools")
    return {
        "jobs": markdown(jobs.overview(found, tried, others)),
        "stumbled": markdown(tried[["stumbled"]].dropna()),
        "sources": markdown(jobs.sources(others)),
    }


# --- benchmarks/README.md -------------------------------------------------------------------------------------------
def benchmarks_page() -> dict[str, str]:
    default = admitted(rows_of("choose_default")).iloc[0]
    checks = measured("checks")
    start = {name: f"{value:.2f}" for name, value in measured("startup")["seconds"].items()}
    scale = measured("scale")
    most = next(row for row in scale["rows"] if row["clients"] == 1000 and not row["rounds"])
    compiled = measured("engine_compile")["rows"]
    ratios = [row["ratio to engine"]["compiled"]["median"] for row in compiled]
    starts = [row["start-up"] for row in compiled]
    return {
        "engine": workload.table(),
        "compiled-least": f"{min(ratios):.2f}",
        "compiled-most": f"{max(ratios):.2f}",
        "compiling-least": f"{min(starts):.0f}",
        "compiling-most": f"{max(starts):.0f}",
        "pays-one": f"{round(compiled[0]['pays after'], -2):,.0f}",
        **of_text_engine(measured("language_engine")),
        "scale-seconds": f"{most['seconds']:.0f}",
        "scale-gb": f"{most['peak_bytes'] / 1e9:.1f}",
        "scale-ratio": f"{scale['ratios'][EACH_STEP]:.2f}",
        "start-help": start["--help"],
        "start-version": start["--version"],
        "start-bad": start["a bad option"],
        "start-import": start["import potara_lite"],
        "start-python": start["python alone"],
        "start-train": start["from potara_lite import train"],
        "start-collector": start["with the collector"],
        "start-torch": start["import torch"],
        "start-peft": start["import torch, peft"],
        "parts": markdown(pd.DataFrame({"seconds": measured("startup")["parts"]}).rename_axis("part"), 1),
        "start-transformers": start["import torch, transformers"],
        "checks": f"{checks['runs'][0]['checks']:,}",
        "checks-share": percent(checks["share"], 1),
        "default-lr": f"{default.lr:g}",
        "default-rounds": f"{default.rounds:g}",
        "default-steps": f"{default.steps:g}",
        "default-federated": f"{default.accuracy_federated:.3f}",
        "default-local": f"{default.accuracy_local:.3f}",
    }


def of_text_engine(found: dict) -> dict[str, str]:
    """The engine against loops on MiniLM."""
    all_blocks, last_two = found["rows"]
    texts = {}
    for name, row in (("all", all_blocks), ("two", last_two)):
        ratio = row["ratio to engine"]["sequential"]
        texts[f"text-{name}"] = f"{ratio['median']:.2f}"
        texts[f"text-{name}-spread"] = f"{ratio['least']:.2f}–{ratio['most']:.2f}"
    step, loop = (last_two["seconds"][name]["median"] / last_two["steps"] for name in ("engine", "sequential"))
    embed = last_two["seconds of embed"]
    return texts | {
        "text-cached": f"{last_two['ratio to engine']['sequential, from the hidden states']['median']:.2f}",
        "text-embed": f"{embed / step:.1f}",
        "text-total": f"{50 * loop / (50 * step + embed):.2f}",
        "text-engine-gb": f"{all_blocks['peak bytes']['engine'] / 1e9:.1f}",
        "text-loop-gb": f"{all_blocks['peak bytes']['sequential'] / 1e9:.1f}",
    }


# --- smaller pages --------------------------------------------------------------------------------------------------
def readme() -> dict[str, str]:
    return {
        "quick": markdown(quick.table(rows_of("quick"))),
        "methods": str(len(METHODS)),
        "federations": str(len(suite.regret_by_federation(rows_of("suite")))),
    }


def quick_page() -> dict[str, str]:
    return {"quick": readme()["quick"], "differences": markdown(quick.paired(rows_of("quick")), digits=4)}


def paired_page(name: str) -> dict[str, str]:
    """Paired differences of accuracy, a table per federation."""
    found = paired_differences(rows_of(name))
    tables = {federation: found.loc[federation] for federation in found.index.unique("federation")}
    return {
        federation.replace(" ", "-"): markdown(table.sort_values("difference"), digits=4)
        for federation, table in tables.items()
    }


def small_lm_page() -> dict[str, str]:
    rows = rows_of("small_lm")
    table = small_lm.means(rows)
    loss = rows.pivot(index="client", columns="method", values="loss")
    glosses = small_lm.SETTING.clients * small_lm.SETTING.test_size
    right = table.accuracy["uniform"]
    return {
        "table": markdown(table),
        "local": f"{table.accuracy['local']:.3f}",
        "gain": f"{table.loss[['federated', 'local']].min() - table.loss['uniform']:.3f}",
        "clients": str(len(loss)),
        "helped": str((loss["uniform"] < loss[["federated", "local"]].min(axis=1)).sum()),
        "above-half": f"{table.loss[OURS] - table.loss['uniform']:.3f}",
        "glosses": str(glosses),
        "error": f"{(right * (1 - right) / glosses) ** 0.5:.2f}",
    }


def data_page() -> dict[str, str]:
    """What the checkpoint of the lab ViT says about itself."""
    with safe_open(ROOT / "data" / "lab_vit.safetensors", framework="pt") as file:
        found = file.metadata()
    return {
        "parameters": f"{sum(weights.numel() for weights in lab_vit().parameters()) / 1e6:.2f}",
        "epochs": found["epochs"],
        "seed": found["seed"],
        "accuracy": f"{float(found['test_accuracy']):.3f}",
    }


PAGES = {
    "README.md": readme,
    "docs/index.md": index,
    "docs/mixing_weight.md": mixing_weight,
    "docs/reproduction.md": reproduction,
    "docs/comparison.md": comparison_page,
    "docs/language.md": language_page,
    "docs/deployment.md": deployment_page,
    "docs/teaching.md": teaching,
    "docs/peers.md": peers_page,
    "docs/machines.md": machines_page,
    "docs/performance.md": performance_page,
    "docs/jobs.md": jobs_page,
    "benchmarks/README.md": benchmarks_page,
    "benchmarks/quick.md": quick_page,
    "benchmarks/comparison-lab.md": partial(paired_page, "comparison-lab"),
    "benchmarks/comparison-grey-cifar10.md": partial(paired_page, "comparison-grey-cifar10"),
    "benchmarks/small_lm.md": small_lm_page,
    "data/README.md": data_page,
}


def write(folder: Path = ROOT) -> None:
    """Write every page, with its figures, into a folder."""
    for name, figures in PAGES.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(fill((ROOT / name).read_text(), figures()))


if __name__ == "__main__":
    write()
