"""Cross-entropy plus a calibration gap of the whole batch: MDCA, DCA, MMCE.

The gap is one number for the batch that the loss sees; it is added to the loss of every position, so that every
``reduction`` holds. Under DDP each rank sees its own batch, as in the official codes: the gap of a small batch is
mostly noise, and more devices are no larger batch.
"""

import math

import torch
from torch import Tensor

from lightning_clamp._checks import check_at_least
from lightning_clamp._rows import Task
from lightning_clamp.losses._known_gradient import known_gradient_at
from lightning_clamp.losses._positions import Positions, Reduction, as_positions

# Width of MMCE's Laplacian kernel.
_WIDTH = 0.4
# Positions whose pairs make a matrix of at most 16 MB.
_FEW = 2048


def mdca_loss(
    logits: Tensor,
    target: Tensor,
    *,
    beta: float = 1.0,
    weight: Tensor | None = None,
    task: Task = "multiclass",
    ignore_index: int | None = None,
    reduction: Reduction = "mean",
    log_terms: dict[str, Tensor] | None = None,
) -> Tensor:
    r"""Cross-entropy and the multi-class difference of confidence and accuracy (MDCA).

    .. math:: \mathrm{CE} + \frac{\beta}{K} \sum_c |\mathrm{mean}_i\, p_{ic} - \mathrm{mean}_i\, 1[y_i = c]|.

    Args:
        logits: Shape ``(N, C)`` or ``(N, C, ...)``, float; for ``task="binary"`` one logit per position.
        target: Class indices or probabilities, as :func:`~lightning_clamp.losses.label_smoothing_loss`.
        beta: Weight of the gap, at least 0. The authors' scripts use 1, their command line defaults to 10.
        weight: As :func:`~lightning_clamp.losses.label_smoothing_loss`.
        task: ``"multiclass"``, ``"binary"`` for a one-logit (sigmoid) head, or ``"multilabel"`` for one per label.
        ignore_index: Target value of positions to leave out.
        reduction: ``"mean"`` over the positions that count (0 if there are none), ``"sum"``, or ``"none"``.
        log_terms: A dict that is given ``cross_entropy`` and ``regularizer`` (the gap, before ``beta``).

    Returns:
        A scalar, or the shape of the target; float32, or float64 for float64 logits.

    Raises:
        TypeError: As :func:`~lightning_clamp.losses.label_smoothing_loss`.
        ValueError: As :func:`~lightning_clamp.losses.label_smoothing_loss`.

    Reference:
        Hebbalaguppe et al., "A Stitch in Time Saves Nine", CVPR 2022.
    """
    check_at_least("beta", beta, 0)
    positions = as_positions(
        logits, target, task=task, ignore_index=ignore_index, reduction=reduction, weight=weight, why_hard=""
    )
    log_probs = positions.log_probs()
    excess = positions.excess(log_probs.exp())
    gap = torch.linalg.vector_norm(excess, 1)
    return _with_gap(positions, log_probs, gap, positions.n_kept() * len(excess), beta, reduction, log_terms)


