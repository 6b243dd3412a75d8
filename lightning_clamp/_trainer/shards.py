"""Unrepeated shards: how several ranks deal a calibration set out among themselves.

Lightning's own distributed samplers repeat samples until all ranks have as many, which a calibration must not count
twice. Here ranks may have parts of different size, or none.
"""

import random
from collections.abc import Iterable, Iterator
from hashlib import blake2b
from itertools import islice
from typing import Any

import numpy as np
import torch
from lightning.fabric.utilities.data import has_iterable_dataset, sized_len
from lightning.fabric.utilities.distributed import DistributedSamplerWrapper
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler

from lightning_clamp.clamping.ranks import Ranks


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
    """

    def __init__(self, loader: Iterable[Any], ranks: Ranks) -> None:
        self.ranks = ranks
        self.loader: Iterable[Any] = _dealt(loader, 0, 1) if ranks.size > 1 else loader
        with ranks.raise_together():
            self.first = next(iter(self), None)
        if len(set(ranks.gather(_digest(self.first)))) == 1 < ranks.size:
            self.loader = _dealt(loader, ranks.rank, ranks.size)

    def __iter__(self) -> Iterator[Any]:
        """Yield this rank's batches, in an order that all ranks draw alike."""
        if self.ranks.size > 1:
            # A shuffled loader must be shuffled alike everywhere, or the ranks' parts overlap. Callers keep the random
            # state for after.
            random.seed(0)
            np.random.seed(0)  # noqa: NPY002 - the global state is what users' samplers draw from
            torch.manual_seed(0)
        return iter(self.loader)

    @property
    def n_batches(self) -> int | None:
        """Number of this rank's batches; None for loaders that do not know it."""
        return sized_len(self.loader)


def _digest(batch: Any) -> str:
    """Equal for batches of equal tensors."""
    digest = blake2b(digest_size=16)

    def add(tensor: Tensor) -> Tensor:
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return tensor

    apply_to_collection(batch, Tensor, add)
    return digest.hexdigest()


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
        return DataLoader(loader.dataset, batch_sampler=_EveryNth(loader.batch_sampler, rank, n_ranks), **options)
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
        self.sampler: Any = loader.sampler
        self.batch_size = loader.batch_size or 1
        self.drop_last = loader.drop_last

    def __iter__(self) -> Iterator[Any]:
        return islice(self._of_sampler(), len(self) if self.drop_last else None)

    def __len__(self) -> int:
        counted: Any = self.sampler.dataset if isinstance(self.sampler, DistributedSampler) else self.sampler
        number = len(counted)
        return number - number % self.batch_size if self.drop_last else number

    def _of_sampler(self) -> Iterable[Any]:
        if isinstance(self.sampler, DistributedSamplerWrapper):
            # Its dataset are the indices of the sampler that it wraps.
            indices: Any = self.sampler.dataset
            indices.reset()
            return (indices[i] for i in range(len(indices)))
        if isinstance(self.sampler, DistributedSampler):
            return range(len(self.sampler.dataset))  # type: ignore[arg-type]
        return self.sampler  # type: ignore[no-any-return]
