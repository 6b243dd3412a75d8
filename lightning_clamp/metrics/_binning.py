"""Sums over samples by confidence: in bins, in fine cells, at equal mass.

One layout throughout: a float64 tensor ``(3, K)`` of K groups of samples in the order of their confidence. Row 0 is
their count, row 1 their summed confidence, row 2 how many were right. Groups are bins, the cells of a histogram, or
single values of the confidence.
"""

import math
from collections.abc import Callable
from numbers import Integral

import torch
from torch import Tensor

# Steps of the angle that cells are laid out by: 369 KB of float64 sums. Prime, so that no step ends on the edge of a
# bin (edges 1/4, 1/2 and 3/4 are rational fractions of a right angle), where rounding would decide.
_STEPS = 15_361


def checked_bins(n_bins: int) -> int:
    """Return ``n_bins``, or say that it must be at least 1."""
    if not isinstance(n_bins, Integral) or n_bins < 1:
        raise ValueError(f"`n_bins` must be a whole number of at least 1, got {n_bins}.")
    return int(n_bins)


def cell_count(n_bins: int) -> int:
    """Cells of the histogram."""
    return _STEPS + n_bins


def bin_index(confidence: Tensor, n_bins: int) -> Tensor:
    """Bin of each confidence (float32 or float64). Bins are ``(i/n, (i+1)/n]``; 0 falls in the first, 1 in the last."""
    edges = _bin_edges_32 if confidence.dtype == torch.float32 else _bin_edges
    return torch.bucketize(confidence.contiguous(), _kept(edges, n_bins, confidence.device))


# Kept, since to make them takes an accelerator longer than to use them. Of lru_cache a compiler warns.
_KEPT: dict[tuple[str, int, torch.device], Tensor] = {}


def _kept(make: Callable[[int], Tensor], number: int, device: torch.device) -> Tensor:
    """What ``make`` makes of a number, made once."""
    key = make.__name__, number, device
    if key not in _KEPT:
        _KEPT[key] = make(number).to(device)
    return _KEPT[key]


def _bin_edges(n_bins: int) -> Tensor:
    # Divided by n in float64 (as i / n is): a linspace is off by an ulp at some edges, and would move edge values.
    return torch.arange(1, n_bins, dtype=torch.float64) / n_bins


def _bin_edges_32(n_bins: int) -> Tensor:
    # A float32 number is above an edge if it is above the largest float32 number that is not.
    edges = _bin_edges(n_bins)
    nearest = edges.float()
    return nearest.where(nearest <= edges, nearest.nextafter(torch.zeros_like(nearest)))


def no_sums(n_groups: int, device: torch.device) -> Tensor:
    """Sums over nothing, ``(3, n_groups)``."""
    return torch.zeros(3, n_groups, dtype=torch.float64, device=device)


def addends(confidence: Tensor, predicted: Tensor, label: Tensor | bool = True) -> Tensor:
    """What samples add to the sums of their groups, ``(3, M)`` float64: 1, the confidence, and whether they are right.

    Args:
        confidence: At most 1, ``(M,)``; nan stays nan.
        predicted: Equal to ``label`` where a sample is right, ``(M,)``.
        label: A value, or one for each.
    """
    added = confidence.new_empty(3, len(confidence), dtype=torch.float64)
    # Two rows at once: of a number and nan, the larger is the number.
    torch.fmax(confidence, _kept(_one_and_nan, 1, confidence.device), out=added[:2])
    torch.eq(predicted, label, out=added[2])
    return added


def _one_and_nan(one: int) -> Tensor:
    return torch.tensor([[one], [torch.nan]], dtype=torch.float64)


def counted(values: Tensor) -> Tensor:
    """1 and the value of each sample, ``(2, M)`` float64; nan twice where it is nan."""
    # Two rows at once: between the limits lies 1 in the first, and every number in the second.
    return torch.clamp(values, _kept(_limits, -1, values.device), _kept(_limits, 1, values.device))


def _limits(sign: int) -> Tensor:
    return torch.tensor([[1.0], [sign * torch.inf]], dtype=torch.float64)


def bin_sums(confidence: Tensor, correct: Tensor, n_bins: int) -> Tensor:
    """Sums per equal-width bin, ``(3, n_bins)``."""
    added = addends(confidence, correct)
    return no_sums(n_bins, confidence.device).index_add_(1, bin_index(added[1], n_bins), added)


def value_sums(confidence: Tensor, correct: Tensor) -> Tensor:
    """Sums per value of the confidence, ``(3, values)``: equal confidences are one group, so order plays no part."""
    values, index = torch.unique(confidence, return_inverse=True)
    return no_sums(len(values), values.device).index_add_(1, index, addends(values[index], correct))


def cell_index(confidence: Tensor, n_bins: int) -> Tensor:
    r"""Cell of each confidence (float64) in a fine histogram of ``cell_count(n_bins)`` cells; nan is in any.

    Cells are equal steps of :math:`\arcsin\sqrt{c}`: 0.0001 wide in the middle and 0.00000001 at 0 and 1, where
    accurate networks put most of their confidences and even cells would throw them together. The bin is added to the
    step, so that an edge of the bins, which falls inside a step, divides it into two cells.
    """
    if confidence.device.type == "cpu":
        return _step(confidence).add_(bin_index(confidence, n_bins))
    # A search takes a processor longer than the arcsine; an accelerator needs one launch for it instead of eight.
    return torch.bucketize(confidence, _kept(_cell_edges, n_bins, confidence.device))


def _step(confidence: Tensor) -> Tensor:
    # Clamped for the sake of nan, which is no index.
    return confidence.sqrt().asin_().mul_(2 * _STEPS / math.pi).long().clamp_(0, _STEPS)


def _cell_edges(n_bins: int) -> Tensor:
    steps = (torch.arange(1, _STEPS + 1, dtype=torch.float64) * (math.pi / (2 * _STEPS))).sin().square()
    # A step begins at its lower edge, and a bin just above it: the largest number below stands for that.
    steps = torch.nextafter(steps, torch.zeros_like(steps))
    return torch.cat([steps, _bin_edges(n_bins)]).sort().values


def merged(cells: Tensor, n_bins: int) -> Tensor:
    """Sums per equal-width bin, ``(3, n_bins)``, from those of its cells; exact."""
    edges = _bin_edges(n_bins)
    first = _step(edges) + torch.arange(1, n_bins)
    index = torch.bucketize(torch.arange(cells.shape[1]), first, right=True).to(cells.device)
    return no_sums(n_bins, cells.device).index_add_(1, index, cells)


def equal_mass_sums(sums: Tensor, n_bins: int) -> Tensor:
    """Sums in bins of equal counts, ``(3, n_bins)``, from groups in the order of confidence.

    A group that lies across the boundary of two bins is shared between them in proportion: bins hold exactly the same
    mass, and samples of equal confidence are treated alike, whatever their order.
    """
    sums = sums[:, sums[0] > 0]
    if not sums.shape[1]:
        return sums.new_zeros(3, n_bins)
    cumulative = torch.cat([sums.new_zeros(3, 1), sums.cumsum(1)], 1)
    count = cumulative[0].contiguous()
    boundary = torch.arange(n_bins + 1, dtype=torch.float64, device=sums.device) / n_bins * count[-1]
    right = torch.searchsorted(count, boundary).clamp(1, sums.shape[1])
    share = (boundary - count[right - 1]) / (count[right] - count[right - 1])
    at_boundary = torch.lerp(cumulative[:, right - 1], cumulative[:, right], share)
    return at_boundary.diff(dim=1)
