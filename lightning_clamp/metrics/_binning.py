"""Sums over samples by confidence: in bins, in fine cells, at equal mass.

One layout throughout: a float64 tensor ``(3, K)`` of K groups of samples in the order of their confidence. Row 0 is
their count, row 1 their summed confidence, row 2 how many were right. Groups are bins, the cells of a histogram, or
single values of the confidence.
"""

import math
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
    """Bin of each confidence (float64). Bins are ``(i/n, (i+1)/n]``; 0 falls in the first, 1 in the last."""
    # Divided by n in float64 (as i / n is): a linspace is off by an ulp at some edges, and would move edge values.
    edges = torch.arange(1, n_bins, dtype=torch.float64, device=confidence.device) / n_bins
    return torch.bucketize(confidence.contiguous(), edges)


def no_sums(n_groups: int, device: torch.device) -> Tensor:
    """Sums over nothing, ``(3, n_groups)``."""
    return torch.zeros(3, n_groups, dtype=torch.float64, device=device)


def add_to_groups(sums: Tensor, index: Tensor, confidence: Tensor, correct: Tensor) -> Tensor:
    """Add float64 confidences and their correctness to the sums of their groups, ``(M,)`` each, in place."""
    return sums.index_add_(1, index, torch.stack([torch.ones_like(confidence), confidence, correct.double()]))


def bin_sums(confidence: Tensor, correct: Tensor, n_bins: int) -> Tensor:
    """Sums per equal-width bin, ``(3, n_bins)``."""
    return add_to_groups(no_sums(n_bins, confidence.device), bin_index(confidence, n_bins), confidence, correct)


def value_sums(confidence: Tensor, correct: Tensor) -> Tensor:
    """Sums per value of the confidence, ``(3, values)``: equal confidences are one group, so order plays no part."""
    values, index = torch.unique(confidence, return_inverse=True)
    return add_to_groups(no_sums(len(values), values.device), index, values[index], correct)


def add_to_cells(sums: Tensor, confidence: Tensor, correct: Tensor, n_bins: int) -> Tensor:
    r"""Add to the sums of the fine histogram, ``(3, cell_count(n_bins))``, in place.

    Cells are equal steps of :math:`\arcsin\sqrt{c}`: 0.0001 wide in the middle and 0.00000001 at 0 and 1, where
    accurate networks put most of their confidences and even cells would throw them together. The bin is added to the
    step, so that an edge of the bins, which falls inside a step, divides it into two cells.
    """
    return add_to_groups(sums, _step(confidence).add_(bin_index(confidence, n_bins)), confidence, correct)


def _step(confidence: Tensor) -> Tensor:
    # Clamped for the sake of nan, which is no index.
    return confidence.sqrt().asin_().mul_(2 * _STEPS / math.pi).long().clamp_(0, _STEPS)


def merged(cells: Tensor, n_bins: int) -> Tensor:
    """Sums per equal-width bin, ``(3, n_bins)``, from those of its cells; exact."""
    edges = torch.arange(1, n_bins, dtype=torch.float64) / n_bins
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
