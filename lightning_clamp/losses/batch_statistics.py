"""Cross-entropy plus a calibration gap of the whole batch: MDCA, DCA, MMCE.

The gap is one number for the batch that the loss sees; it is added to the loss of every position, so that every
``reduction`` holds. Under DDP each rank sees its own batch, as in the official codes: the gap of a small batch is
mostly noise, and more devices are no larger batch.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_clamp._checks import check_at_least
from lightning_clamp._rows import Task
from lightning_clamp.losses._positions import Positions, Reduction, as_positions

# Width of MMCE's Laplacian kernel.
_WIDTH = 0.4


def mdca_loss(
    logits: Tensor,
    target: Tensor,
    *,
    beta: float = 1.0,
    task: Task = "multiclass",
    ignore_index: int | None = None,
    reduction: Reduction = "mean",
    log_terms: dict[str, Tensor] | None = None,
) -> Tensor:
    r"""Cross-entropy and the multi-class difference of confidence and accuracy (MDCA).

    .. math:: \mathrm{CE} + \frac{\beta}{K} \sum_c |\mathrm{mean}_i\, p_{ic} - \mathrm{mean}_i\, 1[y_i = c]|.

    Args:
        logits: Shape ``(N, C)`` or ``(N, C, ...)``, float; for ``task="binary"`` one logit per position.
        target: Class indices, shape ``(N,)`` or ``(N, ...)``, int64; for ``task="binary"`` 0 or 1 of any dtype.
        beta: Weight of the gap, at least 0. The authors' scripts use 1, their command line defaults to 10.
        task: ``"multiclass"``, or ``"binary"`` for a one-logit (sigmoid) head.
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
    positions = as_positions(logits, target, task=task, ignore_index=ignore_index, reduction=reduction)
    log_probs = F.log_softmax(positions.logits, 1)
    probs = log_probs.exp()
    if positions.keep is not None:
        probs = probs * positions.keep.unsqueeze(1)
    count = positions.n_kept()
    ones = positions.kept(torch.ones_like(positions.target, dtype=probs.dtype))
    frequency = probs.new_zeros(positions.logits.shape[1]).index_add(0, positions.target.flatten(), ones.flatten())
    gap = (probs.sum([0, *range(2, probs.ndim)]) - frequency).abs().sum() / (count * positions.logits.shape[1])
    return _with_gap(
        positions, F.nll_loss(log_probs, positions.target, reduction="none"), gap, beta, reduction, log_terms
    )


def dca_loss(
    logits: Tensor,
    target: Tensor,
    *,
    beta: float = 10.0,
    task: Task = "multiclass",
    ignore_index: int | None = None,
    reduction: Reduction = "mean",
    log_terms: dict[str, Tensor] | None = None,
) -> Tensor:
    r"""Cross-entropy and the difference of mean confidence and accuracy (DCA), :math:`\beta\,|\bar r - \bar c|`.

    Args:
        logits: Shape ``(N, C)`` or ``(N, C, ...)``, float; for ``task="binary"`` one logit per position.
        target: Class indices, shape ``(N,)`` or ``(N, ...)``, int64; for ``task="binary"`` 0 or 1 of any dtype.
        beta: Weight of the gap, at least 0. 10 in the authors' code, 1 in the comparison of MDCA.
        task: ``"multiclass"``, or ``"binary"`` for a one-logit (sigmoid) head.
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
    positions = as_positions(logits, target, task=task, ignore_index=ignore_index, reduction=reduction)
    log_probs = F.log_softmax(positions.logits, 1)
    gap = positions.mean(log_probs.max(1).values.exp() - positions.correct().to(log_probs.dtype)).abs()
    return _with_gap(
        positions, F.nll_loss(log_probs, positions.target, reduction="none"), gap, beta, reduction, log_terms
    )


def mmce_loss(
    logits: Tensor,
    target: Tensor,
    *,
    lambda_: float = 1.0,
    task: Task = "multiclass",
    ignore_index: int | None = None,
    reduction: Reduction = "mean",
    log_terms: dict[str, Tensor] | None = None,
) -> Tensor:
    r"""Cross-entropy and the maximum mean calibration error, a kernel test of "as sure as right", squared.

    .. math:: \mathrm{CE} + \frac{\lambda}{B^2} \sum_{ij} (c_i - r_i)(c_j - r_j)\, e^{-|r_i - r_j| / 0.4}

    with confidence r and correctness c of each of the B positions that count. The sum over pairs is formed in
    O(B log B) from the sorted confidences, so that dense batches can be had too. The codes' other version, which weighs
    right and wrong predictions apart, divides twice by the number of pairs; it is left out.

    Args:
        logits: Shape ``(N, C)`` or ``(N, C, ...)``, float; for ``task="binary"`` one logit per position.
        target: Class indices, shape ``(N,)`` or ``(N, ...)``, int64; for ``task="binary"`` 0 or 1 of any dtype.
        lambda_: Weight of the error, at least 0.
        task: ``"multiclass"``, or ``"binary"`` for a one-logit (sigmoid) head.
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
    positions = as_positions(logits, target, task=task, ignore_index=ignore_index, reduction=reduction)
    log_probs = F.log_softmax(positions.logits, 1)
    # Sums with changing signs over many positions: float64, which costs nothing beside the softmax.
    confidence = log_probs.max(1).values.double().exp()
    excess = positions.kept(positions.correct().double() - confidence)
    error = _kernel_sum(excess.flatten(), confidence.flatten()) / positions.n_kept() ** 2
    cross_entropy = F.nll_loss(log_probs, positions.target, reduction="none")
    return _with_gap(positions, cross_entropy, error.to(log_probs.dtype), lambda_, reduction, log_terms)


def _kernel_sum(weight: Tensor, place: Tensor) -> Tensor:
    """Sum of ``w_i w_j exp(-|x_i - x_j| / 0.4)`` over all pairs, places x in [0, 1].

    In sorted order the kernel is a product of one factor of i and one of j, neither of them beyond ``exp(2.5)``.
    """
    order = place.detach().argsort()
    weight, place = weight[order], place[order] / _WIDTH
    rising = weight * place.exp()
    return 2 * (weight * (-place).exp() * (rising.cumsum(0) - rising)).sum() + weight.square().sum()


def _with_gap(
    positions: Positions,
    cross_entropy: Tensor,
    gap: Tensor,
    weight: float,
    reduction: Reduction,
    log_terms: dict[str, Tensor] | None,
) -> Tensor:
    everywhere = gap.expand(cross_entropy.shape)
    return positions.reduced(
        cross_entropy + weight * everywhere, reduction, log_terms, cross_entropy=cross_entropy, regularizer=everywhere
    )
