"""A clamp around somebody else's module, for the duration of a test or a prediction, or for good."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_clamp.clamping import Clamp, first_parameter, logits_of, map_first_argument, submodule, with_logits


class Perturbing:
    """Adds a clamp's perturbation to what enters a module.

    Args:
        network: Called with the inputs.
        clamp: What to add.
        perturb_at: The network's submodule at whose input it is added; None for the network's own input.

    Attributes:
        entry: The module that it runs before.
        used: Whether it has run.

    Raises:
        ValueError: If there is no such submodule, or something is added there already.
    """

    def __init__(self, network: nn.Module, clamp: Clamp, perturb_at: str | None) -> None:
        self.clamp = clamp
        self.used = False
        self.entry = network if perturb_at is None else submodule(network, perturb_at)
        self._first = first_parameter(self.entry)
        # Private, and the only place that tells which hooks a module has; a test holds it.
        if any(isinstance(hook, Perturbing) for hook in self.entry._forward_pre_hooks.values()):  # noqa: SLF001
            where = "the network" if perturb_at is None else f"{perturb_at!r}"
            raise ValueError(
                f"A perturbation is added at {where} already, by a CalibrationModule around the same network: give "
                "each its own, by copy.deepcopy before the first."
            )

    def install(self) -> RemovableHandle:
        """Let it run before every call."""
        return self.entry.register_forward_pre_hook(self, with_kwargs=True)

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Change the first argument of the call."""
        self.used = True
        return map_first_argument(args, kwargs, self._first, self.clamp.perturb)


class ClampHooks:
    """Forward hooks that perturb what enters a module and scale its logits, and know whether they were used.

    Args:
        module: The module whose ``__call__`` is clamped.
        clamp: On the module's device.
        perturb_at: Submodule at whose input the perturbation is added; None for the module's own.
    """

    def __init__(self, module: nn.Module, clamp: Clamp, perturb_at: str | None = None) -> None:
        self.module = module
        self.clamp = clamp
        self._scaled = False
        self._inside = perturb_at is not None
        self._perturbing = None if clamp.perturbation is None else Perturbing(module, clamp, perturb_at)
        self._installed = ExitStack()
        self._install()

    @property
    def used(self) -> bool:
        """Whether all of the clamp took effect."""
        return self._scaled and (self._perturbing is None or self._perturbing.used)

    def _install(self) -> None:
        self._installed.enter_context(self.module.register_forward_hook(self._scale))
        if self._perturbing is not None:
            self._installed.enter_context(self._perturbing.install())
            if self._inside:
                # What torch.compile has traced knows nothing of hooks inside of it that came later.
                self._installed.enter_context(torch.compiler.set_stance("force_eager"))

    def remove(self) -> None:
        """Take the hooks off; the module is as it was."""
        self._installed.close()

    @contextmanager
    def off(self) -> Iterator[None]:
        """The module as it was, for a while."""
        self.remove()
        try:
            yield
        finally:
            self._install()

    def _scale(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        logits: Tensor = self.clamp.scale(logits_of(output))
        self._scaled = True
        return with_logits(output, logits)
