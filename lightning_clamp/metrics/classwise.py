"""The class-wise calibration error."""

from itertools import chain
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from lightning_clamp._rows import Task
from lightning_clamp.metrics._base import RowMetric
from lightning_clamp.metrics._binning import bin_index, checked_bins
from lightning_clamp.metrics._reading import PredictedRows, Reader

Average: TypeAlias = Literal["macro", "none"]

# Probabilities at work at once on an accelerator, which takes 16 bytes for each.
_AT_ONCE_DEVICE = 2**24
# From how many on they are first added up in copies of the sums, and how many sums of one bin these have at most: they
# take 2 MB for 15 bins, and no sum is of more than 1,024 probabilities.
_SPREAD_FROM = 2**20
_SPREAD = 2**15


def classwise_calibration_error(
    preds: Tensor,
    target: Tensor,
    *,
    n_bins: int = 15,
    average: Average = "macro",
    probs: bool = False,
    task: Task = "multiclass",
    ignore_index: int | None = None,
) -> Tensor:
    """Class-wise (static) calibration error: the expected calibration error of every class's probability.

    For class k the confidence is its probability in every row, right or wrong is whether k is the target. Classes that
    never occur count as the others do. Bins are those of :func:`~.calibration_error.expected_calibration_error`.

    Args:
        preds: Logits, or probabilities if ``probs``: ``(N, C)``, dense ``(N, C, ...)``, or one value per position for
            ``task="binary"``; float.
        target: True class indices, ``(N,)`` or dense ``(N, ...)``, int64, in ``[0, C)``.
        n_bins: Number of bins, at least 1.
        average: ``"macro"``, the mean over the classes, or ``"none"``, the error of each.
        probs: Whether preds are probabilities; it is never guessed.
        task: ``"multiclass"`` or ``"binary"``.
        ignore_index: Target value of positions to leave out.

    Returns:
        Float64 in ``[0, 1]``, a scalar or ``(C,)``; nan without rows.

    Raises:
        ValueError: If an option is out of range or unknown, preds hold nan or, with ``probs``, no probabilities, labels
            are out of range, or shapes do not fit together.
        TypeError: If preds are not float, or the target holds no class indices.

    Reference:
        Nixon et al., "Measuring Calibration in Deep Learning", 2019 (static calibration error); Kull et al., "Beyond
        temperature scaling", NeurIPS 2019 (classwise-ECE).
    """
    n_bins, average = checked_bins(n_bins), _checked(average)
    _refuse_labels(task)
    reader = Reader("classwise_calibration_error", probs=probs, task=task, ignore_index=ignore_index)
    blocks = reader.blocks(preds, target)
    first = next(blocks)
    sums = torch.zeros(n_bins + 1, first.preds.shape[1], dtype=torch.float64, device=preds.device)
    for rows in chain([first], blocks):
        _add(sums, rows)
    reader.warn_unless(bool(sums[-1].any()))
    return _error(sums, average)


class ClasswiseCalibrationError(RowMetric):
    """Streaming :func:`classwise_calibration_error`, exact; its state takes 128 KB for C = 1,000.

    That is per bin and class the summed probability less the occurrences, and a row of counts: ``(n_bins + 1, C)``. On
    an accelerator, batches of a million probabilities are first added up by at most 1,024 in the dtype of the preds.

    Args:
        num_classes: Number of classes; 2 for ``task="binary"``.
        n_bins: Number of bins, at least 1.
        average: ``"macro"`` or ``"none"``.
        **kwargs: Further arguments of :class:`~._base.RowMetric`.
    """

    higher_is_better = False
    plot_legend_name = "Class"

    def __init__(self, num_classes: int, n_bins: int = 15, *, average: Average = "macro", **kwargs: Any) -> None:
        _refuse_labels(kwargs.get("task", "multiclass"))
        super().__init__(**kwargs)
        if num_classes < 2:
            raise ValueError(f"`num_classes` must be at least 2, got {num_classes}.")
        self.num_classes = num_classes
        self.n_bins = checked_bins(n_bins)
        self.average: Average = _checked(average)
        self.add_sums("class_gaps", n_bins + 1, num_classes)

    def add(self, rows: PredictedRows) -> None:
        """Add rows to the histograms of the classes."""
        if rows.preds.shape[1] != self.num_classes:
            raise ValueError(f"`num_classes` is {self.num_classes}, but preds have {rows.preds.shape[1]} classes.")
        _add(self.sums, rows)

    def value(self, sums: Tensor) -> Tensor:
        """The error."""
        return _error(sums, self.average)