def dca_loss(
    logits: Tensor,
    target: Tensor,
    *,
    beta: float = 10.0,
    weight: Tensor | None = None,
    task: Task = "multiclass",
    ignore_index: int | None = None,
    reduction: Reduction = "mean",
    log_terms: dict[str, Tensor] | None = None,
) -> Tensor:
    r"""Cross-entropy and the difference of mean confidence and accuracy (DCA), :math:`\beta\,|\bar r - \bar c|`.

    Args:
        logits: Shape ``(N, C)`` or ``(N, C, ...)``, float; for ``task="binary"`` one logit per position.
        target: Class indices or probabilities, as :func:`~lightning_clamp.losses.label_smoothing_loss`.
        beta: Weight of the gap, at least 0. 10 in the authors' code, 1 in the comparison of MDCA.
        weight: As :func:`~lightning_clamp.losses.label_smoothing_loss`.
        task: ``"multiclass"``, ``"binary"`` for a one-logit (sigmoid) head, or ``"multilabel"`` for one per label.
        ignore_index: Target value of positions to leave out.
        reduction: ``"mean"`` over the positions that count (0 if there are none), ``"sum"``, or ``"none"``.
        log_terms: A dict that is given ``cross_entropy`` and ``regularizer`` (the gap, before ``beta``).

    Returns:
        A scalar, or the shape of the target; float32, or float64 for float64 logits.

    Raises:
        TypeError: As :func:`~lightning_clamp.losses.label_smoothing_loss`.
        ValueError: As :func:`~lightning_clamp.losses.label_smoothing_loss`.

    Reference:
        Liang, Zhang, Wang and Jacobs, "Improved Trainable Calibration Method for Neural Networks on Medical Imaging
        Classification", 2020.
    """
    check_at_least("beta", beta, 0)
    positions = as_positions(
        logits, target, task=task, ignore_index=ignore_index, reduction=reduction, weight=weight, why_hard=""
    )
    log_probs = positions.log_probs()
    top = log_probs.max(1).values
    gap = positions.mean(torch.add(top.exp(), positions.accuracy(log_probs, top), alpha=-1)).abs()
    return _with_gap(positions, log_probs, gap, 1, beta, reduction, log_terms)


def mmce_loss(
    logits: Tensor,
    target: Tensor,
    *,
    lambda_: float = 1.0,
    weight: Tensor | None = None,
    task: Task = "multiclass",
    ignore_index: int | None = None,
    reduction: Reduction = "mean",
    log_terms: dict[str, Tensor] | None = None,
) -> Tensor:
    r"""Cross-entropy and the maximum mean calibration error, a kernel test of "as sure as right", squared.

    .. math:: \mathrm{CE} + \frac{\lambda}{B^2} \sum_{ij} (c_i - r_i)(c_j - r_j)\, e^{-|r_i - r_j| / 0.4}

    with confidence r and correctness c of each of the B positions that count. The sum over pairs is formed in
    O(B log B) from the sorted confidences, so that dense batches can be had too; on accelerators from all pairs, where
    B is at most 2,048. The codes' other version, which weighs right and wrong predictions apart, divides twice by the
    number of pairs; it is left out.

    Args:
        logits: Shape ``(N, C)`` or ``(N, C, ...)``, float; for ``task="binary"`` one logit per position.
        target: Class indices, shape ``(N,)`` or ``(N, ...)``, int64; for ``task="binary"`` 0 or 1 of any dtype.
        lambda_: Weight of the error, at least 0.
        weight: As :func:`~lightning_clamp.losses.label_smoothing_loss`.
        task: ``"multiclass"``, ``"binary"`` for a one-logit (sigmoid) head, or ``"multilabel"`` for one per label.
        ignore_index: Target value of positions to leave out.
        reduction: ``"mean"`` over the positions that count (0 if there are none), ``"sum"``, or ``"none"``.
        log_terms: A dict that is given ``cross_entropy`` and ``regularizer`` (before ``lambda_``).

    Returns:
        A scalar, or the shape of the target; float32, or float64 for float64 logits.

    Raises:
        TypeError: As :func:`~lightning_clamp.losses.label_smoothing_loss`.
        ValueError: As :func:`~lightning_clamp.losses.label_smoothing_loss`.

    Reference:
        Kumar, Sarawagi and Jain, "Trainable Calibration Measures for Neural Networks from Kernel Mean Embeddings",
        ICML 2018; the square, without a root, as in the codes.
    """
    check_at_least("lambda_", lambda_, 0)
    positions = as_positions(
        logits,
        target,
        task=task,
        ignore_index=ignore_index,
        reduction=reduction,
        weight=weight,
        why_hard="mmce_loss compares what is right with what is sure, pair by pair, and a target of probabilities is "
        "neither right nor wrong: pass labels, or train with mdca_loss, which takes probabilities.",
    )
    log_probs = positions.log_probs()
    top, predicted = log_probs.detach().max(1, keepdim=True)
    known = _kernel_sum(top, positions.accuracy(log_probs, top.squeeze(1)), positions.keep)
    log_probs, error = known_gradient_at(log_probs, predicted, *known, "mmce_loss")
    return _with_gap(positions, log_probs, error, positions.n_kept() ** 2 / -2, lambda_, reduction, log_terms)


