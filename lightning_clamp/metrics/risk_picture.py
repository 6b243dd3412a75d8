"""The risk-coverage curve, drawn."""

from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from lightning_clamp.metrics.picture import Palette, add_legend, palette_on
from lightning_clamp.metrics.risk_coverage import RiskCoverageCurve

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

# Coverages that are drawn. The few most confident rows, whose error rate is mostly chance, are left of the first.
_COVERAGE = np.linspace(0, 1, 501)[1:]


def plot_risk_coverage(
    curve: RiskCoverageCurve,
    *,
    before: RiskCoverageCurve | None = None,
    ax: "Axes | None" = None,
    title: str | None = None,
) -> "tuple[Figure, Axes]":
    """Draw the error rate of what is answered over the share that is answered.

    The dashed line is the best order of the same answers: all that are right first. The legend has the areas under the
    lines. Colours follow the background of the axes, light or dark.

    Args:
        curve: What to draw.
        before: A curve to compare with.
        ax: Where to draw; a new figure by default.
        title: Title of the axes.

    Returns:
        The figure and the axes.
    """
    from matplotlib import pyplot as plt

    if ax is None:
        _, ax = plt.subplots(figsize=(4.8, 4.0), layout="constrained")
    palette = palette_on(ax)
    if bool(curve.area().isnan()):
        ax.text(0.5, 0.5, "no data", color=palette.ink, ha="center", va="center", transform=ax.transAxes)
    else:
        _draw_lines(ax, curve, before, palette)
    ax.set(xlim=(0, 1), xlabel="coverage", ylabel="error rate of what is answered")
    ax.spines[["top", "right"]].set_visible(False)
    if title is not None:
        ax.set_title(title)
    # Of a subfigure, the figure it is part of.
    return ax.figure.figure, ax


def _draw_lines(ax: "Axes", curve: RiskCoverageCurve, before: RiskCoverageCurve | None, palette: Palette) -> None:
    """The curve, the best order of the same answers, and what they are compared with; a legend above them."""
    risk, area = _risk(curve), curve.area()
    best = (1 - (1 - risk[-1]) / _COVERAGE).clip(min=0)
    highest = risk.max()
    if before is not None:
        earlier = _risk(before)
        highest = max(highest, earlier.max())
        label = f"before, AURC {_percent(before.area())}"
        ax.plot(_COVERAGE, earlier, color=palette.before, linewidth=1.4, label=label)
    ax.plot(_COVERAGE, risk, color=palette.accuracy, linewidth=2, label=f"AURC {_percent(area)}")
    label = f"best order, AURC {_percent(area - curve.area(excess=True))}"
    ax.plot(_COVERAGE, best, color=palette.ink, alpha=0.6, linestyle="--", linewidth=1, label=label)
    ax.set_ylim(0, float(1.4 * highest) or 1)
    add_legend(ax, palette)


def _risk(curve: RiskCoverageCurve) -> "NDArray[np.float64]":
    """Error rate at the coverages that are drawn, averaged over the orders of equal confidences."""
    coverage = curve.coverage.cpu().numpy()
    wrong = np.interp(_COVERAGE, np.append(0, coverage), np.append(0, curve.risk.cpu().numpy() * coverage))
    risk: NDArray[np.float64] = wrong / _COVERAGE
    return risk


def _percent(area: Tensor) -> str:
    return f"{area:.1%}" if area >= 0.0095 else f"{area:.2%}"
