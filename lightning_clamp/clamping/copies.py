"""Copies of networks that share nothing with the original: of compiled ones too, and of those that keep activations."""

import copy
from collections.abc import Callable, Mapping, Sequence
from types import CellType, FunctionType, MethodType
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.jit import ScriptModule
from torch.overrides import TorchFunctionMode

Module = TypeVar("Module", bound=nn.Module)


def independent_copy(network: Module) -> Module:
    """A deep copy that runs its own weights alone.

    ``copy.deepcopy`` takes functions as they are, and so a copy of what ``torch.compile`` made of a method, or of a
    lambda, would go on running the original: here they are made anew, uncompiled, for the copy. A tensor that still has
    a graph, such as an activation that was kept, is copied without it.

    Raises:
        TypeError: If an attribute cannot be copied, such as a lock or a connection; it is named.
    """
    memo: dict[int, Any] = {}
    try:
        with _WithoutGraphs():
            twin = copy.deepcopy(network, memo)
            _rebind_functions(twin, memo)
    except Exception as error:
        culprit = _culprit(network)
        if culprit is None:
            raise
        raise TypeError(
            f"{type(network).__name__} cannot be copied because of its attribute {culprit[0]!r} of type "
            f"{type(culprit[1]).__name__} ({error}): set it to None before, or give its class a "
            "`__deepcopy__`."
        ) from error
    return twin


class _WithoutGraphs(TorchFunctionMode):
    """Has ``copy.deepcopy`` detach the tensors that it refuses to copy, wherever they are."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is Tensor.__deepcopy__ and not args[0].is_leaf:
            tensor, memo = args
            return memo.setdefault(id(tensor), tensor.detach().clone())
        return func(*args, **(kwargs or {}))


def _culprit(network: nn.Module) -> tuple[str, Any] | None:
    """The first attribute that cannot be copied, by its name from the network on."""
    # The modules stand for themselves: an attribute that leads back to one is not to blame for what is in it.
    modules = {id(part): part for part in network.modules()}
    for path, part in network.named_modules():
        # What is copied of a module is its state, which leaves out what a LightningModule knows of its Trainer.
        for name, value in ({} if isinstance(part, ScriptModule) else part.__getstate__()).items():
            try:
                with _WithoutGraphs():
                    copy.deepcopy(value, dict(modules))
            except Exception:  # noqa: BLE001 - what objects of users raise
                return ".".join(filter(None, (path, name))), value
    return None


def _rebind_functions(twin: nn.Module, memo: dict[int, Any]) -> None:
    """Replace those functions among a copy's attributes, and its hooks, that run something of the original."""
    # What is of the copy already, as in a wrapper that compiled it anew, stays.
    memo.update({id(part): part for part in twin.modules()})
    for part in twin.modules():
        for attributes in [vars(part), *(value for value in vars(part).values() if isinstance(value, dict))]:
            attributes.update({k: _rebound(v, memo) for k, v in attributes.items() if isinstance(v, FunctionType)})


def _rebound(value: Any, memo: dict[int, Any]) -> Any:
    """What a function, or something that a function refers to, is in the copy."""
    if _is_network(value):
        return copy.deepcopy(value, memo)
    # Private, and where torch.compile keeps what it was given; a test holds it.
    if (compiled := getattr(value, "_torchdynamo_orig_callable", None)) is not None:
        return _rebound(compiled, memo)
    if not isinstance(value, FunctionType) or not _runs_network(value, set()):
        return value
    if id(value) not in memo:
        _make_anew(value, memo)
    return memo[id(value)]


def _make_anew(function: FunctionType, memo: dict[int, Any]) -> None:
    cells = tuple(memo.setdefault(id(cell), CellType()) for cell in function.__closure__ or ())
    again = FunctionType(function.__code__, function.__globals__, function.__name__, closure=cells)
    memo[id(function)] = again  # before what it refers to, which may be itself
    for cell, own in zip(function.__closure__ or (), cells, strict=True):
        if cell != CellType():
            own.cell_contents = _rebound(cell.cell_contents, memo)
    if function.__defaults__ is not None:
        again.__defaults__ = tuple(_rebound(value, memo) for value in function.__defaults__)
    if function.__kwdefaults__ is not None:
        again.__kwdefaults__ = {name: _rebound(value, memo) for name, value in function.__kwdefaults__.items()}
    again.__dict__.update(function.__dict__)


def _is_network(value: Any) -> bool:
    """Whether it has weights: a module, a method of one, or a tensor."""
    return isinstance(value.__self__ if isinstance(value, MethodType) else value, nn.Module | Tensor)


def _runs_network(function: FunctionType, seen: set[int]) -> bool:
    seen.add(id(function))
    cells = [cell.cell_contents for cell in function.__closure__ or () if cell != CellType()]
    for value in [*cells, *(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]:
        runs = isinstance(value, FunctionType) and id(value) not in seen and _runs_network(value, seen)
        if runs or _is_network(value):
            return True
    return False
