"""One picture of an utterance: its spectrogram, its words, where attention looked, and when each word was committed."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil
from pathlib import Path
from textwrap import wrap
from typing import Any
from warnings import catch_warnings, filterwarnings

import numpy as np

from speechattn.analysis.view import Map, Spoken, View
from speechattn.errors import InputError

__all__ = ["FORMATS", "draw", "need_matplotlib", "save"]

FORMATS = (".png", ".svg", ".pdf")
DECIBELS = 70.0  # the picture's range below the loudest
OTHERS = {"Arial Unicode MS", "Hiragino Sans", "Microsoft YaHei", "Noto Sans CJK JP", "Noto Sans Arabic",
          "Noto Sans Devanagari", "PingFang SC", "WenQuanYi Zen Hei"}  # fmt: skip
RED, INK, GREY = "#cc3311", "#222222", "#8a8a8a"


def need_matplotlib() -> None:
    """InputError where it is missing: before the work, not after it."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise InputError("a picture needs matplotlib: pip install 'speechattn[plot]'") from error


def draw(seen: View) -> Any:
    """The picture as a matplotlib figure: words, spectrogram, maps; one axis of time."""
    import matplotlib

    with matplotlib.rc_context({"font.family": families()}):
        return drawn(seen)


def families() -> list[str]:
    """Fonts of this machine: the usual one, and those that have the letters of other languages."""
    from matplotlib.font_manager import get_font_names

    return ["DejaVu Sans", *sorted({*get_font_names()} & OTHERS)]


def drawn(seen: View) -> Any:
    """As `draw`, in the fonts that are set."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    width = float(np.clip(1.8 + 1.15 * seen.duration_s, 6.4, 20.0))
    last = max([seen.duration_s, *(word.committed for word in seen.words)])
    lines = placed(seen.words, 0.064 * last / (width - 1.8))
    heights = [0.06 + 0.19 * (max(lines) + 1), 1.1, *(panel_height(one) for one in seen.maps)]
    layout = ConstrainedLayoutEngine(h_pad=0.015, hspace=0.01)
    figure = Figure(figsize=(width, sum(heights) + 0.8), layout=layout)
    plots = figure.subplots(len(heights), 1, sharex=True, height_ratios=heights)
    word_strip(plots[0], seen.words, lines)
    sound(figure, plots[1], seen)
    for plot, one in zip(plots[2:], seen.maps, strict=True):
        panel(figure, plot, one, seen)
    for plot in plots[1:]:
        plot.tick_params(labelsize=7, length=2, color=GREY)
        plot.spines[:].set(color=GREY, linewidth=0.6)
    title = "\n".join(wrap(seen.title, round(16 * (width - 1.8))))
    plots[0].set_title(title, loc="left", fontsize=9, color=INK, parse_math=False)
    plots[-1].set_xlabel("seconds", fontsize=8)
    plots[-1].set_xlim(0, last + 0.006 * last)
    explained(figure, outlines=any(one.words for one in seen.maps))
    return figure


def panel_height(one: Map) -> float:
    """In inches: room for the labels, as far as it goes."""
    return float(np.clip(0.4 + 0.13 * len(one.labels), 1.5, 9.0)) if one.labels else 3.2


def bar(figure: Any, shade: Any, plot: Any, name: str) -> None:
    """What the colours mean."""
    scale = figure.colorbar(shade, ax=plot, pad=0.01, fraction=0.03, aspect=14)
    scale.set_label(name, fontsize=7)
    scale.ax.tick_params(labelsize=6, length=2, color=GREY)
    scale.outline.set(color=GREY, linewidth=0.6)


def placed(words: Sequence[Spoken], letter_s: float) -> list[int]:
    """The line of each word, from 0: one that would cover another stands higher. `letter_s`: how wide a letter is."""
    until, lines = [-1.0] * 4, []
    for word in words:
        middle, half = (word.start + word.end) / 2, letter_s * (len(word.text.strip()) + 1) / 2
        free = [i for i, end in enumerate(until) if end <= middle - half]
        lines.append(free[0] if free else int(np.argmin(until)))
        until[lines[-1]] = middle + half
    return lines


def word_strip(plot: Any, words: Sequence[Spoken], lines: Sequence[int]) -> None:
    """Words at their times."""
    plot.set_ylim(0, 0.3 + max(lines) + 1)
    plot.axis("off")
    for word, line in zip(words, lines, strict=True):
        middle, gap = (word.start + word.end) / 2, min(0.012, 0.1 * (word.end - word.start))
        plot.text(middle, 0.4 + line, word.text.strip(), ha="center", va="bottom", fontsize=8, color=INK,
                  parse_math=False, gid="word")  # fmt: skip
        plot.plot([word.start + gap, word.end - gap], [0.15, 0.15], color=INK, linewidth=1.6, solid_capstyle="butt",
                  gid="said")  # fmt: skip


def sound(figure: Any, plot: Any, seen: View) -> None:
    """The spectrogram, in kHz."""
    bands = seen.spectrum.shape[1]
    shade = plot.imshow(
        seen.spectrum.T, origin="lower", aspect="auto", cmap="gray_r", vmin=-DECIBELS, vmax=0,
        extent=(0, len(seen.spectrum) / 100, 0, bands), interpolation="nearest", rasterized=True,
    )  # fmt: skip
    bar(figure, shade, plot, "dB")
    marks = [hz for hz in (500, 1000, 2000, 4000, 8000) if hz <= seen.highest_hz]
    places = [(bands + 1) * mel(hz) / mel(seen.highest_hz) - 0.5 for hz in marks]
    plot.set_yticks(np.clip(places, 0, bands), [f"{hz / 1000:g}" for hz in marks])
    plot.set_ylabel("kHz", fontsize=8)


def mel(hz: float) -> float:
    """Slaney's scale: linear up to 1 kHz, then logarithmic."""
    return hz * 3 / 200 if hz < 1000 else 15 + 27 * float(np.log(hz / 1000) / np.log(6.4))


