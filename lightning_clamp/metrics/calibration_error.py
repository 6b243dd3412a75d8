"""Binned calibration error of the top-label confidence, and the reliability diagram over the same bins."""

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from lightning_clamp.metrics._base import RowMetric

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


class ReliabilityCurve(NamedTuple):
    """Per bin: how sure the network was, and how often it was right.

    Attributes:
        confidence: Mean confidence, ``(n_bins,)``, float64; nan in empty bins.
        accuracy: Fraction right, ``(n_bins,)``, float64; nan in empty bins.
        counts: Rows in the bin, ``(n_bins,)``, float64.
    """

    confidence: Tensor
    accuracy: Tensor
    counts: Tensor

    @property
    def expected_calibration_error(self) -> Tensor:
        """Count-weighted mean gap between confidence and accuracy, in ``[0, 1]``; nan if all bins are empty."""
        gap = (self.confidence - self.accuracy).abs().nan_to_num(0.0)
        return (gap * self.counts).sum() / self.counts.sum()


def binned_sums(confidence: Tensor, correct: Tensor, n_bins: int) -> Tensor:
    """Count, summed confidence and number right per bin, ``(3, n_bins)`` float64.

    Bins are ``(i/n, (i+1)/n]``, compared in float64; confidence 0 falls in the first, 1 in the last.
    """
    confidence = confidence.double()
    # Divided by n in float64 (as i / n is): a linspace is off by an ulp at some edges, and would move edge values.
    edges = torch.arange(1, n_bins, dtype=torch.float64, device=confidence.device) / n_bins
    index = torch.bucketize(confidence, edges)
    values = torch.stack([torch.ones_like(confidence), confidence, correct.double()])
    return torch.zeros(3, n_bins, dtype=torch.float64, device=confidence.device).index_add(1, index, values)


def reliability_curve(probs: Tensor, target: Tensor, *, n_bins: int = 15) -> ReliabilityCurve:
    """Mean top-label confidence and accuracy over equal-width bins of the confidence.

    Args:
        probs: Class probabilities, shape ``(N, C)``, float, each row summing to 1.
        target: True class indices, shape ``(N,)``, int64, in ``[0, C)``.
        n_bins: Number of bins, at least 1.

    Raises:
        ValueError: If ``n_bins`` is below 1.
    """
    confidence, predicted = probs.max(1)
    return _curve(binned_sums(confidence, predicted == target, _checked(n_bins)))


def expected_calibration_error(probs: Tensor, target: Tensor, *, n_bins: int = 15) -> Tensor:
    r"""Expected calibration error of the top-label confidence, over equal-width bins.

    Bins are :math:`(i/n, (i+1)/n]`; confidence 1.0 is in the last. Empty bins contribute nothing.

    Args:
        probs: Class probabilities, shape ``(N, C)``, float, each row summing to 1.
        target: True class indices, shape ``(N,)``, int64, in ``[0, C)``.
        n_bins: Number of bins, at least 1.

    Returns:
        Scalar float64 in ``[0, 1]`` (a fraction, not percent); nan without rows.

    Raises:
        ValueError: If ``n_bins`` is below 1.

    Example:
        >>> probs = torch.tensor([[0.9, 0.1], [0.9, 0.1]])
        >>> expected_calibration_error(probs, torch.tensor([0, 1])).round(decimals=3)
        tensor(0.4000, dtype=torch.float64)

    Reference:
        Guo et al., "On Calibration of Modern Neural Networks", ICML 2017, eq. 3.
    """
    return reliability_curve(probs, target, n_bins=n_bins).expected_calibration_error


class _BinnedMetric(RowMetric):
    """Sums per confidence bin; state: one ``(3, n_bins)`` float64 tensor."""

    bins: Tensor

    def __init__(self, n_bins: int = 15, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.n_bins = _checked(n_bins)
        self.add_sum("bins", 3, n_bins)

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Add a batch."""
        log_probs, labels = self.log_probs(preds, target)
        confidence, predicted = log_probs.max(1)
        self.bins += binned_sums(confidence.exp(), predicted == labels, self.n_bins)


class ExpectedCalibrationError(_BinnedMetric):
    """Streaming :func:`expected_calibration_error`; further arguments as :class:`~._base.RowMetric`."""

    higher_is_better = False

    def compute(self) -> Tensor:
        """The error over all rows seen, nan before the first."""
        return _curve(self.bins).expected_calibration_error


class ReliabilityDiagram(_BinnedMetric):
    """Streaming :func:`reliability_curve`, with a picture; further arguments as :class:`~._base.RowMetric`."""

    def compute(self) -> ReliabilityCurve:
        """The curve over all rows seen."""
        return _curve(self.bins)

    def plot(self, val: ReliabilityCurve | None = None, ax: "Axes | None" = None) -> "tuple[Figure, Axes]":
        """Draw the diagram into ``ax`` or a new figure; ``val`` is a computed curve, by default the current one."""
        from lightning_clamp.metrics.picture import plot_reliability

        return plot_reliability(self.compute() if val is None else val, ax=ax)


def _curve(bins: Tensor) -> ReliabilityCurve:
    count, confidence, correct = bins
    return ReliabilityCurve(confidence / count, correct / count, count.clone())


def _checked(n_bins: int) -> int:
    if n_bins < 1:
        raise ValueError(f"`n_bins` must be at least 1, got {n_bins}.")
    return n_bins
