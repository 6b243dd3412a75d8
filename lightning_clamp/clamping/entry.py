"""Where a perturbation enters a network: at its own input, or at that of one of its submodules."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from lightning_clamp.clamping.batch import Inputs, call
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

    def run(self, inputs: Inputs, change: Change) -> Any:
        """The network's output with ``change`` applied to what enters.

        Where there are several inputs and no submodule is named, nothing is changed.

        Raises:
            ValueError: If the submodule is not called exactly once.
            TypeError: If what enters it is no tensor.
        """
        if self.module is None:
            return call(self.network, one_changed(inputs, change))
        calls = 0

        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            nonlocal calls
            calls += 1
            return first_changed(args, kwargs, change)

        handle = self.module.register_forward_pre_hook(enter, with_kwargs=True)
        try:
            output = call(self.network, inputs)
        finally:
            handle.remove()
        if calls != 1:
            raise ValueError(
                f"The submodule {self.name!r} was called {calls} times in one forward, and `perturb_at` needs one that "
                "is called once."
            )
        return output

    def shape_of(self, value: Tensor) -> tuple[int, ...]:
        """Shape of the perturbation for what enters, ``(N, ...)``.

        That of one item; but sequences ``(N, length, features)`` that enter a submodule have one value per feature, so
        that their length is free.
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


def first_changed(
    args: tuple[Any, ...], kwargs: dict[str, Any], change: Change
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call with the first one changed, whether it was passed by position or by name."""
    if args:
        return (_checked(change, args[0]), *args[1:]), kwargs
    name = next(iter(kwargs))
    return args, {**kwargs, name: _checked(change, kwargs[name])}


def one_changed(inputs: Inputs, change: Change) -> Inputs:
    """The inputs with the one tensor changed that they consist of; several are left as they are."""
    if not isinstance(inputs, Mapping):
        return change(inputs)
    return {name: change(value) for name, value in inputs.items()} if len(inputs) == 1 else inputs


def _checked(change: Change, value: Any) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"A perturbation is added to a tensor, and the module was called with {type(value).__name__}.")
    return change(value)
