"""Calibrate a model that was trained earlier, with the devices, precision and loggers of any Trainer."""

from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn
from typing_extensions import Unpack

from lightning_clamp._checks import check_made, check_package
from lightning_clamp._trainer.data import CalibrationBatches, given_calibration_set, owner_of
from lightning_clamp._trainer.devices import check_float64, check_method, check_strategy, ranks_of
from lightning_clamp._trainer.mailbox import Mailbox
from lightning_clamp._trainer.preflight import check_forward, check_site
from lightning_clamp._trainer.run import TrainedNetwork, check_place, publish, run_in_trainer
from lightning_clamp._trainer.steady import warn_if_unsteady
from lightning_clamp._trainer.weights import Moment
from lightning_clamp.checkpoint import SaveTo, check_save_to
from lightning_clamp.clamping.copies import independent_copy
from lightning_clamp.clamping.frozen import frozen
from lightning_clamp.clamping.kept import check_cache_bytes
from lightning_clamp.clamping.options import ClampKeywords, Method, Plan, make_plan
from lightning_clamp.clamping.passes import CalibrationSet
from lightning_clamp.clamping.result import CalibrationResult
from lightning_clamp.module import CalibrationModule
from lightning_clamp.report import log_result


def calibrate(
    trainer: Trainer,
    model: LightningModule,
    dataloaders: Any = None,
    datamodule: LightningDataModule | None = None,
    *,
    method: Method = "clamp",
    save_to: SaveTo = False,
    cache_bytes: int | None = None,
    **keywords: Unpack[ClampKeywords],
) -> CalibrationModule:
    """Calibrate a trained model, on the devices of a Trainer, and return it as a calibrated module.

    It runs inside ``trainer.validate``: several devices share the calibration set, and the numbers go to the Trainer's
    loggers. The model itself is left alone; a copy of it is calibrated.

    Args:
        trainer: Any Trainer that has the whole network on every device: one device, or ``strategy="ddp"``.
        model: Whose ``forward`` returns logits, with the weights to calibrate.
        dataloaders: Held-out pairs ``(inputs, target)``, not augmented, or a list or dict of several such loaders.
        datamodule: Or a datamodule; without either, the model itself, if it comes with its data. Of those the
            ``calibration_dataloader()`` is taken after ``setup("fit")``, or for want of it the validation loader.
        method: See :func:`~lightning_clamp.fit_clamp`.
        save_to: Where to save the calibrated model for :meth:`.CalibrationModule.from_checkpoint`: a file that ends in
            ``.ckpt``, or a folder; ``True`` beside the files of the Trainer's ``ModelCheckpoint``; ``False`` nowhere.
        cache_bytes: Batches, and the logits of a pass, are kept in memory up to this size on every rank, and read and
            computed again beyond it. None: see :func:`~lightning_clamp.fit_clamp`.
        **keywords: The settings of :class:`~lightning_clamp.spec.Spec` and the options of the method; see
            :func:`~lightning_clamp.fit_clamp`.

    Returns:
        The calibrated module, on the CPU, with what was done in its ``result``.

    Raises:
        TypeError: If the model is no LightningModule, is of the package ``pytorch_lightning``, or holds something that
            cannot be copied, or a keyword is unknown.
        ValueError: If an argument has no such value, or for the reasons of :func:`~lightning_clamp.fit_clamp`.
        MisconfigurationException: If the Trainer's strategy cannot do this, or the calibration set cannot be read.
    """
    plan = make_plan(method, keywords, calibrate)
    return calibrate_by_plan(trainer, model, dataloaders, datamodule, plan, save_to=save_to, cache_bytes=cache_bytes)


def calibrate_by_plan(
    trainer: Trainer,
    model: LightningModule,
    dataloaders: Any,
    datamodule: LightningDataModule | None,
    plan: Plan,
    *,
    save_to: SaveTo,
    cache_bytes: int | None,
) -> CalibrationModule:
    """:func:`calibrate` with its keywords sorted."""
    check_package(trainer, model, dataloaders, datamodule)
    check_made(model)
    if not isinstance(model, LightningModule) or isinstance(model, CalibrationModule):
        raise TypeError(f"`calibrate` takes the LightningModule that was trained, {_not_a_model(model)}")
    check_save_to(save_to)
    check_cache_bytes(cache_bytes)
    check_strategy(trainer)
    check_float64(trainer)
    check_forward(model)
    check_method(trainer, plan)
    if plan.spec.perturb_at is not None:
        check_site(model, plan.spec.perturb_at)
    check_place(trainer, save_to)
    run = _Run(independent_copy(model), _one_source(dataloaders, datamodule), plan, save_to, cache_bytes)
    trainer.validate(run, dataloaders=[_NoBatches()], verbose=False)
    left = run.mailbox.receive()
    result = run.result if left is None else left[0]
    if result is None:
        raise MisconfigurationException(
            "calibrate() runs inside trainer.validate, which this Trainer skips: remove limit_val_batches=0."
        )
    return CalibrationModule.from_result(run.network, result).cpu()