def panel(figure: Any, plot: Any, one: Map, seen: View) -> None:
    """A map with its colours; words outlined where they are said, and marked where they were committed."""
    rows, frames = one.values.shape
    bottom = rows if one.labels else rows * one.frame_s
    top = float(np.quantile(one.values, 0.995)) or float(one.values.max()) or 1.0
    shade = plot.imshow(
        one.values, aspect="auto", cmap="Blues", vmin=0, vmax=top, interpolation="nearest", rasterized=True,
        extent=(0, frames * one.frame_s, bottom, 0),
    )  # fmt: skip
    bar(figure, shade, plot, one.name)
    for at in sorted({word.committed for word in seen.words}):
        plot.axvline(at, color=RED, linewidth=0.6, linestyle=(0, (1, 2)), gid="look")
    if not one.labels:
        plot.set_ylabel("frame at the top, s", fontsize=8)
        return
    every = ceil(rows / 110)
    plot.set_yticks(np.arange(0, rows, every) + 0.5, one.labels[::every], parse_math=False)
    plot.set_ylabel("tokens", fontsize=8)
    if one.words:
        outlined(plot, one, seen)


def outlined(plot: Any, one: Map, seen: View) -> None:
    """Where each word is said, by its rows, and a mark where it was committed."""
    from matplotlib.patches import Rectangle

    for word, (first, last) in zip(seen.words, one.words, strict=True):
        plot.add_patch(Rectangle((word.start, first), word.end - word.start, last - first, fill=False, gid="said",
                                 edgecolor=INK, linewidth=0.6))  # fmt: skip
        plot.plot([word.committed] * 2, [first + 0.1, last - 0.1], color=RED, linewidth=2.2, solid_capstyle="butt",
                  gid="committed", clip_on=False)  # fmt: skip


def explained(figure: Any, *, outlines: bool) -> None:
    """What boxes, marks and lines are."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Any] = [Line2D([], [], color=RED, linewidth=0.9, linestyle=(0, (1, 2)), label="words are committed")]
    if outlines:
        handles = [
            Patch(fill=False, edgecolor=INK, linewidth=0.6, label="when a word is said"),
            Line2D([], [], color=RED, linewidth=2.2, label="when it was committed"),
        ]
    figure.legend(handles=handles, loc="outside lower right", ncols=2, fontsize=7, frameon=False, borderpad=0,
                  handlelength=1.2)  # fmt: skip


def save(figure: Any, path: Path) -> None:
    """Write the picture as its ending says; the same bytes for the same numbers. InputError where that cannot be."""
    import matplotlib

    if path.suffix.lower() not in FORMATS:
        raise InputError(f"{path}: a picture ends in {', '.join(FORMATS)}")
    metadata = {".png": {"Software": None}, ".svg": {"Date": None}, ".pdf": {"CreationDate": None}}
    style: dict[Any, Any] = {"svg.hashsalt": "speechattn", "svg.fonttype": "none", "pdf.fonttype": 42}
    try:
        with catch_warnings(), matplotlib.rc_context(style):
            filterwarnings("ignore", message="Glyph")  # that no font has: it is drawn as a box
            figure.savefig(path, dpi=200, metadata=metadata[path.suffix.lower()])
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from error
