"""Metrics that are curves, and can be drawn: the reliability diagram and the risk-coverage diagram."""

from typing import TYPE_CHECKING

from lightning_clamp.metrics._confidence import ConfidenceMetric
from lightning_clamp.metrics.abstention import SelectiveMetric
from lightning_clamp.metrics.picture import plot_reliability
from lightning_clamp.metrics.reliability import ReliabilityCurve
from lightning_clamp.metrics.risk_coverage import RiskCoverageCurve
from lightning_clamp.metrics.risk_picture import plot_risk_coverage

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


class ReliabilityDiagram(ConfidenceMetric):
    """Streaming :func:`reliability_curve`, with a picture. Of a single bin, torchmetrics makes the fields scalars."""

    def compute(self) -> ReliabilityCurve:
        """The curve over all rows seen."""
        return ReliabilityCurve.from_sums(self.bins)

    def plot(
        self, val: ReliabilityCurve | None = None, ax: "Axes | None" = None, *, before: ReliabilityCurve | None = None
    ) -> "tuple[Figure, Axes]":
        """Draw the diagram.

        Args:
            val: A computed curve; by default the current one.
            ax: Where to draw; a new figure by default.
            before: A curve to compare with.
        """
        return plot_reliability(self.compute() if val is None else val, before=before, ax=ax)


class RiskCoverageDiagram(SelectiveMetric):
    """Streaming :func:`risk_coverage_curve`, with a picture: a point per filled cell of the histogram.

    Of a single point, torchmetrics makes the fields scalars.
    """

    def compute(self) -> RiskCoverageCurve:
        """The curve over all rows seen."""
        return self.curve

    def plot(
        self, val: RiskCoverageCurve | None = None, ax: "Axes | None" = None, *, before: RiskCoverageCurve | None = None
    ) -> "tuple[Figure, Axes]":
        """Draw the diagram.

        Args:
            val: A computed curve; by default the current one.
            ax: Where to draw; a new figure by default.
            before: A curve to compare with.
        """
        return plot_risk_coverage(self.compute() if val is None else val, before=before, ax=ax)
