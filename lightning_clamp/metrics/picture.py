"""The reliability diagram, drawn inside the axes it is given: nothing of it lies beside them."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from lightning_clamp.metrics._named import named_curves
from lightning_clamp.metrics._palette import Palette, palette_of
from lightning_clamp.metrics.reliability import PositiveClassCurve, ReliabilityCurve

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

Curves: TypeAlias = ReliabilityCurve | list[ReliabilityCurve] | Mapping[str, ReliabilityCurve]

# Names of the axes, and of a gap where the confidence is above the accuracy and where it is below.
_TOP = ("confidence", "accuracy", "over-confident", "under-confident")
_POSITIVE = ("probability of class 1", "frequency of class 1", "probability too high", "probability too low")
# The shares of the data are drawn below 0, between these two heights; the axes end at the third.
_BASE, _TOP_OF_SHARES, _FLOOR = -0.2, -0.06, -0.22
_TICKS = [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
_MARKERS = "osD^vP"


def plot_reliability(curves: Curves, *, ax: "Axes | None" = None, title: str | None = None) -> "tuple[Figure, Axes]":
    """Draw accuracy over confidence, the gap between them, and where the data are.

    One curve is drawn in bars. A bar reaches up to the accuracy of its bin, the line is the 95 % interval of the
    accuracy, and the narrow bar is the gap from the accuracy to the mean confidence: one colour where the network is
    too sure, another where it is not sure enough. Several curves are drawn as lines, each with its name.

    The strip below zero shows each bin's share of the data; the number beside it is the largest share. Colours follow
    the background of the axes, light or dark.

    Args:
        curves: A curve; several by name, such as ``{"before": ..., "after": ...}``; or a list of one per step.
        ax: Where to draw; a new figure by default.
        title: Title of the axes.

    Returns:
        The figure and the axes.

    Raises:
        TypeError: If something else than curves is given.
        ValueError: If there is no curve, or curves of the top label stand beside curves of class 1.
    """
    from matplotlib import pyplot as plt

    named = named_curves(curves, ReliabilityCurve, "plot_reliability")
    words = _words(named)
    if ax is None:
        _, ax = plt.subplots(figsize=(4.4, 5.0), layout="constrained")
    palette = palette_of(ax)
    ax.plot([0, 1], [0, 1], color=palette.ink, alpha=0.6, linestyle="--", linewidth=1, zorder=2.5)
    if isinstance(curves, ReliabilityCurve):
        _draw_bars(ax, curves, palette, words)
    else:
        _draw_lines(ax, named, palette, words)
    _frame(ax, _largest_share(named), words)
    if title is not None:
        ax.set_title(title)
    if any(float(curve.counts.sum()) for curve in named.values()):
        _draw_legend(ax, palette, _error(curves) if isinstance(curves, ReliabilityCurve) else None)
    else:
        ax.text(0.5, 0.5, "no data", color=palette.ink, ha="center", va="center")
    # Of a subfigure, the figure it is part of.
    return ax.figure.figure, ax


def _words(named: Mapping[str, ReliabilityCurve]) -> tuple[str, str, str, str]:
    positive = [name for name, curve in named.items() if isinstance(curve, PositiveClassCurve)]
    if 0 < len(positive) < len(named):
        raise ValueError(
            f'One picture cannot hold curves of confidence="top" and of "positive" (here {positive}): draw two.'
        )
    return _POSITIVE if positive else _TOP


def _draw_bars(ax: "Axes", curve: ReliabilityCurve, palette: Palette, words: Sequence[str]) -> None:
    """Accuracy, its interval, and the gap to the confidence; nothing where there are no data."""
    confidence, accuracy, counts, lower, upper = _arrays(curve)
    width, middle = 1 / len(counts), _middles(curve)
    seen = counts > 0
    edge: dict[str, Any] = {"edgecolor": ax.get_facecolor(), "linewidth": 0.8}
    ax.bar(middle[seen], accuracy[seen], width, color=palette.accuracy, label=words[1], **edge)
    gap = confidence - accuracy
    for which, colour, name in ((gap > 0, palette.over, words[2]), (gap < 0, palette.under, words[3])):
        if which.any():
            ax.bar(middle[which], gap[which], 0.5 * width, bottom=accuracy[which], color=colour, label=name, **edge)
    # The interval need not be symmetric, nor hold the accuracy exactly where it is 0 or 1 up to rounding.
    reach = np.stack([accuracy - lower, upper - accuracy])[:, seen].clip(min=0)
    ax.errorbar(
        middle[seen], accuracy[seen], reach, fmt="none", ecolor=palette.ink, zorder=3,
        elinewidth=min(1.1, 30 * width), label="95 % interval",
    )  # fmt: skip
    ax.bar(middle, _strip(curve, _largest_share({"": curve})), width, bottom=_BASE, color=palette.share, **edge)


def _draw_lines(ax: "Axes", named: Mapping[str, ReliabilityCurve], palette: Palette, words: Sequence[str]) -> None:
    """A line for every curve, with the intervals; its shares in outline."""
    largest, colours = _largest_share(named), palette.of_lines(len(named))
    for index, ((name, curve), colour) in enumerate(zip(named.items(), colours, strict=True)):
        parts = _arrays(curve)
        confidence, accuracy, _, lower, upper = (part[parts[2] > 0] for part in parts)
        # Of many, the first and the last are named.
        is_named = len(named) <= len(palette.lines) or index in (0, len(named) - 1)
        reach = np.stack([accuracy - lower, upper - accuracy]).clip(min=0)
        style: dict[str, Any] = {"color": colour, "zorder": 3 + index / len(named)}
        ax.errorbar(
            confidence, accuracy, reach, marker=_MARKERS[index % len(_MARKERS)], markersize=4, linewidth=1.4,
            elinewidth=0.8, label=f"{name}: {_error(curve)}" if is_named else None, **style,
        )  # fmt: skip
        edges = np.linspace(0, 1, len(parts[2]) + 1)
        ax.stairs(_BASE + _strip(curve, largest), edges, baseline=_BASE, linewidth=1.2, **style)
    faint: dict[str, Any] = {
        "color": palette.ink, "alpha": 0.6, "fontsize": "small", "zorder": 1,
        # Across in parts of the axes, since one may zoom in; up in accuracy.
        "transform": ax.get_yaxis_transform(),
    }  # fmt: skip
    ax.text(0.98, 0.02, words[2], ha="right", va="bottom", **faint)
    ax.text(0.02, 0.98, words[3], ha="left", va="top", **faint)


def _frame(ax: "Axes", largest: float, words: Sequence[str]) -> None:
    """Limits, ticks and names; the tick below zero is the largest share."""
    ax.axhline(0, color=ax.spines["left"].get_edgecolor(), linewidth=ax.spines["left"].get_linewidth(), zorder=2.6)
    ax.set(xlim=(0, 1), ylim=(_FLOOR, 1), xlabel=words[0], ylabel=words[1])
    ax.set_yticks([_BASE, _TOP_OF_SHARES, *_TICKS], ["share", f"{largest:.0%}", *(f"{tick:.1f}" for tick in _TICKS)])
    for label in ax.get_yticklabels()[:2]:
        label.set_fontsize("x-small")
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines["left"].set_bounds(_FLOOR, 1)


def _draw_legend(ax: "Axes", palette: Palette, title: str | None) -> None:
    """Put the legend above 1, in two columns where they fit, and make room for it there."""
    size = float(np.clip(ax.bbox.width / ax.figure.dpi * 72 / 24, 5, 8.5))
    for columns in (2, 1):
        legend = ax.legend(
            loc="upper left", ncols=columns, title=title, title_fontproperties={"weight": "bold", "size": size + 1},
            fontsize=size, frameon=False, handlelength=1.4, borderaxespad=0.2, columnspacing=1,
            handletextpad=0.5, labelcolor=palette.ink, alignment="left",
        )  # fmt: skip
        if legend.get_window_extent().width <= ax.bbox.width:
            break
    legend.get_title().set_color(palette.ink)
    # A layout may make the axes somewhat smaller yet; more than half of them the legend does not get.
    part = min(1.2 * legend.get_window_extent().height / ax.bbox.height, 0.5)
    ax.set_ylim(top=1 + (1 - _FLOOR) * part / (1 - part))


def _arrays(curve: ReliabilityCurve) -> "tuple[NDArray[np.float64], ...]":
    """The curve for matplotlib; a single bin arrives as a scalar from a metric's ``compute()``."""
    return tuple(part.reshape(-1).cpu().numpy() for part in curve)


def _middles(curve: ReliabilityCurve) -> "NDArray[np.float64]":
    n_bins = curve.counts.numel()
    return (np.arange(n_bins) + 0.5) / n_bins


def _shares(curve: ReliabilityCurve) -> "NDArray[np.float64]":
    counts = _arrays(curve)[2]
    shares: NDArray[np.float64] = counts / max(counts.sum(), 1)
    return shares


def _largest_share(named: Mapping[str, ReliabilityCurve]) -> float:
    return max(float(_shares(curve).max()) for curve in named.values())


def _strip(curve: ReliabilityCurve, largest: float) -> "NDArray[np.float64]":
    """Heights of the shares, of which the largest reaches to the top of the strip."""
    return _shares(curve) * (_TOP_OF_SHARES - _BASE) / (largest or 1)


def _error(curve: ReliabilityCurve) -> str:
    error = float(curve.calibration_error())
    if math.isnan(error):
        return "no data"
    return f"ECE {error:.1%}" if error >= 0.0095 else f"ECE {error:.2%}"
