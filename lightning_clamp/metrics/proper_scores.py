"""Accuracy and the negative log-likelihood."""

from typing import Any

from torch import Tensor
from torch.nn import functional as F

from lightning_clamp.metrics._base import RowMetric


def negative_log_likelihood(log_probs: Tensor, target: Tensor) -> Tensor:
    """Mean negative log-likelihood.

    Args:
        log_probs: Log-probabilities, shape ``(N, C)``, float.
        target: True class indices, shape ``(N,)``, int64, in ``[0, C)``.

    Returns:
        Scalar float64, in nats.
    """
    return F.nll_loss(log_probs.double(), target)


def accuracy(log_probs: Tensor, target: Tensor) -> Tensor:
    """Fraction of rows whose largest value is at the target; of tied values the first counts.

    Args:
        log_probs: Scores of the classes, shape ``(N, C)``, float.
        target: True class indices, shape ``(N,)``, int64, in ``[0, C)``.

    Returns:
        Scalar float64 in ``[0, 1]``.
    """
    return (log_probs.argmax(1) == target).double().mean()


class _MeanMetric(RowMetric):
    """A mean over rows; state: two scalars."""

    total: Tensor
    count: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_sum("total")
        self.add_sum("count")

    def add(self, mean: Tensor, n: int) -> None:
        """Add ``n`` rows of this mean."""
        if n:
            self.total += mean * n
            self.count += n

    def compute(self) -> Tensor:
        """The mean over all rows seen, nan before the first."""
        return self.total / self.count


class NegativeLogLikelihood(_MeanMetric):
    """Streaming :func:`negative_log_likelihood`; arguments of :class:`~lightning_clamp.metrics._base.RowMetric`."""

    higher_is_better = False

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Add a batch."""
        log_probs, labels = self.log_probs(preds, target)
        self.add(negative_log_likelihood(log_probs, labels), len(labels))


class Accuracy(_MeanMetric):
    """Streaming :func:`accuracy`; arguments of :class:`~lightning_clamp.metrics._base.RowMetric`."""

    higher_is_better = True

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Add a batch."""
        log_probs, labels = self.log_probs(preds, target)
        self.add(accuracy(log_probs, labels), len(labels))
