"""Calibrate a model that was trained earlier, with the devices, precision and loggers of any Trainer."""

import copy
import os
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from typing_extensions import Unpack

from lightning_clamp._rows import Task
from lightning_clamp._trainer.data import CalibrationBatches, given_calibration_set, owner_of
from lightning_clamp._trainer.devices import check_float64, check_strategy, ranks_of
from lightning_clamp._trainer.mailbox import Mailbox, Outcome
from lightning_clamp._trainer.run import publish, run_in_trainer
from lightning_clamp._trainer.weights import Moment
from lightning_clamp.clamping import BatchKeys, Method, check_batch_keys, check_options, submodule
from lightning_clamp.clamping.options import MethodOptions
from lightning_clamp.module import CalibrationModule


def calibrate(
    trainer: Trainer,
    model: LightningModule,
    dataloader_or_datamodule: Any = None,
    *,
    method: Method = "clamp",
    task: Task = "multiclass",
    ignore_index: int | None = None,
    batch_keys: BatchKeys | None = None,
    perturb_at: str | None = None,
    cache_bytes: int = 2**28,
    save_to: str | os.PathLike[str] | None = None,
    **options: Unpack[MethodOptions],
) -> CalibrationModule:
    """Calibrate a trained model, on the devices of a Trainer, and return it as a calibrated module.

    It runs inside ``trainer.validate``: several devices share the calibration set, and the numbers go to the Trainer's
    loggers. The model itself is left alone; a copy of it is calibrated.

    Args:
        trainer: Any Trainer that has the whole network on every device: one device, or ``strategy="ddp"``.
        model: Whose ``forward`` returns logits, with the weights to calibrate.
        dataloader_or_datamodule: Held-out pairs ``(inputs, target)``, not augmented, or a list or dict of several such
            loaders; or a datamodule; None for a model that comes with its data. Of those the
            ``calibration_dataloader()`` is taken after ``setup("fit")``, or for want of it the validation loader.
        method: See :func:`~lightning_clamp.fit_clamp`.
        task: ``"multiclass"`` (softmax) or ``"binary"`` (one logit, sigmoid).
        ignore_index: Target value of positions to leave out.
        batch_keys: Which entries of a batch are input and target, where it is no pair; see
            :func:`~lightning_clamp.fit_clamp`.
        perturb_at: Submodule at whose input δ is added; see :func:`~lightning_clamp.fit_clamp`.
        cache_bytes: Logits of a pass are kept up to this size on every rank; beyond it they are recomputed.
        save_to: File to save the calibrated model in, for :meth:`.CalibrationModule.from_checkpoint`.
        **options: Of the method; see :func:`~lightning_clamp.fit_clamp`.

    Returns:
        The calibrated module, on the CPU, with what was done in its ``result``.

    Raises:
        TypeError: If the model is no LightningModule, or an option is unknown to the method.
        ValueError: If an option has no such value, or for the reasons of :func:`~lightning_clamp.fit_clamp`.
        MisconfigurationException: If the Trainer's strategy cannot do this, or the calibration set cannot be read.
    """
    if not isinstance(model, LightningModule) or isinstance(model, CalibrationModule):
        raise TypeError(
            f"`calibrate` takes the LightningModule that was trained, before torch.compile, got {type(model).__name__}."
        )
    check_strategy(trainer)
    check_float64(trainer)
    check_options(method, task, options, n_ranks=trainer.world_size)
    check_batch_keys(batch_keys)
    if perturb_at is not None:
        submodule(model, perturb_at)
    arguments = {
        "method": method,
        "task": task,
        "ignore_index": ignore_index,
        "batch_keys": batch_keys,
        "perturb_at": perturb_at,
        "cache_bytes": cache_bytes,
        **options,
    }
    save_path = None if save_to is None else os.fspath(save_to)
    run = _Run(copy.deepcopy(model), dataloader_or_datamodule, arguments, save_path)
    trainer.validate(run, dataloaders=[_NoBatches()], verbose=False)
    outcome = run.mailbox.receive() or run.outcome
    if outcome is None:
        raise MisconfigurationException(
            "calibrate() runs inside trainer.validate, which this Trainer skips: remove limit_val_batches=0."
        )
    return CalibrationModule.of(run.network, outcome.calibrated).cpu()


class _NoBatches:
    """What the Trainer validates on, so that it starts to; the calibration set is read by the calibration."""

    def __iter__(self) -> Any:
        return iter(())

    def __len__(self) -> int:
        return 1


class _Run(LightningModule):
    """Calibrates a network when the Trainer starts to validate, with the data hooks of the network or a datamodule."""

    def __init__(self, network: LightningModule, data: Any, options: dict[str, Any], save_to: str | None) -> None:
        super().__init__()
        self.network = network
        self.data = data
        self.options = options
        self.save_to = save_to
        self.mailbox = Mailbox()
        self.outcome: Outcome | None = None

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
        source = given_calibration_set(self.data, self.network)
        if source.is_validation:
            rank_zero_warn(
                f"{type(self._provider).__name__} has no calibration_dataloader(), so its validation set serves, which "
                "also served to choose the model."
            )
        batches = CalibrationBatches(source, trainer, self, ranks_of(trainer), self.options["batch_keys"])
        outcome = run_in_trainer(trainer, self.network, batches, **self.options)
        moment = Moment(trainer.current_epoch, trainer.global_step)
        self.outcome = publish(trainer, self.network, outcome, self.save_to, moment, self.mailbox)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Nothing: all was done at the start."""
