"""Which confidence is meant, and the histogram of it that a family of metrics shares."""

from typing import Any, Literal, TypeAlias

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
    parts = [_checked(rows, confidence) for rows in reader.blocks(preds, target)]
    values, correct = (torch.cat(column) for column in zip(*parts, strict=True))
    reader.warn_unless(len(values) > 0)
    return values.double(), correct


def _checked(rows: PredictedRows, confidence: Confidence) -> tuple[Tensor, Tensor]:
    """Confidence and correctness of checked rows, ``(m,)`` each."""
    value, predicted, label = _of_rows(rows, confidence)
    rows.check(value)
    return value, torch.eq(predicted, label)


def _of_rows(rows: PredictedRows, confidence: Confidence) -> tuple[Tensor, Tensor, Tensor | bool]:
    """Confidence of rows, ``(m,)``, and two things that are equal where they are right."""
    label: Tensor | bool = True
    if confidence == "positive":
        value, predicted = rows.class_probs()[:, 1], rows.target
    else:
        value, predicted, label = rows.top_label()
    # Rounding may have lifted a probability above 1.
    return value.clamp(max=1) if rows.reader.probs else value, predicted, label


def _check(confidence: Confidence, task: Task) -> None:
    if confidence not in ("top", "positive"):
        raise ValueError(f"`confidence` must be 'top' or 'positive', got {confidence!r}.")
    if confidence == "positive" and task == "multiclass":
        raise ValueError(
            'confidence="positive" is the probability of class 1 and needs task="binary" (or "multilabel"); for every '
            "class of several see ClasswiseCalibrationError."
        )


class ConfidenceMetric(RowMetric):
    """A metric of how confidence and accuracy agree; its state is a fine histogram of the confidence.

    The state is three float64 sums (count, confidence, number right) in each of some 15,400 cells that divide the bins:
    369 KB for 15 bins, and as much for each of several labels, whatever the number of samples. Everything binned,
    equal-mass or smoothed is computed from it, so that a ``MetricCollection`` of them keeps one state and updates once.

    Args:
        n_bins: Number of equal-width bins, at least 1.
        confidence: ``"top"``, the probability of the predicted class against how often it is right; or ``"positive"``
            (not for ``task="multiclass"``), the probability of class 1 against how often class 1 occurs.
        **kwargs: Further arguments of :class:`~._base.RowMetric`.
    """

    higher_is_better = False

    def __init__(self, n_bins: int = 15, *, confidence: Confidence = "top", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        _check(confidence, self.reader.task)
        self.n_bins = checked_bins(n_bins)
        self.confidence: Confidence = confidence
        self.add_sums(f"cells_{n_bins}_{confidence}", 3, cell_count(n_bins))

    def add(self, rows: PredictedRows) -> None:
        """Add rows to the histogram."""
        added = addends(*_of_rows(rows, self.confidence))
        index = cell_index(added[1], self.n_bins)
        # As late as can be: an accelerator is waited for.
        if rows.reader.validate_args:
            rows.mark(added[0])
            rows.total(added[:2])
        if self.num_labels is None:
            self.sums.index_add_(1, index, added)
            return
        assert rows.label is not None
        cells = self.sums.shape[-1]
        kinds = torch.arange(3, device=index.device)[:, None]
        places = (3 * rows.label + kinds) * cells + index
        self.sums.view(-1).index_add_(0, places.flatten(), added.flatten())

    def bins(self, cells: Tensor) -> Tensor:
        """Sums per equal-width bin, ``(3, n_bins)``, from those per cell."""
        return merged(cells, self.n_bins)
