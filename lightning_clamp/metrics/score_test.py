"""Does it still hold? Tests whether probabilities are calibrated, from labelled data alone."""

from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_clamp._rows import Rows, Task, item_blocks
from lightning_clamp.metrics._base import RowMetric
from lightning_clamp.metrics._labels import LabelAverage
from lightning_clamp.metrics._reading import PredictedRows, Reader
from lightning_clamp.metrics._tails import holm, p_of_independent, p_of_items
from lightning_clamp.metrics.evidence import CalibrationEvidence

# Temperatures, relative to the one that holds, at which the slope of the loss is summed: a quarter to four times.
LADDER = tuple(2.0 ** (step / 2) for step in range(-4, 5))
# Stands for the logarithm of a probability of 0, so that their product is 0.
_LEAST_LOG = -1e5


def calibration_test(
    preds: Tensor,
    target: Tensor,
    *,
    probs: bool = False,
    task: Task = "multiclass",
    ignore_index: int | None = None,
) -> CalibrationEvidence:
    r"""Test whether probabilities are calibrated: that labels are as if they had been drawn from them.

    Three scores have mean zero then, whatever the inputs are: the temperature's, :math:`\sum_i \log p_{i y_i} -
    \sum_k p_{ik} \log p_{ik}` (the slope of the loss in 1/T at T = 1); the bias of each class,
    :math:`\sum_i 1[y_i = k] - p_{ik}`; and Spiegelhalter's, the Brier score minus that which the probabilities expect.
    Each is held against its variance. With one row per item this is the Fisher information, and the skewness is taken
    off. With several (pixels), which may be correlated, the items' sums are the terms, and it is the sum of their
    squares (Student's t test). The classes' p-values are corrected for being many by Holm's method.

    Calibrated probabilities give p-values that are uniform on [0, 1]; the smallest of the classes' is at least that.

    Args:
        preds: Logits, or probabilities if ``probs``: ``(N, C)``, dense ``(N, C, ...)``, or one value per position for
            ``task="binary"``; float. Of data that served no fit.
        target: True class indices, ``(N,)`` or dense ``(N, ...)``, int64, in ``[0, C)``.
        probs: Whether preds are probabilities; it is never guessed.
        task: ``"multiclass"`` or ``"binary"``.
        ignore_index: Target value of positions to leave out.

    Returns:
        The p-values, and what would be better; printed, one sentence. A p-value is nan where there are too few rows to
        say.

    Raises:
        ValueError: If preds hold nan or, with ``probs``, no probabilities, labels are out of range, or shapes do not
            fit together.
        TypeError: If preds are not float, or the target holds no class indices.

    Reference:
        Spiegelhalter, "Probabilistic prediction in patient management and clinical trials", Statistics in Medicine
        1986; Cox, "Two further applications of a model for binary regression", Biometrika 1958.
    """
    reader = Reader("calibration_test", probs=probs, task=task, ignore_index=ignore_index)
    parts = [
        _sums(batch, reader.rows(batch.logits, batch.target))
        for batch in item_blocks(preds, target, task=task, ignore_index=ignore_index)
    ]
    sums = torch.stack(parts).sum(0)
    reader.warn_unless(bool(sums[0]))
    return _evidence(sums)


