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
    weight: Tensor | None = None,
    task: Task = "multiclass",
    ignore_index: int | None = None,
    reduction: Reduction = "mean",
    log_terms: dict[str, Tensor] | None = None,
) -> Tensor:
    r"""Focal loss, :math:`-(1 - p_y)^\gamma \log p_y`.

    Args:
        logits: Shape ``(N, C)`` or ``(N, C, ...)``, float; for ``task="binary"`` one logit per position.
        target: Class indices or probabilities, as :func:`~lightning_clamp.losses.label_smoothing_loss`.
        gamma: At least 0; 0 is the cross-entropy.
        weight: As :func:`~lightning_clamp.losses.label_smoothing_loss`.
        task: ``"multiclass"``, ``"binary"`` for a one-logit (sigmoid) head, or ``"multilabel"`` for one per label.
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
    positions = as_positions(
        logits, target, task=task, ignore_index=ignore_index, reduction=reduction, weight=weight, why_hard=""
    )
    log_probs = positions.log_probs()
    nll = positions.nll(log_probs)
    loss = _focal(nll, _doubt(nll), gamma)
    return positions.reduced(positions.expected(loss), reduction, log_terms, log_probs)


def flsd_loss(
    logits: Tensor,
    target: Tensor,
    *,
    gamma: float = 3.0,
    weight: Tensor | None = None,
    task: Task = "multiclass",
    ignore_index: int | None = None,
    reduction: Reduction = "mean",
    log_terms: dict[str, Tensor] | None = None,
) -> Tensor:
    r"""Sample-dependent focal loss FLSD-53: exponent 5 where :math:`p_y < 0.2`, 3 up to 0.5, ``gamma`` from 0.5 on.

    Args:
        logits: Shape ``(N, C)`` or ``(N, C, ...)``, float; for ``task="binary"`` one logit per position.
        target: Class indices or probabilities, as :func:`~lightning_clamp.losses.label_smoothing_loss`.
        gamma: Exponent where the network is right and sure, at least 0. 3 is FLSD-53.
        weight: As :func:`~lightning_clamp.losses.label_smoothing_loss`.
        task: ``"multiclass"``, ``"binary"`` for a one-logit (sigmoid) head, or ``"multilabel"`` for one per label.
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
    positions = as_positions(
        logits, target, task=task, ignore_index=ignore_index, reduction=reduction, weight=weight, why_hard=""
    )
    log_probs = positions.log_probs()
    nll = positions.nll(log_probs)
    doubt = _doubt(nll)
    loss = _focal(nll, doubt, gamma, _exponent(doubt.detach(), gamma))
    return positions.reduced(positions.expected(loss), reduction, log_terms, log_probs)


def dual_focal_loss(
    logits: Tensor,
    target: Tensor,
    *,
    gamma: float = 5.0,
    weight: Tensor | None = None,
    task: Task = "multiclass",
    ignore_index: int | None = None,
    reduction: Reduction = "mean",
    log_terms: dict[str, Tensor] | None = None,
) -> Tensor:
    r"""Dual focal loss, :math:`-(1 - p_y + p_j)^\gamma \log p_y`, with p_j the largest probability below p_y.

    Strictly below, and 0 if there is none: not the runner-up, as in the official code.

    Args:
        logits: Shape ``(N, C)`` or ``(N, C, ...)``, float; for ``task="binary"`` one logit per position.
        target: Class indices or probabilities, as :func:`~lightning_clamp.losses.label_smoothing_loss`.
        gamma: At least 0; 0 is the cross-entropy, and the official code's default. 5 is our choice.
        weight: As :func:`~lightning_clamp.losses.label_smoothing_loss`.
        task: ``"multiclass"``, ``"binary"`` for a one-logit (sigmoid) head, or ``"multilabel"`` for one per label.
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
    positions = as_positions(
        logits, target, task=task, ignore_index=ignore_index, reduction=reduction, weight=weight, why_hard=""
    )
    log_probs = positions.log_probs()
    nll = positions.nll(log_probs)
    lower = _next_lower(log_probs) if positions.soft else _largest_below(log_probs, nll.detach().neg())
    loss = _focal(nll, _doubt(nll) + lower.exp(), gamma)
    return positions.reduced(positions.expected(loss), reduction, log_terms, log_probs)


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
        target: Class indices or probabilities, as :func:`~lightning_clamp.losses.label_smoothing_loss`.
        task: ``"multiclass"``, ``"binary"`` for a one-logit (sigmoid) head, or ``"multilabel"`` for one per label.
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
    positions = as_positions(logits, target, task=task, ignore_index=ignore_index, reduction=reduction, why_hard="")
    probs = F.softmax(positions.logits, 1)
    if positions.soft:
        score = (probs - positions.target).square().sum(1)
    else:
        of_target = probs.gather(1, positions.target.unsqueeze(1)).squeeze(1)
        score = torch.sub(probs.square().sum(1), of_target, alpha=2) + 1
    return positions.reduced(score, reduction, log_terms)


def _doubt(nll: Tensor) -> Tensor:
    """One minus the probability, of -log p."""
    # 1 - exp(-nll) in one step, also in the backward pass, and without its rounding where p is near 1.
    return F.elu(-nll, alpha=-1.0)


def _focal(nll: Tensor, doubt: Tensor, gamma: float, exponent: Tensor | None = None) -> Tensor:
    """``doubt ** gamma * nll``; or of ``exponent``, one for each, of which ``gamma`` may be the least."""
    if gamma < 2:
        # The slope of a power below 1 is infinite at doubt 0, and so is the curvature of one below 2.
        doubt = doubt.clamp_min(torch.finfo(doubt.dtype).tiny)
    return doubt.pow(gamma if exponent is None else exponent) * nll


def _exponent(doubt: Tensor, gamma: float) -> Tensor:
    """FLSD's exponent, a constant in each band of the probability of the target, which is one minus ``doubt``."""
    upper = torch.where(doubt > 1 - _HARD, _HARD_GAMMA, doubt.new_full((), gamma))
    return torch.where(doubt > 1 - _HARDEST, _HARDEST_GAMMA, upper)


def _largest_below(log_probs: Tensor, of_target: Tensor) -> Tensor:
    """The largest log-probability of each position below the target's, ``(N, ...)``; -inf if there is none."""
    return log_probs.masked_fill(log_probs >= of_target.unsqueeze(1), -torch.inf).max(1).values


def _next_lower(log_probs: Tensor) -> Tensor:
    """The same for every class in the target's place, shape of ``log_probs``."""
    ordered, order = log_probs.sort(1, descending=True)
    follower = torch.cat([ordered[:, 1:], torch.full_like(ordered[:, :1], -torch.inf)], 1)
    # Of classes that are equal only the last is followed by a lower one; it is the largest below them all.
    follower = follower.masked_fill(follower >= ordered, -torch.inf)
    lower = follower.flip(1).cummax(1).values.flip(1)
    return torch.empty_like(lower).scatter(1, order, lower)
