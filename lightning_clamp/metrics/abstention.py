"""When to abstain: the area under the risk-coverage curve, and its points that an application asks for."""

from typing import Any

from torch import Tensor

from lightning_clamp._rows import Task
from lightning_clamp.metrics._confidence import ConfidenceMetric
from lightning_clamp.metrics._labels import LabelAverage, over_labels
from lightning_clamp.metrics._reading import Reader
from lightning_clamp.metrics.risk_coverage import RiskCoverageCurve, check_share, curve_of


def area_under_risk_coverage(
    preds: Tensor,
    target: Tensor,
    *,
    excess: bool = False,
    generalized: bool = False,
    probs: bool = False,
    task: Task = "multiclass",
    ignore_index: int | None = None,
    average: LabelAverage = "macro",
) -> Tensor:
    r"""Area under the risk-coverage curve (AURC): the error rate of the surest k of N rows, averaged over all k.

    :math:`\frac1N \sum_{k=1}^N \frac{e_k}{k}`, where :math:`e_k` are the errors among the k rows of the largest
    confidence. Of rows of equal confidence it is the average over their orders, exactly. Lower is better; a confidence
    that says nothing of correctness has the error rate itself.

    Args:
        preds: Logits, or probabilities if ``probs``: ``(N, C)``, dense ``(N, C, ...)``, or one value per position for
            ``task="binary"``; float.
        target: True class indices, ``(N,)`` or dense ``(N, ...)``, int64, in ``[0, C)``.
        excess: Subtract the area of the best order, in which all rows that are right come before all that are wrong
            (E-AURC). What is left is the ranking's share alone.
        generalized: Divide :math:`e_k` by N instead of k (AUGRC): the share of rows that are answered and wrong. The
            surest rows, over which the AURC divides by small k, then weigh no more than others.
        probs: Whether preds are probabilities; it is never guessed.
        task: ``"multiclass"``, ``"binary"`` or ``"multilabel"``; see :class:`~._base.RowMetric`.
        ignore_index: Target value of positions to leave out.
        average: For ``task="multilabel"``; see :class:`~._base.RowMetric`.

    Returns:
        Scalar float64 in ``[0, 1]`` (a fraction, not percent); nan without rows.

    Raises:
        ValueError: If preds hold nan or, with ``probs``, no probabilities, labels are out of range, or shapes do not
            fit together.
        TypeError: If preds are not float, or the target holds no class indices.

    Example:
        >>> import torch
        >>> probs = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3]])
        >>> area_under_risk_coverage(probs, torch.tensor([0, 1, 0]), probs=True).round(decimals=4)
        tensor(0.2778, dtype=torch.float64)

    Reference:
        Geifman, Uziel and El-Yaniv, "Bias-Reduced Uncertainty Estimation for Deep Neural Classifiers", ICLR 2019;
        generalized: Traub et al., "Overcoming Common Flaws in the Evaluation of Selective Classification Systems",
        NeurIPS 2024.
    """
    reader = Reader("area_under_risk_coverage", probs=probs, task=task, ignore_index=ignore_index)
    return over_labels(
        lambda *batch: curve_of(*batch).area(excess=excess, generalized=generalized), preds, target, reader, average
    )


def accuracy_at_coverage(
    preds: Tensor,
    target: Tensor,
    *,
    coverage: float = 0.8,
    probs: bool = False,
    task: Task = "multiclass",
    ignore_index: int | None = None,
    average: LabelAverage = "macro",
) -> Tensor:
    """Accuracy of the surest part of the rows: what is right if the network abstains on the others.

    The part is the fewest rows that make up ``coverage``. Where it divides rows of equal confidence, it is the average
    over their orders. Arguments, result and errors as :func:`area_under_risk_coverage`, and:

    Args:
        preds: Logits or probabilities.
        target: True class indices.
        coverage: Share of the rows that are answered, in (0, 1].
        probs: Whether preds are probabilities.
        task: Kind of output.
        ignore_index: Target value to leave out.
        average: Over labels.

    Reference:
        Geifman and El-Yaniv, "SelectiveNet: A Deep Neural Network with an Integrated Reject Option", ICML 2019.
    """
    check_share("coverage", coverage)
    reader = Reader("accuracy_at_coverage", probs=probs, task=task, ignore_index=ignore_index)
    return over_labels(lambda *batch: curve_of(*batch).accuracy_at(coverage), preds, target, reader, average)


