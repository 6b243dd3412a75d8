"""Focal loss whose exponent is learned, in bins, from how calibrated the network is on validation data."""

import torch
from torch import Tensor

from lightning_clamp._checks import OptionError
from lightning_clamp._rows import Task
from lightning_clamp.losses._positions import Reduction, as_positions
from lightning_clamp.metrics._binning import addends, cell_count, cell_index, equal_mass_sums, no_sums

# The exponent stays in between; nearer to 0 than the last it changes sign.
_LEAST, _LARGEST, _SWITCH = -2.0, 20.0, 0.2


def adafocal_loss(
    logits: Tensor,
    target: Tensor,
    *,
    gamma: float | Tensor = 1.0,
    edges: Tensor | None = None,
    weight: Tensor | None = None,
    task: Task = "multiclass",
    ignore_index: int | None = None,
    reduction: Reduction = "mean",
    log_terms: dict[str, Tensor] | None = None,
) -> Tensor:
    r"""AdaFocal: focal loss with an exponent by the bin of :math:`p_y`, inverse focal loss where it is negative.

    .. math:: -(1 - p_y)^{\gamma_b} \log p_y \ \text{ for } \gamma_b \ge 0, \qquad
        -(1 + p_y)^{|\gamma_b|} \log p_y \ \text{ for } \gamma_b < 0

    Args:
        logits: Shape ``(N, C)`` or ``(N, C, ...)``, float; for ``task="binary"`` one logit per position.
        target: Class indices or probabilities, as :func:`~lightning_clamp.losses.label_smoothing_loss`.
        gamma: Exponent of every bin, ``(B,)``, from :func:`updated_gamma`; or one number for all.
        edges: Between the bins, rising, ``(B - 1,)``; None with one number. A bin begins at its lower edge.
        weight: As :func:`~lightning_clamp.losses.label_smoothing_loss`.
        task: ``"multiclass"``, ``"binary"`` for a one-logit (sigmoid) head, or ``"multilabel"`` for one per label.
        ignore_index: Target value of positions to leave out.
        reduction: ``"mean"`` over the positions that count (0 if there are none), ``"sum"`` (as in the official code),
            or ``"none"``.
        log_terms: A dict that is given the means ``cross_entropy`` and ``gamma``.

    Returns:
        A scalar, or the shape of the target; float32, or float64 for float64 logits.

    Raises:
        TypeError: As :func:`~lightning_clamp.losses.label_smoothing_loss`.
        ValueError: As :func:`~lightning_clamp.losses.label_smoothing_loss`, and if exponents and edges do not fit.

    Reference:
        Ghosh, Schaaf and Gormley, "AdaFocal: Calibration-aware Adaptive Focal Loss", NeurIPS 2022.
    """
    positions = as_positions(
        logits, target, task=task, ignore_index=ignore_index, reduction=reduction, weight=weight, why_hard=""
    )
    log_probs = positions.log_probs()
    nll = positions.nll(log_probs)
    prob = torch.exp(-nll)
    exponent = torch.as_tensor(gamma, dtype=prob.dtype, device=prob.device)
    _check_bins(exponent, edges)
    if edges is None:
        exponent = exponent.expand(prob.shape)
    else:
        exponent = exponent[torch.bucketize(prob.detach(), edges.to(prob), right=True)]
    # The slope of a power below 1 is infinite at 0, hence the clamp.
    base = (1 - exponent.sign() * prob).clamp_min(torch.finfo(prob.dtype).tiny)
    loss = positions.expected(base.pow(exponent.abs()) * nll)
    return positions.reduced(loss, reduction, log_terms, log_probs, gamma=positions.unweighted().expected(exponent))


def updated_gamma(gamma: Tensor, excess: Tensor, *, lambda_: float = 1.0) -> Tensor:
    r"""The exponents after a validation, ``(B,)``: larger where the network is too sure, by :math:`e^{\lambda E_b}`.

    A negative exponent becomes smaller in size there. One that comes nearer to 0 than .2 changes sign, to ∓.2; then
    all are kept in [-2, 20].

    Args:
        gamma: Before, ``(B,)``.
        excess: Confidence less accuracy of each bin on validation data, ``(B,)``.
        lambda_: Speed λ; 1 in the official code.
    """
    sign = gamma.sign()
    moved = gamma * torch.exp(lambda_ * sign * excess)
    return torch.where(moved.abs() < _SWITCH, -_SWITCH * sign, moved).clamp(_LEAST, _LARGEST)


def confidence_cells(
    logits: Tensor, target: Tensor, n_bins: int, *, task: Task, ignore_index: int | None = None
) -> Tensor:
    """Sums of a batch by confidence, ``(3, K)`` float64, to be added up and given to :func:`equal_mass_bins`."""
    positions = as_positions(logits, target, task=task, ignore_index=ignore_index, reduction="none")
    keep = positions.counted()
    confidence, predicted = positions.logits.double().softmax(1).max(1)
    correct = predicted == positions.target
    confidence, correct = confidence[keep], correct[keep]
    sums = no_sums(cell_count(n_bins), logits.device)
    return sums.index_add_(1, cell_index(confidence, n_bins), addends(confidence, correct))


def equal_mass_bins(cells: Tensor, n_bins: int) -> tuple[Tensor, Tensor]:
    """Confidence less accuracy of bins of equal counts, ``(B,)``, and the edges between them, ``(B - 1,)``; float64."""
    cells = cells[:, cells[0] > 0]
    count, confidence, correct = equal_mass_sums(cells, n_bins)
    boundary = torch.arange(1, n_bins, device=cells.device) / n_bins * cells[0].sum()
    # The confidence at which the next bin begins.
    place = torch.searchsorted(cells[0].cumsum(0), boundary, right=True).clamp_max(cells.shape[1] - 1)
    return (confidence - correct) / count, cells[1][place] / cells[0][place]


def _check_bins(gamma: Tensor, edges: Tensor | None) -> None:
    if gamma.shape != (() if edges is None else (len(edges) + 1,)):
        raise OptionError(
            f"`gamma` must be one number without `edges`, or have one per bin, got a shape of {tuple(gamma.shape)} for "
            f"{'no edges' if edges is None else f'{len(edges)} edges'}."
        )
