"""The risk-coverage curve, drawn."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from torch import Tensor

from lightning_clamp.metrics._named import named_curves
from lightning_clamp.metrics._palette import Palette, palette_of
from lightning_clamp.metrics.risk_coverage import RiskCoverageCurve

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

RiskCurves: TypeAlias = RiskCoverageCurve | list[RiskCoverageCurve] | Mapping[str, RiskCoverageCurve]

# Coverages that are drawn. The few most confident rows, whose error rate is mostly chance, are left of the first.
_COVERAGE = np.linspace(0, 1, 501)[1:]


def plot_risk_coverage(
    curves: RiskCurves, *, ax: "Axes | None" = None, title: str | None = None
) -> "tuple[Figure, Axes]":
    """Draw the error rate of what is answered over the share that is answered.

    The dashed line is the best order of the same answers, all that are right first; of several curves, those of the
    last. The legend has the areas under the lines. Colours follow the background of the axes, light or dark.

    Args:
        curves: A curve; several by name, such as ``{"before": ..., "after": ...}``; or a list of one per step.
        ax: Where to draw; a new figure by default.
        title: Title of the axes.

    Returns:
        The figure and the axes.
    """
    from matplotlib import pyplot as plt

    named = named_curves(curves, RiskCoverageCurve, "plot_risk_coverage")
    if ax is None:
        _, ax = plt.subplots(figsize=(4.8, 4.0), layout="constrained")
    palette = palette_of(ax)
    filled = {name: curve for name, curve in named.items() if not bool(curve.area().isnan())}
    if filled:
        _draw_lines(ax, filled, palette)
    else:
        ax.text(0.5, 0.5, "no data", color=palette.ink, ha="center", va="center", transform=ax.transAxes)
    ax.set(xlim=(0, 1), xlabel="coverage", ylabel="error rate of what is answered")
    ax.spines[["top", "right"]].set_visible(False)
    if title is not None:
        ax.set_title(title)
    # Of a subfigure, the figure it is part of.
    return ax.figure.figure, ax


def _draw_lines(ax: "Axes", named: Mapping[str, RiskCoverageCurve], palette: Palette) -> None:
    """The curves, and the best order of the last one's answers; a legend above them."""
    highest = 0.0
    colours = palette.of_lines(len(named)) if len(named) > 1 else [palette.lines[1]]
    for (name, curve), colour in zip(named.items(), colours, strict=True):
        risk = _risk(curve)
        highest = max(highest, float(risk.max()))
        label = f"{name}: AURC {_percent(curve.area())}" if name else f"AURC {_percent(curve.area())}"
        ax.plot(_COVERAGE, risk, color=colour, linewidth=1.8, label=label)
    best = (1 - (1 - risk[-1]) / _COVERAGE).clip(min=0)
    label = f"best order, AURC {_percent(curve.area() - curve.area(excess=True))}"
    ax.plot(_COVERAGE, best, color=palette.ink, alpha=0.6, linestyle="--", linewidth=1, label=label)
    ax.set_ylim(0, 1.4 * highest or 1)
    ax.legend(loc="upper left", frameon=False, fontsize="small", handlelength=1.4, labelcolor=palette.ink)


def _risk(curve: RiskCoverageCurve) -> "NDArray[np.float64]":
    """Error rate at the coverages that are drawn, averaged over the orders of equal confidences."""
    coverage = curve.coverage.cpu().numpy()
    wrong = np.interp(_COVERAGE, np.append(0, coverage), np.append(0, curve.risk.cpu().numpy() * coverage))
    risk: NDArray[np.float64] = wrong / _COVERAGE
    return risk


def _percent(area: Tensor) -> str:
    return f"{area:.1%}" if area >= 0.0095 else f"{area:.2%}"
