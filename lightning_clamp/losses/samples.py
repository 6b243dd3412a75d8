"""What a loss keeps for every sample of the training set, by the sample's index."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from lightning_clamp._batch import BatchKeys

# Where items are mappings, their index has this key.
INDEX = "index"


class Indexed(Dataset[Any]):
    """A map-style dataset whose items know their index.

    ``(inputs, target)`` become ``(inputs, target, index)``, and a mapping has it as ``"index"``.
    """

    def __init__(self, dataset: Dataset[Any]) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        """As many as there are."""
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> Any:
        """The item and its index."""
        item = self.dataset[index]
        if isinstance(item, Mapping):
            return {**item, INDEX: index}
        if not isinstance(item, tuple | list):
            raise TypeError(f"Indexed needs items (inputs, target) or mappings, got {type(item).__name__}.")
        return (*item, index)


def index_of(batch: Any, keys: BatchKeys | None = None) -> Tensor | None:
    """The index that :class:`Indexed` has put into a batch; None if it has none.

    Args:
        batch: A mapping, or a tuple whose last entry is the index unless it is one of ``keys``.
        keys: What input and target are called.
    """
    if isinstance(batch, Mapping):
        index = batch.get(INDEX)
    elif isinstance(batch, tuple | list) and len(batch) > 2:
        index = None if len(batch) - 1 in _positions(keys, len(batch)) else batch[-1]
    else:
        index = None
    return index if isinstance(index, Tensor) else None


def _positions(keys: BatchKeys | None, size: int) -> set[int]:
    inputs, target = keys or (0, 1)
    named = [target, *([inputs] if isinstance(inputs, str | int) else inputs)]
    return {key % size for key in named if isinstance(key, int)}


class SampleValues:
    """A number for every sample by its index, 0 until it is set; there are as many as the largest index asks for.

    Attributes:
        values: Shape ``(n,)``, float32.
        touched: Which were set since the last :meth:`merge`, bool, ``(n,)``.
        pending: Whether any was.
    """

    def __init__(self) -> None:
        # On the CPU also where modules are made on another device, or on none.
        self.restore(torch.zeros(0, device="cpu"))

    def restore(self, values: Tensor) -> None:
        """Start from saved values."""
        self.values = values.clone()
        self.touched = torch.zeros(len(values), dtype=torch.bool, device=values.device)
        self.pending = False

    def of(self, index: Tensor) -> Tensor:
        """The values of the samples at ``index``, ``(N,)``."""
        if index.is_floating_point() or index.ndim != 1 or not len(index):
            raise ValueError(f"Indices must be integers of shape (N,), got {index.dtype} of {tuple(index.shape)}.")
        low, high = (int(end) for end in index.aminmax())
        if low < 0:
            raise ValueError(f"Indices must be integers from 0 on, got {low}.")
        self._grow(high + 1, index.device)
        return self.values[index]

    def put(self, index: Tensor, values: Tensor) -> None:
        """Set the values of samples that :meth:`of` was asked for."""
        self.values[index] = values.to(self.values.dtype)
        self.touched[index] = True
        self.pending = True

    def merge(self, reduce: Callable[[Tensor, str], Tensor]) -> None:
        """Give all ranks the values that any of them has set; the mean, where several have.

        Args:
            reduce: Reduces a tensor over the ranks, by ``"sum"`` or ``"max"``.
        """
        device = self.values.device
        self._grow(int(reduce(torch.tensor(len(self.values), device=device), "max")), device)
        count = reduce(self.touched.to(self.values.dtype), "sum")
        total = reduce(torch.where(self.touched, self.values, 0), "sum")
        self.values = torch.where(count > 0, total / count.clamp_min(1), self.values)
        self.touched = torch.zeros_like(self.touched)
        self.pending = False

    def _grow(self, size: int, device: torch.device) -> None:
        more = max(0, size - len(self.values))
        if not more and self.values.device == device:
            return
        self.values = torch.cat([self.values.to(device), torch.zeros(more, device=device)])
        self.touched = torch.cat([self.touched.to(device), torch.zeros(more, dtype=torch.bool, device=device)])
