"""The reliability diagram, drawn."""

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from lightning_clamp.metrics.reliability import ReliabilityCurve

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

_INTERVAL = "accuracy, 95 % interval"


class Palette(NamedTuple):
    """Colours of the pictures, which stay apart for the colour-blind."""

    accuracy: str
    over: str
    under: str
    before: str
    share: str
    ink: str


_ON_LIGHT = Palette("#5b8db8", "#e79aa5", "#7cc7bd", "#6b6b6b", "#a9b4bf", "#1a1a1a")
_ON_DARK = Palette("#4b7ba6", "#a8505f", "#3c9c8f", "#c4c4c4", "#6d7885", "#f2f2f2")


def plot_reliability(
    curve: ReliabilityCurve,
    *,
    before: ReliabilityCurve | None = None,
    ax: "Axes | None" = None,
    title: str | None = None,
) -> "tuple[Figure, Axes]":
    """Draw accuracy over confidence, the gap between them, and where the data are.

    A bar per bin reaches up to its accuracy or its mean confidence, whichever is lower, and the gap to the other is
    coloured: one colour where the network is too sure, another where it is not sure enough. The line is the 95 %
    interval of the accuracy. The strip below shows each bin's share of the data. Colours follow the background of the
    axes, light or dark.

    Args:
        curve: What to draw.
        before: A curve to compare with, drawn as a line of hollow points.
        ax: Where to draw; a new figure by default.
        title: Title of the axes.

    Returns:
        The figure and the axes.
    """
    from matplotlib import pyplot as plt

    if ax is None:
        _, ax = plt.subplots(figsize=(4.4, 5.0), layout="constrained")
    palette = palette_on(ax)
    ax.plot([0, 1], [0, 1], color=palette.ink, alpha=0.6, linestyle="--", linewidth=1, zorder=2.5)
    _draw_bins(ax, curve, palette)
    if before is not None:
        x, y, counts, *_ = _arrays(before)
        seen = counts > 0
        ax.plot(
            x[seen],
            y[seen],
            color=palette.before,
            marker="o",
            markerfacecolor=ax.get_facecolor(),
            markersize=4.5,
            linewidth=1.2,
            label="before",
            zorder=4,
        )
    ax.set(xlim=(0, 1), ylim=(0, 1), ylabel="accuracy")
    if title is not None:
        ax.set_title(title)
    if float(curve.counts.sum()):
        add_legend(ax, palette)
        _write_errors(ax, curve, before, palette)
    else:
        ax.text(0.5, 0.5, "no data", color=palette.ink, ha="center", va="center", transform=ax.transAxes)
    _draw_shares(ax, curve, palette)
    # Of a subfigure, the figure it is part of.
    return ax.figure.figure, ax


def palette_on(ax: "Axes") -> Palette:
    """The colours for the background of the axes."""
    from matplotlib.colors import to_rgb

    return _ON_LIGHT if float(np.dot(to_rgb(ax.get_facecolor()), (0.299, 0.587, 0.114))) > 0.5 else _ON_DARK


def add_legend(ax: "Axes", palette: Palette) -> None:
    """A legend in the corner that most networks leave free, above what others have there."""
    legend = ax.legend(
        loc="upper left",
        framealpha=0.85,
        facecolor=ax.get_facecolor(),
        edgecolor="none",
        fontsize="small",
        handlelength=1.4,
        labelcolor=palette.ink,
    )
    legend.set_zorder(5)


def _draw_bins(ax: "Axes", curve: ReliabilityCurve, palette: Palette) -> None:
    """Accuracy, its interval, and the gap to the confidence; nothing where there are no data."""
    confidence, accuracy, counts, lower, upper = _arrays(curve)
    width = 1 / len(counts)
    left = np.arange(len(counts)) * width
    seen = counts > 0
    shape: dict[str, Any] = {"width": width, "align": "edge", "edgecolor": ax.get_facecolor(), "linewidth": 0.8}
    common = np.fmin(accuracy, confidence)
    ax.bar(left[seen], common[seen], color=palette.accuracy, **shape)
    gap = confidence - accuracy
    for which, colour, name in (
        (seen & (gap > 0), palette.over, "over-confident"),
        (seen & (gap < 0), palette.under, "under-confident"),
    ):
        if which.any():
            ax.bar(left[which], abs(gap[which]), bottom=common[which], color=colour, label=name, **shape)
    middle = (left + width / 2)[seen]
    # The interval need not be symmetric, nor hold the accuracy exactly where it is 0 or 1 up to rounding.
    reach = np.stack([accuracy - lower, upper - accuracy])[:, seen].clip(min=0)
    ax.errorbar(
        middle,
        accuracy[seen],
        reach,
        fmt="none",
        ecolor=palette.ink,
        elinewidth=1.1,
        zorder=3,
        label="accuracy, 95 % interval",
    )


def _write_errors(ax: "Axes", curve: ReliabilityCurve, before: ReliabilityCurve | None, palette: Palette) -> None:
    """The expected calibration error in the corner that accurate networks leave free."""
    text: dict[str, Any] = {"transform": ax.transAxes, "ha": "right", "va": "bottom", "zorder": 5}
    box: dict[str, Any] = {
        "boxstyle": "round,pad=0.25",
        "facecolor": ax.get_facecolor(),
        "edgecolor": "none",
        "alpha": 0.85,
    }
    if before is not None:
        ax.text(0.97, 0.11, f"before {_percent(before)}", color=palette.before, fontsize="small", bbox=box, **text)
    ax.text(0.97, 0.03, f"ECE {_percent(curve)}", color=palette.ink, fontweight="bold", bbox=box, **text)


def _draw_shares(ax: "Axes", curve: ReliabilityCurve, palette: Palette) -> None:
    """A strip below the axes: the accuracy of a bin of three rows means little."""
    from matplotlib.ticker import MaxNLocator

    counts = _arrays(curve)[2]
    width = 1 / len(counts)
    strip = ax.inset_axes((0, -0.21, 1, 0.16), sharex=ax, facecolor=ax.get_facecolor())
    total = counts.sum()
    share = counts / total if total else counts
    strip.bar(
        np.arange(len(counts)) * width,
        share,
        width=width,
        align="edge",
        color=palette.share,
        edgecolor=ax.get_facecolor(),
        linewidth=0.8,
    )
    strip.set(xlabel="confidence", ylabel="share", ylim=(0, share.max() * 1.15 or 1))
    strip.yaxis.set_major_locator(MaxNLocator(nbins=2, min_n_ticks=2))
    strip.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    strip.tick_params(axis="y", labelsize="x-small")
    strip.yaxis.label.set_fontsize("small")
    ax.tick_params(axis="x", labelbottom=False)
    for edges in (ax.spines, strip.spines):
        edges[["top", "right"]].set_visible(False)


def _arrays(curve: ReliabilityCurve) -> "tuple[NDArray[np.float64], ...]":
    """The curve for matplotlib; a single bin arrives as a scalar from a metric's ``compute()``."""
    return tuple(part.reshape(-1).cpu().numpy() for part in curve)


def _percent(curve: ReliabilityCurve) -> str:
    error = float(curve.calibration_error())
    return f"{error:.1%}" if error >= 0.0095 else f"{error:.2%}"
