"""Metrics that are a picture: the reliability diagram, and the risk-coverage curve."""

from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from lightning_clamp.metrics._confidence import ConfidenceMetric
from lightning_clamp.metrics._labels import LabelAverage
from lightning_clamp.metrics.abstention import SelectiveMetric
from lightning_clamp.metrics.picture import Curves, plot_reliability
from lightning_clamp.metrics.reliability import ReliabilityCurve, curve_of
from lightning_clamp.metrics.risk_coverage import RiskCoverageCurve
from lightning_clamp.metrics.risk_picture import RiskCurves, plot_risk_coverage

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


class ReliabilityDiagram(ConfidenceMetric):
    """Streaming :func:`reliability_curve`, with a picture. Of a single bin, torchmetrics makes the fields scalars.

    For ``task="multilabel"`` it is the curve of all entries; with ``average="none"`` a dict of the labels' curves.
    """

    averages: ClassVar[tuple[LabelAverage, ...]] = ("micro", "none")

    def value(self, sums: Tensor) -> ReliabilityCurve:
        """The curve."""
        return curve_of(self.bins(sums), self.confidence)

    def over_labels(self, values: list[ReliabilityCurve], scored: Tensor) -> dict[str, ReliabilityCurve]:
        """The curve of each label, by name."""
        return {f"label {k}": curve for k, curve in enumerate(values)}

    def plot(self, val: Curves | None = None, ax: "Axes | None" = None) -> "tuple[Figure, Axes]":
        """Draw the diagram.

        Args:
            val: A computed curve, or several as :func:`plot_reliability` takes them; by default the current one.
            ax: Where to draw; a new figure by default.

        Returns:
            The figure and the axes.
        """
        return plot_reliability(self.compute() if val is None else val, ax=ax)


class RiskCoverageDiagram(SelectiveMetric):
    """Streaming :func:`risk_coverage_curve`, with a picture: a point per filled cell of the histogram.

    Of a single point, torchmetrics makes the fields scalars.
    """

    averages: ClassVar[tuple[LabelAverage, ...]] = ("micro", "none")

    def value(self, sums: Tensor) -> RiskCoverageCurve:
        """The curve."""
        return self.curve(sums)

    def over_labels(self, values: list[RiskCoverageCurve], scored: Tensor) -> dict[str, RiskCoverageCurve]:
        """The curve of each label, by name."""
        return {f"label {k}": curve for k, curve in enumerate(values)}

    def plot(self, val: RiskCurves | None = None, ax: "Axes | None" = None) -> "tuple[Figure, Axes]":
        """Draw the diagram.

        Args:
            val: A computed curve, or several as :func:`plot_risk_coverage` takes them; by default the current one.
            ax: Where to draw; a new figure by default.

        Returns:
            The figure and the axes.
        """
        return plot_risk_coverage(self.compute() if val is None else val, ax=ax)
