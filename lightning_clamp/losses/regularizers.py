r"""Cross-entropy with a penalty on over-confident rows: smoothing, entropy, margins, ACLS."""

from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from lightning_clamp._checks import check_at_least, check_between, check_choice
from lightning_clamp._rows import Task
from lightning_clamp.losses._positions import Reduction, as_positions

Reference: TypeAlias = Literal["code", "paper"]


def label_smoothing_loss(
    logits: Tensor,
    target: Tensor,
    *,
    alpha: float = 0.05,
    task: Task = "multiclass",
    ignore_index: int | None = None,
    reduction: Reduction = "mean",
    log_terms: dict[str, Tensor] | None = None,
) -> Tensor:
    r"""Cross-entropy with smoothed labels, :math:`(1 - \alpha)\,\mathrm{CE} + \frac{\alpha}{K} \sum_k -\log p_k`.

    torch's own ``label_smoothing``; some codes spread :math:`\alpha` over the other K - 1 classes instead.

    Args:
        logits: Shape ``(N, C)`` or ``(N, C, ...)``, float; for ``task="binary"`` one logit per position.
        target: Class indices, shape ``(N,)`` or ``(N, ...)``, int64; for ``task="binary"`` 0 or 1 of any dtype.
        alpha: Weight of the uniform label, in [0, 1].
        task: ``"multiclass"``, or ``"binary"`` for a one-logit (sigmoid) head.
        ignore_index: Target value of positions to leave out.
        reduction: ``"mean"`` over the positions that count (0 if there are none), ``"sum"``, or ``"none"``.
        log_terms: A dict that is given the mean ``cross_entropy``, for logging.

    Returns:
        A scalar, or the shape of the target; float32, or float64 for float64 logits.

    Raises:
        TypeError: If either is no tensor, or the target's dtype cannot hold class indices.
        ValueError: If shapes do not fit, an option is out of range, or a label is.

    Reference:
        Szegedy et al., "Rethinking the Inception Architecture", CVPR 2016; as in Liu et al. (MbLS), CVPR 2022.
    """
    check_between("alpha", alpha, 0, 1)
    positions = as_positions(logits, target, task=task, ignore_index=ignore_index, reduction=reduction)
    terms = {} if log_terms is None else {"cross_entropy": positions.cross_entropy()}
    return positions.reduced(positions.cross_entropy(label_smoothing=alpha), reduction, log_terms, **terms)


def entropy_penalty_loss(
    logits: Tensor,
    target: Tensor,
    *,
    alpha: float = 0.1,
    reference: Reference = "code",
    task: Task = "multiclass",
    ignore_index: int | None = None,
    reduction: Reduction = "mean",
    log_terms: dict[str, Tensor] | None = None,
) -> Tensor:
    r"""Cross-entropy minus the entropy of the prediction, :math:`\mathrm{CE} - \alpha H(p)` (confidence penalty, ECP).

    Args:
        logits: As :func:`label_smoothing_loss`.
        target: As :func:`label_smoothing_loss`.
        alpha: Weight of the entropy, at least 0.
        reference: ``"code"`` takes the *mean* of :math:`-p \log p` over the classes, as the code of Liu et al. (MbLS)
            does, so that ``alpha`` counts K times less than in the ``"paper"``, which takes the sum.
        task: As :func:`label_smoothing_loss`.
        ignore_index: As :func:`label_smoothing_loss`.
        reduction: As :func:`label_smoothing_loss`.
        log_terms: A dict that is given the means ``cross_entropy`` and ``entropy`` (as ``reference`` has it).

    Returns:
        A scalar, or the shape of the target.

    Raises:
        TypeError: As :func:`label_smoothing_loss`.
        ValueError: As :func:`label_smoothing_loss`.

    Reference:
        Pereyra et al., "Regularizing Neural Networks by Penalizing Confident Output Distributions", 2017.
    """
    check_at_least("alpha", alpha, 0)
    check_choice("reference", reference, ("code", "paper"))
    positions = as_positions(logits, target, task=task, ignore_index=ignore_index, reduction=reduction)
    # A class that is masked by a logit of -inf has no part in the entropy, where 0 * inf would be nan.
    log_probs = F.log_softmax(positions.logits, 1).clamp_min(torch.finfo(positions.logits.dtype).min)
    entropy = -(log_probs.exp() * log_probs).sum(1)
    if reference == "code":
        entropy = entropy / positions.logits.shape[1]
    cross_entropy = F.nll_loss(log_probs, positions.target, reduction="none")
    return positions.reduced(
        cross_entropy - alpha * entropy, reduction, log_terms, cross_entropy=cross_entropy, entropy=entropy
    )


