"""Samples that more than one rank reads, and that would count more than once."""

from collections.abc import Sequence
from hashlib import blake2b

import torch
from torch import Tensor

from lightning_clamp._batch import Inputs, n_items, tensors_of
from lightning_clamp.clamping.ranks import Ranks

# Values of an item that are looked at: enough to tell images apart, and few enough to cost nothing.
_VALUES = 256


def marks_of(inputs: Inputs) -> list[bytes]:
    """A mark of every item of a batch, ``N`` in all: equal for equal items, and hardly ever for others."""
    marks = [blake2b(digest_size=8) for _ in range(n_items(inputs))]
    for tensor in tensors_of(inputs):
        for mark, row in zip(marks, _some_bytes(tensor), strict=True):
            mark.update(row)
    return [mark.digest() for mark in marks]


def _some_bytes(tensor: Tensor) -> list[bytes]:
    """Bytes of values from all over each item."""
    rows = tensor.detach()[..., None].flatten(1)
    rows = rows[:, :: max(1, rows.shape[1] // _VALUES)].cpu().contiguous()
    return [row.tobytes() for row in rows.view(torch.uint8).numpy()]


def warn_of_repeats(marks: Sequence[Sequence[bytes]], ranks: Ranks) -> None:
    """Warn if ranks share samples, and more of them than equal samples in the set itself explain.

    Args:
        marks: Those of the samples that each rank has read.
        ranks: The ranks, all of which call this.
    """
    total, distinct = sum(map(len, marks)), len(set().union(*marks))
    own = [len(set(each)) for each in marks]
    shared, repeated = sum(own) - distinct, total - sum(own)
    # Of samples that the set holds twice, one in `size` pairs falls to one rank.
    if shared > 0.01 * total and shared > ranks.size * repeated:
        ranks.warn(
            f"The ranks read {total} samples of the calibration set, of which only {distinct} differ, so some count "
            "more than once: each rank splits or orders the set in another way. Seed that alike on all ranks "
            "(seed_everything) and sort lists of files, or give each rank a part of its own.",
            stacklevel=3,
        )