def _checked(average: Average) -> Average:
    if average not in ("macro", "none"):
        raise ValueError(f"`average` must be 'macro' or 'none', got {average!r}.")
    return average


def _refuse_labels(task: Task) -> None:
    if task == "multilabel":
        raise ValueError(
            "The class-wise error is over the classes of a softmax: for the error of every label take "
            'ExpectedCalibrationError or its function with task="multilabel", confidence="positive", average="none".'
        )


def _add(sums: Tensor, rows: PredictedRows) -> None:
    """Add to the summed probability less the occurrences per bin and class, and to the count, in place."""
    probs = rows.class_probs()
    # nan or inf in one logit makes all probabilities of its row nan; of given probabilities the sums are looked at.
    rows.check(probs[:, 0])
    if probs.device.type == "cpu":
        _add_chosen(sums[:-1], probs, rows.target)
    else:
        _add_all(sums[:-1], probs.clone() if rows.reader.probs else probs, rows.target)
    sums[-1].add_(len(probs))


def _add_chosen(sums: Tensor, probs: Tensor, target: Tensor) -> None:
    """In a row at most ``n_bins`` probabilities lie above the first bin.

    Only these are sorted into bins; the first gets what is then missing in the totals.
    """
    n_bins, classes = sums.shape
    totals = probs.sum(0, dtype=torch.float64) - torch.bincount(target, minlength=classes)
    # A shade below the edge, which float32 may not hit: the exact comparison is made by `bin_index`.
    row, column = (probs > (1 - 1e-6) / n_bins).nonzero(as_tuple=True)
    chosen = probs[row, column]
    gap = chosen.double() - (target[row] == column).double()
    # Labels out of range, where nobody looked for them, have failed by now: the sums are changed last.
    sums[0] += totals.index_add_(0, column, gap, alpha=-1)
    sums.view(-1).index_add_(0, bin_index(chosen, n_bins) * classes + column, gap)


def _add_all(sums: Tensor, probs: Tensor, target: Tensor) -> None:
    """All of them, in a few launches, and without waiting for a number of those above the first bin; changes probs."""
    size = max(1, _AT_ONCE_DEVICE // probs.shape[1])
    for part, labels in zip(torch.split(probs, size), torch.split(target, size), strict=True):
        index = bin_index(part, len(sums))
        many = part.numel() >= _SPREAD_FROM
        gap = (part if many else part.double()).scatter_(1, labels[:, None], -1, reduce="add")
        if many:
            sums.add_(_sums_of_many(index, gap, len(sums)))
        else:
            sums.scatter_add_(0, index, gap)


def _sums_of_many(index: Tensor, gap: Tensor, n_bins: int) -> Tensor:
    """Sums of ``gap``, ``(m, C)``, over the rows of each bin, which ``index`` names in the same shape: ``(n_bins, C)``.

    Most are in the first bin, and an accelerator adds to one number one after the other: rows take turns at copies of
    the sums. The classes of a bin lie side by side, so that threads side by side add to one piece of memory.
    """
    rows, classes = gap.shape
    copies = _copies(classes)
    rest = rows % copies
    sums = gap.new_zeros(n_bins, copies, classes)
    if rest:
        sums.scatter_add_(0, index[None, -rest:], gap[None, -rest:])
        index, gap = index[:-rest], gap[:-rest]
    sums.scatter_add_(0, index.view(-1, copies, classes), gap.view(-1, copies, classes))
    return sums.sum(1)


def _copies(classes: int) -> int:
    # A power of two, which divides most numbers of rows.
    return 1 << max(1, _SPREAD // classes).bit_length() - 1


def _error(sums: Tensor, average: Average) -> Tensor:
    error = sums[:-1].abs().sum(0) / sums[-1]
    return error.mean() if average == "macro" else error
