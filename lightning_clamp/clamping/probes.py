r"""How strongly the loss of dense outputs curves, from backward passes of random signs.

The rows of an item (pixels, labels) are correlated, so the outer product of its summed score says nothing of curvature.
The Fisher information :math:`\sum J^T (\mathrm{diag}(p) - p p^T) J` is what the outer products of

.. math:: J^T v, \qquad v = \sqrt{p} \circ ε - p \, (\sqrt{p} \cdot ε)

are expected to be, with signs ε of even chances, independent over rows and classes (Hutchinson, 1990). The signs come
from a hash of each item's own content: nothing depends on batches, their order, ranks or devices.
"""

import torch
from torch import Tensor

from lightning_clamp._batch import Inputs, n_items, tensors_of
from lightning_clamp._rows import Rows

_OF_BYTES = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# Of splitmix64 (Steele, Lea and Flood, 2014), as signed numbers.
_STEP, _FIRST, _SECOND = (value - 2**64 for value in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def seeds_of(inputs: Inputs) -> Tensor:
    """A number for every item of a batch, int64 ``(N,)``, made of all its bits; zeros at its end change nothing."""
    total = torch.zeros(n_items(inputs), dtype=torch.int64, device=tensors_of(inputs)[0].device)
    for tensor in tensors_of(inputs):
        values = torch.view_as_real(tensor) if tensor.is_complex() else tensor
        bits = values.detach()[..., None].contiguous().view(_OF_BYTES[values.element_size()]).flatten(1).long()
        total = _mixed(total) + (bits * (2 * _mixed(torch.arange(bits.shape[1], device=bits.device)) + 1)).sum(1)
    return _mixed(total)


def probe(probs: Tensor, rows: Rows, seeds: Tensor, number: int) -> Tensor:
    """The v of every row, ``(M, C)``.

    Args:
        probs: Probabilities of the mapped logits, ``(M, C)``.
        rows: Which item each row is of.
        seeds: Of the items, see :func:`seeds_of`.
        number: Which probe.
    """
    first = torch.searchsorted(rows.item, torch.arange(rows.n_items, device=rows.item.device))
    place = torch.arange(len(probs), device=probs.device) - first[rows.item]
    column = torch.arange(probs.shape[1], device=probs.device)
    hashed = _mixed(_mixed(seeds + number)[rows.item, None] + place[:, None] * probs.shape[1] + column)
    turned = probs.sqrt() * (1 - 2 * (hashed & 1)).to(probs)
    return turned - probs * turned.sum(1, keepdim=True)


def _mixed(values: Tensor) -> Tensor:
    """A hash of int64 numbers whose bits are as good as random."""
    values = values + _STEP
    values = (values ^ _shifted(values, 30)) * _FIRST
    values = (values ^ _shifted(values, 27)) * _SECOND
    return values ^ _shifted(values, 31)


def _shifted(values: Tensor, by: int) -> Tensor:
    """To the right, with zeros from the left."""
    return (values >> by).bitwise_and(2 ** (64 - by) - 1)
