"""What a forward leaves behind on a module (attributes, entries of containers, values of buffers), and its undoing."""

from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

# Of subclasses nobody knows what filling them again would do.
_CONTAINERS = (dict, OrderedDict, defaultdict, list, deque, set)
_COMPRESSED = (torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc)

Undo = Callable[[], None]


def keep_attributes(module: nn.Module) -> Iterator[Undo]:
    """One function per module and container that puts back what is an attribute of it now.

    A network that keeps its activations would otherwise end with ours, in place of those of training, and with their
    graph.
    """
    seen: set[int] = set()
    for part in module.modules():
        yield from _keep(vars(part), seen)


def _keep(value: Any, seen: set[int]) -> Iterator[Undo]:
    if type(value) not in (*_CONTAINERS, tuple) or id(value) in seen:
        return
    seen.add(id(value))
    if type(value) in _CONTAINERS:
        yield _refilling(value)
    for entry in value.values() if isinstance(value, dict) else value:
        yield from _keep(entry, seen)


def _refilling(container: Any) -> Undo:
    before = _entries(container)

    def undo() -> None:
        # Entries are compared by identity: whether tensors are equal is no yes or no.
        if list(map(id, _entries(container))) != list(map(id, before)):
            container.clear()
            fill = container.extend if isinstance(container, list | deque) else container.update
            fill(dict(zip(before[::2], before[1::2], strict=True)) if isinstance(container, dict) else before)

    return undo


def _entries(container: Any) -> list[Any]:
    """The entries of a container; of a dict keys and values by turns."""
    return [part for item in container.items() for part in item] if isinstance(container, dict) else list(container)


def keep_value(buffer: Tensor) -> Undo:
    """A function that gives a tensor its value back, to the last bit, also where its shape was changed."""
    if type(buffer) is not Tensor or buffer.layout != torch.strided or buffer.is_nested or buffer.is_meta:
        return _assigning(buffer)
    storage, place = buffer.untyped_storage(), _place(buffer)
    # Its bytes, because entries of an expanded tensor lie in one place, and NaN is not equal to itself.
    before = _bytes(storage).clone()

    def undo() -> None:
        with torch.no_grad():
            if storage.nbytes() != before.numel():
                storage.resize_(before.numel())
            if _place(buffer) != place:
                buffer.set_(storage, *place[1:])
            if not torch.equal(_bytes(storage), before):
                _bytes(storage).copy_(before)

    return undo


def _assigning(buffer: Tensor) -> Undo:
    """The same for sparse tensors and subclasses, whose memory cannot be had."""
    before = buffer.detach().clone()

    def undo() -> None:
        with torch.no_grad():
            if buffer.layout in _COMPRESSED:
                buffer.resize_as_sparse_(before)  # a copy needs as many entries
            buffer.copy_(before)

    return undo


def _place(tensor: Tensor) -> tuple[int, int, torch.Size, tuple[int, ...]]:
    return tensor.data_ptr(), int(tensor.storage_offset()), tensor.shape, tensor.stride()


def _bytes(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