class CalibrationTest(RowMetric):
    """Streaming :func:`calibration_test`; its state takes 32 KB for C = 1,000: four sums per class, no matrix.

    Args:
        num_classes: Number of classes; 2 for ``task="binary"`` and ``"multilabel"``.
        **kwargs: Further arguments of :class:`~._base.RowMetric`.
    """

    # Of several labels, whose entries are correlated within an item, all entries.
    averages: ClassVar[tuple[LabelAverage, ...]] = ("micro",)

    def __init__(self, num_classes: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if num_classes < 2:
            raise ValueError(f"`num_classes` must be at least 2, got {num_classes}.")
        self.num_classes = num_classes
        self.add_sums("calibration_test", _size(num_classes))

    def add_batch(self, preds: Tensor, target: Tensor) -> None:
        """Add a batch by its items, in place."""
        device = self.sums.device
        for batch in item_blocks(preds, target, task=self.reader.task, ignore_index=self.reader.ignore_index):
            rows = self.reader.rows(batch.logits, batch.target, device)
            if rows.preds.shape[1] != self.num_classes:
                raise ValueError(f"`num_classes` is {self.num_classes}, but preds have {rows.preds.shape[1]} classes.")
            self.sums.add_(_sums(batch._replace(item=batch.item.to(device)), rows))

    def value(self, sums: Tensor) -> CalibrationEvidence:
        """The evidence."""
        return _evidence(sums)

    def numbers(self, value: CalibrationEvidence) -> dict[str, Tensor]:
        """The p-values."""
        return {name: torch.tensor(number) for name, number in value.scalars().items()}


def _size(num_classes: int) -> int:
    return 2 + 2 * len(LADDER) + 4 * (2 + num_classes)


def _sums(batch: Rows, rows: PredictedRows) -> Tensor:
    """Items and rows, slopes and information along the ladder, and four sums of each score, as one float64 vector.

    The scores are the temperature's, Spiegelhalter's and the classes'; the sums are those of the scores, their
    variances, their third moments, and of the squares of the items' sums.
    """
    log_probs = rows.log_probs().clamp(min=_LEAST_LOG)
    probs = log_probs.exp()
    target = rows.target[:, None]
    columns = [_score(probs, log_probs, target), _score(probs, probs, target), _class_scores(probs, target)]
    scores, *others = zip(*columns, strict=True)
    score = torch.cat(scores, 1).double()
    variance, third = (torch.cat([part.sum(0, dtype=torch.float64) for part in parts]) for parts in others)
    rows.check(score[:, 0])
    of_item = batch.per_item(score)
    ladder = [_slope(log_probs, target, temperature) for temperature in LADDER]
    of_items = batch.per_item(score.new_ones(len(score)))
    counts = torch.stack([(of_items > 0).sum(dtype=torch.float64), of_items.sum()])
    moments = torch.stack([score.sum(0), variance, third, of_item.square().sum(0)])
    return torch.cat([counts, torch.stack(ladder).T.flatten(), moments.flatten()])


def _score(probs: Tensor, weights: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A weight at the target minus its expectation, per row, with its variance and third moment; ``(m, 1)`` each."""
    distance, weighted = _deviations(probs, weights)
    return distance.gather(1, target), weighted.sum(1, keepdim=True), (weighted * distance).sum(1, keepdim=True)


def _deviations(probs: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Each class's weight minus the expected one, and its square times the probability; ``(m, C)``."""
    distance = weights - (probs * weights).sum(1, keepdim=True)
    return distance, probs * distance.square()


def _class_scores(probs: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same of being each class, ``(m, C)``."""
    score = (-probs).scatter_add(1, target, torch.ones_like(probs[:, :1]))
    variance = probs * (1 - probs)
    return score, variance, variance * (1 - 2 * probs)


def _slope(log_probs: Tensor, target: Tensor, temperature: float) -> Tensor:
    """The temperature's score and its variance at another temperature, summed over the rows, ``(2,)`` float64."""
    distance, weighted = _deviations((log_probs / temperature).softmax(1), log_probs)
    return torch.stack([distance.gather(1, target).sum(dtype=torch.float64), weighted.sum(dtype=torch.float64)])


def _evidence(sums: Tensor) -> CalibrationEvidence:
    counts, ladder, moments = sums.tensor_split([2, 2 + 2 * len(LADDER)])
    n_items, n_rows = counts
    score, variance, third, squares = moments.view(4, -1)
    correlated = bool(n_rows > n_items)
    p = p_of_items(score, squares, n_items) if correlated else p_of_independent(score, variance, third)
    classes = p[2:]
    # Of two classes one is what the other is not.
    corrected = holm(classes) if len(classes) > 2 else classes
    return CalibrationEvidence(
        n_samples=n_items.clone(),
        p_temperature=p[0],
        p_spiegelhalter=p[1],
        p_classes=corrected,
        temperature=_best_temperature(*ladder.view(2, -1)),
        brier_excess=-2 * score[1] / n_rows,
        class_excess=score[2:].where(n_rows > 0, torch.nan),
    )


def _best_temperature(slope: Tensor, information: Tensor) -> Tensor:
    """The temperature at which the slope is 0, between two of the ladder by a cubic through slopes and curvatures.

    Right to half a percent; an end of the ladder where it lies beyond.
    """
    log_scale = -torch.tensor(LADDER, dtype=torch.float64, device=slope.device).log()
    # The loss is convex in 1/T: the slope in it, which the score is, rises along the ladder.
    right = int((slope < 0).sum())
    if slope.isnan().any() or not slope.any():
        return torch.full_like(slope[0], torch.nan)
    if right in (0, len(LADDER)):
        return (-log_scale[min(right, len(LADDER) - 1)]).exp()
    pair = slice(right - 1, right + 1)
    (x0, x1), (y0, y1) = slope[pair], log_scale[pair]
    d0, d1 = -(x1 - x0) / (information[pair] * log_scale[pair].exp())
    t = -x0 / (x1 - x0)
    root = y0 * (1 + 2 * t) * (1 - t) ** 2 + d0 * t * (1 - t) ** 2 + y1 * t**2 * (3 - 2 * t) - d1 * t**2 * (1 - t)
    best: Tensor = (-root).exp()
    return best
