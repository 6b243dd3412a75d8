"""The calibrated model: a frozen network with its clamp, as a LightningModule of its own."""

import os
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.export import ExportedProgram
from torchmetrics import Metric, MetricCollection

from lightning_clamp import export
from lightning_clamp._rows import Task
from lightning_clamp._trainer.hooks import Perturbing
from lightning_clamp.checkpoint import Calibrated, read_calibrated
from lightning_clamp.clamping import (
    BatchKeys,
    CalibrationResult,
    Clamp,
    Inputs,
    as_pair,
    call_network,
    check_batch_keys,
    input_of,
    logits_of,
    map_single_tensor,
)

if TYPE_CHECKING:
    from torch.onnx import ONNXProgram
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
        batch_keys: Which entries of a batch are input and target, as in :func:`~lightning_clamp.fit_clamp`.
        perturb_at: Submodule at whose input the perturbation is added. A hook does it, which stays on that submodule:
            pass a copy to go on using the original. Compile this module, not the network before.

    Attributes:
        result: What the calibration did; None for a module that was put together by hand.
    """

    def __init__(
        self,
        network: nn.Module,
        clamp: Clamp,
        *,
        task: Task = "multiclass",
        ignore_index: int | None = None,
        batch_keys: BatchKeys | None = None,
        perturb_at: str | None = None,
    ) -> None:
        super().__init__()
        self.network = network.requires_grad_(False)
        self.clamp = clamp
        self.task: Task = task
        self.ignore_index = ignore_index
        check_batch_keys(batch_keys)
        self.batch_keys = batch_keys
        self.perturb_at = perturb_at
        self._perturbing: Perturbing | None = None
        if perturb_at is not None and clamp.perturbation is not None:
            self._perturbing = Perturbing(self.network, self.clamp, perturb_at)
            self._perturbing.install()
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
    def of(cls, network: LightningModule, calibrated: Calibrated) -> "CalibrationModule":
        """Put a network together with what was fitted to it."""
        module = cls(
            network,
            calibrated.clamp,
            task=calibrated.task,
            ignore_index=calibrated.ignore_index,
            batch_keys=calibrated.batch_keys,
            perturb_at=calibrated.perturb_at,
        )
        module.result = calibrated.result
        return module.to(network.device)

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
        return cls.of(network, saved)

    def forward(self, inputs: Inputs) -> Tensor:
        """Calibrated logits, of the network's shape, at least float32; a dict is the network's keyword arguments."""
        # Read first, also where a hook adds it, so that torch.compile knows whether there is a perturbation: hooks it
        # takes no notice of.
        if self.clamp.perturbation is not None and self.perturb_at is None:
            inputs = map_single_tensor(inputs, self.clamp.perturb)
        logits: Tensor = self.clamp.scale(logits_of(call_network(self.network, inputs)))
        if self._perturbing is not None and not self._perturbing.used and not torch.compiler.is_compiling():
            raise RuntimeError(
                f"The network did not run what adds the perturbation at {self.perturb_at!r}: if it is compiled, pass "
                "the one before torch.compile, and compile the CalibrationModule."
            )
        return logits

    def predict_proba(self, inputs: Inputs) -> Tensor:
        """Calibrated probabilities: a softmax over axis 1, or for a one-logit head the sigmoid."""
        logits = self(inputs)
        return torch.sigmoid(logits) if self.task == "binary" else logits.softmax(1)

    def to_exported_program(self, example: Any = None, **options: Any) -> ExportedProgram:
        """Capture this module for use without this package; see :func:`.export.to_exported_program`."""
        return export.to_exported_program(self, example, **options)

    def to_onnx(
        self, file_path: str | Path | BytesIO | None = None, input_sample: Any = None, **kwargs: Any
    ) -> "ONNXProgram | None":
        """Write this module as ONNX, for batches of any size; see :func:`.export.to_onnx`."""
        return export.to_onnx(self, file_path, input_sample, **kwargs)

    def to_torchscript(
        self, file_path: Any = None, method: str | None = "trace", example_inputs: Any = None, **kwargs: Any
    ) -> Any:
        """As Lightning's, which calls it deprecated; by tracing alone.

        Raises:
            ValueError: If asked for anything but ``method="trace"``.
        """
        if method != "trace":
            raise ValueError(f"A clamp is no TorchScript: use method='trace' or to_exported_program, got {method!r}.")
        return super().to_torchscript(file_path, method, example_inputs, **kwargs)

    def folded(self, example: Any = None) -> export.Folded:
        """The network with the output map in the weights of its last layer; see :func:`.export.fold`."""
        return export.fold(self, example)

    def train(self, mode: bool = True) -> "CalibrationModule":
        """Stay in eval mode: the clamp belongs to the network as it was calibrated."""
        super().train(False)
        return self

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Update and log the metrics of a batch ``(inputs, target)``, or with the entries that ``batch_keys`` names."""
        inputs, target = as_pair(batch, self.batch_keys)
        self.metrics.update(self(inputs), target)
        self.log_dict(self.metrics, on_step=False, on_epoch=True, batch_size=len(target))

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        """Calibrated logits of a batch of inputs, of ``(inputs, …)``, or of the entries that ``batch_keys`` names."""
        if isinstance(batch, tuple | list) and (self.batch_keys is None or len(batch) == 1):
            batch = batch[0]
        elif self.batch_keys is not None and not isinstance(batch, Tensor):
            batch = input_of(batch, self.batch_keys)
        logits: Tensor = self(batch)
        return logits
