"""The engine as a Trainer runs it: in its precision and stage, with its progress bar and loggers, on all its ranks."""

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import nn

from lightning_clamp._rows import Task
from lightning_clamp._trainer.data import CalibrationBatches, as_validation
from lightning_clamp._trainer.devices import ranks_of, take_group_down_at_exit
from lightning_clamp._trainer.mailbox import Mailbox, Outcome
from lightning_clamp._trainer.progress import shown_progress
from lightning_clamp._trainer.weights import Moment
from lightning_clamp.checkpoint import Calibrated, calibrated_checkpoint, fingerprint, save
from lightning_clamp.clamping import BatchKeys, fit_clamp
from lightning_clamp.report import log_result, table


def run_in_trainer(
    trainer: Trainer,
    module: LightningModule,
    batches: CalibrationBatches,
    *,
    task: Task,
    ignore_index: int | None,
    batch_keys: BatchKeys | None,
    perturb_at: str | None,
    **options: Any,
) -> Outcome:
    """:func:`~lightning_clamp.fit_clamp` of a module of a running Trainer, on all ranks."""
    take_group_down_at_exit()
    ranks = ranks_of(trainer)
    with as_validation(trainer), shown_progress(trainer, batches.n_batches) as progress:
        result = fit_clamp(
            TrainedNetwork(trainer, module),
            batches,
            task=task,
            ignore_index=ignore_index,
            batch_keys=batch_keys,
            perturb_at=perturb_at,
            progress=progress,
            process_group=ranks.group,
            **options,
        )
    # Statistics of a batch normalisation differ from rank to rank; the first rank's are calibrated, and saved.
    belongs_to = ranks.gather(fingerprint(module))[0]
    return Outcome(Calibrated(result, belongs_to, task, ignore_index, batch_keys, perturb_at), None)


def publish(
    trainer: Trainer, module: LightningModule, outcome: Outcome, path: str | None, moment: Moment, mailbox: Mailbox
) -> Outcome:
    """Show the outcome, save it (None for nowhere), post it to the process that started this one, and log it."""
    result = outcome.calibrated.result
    rank_zero_info(table(result))
    if path is not None:
        with ranks_of(trainer).raise_together():
            # All ranks take part in making it: a module's own hook may want that.
            checkpoint = calibrated_checkpoint(module, outcome.calibrated, *moment)
            if trainer.is_global_zero:
                save(trainer, checkpoint, path)
        outcome = outcome._replace(path=path)
        rank_zero_info(f"saved: {path}")
    if trainer.local_rank == 0:
        mailbox.send(outcome)
    log_result(trainer, result)
    return outcome


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