def coverage_at_accuracy(
    preds: Tensor,
    target: Tensor,
    *,
    accuracy: float = 0.95,
    probs: bool = False,
    task: Task = "multiclass",
    ignore_index: int | None = None,
    average: LabelAverage = "macro",
) -> Tensor:
    """The largest share of the rows that can be answered with this accuracy, by a threshold on the confidence.

    A threshold cannot divide rows of equal confidence. If none reaches the accuracy, the share is 0. Arguments, result
    and errors as :func:`area_under_risk_coverage`, and:

    Args:
        preds: Logits or probabilities.
        target: True class indices.
        accuracy: Least accuracy of what is answered, in (0, 1].
        probs: Whether preds are probabilities.
        task: Kind of output.
        ignore_index: Target value to leave out.
        average: Over labels.

    Reference:
        Geifman and El-Yaniv, "Selective Classification for Deep Neural Networks", NeurIPS 2017.
    """
    check_share("accuracy", accuracy)
    reader = Reader("coverage_at_accuracy", probs=probs, task=task, ignore_index=ignore_index)
    return over_labels(lambda *batch: curve_of(*batch).coverage_at(accuracy), preds, target, reader, average)


class SelectiveMetric(ConfidenceMetric):
    """A metric of the risk-coverage curve, computed from the histogram of the confidence.

    ``n_bins`` only lays out the state: metrics that agree in it share one in a ``MetricCollection``, also with
    :class:`~.calibration_error.ExpectedCalibrationError`.

    Args:
        n_bins: Number of equal-width bins, at least 1.
        **kwargs: Further arguments of :class:`~._base.RowMetric`.
    """

    def __init__(self, *, n_bins: int = 15, **kwargs: Any) -> None:
        super().__init__(n_bins, **kwargs)
        if self.confidence != "top":
            raise ValueError(
                "Who abstains goes by the probability of the predicted class: "
                f"{type(self).__name__} knows confidence='top' only, got {self.confidence!r}."
            )

    def curve(self, sums: Tensor) -> RiskCoverageCurve:
        """The curve of sums per cell."""
        return RiskCoverageCurve.from_sums(sums)


class AreaUnderRiskCoverage(SelectiveMetric):
    """Streaming :func:`area_under_risk_coverage`.

    Rows in one cell of the histogram count as equal, so that the average over their orders stands for the one they
    have.
    """

    def __init__(self, *, excess: bool = False, generalized: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.excess = excess
        self.generalized = generalized

    def value(self, sums: Tensor) -> Tensor:
        """The area."""
        return self.curve(sums).area(excess=self.excess, generalized=self.generalized)


class AccuracyAtCoverage(SelectiveMetric):
    """Streaming :func:`accuracy_at_coverage`, exact but for the cell of the histogram that the coverage divides."""

    higher_is_better = True

    def __init__(self, coverage: float = 0.8, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_share("coverage", coverage)
        self.coverage = coverage

    def value(self, sums: Tensor) -> Tensor:
        """The accuracy."""
        return self.curve(sums).accuracy_at(self.coverage)


class CoverageAtAccuracy(SelectiveMetric):
    """Streaming :func:`coverage_at_accuracy`, over the thresholds at the edges of the histogram's cells.

    These are fewer than all, so that the value is never above the function's.
    """

    higher_is_better = True

    def __init__(self, accuracy: float = 0.95, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_share("accuracy", accuracy)
        self.accuracy = accuracy

    def value(self, sums: Tensor) -> Tensor:
        """The coverage."""
        return self.curve(sums).coverage_at(self.accuracy)
