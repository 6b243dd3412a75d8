"""Targets that are probabilities, as mixup and CutMix make them, and weights of classes."""

import torch
from torch import Tensor

from lightning_clamp._checks import OptionError, check_at_least
from lightning_clamp._rows import Task

# How far from 1 probabilities may sum: those of bfloat16 do by half of this.
_SLACK = 0.01


def are_probabilities(logits: Tensor, target: Tensor, task: Task) -> bool:
    """Whether a target has the probability of each class, ``(N, C)`` or ``(N, C, ...)``, rather than labels.

    Raises:
        ValueError: If it has other classes or positions than the logits.
    """
    tensors = isinstance(logits, Tensor) and isinstance(target, Tensor)
    if not tensors or task != "multiclass" or not target.is_floating_point():
        return False
    if target.ndim != logits.ndim or logits.ndim < 2 or 1 in (logits.shape[1], target.shape[1]):
        return False
    if target.shape != logits.shape:
        on_last = logits.shape == target.movedim(-1, 1).shape
        raise ValueError(
            f"A target of probabilities must have the shape of the logits, {tuple(logits.shape)}, got "
            f"{tuple(target.shape)}{': use target.movedim(-1, 1)' if on_last else ''}."
        )
    return True


def check_probabilities(target: Tensor) -> None:
    """Refuse what is no probability of each class, ``(N, C, ...)``; this reads it, which an accelerator waits for."""
    if not target.numel():
        return
    sums = target.sum(1, dtype=torch.promote_types(target.dtype, torch.float32))
    low, high = (float(end) for end in sums.aminmax())
    if not 1 - _SLACK <= low <= high <= 1 + _SLACK:
        off = low if not low >= 1 - _SLACK else high
        raise OptionError(
            f"A target of probabilities must sum to 1 over the classes, got {off:g}: for several labels per item, each "
            'yes or no, say task="multilabel"; labels are int64.'
        )
    if (least := float(target.min())) < 0:
        raise ValueError(f"A target of probabilities must not be negative, got {least:g}.")


def check_between_labels(target: Tensor) -> None:
    """Refuse what is neither a label, 0 or 1, nor the probability of 1; this reads it."""
    if not target.numel():
        return
    low, high = (float(end) for end in target.aminmax())
    if not 0 <= low <= high <= 1:
        raise OptionError(
            f"A binary target must lie in [0, 1], got {high if low >= 0 else low:g}. Pass ignore_index= for positions "
            "to leave out."
        )


def check_weight(weight: Tensor, classes: int) -> None:
    """Refuse weights of other than the classes; those on an accelerator are not read."""
    if not isinstance(weight, Tensor) or weight.shape != (classes,):
        got = tuple(weight.shape) if isinstance(weight, Tensor) else type(weight).__name__
        raise OptionError(f"`weight` must be a tensor with one number per class, ({classes},), got {got}.")
    if weight.device.type == "cpu" and not torch.compiler.is_compiling():
        check_at_least("weight", float(weight.min()), 0)
