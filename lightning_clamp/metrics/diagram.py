"""The reliability diagram: a metric that can be drawn."""

from typing import TYPE_CHECKING

from lightning_clamp.metrics._confidence import ConfidenceMetric
from lightning_clamp.metrics.picture import Curves, plot_reliability
from lightning_clamp.metrics.reliability import ReliabilityCurve, curve_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


class ReliabilityDiagram(ConfidenceMetric):
    """Streaming :func:`reliability_curve`, with a picture. Of a single bin, torchmetrics makes the fields scalars."""

    def compute(self) -> ReliabilityCurve:
        """The curve over all rows seen."""
        return curve_of(self.bins, self.confidence)

    def plot(self, val: Curves | None = None, ax: "Axes | None" = None) -> "tuple[Figure, Axes]":
        """Draw the diagram.

        Args:
            val: A computed curve, or several as :func:`plot_reliability` takes them; by default the current one.
            ax: Where to draw; a new figure by default.

        Returns:
            The figure and the axes.
        """
        return plot_reliability(self.compute() if val is None else val, ax=ax)
