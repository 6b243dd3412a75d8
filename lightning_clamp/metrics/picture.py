"""The reliability diagram, drawn."""

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

    from lightning_clamp.metrics.calibration_error import ReliabilityCurve

_BAR, _GAP, _OTHER = "#3b6fb6", "#d1495b", "#8a8a8a"


def plot_reliability(
    curve: "ReliabilityCurve",
    *,
    before: "ReliabilityCurve | None" = None,
    ax: "Axes | None" = None,
    title: str | None = None,
) -> "tuple[Figure, Axes]":
    """Draw accuracy over confidence: bars, their gap to the mean confidence, and the share of rows in each bin.

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
        _, ax = plt.subplots(figsize=(4.2, 4.2), layout="constrained")
    confidence, accuracy, counts = _arrays(curve)
    n_bins = len(counts)
    left, width = np.arange(n_bins) / n_bins, 1 / n_bins
    filled = counts > 0
    share = counts / counts.sum()
    ax.bar(
        left[filled],
        accuracy[filled],
        color=_BAR,
        edgecolor="white",
        linewidth=0.6,
        width=width,
        align="edge",
        label=f"accuracy, ECE {_percent(curve)}",
    )
    ax.bar(
        left[filled],
        (confidence - accuracy)[filled],
        bottom=accuracy[filled],
        facecolor="none",
        edgecolor=_GAP,
        hatch="////",
        linewidth=0.8,
        width=width,
        align="edge",
        label="gap to confidence",
    )
    ax.plot([0, 1], [0, 1], color="0.35", linestyle="--", linewidth=1)
    # Where the data are: the accuracy of a bin of three rows means little.
    ax.bar(left, -0.12 * share / share.max(), color="0.6", width=width, align="edge")
    ax.axhline(0, color="0.35", linewidth=0.8)
    if before is not None:
        others, their_accuracy, their_counts = _arrays(before)
        ax.plot(
            others[their_counts > 0],
            their_accuracy[their_counts > 0],
            color=_OTHER,
            marker="o",
            markerfacecolor="none",
            markersize=4,
            linewidth=1,
            label=f"before, ECE {_percent(before)}",
        )
    ax.set(xlim=(0, 1), ylim=(-0.14, 1), xlabel="confidence", ylabel="accuracy", title=title or "")
    ax.set_yticks([0, 0.2, 0.4, 0.6, 0.8, 1])
    ax.legend(loc="upper left", frameon=False, fontsize="small")
    figure = ax.get_figure(root=True)
    assert figure is not None
    return figure, ax


def _arrays(curve: "ReliabilityCurve") -> "tuple[NDArray[np.float64], ...]":
    """The curve for matplotlib; a single bin arrives as a scalar from a metric's ``compute()``."""
    return tuple(part.reshape(-1).cpu().numpy() for part in curve)


def _percent(curve: "ReliabilityCurve") -> str:
    return f"{100 * float(curve.expected_calibration_error):.1f} %"
