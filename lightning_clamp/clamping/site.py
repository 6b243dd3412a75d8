"""Where a perturbation enters a network: at its own input, or at that of one of its submodules."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_clamp._batch import Inputs, call_network, map_tensors
from lightning_clamp.clamping.frozen import module_of

Change = Callable[[Tensor], Tensor]


class Entry:
    """Calls a network with a change to what enters it, or one of its submodules.

    Args:
        network: Any callable; a module, or a module's method, where a submodule is named.
        perturb_at: Name of the submodule, as in ``named_modules``; None for the network's own input.

    Raises:
        ValueError: If there is no such submodule.
    """

    def __init__(self, network: Callable[..., Any], perturb_at: str | None) -> None:
        self.network = network
        self.name = perturb_at
        self.module = None if perturb_at is None else submodule(network, perturb_at)
        self._first = None if self.module is None else first_parameter(self.module)

    def run(self, inputs: Inputs, change: Change) -> Any:
        """The network's output with ``change`` applied to what enters.

        Where there are several inputs and no submodule is named, nothing is changed.

        Raises:
            ValueError: If the submodule is not called exactly once.
            TypeError: If what enters it is no tensor.
        """
        if self.module is None:
            return call_network(self.network, map_single_tensor(inputs, change))
        calls = 0

        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            nonlocal calls
            calls += 1
            return map_first_argument(args, kwargs, self._first, change)

        handle = self.module.register_forward_pre_hook(enter, with_kwargs=True)
        try:
            # What torch.compile has traced knows nothing of later hooks.
            with torch.compiler.set_stance("force_eager"):
                output = call_network(self.network, inputs)
        finally:
            handle.remove()
        if calls != 1:
            raise ValueError(
                f"The submodule {self.name!r} was called {calls} times in one forward, and `perturb_at` needs one that "
                "is called once; a ModuleList or ModuleDict never is."
            )
        return output

    def shape_of(self, value: Tensor) -> tuple[int, ...]:
        """Shape of the perturbation for what enters, ``(N, ...)``.

        That of one item, channels first; but sequences ``(N, length, features)`` that enter a submodule have one value
        per feature, so that their length is free.
        """
        return tuple(value.shape[2:] if self.module is not None and value.ndim == 3 else value.shape[1:])


def submodule(network: Callable[..., Any], name: str) -> nn.Module:
    """The submodule of that name.

    Raises:
        ValueError: If the network has none, with the names that it has.
    """
    module = module_of(network)
    if module is None:
        raise ValueError(f"`perturb_at` names the submodule {name!r}, but the network is a function: pass the module.")
    try:
        return module.get_submodule(name)
    except AttributeError:
        names = [known for known, _ in module.named_modules() if known and known.count(".") <= name.count(".")]
        raise ValueError(f"The network has no submodule {name!r} to perturb at; it has {', '.join(names)}.") from None


def first_parameter(module: nn.Module) -> str | None:
    """Name of the first parameter of a module's forward; None if it has none of its own."""
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.POSITIONAL_ONLY)
    parameters = inspect.signature(module.forward).parameters.values()
    return next((parameter.name for parameter in parameters if parameter.kind in named), None)


def map_first_argument(
    args: tuple[Any, ...], kwargs: dict[str, Any], first: str | None, change: Change
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call with the first one changed, whether it was passed by position or by name.

    Args:
        args: By position.
        kwargs: By name.
        first: Name of the first parameter; where it was not passed, the first one that was is changed.
        change: What to do.

    Raises:
        TypeError: If there is no argument, or it is no tensor.
    """
    if args:
        return (_checked(change, args[0]), *args[1:]), kwargs
    name = first if first in kwargs else next(iter(kwargs), None)
    if name is None:
        raise TypeError("A perturbation is added to what a module is called with, and it was called with nothing.")
    return args, {**kwargs, name: _checked(change, kwargs[name])}


def map_single_tensor(inputs: Inputs, change: Change) -> Inputs:
    """The inputs with the one tensor changed that they consist of; several are left as they are."""
    several = isinstance(inputs, Mapping) and len(inputs) > 1
    return inputs if several else map_tensors(inputs, change)


def _checked(change: Change, value: Any) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"A perturbation is added to a tensor, and the module was called with {type(value).__name__}.")
    return change(value)
