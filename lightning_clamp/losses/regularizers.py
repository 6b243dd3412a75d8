r"""Cross-entropy with a penalty on over-confident rows: smoothing, entropy, margins, ACLS."""

from typing import Literal, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_clamp._checks import check_at_least, check_between, check_choice
from lightning_clamp._rows import Task
from lightning_clamp.losses._margins import ADAPTIVE_MARGINS, MARGINS, Penalty, passed, penalised_mean
from lightning_clamp.losses._positions import Positions, Reduction, as_positions

Reference: TypeAlias = Literal["code", "paper"]


def label_smoothing_loss(
    logits: Tensor,
    target: Tensor,
    *,
    alpha: float = 0.05,
    weight: Tensor | None = None,
    task: Task = "multiclass",
    ignore_index: int | None = None,
    reduction: Reduction = "mean",
    log_terms: dict[str, Tensor] | None = None,
) -> Tensor:
    r"""Cross-entropy with smoothed labels, :math:`(1 - \alpha)\,\mathrm{CE} + \frac{\alpha}{K} \sum_k -\log p_k`.

    torch's own ``label_smoothing``; some codes spread :math:`\alpha` over the other K - 1 classes instead.

    Args:
        logits: Shape ``(N, C)`` or ``(N, C, ...)``, float; for ``task="binary"`` one logit per position, and for
            ``task="multilabel"`` one per label, ``(N, K)`` or ``(N, K, ...)``, of which each is a position.
        target: Class indices, shape ``(N,)`` or ``(N, ...)``, int64, or probabilities of the classes, shape of the
            logits, float, as mixup and CutMix make them; for the other tasks 0 or 1 of any dtype, or the probability
            of 1.
        alpha: Weight of the uniform label, in [0, 1].
        weight: Of each class in the cross-entropy, ``(C,)``, not negative, with the mean that torch takes of it: by
            the weights of the labels, or of the positions if the target has probabilities. No penalty is weighted.
        task: ``"multiclass"``, ``"binary"`` for a one-logit (sigmoid) head, or ``"multilabel"`` for one per label.
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
    positions = as_positions(
        logits, target, task=task, ignore_index=ignore_index, reduction=reduction, weight=weight, why_hard=""
    )
    smoothed = F.cross_entropy(
        positions.logits, positions.target, positions.weight, reduction="none", label_smoothing=alpha
    )
    return positions.reduced(smoothed, reduction, log_terms)


def entropy_penalty_loss(
    logits: Tensor,
    target: Tensor,
    *,
    alpha: float = 0.1,
    reference: Reference = "code",
    weight: Tensor | None = None,
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
        weight: As :func:`label_smoothing_loss`.
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
    positions = as_positions(
        logits, target, task=task, ignore_index=ignore_index, reduction=reduction, weight=weight, why_hard=""
    )
    # A class that is masked by a logit of -inf has no part in the entropy, where 0 * inf would be nan.
    log_probs = positions.log_probs().clamp_min(torch.finfo(positions.logits.dtype).min)
    # The entropy less its sign and its share, which are those of the whole batch.
    surety = (log_probs.exp() * log_probs).sum(1)
    share = 1 / positions.logits.shape[1] if reference == "code" else 1.0
    if log_terms is not None:
        positions.note(log_terms, log_probs, entropy=-share * surety)
    cross_entropy = positions.reduced_cross_entropy(log_probs, reduction)
    return torch.add(cross_entropy, positions.unweighted().reduced(surety, reduction), alpha=alpha * share)


def mbls_loss(
    logits: Tensor,
    target: Tensor,
    *,
    alpha: float = 0.1,
    margin: float = 10.0,
    weight: Tensor | None = None,
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
        weight: As :func:`label_smoothing_loss`.
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

    positions = as_positions(
        logits, target, task=task, ignore_index=ignore_index, reduction=reduction, weight=weight, why_hard=""
    )
    return _penalised(positions, MARGINS, (margin,), alpha, -1.0, reduction, log_terms)


def acls_loss(
    logits: Tensor,
    target: Tensor,
    *,
    alpha: float = 0.1,
    pos_lambda: float = 1.0,
    neg_lambda: float = 0.1,
    margin: float = 10.0,
    reference: Reference = "code",
    weight: Tensor | None = None,
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
        weight: As :func:`label_smoothing_loss`.
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
    positions = as_positions(
        logits, target, task=task, ignore_index=ignore_index, reduction=reduction, weight=weight, why_hard=""
    )
    classes = positions.logits.shape[1]
    weights = (pos_lambda, neg_lambda / (classes - 1)) if reference == "code" else (pos_lambda / 2, neg_lambda / 2)
    positive, negative = (classes * one for one in weights)
    options = (positive, negative, margin, reference == "paper")
    return _penalised(positions, ADAPTIVE_MARGINS, options, alpha, positive or negative, reduction, log_terms)


def _penalised(
    positions: Positions,
    penalty: Penalty,
    options: tuple[float, ...],
    alpha: float,
    unit: float,
    reduction: Reduction,
    log_terms: dict[str, Tensor] | None,
) -> Tensor:
    """Cross-entropy plus ``alpha`` times the penalty of the logits, which is given in ``unit``."""
    of_all = reduction == "mean" and positions.keep is None and positions.n_all > 0
    if of_all and positions.equal_labels and log_terms is None and not torch.compiler.is_compiling():
        return penalised_mean(positions.logits, positions.target, alpha * unit, penalty, options)
    logits, added = passed(positions.logits, of_all, penalty, options)
    positions = positions._replace(logits=logits)
    log_probs = positions.log_probs()
    if log_terms is not None:
        positions.note(log_terms, log_probs, regularizer=unit * added)
    added = added if of_all else positions.unweighted().reduced(added, reduction)
    return torch.add(positions.reduced_cross_entropy(log_probs, reduction), added, alpha=alpha * unit)
