"""What the metrics and their functions accept, and the sentences that say so."""

import re
from collections.abc import Callable

import torch
from torch import Tensor

# Rounding of half-precision probabilities may move the sum of a row by this much.
_SUM_TOLERANCE = 0.01


class OptionError(ValueError):
    """A refusal that names options, as ```clip``` or ``clip=``: a class around the function may call them otherwise."""

    def renamed(self, name_of: Callable[[str], str]) -> "OptionError":
        """The same refusal where the options are called ``name_of(option)``."""
        return OptionError(re.sub(r"(?<=`)\w+(?=`)|\b\w+(?==)", lambda found: name_of(found[0]), str(self)))


def check_rows(scores: Tensor, target: Tensor, name: str = "probs") -> None:
    """Refuse what is not ``(N, C)`` scores with ``(N,)`` class indices.

    Raises:
        ValueError: If shapes do not fit, or an index is out of range.
        TypeError: If either is no tensor, the scores are not float or the target holds no integers.
    """
    if not isinstance(scores, Tensor) or not scores.is_floating_point():
        raise TypeError(f"`{name}` must be a float tensor, got {type(scores).__name__}.")
    if not isinstance(target, Tensor):
        raise TypeError(f"`target` must be a tensor, got {type(target).__name__}.")
    if scores.ndim != 2:
        raise ValueError(f"`{name}` must have shape (N, C), got {tuple(scores.shape)}.")
    if target.is_floating_point() or target.dtype == torch.bool:
        raise TypeError(f"`target` must hold class indices as int64, got {target.dtype}.")
    if target.shape != scores.shape[:1]:
        raise ValueError(f"`target` must have shape ({len(scores)},), got {tuple(target.shape)}.")
    check_range(target, scores.shape[1])


def check_probs(probs: Tensor, target: Tensor) -> None:
    """:func:`check_rows`, and refuse what are no probabilities."""
    check_rows(probs, target)
    if not are_probs(probs):
        raise ValueError("`probs` must be probabilities: non-negative and adding up to 1 over the classes.")


def are_probs(rows: Tensor) -> bool:
    """Whether rows are non-negative and add up to 1; nan are not."""
    return not len(rows) or bool(((rows.sum(1) - 1).abs() <= _SUM_TOLERANCE).all() and (rows >= 0).all())


def check_range(target: Tensor, classes: int, way_out: str = "") -> None:
    """Refuse class indices out of range; ``way_out`` says what to do about it.

    Raises:
        ValueError: If an index is not in ``[0, classes)``.
    """
    if not len(target):
        return
    low, high = (int(end) for end in target.aminmax())
    if low < 0 or high >= classes:
        raise OptionError(f"Targets must lie in [0, {classes - 1}], got {low if low < 0 else high}.{way_out}")


def check_at_least(name: str, value: float, least: float) -> None:
    """Refuse an option below ``least`` or nan."""
    if not value >= least:
        raise OptionError(f"`{name}` must be at least {least}, got {value}.")


def check_between(name: str, value: float, low: float, high: float) -> None:
    """Refuse an option outside ``[low, high]``."""
    if not low <= value <= high:
        raise OptionError(f"`{name}` must lie in [{low}, {high}], got {value}.")


def check_choice(name: str, value: object, choices: tuple[object, ...]) -> None:
    """Refuse an option that is none of ``choices``."""
    if value not in choices:
        raise OptionError(f"`{name}` must be one of {choices}, got {value!r}.")
