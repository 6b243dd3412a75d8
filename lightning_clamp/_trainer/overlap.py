"""Samples that two sets share, as far as that is seen without reading them."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from lightning.fabric.utilities.data import sized_len
from torch import Tensor
from torch.utils.data import Subset, TensorDataset


def n_shared(first: Any, second: Any) -> int:
    """How many samples two datasets, or lists of batches, have in common.

    Those of one dataset are told by their indices, those of tensors by where they lie in memory; no others are seen.
    """
    (root, chosen), (other, others) = _rooted(first), _rooted(second)
    if root is other:
        return len(set(chosen) & set(others))
    ours = {*_addresses(root, chosen)}
    return len(ours & {*_addresses(other, others)}) if ours else 0


def _rooted(dataset: Any) -> tuple[Any, Sequence[int]]:
    """The dataset that a subset, or a subset of one, was taken from, and the indices in it."""
    if not isinstance(dataset, Subset):
        return dataset, range(sized_len(dataset) or 0)
    root, indices = _rooted(dataset.dataset)
    return root, [indices[int(i)] for i in dataset.indices] if len(indices) else dataset.indices


def _addresses(data: Any, chosen: Sequence[int]) -> Iterator[int]:
    """Where the samples of a dataset of tensors, or of a list of batches of them, begin in memory."""
    if isinstance(data, TensorDataset):
        yield from _of_rows(data.tensors[0], chosen)
    elif type(data) is list:  # one of somebody's own may read files when it is iterated
        firsts = (batch[0] for batch in data if isinstance(batch, tuple | list) and batch)
        for first in firsts:
            if isinstance(first, Tensor) and first.ndim:
                yield from _of_rows(first, range(len(first)))


def _of_rows(tensor: Tensor, chosen: Sequence[int]) -> Iterable[int]:
    if tensor.layout is not torch.strided:
        return ()
    start, step = tensor.data_ptr(), tensor.stride(0) * tensor.element_size()
    return (start + step * (i % len(tensor)) for i in chosen)
