"""Batches as people have them, and logits as networks return them: which entry is which, and nothing else of either."""

import copy
from collections.abc import Callable, Mapping, Sequence, Sized
from dataclasses import is_dataclass, replace
from typing import Any, TypeAlias

from torch import Tensor

from lightning_clamp._checks import OptionError, counted

# One tensor, or several: by the names of the arguments that a network's forward has for them, or in their order.
Inputs: TypeAlias = Tensor | Mapping[str, Tensor] | tuple[Tensor, ...]
BatchKeys: TypeAlias = tuple[str | int | Sequence[str] | Sequence[int], str | int]

_LOGITS = ("logits", "out")
# How targets are called, for a hint.
_TARGETS = ("label", "target", "class", "y")

_OF_SEVERAL = ": stack items into one; several inputs of forward go into a tuple, each with a row per item."
_OF_NAMES = ": number the classes from 0 on, and put the numbers of a batch into one tensor."
_OF_SAMPLES = ": if the loader yields samples, pass DataLoader(dataset, batch_size=...), which makes batches of them."


def as_pair(batch: Any, keys: BatchKeys | None = None) -> tuple[Inputs, Tensor]:
    """Take input and target out of a batch.

    Args:
        batch: A pair; with ``keys`` also a longer tuple, a mapping, or any object with attributes. The input may itself
            be several: a mapping, of the arguments of the network's forward, or a tuple or a list of them in their
            order.
        keys: ``(input, target)``, each a key, an attribute's name or a position; the input may be several names, of
            arguments of the network's forward, or several positions, in their order. None for a pair
            ``(inputs, target)``.

    Raises:
        TypeError: If the batch has no such entries, or they are no tensors.
    """
    if keys is None:
        if not isinstance(batch, tuple | list) or len(batch) != 2:
            raise TypeError(
                f"Every batch must be a pair (inputs, target), got {_described(batch)}: {_proposed(batch)}."
            )
        keys = (0, 1)
    inputs, target = input_of(batch, keys), _entry(batch, keys[1])
    if not isinstance(target, Tensor):
        way_out = _OF_SAMPLES if isinstance(target, int | float) else _OF_NAMES
        raise TypeError(f"The target of a batch must be a tensor, got {_converted(target) or _named(target) + way_out}")
    if target.ndim == 0:
        raise TypeError(f"The target of a batch must have one value per item, got a single number{_OF_SAMPLES}")
    if isinstance(inputs, tuple) and len(inputs[0]) != len(target):
        raise TypeError(
            f"The input of a batch is {len(inputs)} tensors of {counted(len(inputs[0]), 'item')}, and the target has "
            f"{counted(len(target), 'item')}{_OF_SEVERAL}"
        )
    return inputs, target


def input_of(batch: Any, keys: BatchKeys) -> Inputs:
    """The input of a batch, which need not have a target; errors as in :func:`as_pair`."""
    if isinstance(keys[0], str | int):
        inputs = _entry(batch, keys[0])
        if isinstance(inputs, Tensor):
            return inputs
        several: dict[Any, Tensor] = dict(inputs) if isinstance(inputs, Mapping) else _in_order(inputs)
    else:
        several = {name: _entry(batch, name) for name in keys[0]}
    for name, value in several.items():
        if not isinstance(value, Tensor):
            got = _converted(value) or f"{_named(value)}."
            raise TypeError(f"The input {name!r} of a batch must be a tensor, got {got}")
    in_order = all(isinstance(name, int) for name in several)
    return tuple(several.values()) if in_order else several


def _in_order(inputs: Any) -> dict[Any, Tensor]:
    """Several inputs by their position."""
    if not isinstance(inputs, tuple | list) or not inputs:
        raise TypeError(
            "The input of a batch must be a tensor, or several in a dict or a tuple, got "
            f"{_converted(inputs) or _named(inputs) + _OF_SEVERAL}"
        )
    if len({value.shape[:1] for value in inputs if isinstance(value, Tensor)}) > 1:
        raise TypeError(f"The input of a batch is {_described(inputs)} of different length{_OF_SEVERAL}")
    return dict(enumerate(inputs))


