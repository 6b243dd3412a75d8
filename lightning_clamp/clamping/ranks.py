"""The processes that share a calibration set: what they add up, and how they fail together."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch import distributed as dist

T = TypeVar("T")

# What ends one rank's work, a Ctrl-C in its process too: the others must hear of it, and it is raised again.
FAILURES = (Exception, KeyboardInterrupt, SystemExit)


class Ranks:
    """The ranks of a process group, each with its own part of the calibration set; or this process alone.

    Every rank makes the same calls in the same order, whatever happens to its part: what goes wrong on one is raised
    on all, and none waits for a rank that has given up.

    Args:
        group: The process group, None for this process alone.

    Attributes:
        rank: Number of this rank in the group, from 0.
        size: Number of ranks.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.rank = 0 if group is None else dist.get_rank(group)
        self.size = 1 if group is None else dist.get_world_size(group)

    def total(self, terms: Sequence[Tensor], error: BaseException | None = None) -> tuple[Tensor, ...]:
        """Add up the ranks' terms, float64 and of the same shapes on all, in one all-reduce of one flat buffer.

        Returns:
            The sums, on the CPU and equal to the last bit on every rank.

        Raises:
            BaseException: ``error``, the one that kept this rank from forming its terms.
            RuntimeError: If another rank had one.
        """
        if self.group is None:
            self.gather(None, error)
            devices = {term.device for term in terms if term.device.type != "cpu"}
            # In one piece: an accelerator is waited for with each.
            return _parts(_flat(terms, devices.pop()).cpu(), terms) if devices else tuple(terms)
        failed = torch.tensor([float(error is not None)], dtype=torch.float64)
        flat = _flat((failed, *terms), self._device)
        dist.all_reduce(flat, group=self.group)
        failures, *sums = _parts(flat.cpu(), (failed, *terms))
        if failures.item():
            self.gather(None, error)
        return tuple(sums)

    def gather(self, value: T, error: BaseException | None = None) -> list[T]:
        """The values of all ranks, in their order; errors as in :meth:`total`."""
        if self.group is None:
            if error is not None:
                raise error
            return [value]
        message = None if error is None else f"{type(error).__name__}: {error}".removesuffix(": ")
        everyone: list[tuple[T, str | None]] = [(value, message)] * self.size
        dist.all_gather_object(everyone, (value, message), group=self.group)
        for rank, (_, told) in enumerate(everyone):
            if told is not None:
                raise error if error is not None else RuntimeError(f"Rank {rank} failed with {told}")
        return [value for value, _ in everyone]

    @contextmanager
    def raise_together(self) -> Iterator[None]:
        """What goes wrong inside on one rank is raised on all after; no rank may wait for another inside."""
        error: BaseException | None = None
        try:
            yield
        except FAILURES as caught:
            error = caught
        self.gather(None, error)

    def check_equal(self, settings: Mapping[str, object]) -> None:
        """Refuse settings that are not the same, in words, on all ranks.

        Raises:
            ValueError: On all of them, with the first that differs.
        """
        first, *others = self.gather({name: repr(value) for name, value in settings.items()})
        for rank, theirs in enumerate(others, start=1):
            for name, value in first.items():
                if theirs.get(name) != value:
                    raise ValueError(
                        f"`{name}` is {value} on rank 0 and {theirs.get(name)} on rank {rank}: pass the same on all."
                    )

    def warn(self, message: str, stacklevel: int = 1) -> None:
        """:func:`warnings.warn`, on the first rank only; raised on all where warnings are errors."""
        with self.raise_together():
            if self.rank == 0:
                warnings.warn(message, stacklevel=stacklevel + 1)

    def broadcast_buffers(self, module: nn.Module) -> None:
        """See that all ranks hold the same network: give them the buffers of the first, in place.

        Distributed training keeps parameters equal, but the statistics of a batch normalisation are those of each
        rank's last batch; the first rank's are what checkpoints hold.

        Raises:
            RuntimeError: If the ranks' parameters differ, or their buffers in name, dtype or shape.
        """
        if self.group is None:
            return
        with self.raise_together():
            buffers = dict(module.named_buffers())
            layout = [(name, buffer.dtype, tuple(buffer.shape)) for name, buffer in buffers.items()]
            sizes = [float(parameter.detach().abs().sum(dtype=torch.float64)) for parameter in module.parameters()]
        everyone = self.gather((layout, torch.tensor(sizes, dtype=torch.float64)))
        # Not to the last bit: the ranks' devices may add up in different order.
        same = [torch.allclose(theirs, everyone[0][1], rtol=1e-6, equal_nan=True) for _, theirs in everyone]
        if not all(same) or any(other != layout for other, _ in everyone):
            raise RuntimeError("The ranks hold different networks: load the same weights on all of them.")
        for buffer in buffers.values():
            value = buffer.detach().to(self._device, copy=True)
            dist.broadcast(value, dist.get_global_rank(self.group, 0), group=self.group)
            with torch.no_grad():
                buffer.copy_(value)

    @property
    def _device(self) -> torch.device:
        """Where the group's backend wants its tensors."""
        if self.group is not None and "nccl" in str(dist.get_backend(self.group)):
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("cpu")


def _flat(terms: Sequence[Tensor], device: torch.device) -> Tensor:
    return torch.cat([term.to(device).flatten() for term in terms])


def _parts(flat: Tensor, like: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The inverse of :func:`_flat`."""
    parts = torch.split(flat, [term.numel() for term in like])
    return tuple(part.reshape(term.shape) for part, term in zip(parts, like, strict=True))


ALONE = Ranks()
