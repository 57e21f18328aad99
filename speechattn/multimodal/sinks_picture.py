"""A picture of a report on sinks: who gets attention, what is like BOS, and where activations are large."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from textwrap import wrap
from typing import Any

import numpy as np

from speechattn.analysis.picture import GREY, INK, RED
from speechattn.multimodal.layout import KINDS
from speechattn.multimodal.sinks import GROUPS
from speechattn.multimodal.sinks_report import Example, Report

__all__ = ["draw"]

COLOURS = dict(zip(KINDS, ("#ffffff", INK, "#ee6677", "#4477aa", "#228833", "#ccbb44", GREY, "#aa3377"), strict=True))
GROUP_COLOURS = dict(zip(GROUPS, (INK, RED, "#4477aa", "#aa3377"), strict=True))
UNJUDGED = "#eeeeee"
MARKERS = dict(zip((*KINDS, *GROUPS), "osDv^<>pos^p", strict=True))


def draw(report: Report, *, title: str) -> Any:
    """A matplotlib figure with three parts: attention in the first sequence, cos^2 to BOS, largest activations."""
    from matplotlib.figure import Figure

    heat = 1.2 + 0.16 * min(len(report.layers), 40)
    figure = Figure(figsize=(10, heat + 3.9), layout="constrained")
    plots = figure.subplot_mosaic([["attention"] * 2, ["kinds"] * 2, ["alike", "large"]],
                                  height_ratios=[heat, 0.16, 2.7])  # fmt: skip
    attention(figure, plots["attention"], plots["kinds"], report.example)
    lines(plots["alike"], [state.cosine2 for state in report.states], COLOURS, without="BOS")
    if report.sink_places:
        plots["alike"].plot([state.sink_cosine2 or 0.0 for state in report.states], color=GROUP_COLOURS["sinks"],
                            linewidth=1.2, linestyle=(0, (3, 2)), label="intermediate sinks")  # fmt: skip
    plots["alike"].legend(fontsize=7, frameon=False, handlelength=1.8)
    plots["alike"].set(ylim=(-0.03, 1.03), ylabel="cos² to BOS, mean over places")
    plots["alike"].set_title("(b) like BOS, by kind of place", loc="left", fontsize=9)
    lines(plots["large"], [state.ratio for state in report.states], GROUP_COLOURS)
    positive = any(value > 0 for state in report.states for value in state.ratio.values())
    plots["large"].set(yscale="log" if positive else "linear", ylabel="largest activation / median")
    plots["large"].set_title("(c) large activations, mean over sequences", loc="left", fontsize=9)
    for plot in plots.values():
        plot.tick_params(labelsize=7, length=2, color=GREY)
        plot.spines[:].set(color=GREY, linewidth=0.6)
        plot.xaxis.label.set_fontsize(8)
        plot.yaxis.label.set_fontsize(8)
    many = "1 sequence" if report.sequences == 1 else f"{report.sequences} sequences"
    figure.suptitle("\n".join(wrap(f"{title}: {many}", 110)), x=0.01, ha="left", fontsize=10, parse_math=False)
    return figure


def attention(figure: Any, plot: Any, strip: Any, one: Example) -> None:
    """What each place gets in each layer, and the kinds of places below."""
    from matplotlib import colormaps
    from matplotlib.colors import to_rgb
    from matplotlib.patches import Patch

    values = np.array([[np.nan if x is None else x for x in row] for row in one.received], float)
    depth, places = values.shape
    most = float(np.nanmax(values, initial=0.0)) if np.isfinite(values).any() else 0.0
    colours = colormaps["Blues"].with_extremes(bad=UNJUDGED)
    extent = (-0.5, places - 0.5, depth + 0.5, 0.5)
    shade = plot.imshow(values, aspect="auto", cmap=colours, vmin=0, vmax=most or 1.0, interpolation="nearest",
                        extent=extent, rasterized=True)  # fmt: skip
    scale = figure.colorbar(shade, ax=plot, pad=0.01, fraction=0.03)
    scale.set_label("share of attention", fontsize=7)
    scale.ax.tick_params(labelsize=6, length=2, color=GREY)
    scale.outline.set(color=GREY, linewidth=0.6)
    plot.set_yticks(layers(1, depth))
    plot.set_xticks([])
    plot.set_ylabel("layer")
    plot.set_title("(a) attention that a place gets from later ones, mean over them and all heads; one sequence",
                   loc="left", fontsize=9)  # fmt: skip
    strip.imshow(np.array([[to_rgb(COLOURS[kind]) for kind in one.kinds]]), aspect="auto", interpolation="nearest",
                 extent=(-0.5, places - 0.5, 0, 1))  # fmt: skip
    strip.set_yticks([])
    strip.set_xlabel("place in the sequence (BOS is 0)", loc="right")
    names = [*dict.fromkeys(one.kinds)]
    handles = [Patch(color=COLOURS[kind], label=kind) for kind in names]
    if np.isnan(values).any():
        handles.append(Patch(facecolor=UNJUDGED, edgecolor=GREY, linewidth=0.4, label="too few later ones (above)"))
    strip.legend(handles=handles, loc="upper left", bbox_to_anchor=(0, -2.2), ncols=len(handles), fontsize=7,
                 frameon=False, borderpad=0, handlelength=1.0, columnspacing=1.2)  # fmt: skip


def lines(plot: Any, figures: Sequence[Mapping[str, float]], colours: Mapping[str, str], without: str = "") -> None:
    """A line for each name over the layers; gaps where there is no figure."""
    there = [name for name in colours if name != without and any(name in one for one in figures)]
    for name in there:
        values = [one.get(name, np.nan) for one in figures]
        plot.plot(range(len(figures)), values, color=colours[name], marker=MARKERS[name], markersize=3,
                  linewidth=3.4 if name == "BOS" else 1.3, label=name)  # fmt: skip
    plot.set_xticks(layers(0, len(figures) - 1))
    plot.set_xlabel("behind layer (0: embeddings)")
    plot.grid(axis="y", color=UNJUDGED, linewidth=0.6)
    plot.set_axisbelow(True)
    plot.legend(fontsize=7, frameon=False, handlelength=1.8)


def layers(first: int, last: int) -> list[int]:
    """At most a dozen numbers of layers."""
    return [*range(first, last + 1, max(1, -(-(last - first + 1) // 12)))]