def check_batch_keys(keys: Any) -> None:
    """Refuse what cannot be :data:`BatchKeys`."""
    if keys is None:
        return
    pair = list(keys) if isinstance(keys, list | tuple) else []
    several = bool(pair) and isinstance(pair[0], list | tuple)
    names = pair[0] if several else pair[:1]
    of_one_kind = any(all(isinstance(name, kind) for name in names) for kind in (str, int))
    if len(pair) != 2 or not names or not of_one_kind or not isinstance(pair[1], str | int):
        raise OptionError(
            "`batch_keys` must be a pair, the key of the input (or several, all names of forward's arguments or all "
            "positions) and the key of the target, such as ('image', 'label'), (0, 1) or ((0, 1), 2), got "
            f"{keys!r}."
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


def _named(value: object) -> str:
    return type(value).__name__


def _converted(value: object) -> str:
    """What an array is and how it becomes a tensor; "" for what is none."""
    return f"{_named(value)}: convert it, torch.as_tensor(...)." if hasattr(value, "__array__") else ""


def _described(batch: Any) -> str:
    kind = type(batch).__name__
    if isinstance(batch, Mapping):
        return f"{kind} of {', '.join(map(str, batch))}"
    return f"{kind} of {len(batch)} items" if isinstance(batch, Sized) else kind


def _proposed(batch: Any) -> str:
    """The way out for a batch that is no pair, with keys that it has."""
    if isinstance(batch, Tensor):
        return "pass a loader that yields pairs, or for a single batch the list [(inputs, target)]"
    return f"pass a loader that yields pairs, or say which entries they are, {_keys_for(batch)}"


def _keys_for(batch: Any) -> str:
    if isinstance(batch, tuple | list) and len(batch) > 2:
        last = len(batch) - 1
        several = tuple(range(last))
        return f"batch_keys=(0, {last}) or (0, 1), or for a network of several inputs batch_keys=({several}, {last})"
    tensors = {name: value for name, value in _entries(batch).items() if isinstance(value, Tensor)}
    if len(tensors) < 2:
        return "batch_keys=('image', 'label')"
    target = next((name for name in tensors if any(word in name.lower() for word in _TARGETS)), [*tensors][-1])
    inputs = [name for name in tensors if name != target]
    # Token ids come with a mask and the like of their shape; an image's index is no input.
    inputs = [name for name in inputs if tensors[name].shape == tensors[inputs[0]].shape]
    return f"such as batch_keys=({(inputs if len(inputs) > 1 else inputs[0])!r}, {target!r})"


def _entries(batch: Any) -> Mapping[str, Any]:
    if isinstance(batch, Mapping):
        return {str(name): value for name, value in batch.items()}
    return vars(batch) if hasattr(batch, "__dict__") else {}


# Inputs of one tensor or of several


def call_network(network: Callable[..., Any], inputs: Inputs) -> Any:
    """The network's output for a batch: several inputs are its arguments, by name or in their order."""
    if isinstance(inputs, Mapping):
        return network(**inputs)
    return network(*inputs) if isinstance(inputs, tuple) else network(inputs)


def map_tensors(inputs: Inputs, change: Callable[[Tensor], Tensor]) -> Inputs:
    """``change`` applied to every tensor."""
    if isinstance(inputs, Mapping):
        return {name: change(value) for name, value in inputs.items()}
    return tuple(map(change, inputs)) if isinstance(inputs, tuple) else change(inputs)


def copied(inputs: Inputs) -> Inputs:
    """A copy of every tensor, for a network that may change its input in place where it is used again."""
    return map_tensors(inputs, Tensor.clone)


def tensors_of(inputs: Inputs) -> list[Tensor]:
    """The tensors that an input consists of."""
    if isinstance(inputs, Tensor):
        return [inputs]
    return list(inputs.values() if isinstance(inputs, Mapping) else inputs)


def n_items(inputs: Inputs) -> int:
    """Size of the batch."""
    return len(tensors_of(inputs)[0])


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
        got = _described(output) if logits is None else f"logits that are a {_described(logits)}"
        raise TypeError(
            f"The network must return a tensor of logits, or have them as `.logits`, got {got}: let its forward return "
            "the logits alone, or all in a dict, {'logits': logits, ...}."
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
