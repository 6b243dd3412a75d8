"""Whether the steps of a module call it with the input of a batch as it is, as a calibration does."""

from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_clamp._batch import tensors_of
from lightning_clamp.spec import Spec


class StepInputs:
    """Looks at what a module is called with while one batch goes through a step.

    Args:
        spec: Which entries of a batch are its input.
    """

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        self._values: list[Tensor] = []
        self._handle: RemovableHandle | None = None

    def start(self, module: LightningModule) -> None:
        """Look at the calls of the module from now on."""
        self.stop()
        self._handle = module.register_forward_pre_hook(self._look, prepend=True, with_kwargs=True)

    def stop(self) -> None:
        """Look no more."""
        self._values = []
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def _look(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._values += [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]

    def end(self, module: LightningModule, step: str, batch: Any) -> None:
        """Warn if none of the calls since the start was with the input of the batch."""
        values = self._values
        self.stop()
        if not values:
            return
        try:
            wanted = tensors_of(self.spec.inputs(batch))[0]
        except TypeError:
            # A batch of another kind than those of the calibration set.
            return
        if not any(_equal(value, wanted) for value in values):
            rank_zero_warn(
                f"{type(module).__name__}.{step} calls self(x) with something else than the input of the batch, and "
                "NeuralClamping calls it with the input as it is: let forward, or on_after_batch_transfer, do what the "
                "step does to it."
            )


def _equal(value: Tensor, wanted: Tensor) -> bool:
    """Whether two tensors hold the same values, in whatever shape and dtype."""
    if value.numel() != wanted.numel():
        return False
    return value is wanted or torch.equal(value.flatten(), wanted.to(value).flatten())
