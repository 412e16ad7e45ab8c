"""A plan on one page: what it does to the load, rank by rank, and to the hops. Everything is in the file."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from placement.arrays import FloatArray
from placement.greedy import RoundRobin
from placement.metrics import peak_over_mean, rank_load_WLR, shares_LRE
from placement.plan import Plan
from placement.topology import Topology
from placement.trace import LoadTrace

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Colour maps that read the same to the colour-blind and in print.
HEAT, BARS = "cividis", ("#8c8c8c", "#1f6fb4")
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2rem auto; padding: 0 1rem; color: #1a1a1a; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; } img { max-width: 100%; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .8rem; text-align: right; border-bottom: 1px solid #ddd; }
th:first-child, td:first-child { text-align: left; }
"""


def report(plan: Plan, trace: LoadTrace, topology: Topology, scores: Mapping[str, Any]) -> str:
    """HTML. Before is the same experts dealt round; after is the plan, both on this trace."""
    try:
        import matplotlib as mpl
    except ImportError:
        raise ValueError("a report needs matplotlib; install evenmoe[plot]") from None
    mpl.use("Agg")
    dealt = RoundRobin()(trace, topology)
    before_LR, after_LR = (_relative(each, trace, topology) for each in (dealt, plan))
    peaks = [peak_over_mean(rank_load_WLR(each, trace.load_LE[None])[0], topology.speed_R) for each in (dealt, plan)]
    pictures = [
        (
            "Load of each rank in each layer",
            "1 is the mean. Left: experts dealt round. Right: this plan.",
            _heat(before_LR, after_LR, plan),
        ),
        ("Ranks", "Mean over layers; the line reaches up to the rank's busiest layer.", _bars(before_LR, after_LR)),
    ]
    if trace.follow_LEE is not None and len(trace.follow_LEE):
        note = (
            "Share of the hops from layer to layer, by the rank they leave and the rank they reach; the diagonal stays."
        )
        pictures.append(("Hops", note, _hops(plan, trace.follow_LEE)))
    body = "".join(
        f"<h2>{html.escape(title)}</h2><p>{html.escape(note)}</p><img alt='{html.escape(title)}' src='{source}'>"
        for title, note, source in pictures
    )
    headline = (
        f"The busiest rank carries {peaks[1].mean():.3f} times the mean, averaged over {trace.layers} layers "
        f"({peaks[1].max():.3f} in the worst); dealt round it would carry {peaks[0].mean():.3f} ({peaks[0].max():.3f})."
    )
    name = html.escape(str(plan.provenance.get("planner", "unknown planner")))
    return (
        f"<!doctype html><html lang='en'><head><meta charset='utf-8'><title>Placement: {name}</title>"
        f"<style>{STYLE}</style></head><body><h1>Placement: {name}</h1><p>{html.escape(headline)}</p>"
        f"{_scores(scores)}{body}<h2>Certificates</h2>{_certificates(plan)}<h2>Provenance</h2>{_provenance(plan)}"
        "</body></html>\n"
    )


def _relative(plan: Plan, trace: LoadTrace, topology: Topology) -> FloatArray:
    """Time of each rank over the mean time, all windows together [layers, ranks]."""
    load_LR = rank_load_WLR(plan, trace.load_LE[None])[0]
    mean_L = load_LR.sum(axis=1, keepdims=True) / sum(topology.speed_R)
    relative_LR: FloatArray = load_LR / np.array(topology.speed_R) / mean_L
    return relative_LR


def _heat(before_LR: FloatArray, after_LR: FloatArray, plan: Plan) -> str:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 1.5 + 0.09 * max(len(after_LR), 20)), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    top = max(float(before_LR.max()), float(after_LR.max()))
    extent = (-0.5, after_LR.shape[1] - 0.5, len(after_LR) - 0.5, -0.5)
    for axis, load_LR, title in zip(axes, (before_LR, after_LR), ("dealt round", "this plan"), strict=True):
        image = axis.imshow(load_LR, aspect="auto", cmap=HEAT, vmin=0, vmax=top, interpolation="nearest", extent=extent)
        axis.set(title=f"{title}: peak {load_LR.max():.2f}", xlabel="rank")
    every = max(len(after_LR) // 12, 1)
    axes[0].set(ylabel="layer", yticks=range(0, len(after_LR), every), yticklabels=plan.layer_L[::every])
    figure.colorbar(image, ax=axes, label="load / mean")
    return _source(figure)


def _bars(before_LR: FloatArray, after_LR: FloatArray) -> str:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.2), layout="constrained")
    axis = figure.subplots()
    rank_R = np.arange(after_LR.shape[1])
    drawn = ((-0.2, before_LR, BARS[0], "dealt round"), (0.2, after_LR, BARS[1], "this plan"))
    for shift, load_LR, colour, name in drawn:
        mean_R = load_LR.mean(axis=0)
        reach = np.stack([np.zeros_like(mean_R), load_LR.max(axis=0) - mean_R])
        axis.bar(rank_R + shift, mean_R, 0.4, yerr=reach, color=colour, label=name, error_kw={"elinewidth": 0.8})
    axis.axhline(1, color="black", linewidth=0.6)
    axis.margins(y=0.15)
    axis.set(xlabel="rank", ylabel="load / mean", xticks=rank_R[:: max(len(rank_R) // 32, 1)])
    axis.legend(frameon=False, ncols=2, loc="upper right")
    return _source(figure)


def _hops(plan: Plan, pair_LEE: FloatArray) -> str:
    from matplotlib.figure import Figure

    share_LRE = shares_LRE(plan)
    mass_RR = sum(here @ pair @ after.T for here, pair, after in zip(share_LRE, pair_LEE, share_LRE[1:], strict=False))
    share_RR = np.asarray(mass_RR) / max(float(np.sum(mass_RR)), np.finfo(float).tiny)
    figure = Figure(figsize=(5.5, 4.6), layout="constrained")
    axis = figure.subplots()
    image = axis.imshow(100 * share_RR, cmap=HEAT, vmin=0, interpolation="nearest")
    axis.set(title=f"{100 * np.trace(share_RR):.1f} % stay", xlabel="to rank", ylabel="from rank")
    figure.colorbar(image, ax=axis, label="% of hops")
    return _source(figure)


def _source(figure: Figure) -> str:
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=110, metadata={"Software": None})
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()


def _scores(scores: Mapping[str, Any]) -> str:
    rows = [(name.replace("_", " "), "not known" if value is None else _short(value)) for name, value in scores.items()]
    return _table(("measure", "value"), rows)


def _certificates(plan: Plan) -> str:
    rows = [
        (layer, _short(c.peak_over_mean), _short(c.bound), c.status, c.method)
        for layer, c in zip(plan.layer_L, plan.certificate_L, strict=False)
    ]
    head = ("layer", "peak/mean when planned", "no plan is below", "status", "proof")
    return _table(head, rows) if rows else "<p>This plan has none.</p>"


def _provenance(plan: Plan) -> str:
    return _table(("fact", "value"), [*sorted(plan.provenance.items()), ("fingerprint", plan.fingerprint)])


def _short(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def _table(head: tuple[str, ...], rows: list[Any]) -> str:
    cells = "".join("<tr>" + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows)
    titles = "".join(f"<th>{html.escape(title)}</th>" for title in head)
    return f"<table><thead><tr>{titles}</tr></thead><tbody>{cells}</tbody></table>"
