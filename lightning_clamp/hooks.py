"""A clamp around somebody else's module, for the duration of a test or a prediction, or for good."""

from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_clamp.clamping import Clamp, first_changed, logits_of, submodule, with_logits


class Perturbing:
    """Adds a clamp's perturbation to what enters a module.

    Attributes:
        used: Whether it was called since it was made.
    """

    def __init__(self, clamp: Clamp) -> None:
        self.clamp = clamp
        self.used = False

    @classmethod
    def install(cls, network: nn.Module, clamp: Clamp, perturb_at: str | None) -> tuple["Perturbing", RemovableHandle]:
        """Let it run before every call of the network, or of the submodule of that name."""
        entry = network if perturb_at is None else submodule(network, perturb_at)
        hook = cls(clamp)
        return hook, entry.register_forward_pre_hook(hook, with_kwargs=True)

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Change the first argument of the call."""
        self.used = True
        return first_changed(args, kwargs, self.clamp.perturb)


class ClampHooks:
    """Forward hooks that perturb what enters a module and scale its logits, and know whether they were used.

    Args:
        module: The module whose ``__call__`` is clamped.
        clamp: On the module's device.
        perturb_at: Submodule at whose input the perturbation is added; None for the module's own.
    """

    def __init__(self, module: nn.Module, clamp: Clamp, perturb_at: str | None = None) -> None:
        self.clamp = clamp
        self._scaled = False
        self._handles = [module.register_forward_hook(self._scale)]
        self._perturbing: Perturbing | None = None
        if clamp.perturbation is not None:
            self._perturbing, handle = Perturbing.install(module, clamp, perturb_at)
            self._handles.append(handle)

    @property
    def used(self) -> bool:
        """Whether all of the clamp took effect."""
        return self._scaled and (self._perturbing is None or self._perturbing.used)

    def remove(self) -> None:
        """Take the hooks off; the module is as it was."""
        for handle in self._handles:
            handle.remove()

    def _scale(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        logits: Tensor = self.clamp.scale(logits_of(output))
        self._scaled = True
        return with_logits(output, logits)
