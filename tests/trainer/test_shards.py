"""Every sample on one rank, and on one rank only."""

import os
import random

import numpy as np
import pytest
import torch
from lightning.fabric.utilities.distributed import DistributedSamplerWrapper
from torch import distributed as dist
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    Sampler,
    SubsetRandomSampler,
    TensorDataset,
)

from lightning_clamp._trainer.shards import Shard
from lightning_clamp.clamping.ranks import ALONE, Ranks
from tests.ranks import on_ranks

pytestmark = pytest.mark.ddp

N = 101
DATA = TensorDataset(torch.arange(N))


class Stream(IterableDataset):
    """The whole set on every rank, or every rank its own part."""

    def __init__(self, dealt):
        self.dealt = dealt

    def __iter__(self):
        start, step = (dist.get_rank(), dist.get_world_size()) if self.dealt and dist.is_initialized() else (0, 1)
        return iter(torch.arange(start, N, step))


class Reversing(DataLoader):
    """A loader that does something of its own with its batches."""

    def __iter__(self):
        return (batch[0].flip(0) for batch in super().__iter__())


class NumPySampler:
    """Shuffles by the global generators of NumPy and Python."""

    def __iter__(self):
        order = np.random.permutation(N)  # noqa: NPY002
        return iter(order.tolist() if random.random() < 2 else [])

    def __len__(self):
        return N


def distributed(sampler=None):
    if not dist.is_initialized():
        return sampler
    return DistributedSampler(DATA) if sampler is None else DistributedSamplerWrapper(sampler)


def composed():
    return BatchSampler(SubsetRandomSampler(range(0, N, 2)), 7, drop_last=False)


class Backwards(BatchSampler):
    """A batch sampler of somebody's own."""

    def __iter__(self):
        return (batch[::-1] for batch in super().__iter__())


def batched(kind, sampler=None):
    return kind(distributed(sampler) or sampler or range(N), 7, drop_last=False)


class Labelled(Dataset):
    """Samples that can be told apart by their number alone, and hardly by that."""

    def __len__(self):
        return N

    def __getitem__(self, index):
        return torch.tensor(index // 50)


CONSTANT = Labelled()


class OwnPart(Sampler):
    """Deals itself out, and knows its own length."""

    def __init__(self):
        start, step = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self.indices = range(start, N, step)

    def __iter__(self):
        return iter(self.indices)

    def __len__(self):
        return len(self.indices)


def own_batches():
    start, step = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    return [torch.arange(start, N, step)]


LOADERS = {
    "plain": lambda: DataLoader(DATA, 10),
    "shuffled": lambda: DataLoader(DATA, 10, shuffle=True),
    "workers": lambda: DataLoader(DATA, 10, num_workers=1, shuffle=True),
    "drop_last": lambda: DataLoader(DATA, 10, drop_last=True),
    "subset": lambda: DataLoader(DATA, 10, sampler=SubsetRandomSampler(range(50))),
    "NumPy's order": lambda: DataLoader(DATA, 10, sampler=NumPySampler()),
    "one batch": lambda: DataLoader(DATA, 500),
    "no batching": lambda: DataLoader(DATA, batch_size=None),
    "composed batches": lambda: DataLoader(DATA, batch_sampler=composed()),
    "padded by Lightning": lambda: DataLoader(DATA, 10, sampler=distributed()),
    "padded by Lightning, over a sampler": lambda: DataLoader(
        DATA, 10, sampler=distributed(SubsetRandomSampler(range(51)))
    ),
    "composed of Lightning's": lambda: DataLoader(DATA, batch_sampler=batched(BatchSampler)),
    "composed of Lightning's, own class": lambda: DataLoader(DATA, batch_sampler=batched(Backwards)),
    "composed of Lightning's, over a sampler": lambda: DataLoader(
        DATA, batch_sampler=batched(BatchSampler, SubsetRandomSampler(range(51)))
    ),
    "dealt out by its maker, equal at first": lambda: DataLoader(CONSTANT, 10, sampler=OwnPart()),
    "list, dealt out by its maker, equal at first": lambda: [torch.zeros(0, dtype=torch.long), *own_batches()],
    "list": lambda: list(torch.arange(N).split(10)),
    "stream": lambda: DataLoader(Stream(dealt=False), 10),
    "stream, dealt out by its maker": lambda: DataLoader(Stream(dealt=True), 10),
    "own __iter__": lambda: Reversing(DATA, 10),
    "empty": lambda: DataLoader(TensorDataset(torch.arange(0)), 10),
}


def samples(batches):
    return [
        int(i) for batch in batches for i in torch.as_tensor(batch[0] if isinstance(batch, list) else batch).flatten()
    ]


def read_all():
    """Two passes over each loader, and the number of batches that was promised."""
    seen = {}
    for name, make in LOADERS.items():
        # Ranks need not be in the same random state.
        torch.manual_seed(os.getpid())
        np.random.seed(os.getpid() % 2**32)  # noqa: NPY002
        shard = Shard(make(), Ranks(dist.group.WORLD))
        passes = [list(shard), list(shard)]
        seen[name] = [samples(batches) for batches in passes], len(passes[0]), shard.n_batches
    return seen


@pytest.fixture(scope="module", params=[2, 3])
def dealt(request, tmp_path_factory):
    return on_ranks(request.param, tmp_path_factory.mktemp("shards") / "run", read_all)


@pytest.mark.slow
@pytest.mark.parametrize("name", LOADERS)
def test_parts_add_up_to_the_whole_without_repeats(dealt, name):
    whole = sorted(samples(LOADERS[name]()))
    for number in (0, 1):
        parts = [theirs[name][0][number] for theirs in dealt]
        assert sorted(sample for part in parts for sample in part) == whole
    for _, read, promised in (theirs[name] for theirs in dealt):
        assert promised in (read, None) or name.startswith("stream")


@pytest.mark.parametrize("name", ["plain", "padded by Lightning", "subset"])
def test_samples_are_dealt_out_one_by_one(dealt, name):
    sizes = [len(theirs[name][0][0]) for theirs in dealt]
    assert max(sizes) - min(sizes) <= 1


def test_alone_a_loader_is_read_as_it_is():
    loader = DataLoader(DATA, 10, shuffle=True)
    torch.manual_seed(3)
    expected = samples(loader)
    shard = Shard(loader, ALONE)
    torch.manual_seed(3)
    assert samples(shard) == expected
