"""The plugin: one callback that calibrates when training ends, and lets test and predict use the result."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Literal

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.model_helpers import is_overridden
from typing_extensions import Unpack

from lightning_clamp._checks import check_choice, check_package
from lightning_clamp._digest import fingerprint
from lightning_clamp._trainer.data import (
    CalibrationBatches,
    find_calibration_set,
    loaders_of,
    warn_if_training_data,
)
from lightning_clamp._trainer.devices import check_float64, check_method, check_strategy, ranks_of
from lightning_clamp._trainer.hooks import ClampHooks, warn_every_time
from lightning_clamp._trainer.mailbox import Mailbox
from lightning_clamp._trainer.preflight import check_forward, check_site, kept_loaders, try_network
from lightning_clamp._trainer.run import check_place, publish, run_in_trainer
from lightning_clamp._trainer.steps import StepInputs
from lightning_clamp._trainer.weights import Weights, averages_weights, check_best, weights_of
from lightning_clamp.checkpoint import (
    STATE_KEY,
    SaveTo,
    check_resumable,
    check_save_to,
    check_seal,
    read_checkpoint,
    result_from_state,
    state_of_result,
)
from lightning_clamp.clamping.copies import independent_copy
from lightning_clamp.clamping.frozen import kept_random_state
from lightning_clamp.clamping.kept import check_cache_bytes
from lightning_clamp.clamping.options import ClampKeywords, Method, make_plan
from lightning_clamp.clamping.result import CalibrationResult
from lightning_clamp.module import CalibrationModule
from lightning_clamp.report import log_result

_MADE_ANEW = (
    "{}.configure_callbacks makes a new NeuralClamping for every run, and the one that calibrated is gone: make one in "
    "__init__, and return that."
)


class NeuralClamping(Callback):
    """Calibrate the model's confidences when training ends.

    ``Trainer(callbacks=[NeuralClamping()])`` is all it takes. At the end of ``fit`` a clamp (an input perturbation and
    an output map) is fitted to held-out data with the network frozen; the metrics before and after go to every logger,
    a calibrated checkpoint is saved, and ``trainer.test`` and ``trainer.predict`` use the clamp. The model itself is
    left exactly as training left it. One Trainer takes one of these callbacks; to compare methods, pass the trained
    model to :func:`~lightning_clamp.fit_clamp`.

    Args:
        dataloaders: Held-out pairs ``(inputs, target)``, not augmented; several such loaders, in a list or a dict, are
            read one after another. By default the ``calibration_dataloader()`` of the datamodule or the module, else
            the validation loader, with a warning.
        method: See :func:`~lightning_clamp.fit_clamp`.
        save_to: Where to save the calibrated checkpoint: ``True`` beside the files of the Trainer's ``ModelCheckpoint``
            (nowhere, if there is none), ``False`` nowhere; or a folder, or a file that ends in ``.ckpt``.
        weights: ``"last"``, those that training ends with (averaged, under such a callback); or ``"best"``, those of
            the checkpoint that a ``ModelCheckpoint`` with a monitor found best. The model keeps its last weights;
            :meth:`calibrated_module` and the saved file have the best, and what ``trainer.test(ckpt_path="best")``
            loads is clamped.
        other_weights: What test and predict do with weights that are not the calibrated ones: ``"skip"`` leaves them
            alone, with a warning; ``"refit"`` calibrates them first, on the argument's or the hook's calibration set.
        cache_bytes: Batches, and the logits of a pass, are kept in memory up to this size on every rank, and read and
            computed again beyond it. None: see :func:`~lightning_clamp.fit_clamp`.
        on_error: ``"warn"`` reports a calibration that fails and lets ``fit`` return normally, the model uncalibrated;
            ``"raise"`` raises.
        **keywords: The settings of :class:`~lightning_clamp.spec.Spec`, such as ``task="binary"``, and the options of
            the method, such as ``output_maps=("temperature",)``; see :func:`~lightning_clamp.fit_clamp`.

    Raises:
        TypeError: If a keyword is unknown, or an option of another method.
        ValueError: If an argument has no such value.
    """

    def __init__(
        self,
        dataloaders: Any = None,
        *,
        method: Method = "clamp",
        save_to: SaveTo = True,
        weights: Weights = "last",
        other_weights: Literal["skip", "refit"] = "skip",
        cache_bytes: int | None = None,
        on_error: Literal["warn", "raise"] = "warn",
        **keywords: Unpack[ClampKeywords],
    ) -> None:
        self.plan = make_plan(method, keywords, NeuralClamping)
        check_save_to(save_to)
        check_cache_bytes(cache_bytes)
        check_choice("on_error", on_error, ("warn", "raise"))
        check_choice("weights", weights, ("last", "best"))
        check_choice("other_weights", other_weights, ("skip", "refit"))
        self.dataloaders = dataloaders
        self.save_to = save_to
        self.weights: Weights = weights
        self.other_weights = other_weights
        self.cache_bytes = cache_bytes
        self.on_error = on_error
        self._path: str | None = None
        self._result: CalibrationResult | None = None
        self._mailbox = Mailbox()
        self._batches: CalibrationBatches | None = None
        self._module: LightningModule | None = None
        self._hooks: ClampHooks | None = None
        self._steps = StepInputs(self.plan.spec)
        self._steps_seen = False
        # Whether the training of this fit came to its end, and whether its calibration did.
        self._ended = self._done = False
        # The step at which this fit's training began, once the network was tried.
        self._first_step: int | None = None

    @property
    def state_key(self) -> str:
        """Key of this callback's state in checkpoints."""
        return STATE_KEY

    @property
    def result(self) -> CalibrationResult | None:
        """What the last calibration did, or that of the checkpoint that was loaded; None before, and if it failed."""
        self._read_mail()
        return self._result

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
            TypeError: If the model holds something that cannot be copied, such as a lock; it is named.
        """
        self._read_mail()
        if self._result is None:
            raise RuntimeError("Nothing has been calibrated yet: run trainer.fit first, and read what it reported.")
        if self._module is None:
            raise RuntimeError(
                "The model was trained in other processes and this callback never saw it: use "
                f"CalibrationModule.from_checkpoint({self._path!r}, YourModule), or "
                "CalibrationModule.from_result(model, callback.result)."
            )
        result = self._result
        self._steps.stop()
        with nullcontext() if self._hooks is None else self._hooks.off():
            network = independent_copy(self._module)
        belongs = fingerprint(network) == result.fingerprint
        if not belongs and self._path is not None:
            network.load_state_dict(self._saved_weights(self._path), strict=network.strict_loading)
            belongs = fingerprint(network) == result.fingerprint
        if not belongs:
            raise RuntimeError(
                "The model's weights are no longer the calibrated ones (another checkpoint was loaded, or it was "
                "trained on), and those were not saved: give the Trainer a ModelCheckpoint, or the callback `save_to`."
            )
        return CalibrationModule.from_result(network, copy.deepcopy(result))

    def _saved_weights(self, path: str) -> dict[str, Any]:
        try:
            weights: dict[str, Any] = read_checkpoint(path)["state_dict"]
        except FileNotFoundError as error:
            raise RuntimeError(
                f"The model's weights are no longer the calibrated ones, and {path!r}, where those were saved, is not "
                "there any more: if it was moved, CalibrationModule.from_checkpoint(its_path, YourModule)."
            ) from error
        return weights

    def _read_mail(self) -> None:
        """Take over what worker processes left, where the Trainer started some."""
        if (left := self._mailbox.receive()) is not None:
            self._result, self._path = left

    # Fit

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot work, and move behind all other callbacks, before any training."""
        check_package(trainer, pl_module)
        self._first_step = None
        if stage == "validate":
            return
        check_strategy(trainer)
        self._check_alone(trainer)
        if not isinstance(pl_module, CalibrationModule):
            self._module = pl_module
        if stage != "fit":
            return
        check_float64(trainer)
        check_forward(pl_module)
        check_method(trainer, self.plan)
        if self.weights == "best":
            check_best(trainer)
        self._move_to_the_end(trainer)
        if self.plan.spec.views:
            rank_zero_info(
                f"NeuralClamping averages over {self.plan.spec.n_views} views of every image: calibration, test, "
                "predict and the calibrated model call the network that often."
            )

    def _check_alone(self, trainer: Trainer) -> None:
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        if (several := sum(isinstance(callback, NeuralClamping) for callback in callbacks)) > 1:
            raise MisconfigurationException(
                f"One Trainer takes one NeuralClamping, and this one has {several}: keep one, and give the trained "
                "model to lightning_clamp.calibrate(Trainer(), model, dataloader) to compare it with others."
            )

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
        for averaging in filter(averages_weights, behind):
            rank_zero_info(
                f"NeuralClamping moved behind {type(averaging).__name__}, so that the averaged weights count."
            )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget that an earlier fit ended."""
        self._ended = self._done = self._steps_seen = False
        self._batches = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check that there is a calibration set that can be read, before training time is spent."""
        with ranks_of(trainer).raise_together():
            check_place(trainer, self.save_to)
        # Hooks that make loaders may split at random.
        with kept_random_state():
            self._batches = self._find_batches(trainer, pl_module)
        if self._batches is None:
            rank_zero_info(
                "NeuralClamping does not try the network before training: the Trainer loads the validation set later."
            )

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Try the network once, before the first step: only now is it sure to be all set up."""
        if self._first_step is None:
            if self._batches is not None:
                words = "NeuralClamping tried the network before training, and this fit will not be calibrated."
                with self._reported(words):
                    try_network(trainer, pl_module, self._batches, self.plan)
            self._first_step = trainer.global_step

    def _find_batches(self, trainer: Trainer, pl_module: LightningModule) -> CalibrationBatches | None:
        """The calibration set, with the warnings it deserves; None if it will be loaded later."""
        source = find_calibration_set(trainer, pl_module, self.dataloaders)
        if source is None:
            return None
        if source.is_validation:
            rank_zero_warn(
                "NeuralClamping will calibrate on the validation set, which also served to choose the model: pass a "
                "loader, NeuralClamping(dataloaders=...), for confidences that owe it nothing."
            )
        warn_if_training_data(source.loader, trainer)
        spec = self.plan.spec
        if spec.perturb_at is not None:
            check_site(pl_module, spec.perturb_at)
        with kept_loaders(loaders_of(source.loader)):
            return CalibrationBatches(source, trainer, pl_module, ranks_of(trainer), spec)

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        """Say so if a calibration will not do the same."""
        self._steps.end(pl_module, "validation_step", batch)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Calibrate, report and save; a failure is reported and never loses the finished training."""
        self._ended = True
        self._steps.stop()
        self._result = self._path = None
        with (
            self._reported(),
            weights_of(self.weights, trainer, pl_module, ranks_of(trainer)) as moment,
        ):
            result = self._calibrate(trainer, pl_module)
            self._path = publish(trainer, pl_module, result, self.save_to, moment, self._mailbox)
            log_result(trainer, result)

    @contextmanager
    def _reported(self, words: str | None = None) -> Iterator[None]:
        """Turn what goes wrong into a warning, unless it shall be raised; ``words`` say what comes of it."""
        try:
            yield
        except Exception as error:  # hours of training must not be lost to whatever a network can raise
            if self.on_error == "raise":
                raise
            state = (
                "stays uncalibrated" if self._result is None else "is calibrated, but not all of it is saved and logged"
            )
            words = words or f"NeuralClamping failed: the model {state}."
            rank_zero_warn(f"{words} {type(error).__name__}: {error}")

    def _calibrate(self, trainer: Trainer, pl_module: LightningModule) -> CalibrationResult:
        batches = self._batches or self._find_batches(trainer, pl_module)
        self._batches = None
        if batches is None:
            raise MisconfigurationException(
                "The Trainer never loaded its validation set, which was to be the calibration set: pass "
                "NeuralClamping(dataloaders=...)."
            )
        self._result = run_in_trainer(trainer, pl_module, batches, self.plan, self.cache_bytes)
        self._done = True
        return self._result

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say so if training never ran, for then nothing was calibrated."""
        if not self._ended:
            rank_zero_warn(
                "Training had nothing left to do, so NeuralClamping did not run: raise max_epochs; or calibrate what "
                "was trained with lightning_clamp.calibrate(trainer, model, dataloader); or use the clamp "
                "of an earlier fit, if this callback has one."
            )

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave no hook behind, and say that an interrupted training was not calibrated."""
        self._remove_hooks()
        begun = self._first_step is not None and trainer.global_step > self._first_step
        if trainer.state.fn == "fit" and begun and not self._done:
            rank_zero_info(
                f"The fit stopped with {type(exception).__name__}: the model was not calibrated. To calibrate what was "
                "trained so far: lightning_clamp.calibrate(Trainer(), model, dataloader)."
            )

    # Test and predict

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Move behind callbacks that put other weights into the model, such as averaged ones."""
        self._move_to_the_end(trainer)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Move behind callbacks that put other weights into the model, such as averaged ones."""
        self._move_to_the_end(trainer)

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the clamp around the model."""
        self._install_hooks(trainer, pl_module)

    def on_predict_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the clamp around the model."""
        self._install_hooks(trainer, pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say that a validation is of the model without its clamp, where one would be expected.

        In a fit look at what validation_step does to its input, once.
        """
        if trainer.state.fn == "fit" and not self._steps_seen:
            self._steps_seen = True
            self._steps.start(pl_module)
        if trainer.state.fn != "validate" or self.result is None or self.result.clamp.is_identity:
            return
        if pl_module is self._module or self._belongs(trainer, fingerprint(pl_module)):
            warn_every_time(
                "trainer.validate does not use the clamp: these are the outputs of the bare model. trainer.test and "
                "trainer.predict use it, and so does callback.calibrated_module()."
            )

    def _install_hooks(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._remove_hooks()
        if isinstance(pl_module, CalibrationModule):
            return
        self._read_mail()
        refits = self.other_weights == "refit"
        seen = fingerprint(pl_module) if refits or self._result is not None else ""
        if refits and not self._belongs(trainer, seen):
            with self._reported():
                self._result = self._path = None
                rank_zero_info(str(self._calibrate(trainer, pl_module)))
        if self._result is None:
            way_out = " " + _MADE_ANEW.format(type(pl_module).__name__) if self._is_made_anew_by(pl_module) else ""
            warn_every_time(
                f"NeuralClamping has calibrated nothing yet: these are the outputs of the bare model.{way_out}"
            )
        elif not self._belongs(trainer, seen):
            warn_every_time(
                "The weights are not the ones that NeuralClamping calibrated (another checkpoint, or further "
                "training): these are the outputs of the bare model. NeuralClamping(other_weights='refit') would "
                "calibrate them."
            )
        elif not self._result.clamp.is_identity:
            clamp = copy.deepcopy(self._result.clamp).to(pl_module.device)
            self._hooks = ClampHooks(pl_module, clamp, self._result.spec, lambda: fingerprint(pl_module) == seen)
            self._steps.start(pl_module)

    def _is_made_anew_by(self, module: LightningModule) -> bool:
        """Whether a module's configure_callbacks makes another one in every run, and so made this one."""
        made = module.configure_callbacks()
        others = [callback for callback in (made if isinstance(made, Sequence) else [made]) if callback is not self]
        return any(isinstance(callback, NeuralClamping) for callback in others)

    def _belongs(self, trainer: Trainer, seen: str) -> bool:
        """Whether the clamp was fitted to weights of this fingerprint: the first rank's, as when it was fitted."""
        own = self._result is not None and seen == self._result.fingerprint
        return bool(trainer.strategy.broadcast(own))

    def _remove_hooks(self) -> None:
        self._steps.stop()
        if self._hooks is not None:
            self._hooks.remove()
            self._hooks = None

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        """Check that the clamp took effect."""
        self._steps.end(pl_module, "test_step", batch)
        self._check_effect(pl_module, "test_step", first=batch_idx == 0)

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        """Check that the clamp took effect."""
        self._steps.end(pl_module, "predict_step", batch)
        self._check_effect(pl_module, "predict_step", first=batch_idx == 0)

    def _check_effect(self, pl_module: LightningModule, step: str, *, first: bool) -> None:
        if self._hooks is None:
            return
        if self._hooks.idle:
            self._remove_hooks()
            warn_every_time(
                f"{step} ran with other weights than those that the model had when the epoch started, the calibrated "
                "ones: these are the outputs of the bare model. Weights that a callback puts in at the start are seen "
                "in time, and NeuralClamping(other_weights='refit') would calibrate them."
            )
        elif not self._hooks.used:
            raise MisconfigurationException(
                f"{type(pl_module).__name__}.{step} did not call self(x), so the clamp had no effect: call self(x) "
                "there, or run the Trainer on callback.calibrated_module()."
            )
        elif first and self._hooks.bare_loss:
            warn_every_time(
                f"{type(pl_module).__name__} returns a loss beside its logits, which it computed inside: it is that "
                "of the bare model. For that of the calibrated one compute it from the logits, which are clamped."
            )

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the clamp off."""
        self._remove_hooks()

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the clamp off."""
        self._remove_hooks()

    # State in checkpoints: what a later process needs to test and predict with the clamp

    # (not state_dict and load_state_dict: of two callbacks that have those a Trainer says less than we do)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add the clamp, as tensors, numbers and strings; nothing before calibration."""
        self._read_mail()
        if self._result is not None:
            checkpoint.setdefault("callbacks", {})[STATE_KEY] = state_of_result(self._result)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Restore the clamp, if the checkpoint has one; refuse a calibrated file that is not as it was saved.

        And a model without its training to go on from, for which Lightning blames ``save_weights_only``.
        """
        if trainer.state.fn == "fit":
            check_resumable(checkpoint, trainer.ckpt_path)
        # The module's own hook may have changed what the file holds.
        if not is_overridden("on_load_checkpoint", pl_module):
            check_seal(checkpoint, str(trainer.ckpt_path), migrated=True)
        if (state := checkpoint.get("callbacks", {}).get(STATE_KEY)) is not None:
            self._result = result_from_state(state)