def _kernel_sum(log_confidence: Tensor, correct: Tensor, keep: Tensor | None) -> tuple[Tensor, Tensor]:
    """Sum of ``w_i w_j exp(-|r_i - r_j| / 0.4)`` over all pairs, w the correctness less the confidence r; over -2.

    And its gradient in the logarithm of r: autograd would go through all pairs once more.

    Args:
        log_confidence: Of each position, ``(N, 1, ...)``; without a graph.
        correct: Whether it is right, ``(N, ...)``.
        keep: Whether it counts, ``(N, ...)``; None for all.
    """
    # An accelerator takes its time for the number of steps, and sorting is many; the CPU for what is in them.
    few = log_confidence.numel() <= _FEW and log_confidence.device.type != "cpu"
    parts = log_confidence.flatten(), correct.flatten(), None if keep is None else keep.flatten()
    value, slope = (_over_pairs if few else _over_ranks)(*parts)
    return value, slope.reshape(log_confidence.shape)


def _over_pairs(log_confidence: Tensor, correct: Tensor, keep: Tensor | None) -> tuple[Tensor, Tensor]:
    """The kernel sum of few positions, from the matrix of all pairs."""
    confidence = log_confidence.exp()
    weight = torch.add(correct, confidence, alpha=-1)
    if keep is not None:
        weight = weight * keep
    ahead = confidence.unsqueeze(1) - confidence
    # No product of matrices, which autocast would round.
    shares = torch.pow(math.exp(-1 / _WIDTH), ahead.abs()).mul_(weight)
    pull = shares.sum(1)
    value = weight.dot(pull).mul_(-0.5)
    slope = torch.addcmul(pull, weight, shares.mul_(ahead.sign_()).sum(1), value=1 / _WIDTH).mul_(confidence)
    return value, slope if keep is None else slope * keep


def _over_ranks(log_confidence: Tensor, correct: Tensor, keep: Tensor | None) -> tuple[Tensor, Tensor]:
    """The kernel sum of any number of positions, from their order.

    There the kernel is a product of one factor of i and one of j, neither of them beyond ``exp(2.5)``.
    """
    log_sorted, order = log_confidence.sort()
    # Sums with changing signs over many positions: float64, which costs nothing beside the softmax.
    confidence = torch.exp(log_sorted, out=torch.empty_like(log_sorted, dtype=torch.float64))
    weight = torch.add(correct[order], confidence, alpha=-1)
    if keep is not None:
        weight = weight * keep[order]
    rise = torch.pow(math.exp(1 / _WIDTH), confidence)
    # Of each i: the sum over those up to it, and that over all.
    upto, beyond = (weight * rise).cumsum_(0).div_(rise), (weight / rise).cumsum_(0)
    pull = torch.addcmul(upto, beyond[-1:] - beyond, rise)
    value = torch.mul(weight.dot(pull), -0.5, out=log_confidence.new_empty(()))
    ahead = torch.sub(pull, upto, alpha=2).add_(weight)
    slope = pull.addcmul_(weight, ahead, value=-1 / _WIDTH)
    slope = torch.mul(slope, confidence, out=torch.empty_like(log_sorted))
    slope = torch.empty_like(slope).scatter_(0, order, slope)
    return value, slope if keep is None else slope * keep


def _with_gap(
    positions: Positions,
    log_probs: Tensor,
    gap: Tensor,
    size: float | Tensor,
    weight: float,
    reduction: Reduction,
    log_terms: dict[str, Tensor] | None,
) -> Tensor:
    """Cross-entropy, and ``weight`` times the gap over ``size`` at every position that counts."""
    if isinstance(size, Tensor):
        gap, size = gap / size, 1
    if log_terms is not None:
        positions.note(log_terms, log_probs, regularizer=gap / size)
    cross_entropy = positions.reduced_cross_entropy(log_probs, reduction)
    return torch.add(cross_entropy, positions.reduced_gap(gap, reduction), alpha=weight / size)
