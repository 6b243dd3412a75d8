"""The margin of a classifier and its exponential tail, which bounds the calibration error."""

from functools import partial

import torch
from torch import Tensor

from lightning_clamp._checks import check_range
from lightning_clamp._rows import Task, checked_target
from lightning_clamp.metrics._labels import LabelAverage, over_labels
from lightning_clamp.metrics._reading import PredictedRows, Reader
from lightning_clamp.metrics.scoring_rules import MeanMetric, mean_over_rows


def class_margin(logits: Tensor, target: Tensor) -> Tensor:
    r"""True margin of each position, :math:`z_y - \max_{j \ne y} z_j`: positive where the prediction is right.

    It has gradients. Labels on an accelerator are not read, which would stall it: there torch's own assertion fails.

    Args:
        logits: Logits or log-probabilities (which differ by a constant), ``(N, C)`` or dense ``(N, C, ...)``, float.
        target: True class indices, ``(N,)`` or dense ``(N, ...)``, int64, in ``[0, C)``.

    Returns:
        Shape of the target, dtype of the logits.

    Raises:
        ValueError: If the shapes do not fit together, or a label is out of range.
        TypeError: If logits are not float, or the target holds no class indices.

    Reference:
        Morosini, Gjika, Poggio and Beneventano, "Too Sharp, Too Sure", 2026 (arXiv 2604.20614).
    """
    true, other = _true_and_other(logits, target)
    return (true - other).reshape(target.shape)


def _true_and_other(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """The logit of the label, and the largest of the others; see :func:`class_margin`."""
    labels = checked_target(logits, target, "multiclass")
    if labels.device.type == "cpu" and not torch.compiler.is_compiling():
        check_range(labels.flatten(), logits.shape[1])
    index = labels.unsqueeze(1)
    others = logits.scatter(1, index, -torch.inf)
    return logits.gather(1, index).squeeze(1), others.amax(1)


def exponential_margin_tail(
    preds: Tensor,
    target: Tensor,
    *,
    probs: bool = False,
    task: Task = "multiclass",
    ignore_index: int | None = None,
    average: LabelAverage = "macro",
) -> Tensor:
    r"""Mean of :math:`e^{-m}` over the rows, m the true margin: a sum dominated by the rows that are most wrong.

    The expected calibration error, for any bins, is at most C - 1 times this number. The margin is one of logits; of
    probabilities it is that of their logarithms, which differ from the logits by a constant.

    Arguments and errors as :func:`~.scoring_rules.negative_log_likelihood`.

    Returns:
        Scalar float64, positive, inf where a margin is below -709; nan without rows.

    Reference:
        Morosini et al., "Too Sharp, Too Sure", 2026 (arXiv 2604.20614), theorem 4.1.
    """
    reader = Reader("exponential_margin_tail", probs=probs, task=task, ignore_index=ignore_index)
    return over_labels(partial(mean_over_rows, _tails), preds, target, reader, average)


class ExponentialMarginTail(MeanMetric):
    """Streaming :func:`exponential_margin_tail`; in float32 inf where a margin is below -88."""

    def values(self, rows: PredictedRows) -> Tensor:
        """The tail per row."""
        return _tails(rows)


def _tails(rows: PredictedRows) -> Tensor:
    true, other = _true_and_other(rows.log_probs(), rows.target)
    return (other.double() - true.double()).exp()
