"""A clamp around somebody else's module, for the duration of a test or a prediction."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_clamp._batch import logits_of, with_logits
from lightning_clamp.clamping.clamp import Clamp
from lightning_clamp.clamping.site import PerturbationSite


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
        site = PerturbationSite(module, perturb_at)
        self._perturbing = None if clamp.perturbation is None else site.hook(clamp.perturb)
        self._installed = ExitStack()
        self._install()

    @property
    def used(self) -> bool:
        """Whether all of the clamp took effect."""
        return self._scaled and (self._perturbing is None or self._perturbing.calls > 0)

    def _install(self) -> None:
        self._installed.enter_context(self.module.register_forward_hook(self._scale))
        if self._perturbing is not None:
            self._installed.enter_context(self._perturbing.installed())
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