def _not_a_model(given: object) -> str:
    """What was given in the place of a LightningModule, and the way out."""
    got = f"got {type(given).__name__}"
    # Private, and what torch.compile calls the module that it wraps. A test holds it.
    if hasattr(given, "_orig_mod"):
        return f"{got}: pass the one before torch.compile, and compile the calibrated module."
    if isinstance(given, CalibrationModule):
        return f"{got}, which is calibrated already: pass its `network`."
    if isinstance(given, nn.Module):
        return f"{got}: fit_clamp(network, dataloader) takes any network."
    return f"{got}: call calibrate(trainer, model, dataloaders)."


def _one_source(dataloaders: Any, datamodule: LightningDataModule | None) -> Any:
    """The loaders or the datamodule, which may be passed as the loaders as in ``trainer.validate``; not both."""
    if dataloaders is not None and datamodule is not None:
        raise MisconfigurationException("Pass `dataloaders` or a `datamodule` to calibrate on, not both.")
    return datamodule if dataloaders is None else dataloaders


class _NoBatches:
    """What the Trainer validates on, so that it starts to; the calibration set is read by the calibration."""

    def __iter__(self) -> Any:
        return iter(())

    def __len__(self) -> int:
        return 1


class _Run(LightningModule):
    """Calibrates a network when the Trainer starts to validate, with the data hooks of the network or a datamodule."""

    def __init__(
        self, network: LightningModule, data: Any, plan: Plan, save_to: SaveTo, cache_bytes: int | None
    ) -> None:
        super().__init__()
        self.network = network
        self.data = data
        self.plan = plan
        self.save_to = save_to
        self.cache_bytes = cache_bytes
        self.mailbox = Mailbox()
        self.result: CalibrationResult | None = None

    @property
    def datamodule(self) -> LightningDataModule | None:
        """The datamodule, if the data are one."""
        return self.data if isinstance(self.data, LightningDataModule) else None

    @property
    def _provider(self) -> LightningModule | LightningDataModule | None:
        """Who makes the data; None if loaders were given."""
        return self.network if self.data is None else self.datamodule

    def prepare_data(self) -> None:
        """The datamodule's, or the network's where it comes with its data."""
        if self._provider is not None:
            self._provider.prepare_data()

    def configure_model(self) -> None:
        """The network's."""
        self.network.configure_model()

    def setup(self, stage: str) -> None:
        """The datamodule's, or the network's, for the stage in which splits are made: that of training."""
        if self.datamodule is not None:
            self.datamodule.trainer = self.trainer
        if self._provider is not None:
            self._provider.setup("fit")

    def teardown(self, stage: str) -> None:
        """The datamodule's, or the network's."""
        if self._provider is not None:
            self._provider.teardown("fit")

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """The datamodule's, or the network's."""
        return self._owner_of("on_before_batch_transfer").on_before_batch_transfer(batch, dataloader_idx)

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """The datamodule's, or the network's."""
        return self._owner_of("transfer_batch_to_device").transfer_batch_to_device(batch, device, dataloader_idx)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """The datamodule's, or the network's."""
        return self._owner_of("on_after_batch_transfer").on_after_batch_transfer(batch, dataloader_idx)

    def _owner_of(self, hook: str) -> LightningModule | LightningDataModule:
        return owner_of(hook, self.datamodule, self.network)

    def on_validation_start(self) -> None:
        """Calibrate."""
        trainer = self.trainer
        with ranks_of(trainer).raise_together():
            source = given_calibration_set(self.data, self.network)
        if source.is_validation:
            rank_zero_warn(
                f"{type(self._provider).__name__} has no calibration_dataloader(), so its validation set serves, which "
                "also served to choose the model."
            )
        batches = CalibrationBatches(source, trainer, self, ranks_of(trainer), self.plan.spec)
        firsts, batches.firsts = batches.firsts, []
        network = TrainedNetwork(trainer, self.network)
        data = CalibrationSet(network, firsts, self.plan.spec, cache_bytes=0, ranks=ranks_of(trainer))
        with frozen(network):
            warn_if_unsteady(data)
        self.result = run_in_trainer(trainer, self.network, batches, self.plan, self.cache_bytes)
        # The epoch that trained last: current_epoch is beyond it once that has ended.
        moment = Moment(max(0, trainer.fit_loop.epoch_progress.current.ready - 1), trainer.global_step)
        try:
            publish(trainer, self.network, self.result, self.save_to, moment, self.mailbox)
            log_result(trainer, self.result)
        except Exception as error:  # noqa: BLE001 - the clamp must not be lost to a disk that is full
            rank_zero_warn(
                "calibrate() returns the calibrated model, but not all of it is saved and logged. "
                f"{type(error).__name__}: {error}"
            )

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Nothing: all was done at the start."""
