"""A Trainer with the two commands that take a checkpoint, beside Lightning's own."""

from pathlib import Path
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule, LightningModule, Trainer

from lightning_clamp.callback import NeuralClamping
from lightning_clamp.checkpoint import calibrated_path, read_result
from lightning_clamp.cli.files import load_weights, refusals
from lightning_clamp.module import CalibrationModule
from lightning_clamp.standalone import calibrate_by_plan


class CalibratingTrainer(Trainer):
    """A Trainer that also calibrates checkpoints, with the options of its :class:`~lightning_clamp.NeuralClamping`."""

    @property
    def clamping(self) -> NeuralClamping:
        """The callback that is attached."""
        callbacks: list[Any] = self.callbacks  # type: ignore[attr-defined]
        (clamping,) = (callback for callback in callbacks if isinstance(callback, NeuralClamping))
        return clamping

    def calibrate(
        self,
        model: LightningModule,
        datamodule: LightningDataModule | None = None,
        *,
        ckpt_path: str,
        save_to: bool | str | None = None,
        weights_only: bool | None = None,
    ) -> CalibrationModule:
        """Calibrate a checkpoint, and save it with its clamp.

        Args:
            model: Of the class that was trained; its weights are replaced by those of the checkpoint.
            datamodule: With a ``calibration_dataloader()``, or for want of it a validation loader; by default the
                model's own.
            ckpt_path: The checkpoint to calibrate.
            save_to: File (ending in ``.ckpt``) or folder to save the calibrated model in; true for beside the
                checkpoint, as ``NAME-calibrated.ckpt``, and false for nowhere. By default what ``calibration.save_to``
                says.
            weights_only: Without effect, so that the config of a fit will do: checkpoints are always loaded safely.

        Returns:
            The calibrated module, on the CPU.

        Raises:
            MisconfigurationException: If the checkpoint cannot be used, or there is no calibration set.
        """
        clamping = self.clamping
        load_weights(model, ckpt_path)
        plan, where = clamping.plan, clamping.save_to if save_to is None else save_to
        path = calibrated_path(where, Path(ckpt_path).parent, Path(ckpt_path).stem)
        return calibrate_by_plan(
            self, model, None, datamodule, plan, save_to=path or False, cache_bytes=clamping.cache_bytes
        )

    def check(
        self,
        model: LightningModule,
        datamodule: LightningDataModule | None = None,
        *,
        ckpt_path: str,
        fail_under: float | None = None,
        weights_only: bool | None = None,
    ) -> None:
        """Test on the test set whether a calibrated checkpoint still holds, and say so in a sentence.

        Args:
            model: Of the class that was trained; its weights are replaced by those of the checkpoint.
            datamodule: With a ``test_dataloader()``.
            ckpt_path: The calibrated checkpoint.
            fail_under: Exit with code 1 if the p-value ``calibrated/p`` is below this, such as 0.01.
            weights_only: Without effect, so that the config of a fit will do: checkpoints are always loaded safely.

        Raises:
            MisconfigurationException: If the checkpoint cannot be used or has no clamp, or there is no datamodule.
            SystemExit: With code 1, for ``fail_under``.
        """
        if datamodule is None:
            raise MisconfigurationException("`check` needs --data, a datamodule with a test_dataloader().")
        with refusals(ckpt_path):
            result = read_result(ckpt_path)
        load_weights(model, ckpt_path)
        (numbers,) = self.test(CalibrationModule.from_result(model, result), datamodule=datamodule)
        if fail_under is not None and numbers.get("calibrated/p", 1.0) < fail_under:
            raise SystemExit(1)