def mbls_loss(
    logits: Tensor,
    target: Tensor,
    *,
    alpha: float = 0.1,
    margin: float = 10.0,
    task: Task = "multiclass",
    ignore_index: int | None = None,
    reduction: Reduction = "mean",
    log_terms: dict[str, Tensor] | None = None,
) -> Tensor:
    r"""Margin-based label smoothing, :math:`\mathrm{CE} + \frac{\alpha}{K} \sum_k \mathrm{relu}(\max_j z_j - z_k - m)`.

    Args:
        logits: As :func:`label_smoothing_loss`.
        target: As :func:`label_smoothing_loss`.
        alpha: Weight of the penalty, at least 0. It is the mean over the classes, as in the code; the paper sums.
        margin: Distance to the largest logit that costs nothing, at least 0.
        task: As :func:`label_smoothing_loss`.
        ignore_index: As :func:`label_smoothing_loss`.
        reduction: As :func:`label_smoothing_loss`.
        log_terms: A dict that is given the means ``cross_entropy`` and ``regularizer`` (before ``alpha``).

    Returns:
        A scalar, or the shape of the target.

    Raises:
        TypeError: As :func:`label_smoothing_loss`.
        ValueError: As :func:`label_smoothing_loss`.

    Reference:
        Liu et al., "The Devil is in the Margin", CVPR 2022, eq. 4.
    """
    check_at_least("alpha", alpha, 0)
    check_at_least("margin", margin, 0)

    def penalty(z: Tensor) -> tuple[Tensor, Tensor]:
        top = z.amax(1, keepdim=True)
        excess = (top - margin - z).clamp_min_(0)
        value = excess.mean(1)
        beyond = torch.gt(excess, 0, out=excess)
        is_top = torch.eq(z, top, out=torch.empty_like(z))
        # The gradient of the maximum is dealt out evenly over the largest logits, as torch does it.
        share = beyond.sum(1, keepdim=True) / (z.shape[1] * is_top.sum(1, keepdim=True))
        return value, beyond.mul_(-1 / z.shape[1]).addcmul_(is_top, share)

    return _penalised(logits, target, penalty, alpha, task, ignore_index, reduction, log_terms)


