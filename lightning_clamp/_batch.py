"""Batches as people have them, and logits as networks return them: which entry is which, and nothing else of either."""

import copy
from collections.abc import Callable, Mapping, Sequence, Sized
from dataclasses import is_dataclass, replace
from typing import Any, TypeAlias

from torch import Tensor

# One tensor, or several by the names of the arguments that a network's forward has for them.
Inputs: TypeAlias = Tensor | Mapping[str, Tensor]
BatchKeys: TypeAlias = tuple[str | int | Sequence[str], str | int]

_LOGITS = ("logits", "out")


def as_pair(batch: Any, keys: BatchKeys | None = None) -> tuple[Inputs, Tensor]:
    """Take input and target out of a batch.

    Args:
        batch: A pair; with ``keys`` also a longer tuple, a mapping, or any object with attributes. The input may itself
            be a mapping, of the arguments of the network's forward.
        keys: ``(input, target)``, each a key, an attribute's name or a position; the input may be several names, of
            arguments of the network's forward. None for a pair ``(inputs, target)``.

    Raises:
        TypeError: If the batch has no such entries, or they are no tensors.
    """
    if keys is None:
        if not isinstance(batch, tuple | list) or len(batch) != 2:
            raise TypeError(
                f"Every batch must be a pair (inputs, target), got {_described(batch)}: pass a loader that yields "
                f"pairs, or say which entries they are, batch_keys={_proposed(batch)}."
            )
        keys = (0, 1)
    inputs, target = input_of(batch, keys), _entry(batch, keys[1])
    if not isinstance(target, Tensor):
        raise TypeError(f"The target of a batch must be a tensor, got {type(target).__name__}.")
    return inputs, target


def input_of(batch: Any, keys: BatchKeys) -> Inputs:
    """The input of a batch, which need not have a target; errors as in :func:`as_pair`."""
    if isinstance(keys[0], str | int):
        inputs = _entry(batch, keys[0])
        if isinstance(inputs, Tensor):
            return inputs
        if not isinstance(inputs, Mapping):
            raise TypeError(f"The input of a batch must be a tensor or a dict of tensors, got {type(inputs).__name__}.")
        several = dict(inputs)
    else:
        several = {name: _entry(batch, name) for name in keys[0]}
    for name, value in several.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"The input {name!r} of a batch must be a tensor, got {type(value).__name__}.")
    return several


def check_batch_keys(keys: Any) -> None:
    """Refuse what cannot be :data:`BatchKeys`."""
    if keys is None:
        return
    pair = list(keys) if isinstance(keys, list | tuple) else []
    several = bool(pair) and isinstance(pair[0], list | tuple)
    names = pair[0] if several else pair[:1]
    kinds = str if several else str | int
    right = len(pair) == 2 and names and all(isinstance(name, kinds) for name in names)
    if not right or not isinstance(pair[1], str | int):
        raise ValueError(
            "`batch_keys` must be a pair, the key of the input (or a list of names of forward's arguments) and the key "
            f"of the target, such as ('image', 'label') or (0, 1), got {keys!r}."
        )


def _entry(batch: Any, key: str | int) -> Any:
    return entry_of(batch, key, "batch_keys")


def entry_of(batch: Any, key: str | int, option: str) -> Any:
    """The entry of a batch that an option names.

    Raises:
        TypeError: If there is none.
    """
    try:
        if isinstance(key, str) and not isinstance(batch, Mapping):
            return getattr(batch, key)
        return batch[key]
    except (AttributeError, KeyError, IndexError, TypeError) as error:
        raise TypeError(f"A batch has no entry {key!r}, which `{option}` names: got {_described(batch)}.") from error


def _described(batch: Any) -> str:
    kind = type(batch).__name__
    if isinstance(batch, Mapping):
        return f"{kind} of {', '.join(map(str, batch))}"
    return f"{kind} of {len(batch)} items" if isinstance(batch, Sized) else kind


def _proposed(batch: Any) -> str:
    return "('image', 'label')" if not isinstance(batch, tuple | list) else "(0, 1)"


# Inputs of one tensor or of several


def call_network(network: Callable[..., Any], inputs: Inputs) -> Any:
    """The network's output for a batch: several inputs are its keyword arguments."""
    return network(**inputs) if isinstance(inputs, Mapping) else network(inputs)


def map_tensors(inputs: Inputs, change: Callable[[Tensor], Tensor]) -> Inputs:
    """``change`` applied to every tensor."""
    return {name: change(value) for name, value in inputs.items()} if isinstance(inputs, Mapping) else change(inputs)


def n_items(inputs: Inputs) -> int:
    """Size of the batch."""
    return len(next(iter(inputs.values()))) if isinstance(inputs, Mapping) else len(inputs)


def chunks(inputs: Inputs, size: int) -> list[Inputs]:
    """The batch in parts of at most ``size`` items."""
    return [map_tensors(inputs, lambda value: value[i : i + size]) for i in range(0, n_items(inputs), size)]  # noqa: B023


# Outputs


def logits_of(output: Any) -> Tensor:
    """The logits that a network returned: as a tensor, as ``.logits``, or in a mapping as ``logits`` or ``out``.

    Raises:
        TypeError: If there are none.
    """
    logits = output
    if isinstance(output, Mapping):
        logits = next((output[name] for name in _LOGITS if name in output), None)
    elif not isinstance(output, Tensor):
        logits = getattr(output, "logits", None)
    if not isinstance(logits, Tensor):
        raise TypeError(
            f"The network must return a tensor of logits, or have them as `.logits`, got {_described(output)}: wrap it "
            "in an nn.Module whose forward returns the logits alone."
        )
    return logits


def with_logits(output: Any, logits: Tensor) -> Any:
    """A copy of a network's output with other logits; of the same type."""
    if isinstance(output, Tensor):
        return logits
    if isinstance(output, tuple) and hasattr(output, "_replace"):
        return output._replace(logits=logits)
    if is_dataclass(output) and not isinstance(output, Mapping | type):
        return replace(output, logits=logits)
    again = copy.copy(output)
    if isinstance(output, Mapping):
        again[next(name for name in _LOGITS if name in output)] = logits
    else:
        again.logits = logits
    return again
