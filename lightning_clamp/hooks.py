"""A clamp around somebody else's module, for the duration of a test or a prediction."""

from typing import Any

from torch import Tensor, nn

from lightning_clamp.clamping import Clamp


class ClampHooks:
    """Forward hooks that perturb a module's input and scale its output, and know whether they were used.

    Args:
        module: The module whose ``__call__`` is clamped.
        clamp: On the module's device.
    """

    def __init__(self, module: nn.Module, clamp: Clamp) -> None:
        self.clamp = clamp
        self.used = False
        self._handles = [
            module.register_forward_pre_hook(self._perturb, with_kwargs=True),
            module.register_forward_hook(self._scale),
        ]

    def remove(self) -> None:
        """Take the hooks off; the module is as it was."""
        for handle in self._handles:
            handle.remove()

    def _perturb(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if args:
            return (self.clamp.perturb(args[0]), *args[1:]), kwargs
        name = next(iter(kwargs))
        return args, {**kwargs, name: self.clamp.perturb(kwargs[name])}

    def _scale(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Tensor:
        if not isinstance(output, Tensor):
            raise TypeError(
                f"A clamp scales a tensor of logits, and {type(module).__name__} returned {type(output).__name__}."
            )
        self.used = True
        return self.clamp.scale(output)
