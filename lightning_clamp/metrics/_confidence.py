"""Which confidence is meant, and the histogram of it that a family of metrics shares."""

from typing import Any, Literal, TypeAlias

from torch import Tensor

from lightning_clamp._checks import check_probs
from lightning_clamp.metrics._base import RowMetric, top_probability
from lightning_clamp.metrics._binning import add_to_cells, cell_count, checked_bins, merged

Confidence: TypeAlias = Literal["top", "positive"]


def confidences(probs: Tensor, target: Tensor, confidence: Confidence) -> tuple[Tensor, Tensor]:
    """Confidence and correctness, ``(N,)`` each, of probabilities ``(N, C)``.

    Raises:
        ValueError: See :func:`~._checks.check_probs`; or ``confidence`` is unknown, or is ``"positive"`` and there are
            not two classes.
    """
    check_probs(probs, target)
    _check(confidence)
    if confidence == "positive":
        if probs.shape[1] != 2:
            raise ValueError(f'confidence="positive" needs two classes, got {probs.shape[1]}.')
        return probs[:, 1], target == 1
    return top_probability(probs, target)


def _check(confidence: Confidence) -> None:
    if confidence not in ("top", "positive"):
        raise ValueError(f"`confidence` must be 'top' or 'positive', got {confidence!r}.")


class ConfidenceMetric(RowMetric):
    """A metric of how confidence and accuracy agree; its state is a fine histogram of the confidence.

    The state is three float64 sums (count, confidence, number right) in each of some 15,400 cells that divide the bins:
    369 KB for 15 bins, whatever the number of samples. Everything binned, equal-mass or smoothed is computed from it,
    so that a ``MetricCollection`` of them keeps one state and updates once.

    Args:
        n_bins: Number of equal-width bins, at least 1.
        confidence: ``"top"``, the probability of the predicted class against how often it is right; or ``"positive"``
            (``task="binary"`` only), the probability of class 1 against how often class 1 occurs.
        **kwargs: Further arguments of :class:`~._base.RowMetric`.
    """

    higher_is_better = False

    def __init__(self, n_bins: int = 15, *, confidence: Confidence = "top", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        _check(confidence)
        if confidence == "positive" and self.task != "binary":
            raise ValueError(
                'confidence="positive" is the probability of class 1 and needs task="binary"; for every class of '
                "several see ClasswiseCalibrationError."
            )
        self.n_bins = checked_bins(n_bins)
        self.confidence: Confidence = confidence
        self.add_sums(f"cells_{n_bins}_{confidence}", 3, cell_count(n_bins))

    def add(self, rows: Tensor, labels: Tensor) -> None:
        """Add rows to the histogram."""
        if self.confidence == "positive":
            confidence, correct = self.class_probs(rows)[:, 1], labels == 1
        else:
            confidence, correct = self.top_label(rows, labels)
        add_to_cells(self.sums, self.checked(confidence, rows), correct, self.n_bins)

    @property
    def cells(self) -> Tensor:
        """Sums per cell; warns if there are none."""
        self.scored(self.sums[0])
        return self.sums

    @property
    def bins(self) -> Tensor:
        """Sums per equal-width bin, ``(3, n_bins)``."""
        return merged(self.cells, self.n_bins)
