"""Calibration errors of the confidence, binned: expected, maximum, root-mean-square, overconfidence, equal-mass."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_clamp._rows import Task
from lightning_clamp.metrics._binning import checked_bins, equal_mass_sums, value_sums
from lightning_clamp.metrics._confidence import Confidence, ConfidenceMetric, confidences
from lightning_clamp.metrics._labels import LabelAverage, over_labels
from lightning_clamp.metrics._reading import Reader
from lightning_clamp.metrics.reliability import Norm, ReliabilityCurve, binned_curve, check_norm


def expected_calibration_error(
    preds: Tensor,
    target: Tensor,
    *,
    n_bins: int = 15,
    confidence: Confidence = "top",
    probs: bool = False,
    task: Task = "multiclass",
    ignore_index: int | None = None,
    average: LabelAverage = "macro",
) -> Tensor:
    r"""Expected calibration error (ECE): the mean gap between confidence and accuracy over equal-width bins.

    Bins are :math:`(i/n, (i+1)/n]`; confidence 1.0 is in the last. Empty bins contribute nothing.

    Args:
        preds: Logits, or probabilities if ``probs``: ``(N, C)``, dense ``(N, C, ...)``, or one value per position for
            ``task="binary"``; float.
        target: True class indices, ``(N,)`` or dense ``(N, ...)``, int64, in ``[0, C)``.
        n_bins: Number of bins, at least 1.
        confidence: See :func:`~.reliability.reliability_curve`.
        probs: Whether preds are probabilities; it is never guessed.
        task: ``"multiclass"``, ``"binary"`` or ``"multilabel"``; see :class:`~._base.RowMetric`.
        ignore_index: Target value of positions to leave out.
        average: For ``task="multilabel"``; see :class:`~._base.RowMetric`.

    Returns:
        Scalar float64 in ``[0, 1]`` (a fraction, not percent); nan without rows.

    Raises:
        ValueError: If an option is out of range, preds hold nan or, with ``probs``, no probabilities, labels are out of
            range, or shapes do not fit together.
        TypeError: If preds are not float, or the target holds no class indices.

    Example:
        >>> import torch
        >>> probs = torch.tensor([[0.9, 0.1], [0.9, 0.1]])
        >>> expected_calibration_error(probs, torch.tensor([0, 1]), probs=True).round(decimals=3)
        tensor(0.4000, dtype=torch.float64)

    Reference:
        Guo et al., "On Calibration of Modern Neural Networks", ICML 2017, eq. 3.
    """
    reader = Reader("expected_calibration_error", probs=probs, task=task, ignore_index=ignore_index)
    return _over_bins(ReliabilityCurve.calibration_error, preds, target, n_bins, confidence, reader, average)


def maximum_calibration_error(
    preds: Tensor,
    target: Tensor,
    *,
    n_bins: int = 15,
    confidence: Confidence = "top",
    probs: bool = False,
    task: Task = "multiclass",
    ignore_index: int | None = None,
    average: LabelAverage = "macro",
) -> Tensor:
    """Maximum calibration error (MCE): the largest gap of any bin, however few rows it has.

    Arguments, result and errors as :func:`expected_calibration_error`.

    Reference:
        Guo et al., "On Calibration of Modern Neural Networks", ICML 2017.
    """
    reader = Reader("maximum_calibration_error", probs=probs, task=task, ignore_index=ignore_index)
    return _over_bins(lambda curve: curve.calibration_error("max"), preds, target, n_bins, confidence, reader, average)


def root_mean_square_calibration_error(
    preds: Tensor,
    target: Tensor,
    *,
    n_bins: int = 15,
    debias: bool = False,
    confidence: Confidence = "top",
    probs: bool = False,
    task: Task = "multiclass",
    ignore_index: int | None = None,
    average: LabelAverage = "macro",
) -> Tensor:
    """Root-mean-square calibration error: the root of the mean squared gap over equal-width bins.

    Arguments, result and errors as :func:`expected_calibration_error`, and:

    Args:
        preds: Logits or probabilities.
        target: True class indices.
        n_bins: Number of bins.
        debias: Whether to subtract the error that chance gives a calibrated network; see
            :meth:`~.reliability.ReliabilityCurve.calibration_error`.
        confidence: Which confidence.
        probs: Whether preds are probabilities.
        task: Kind of output.
        ignore_index: Target value to leave out.
        average: Over labels.

    Reference:
        Kumar, Liang and Ma, "Verified Uncertainty Calibration", NeurIPS 2019.
    """
    reader = Reader("root_mean_square_calibration_error", probs=probs, task=task, ignore_index=ignore_index)
    return _over_bins(
        lambda curve: curve.calibration_error("l2", debias=debias), preds, target, n_bins, confidence, reader, average
    )


def overconfidence_error(
    preds: Tensor,
    target: Tensor,
    *,
    n_bins: int = 15,
    confidence: Confidence = "top",
    probs: bool = False,
    task: Task = "multiclass",
    ignore_index: int | None = None,
    average: LabelAverage = "macro",
) -> Tensor:
    r"""Overconfidence error: gaps of bins that are too sure, weighted by their confidence.

    :math:`\sum_b \frac{n_b}{N}\, \mathrm{conf}_b \max(\mathrm{conf}_b - \mathrm{acc}_b, 0)`. Arguments, result and
    errors as :func:`expected_calibration_error`.

    Reference:
        Thulasidasan et al., "On Mixup Training: Improved Calibration and Predictive Uncertainty", NeurIPS 2019.
    """
    reader = Reader("overconfidence_error", probs=probs, task=task, ignore_index=ignore_index)
    return _over_bins(_overconfidence, preds, target, n_bins, confidence, reader, average)


def adaptive_calibration_error(
    preds: Tensor,
    target: Tensor,
    *,
    n_bins: int = 15,
    norm: Norm = "l1",
    debias: bool = False,
    confidence: Confidence = "top",
    probs: bool = False,
    task: Task = "multiclass",
    ignore_index: int | None = None,
    average: LabelAverage = "macro",
) -> Tensor:
    """Adaptive calibration error: the mean gap over bins of equal mass.

    Each bin holds exactly N / n_bins rows: a row at a boundary is shared by two bins, and rows of equal confidence are
    shared alike. The result does not depend on the order of the rows, and is defined for any N, also below ``n_bins``.

    Arguments, result and errors as :func:`expected_calibration_error`, and:

    Args:
        preds: Logits or probabilities.
        target: True class indices.
        n_bins: Number of bins.
        norm: See :meth:`~.reliability.ReliabilityCurve.calibration_error`, also for the errors it raises.
        debias: See there.
        confidence: Which confidence.
        probs: Whether preds are probabilities.
        task: Kind of output.
        ignore_index: Target value to leave out.
        average: Over labels.

    Reference:
        Nguyen and O'Connor, "Posterior calibration and exploratory analysis for NLP models", EMNLP 2015; Nixon et al.,
        "Measuring Calibration in Deep Learning", 2019, who do so for every class.
    """
    check_norm(norm, debias=debias)
    n_bins = checked_bins(n_bins)
    reader = Reader("adaptive_calibration_error", probs=probs, task=task, ignore_index=ignore_index)

    def error(preds: Tensor, target: Tensor, reader: Reader) -> Tensor:
        sums = value_sums(*confidences(preds, target, confidence, reader))
        return _equal_mass_curve(sums, n_bins).calibration_error(norm, debias=debias)

    return over_labels(error, preds, target, reader, average)


class ExpectedCalibrationError(ConfidenceMetric):
    """Streaming :func:`expected_calibration_error`, exact."""

    def value(self, sums: Tensor) -> Tensor:
        """The error."""
        return ReliabilityCurve.from_sums(self.bins(sums)).calibration_error()


class MaximumCalibrationError(ConfidenceMetric):
    """Streaming :func:`maximum_calibration_error`, exact."""

    def value(self, sums: Tensor) -> Tensor:
        """The error."""
        return ReliabilityCurve.from_sums(self.bins(sums)).calibration_error("max")


class RootMeanSquareCalibrationError(ConfidenceMetric):
    """Streaming :func:`root_mean_square_calibration_error`, exact."""

    def __init__(self, n_bins: int = 15, *, debias: bool = False, **kwargs: Any) -> None:
        super().__init__(n_bins, **kwargs)
        self.debias = debias

    def value(self, sums: Tensor) -> Tensor:
        """The error."""
        return ReliabilityCurve.from_sums(self.bins(sums)).calibration_error("l2", debias=self.debias)


class OverconfidenceError(ConfidenceMetric):
    """Streaming :func:`overconfidence_error`, exact."""

    def value(self, sums: Tensor) -> Tensor:
        """The error."""
        return _overconfidence(ReliabilityCurve.from_sums(self.bins(sums)))


class AdaptiveCalibrationError(ConfidenceMetric):
    """Streaming :func:`adaptive_calibration_error`.

    Rows in one cell of the histogram are taken as equal, also where a boundary between two bins divides them, and so it
    differs from the function by at most what these few rows weigh; by less than 0.000001 for the 10,000 test images
    of a CIFAR-10 ResNet-20.
    """

    def __init__(self, n_bins: int = 15, *, norm: Norm = "l1", debias: bool = False, **kwargs: Any) -> None:
        super().__init__(n_bins, **kwargs)
        check_norm(norm, debias=debias)
        self.norm: Norm = norm
        self.debias = debias

    def value(self, sums: Tensor) -> Tensor:
        """The error."""
        return _equal_mass_curve(sums, self.n_bins).calibration_error(self.norm, debias=self.debias)


def _over_bins(
    error: Callable[[ReliabilityCurve], Tensor],
    preds: Tensor,
    target: Tensor,
    n_bins: int,
    confidence: Confidence,
    reader: Reader,
    average: LabelAverage,
) -> Tensor:
    def of_batch(preds: Tensor, target: Tensor, reader: Reader) -> Tensor:
        return error(binned_curve(preds, target, n_bins, confidence, reader))

    return over_labels(of_batch, preds, target, reader, average)


def _overconfidence(curve: ReliabilityCurve) -> Tensor:
    gap = curve.confidence * (curve.confidence - curve.accuracy).clamp(min=0)
    return torch.where(curve.counts > 0, gap * curve.counts, 0.0).sum() / curve.counts.sum()


def _equal_mass_curve(sums: Tensor, n_bins: int) -> ReliabilityCurve:
    return ReliabilityCurve.from_sums(equal_mass_sums(sums, n_bins))
