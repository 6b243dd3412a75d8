"""Digests: equal values have equal digests, whatever the device, the memory layout or the process that holds them."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

_PLAIN = (str, bytes, int, float, complex, type(None), torch.dtype, torch.device)


def digest(value: Any) -> str:
    """Digest of tensors and plain values, nested in mappings, sequences and sets.

    Of an object of any other kind only the class counts: it need not have a value that is the same elsewhere.
    """
    made = hashlib.blake2b(digest_size=16)
    _add(made, value)
    return made.hexdigest()


def fingerprint(network: nn.Module, saved: Mapping[str, Any] | None = None) -> str:
    """Digest of everything that a network has learned: names, dtypes, shapes and values of :func:`weights`.

    Args:
        network: On any device.
        saved: The ``state_dict`` of a file that was loaded into the network. A file of a bfloat16 model may be loaded
            into one of float32: such tensors count as they are in the file.
    """
    found = weights(network)
    if saved is not None:
        found |= {name: saved[name] for name in found if _rounded(saved.get(name), found[name])}
    return digest(dict(sorted(found.items())))


def weights(network: nn.Module) -> dict[str, Any]:
    """All parameters and buffers by name, also those that a ``state_dict`` of one's own leaves out, and what it adds.

    Not the buffers that were registered with ``persistent=False``: they are constants of the class, or caches that a
    forward may change, which no checkpoint brings back.
    """
    found: dict[str, Any] = dict(network.named_parameters(remove_duplicate=False))
    for path, module in network.named_modules(remove_duplicate=False):
        # Private in torch, which has no public way to ask; a test holds it.
        passing = module._non_persistent_buffers_set  # noqa: SLF001
        buffers = module.named_buffers(path, recurse=False)
        found |= {name: buffer for name, buffer in buffers if name.rpartition(".")[2] not in passing}
    return {**network.state_dict(), **found}


def _rounded(saved: Any, own: Any) -> bool:
    """Whether the network's tensor is that of the file in another dtype."""
    if not isinstance(saved, Tensor) or not isinstance(own, Tensor) or saved.dtype == own.dtype:
        return False
    return torch.equal(saved.to(own.device, own.dtype), own)


def _add(made: hashlib.blake2b, value: Any) -> None:
    """Feed a value, headed by its kind and size, so that no two values are fed the same bytes."""
    if isinstance(value, Tensor):
        # Without what a subclass makes of the operations: only its values count. In torch's notes on extending it,
        # though under a private name.
        with torch._C.DisableTorchFunctionSubclass():  # noqa: SLF001
            _head(made, "tensor", value.dtype, value.layout, "" if is_lazy(value) else tuple(value.shape))
            for part in _strided(value):
                _head(made, part.dtype, tuple(part.shape))
                made.update(_bytes(part))
    elif isinstance(value, Mapping):
        _add_all(made, "mapping", [part for item in value.items() for part in item])
    elif isinstance(value, list | tuple):
        _add_all(made, type(value).__name__, value)
    elif isinstance(value, set | frozenset):
        _add_all(made, "set", sorted(map(digest, value)))
    else:
        text = repr(value) if isinstance(value, _PLAIN) else ""
        _head(made, type(value).__qualname__, len(text), text)


def _add_all(made: hashlib.blake2b, kind: str, values: Iterable[Any]) -> None:
    parts = list(values)
    _head(made, kind, len(parts))
    for part in parts:
        _add(made, part)


def _head(made: hashlib.blake2b, *words: object) -> None:
    made.update(f"{' '.join(map(str, words))};".encode())


def _strided(tensor: Tensor) -> Iterator[Tensor]:
    """The ordinary tensors that hold a tensor's values: of a sparse or wrapped one several, of a meta one none."""
    if tensor.is_meta or is_lazy(tensor):
        return
    if (inner := _inner(tensor)) is not None:
        for part in inner:
            yield from _strided(part)
    elif tensor.is_quantized:
        yield tensor.dequantize()
    elif tensor.layout == torch.strided:
        yield tensor
    elif tensor.is_mkldnn:
        yield tensor.to_dense()
    else:
        sparse = tensor.detach().to_sparse_coo().coalesce()  # type: ignore[no-untyped-call]
        yield from (sparse.indices(), sparse.values())


def _inner(tensor: Tensor) -> list[Tensor] | None:
    """The tensors inside a subclass that has no memory of its own, such as int8 weights with their scales; else None.

    Those that torch can compile name them by its protocol; of others they are the attributes.
    """
    if hasattr(tensor, "__tensor_flatten__"):
        names, _ = tensor.__tensor_flatten__()
        return [getattr(tensor, name) for name in names]
    if type(tensor) in (Tensor, nn.Parameter) or tensor.layout != torch.strided:
        return None
    try:
        tensor.untyped_storage().data_ptr()
    except RuntimeError:
        return [part for part in vars(tensor).values() if isinstance(part, Tensor)]
    return None


def _bytes(tensor: Tensor) -> memoryview:
    """Values in memory order, of any dtype, without a copy if they are contiguous and on the CPU."""
    values = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
    raw = torch.empty(0, dtype=torch.uint8)
    raw.set_(values.untyped_storage(), values.storage_offset() * values.itemsize, (values.nbytes,), (1,))
    return raw.numpy().data
