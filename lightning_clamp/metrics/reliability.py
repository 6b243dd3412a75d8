"""The reliability curve: confidence and accuracy bin by bin, and the errors it gives."""

from typing import Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from lightning_clamp._rows import Task
from lightning_clamp.metrics._binning import bin_sums, checked_bins
from lightning_clamp.metrics._confidence import Confidence, confidences
from lightning_clamp.metrics._reading import Reader

Norm: TypeAlias = Literal["l1", "l2", "max"]
NORMS: tuple[Norm, ...] = ("l1", "l2", "max")

# Counts of equal-mass bins are sums of fractions.
_ROUNDING = 1e-6
# 97.5 % quantile of the normal distribution: intervals of 95 %.
_Z = 1.959963984540054


class ReliabilityCurve(NamedTuple):
    """Per bin: how sure the network was, and how often it was right.

    Attributes:
        confidence: Mean confidence, ``(n_bins,)``, float64; nan in empty bins.
        accuracy: Fraction right, ``(n_bins,)``, float64; nan in empty bins.
        counts: Rows in the bin, ``(n_bins,)``, float64.
        lower: Lower end of the 95 % interval of the accuracy (binomial, Wilson 1927), ``(n_bins,)``, float64; nan in
            empty bins. It takes rows as independent, which the pixels of an image are not.
        upper: Upper end of the same.
    """

    confidence: Tensor
    accuracy: Tensor
    counts: Tensor
    lower: Tensor
    upper: Tensor

    @classmethod
    def from_sums(cls, sums: Tensor) -> "ReliabilityCurve":
        """The curve of sums ``(3, n_bins)``: count, summed confidence and number right per bin."""
        count, confidence, correct = sums.unbind()
        accuracy = correct / count
        centre = (accuracy + _Z**2 / (2 * count)) / (1 + _Z**2 / count)
        spread = (accuracy * (1 - accuracy) / count + (_Z / (2 * count)) ** 2).sqrt() * _Z / (1 + _Z**2 / count)
        # Clamped, since at accuracy 0 or 1 the end of the interval is 0 or 1 up to rounding.
        return cls(
            confidence / count, accuracy, count.clone(), (centre - spread).clamp(0, 1), (centre + spread).clamp(0, 1)
        )

    def calibration_error(self, norm: Norm = "l1", *, debias: bool = False) -> Tensor:
        r"""The gap between confidence and accuracy over all bins, weighted by their counts.

        Args:
            norm: ``"l1"``, the mean absolute gap; ``"l2"``, the root of the mean squared gap; ``"max"``, the largest.
            debias: For ``"l2"``: subtract from each squared gap the part that chance brings into a calibrated bin,
                :math:`a (1 - a) / (n - 1)` with accuracy a and count n, and leave out bins of fewer than 2 rows; what
                is left may not fall below 0.

        Returns:
            Scalar float64 in ``[0, 1]``; nan if all bins are empty.

        Raises:
            ValueError: If ``norm`` is unknown, or ``debias`` is asked for another norm than ``"l2"``.

        Reference:
            Guo et al., "On Calibration of Modern Neural Networks", ICML 2017; for the debiased estimate Kumar, Liang
            and Ma, "Verified Uncertainty Calibration", NeurIPS 2019.
        """
        check_norm(norm, debias=debias)
        weight = self.counts / self.counts.sum()
        gap = torch.where(self.counts > 0, (self.confidence - self.accuracy).abs(), 0.0)
        if norm == "l1":
            return (gap * weight).sum()
        if norm == "max":
            # Times 1, or nan where nothing was counted.
            return gap.max() * weight.sum()
        squared = gap.square()
        if debias:
            by_chance = self.accuracy * (1 - self.accuracy) / (self.counts - 1)
            squared = torch.where(self.counts < 2 - _ROUNDING, 0.0, squared - by_chance)
        return (squared * weight).sum().clamp(min=0).sqrt()


class PositiveClassCurve(ReliabilityCurve):
    """A curve of the probability of class 1, and how often class 1 occurs: ``confidence="positive"``.

    The numbers are laid out alike; only a picture calls them by other names.
    """

    __slots__ = ()


def curve_of(sums: Tensor, confidence: Confidence) -> ReliabilityCurve:
    """The curve of sums ``(3, n_bins)`` of either confidence."""
    return (PositiveClassCurve if confidence == "positive" else ReliabilityCurve).from_sums(sums)


def check_norm(norm: Norm, *, debias: bool) -> None:
    """Refuse what :meth:`ReliabilityCurve.calibration_error` cannot compute."""
    if norm not in NORMS:
        raise ValueError(f"`norm` must be one of {NORMS}, got {norm!r}.")
    if debias and norm != "l2":
        raise ValueError(f"`debias` is known for norm='l2' only, got norm={norm!r}.")


def reliability_curve(
    preds: Tensor,
    target: Tensor,
    *,
    n_bins: int = 15,
    confidence: Confidence = "top",
    probs: bool = False,
    task: Task = "multiclass",
    ignore_index: int | None = None,
) -> ReliabilityCurve:
    """Mean confidence and accuracy over equal-width bins of the confidence.

    Bins are ``(i/n, (i+1)/n]``; confidence 0 falls in the first, 1 in the last.

    Args:
        preds: Logits, or probabilities if ``probs``: ``(N, C)``, dense ``(N, C, ...)``, or one value per position for
            ``task="binary"``; float.
        target: True class indices, ``(N,)`` or dense ``(N, ...)``, int64, in ``[0, C)``.
        n_bins: Number of bins, at least 1.
        confidence: ``"top"``, the largest probability and how often it is at the target; or ``"positive"``
            (``task="binary"`` only), the probability of class 1 and how often it is the target.
        probs: Whether preds are probabilities; it is never guessed.
        task: ``"multiclass"`` or ``"binary"``.
        ignore_index: Target value of positions to leave out.

    Raises:
        ValueError: If an option is out of range, preds hold nan or, with ``probs``, no probabilities, labels are out of
            range, or shapes do not fit together.
        TypeError: If preds are not float, or the target holds no class indices.
    """
    reader = Reader("reliability_curve", probs=probs, task=task, ignore_index=ignore_index)
    return binned_curve(preds, target, n_bins, confidence, reader)


def binned_curve(
    preds: Tensor, target: Tensor, n_bins: int, confidence: Confidence, reader: Reader
) -> ReliabilityCurve:
    """:func:`reliability_curve` of what a reader reads."""
    n_bins = checked_bins(n_bins)
    return curve_of(bin_sums(*confidences(preds, target, confidence, reader), n_bins), confidence)
