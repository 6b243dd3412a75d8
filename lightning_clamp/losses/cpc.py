"""Pairwise constraints on the classes: the label's class against each other one, and those among themselves."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_clamp._checks import check_at_least
from lightning_clamp._rows import Task
from lightning_clamp.losses._known_gradient import known_gradient
from lightning_clamp.losses._positions import Positions, Reduction, as_positions

_WHY_HARD = (
    "cpc_loss sets the label's class against each other one, and a target of probabilities names none: pass labels, or "
    "train with mbls_loss, which takes probabilities."
)


def cpc_loss(
    logits: Tensor,
    target: Tensor,
    *,
    lambda_bdc: float = 0.1,
    lambda_bec: float = 1.0,
    weight: Tensor | None = None,
    task: Task = "multiclass",
    ignore_index: int | None = None,
    reduction: Reduction = "mean",
    log_terms: dict[str, Tensor] | None = None,
) -> Tensor:
    r"""Calibration by pairwise constraints (CPC): cross-entropy, binary discrimination and binary exclusion.

    .. math:: \mathrm{CE} + \frac{\lambda_1}{K-1} \sum_{j \ne y} -\log\sigma(z_y - z_j)
        + \frac{\lambda_2}{(K-1)(K-2)} \sum_{j \ne k;\ j, k \ne y} -\tfrac12 \log\sigma(z_j - z_k)

    The last sum, over ordered pairs, draws the logits of the other classes together; with two classes there is none.
    The code of Liu et al. (CALS) also counts j = k, which adds :math:`\log(2) / (2K - 4)` to the value and nothing to
    the gradient. Memory grows with the classes, not with their pairs.

    Args:
        logits: Shape ``(N, C)`` or ``(N, C, ...)``, float; for ``task="binary"`` one logit per position.
        target: Class indices, shape ``(N,)`` or ``(N, ...)``, int64; for ``task="binary"`` 0 or 1 of any dtype.
        lambda_bdc: Weight of the discrimination, at least 0. 0.1 and 1 are the weights of Liu et al. (CALS).
        lambda_bec: Weight of the exclusion, at least 0.
        weight: As :func:`~lightning_clamp.losses.label_smoothing_loss`; the constraints are not weighted.
        task: ``"multiclass"``, ``"binary"`` for a one-logit (sigmoid) head, or ``"multilabel"`` for one per label.
        ignore_index: Target value of positions to leave out.
        reduction: ``"mean"`` over the positions that count (0 if there are none), ``"sum"``, or ``"none"``.
        log_terms: A dict that is given ``cross_entropy``, ``discrimination`` and ``exclusion`` (before the weights).

    Returns:
        A scalar, or the shape of the target; float32, or float64 for float64 logits.

    Raises:
        TypeError: As :func:`~lightning_clamp.losses.label_smoothing_loss`.
        ValueError: As :func:`~lightning_clamp.losses.label_smoothing_loss`.

    Reference:
        Cheng and Vasconcelos, "Calibrating Deep Neural Networks by Pairwise Constraints", CVPR 2022.
    """
    check_at_least("lambda_bdc", lambda_bdc, 0)
    check_at_least("lambda_bec", lambda_bec, 0)
    positions = as_positions(
        logits, target, task=task, ignore_index=ignore_index, reduction=reduction, weight=weight, why_hard=_WHY_HARD
    )
    discrimination, exclusion = _discrimination(positions), _exclusion(positions)
    constraints = lambda_bdc * discrimination + lambda_bec * exclusion
    return positions.reduced_with(constraints, reduction, log_terms, discrimination=discrimination, exclusion=exclusion)


def _discrimination(positions: Positions) -> Tensor:
    """Mean over the other classes of their cross-entropy with the label's, shape of the target."""
    lead = positions.logits.gather(1, positions.target.unsqueeze(1)) - positions.logits
    # The label's own distance is 0 and has no gradient: log(2) too much.
    return -(F.logsigmoid(lead).sum(1) + math.log(2)) / (lead.shape[1] - 1)


def _exclusion(positions: Positions) -> Tensor:
    """Mean over the pairs of other classes, shape of the target; 0 with two classes."""
    classes = positions.logits.shape[1]
    if classes == 2:
        return torch.zeros_like(positions.logits[:, 0])
    others = torch.ones_like(positions.logits).scatter(1, positions.target.unsqueeze(1), 0)
    total = known_gradient(positions.logits, *_pair_sum(positions.logits, others), "cpc_loss")
    return total / ((classes - 1) * (classes - 2))


@torch.no_grad()
def _pair_sum(logits: Tensor, marks: Tensor) -> tuple[Tensor, Tensor]:
    r"""Sum of :math:`-\frac12 \log\sigma(z_j - z_k)` over ordered pairs of marked classes, and its gradient.

    A class at a time: autograd would keep what the gradient needs of every pair, the square of the classes.
    """
    value, gradient = torch.zeros_like(logits[:, 0]), torch.zeros_like(logits)
    for k in range(logits.shape[1]):
        distance, mark = logits - logits[:, k : k + 1], marks[:, k : k + 1]
        # The mean of both orders of a pair; a class with itself has log(2) / 2.
        value -= ((F.logsigmoid(distance) - distance / 2) * marks * mark).sum(1) / 2 + math.log(2) / 2 * mark[:, 0]
        gradient += (distance.sigmoid() - 0.5) * marks * mark
    return value, gradient
