"""Which confidence is meant, and the histogram of it that a family of metrics shares."""

from typing import Any, ClassVar, Literal, TypeAlias

import torch
from torch import Tensor

from lightning_clamp._rows import Task
from lightning_clamp.metrics._base import RowMetric
from lightning_clamp.metrics._binning import addends, cell_count, cell_index, checked_bins, merged
from lightning_clamp.metrics._reading import PredictedRows, Reader

Confidence: TypeAlias = Literal["top", "positive"]


def confidences(preds: Tensor, target: Tensor, confidence: Confidence, reader: Reader) -> tuple[Tensor, Tensor]:
    """Confidence, float64, and correctness of every row of a batch, ``(M,)`` each.

    Raises:
        TypeError: See :meth:`~._reading.Reader.blocks`.
        ValueError: See there; or ``confidence`` is unknown, or is ``"positive"`` and the task not ``"binary"``.
    """
    _check(confidence, reader.task)
    parts = [_of_rows(rows, confidence) for rows in reader.blocks(preds, target)]
    values, correct = (torch.cat(column) for column in zip(*parts, strict=True))
    reader.warn_unless(len(values) > 0)
    return values.double(), correct


def _of_rows(rows: PredictedRows, confidence: Confidence) -> tuple[Tensor, Tensor]:
    """Confidence and correctness of checked rows, ``(m,)`` each."""
    if confidence == "positive":
        value, correct = rows.class_probs()[:, 1], rows.target == 1
    else:
        value, correct = rows.top_label()
    rows.check(value)
    # Rounding may have lifted a probability above 1.
    return value.clamp(max=1) if rows.reader.probs else value, correct


def _check(confidence: Confidence, task: Task) -> None:
    if confidence not in ("top", "positive"):
        raise ValueError(f"`confidence` must be 'top' or 'positive', got {confidence!r}.")
    if confidence == "positive" and task != "binary":
        raise ValueError(
            'confidence="positive" is the probability of class 1 and needs task="binary"; for every class of '
            "several see ClasswiseCalibrationError."
        )


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
    __jit_unused_properties__: ClassVar[list[str]] = [*RowMetric.__jit_unused_properties__, "cells", "bins"]

    def __init__(self, n_bins: int = 15, *, confidence: Confidence = "top", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        _check(confidence, self.reader.task)
        self.n_bins = checked_bins(n_bins)
        self.confidence: Confidence = confidence
        self.add_sums(f"cells_{n_bins}_{confidence}", 3, cell_count(n_bins))

    def add(self, rows: PredictedRows) -> None:
        """Add rows to the histogram."""
        added = addends(*_of_rows(rows, self.confidence))
        self.sums.index_add_(1, cell_index(added[1], self.n_bins), added)

    @property
    def cells(self) -> Tensor:
        """Sums per cell; warns if there are none."""
        self.warn_unless(self.sums[0])
        return self.sums

    @property
    def bins(self) -> Tensor:
        """Sums per equal-width bin, ``(3, n_bins)``."""
        return merged(self.cells, self.n_bins)
