"""Means over rows: the proper scores, accuracy, and the entropy of the predictions."""

from typing import Any

import torch
from torch import Tensor

from lightning_clamp._checks import check_probs, check_rows
from lightning_clamp.metrics._base import RowMetric


def negative_log_likelihood(log_probs: Tensor, target: Tensor) -> Tensor:
    """Mean negative log-likelihood.

    Args:
        log_probs: Log-probabilities, shape ``(N, C)``, float.
        target: True class indices, shape ``(N,)``, int64, in ``[0, C)``.

    Returns:
        Scalar float64, in nats; nan without rows.
    """
    check_rows(log_probs, target, "log_probs")
    return nll_per_row(log_probs, target).mean()


def brier_score(probs: Tensor, target: Tensor) -> Tensor:
    r"""Mean Brier score, :math:`\sum_k (p_k - 1[y = k])^2`.

    Args:
        probs: Class probabilities, shape ``(N, C)``, float.
        target: True class indices, shape ``(N,)``, int64, in ``[0, C)``.

    Returns:
        Scalar float64 in ``[0, 2]``; nan without rows.

    Reference:
        Brier, "Verification of forecasts expressed in terms of probability", Monthly Weather Review 1950.
    """
    check_probs(probs, target)
    return _squared_errors(probs, target).mean()


def predictive_entropy(log_probs: Tensor) -> Tensor:
    """Mean entropy of the predicted distributions.

    Args:
        log_probs: Log-probabilities, shape ``(N, C)``, float.

    Returns:
        Scalar float64 in ``[0, log C]``, in nats; nan without rows.
    """
    return _entropies(log_probs).mean()


def accuracy(scores: Tensor, target: Tensor) -> Tensor:
    """Fraction of rows whose largest value is at the target; of tied values the first counts.

    Args:
        scores: Logits or (log-)probabilities, shape ``(N, C)``, float.
        target: True class indices, shape ``(N,)``, int64, in ``[0, C)``.

    Returns:
        Scalar float64 in ``[0, 1]``; nan without rows.
    """
    check_rows(scores, target, "scores")
    return (scores.argmax(1) == target).double().mean()


class MeanMetric(RowMetric):
    """A mean over rows of the quantity ``values`` gives; state: its sum and the count, ``(2,)``."""

    higher_is_better: bool | None = False

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_sums(type(self).__name__, 2)

    def values(self, rows: Tensor, labels: Tensor) -> Tensor:
        """The quantity per row, ``(m,)``; nan where logits hold nan or +inf."""
        raise NotImplementedError

    def add(self, rows: Tensor, labels: Tensor) -> None:
        """Add sum and count."""
        total = self.checked(self.values(rows, labels).sum(dtype=torch.float64), rows)
        self.sums[0] += total
        self.sums[1] += len(rows)

    def compute(self) -> Tensor:
        """The mean over all rows seen, nan before the first."""
        total, count = self.sums.unbind()
        self.scored(count)
        return total / count


class NegativeLogLikelihood(MeanMetric):
    """Streaming :func:`negative_log_likelihood`."""

    def values(self, rows: Tensor, labels: Tensor) -> Tensor:
        """Negative log-likelihood per row."""
        return nll_per_row(self.log_probs(rows), labels)


class BrierScore(MeanMetric):
    """Streaming :func:`brier_score`; for ``task="binary"`` it is :math:`(p - y)^2` in ``[0, 1]``, half of that.

    These are the two conventions of scikit-learn's ``brier_score_loss``.
    """

    def values(self, rows: Tensor, labels: Tensor) -> Tensor:
        """Squared error per row."""
        return _squared_errors(self.class_probs(rows), labels) / (2 if self.task == "binary" else 1)


class PredictiveEntropy(MeanMetric):
    """Streaming :func:`predictive_entropy`."""

    higher_is_better = None

    def values(self, rows: Tensor, labels: Tensor) -> Tensor:
        """Entropy per row."""
        return _entropies(self.log_probs(rows))


class Accuracy(MeanMetric):
    """Streaming :func:`accuracy`."""

    higher_is_better = True

    def values(self, rows: Tensor, labels: Tensor) -> Tensor:
        """Whether the largest is at the target, per row; nan where there is no largest."""
        largest, predicted = rows.max(1)
        return torch.where(largest.isfinite(), (predicted == labels).double(), torch.nan)


def nll_per_row(log_probs: Tensor, target: Tensor) -> Tensor:
    """Negative log-likelihood per row, float64."""
    # Not torch's nll_loss, which leaves targets of -100 out unasked.
    return -log_probs.gather(1, target[:, None])[:, 0].double()


def _squared_errors(probs: Tensor, target: Tensor) -> Tensor:
    error = probs.scatter_add(1, target[:, None], -torch.ones_like(probs[:, :1]))
    return error.square().sum(1, dtype=torch.float64)


def _entropies(log_probs: Tensor) -> Tensor:
    terms: Tensor = torch.special.entr(log_probs.exp())
    return terms.sum(1, dtype=torch.float64)
