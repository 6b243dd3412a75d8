"""Training steps as CUDA graphs: for networks so small that a GPU waits for Python.

    Trainer(accelerator="cuda", devices=1, strategy=RecordedSteps(device="cuda:0"))

The LightningModule stays as it is, with the loss that it has. Its first step is recorded, loss and gradient, and then
replayed for every batch of that size; other batches take the ordinary way. Losses with gradients of gradients can be
recorded too, which ``torch.compile`` cannot compile. A step that reads a number on the CPU, as ``float(loss)`` does, or
takes other paths from one batch to the next, cannot be recorded; nor can one whose loss learns, since a recorded step
goes on with what the loss was then.
"""

from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor, nn


class _Step(nn.Module):
    """A module's training step as a function of the tensors of a batch."""

    def __init__(self, module: LightningModule) -> None:
        super().__init__()
        self.module = module

    def forward(self, *batch: Tensor) -> Tensor:
        """The loss of a batch."""
        return self.module.training_step(batch, 0)


class RecordedSteps(SingleDeviceStrategy):
    """One CUDA device, on which a training step is recorded once and then replayed.

    Batches are tuples of tensors, and ``training_step`` returns the loss. What it logs is not worth reading.
    """

    recorded: nn.Module | None = None
    shapes: tuple[torch.Size, ...] = ()

    def training_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> Any:
        """The loss of a batch, replayed where the batch has the size of the first."""
        shapes = tuple(part.shape for part in batch)
        if self.recorded is None:
            self.shapes = shapes
            self.recorded = torch.cuda.make_graphed_callables(
                _Step(self.lightning_module), tuple(part.clone() for part in batch), allow_unused_input=True
            )
        if shapes != self.shapes:
            return super().training_step(batch, batch_idx)
        return self.recorded(*batch)

    def teardown(self) -> None:
        """Give the graph's memory back."""
        self.recorded = None
        super().teardown()
