"""The plugin: one callback that calibrates when training ends, and lets test and predict use the result."""

import copy
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Literal

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from typing_extensions import Unpack

from lightning_clamp._rows import Task
from lightning_clamp._trainer.data import CalibrationBatches, find_calibration_set, warn_if_training_data
from lightning_clamp._trainer.devices import check_float64, check_strategy, ranks_of
from lightning_clamp._trainer.hooks import ClampHooks
from lightning_clamp._trainer.mailbox import Mailbox, Outcome
from lightning_clamp._trainer.run import publish, run_in_trainer
from lightning_clamp._trainer.weights import Moment, Weights, check_best, weights_of
from lightning_clamp.checkpoint import STATE_KEY, Calibrated, fingerprint, from_state, read_safely, to_state
from lightning_clamp.clamping import BatchKeys, CalibrationResult, Method, check_batch_keys, check_options, submodule
from lightning_clamp.clamping.options import MethodOptions
from lightning_clamp.module import CalibrationModule
from lightning_clamp.report import table


class NeuralClamping(Callback):
    """Calibrate the model's confidences when training ends.

    ``Trainer(callbacks=[NeuralClamping()])`` is all it takes. At the end of ``fit`` a clamp (an input perturbation and
    an output map) is fitted to held-out data with the network frozen; the metrics before and after go to every logger,
    a calibrated checkpoint is saved, and ``trainer.test`` and ``trainer.predict`` use the clamp. The model itself is
    left exactly as training left it. One Trainer takes one of these callbacks; to compare methods, pass the trained
    model to :func:`~lightning_clamp.fit_clamp`.

    Args:
        calibration_dataloader: Held-out pairs ``(inputs, target)``, not augmented; several such loaders, in a list or a
            dict, are read one after another. By default the ``calibration_dataloader()`` of the datamodule or the
            module, else the validation loader, with a warning.
        method: See :func:`~lightning_clamp.fit_clamp`.
        task: ``"multiclass"`` (softmax) or ``"binary"`` (one logit, sigmoid).
        ignore_index: Target value of positions to leave out.
        batch_keys: Which entries of a batch are input and target, where it is no pair: ``("image", "label")``,
            ``(0, 2)``, or ``(["input_ids", "attention_mask"], "labels")``; see :func:`~lightning_clamp.fit_clamp`.
        perturb_at: Name of the submodule at whose input δ is added, such as the one that is fed a language model's
            embeddings; see :func:`~lightning_clamp.fit_clamp`.
        save: Whether to save ``…-calibrated.ckpt``.
        dirpath: Folder to save in; by default the one the Trainer's ``ModelCheckpoint`` saves in, and nothing is saved
            where there is none.
        weights: ``"last"``, those that training ends with (averaged, under such a callback); or ``"best"``, those of
            the checkpoint that a ``ModelCheckpoint`` with a monitor found best. The model keeps its last weights;
            :meth:`calibrated_module` and the saved file have the best, and what ``trainer.test(ckpt_path="best")``
            loads is clamped.
        other_weights: What test and predict do with weights that are not the calibrated ones: ``"skip"`` leaves them
            alone, with a warning; ``"refit"`` calibrates them first, on the argument's or the hook's calibration set.
        cache_bytes: Logits of a pass are kept up to this size on every rank; beyond it they are recomputed.
        on_error: ``"warn"`` reports a calibration that fails and lets ``fit`` return normally, the model uncalibrated;
            ``"raise"`` raises.
        **options: Of the method, such as ``output_maps=("temperature",)``; see :func:`~lightning_clamp.fit_clamp`.

    Raises:
        TypeError: If an option is unknown to the method.
        ValueError: If an argument has no such value.
    """

    def __init__(
        self,
        calibration_dataloader: Any = None,
        *,
        method: Method = "clamp",
        task: Task = "multiclass",
        ignore_index: int | None = None,
        batch_keys: BatchKeys | None = None,
        perturb_at: str | None = None,
        save: bool = True,
        dirpath: str | os.PathLike[str] | None = None,
        weights: Weights = "last",
        other_weights: Literal["skip", "refit"] = "skip",
        cache_bytes: int = 2**28,
        on_error: Literal["warn", "raise"] = "warn",
        **options: Unpack[MethodOptions],
    ) -> None:
        check_options(method, task, options)
        check_batch_keys(batch_keys)
        if on_error not in ("warn", "raise"):
            raise ValueError(f"`on_error` must be 'warn' or 'raise', got {on_error!r}.")
        if weights not in ("last", "best"):
            raise ValueError(f"`weights` must be 'last' or 'best', got {weights!r}.")
        if other_weights not in ("skip", "refit"):
            raise ValueError(f"`other_weights` must be 'skip' or 'refit', got {other_weights!r}.")
        self.calibration_dataloader = calibration_dataloader
        self.method: Method = method
        self.task: Task = task
        self.ignore_index = ignore_index
        self.batch_keys = batch_keys
        self.perturb_at = perturb_at
        self.save = save
        self.dirpath = dirpath
        self.weights: Weights = weights
        self.other_weights = other_weights
        self.cache_bytes = cache_bytes
        self.on_error = on_error
        self.options = options
        self._path: str | None = None
        self._calibrated: Calibrated | None = None
        self._mailbox = Mailbox()
        self._batches: CalibrationBatches | None = None
        self._module: LightningModule | None = None
        self._hooks: ClampHooks | None = None
        # Whether the training of this fit came to its end, and whether its calibration did.
        self._ended = self._done = False

    @property
    def state_key(self) -> str:
        """Key of this callback's state in checkpoints."""
        return STATE_KEY

    @property
    def fit_arguments(self) -> dict[str, Any]:
        """What :func:`~lightning_clamp.fit_clamp` is called with, beside the model and its data."""
        return {
            "method": self.method,
            "task": self.task,
            "ignore_index": self.ignore_index,
            "batch_keys": self.batch_keys,
            "perturb_at": self.perturb_at,
            "cache_bytes": self.cache_bytes,
            **self.options,
        }

    @property
    def result(self) -> CalibrationResult | None:
        """What the last calibration did, or that of the checkpoint that was loaded; None before, and if it failed."""
        self._read_mail()
        return None if self._calibrated is None else self._calibrated.result

    @property
    def checkpoint_path(self) -> str | None:
        """Path of the saved calibrated checkpoint; None where none was saved."""
        self._read_mail()
        return self._path

    def calibrated_module(self) -> CalibrationModule:
        """A copy of the calibrated model with its clamp, independent of the Trainer.

        Raises:
            RuntimeError: If nothing has been calibrated, the model was trained in other processes, or its weights have
                changed since and the calibrated ones were not saved.
        """
        self._read_mail()
        if self._calibrated is None:
            raise RuntimeError("Nothing has been calibrated yet: run trainer.fit first, and read what it reported.")
        if self._module is None:
            raise RuntimeError(
                "The model was trained in other processes and this callback never saw it: use "
                f"CalibrationModule.from_checkpoint({self._path!r}, YourModule), or CalibrationModule(model, "
                "callback.result.clamp, ...)."
            )
        saved = self._calibrated
        with nullcontext() if self._hooks is None else self._hooks.off():
            network = copy.deepcopy(self._module)
        belongs = fingerprint(network) == saved.fingerprint
        if not belongs and self._path is not None:
            network.load_state_dict(read_safely(self._path)["state_dict"])
            belongs = fingerprint(network) == saved.fingerprint
        if not belongs:
            raise RuntimeError(
                "The model's weights are no longer the calibrated ones (another checkpoint was loaded, or it was "
                "trained on), and those were not saved: give the Trainer a ModelCheckpoint, or the callback a dirpath."
            )
        return CalibrationModule.of(network, copy.deepcopy(saved))

    def _read_mail(self) -> None:
        """Take over what worker processes left, where the Trainer started some."""
        if (outcome := self._mailbox.receive()) is not None:
            self._calibrated, self._path = outcome

    # Fit

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot work, and move behind all other callbacks, before any training."""
        if stage == "validate":
            return
        check_strategy(trainer)
        if not isinstance(pl_module, CalibrationModule):
            self._module = pl_module
        if stage != "fit":
            return
        check_float64(trainer)
        check_options(self.method, self.task, self.options, n_ranks=trainer.world_size)
        if self.weights == "best" and not getattr(trainer, "fast_dev_run", False):
            check_best(trainer)
        self._move_to_the_end(trainer)

    def _move_to_the_end(self, trainer: Trainer) -> None:
        """Callbacks run in list order: calibrate when the others have averaged weights and saved all of the training.

        Before an averaging callback we would calibrate weights about to be replaced, and before a ``ModelCheckpoint`` a
        kill during calibration would cost the last checkpoint.
        """
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        behind = callbacks[callbacks.index(self) + 1 :]
        if not behind:
            return
        # A new list: the Trainer is iterating over the old one.
        trainer.callbacks = [*(c for c in callbacks if c is not self), self]  # type: ignore[attr-defined]
        for averaging in behind:
            if isinstance(averaging, WeightAveraging | StochasticWeightAveraging):
                rank_zero_info(
                    f"NeuralClamping moved behind {type(averaging).__name__}, to calibrate the averaged weights."
                )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget that an earlier fit ended."""
        self._ended = self._done = False
        self._batches = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check that there is a calibration set that can be read, before training time is spent."""
        self._batches = self._find_batches(trainer, pl_module)

    def _find_batches(self, trainer: Trainer, pl_module: LightningModule) -> CalibrationBatches | None:
        """The calibration set, with the warnings it deserves; None if it will be loaded later."""
        source = find_calibration_set(trainer, pl_module, self.calibration_dataloader)
        if source is None:
            return None
        if source.is_validation:
            rank_zero_warn(
                "NeuralClamping will calibrate on the validation set, which also served to choose the model: pass a "
                "`calibration_dataloader` for confidences that owe it nothing."
            )
        warn_if_training_data(source.loader, trainer)
        if self.perturb_at is not None:
            submodule(pl_module, self.perturb_at)
        return CalibrationBatches(source, trainer, pl_module, ranks_of(trainer), self.batch_keys)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Calibrate, report and save; a failure is reported and never loses the finished training."""
        self._ended = True
        self._calibrated = self._path = None
        with (
            self._failures_reported(),
            weights_of(self.weights, trainer, pl_module, ranks_of(trainer)) as moment,
        ):
            outcome = self._calibrate(trainer, pl_module)
            path = self._path_for(trainer, moment)
            self._path = publish(trainer, pl_module, outcome, path, moment, self._mailbox).path

    @contextmanager
    def _failures_reported(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # hours of training must not be lost to whatever a network can raise
            if self.on_error == "raise":
                raise
            state = (
                "stays uncalibrated"
                if self._calibrated is None
                else "is calibrated, but not all of it is saved and logged"
            )
            rank_zero_warn(f"NeuralClamping failed: the model {state}. {type(error).__name__}: {error}")

    def _calibrate(self, trainer: Trainer, pl_module: LightningModule) -> Outcome:
        batches = self._batches or self._find_batches(trainer, pl_module)
        self._batches = None
        if batches is None:
            raise MisconfigurationException(
                "The Trainer never loaded its validation set, which was to be the calibration set: pass "
                "NeuralClamping(calibration_dataloader=...)."
            )
        outcome = run_in_trainer(
            trainer,
            pl_module,
            batches,
            **self.fit_arguments,
        )
        self._done, self._calibrated = True, outcome.calibrated
        return outcome

    def _path_for(self, trainer: Trainer, moment: Moment) -> str | None:
        """Where to save; None for nowhere."""
        if not self.save or getattr(trainer, "fast_dev_run", False):
            return None
        folder = self.dirpath or getattr(trainer.checkpoint_callback, "dirpath", None)
        if folder is None:
            return None
        return os.path.join(folder, f"epoch={moment.epoch}-step={moment.step}-calibrated.ckpt")

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say so if training never ran, for then nothing was calibrated."""
        if not self._ended:
            rank_zero_warn(
                "Training had nothing left to do, so NeuralClamping did not run: raise max_epochs; or calibrate what "
                "was trained with lightning_clamp.calibrate(trainer, model, calibration_dataloader); or use the clamp "
                "of an earlier fit, if this callback has one."
            )

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave no hook behind, and say that an interrupted training was not calibrated."""
        self._remove_hooks()
        if trainer.state.fn == "fit" and not self._done:
            rank_zero_info(
                f"The fit stopped with {type(exception).__name__}: the model was not calibrated. To calibrate what was "
                "trained so far: lightning_clamp.calibrate(Trainer(), model, calibration_dataloader)."
            )

    # Test and predict

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the clamp around the model."""
        self._install_hooks(trainer, pl_module)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the clamp around the model."""
        self._install_hooks(trainer, pl_module)

    def _install_hooks(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._remove_hooks()
        if isinstance(pl_module, CalibrationModule):
            return
        self._read_mail()
        if self.other_weights == "refit" and not self._belongs(trainer, pl_module):
            with self._failures_reported():
                self._calibrated = self._path = None
                rank_zero_info(table(self._calibrate(trainer, pl_module).calibrated.result))
        if self._calibrated is None:
            rank_zero_warn("NeuralClamping has calibrated nothing yet: these are the outputs of the bare model.")
        elif not self._belongs(trainer, pl_module):
            rank_zero_warn(
                "The weights are not the ones that NeuralClamping calibrated (another checkpoint, or further "
                "training): these are the outputs of the bare model. NeuralClamping(other_weights='refit') would "
                "calibrate them."
            )
        elif not self._calibrated.clamp.is_identity:
            clamp = copy.deepcopy(self._calibrated.clamp).to(pl_module.device)
            self._hooks = ClampHooks(pl_module, clamp, self._calibrated.perturb_at)

    def _belongs(self, trainer: Trainer, pl_module: LightningModule) -> bool:
        """Whether the clamp was fitted to these weights: those of the first rank, as when they were calibrated."""
        own = self._calibrated is not None and fingerprint(pl_module) == self._calibrated.fingerprint
        return bool(trainer.strategy.broadcast(own))

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
        self._read_mail()
        return {} if self._calibrated is None else to_state(self._calibrated)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the clamp."""
        self._calibrated = from_state(state_dict)
