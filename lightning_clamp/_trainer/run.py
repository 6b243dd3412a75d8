"""The engine as a Trainer runs it: in its precision and stage, with its progress bar and loggers, on all its ranks."""

from dataclasses import replace
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import nn

from lightning_clamp._digest import fingerprint
from lightning_clamp._trainer.data import CalibrationBatches, as_validation
from lightning_clamp._trainer.devices import is_dry_run, ranks_of, take_group_down_at_exit
from lightning_clamp._trainer.mailbox import Mailbox
from lightning_clamp._trainer.progress import shown_progress
from lightning_clamp._trainer.weights import Moment
from lightning_clamp.checkpoint import SaveTo, calibrated_checkpoint, calibrated_path, save
from lightning_clamp.clamping.fit import fit_by_plan
from lightning_clamp.clamping.options import Plan
from lightning_clamp.clamping.result import CalibrationResult


def run_in_trainer(
    trainer: Trainer, module: LightningModule, batches: CalibrationBatches, plan: Plan, cache_bytes: int
) -> CalibrationResult:
    """:func:`~lightning_clamp.fit_clamp` of a module of a running Trainer, on all ranks."""
    take_group_down_at_exit()
    ranks, network = ranks_of(trainer), TrainedNetwork(trainer, module)
    with as_validation(trainer), shown_progress(trainer, batches.n_batches) as progress:
        result = fit_by_plan(network, batches, plan, cache_bytes=cache_bytes, progress=progress, ranks=ranks)
    # Statistics of a batch normalisation differ from rank to rank; the first rank's are calibrated, and saved.
    return replace(result, fingerprint=ranks.gather(fingerprint(module))[0])


def publish(
    trainer: Trainer,
    module: LightningModule,
    result: CalibrationResult,
    save_to: SaveTo,
    moment: Moment,
    mailbox: Mailbox,
) -> str | None:
    """Show the result, post it to the process that started this one, and save it.

    It is posted first: a save that fails costs the file, and not the clamp. Where any rank cannot make the checkpoint,
    none is written.

    Returns:
        The path where it was saved, None for nowhere.
    """
    rank_zero_info(str(result))
    ranks, path = ranks_of(trainer), _path_for(trainer, save_to, moment)
    _post(trainer, mailbox, result, None)
    if path is not None:
        # All ranks take part in making it: a module's own hook may want that.
        checkpoint: dict[str, Any] = {}
        with ranks.raise_together():
            checkpoint = calibrated_checkpoint(module, result, *moment)
        with ranks.raise_together():
            if trainer.is_global_zero:
                save(trainer, checkpoint, path)
        rank_zero_info(
            f"saved: {path} (CalibrationModule.from_checkpoint reads it; {type(module).__name__}.load_from_checkpoint "
            "gives the bare model)"
        )
        _post(trainer, mailbox, result, path)
    return path


def _post(trainer: Trainer, mailbox: Mailbox, result: CalibrationResult, path: str | None) -> None:
    """Leave it once on every machine."""
    with ranks_of(trainer).raise_together():
        if trainer.local_rank == 0:
            mailbox.send(result, path)


def _path_for(trainer: Trainer, save_to: SaveTo, moment: Moment) -> str | None:
    """Where to save, beside the files of the Trainer's ModelCheckpoint unless a place was named; None for nowhere."""
    if is_dry_run(trainer):
        return None
    folder = getattr(trainer.checkpoint_callback, "dirpath", None)
    return calibrated_path(save_to, folder, f"epoch={moment.epoch}-step={moment.step}")


class TrainedNetwork(nn.Module):
    """The module's forward in the Trainer's precision."""

    def __init__(self, trainer: Trainer, module: LightningModule) -> None:
        super().__init__()
        self.module = module
        self.precision = trainer.precision_plugin

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The output as the module's own steps would see it."""
        with self.precision.forward_context():
            return self.module(*args, **kwargs)

    def get_submodule(self, target: str) -> nn.Module:
        """A submodule by the name that it has in the user's module."""
        return self.module.get_submodule(target)
