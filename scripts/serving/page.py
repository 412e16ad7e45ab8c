"""A page of tables and pictures about a service, in one file: no network, no script."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from scripts.serving.compare import AGAIN, NOTHING, REROUTING, FloatArray, Watched
from scripts.serving.resize import Resized

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HEAT, WAVE = "cividis", 12
WIDE = (NOTHING, REROUTING)
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2rem auto; padding: 0 1rem; color: #1a1a1a; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; } img { max-width: 100%; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .7rem; text-align: right; border-bottom: 1px solid #ddd; }
th:first-child, td:first-child { text-align: left; }
"""


def page(title: str, note: str, parts: Sequence[str]) -> str:
    return (
        f"<!doctype html><html lang='en'><head><meta charset='utf-8'><title>{html.escape(title)}</title>"
        f"<style>{STYLE}</style></head><body><h1>{html.escape(title)}</h1><p>{html.escape(note)}</p>"
        f"{''.join(parts)}</body></html>\n"
    )


def table(title: str, note: str, heads: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    titles = "".join(f"<th>{html.escape(head)}</th>" for head in heads)
    lines = ("".join(f"<td>{html.escape(_short(cell))}</td>" for cell in row) for row in rows)
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return _headed(title, note) + f"<table><thead><tr>{titles}</tr></thead><tbody>{body}</tbody></table>"


def picture(title: str, note: str, figure: Figure) -> str:
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=110, metadata={"Software": None})
    source = "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()
    return _headed(title, note) + f"<img alt='{html.escape(title)}' src='{source}'>"


def figure_of(width: float, height: float) -> Figure:
    """Without a screen."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("a report needs matplotlib; install evenmoe[plot]") from None
    return Figure(figsize=(width, height), layout="constrained")


def picture_of_loads(runs: Mapping[str, Watched]) -> str:
    """A strip for each way: ranks over time."""
    figure = figure_of(11, 1.1 + 1.3 * len(runs))
    axes = figure.subplots(len(runs), 1, sharex=True, squeeze=False)[:, 0]
    load_WSR = [_relative(run.load_SR) for run in runs.values()]
    least, top = (float(edge([edge(load_SR) for load_SR in load_WSR])) for edge in (np.min, np.max))
    for axis, (name, run), load_SR in zip(axes, runs.items(), load_WSR, strict=True):
        steps = len(run.line_S)
        extent = (0, steps, load_SR.shape[1] - 0.5, -0.5)
        image = axis.imshow(load_SR.T, aspect="auto", cmap=HEAT, vmin=least, vmax=top, extent=extent)
        moved = [line["step"] for line in run.line_S if line["moves"]]
        axis.scatter(moved, [-0.8] * len(moved), marker="v", color="#c43c00", s=22)
        axis.set(yticks=range(load_SR.shape[1]), ylabel="rank", xlim=(0, steps), ylim=(load_SR.shape[1] - 0.5, -1.2))
        axis.set_title(f"{name}: {run.moves} moves" if run.moves else name, loc="left", fontsize=10)
    axes[-1].set(xlabel="step")
    figure.colorbar(image, ax=axes, label="load / mean")
    note = f"Rows each rank computed over the mean of ranks, {WAVE} steps together. Marks: experts moved."
    return picture("Load of each rank over time", note, figure)


def picture_of_time(runs: Mapping[str, Watched]) -> str:
    """The peak of ranks step by step, and how long requests took."""
    figure = figure_of(11, 4.2)
    left, right = figure.subplots(1, 2)
    base = np.median(runs[NOTHING].latency_N(0))
    for color, (name, run) in enumerate(runs.items()):
        # Ways may agree to the last row: the wide line shows beside the narrow one above it.
        style: dict[str, Any] = {"label": name, "color": f"C{color}", "linewidth": 4.0 if name in WIDE else 1.2}
        if name == AGAIN:
            style |= {"linestyle": ":"}
        else:
            peak_S = np.array([line["peak"] for line in run.line_S])
            left.plot(_smooth(peak_S), **style)
        latency_N = np.sort(run.latency_N(0)) / base
        slower = len(latency_N) // 2
        percent_N = np.linspace(0, 100, len(latency_N))
        right.plot(latency_N[slower:], percent_N[slower:], **style | {"linewidth": 1.2})
    left.axhline(1, color="black", linewidth=0.6)
    left.set(xlabel="step", ylabel="busiest rank / mean")
    right.set(xlabel="latency / median latency of nothing", ylabel="percent of requests")
    right.legend(frameon=False, fontsize=8, loc="lower right")
    note = (
        f"Left: peak over mean of ranks, mean over layers and {WAVE} steps; other ways may agree with the two wide "
        f"lines. Right: from a request's arrival to its last byte, by the processor time of the busiest rank of each "
        f"step, moves included; the slower half."
    )
    return picture("Peaks and latencies", note, figure)


def picture_of_members(resized: Resized) -> str:
    """Over time: who serves and how much it computes, and how long its steps take."""
    start = min(step.began for step in resized.steps)
    members = sorted({step.member for step in resized.steps})
    figure = figure_of(11, 5.0)
    upper, lower = figure.subplots(2, 1, sharex=True)
    when_S = [step.began - start for step in resized.steps]
    place_S = [members.index(step.member) for step in resized.steps]
    rows_S = [step.rows for step in resized.steps]
    image = upper.scatter(when_S, place_S, c=rows_S, cmap=HEAT, marker="|", s=260, linewidths=1.5, vmin=0)
    upper.set(yticks=range(len(members)), yticklabels=[str(m) for m in members], ylabel="member", ylim=(-0.6, None))
    upper.margins(y=0.2)
    figure.colorbar(image, ax=upper, label="rows in a step")
    for epoch in sorted({step.epoch for step in resized.steps}):
        first = min(step.began - start for step in resized.steps if step.epoch == epoch)
        upper.text(first, len(members) - 0.45, f"epoch {epoch}", fontsize=8)
    ratio_S = [step.seconds / resized.median for step in resized.steps]
    lower.scatter(when_S, ratio_S, s=5, color="#1f6fb4")
    lower.set(yscale="log", ylabel="step / median step", xlabel="seconds")
    for axis in (upper, lower):
        for event in resized.events:
            axis.axvspan(event.began - start, event.ended - start, color="#c43c00", alpha=0.12)
    for event in resized.events:
        lower.text(event.began - start, max(ratio_S), event.name, fontsize=8, va="bottom")
    note = "Each mark is a step of a member. Shaded: from when a change was asked for until the service was at rest."
    return picture("Members, loads and steps while ranks come and go", note, figure)


def _relative(load_SR: FloatArray) -> FloatArray:
    """Of each wave of steps, over its mean."""
    waves = [part.sum(axis=0) for part in np.array_split(load_SR, max(len(load_SR) // WAVE, 1))]
    load_WR = np.stack(waves)
    relative_WR: FloatArray = load_WR / np.maximum(load_WR.mean(axis=1, keepdims=True), 1e-9)
    return relative_WR


def _smooth(value_S: FloatArray) -> FloatArray:
    width = min(WAVE, len(value_S))
    return np.convolve(value_S, np.ones(width) / width, mode="valid")


def _headed(title: str, note: str) -> str:
    return f"<h2>{html.escape(title)}</h2><p>{html.escape(note)}</p>"


def _short(cell: object) -> str:
    return f"{cell:.2f}" if isinstance(cell, float) else str(cell)
