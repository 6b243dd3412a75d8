"""Unrepeated shards: how several ranks deal a calibration set out among themselves.

Lightning's own distributed samplers repeat samples until all ranks have as many, which a calibration must not count
twice. Here ranks may have parts of different size, or none.
"""

import copy
import random
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import numpy as np
import torch
from lightning.fabric.utilities.data import has_iterable_dataset, sized_len
from lightning.fabric.utilities.distributed import DistributedSamplerWrapper
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler

from lightning_clamp._digest import digest
from lightning_clamp.clamping.passes import is_own_iterator
from lightning_clamp.clamping.ranks import Ranks

# Indices that are compared: a sampler need not come to an end.
_LONGEST_ORDER = 10**6


class Shard:
    """The part of a loader's batches that one rank reads.

    A loader that gives every rank the same is dealt out: sample by sample where it is a DataLoader over a map-style
    dataset, so that no rank loads what another computes; else batch by batch. A loader that gives every rank something
    else has been dealt out by its maker (an iterable dataset that asks for its rank), and is read as it is.

    Args:
        loader: Re-iterable of batches. A ``DistributedSampler`` in it is replaced by one that repeats nothing.
        ranks: Those that call this with the same loader, all of them together.

    Attributes:
        loader: What this rank iterates.
        first: The first batch of the loader (of this rank's part where its maker dealt it out), None if it has none.
        n_batches: Number of this rank's batches; None for loaders that do not know it.
    """

    def __init__(self, loader: Iterable[Any], ranks: Ranks) -> None:
        self.ranks = ranks
        self.loader: Iterable[Any] = loader
        self._may_be_spent = is_own_iterator(loader)
        with ranks.raise_together():
            if ranks.size > 1:
                self.loader = _dealt(loader, 0, 1)
            self.first = next(iter(self), None)
            seen = self._seen() if ranks.size > 1 else ""
        everyone = ranks.gather(seen)
        with ranks.raise_together():
            if len(set(everyone)) == 1 < ranks.size:
                self.loader = _dealt(loader, ranks.rank, ranks.size)
            self.n_batches = sized_len(self.loader)

    def _seen(self) -> str:
        """Equal on ranks that read the same: first and last batch, and the order, as far as they are seen unread."""
        self._seed()
        return _digest(self.first, _last(self.loader), sized_len(self.loader), _order(self.loader))

    def __iter__(self) -> Iterator[Any]:
        """Yield this rank's batches, in an order that all ranks draw alike."""
        self._seed()
        return iter(self.loader)

    def check_starts_anew(self) -> None:
        """Refuse a loader that has nothing more to give once it was read to its end.

        Raises:
            MisconfigurationException: If so: its first batch, which was tried, is lost.
        """
        if self._may_be_spent and self.first is not None and next(iter(self), None) is None:
            raise MisconfigurationException(
                "The calibration set can be read once, and its first batch was taken to try it: let its `__iter__` "
                "start anew, as every pass needs it to."
            )

    def _seed(self) -> None:
        if self.ranks.size > 1:
            # A shuffled loader must be shuffled alike everywhere, or the ranks' parts overlap. Callers keep the random
            # state for after.
            random.seed(0)
            np.random.seed(0)  # noqa: NPY002 - the global state is what users' samplers draw from
            torch.manual_seed(0)


def _digest(*parts: Any) -> str:
    """Equal for equal tensors, numbers and strings, however they are nested, in objects too."""
    leaves: list[Any] = []

    def add(value: Any) -> Any:
        leaves.append(value)
        return value

    apply_to_collection(parts, (Tensor, int, str), add)
    return digest(leaves)


def _last(loader: Iterable[Any]) -> Any:
    """The last batch, where there is a list of them."""
    batches = loader.source if isinstance(loader, _EveryNth) else None
    return batches[-1] if isinstance(batches, list) and batches else None


def _order(loader: Iterable[Any]) -> list[Any]:
    """The indices that a DataLoader reads; none where only its dataset knows."""
    if not isinstance(loader, DataLoader):
        return []
    return list(islice(loader.batch_sampler or loader.sampler, _LONGEST_ORDER))


def _dealt(loader: Iterable[Any], rank: int, n_ranks: int) -> Iterable[Any]:
    """Every ``n_ranks``-th sample, or batch where samples cannot be told apart before they are loaded."""
    plain = isinstance(loader, DataLoader) and type(loader).__iter__ is DataLoader.__iter__
    if not plain or has_iterable_dataset(loader):
        return _EveryNth(loader, rank, n_ranks)
    assert isinstance(loader, DataLoader)
    options: dict[str, Any] = {
        name: getattr(loader, name)
        for name in (
            "num_workers", "collate_fn", "pin_memory", "timeout", "worker_init_fn", "multiprocessing_context",
            "generator", "prefetch_factor", "persistent_workers",
        )
    }  # fmt: skip
    if loader.batch_size is None and loader.batch_sampler is not None:
        # Batches that somebody composed stay whole: their samples may not fit together otherwise.
        batches = _EveryNth(_undealt_batches(loader.batch_sampler), rank, n_ranks)
        return DataLoader(loader.dataset, batch_sampler=batches, **options)
    indices = _EveryNth(_Indices(loader), rank, n_ranks)
    return DataLoader(loader.dataset, batch_size=loader.batch_size, sampler=indices, **options)


class _EveryNth:
    """Every n-th element of a re-iterable, from one on."""

    def __init__(self, source: Iterable[Any], start: int, step: int) -> None:
        self.source, self.start, self.step = source, start, step

    def __iter__(self) -> Iterator[Any]:
        return islice(self.source, self.start, None, self.step)

    def __len__(self) -> int:
        return len(range(self.start, len(self.source), self.step))  # type: ignore[arg-type]


class _Indices:
    """The indices of the samples that a loader reads in one process."""

    def __init__(self, loader: DataLoader[Any]) -> None:
        self.sampler = _Undealt(loader.sampler)
        self.batch_size = loader.batch_size or 1
        self.drop_last = loader.drop_last

    def __iter__(self) -> Iterator[Any]:
        return islice(self.sampler, len(self) if self.drop_last else None)

    def __len__(self) -> int:
        number = len(self.sampler)
        return number - number % self.batch_size if self.drop_last else number


class _Undealt:
    """What a sampler gives in one process: all of it, without the repeats of a ``DistributedSampler``."""

    def __init__(self, sampler: Any) -> None:
        self.sampler = sampler

    def __iter__(self) -> Iterator[Any]:
        if isinstance(self.sampler, DistributedSamplerWrapper):
            # Its dataset are the indices of the sampler that it wraps.
            indices: Any = self.sampler.dataset
            indices.reset()
            return (indices[i] for i in range(len(indices)))
        if isinstance(self.sampler, DistributedSampler):
            return iter(range(len(self)))
        return iter(self.sampler)

    def __len__(self) -> int:
        counted: Any = self.sampler.dataset if isinstance(self.sampler, DistributedSampler) else self.sampler
        return len(counted)


def _undealt_batches(batch_sampler: Any) -> Any:
    """A batch sampler as in one process, where it is made of a ``DistributedSampler``."""
    if not isinstance(getattr(batch_sampler, "sampler", None), DistributedSampler):
        return batch_sampler
    again = copy.copy(batch_sampler)
    again.sampler = _Undealt(batch_sampler.sampler)
    return again