def acls_loss(
    logits: Tensor,
    target: Tensor,
    *,
    alpha: float = 0.1,
    pos_lambda: float = 1.0,
    neg_lambda: float = 0.1,
    margin: float = 10.0,
    reference: Reference = "code",
    task: Task = "multiclass",
    ignore_index: int | None = None,
    reduction: Reduction = "mean",
    log_terms: dict[str, Tensor] | None = None,
) -> Tensor:
    r"""Adaptive and conditional label smoothing, :math:`\mathrm{CE} + \alpha R`.

    With :math:`\hat y = \arg\max_j z_j`, sg = stop-gradient, and ``reference="code"``:

    .. math:: R = \lambda_+\,\mathrm{relu}(z_{\hat y} - M)^2
        + \frac{\lambda_-}{K-1} \sum_{j \ne \hat y} \mathrm{relu}(\mathrm{sg}(z_{\hat y}) - z_j - M)^2

    It depends on the prediction, not on the label; several largest logits all count as :math:`\hat y`. The first term
    looks at the logit itself, so that a constant added to all logits changes R (though not the cross-entropy).

    ``reference="paper"`` is the loss with the gradient of the paper's formula, known to us **second-hand only**:
    :math:`R = \frac{\lambda_+}{2}\,\mathrm{relu}(z_{\hat y} - \mathrm{sg}(\min_k z_k) - M)^2 + \frac{\lambda_-}{2}
    \sum_{j \ne \hat y} \mathrm{relu}(\mathrm{sg}(z_{\hat y}) - z_j - M)^2`, where a constant changes nothing.

    Args:
        logits: As :func:`label_smoothing_loss`.
        target: As :func:`label_smoothing_loss`.
        alpha: Weight of R, at least 0.
        pos_lambda: Weight of the term of the predicted class, at least 0.
        neg_lambda: Weight of the terms of the other classes, at least 0.
        margin: M, at least 0. The paper is said to use 6 for CIFAR-10 and 10 elsewhere.
        reference: ``"code"`` or ``"paper"``.
        task: As for :func:`label_smoothing_loss`; one logit z counts as (-z/2, z/2).
        ignore_index: As for :func:`label_smoothing_loss`; the penalty is masked too, unlike in the official code.
        reduction: As :func:`label_smoothing_loss`.
        log_terms: A dict that is given the means ``cross_entropy`` and ``regularizer`` (R, before ``alpha``).

    Returns:
        A scalar, or the shape of the target.

    Raises:
        TypeError: As :func:`label_smoothing_loss`.
        ValueError: As :func:`label_smoothing_loss`.

    Reference:
        Park, Noh, Oh, Baek and Ham, "ACLS: Adaptive and Conditional Label Smoothing", ICCV 2023 (arXiv 2308.11911).
    """
    for name, value in (("alpha", alpha), ("pos_lambda", pos_lambda), ("neg_lambda", neg_lambda), ("margin", margin)):
        check_at_least(name, value, 0)
    check_choice("reference", reference, ("code", "paper"))
    is_code = reference == "code"

    def penalty(z: Tensor) -> tuple[Tensor, Tensor]:
        positive = pos_lambda if is_code else pos_lambda / 2
        negative = neg_lambda / (z.shape[1] - 1) if is_code else neg_lambda / 2
        top = z.amax(1, keepdim=True)
        excess = (top - margin if is_code else top - z.amin(1, keepdim=True) - margin).clamp_min_(0)
        # The gradient of the second term; the largest logits themselves are within the margin, and add nothing to it.
        slope = torch.add(-2 * negative * (top - margin), z, alpha=2 * negative).clamp_max_(0)
        ties = torch.eq(z, top, out=torch.empty_like(z)).sum(1)
        value = positive * excess.squeeze(1).square() * ties
        if negative:
            value = value + slope.square().sum(1) / (4 * negative)
        # Compared anew, by another operator: what has one use is fused by a compiler, which would store the mask else.
        is_top = torch.ge(z, top, out=torch.empty_like(z))
        return value, slope.addcmul_(is_top, 2 * positive * excess)

    return _penalised(logits, target, penalty, alpha, task, ignore_index, reduction, log_terms)


class _RowPenalty(torch.autograd.Function):
    """A penalty per position that knows its gradient: half the passes over memory that autograd would make.

    Comparisons are written into float tensors, which is three times faster than a mask of bools and its use. The
    gradient is part of the definition where a term stands still (the stop-gradient of ACLS).
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, penalty: Callable[[Tensor], tuple[Tensor, Tensor]]) -> Tensor:
        value, gradient = penalty(logits)
        ctx.save_for_backward(gradient)
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grads[0].unsqueeze(1), None


def _penalised(
    logits: Tensor,
    target: Tensor,
    penalty: Callable[[Tensor], tuple[Tensor, Tensor]],
    alpha: float,
    task: Task,
    ignore_index: int | None,
    reduction: Reduction,
    log_terms: dict[str, Tensor] | None,
) -> Tensor:
    """Cross-entropy plus ``alpha`` times ``penalty(logits)``, which gives ``(N, ...)`` and its gradient."""
    positions = as_positions(logits, target, task=task, ignore_index=ignore_index, reduction=reduction)
    cross_entropy = positions.cross_entropy()
    regularizer: Tensor = _RowPenalty.apply(positions.logits, penalty)
    return positions.reduced(
        cross_entropy + alpha * regularizer, reduction, log_terms, cross_entropy=cross_entropy, regularizer=regularizer
    )
