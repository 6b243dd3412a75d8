"""The plugin: one callback that calibrates when training ends, and lets test and predict use the result."""

import copy
import os
from typing import Any, Literal

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_clamp._rows import Task
from lightning_clamp.checkpoint import (
    STATE_KEY,
    Calibrated,
    calibrated_checkpoint,
    fingerprint,
    from_state,
    to_state,
)
from lightning_clamp.clamping import CalibrationResult, Solver, check_options, fit_clamp
from lightning_clamp.data import (
    CalibrationBatches,
    CalibrationSource,
    TrainedNetwork,
    find_calibration_set,
    warn_if_training_data,
)
from lightning_clamp.hooks import ClampHooks
from lightning_clamp.module import CalibrationModule
from lightning_clamp.progress import shown_progress
from lightning_clamp.report import log_result, table


class NeuralClamping(Callback):
    """Calibrate the model's confidences when training ends.

    ``Trainer(callbacks=[NeuralClamping()])`` is all it takes. At the end of ``fit`` a clamp (an input perturbation and
    an output map) is fitted to held-out data with the network frozen; the metrics before and after go to every logger,
    a calibrated checkpoint is saved, and ``trainer.test`` and ``trainer.predict`` use the clamp. The model itself is
    left exactly as training left it. One Trainer takes one of these callbacks; to compare solvers, pass the trained
    model to :func:`~lightning_clamp.fit_clamp`.

    Args:
        calibration_dataloader: Held-out pairs ``(inputs, target)``, not augmented. By default the
            ``calibration_dataloader()`` of the datamodule or the module, else the validation loader, with a warning.
        solver: See :func:`~lightning_clamp.fit_clamp`.
        task: ``"multiclass"`` (softmax) or ``"binary"`` (one logit, sigmoid).
        ignore_index: Target value of positions to leave out.
        save: Whether to save ``…-calibrated.ckpt``.
        dirpath: Folder to save in; by default the one the Trainer's ``ModelCheckpoint`` saves in, and nothing is saved
            where there is none.
        cache_bytes: Logits of a pass are kept up to this size; beyond it they are recomputed.
        on_error: ``"warn"`` reports a calibration that fails and lets ``fit`` return normally, the model uncalibrated;
            ``"raise"`` raises.
        **options: Of the solver, such as ``outputs=("temperature",)``; see :func:`~lightning_clamp.fit_clamp`.

    Attributes:
        result: The :class:`~lightning_clamp.CalibrationResult` of the last fit; None before and after a failure.
        checkpoint_path: Path of the saved calibrated checkpoint; None where none was saved.

    Raises:
        TypeError: If an option is unknown to the solver.
        ValueError: If an argument has no such value.
    """

    def __init__(
        self,
        calibration_dataloader: Any = None,
        *,
        solver: Solver = "scoring",
        task: Task = "multiclass",
        ignore_index: int | None = None,
        save: bool = True,
        dirpath: str | os.PathLike[str] | None = None,
        cache_bytes: int = 2**28,
        on_error: Literal["warn", "raise"] = "warn",
        **options: Any,
    ) -> None:
        check_options(solver, task, options)
        if on_error not in ("warn", "raise"):
            raise ValueError(f"`on_error` must be 'warn' or 'raise', got {on_error!r}.")
        self.calibration_dataloader = calibration_dataloader
        self.solver: Solver = solver
        self.task: Task = task
        self.ignore_index = ignore_index
        self.save = save
        self.dirpath = dirpath
        self.cache_bytes = cache_bytes
        self.on_error = on_error
        self.options = options
        self.result: CalibrationResult | None = None
        self.checkpoint_path: str | None = None
        self._calibrated: Calibrated | None = None
        self._source: CalibrationSource | None = None
        self._module: LightningModule | None = None
        self._hooks: ClampHooks | None = None
        self._ended = False

    @property
    def state_key(self) -> str:
        """Key of this callback's state in checkpoints."""
        return STATE_KEY

    def calibrated_module(self) -> CalibrationModule:
        """A copy of the trained model with its clamp, independent of the Trainer.

        Raises:
            RuntimeError: If nothing has been calibrated, or the model's weights have changed since.
        """
        if self._calibrated is None or self._module is None:
            raise RuntimeError("Nothing has been calibrated yet: run trainer.fit first, and read what it reported.")
        if fingerprint(self._module) != self._calibrated.fingerprint:
            raise RuntimeError(
                "The model's weights are no longer the calibrated ones (another checkpoint was loaded, or it was "
                f"trained on): use CalibrationModule.from_checkpoint on what fit saved, {self.checkpoint_path}."
            )
        saved = self._calibrated
        network = copy.deepcopy(self._module)
        clamp = copy.deepcopy(saved.clamp).to(network.device)
        return CalibrationModule(network, clamp, task=saved.task, ignore_index=saved.ignore_index)

    # Fit

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot work, and move behind the callbacks that still change weights, before any training."""
        if not isinstance(pl_module, CalibrationModule):
            self._module = pl_module
        if stage != "fit":
            return
        if trainer.world_size > 1:
            raise MisconfigurationException(
                f"NeuralClamping calibrates on one device, and this Trainer has {trainer.world_size}: train without "
                "it, load the checkpoint on one device and pass the model to lightning_clamp.fit_clamp."
            )
        if trainer.strategy.root_device.type == "mps":
            raise MisconfigurationException(
                "NeuralClamping sums in float64, which MPS does not have: use Trainer(accelerator='cpu'), or train "
                "without it and pass the model to lightning_clamp.fit_clamp on the CPU."
            )
        self._move_behind_averaging(trainer)

    def _move_behind_averaging(self, trainer: Trainer) -> None:
        """Callbacks run in list order: before an averaging callback we would calibrate weights about to be replaced."""
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        averaging = [c for c in callbacks if isinstance(c, WeightAveraging | StochasticWeightAveraging)]
        if not averaging or callbacks.index(self) > callbacks.index(averaging[-1]):
            return
        others = [callback for callback in callbacks if callback is not self]
        others.insert(others.index(averaging[-1]) + 1, self)
        # A new list: the Trainer is iterating over the old one.
        trainer.callbacks = others  # type: ignore[attr-defined]
        rank_zero_info(
            f"NeuralClamping moved behind {type(averaging[-1]).__name__}, to calibrate the averaged weights."
        )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget that an earlier fit ended."""
        self._ended = False
        self._source = self.result = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check that there is a calibration set that can be read, before training time is spent."""
        if (source := find_calibration_set(trainer, pl_module, self.calibration_dataloader)) is not None:
            self._accept(source, trainer, pl_module)

    def _accept(self, source: CalibrationSource, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take a calibration set, if it can be read, with the warnings it deserves."""
        self._source = source
        if source.is_validation:
            rank_zero_warn(
                "NeuralClamping will calibrate on the validation set, which also served to choose the model: pass a "
                "`calibration_dataloader` for confidences that owe it nothing."
            )
        warn_if_training_data(source.loader, trainer)
        CalibrationBatches(source, trainer, pl_module).check()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Calibrate, report and save; a failure is reported and never loses the finished training."""
        self._ended = True
        self.result = self._calibrated = self.checkpoint_path = None
        try:
            self.result = self._calibrate(trainer, pl_module)
            self._report(trainer, pl_module, self.result)
        except Exception as error:  # hours of training must not be lost to whatever a network can raise
            if self.on_error == "raise":
                raise
            state = (
                "stays uncalibrated" if self.result is None else "is calibrated, but not all of it is saved and logged"
            )
            rank_zero_warn(f"NeuralClamping failed: the model {state}. {type(error).__name__}: {error}")

    def _calibrate(self, trainer: Trainer, pl_module: LightningModule) -> CalibrationResult:
        if self._source is None and (source := find_calibration_set(trainer, pl_module, None)) is not None:
            self._accept(source, trainer, pl_module)
        if self._source is None:
            raise MisconfigurationException(
                "The Trainer never loaded its validation set, which was to be the calibration set: pass "
                "NeuralClamping(calibration_dataloader=...)."
            )
        batches = CalibrationBatches(self._source, trainer, pl_module)
        # Transfer hooks that augment ask whether the Trainer is training; these batches are for measuring.
        trainer.validating = True
        try:
            with shown_progress(trainer, batches.n_batches) as progress:
                return fit_clamp(
                    TrainedNetwork(trainer, pl_module),
                    batches,
                    solver=self.solver,
                    task=self.task,
                    ignore_index=self.ignore_index,
                    cache_bytes=self.cache_bytes,
                    progress=progress,
                    **self.options,
                )
        finally:
            trainer.training = True

    def _report(self, trainer: Trainer, pl_module: LightningModule, result: CalibrationResult) -> None:
        self._calibrated = Calibrated(
            result.clamp, fingerprint(pl_module), self.task, self.ignore_index, dict(result.before), dict(result.after)
        )
        rank_zero_info(table(result))
        if (path := self._path(trainer)) is not None:
            checkpoint = calibrated_checkpoint(pl_module, self._calibrated, trainer.current_epoch, trainer.global_step)
            trainer.strategy.save_checkpoint(checkpoint, path)
            self.checkpoint_path = path
            rank_zero_info(f"saved: {path}")
        log_result(trainer, result)

    def _path(self, trainer: Trainer) -> str | None:
        """Where to save; None for nowhere."""
        if not self.save or getattr(trainer, "fast_dev_run", False):
            return None
        folder = self.dirpath or getattr(trainer.checkpoint_callback, "dirpath", None)
        if folder is None:
            return None
        name = f"epoch={trainer.current_epoch - 1}-step={trainer.global_step}-calibrated.ckpt"
        return os.path.join(folder, name)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say so if training never ran, for then nothing was calibrated."""
        if not self._ended:
            rank_zero_warn(
                "Training had nothing left to do, so NeuralClamping did not run: raise max_epochs, or use the clamp of "
                "the earlier fit, which is kept."
            )

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave no hook behind, and say that an interrupted training was not calibrated."""
        self._remove_hooks()
        if trainer.state.fn == "fit" and self.result is None:
            rank_zero_info(f"The fit stopped with {type(exception).__name__}: the model was not calibrated.")

    # Test and predict

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the clamp around the model."""
        self._install_hooks(pl_module)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the clamp around the model."""
        self._install_hooks(pl_module)

    def _install_hooks(self, pl_module: LightningModule) -> None:
        self._remove_hooks()
        if isinstance(pl_module, CalibrationModule):
            return
        if self._calibrated is None:
            rank_zero_warn("NeuralClamping has calibrated nothing yet: these are the outputs of the bare model.")
        elif fingerprint(pl_module) != self._calibrated.fingerprint:
            rank_zero_warn(
                "The weights are not the ones that NeuralClamping calibrated (another checkpoint, or further "
                "training): these are the outputs of the bare model."
            )
        elif not self._calibrated.clamp.is_identity:
            self._hooks = ClampHooks(pl_module, copy.deepcopy(self._calibrated.clamp).to(pl_module.device))

    def _remove_hooks(self) -> None:
        if self._hooks is not None:
            self._hooks.remove()
            self._hooks = None

    def on_test_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any, **__: Any) -> None:
        """Check that the clamp took effect."""
        self._check_used(pl_module, "test_step")

    def on_predict_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any, **__: Any) -> None:
        """Check that the clamp took effect."""
        self._check_used(pl_module, "predict_step")

    def _check_used(self, pl_module: LightningModule, step: str) -> None:
        if self._hooks is not None and not self._hooks.used:
            raise MisconfigurationException(
                f"{type(pl_module).__name__}.{step} did not call self(x), so the clamp had no effect: call self(x) "
                "there, or run the Trainer on callback.calibrated_module()."
            )

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the clamp off."""
        self._remove_hooks()

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the clamp off."""
        self._remove_hooks()

    # State in checkpoints: what a later process needs to test and predict with the clamp

    def state_dict(self) -> dict[str, Any]:
        """The clamp, as tensors, numbers and strings; empty before calibration."""
        return {} if self._calibrated is None else to_state(self._calibrated)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the clamp."""
        self._calibrated = from_state(state_dict)
