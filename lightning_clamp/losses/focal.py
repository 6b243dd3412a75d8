"""Losses that weigh or replace the cross-entropy of a row: focal, FLSD, dual focal, Brier."""

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_clamp._checks import check_at_least
from lightning_clamp._rows import Task
from lightning_clamp.losses._positions import Reduction, as_positions

# The bands of FLSD-53, by the probability of the target class.
_HARDEST, _HARDEST_GAMMA = 0.2, 5.0
_HARD, _HARD_GAMMA = 0.5, 3.0


def focal_loss(
    logits: Tensor,
    target: Tensor,
    *,
    gamma: float = 3.0,
    task: Task = "multiclass",
    ignore_index: int | None = None,
    reduction: Reduction = "mean",
    log_terms: dict[str, Tensor] | None = None,
) -> Tensor:
    r"""Focal loss, :math:`-(1 - p_y)^\gamma \log p_y`.

    Args:
        logits: Shape ``(N, C)`` or ``(N, C, ...)``, float; for ``task="binary"`` one logit per position.
        target: Class indices, shape ``(N,)`` or ``(N, ...)``, int64; for ``task="binary"`` 0 or 1 of any dtype.
        gamma: At least 0; 0 is the cross-entropy.
        task: ``"multiclass"``, or ``"binary"`` for a one-logit (sigmoid) head.
        ignore_index: Target value of positions to leave out.
        reduction: The official codes sum (torrvision) or take the mean (MDCA).
        log_terms: A dict that is given the mean ``cross_entropy``.

    Returns:
        A scalar, or the shape of the target; float32, or float64 for float64 logits.

    Raises:
        TypeError: As :func:`~lightning_clamp.losses.label_smoothing_loss`.
        ValueError: As :func:`~lightning_clamp.losses.label_smoothing_loss`.

    Reference:
        Lin et al., ICCV 2017; Mukhoti et al., "Calibrating Deep Neural Networks using Focal Loss", NeurIPS 2020.
    """
    check_at_least("gamma", gamma, 0)
    positions = as_positions(logits, target, task=task, ignore_index=ignore_index, reduction=reduction)
    cross_entropy = positions.cross_entropy()
    return positions.reduced(
        _focal(cross_entropy, 1 - torch.exp(-cross_entropy), gamma), reduction, log_terms, cross_entropy=cross_entropy
    )


def flsd_loss(
    logits: Tensor,
    target: Tensor,
    *,
    gamma: float = 3.0,
    task: Task = "multiclass",
    ignore_index: int | None = None,
    reduction: Reduction = "mean",
    log_terms: dict[str, Tensor] | None = None,
) -> Tensor:
    r"""Sample-dependent focal loss FLSD-53: exponent 5 where :math:`p_y < 0.2`, 3 up to 0.5, ``gamma`` from 0.5 on.

    Args:
        logits: Shape ``(N, C)`` or ``(N, C, ...)``, float; for ``task="binary"`` one logit per position.
        target: Class indices, shape ``(N,)`` or ``(N, ...)``, int64; for ``task="binary"`` 0 or 1 of any dtype.
        gamma: Exponent where the network is right and sure, at least 0. 3 is FLSD-53.
        task: ``"multiclass"``, or ``"binary"`` for a one-logit (sigmoid) head.
        ignore_index: Target value of positions to leave out.
        reduction: ``"mean"`` over the positions that count (0 if there are none), ``"sum"``, or ``"none"``.
        log_terms: A dict that is given the mean ``cross_entropy``.

    Returns:
        A scalar, or the shape of the target; float32, or float64 for float64 logits.

    Raises:
        TypeError: As :func:`~lightning_clamp.losses.label_smoothing_loss`.
        ValueError: As :func:`~lightning_clamp.losses.label_smoothing_loss`.

    Reference:
        Mukhoti et al., "Calibrating Deep Neural Networks using Focal Loss", NeurIPS 2020.
    """
    check_at_least("gamma", gamma, 0)
    positions = as_positions(logits, target, task=task, ignore_index=ignore_index, reduction=reduction)
    cross_entropy = positions.cross_entropy()
    return positions.reduced(_banded(cross_entropy, gamma), reduction, log_terms, cross_entropy=cross_entropy)


