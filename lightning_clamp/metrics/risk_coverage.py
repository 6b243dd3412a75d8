"""The risk-coverage curve: how often a network errs that answers only where it is sure enough."""

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_clamp._rows import Task
from lightning_clamp.metrics._binning import value_sums
from lightning_clamp.metrics._confidence import confidences
from lightning_clamp.metrics._reading import Reader

# A coverage of 0.07 of 100 rows is 7 rows, though 0.07 * 100 is more than 7 in floating point.
_ROUNDING = 1e-6


class RiskCoverageCurve(NamedTuple):
    """Answers and errors of a network that abstains below a threshold, from the highest threshold to none.

    Rows of equal confidence are answered together; where a number of rows divides them, it is the average over their
    orders that counts, so that the order of the data plays no part. In the curve of a metric, rows in one cell of its
    histogram count as equal. Without rows, K is 1 and everything nan.

    Attributes:
        threshold: Confidence from which on it answers, ``(K,)``, float64, falling to 0. It lies midway between the
            least confidence that is answered and the next one.
        answered: Rows that are answered, ``(K,)``, float64, rising to all.
        errors: How many of these are wrong, ``(K,)``, float64.
    """

    threshold: Tensor
    answered: Tensor
    errors: Tensor

    @classmethod
    def from_sums(cls, sums: Tensor) -> "RiskCoverageCurve":
        """The curve of groups ``(3, groups)`` in the order of confidence: count, summed confidence, number right."""
        sums = sums[:, sums[0] > 0].flip(1)
        if not sums.shape[1]:
            return cls(*sums.new_full((3, 1), torch.nan))
        count, confidence, correct = sums
        mean = confidence / count
        # Rows whose confidence is nan have no place in the order, and make everything nan.
        count = count + 0 * mean
        threshold = torch.cat([(mean[:-1] + mean[1:]) / 2, 0 * count.sum(0, keepdim=True)])
        return cls(threshold, count.cumsum(0), (count - correct).cumsum(0))

    @property
    def coverage(self) -> Tensor:
        """Share of the rows that are answered, ``(K,)``, float64."""
        answered = self.answered.reshape(-1)
        return answered / answered[-1]

    @property
    def risk(self) -> Tensor:
        """Share of the answers that are wrong, ``(K,)``, float64."""
        return (self.errors / self.answered).reshape(-1)

    @property
    def accuracy(self) -> Tensor:
        """Share of the answers that are right, ``(K,)``, float64."""
        # Of two whole numbers: 1 - 0.8 is less than 0.2.
        return ((self.answered - self.errors) / self.answered).reshape(-1)

    def area(self, *, excess: bool = False, generalized: bool = False) -> Tensor:
        """Area under the curve; see :func:`area_under_risk_coverage`. Scalar float64, nan without rows."""
        # Of a single point, torchmetrics makes the fields scalars.
        answered, errors = self.answered.reshape(-1), self.errors.reshape(-1)
        area = _area(answered, errors, generalized=generalized)
        if not excess:
            return area
        total, wrong = answered[-1], errors[-1]
        best = _area(torch.stack([total - wrong, total]), torch.stack([0 * wrong, wrong]), generalized=generalized)
        return (area - best).clamp(min=0)

    def accuracy_at(self, coverage: float) -> Tensor:
        """Accuracy over the most confident rows; see :func:`accuracy_at_coverage`. Scalar float64, nan without rows.

        Raises:
            ValueError: If ``coverage`` is not in (0, 1].
        """
        check_share("coverage", coverage)
        answered, errors = self.answered.reshape(-1), self.errors.reshape(-1)
        rows = (coverage * answered[-1] - _ROUNDING).ceil().clamp(min=1)
        end = torch.searchsorted(answered, rows).clamp(max=len(answered) - 1)
        share = (answered[end] - rows) / (answered - _before(answered))[end]
        return 1 - torch.lerp(errors[end], _before(errors)[end], share) / rows

    def coverage_at(self, accuracy: float) -> Tensor:
        """Largest coverage at an accuracy; see :func:`coverage_at_accuracy`. Scalar float64, nan without rows.

        Raises:
            ValueError: If ``accuracy`` is not in (0, 1].
        """
        check_share("accuracy", accuracy)
        return torch.where(self.accuracy < accuracy, 0.0, self.coverage).max()

    def threshold_at(self, accuracy: float) -> Tensor:
        """The threshold of :meth:`coverage_at`: who answers where the confidence exceeds it is right that often.

        Returns:
            Scalar float64; inf if no threshold will do, nan without rows.

        Raises:
            ValueError: If ``accuracy`` is not in (0, 1].
        """
        check_share("accuracy", accuracy)
        return torch.where(self.accuracy < accuracy, torch.inf, self.threshold.reshape(-1)).min()


def risk_coverage_curve(
    preds: Tensor,
    target: Tensor,
    *,
    probs: bool = False,
    task: Task = "multiclass",
    ignore_index: int | None = None,
) -> RiskCoverageCurve:
    """Answers and errors of a network that abstains where the largest probability is below a threshold.

    Args:
        preds: Logits, or probabilities if ``probs``: ``(N, C)``, dense ``(N, C, ...)``, or one value per position for
            ``task="binary"``; float.
        target: True class indices, ``(N,)`` or dense ``(N, ...)``, int64, in ``[0, C)``.
        probs: Whether preds are probabilities; it is never guessed.
        task: ``"multiclass"`` or ``"binary"``.
        ignore_index: Target value of positions to leave out.

    Raises:
        ValueError: If preds hold nan or, with ``probs``, no probabilities, labels are out of range, or shapes do not
            fit together.
        TypeError: If preds are not float, or the target holds no class indices.

    Reference:
        El-Yaniv and Wiener, "On the Foundations of Noise-free Selective Classification", JMLR 2010; Geifman and
        El-Yaniv, "Selective Classification for Deep Neural Networks", NeurIPS 2017.
    """
    reader = Reader("risk_coverage_curve", probs=probs, task=task, ignore_index=ignore_index)
    return curve_of(preds, target, reader)


def curve_of(preds: Tensor, target: Tensor, reader: Reader) -> RiskCoverageCurve:
    """:func:`risk_coverage_curve` of what a reader reads."""
    return RiskCoverageCurve.from_sums(value_sums(*confidences(preds, target, "top", reader)))


def check_share(name: str, value: float) -> None:
    """Refuse a share of nothing, of more than all, or in percent."""
    if not 0 < value <= 1:
        raise ValueError(f"`{name}` must lie in (0, 1], got {value}: it is a fraction, not percent.")


def _before(cumulative: Tensor) -> Tensor:
    return torch.cat([torch.zeros_like(cumulative[:1]), cumulative[:-1]])


def _area(answered: Tensor, errors: Tensor, *, generalized: bool) -> Tensor:
    """Mean over k = 1 ... N of the errors among the first k rows, over k, or over N if ``generalized``.

    Within a group of m rows with e errors, the average order has e j / m errors among its first j. With n rows and E
    errors before it, the group's part of the sum of (E + e j / m) / (n + j) is e + (E - n e / m)(H(n + m) - H(n)), in
    harmonic numbers H, which are differences of the digamma function.
    """
    n, earlier = _before(answered), _before(errors)
    m, e = answered - n, errors - earlier
    if generalized:
        return (m * earlier + e * (m + 1) / 2).sum() / answered[-1] ** 2
    slope = torch.where(m == 0, 0.0, e / m)
    harmonic = torch.digamma(answered + 1) - torch.digamma(n + 1)
    return (e + (earlier - n * slope) * harmonic).sum() / answered[-1]
