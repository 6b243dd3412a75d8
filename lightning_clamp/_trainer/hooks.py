"""A clamp around somebody else's module, for the duration of a test or a prediction."""

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor, nn

from lightning_clamp._batch import logits_of, with_logits
from lightning_clamp.clamping.clamp import Clamp
from lightning_clamp.clamping.site import PerturbationSite, first_argument, first_parameter, map_first_argument
from lightning_clamp.spec import Spec


@rank_zero_only
def warn_every_time(message: str) -> None:
    """Warn as ``rank_zero_warn``, but also of what was warned of before.

    Python shows a text once per place and process; of four checkpoints tested in a loop, the first alone.
    """
    warnings.warn_explicit(message, UserWarning, __file__, 1, registry={})


class ClampHooks:
    """Forward hooks that perturb what enters a module and scale its logits, and know whether they were used.

    With views the module is called once more for each of them, hooks and all, by the hook that scales the logits.

    Args:
        module: The module whose ``__call__`` is clamped.
        clamp: On the module's device.
        spec: Where the perturbation is added, and over which views the logits are averaged.
        belongs: Asked at the first call, whether the weights still are those that the clamp belongs to; if not, the
            clamp has no effect. Code that torch.compile traces does not ask.

    Attributes:
        idle: Whether the weights turned out to be others.
        bare_loss: Whether the network returned a loss beside its logits, which knows nothing of the clamp.
    """

    def __init__(
        self,
        module: nn.Module,
        clamp: Clamp,
        spec: Spec,
        belongs: Callable[[], bool] = lambda: True,
    ) -> None:
        self.module = module
        self.clamp = clamp
        self.idle = self.bare_loss = False
        self._belongs: Callable[[], bool] | None = belongs
        self._scaled = self._in_view = False
        self._spec = spec
        self._first = first_parameter(module) if spec.views else None
        # What the module was called with, before anything was done to it.
        self._call: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})
        site = PerturbationSite(module, spec.perturb_at)
        self._perturbing = None if clamp.perturbation is None else site.hook(self._perturb)
        self._installed = ExitStack()
        self._install()

    @property
    def used(self) -> bool:
        """Whether all of the clamp took effect."""
        return self._scaled and (self._perturbing is None or self._perturbing.calls > 0)

    def _install(self) -> None:
        # Before hooks of others, which will do what they do to a view as well.
        self._installed.enter_context(self.module.register_forward_pre_hook(self._look, prepend=True, with_kwargs=True))
        self._installed.enter_context(self.module.register_forward_hook(self._scale))
        if self._perturbing is not None:
            self._installed.enter_context(self._perturbing.installed())
            if self._spec.perturb_at is not None:
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

    def _look(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._spec.views and not self._in_view:
            self._call = _copied(args, kwargs)
        if self._belongs is not None and not torch.compiler.is_compiling():
            self.idle = not self._belongs()
            self._belongs = None

    def _perturb(self, inputs: Tensor) -> Tensor:
        return inputs if self.idle else self.clamp.perturb(inputs)

    def _scale(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if self.idle or self._in_view:
            return output
        logits: Tensor = self.clamp.scale(self._mean_over_views(logits_of(output)))
        self._scaled = True
        self.bare_loss = _has_loss(output)
        return with_logits(output, logits)

    def _mean_over_views(self, logits: Tensor) -> Tensor:
        if not self._spec.views:
            return logits
        (args, kwargs), self._call = self._call, ((), {})
        images = first_argument(args, kwargs, self._first)

        def again(view: Tensor) -> Tensor:
            others = _copied(args, kwargs, but=images)
            args_again, kwargs_again = map_first_argument(*others, self._first, lambda _: view)
            return logits_of(self.module(*args_again, **kwargs_again))

        self._in_view = True
        try:
            return self._spec.mean_over_views(logits, images, again)
        finally:
            self._in_view = False


def _copied(
    args: tuple[Any, ...], kwargs: dict[str, Any], but: Tensor | None = None
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Copies of a call's tensors, but one: a module may change them in place, and a view is made of what they were."""

    def copied(value: Any) -> Any:
        return value.clone() if isinstance(value, Tensor) and value is not but else value

    return tuple(map(copied, args)), {name: copied(value) for name, value in kwargs.items()}


def _has_loss(output: Any) -> bool:
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    return isinstance(loss, Tensor)
