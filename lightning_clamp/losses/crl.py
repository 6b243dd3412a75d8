"""Correctness ranking: samples that were right more often in training are to be the surer ones."""

import math
from typing import Literal, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_clamp._checks import OptionError, check_at_least, check_choice
from lightning_clamp._rows import Task
from lightning_clamp.losses._positions import Positions, Reduction, as_positions

Confidence: TypeAlias = Literal["softmax", "entropy", "margin"]
CONFIDENCES: tuple[Confidence, ...] = ("softmax", "entropy", "margin")
_WHY_HARD = (
    "CRL counts how often each item was right, and a prediction is neither right nor wrong of a target of "
    "probabilities: pass labels, or train with a loss that takes probabilities, such as adafocal_loss or focal_loss."
)


def crl_loss(
    logits: Tensor,
    target: Tensor,
    *,
    correctness: Tensor | None = None,
    lambda_: float = 1.0,
    confidence: Confidence = "softmax",
    weight: Tensor | None = None,
    task: Task = "multiclass",
    ignore_index: int | None = None,
    reduction: Reduction = "mean",
    log_terms: dict[str, Tensor] | None = None,
) -> Tensor:
    r"""Cross-entropy and the correctness ranking loss (CRL), of each item and the next in the batch.

    .. math:: \mathrm{CE} + \lambda\,\mathrm{mean}_i\,
        \mathrm{relu}\big(|c_i - c_{i+1}| - \mathrm{sign}(c_i - c_{i+1})\,(\kappa_i - \kappa_{i+1})\big)

    with the confidence :math:`\kappa` and the correctness c of the item so far; the last item is paired with the first,
    and items of equal correctness have no order.

    Args:
        logits: Shape ``(N, C)``, float; for ``task="binary"`` one logit per item.
        target: Class indices, shape ``(N,)``, int64; for ``task="binary"`` 0 or 1 of any dtype.
        correctness: How often each item was right so far, as :func:`normalised_correctness` has it, ``(N,)`` in [0, 1].
            None before there is a history, for the cross-entropy alone.
        lambda_: Weight λ of the ranking, at least 0.
        confidence: ``"softmax"``, the largest probability; ``"entropy"``, minus the entropy in units of the largest
            possible; or ``"margin"``, the largest probability less the second.
        weight: As :func:`~lightning_clamp.losses.label_smoothing_loss`; the ranking is not weighted.
        task: ``"multiclass"``, ``"binary"`` for a one-logit (sigmoid) head, or ``"multilabel"`` for one per label;
            items with several are not ranked.
        ignore_index: Target value of items to leave out; pairs with one of them have no order.
        reduction: ``"mean"`` over the items that count (0 if there are none), ``"sum"``, or ``"none"``.
        log_terms: A dict that is given ``cross_entropy`` and ``regularizer`` (the ranking, before ``lambda_``).

    Returns:
        A scalar, or the shape of the target; float32, or float64 for float64 logits.

    Raises:
        TypeError: As :func:`~lightning_clamp.losses.label_smoothing_loss`.
        ValueError: As :func:`~lightning_clamp.losses.label_smoothing_loss`, and if there is not one prediction and one
            correctness per item.

    Reference:
        Moon, Kim, Shin and Hwang, "Confidence-Aware Learning for Deep Neural Networks", ICML 2020.
    """
    check_at_least("lambda_", lambda_, 0)
    check_choice("confidence", confidence, CONFIDENCES)
    positions = as_positions(
        logits, target, task=task, ignore_index=ignore_index, reduction=reduction, weight=weight, why_hard=_WHY_HARD
    )
    if correctness is None:
        ranking = torch.zeros_like(positions.logits[:, 0])
    else:
        _check_items(positions, correctness)
        ranking = _ranking(positions, _confidence(positions.logits, confidence), correctness)
    return positions.reduced_with(lambda_ * ranking, reduction, log_terms, regularizer=ranking)


def normalised_correctness(counts: Tensor, low: Tensor | float, epochs: Tensor | int) -> Tensor:
    """How often items were right, in [0, 1]: 0 like the one that was right least, 1 in every epoch.

    Args:
        counts: Times that each item was right, ``(N,)``.
        low: The least of all items in the training set; 0 before every one of them was seen.
        epochs: Epochs that are complete, of which the first counts as one while it lasts.
    """
    high = torch.as_tensor(epochs, device=counts.device).clamp_min(1)
    # At least one time apart: where all were always right, there is nothing to tell them apart by.
    return ((counts - low) / (high - low).clamp_min(1)).clamp(0, 1)


def correct_items(logits: Tensor, target: Tensor, *, task: Task, ignore_index: int | None = None) -> Tensor:
    """1 where the prediction is right, 0 where it is not or is left out, ``(N,)``, float."""
    positions = as_positions(
        logits.detach(), target, task=task, ignore_index=ignore_index, reduction="none", why_hard=_WHY_HARD
    )
    return positions.kept((positions.logits.argmax(1) == positions.target).float()).flatten()


def _check_items(positions: Positions, correctness: Tensor) -> None:
    items = len(positions.target)
    if positions.target.numel() != items:
        raise OptionError(
            f"`correctness` is one number per item, and a target of shape {tuple(positions.shape)} has several "
            "positions per item: CRL is for one prediction per item."
        )
    if correctness.shape != (items,):
        raise OptionError(f"`correctness` must have shape ({items},), got {tuple(correctness.shape)}.")


def _confidence(logits: Tensor, kind: Confidence) -> Tensor:
    """Confidence of every item, ``(N, ...)``."""
    if kind == "entropy":
        log_probs = F.log_softmax(logits, 1)
        return (log_probs.exp() * log_probs).nan_to_num(0).sum(1) / math.log(logits.shape[1])
    top = F.softmax(logits, 1).topk(2, 1).values
    return top[:, 0] - top[:, 1] if kind == "margin" else top[:, 0]


def _ranking(positions: Positions, confidence: Tensor, correctness: Tensor) -> Tensor:
    """The ranking loss of every item with the next one, shape of the target."""
    confidence, keep = confidence.flatten(), positions.counted().flatten()
    ahead = correctness.to(confidence) - correctness.to(confidence).roll(-1)
    ahead = torch.where(keep & keep.roll(-1), ahead, 0)
    short = F.relu(ahead.abs() - ahead.sign() * (confidence - confidence.roll(-1)))
    return torch.where(ahead == 0, 0, short).reshape(positions.target.shape)
