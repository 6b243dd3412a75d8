"""Where a perturbation enters a network: at its own input, or at that of one of its submodules."""

import inspect
from collections.abc import Callable
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_clamp._batch import Inputs, call_network, map_tensors, tensors_of
from lightning_clamp.clamping.frozen import module_of

Change = Callable[[Tensor], Tensor]


class PerturbationSite:
    """Where a perturbation enters a network: at its own input, or at that of one of its submodules.

    Args:
        network: Any callable; a module, or a module's method, where a submodule is named.
        perturb_at: Name of the submodule, as in ``named_modules``; None for the network's own input.

    Attributes:
        name: Name of the submodule, None for the network's own input.

    Raises:
        ValueError: If there is no such submodule.
    """

    def __init__(self, network: Callable[..., Any], perturb_at: str | None) -> None:
        self.network = network
        self.name = perturb_at
        self._submodule = None if perturb_at is None else submodule(network, perturb_at)

    def run(self, inputs: Inputs, change: Change) -> Any:
        """The network's output for a batch, with ``change`` applied to what enters.

        Where there are several inputs and no submodule is named, nothing is changed.

        Raises:
            ValueError: If the submodule is not called exactly once.
            TypeError: If what enters it is no tensor.
        """
        if self._submodule is None:
            return call_network(self.network, map_single_tensor(inputs, change))
        hook = InputHook(self._submodule, change)
        # What torch.compile has traced knows nothing of later hooks.
        with hook.installed(), torch.compiler.set_stance("force_eager"):
            output = call_network(self.network, inputs)
        if hook.calls != 1:
            raise ValueError(
                f"The submodule {self.name!r} was called {hook.calls} times in one forward, and `perturb_at` needs one "
                "that is called once; a ModuleList or ModuleDict never is."
            )
        return output

    def hook(self, change: Change) -> "InputHook":
        """A hook that applies ``change`` there in every call, once it is installed; of a module.

        Raises:
            ValueError: If there is one already.
        """
        module = self.network if self._submodule is None else self._submodule
        assert isinstance(module, nn.Module)
        # Private, and the only place that tells which hooks a module has; a test holds it.
        if any(isinstance(hook, InputHook) for hook in module._forward_pre_hooks.values()):  # noqa: SLF001
            where = "the network" if self.name is None else f"{self.name!r}"
            raise ValueError(
                f"A perturbation is added at {where} already, by a CalibrationModule around the same network: give "
                "each its own, by copy.deepcopy before the first."
            )
        return InputHook(module, change)

    def shape_of(self, value: Tensor) -> tuple[int, ...]:
        """Shape of the perturbation for what enters, ``(N, ...)``.

        That of one item, channels first; but sequences ``(N, length, features)`` that enter a submodule have one value
        per feature, so that their length is free.
        """
        return tuple(value.shape[2:] if self._submodule is not None and value.ndim == 3 else value.shape[1:])


class InputHook:
    """Changes the first argument of a module's calls, once it is installed.

    Args:
        module: The module.
        change: What is done to the argument.

    Attributes:
        calls: How often it has run.
    """

    def __init__(self, module: nn.Module, change: Change) -> None:
        self.calls = 0
        self._module = module
        self._change = change
        self._first = first_parameter(module)

    def installed(self) -> RemovableHandle:
        """Let it run before every call; the handle takes it off, also as a context manager."""
        return self._module.register_forward_pre_hook(self, with_kwargs=True)

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Change the first argument of the call."""
        self.calls += 1
        return map_first_argument(args, kwargs, self._first, self._change)


def submodule(network: Callable[..., Any], name: str) -> nn.Module:
    """The submodule of that name.

    Raises:
        ValueError: If the network has none, with the names that come near, or those that it has.
    """
    module = module_of(network)
    if module is None:
        raise ValueError(f"`perturb_at` names the submodule {name!r}, but the network is a function: pass the module.")
    try:
        return module.get_submodule(name)
    except AttributeError:
        names = [known for known, _ in module.named_modules() if known]
        near = [known for known in names if known.endswith(f".{name}")] or get_close_matches(name, names, n=1)
        known = [known for known in names if known.count(".") <= name.count(".")]
        hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"it has {', '.join(known)}."
        raise ValueError(f"The network has no submodule {name!r} to perturb at: {hint}") from None


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


def first_argument(args: tuple[Any, ...], kwargs: dict[str, Any], first: str | None) -> Any:
    """What :func:`map_first_argument` changes; errors are those."""
    seen: list[Tensor] = []

    def look(value: Tensor) -> Tensor:
        seen.append(value)
        return value

    map_first_argument(args, kwargs, first, look)
    return seen[0]


def map_single_tensor(inputs: Inputs, change: Change) -> Inputs:
    """The inputs with the one tensor changed that they consist of; several are left as they are."""
    return inputs if len(tensors_of(inputs)) > 1 else map_tensors(inputs, change)


def _checked(change: Change, value: Any) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"A perturbation is added to a tensor, and the module was called with {type(value).__name__}.")
    return change(value)
