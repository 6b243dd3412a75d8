"""Means over rows: the proper scores, accuracy, and the entropy of the predictions."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_clamp._rows import Task
from lightning_clamp.metrics._base import RowMetric
from lightning_clamp.metrics._labels import LabelAverage, over_labels
from lightning_clamp.metrics._reading import PredictedRows, Reader

# Torch's loss leaves a target of -100 out unasked, unless it is told another number: one that is nobody's label.
_NO_LABEL = torch.iinfo(torch.int64).min


def negative_log_likelihood(
    preds: Tensor,
    target: Tensor,
    *,
    probs: bool = False,
    task: Task = "multiclass",
    ignore_index: int | None = None,
    average: LabelAverage = "macro",
) -> Tensor:
    """Mean negative log-likelihood.

    Args:
        preds: Logits, or probabilities if ``probs``: ``(N, C)``, dense ``(N, C, ...)``, or one value per position for
            ``task="binary"``; float.
        target: True class indices, ``(N,)`` or dense ``(N, ...)``, int64, in ``[0, C)``.
        probs: Whether preds are probabilities; it is never guessed.
        task: ``"multiclass"``, ``"binary"`` or ``"multilabel"``; see :class:`~._base.RowMetric`.
        ignore_index: Target value of positions to leave out.
        average: For ``task="multilabel"``; see :class:`~._base.RowMetric`.

    Returns:
        Scalar float64, in nats; nan without rows.

    Raises:
        ValueError: If preds hold nan or, with ``probs``, no probabilities, labels are out of range, or shapes do not
            fit together.
        TypeError: If preds are not float, or the target holds no class indices.
    """
    reader = Reader("negative_log_likelihood", probs=probs, task=task, ignore_index=ignore_index)
    return over_labels(partial(mean_over_rows, nll_per_row), preds, target, reader, average)


def brier_score(
    preds: Tensor,
    target: Tensor,
    *,
    probs: bool = False,
    task: Task = "multiclass",
    ignore_index: int | None = None,
    average: LabelAverage = "macro",
) -> Tensor:
    r"""Mean Brier score, :math:`\sum_k (p_k - 1[y = k])^2`; for ``task="binary"`` :math:`(p - y)^2`, half of that.

    These are the two conventions of scikit-learn's ``brier_score_loss``. Arguments and errors as
    :func:`negative_log_likelihood`.

    Returns:
        Scalar float64 in ``[0, 2]``, for ``task="binary"`` in ``[0, 1]``; nan without rows.

    Reference:
        Brier, "Verification of forecasts expressed in terms of probability", Monthly Weather Review 1950.
    """
    reader = Reader("brier_score", probs=probs, task=task, ignore_index=ignore_index)
    return over_labels(partial(mean_over_rows, _squared_errors), preds, target, reader, average)


def predictive_entropy(
    preds: Tensor,
    target: Tensor | None = None,
    *,
    probs: bool = False,
    task: Task = "multiclass",
    ignore_index: int | None = None,
    average: LabelAverage = "macro",
) -> Tensor:
    """Mean entropy of the predicted distributions.

    Arguments and errors as :func:`negative_log_likelihood`, but that the target is needed for ``ignore_index`` alone.

    Returns:
        Scalar float64 in ``[0, log C]``, in nats; nan without rows.
    """
    reader = Reader("predictive_entropy", probs=probs, task=task, ignore_index=ignore_index)
    return over_labels(
        partial(mean_over_rows, _entropies),
        preds,
        reader.zero_target(preds) if target is None else target,
        reader,
        average,
    )


def accuracy(
    preds: Tensor,
    target: Tensor,
    *,
    probs: bool = False,
    task: Task = "multiclass",
    ignore_index: int | None = None,
    average: LabelAverage = "macro",
) -> Tensor:
    """Fraction of rows whose largest value is at the target; of tied values the first counts.

    Arguments and errors as :func:`negative_log_likelihood`.

    Returns:
        Scalar float64 in ``[0, 1]``; nan without rows.
    """
    reader = Reader("accuracy", probs=probs, task=task, ignore_index=ignore_index)
    return over_labels(partial(mean_over_rows, _hits), preds, target, reader, average)


class MeanMetric(RowMetric):
    """A mean over rows of the quantity ``values`` gives; state: the count and its sum, ``(2,)``."""

    higher_is_better: bool | None = False

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_sums(type(self).__name__, 2)

    def values(self, rows: PredictedRows) -> Tensor:
        """The quantity per row, ``(m,)`` float; nan where logits hold nan or +inf."""
        raise NotImplementedError

    def add(self, rows: PredictedRows) -> None:
        """Add count and sum."""
        with_count = rows.counted(self.values(rows))
        total = rows.total(with_count)
        self.sums.add_(total if self.num_labels is None else rows.by_label(with_count.T, self.num_labels))

    def value(self, sums: Tensor) -> Tensor:
        """The mean."""
        count, total = sums.unbind()
        return total / count


class NegativeLogLikelihood(MeanMetric):
    """Streaming :func:`negative_log_likelihood`."""

    def values(self, rows: PredictedRows) -> Tensor:
        """Negative log-likelihood per row."""
        return nll_per_row(rows)


class BrierScore(MeanMetric):
    """Streaming :func:`brier_score`."""

    def values(self, rows: PredictedRows) -> Tensor:
        """Squared error per row."""
        return _squared_errors(rows)


class PredictiveEntropy(MeanMetric):
    """Streaming :func:`predictive_entropy`."""

    higher_is_better = None

    def update(self, preds: Tensor, target: Tensor | None = None) -> None:
        """Add a batch; the target is needed for ``ignore_index`` alone."""
        super().update(preds, self.reader.zero_target(preds) if target is None else target)

    def values(self, rows: PredictedRows) -> Tensor:
        """Entropy per row."""
        return _entropies(rows)


class Accuracy(MeanMetric):
    """Streaming :func:`accuracy`."""

    higher_is_better = True
    plot_upper_bound = 1.0

    def values(self, rows: PredictedRows) -> Tensor:
        """Whether the largest is at the target, per row; nan where there is no largest."""
        return _hits(rows)


def mean_over_rows(values: Callable[[PredictedRows], Tensor], preds: Tensor, target: Tensor, reader: Reader) -> Tensor:
    """The mean of a quantity per row, nan without rows."""
    parts = []
    for rows in reader.blocks(preds, target):
        parts.append(values(rows))
        rows.check(parts[-1])
    per_row = torch.cat(parts)
    reader.warn_unless(len(per_row) > 0)
    return per_row.mean(dtype=torch.float64)


def nll_per_row(rows: PredictedRows) -> Tensor:
    """Negative log-likelihood per row."""
    return nn.functional.nll_loss(rows.log_probs(), rows.target, ignore_index=_NO_LABEL, reduction="none")


def _squared_errors(rows: PredictedRows) -> Tensor:
    probs = rows.class_probs()
    error = probs.scatter(1, rows.target[:, None], -1, reduce="add")
    squared = error.square().sum(1, dtype=torch.float64)
    # One of the two equal terms.
    return squared if rows.reader.task == "multiclass" else squared / 2


def _entropies(rows: PredictedRows) -> Tensor:
    terms: Tensor = torch.special.entr(rows.class_probs())
    return terms.sum(1, dtype=torch.float64)


def _hits(rows: PredictedRows) -> Tensor:
    largest, predicted = rows.preds.max(1)
    # The difference is 0, or nan where the largest is nan or inf.
    return (predicted == rows.target) + (largest - largest)