def dual_focal_loss(
    logits: Tensor,
    target: Tensor,
    *,
    gamma: float = 5.0,
    task: Task = "multiclass",
    ignore_index: int | None = None,
    reduction: Reduction = "mean",
    log_terms: dict[str, Tensor] | None = None,
) -> Tensor:
    r"""Dual focal loss, :math:`-(1 - p_y + p_j)^\gamma \log p_y`, with p_j the largest probability below p_y.

    Strictly below, and 0 if there is none: not the runner-up, as in the official code.

    Args:
        logits: Shape ``(N, C)`` or ``(N, C, ...)``, float; for ``task="binary"`` one logit per position.
        target: Class indices, shape ``(N,)`` or ``(N, ...)``, int64; for ``task="binary"`` 0 or 1 of any dtype.
        gamma: At least 0; 0 is the cross-entropy, and the official code's default. 5 is our choice.
        task: ``"multiclass"``, or ``"binary"`` for a one-logit (sigmoid) head.
        ignore_index: Target value of positions to leave out.
        reduction: ``"mean"`` over the positions that count (0 if there are none), ``"sum"``, or ``"none"``.
        log_terms: A dict that is given the mean ``cross_entropy``.

    Returns:
        A scalar, or the shape of the target; float32, or float64 for float64 logits.

    Raises:
        TypeError: As :func:`~lightning_clamp.losses.label_smoothing_loss`.
        ValueError: As :func:`~lightning_clamp.losses.label_smoothing_loss`.

    Reference:
        Tao, Dong and Xu, "Dual Focal Loss for Calibration", ICML 2023.
    """
    check_at_least("gamma", gamma, 0)
    positions = as_positions(logits, target, task=task, ignore_index=ignore_index, reduction=reduction)
    log_probs = F.log_softmax(positions.logits, 1)
    of_target = positions.of_target(log_probs)
    lower = log_probs.masked_fill(log_probs >= of_target.unsqueeze(1), -torch.inf).max(1).values.exp()
    return positions.reduced(
        _focal(-of_target, 1 - of_target.exp() + lower, gamma), reduction, log_terms, cross_entropy=-of_target
    )


def brier_loss(
    logits: Tensor,
    target: Tensor,
    *,
    task: Task = "multiclass",
    ignore_index: int | None = None,
    reduction: Reduction = "mean",
    log_terms: dict[str, Tensor] | None = None,
) -> Tensor:
    r"""Brier score as a loss, :math:`\sum_k (p_k - 1[k = y])^2`: a proper score that is bounded, in [0, 2].

    Args:
        logits: Shape ``(N, C)`` or ``(N, C, ...)``, float; for ``task="binary"`` one logit per position.
        target: Class indices, shape ``(N,)`` or ``(N, ...)``, int64; for ``task="binary"`` 0 or 1 of any dtype.
        task: ``"multiclass"``, or ``"binary"`` for a one-logit (sigmoid) head.
        ignore_index: Target value of positions to leave out.
        reduction: ``"mean"`` over the positions that count (0 if there are none), ``"sum"``, or ``"none"``.
        log_terms: A dict that is given the mean ``cross_entropy``.

    Returns:
        A scalar, or the shape of the target; float32, or float64 for float64 logits.

    Raises:
        TypeError: As :func:`~lightning_clamp.losses.label_smoothing_loss`.
        ValueError: As :func:`~lightning_clamp.losses.label_smoothing_loss`.

    Reference:
        Brier, 1950; as a loss in Mukhoti et al., NeurIPS 2020.
    """
    positions = as_positions(logits, target, task=task, ignore_index=ignore_index, reduction=reduction)
    probs = F.softmax(positions.logits, 1)
    score = probs.square().sum(1) - 2 * positions.of_target(probs) + 1
    terms = {} if log_terms is None else {"cross_entropy": positions.cross_entropy()}
    return positions.reduced(score, reduction, log_terms, **terms)


def _focal(cross_entropy: Tensor, doubt: Tensor, gamma: float) -> Tensor:
    """``doubt ** gamma * cross_entropy``; the slope of a power below 1 is infinite at doubt 0, hence the clamp."""
    return doubt.clamp_min(torch.finfo(doubt.dtype).tiny).pow(gamma) * cross_entropy


def _banded(cross_entropy: Tensor, gamma: float) -> Tensor:
    prob = torch.exp(-cross_entropy)
    hardest, hard, easy = (
        _focal(cross_entropy, 1 - prob, exponent) for exponent in (_HARDEST_GAMMA, _HARD_GAMMA, gamma)
    )
    return torch.where(prob < _HARDEST, hardest, torch.where(prob < _HARD, hard, easy))
