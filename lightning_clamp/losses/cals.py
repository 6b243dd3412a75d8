"""Margins of the logits as constraints, whose multipliers are learned for every class from validation data."""

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_clamp._checks import OptionError, check_number
from lightning_clamp._rows import Task
from lightning_clamp.losses._positions import Reduction, as_positions

# Multipliers and penalty weights stay in between.
_LEAST, _LARGEST = 1e-6, 1e6
_LEAST_RHO, _LARGEST_RHO = 1.0, 10.0
# A penalty weight grows by the first where the constraint is above that share of what it was.
_GROWTH, _KEPT = 1.2, 0.9


def cals_loss(
    logits: Tensor,
    target: Tensor,
    *,
    multiplier: float | Tensor = _LEAST,
    rho: float | Tensor = _LEAST_RHO,
    margin: float = 10.0,
    weight: Tensor | None = None,
    task: Task = "multiclass",
    ignore_index: int | None = None,
    reduction: Reduction = "mean",
    log_terms: dict[str, Tensor] | None = None,
) -> Tensor:
    r"""Class adaptive label smoothing (CALS): cross-entropy, and an augmented Lagrangian of the logits' distances.

    With :math:`h_k = (\max_j z_j - z_k - m) / m`, wanted to be at most 0,

    .. math:: \mathrm{CE} + \frac{1}{K} \sum_k P(h_k), \quad P(h) = \begin{cases} \lambda_k h + \rho_k h^2 / 2 &
        \lambda_k + \rho_k h \ge 0 \\ -\lambda_k^2 / (2 \rho_k) & \text{else} \end{cases}

    Args:
        logits: Shape ``(N, C)`` or ``(N, C, ...)``, float; for ``task="binary"`` one logit per position.
        target: Class indices or probabilities, as :func:`~lightning_clamp.losses.label_smoothing_loss`.
        multiplier: λ of every class, ``(C,)``, from :func:`updated_multipliers`; or one number for all.
        rho: Penalty weight ρ of every class, ``(C,)``, or one number for all.
        margin: m, above 0; 10 in the authors' runs.
        weight: As :func:`~lightning_clamp.losses.label_smoothing_loss`; the penalty is not weighted.
        task: ``"multiclass"``, ``"binary"`` for a one-logit (sigmoid) head, or ``"multilabel"`` for one per label.
        ignore_index: Target value of positions to leave out.
        reduction: ``"mean"`` over the positions that count (0 if there are none), ``"sum"``, or ``"none"``.
        log_terms: A dict that is given ``cross_entropy`` and ``regularizer`` (the mean of P).

    Returns:
        A scalar, or the shape of the target; float32, or float64 for float64 logits.

    Raises:
        TypeError: As :func:`~lightning_clamp.losses.label_smoothing_loss`.
        ValueError: As :func:`~lightning_clamp.losses.label_smoothing_loss`, and if there is not one multiplier per
            class.

    Reference:
        Liu, Rony, Galdran, Dolz and Ben Ayed, "Class Adaptive Network Calibration", CVPR 2023; as in the code, the mean
        over the classes.
    """
    check_number("margin", margin, above=0)
    positions = as_positions(
        logits, target, task=task, ignore_index=ignore_index, reduction=reduction, weight=weight, why_hard=""
    )
    weights = [_per_class(name, value, positions.logits) for name, value in (("multiplier", multiplier), ("rho", rho))]
    penalty = _penalty(_distances(positions.logits, margin), *weights).mean(1)
    return positions.reduced_with(penalty, reduction, log_terms, regularizer=penalty)


class Multipliers(NamedTuple):
    """What CALS has learned of every class; of length 1 before the first validation.

    Attributes:
        multiplier: λ, ``(C,)``.
        rho: ρ, ``(C,)``.
        distance: Mean of h on the last validation data, ``(C,)``.
        validations: How many there were, ``()``, int64.
    """

    multiplier: Tensor
    rho: Tensor
    distance: Tensor
    validations: Tensor

    @classmethod
    def start(cls) -> "Multipliers":
        """Before there is anything to learn from."""
        # On the CPU also where modules are made on another device, or on none.
        one = torch.ones(1, device="cpu")
        return cls(_LEAST * one, _LEAST_RHO * one, 0 * one, torch.zeros((), dtype=torch.long, device="cpu"))


def distance_sums(
    logits: Tensor,
    target: Tensor,
    before: Multipliers,
    margin: float,
    *,
    task: Task,
    ignore_index: int | None = None,
) -> Tensor:
    """Sums of a validation batch, ``(3, C)`` float64, to be added up and given to :func:`updated_multipliers`.

    Row 0 is the slope of P in h, row 1 h itself, row 2 the number of positions.
    """
    positions = as_positions(logits, target, task=task, ignore_index=ignore_index, reduction="none", why_hard="")
    distance = _distances(positions.logits.double(), margin)
    multiplier, rho = (_per_class("multiplier", value, distance) for value in before[:2])
    slope = (multiplier + rho * distance).clamp(_LEAST, _LARGEST)
    each = torch.stack([slope, distance, torch.ones_like(distance)])
    return torch.where(positions.counted().unsqueeze(1), each, 0).movedim(2, 1).flatten(2).sum(2)


def updated_multipliers(before: Multipliers, sums: Tensor, *, rho_every: int = 10) -> Multipliers:
    """The multipliers after a validation: λ is the mean slope of the penalty, kept in [1e-6, 1e6].

    At every ``rho_every``-th validation, ρ grows by a factor of 1.2, to at most 10, for classes whose mean h is above
    .9 times its positive part at the validation before.

    Args:
        before: What it was.
        sums: Of :func:`distance_sums` over the validation data.
        rho_every: Validations between two looks at ρ.
    """
    slope, distance = (sums[:2] / sums[2]).to(before.rho.dtype)
    rho = before.rho.to(distance.device).expand(distance.shape)
    validations = before.validations + 1
    if before.validations and validations % rho_every == 0:
        worse = distance > _KEPT * before.distance.to(distance.device).clamp_min(0)
        rho = torch.where(worse, _GROWTH * rho, rho).clamp(_LEAST_RHO, _LARGEST_RHO)
    return Multipliers(slope.clamp(_LEAST, _LARGEST), rho, distance, validations)


def _distances(logits: Tensor, margin: float) -> Tensor:
    """Distance h of every class, shape of the logits."""
    return (logits.amax(1, keepdim=True) - logits - margin) / margin


def _penalty(distance: Tensor, multiplier: Tensor, rho: Tensor) -> Tensor:
    """P of every class, shape of ``distance``."""
    slope = (multiplier + rho * distance).clamp_min(0)
    return (slope.square() - multiplier.square()) / (2 * rho)


def _per_class(name: str, value: float | Tensor, logits: Tensor) -> Tensor:
    """``value`` in a shape that fits beside the logits, with the classes on axis 1."""
    tensor = torch.as_tensor(value, dtype=logits.dtype, device=logits.device)
    if tensor.numel() not in (1, logits.shape[1]):
        raise OptionError(
            f"`{name}` must be one number or have one per class, {logits.shape[1]}, got {tensor.numel()}."
        )
    return tensor.reshape(1, -1, *[1] * (logits.ndim - 2))
