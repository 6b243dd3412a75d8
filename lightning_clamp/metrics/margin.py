"""The margin of a classifier and its exponential tail, which bounds the calibration error."""

import torch
from torch import Tensor

from lightning_clamp._checks import check_rows
from lightning_clamp.metrics.scoring_rules import MeanMetric


def margin(logits: Tensor, target: Tensor) -> Tensor:
    r"""True margin of each row, :math:`z_y - \max_{j \ne y} z_j`: positive where the prediction is right.

    Args:
        logits: Logits or log-probabilities (which differ by a constant), shape ``(N, C)``, float.
        target: True class indices, shape ``(N,)``, int64, in ``[0, C)``.

    Returns:
        Shape ``(N,)``, dtype of the logits.

    Reference:
        Morosini, Gjika, Poggio and Beneventano, "Too Sharp, Too Sure", 2026 (arXiv 2604.20614).
    """
    check_rows(logits, target, "logits")
    return class_margin(logits, target)


def exponential_margin_tail(logits: Tensor, target: Tensor) -> Tensor:
    r"""Mean of :math:`e^{-m}` over the rows, m the true margin: a sum dominated by the rows that are most wrong.

    The expected calibration error, for any bins, is at most C - 1 times this number.

    Args:
        logits: Logits or log-probabilities, shape ``(N, C)``, float.
        target: True class indices, shape ``(N,)``, int64, in ``[0, C)``.

    Returns:
        Scalar float64, positive, inf where a margin is below -709; nan without rows.

    Reference:
        Morosini et al., "Too Sharp, Too Sure", 2026 (arXiv 2604.20614), theorem 4.1.
    """
    check_rows(logits, target, "logits")
    return _tails(logits, target).mean()


class ExponentialMarginTail(MeanMetric):
    """Streaming :func:`exponential_margin_tail`."""

    def values(self, rows: Tensor, labels: Tensor) -> Tensor:
        """The tail per row."""
        return _tails(self.log_probs(rows), labels)


def class_margin(logits: Tensor, target: Tensor) -> Tensor:
    """:func:`margin` without its checks, and for positions too: ``(N, C, ...)`` and ``(N, ...)``."""
    index = target.unsqueeze(1)
    others = logits.scatter(1, index, -torch.inf)
    return logits.gather(1, index).squeeze(1) - others.amax(1)


def _tails(logits: Tensor, target: Tensor) -> Tensor:
    return class_margin(logits.double(), target).neg().exp()
