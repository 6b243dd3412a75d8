"""The calibrated model: a frozen network with its clamp, as a LightningModule of its own."""

import os
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection

from lightning_clamp._rows import Task
from lightning_clamp.checkpoint import read_calibrated
from lightning_clamp.clamping import CalibrationResult, Clamp, as_pair
from lightning_clamp.metrics import Accuracy, ExpectedCalibrationError, NegativeLogLikelihood


class CalibrationModule(LightningModule):
    """A frozen network and its clamp: ``module(x)`` are calibrated logits.

    ``trainer.test`` logs ``calibrated/nll``, ``calibrated/ece`` and ``calibrated/accuracy``; ``trainer.predict``
    returns calibrated logits. The network stays in eval mode, and nothing here has a gradient.

    Args:
        network: Module from inputs to logits. It is frozen in place: pass a copy to go on training the original.
        clamp: What was fitted to it.
        task: ``"multiclass"`` or ``"binary"``; what the metrics and :meth:`predict_proba` take the logits for.
        ignore_index: Target value that the metrics leave out.

    Attributes:
        result: What the calibration did, where it was done in this process; None for a module that was loaded.
    """

    def __init__(
        self, network: nn.Module, clamp: Clamp, *, task: Task = "multiclass", ignore_index: int | None = None
    ) -> None:
        super().__init__()
        self.network = network.requires_grad_(False)
        self.clamp = clamp
        self.task: Task = task
        self.ignore_index = ignore_index
        self.result: CalibrationResult | None = None
        options: dict[str, Any] = {"task": task, "ignore_index": ignore_index}
        metrics: dict[str, Metric | MetricCollection] = {
            "nll": NegativeLogLikelihood(**options),
            "ece": ExpectedCalibrationError(**options),
            "accuracy": Accuracy(**options),
        }
        # The prefix is our own: a Trainer refuses a second module that logs a known name in another way.
        self.metrics = MetricCollection(metrics, prefix="calibrated/")
        self.eval()

    @classmethod
    def from_checkpoint(
        cls,
        path: str | os.PathLike[str],
        network_class: type[LightningModule],
        *,
        map_location: Any = None,
        **init_arguments: Any,
    ) -> "CalibrationModule":
        """Restore a calibrated model from the file that the callback saved.

        Args:
            path: The ``…-calibrated.ckpt`` file, or a checkpoint that Lightning saved after calibration. It is read
                with ``weights_only=True``: nothing in it is executed.
            network_class: Class of the LightningModule that was trained.
            map_location: Device for the tensors, as in ``torch.load``.
            **init_arguments: Arguments of ``network_class`` that ``save_hyperparameters`` did not save.

        Raises:
            ValueError: If the file is no calibrated checkpoint, is damaged, or is of a newer format.
            TypeError: If ``network_class`` needs arguments that are neither saved nor given.
        """
        saved = read_calibrated(path)
        try:
            network = network_class.load_from_checkpoint(
                os.fspath(path), map_location=map_location, weights_only=True, **init_arguments
            )
        except TypeError as error:
            raise TypeError(
                f"{network_class.__name__} could not be built from {os.fspath(path)!r} ({error}): pass its arguments "
                "to from_checkpoint, or call self.save_hyperparameters() in its __init__ before training."
            ) from error
        module = cls(network, saved.clamp, task=saved.task, ignore_index=saved.ignore_index)
        return module.to(network.device)

    def forward(self, inputs: Tensor) -> Tensor:
        """Calibrated logits, of the network's shape, at least float32."""
        logits: Tensor = self.clamp.scale(self.network(self.clamp.perturb(inputs)))
        return logits

    def predict_proba(self, inputs: Tensor) -> Tensor:
        """Calibrated probabilities: a softmax over axis 1, or for a one-logit head the sigmoid."""
        logits = self(inputs)
        return torch.sigmoid(logits) if self.task == "binary" else logits.softmax(1)

    def train(self, mode: bool = True) -> "CalibrationModule":
        """Stay in eval mode: the clamp belongs to the network as it was calibrated."""
        super().train(False)
        return self

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Update and log the metrics of a batch ``(inputs, target)``."""
        inputs, target = as_pair(batch)
        self.metrics.update(self(inputs), target)
        self.log_dict(self.metrics, on_step=False, on_epoch=True, batch_size=len(inputs))

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        """Calibrated logits of a batch of inputs, or of ``(inputs, …)``."""
        logits: Tensor = self(batch[0] if isinstance(batch, tuple | list) else batch)
        return logits
