"""The engine as a Trainer runs it: in its precision and stage, with its progress bar and loggers, on all its ranks."""

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from lightning_clamp._rows import Task
from lightning_clamp.checkpoint import Calibrated, calibrated_checkpoint, fingerprint, save
from lightning_clamp.clamping import fit_clamp
from lightning_clamp.data import CalibrationBatches
from lightning_clamp.devices import ranks_of
from lightning_clamp.mailbox import Mailbox, Outcome
from lightning_clamp.progress import shown_progress
from lightning_clamp.report import log_result, table
from lightning_clamp.weights import Moment


def fit_in_trainer(
    trainer: Trainer,
    module: LightningModule,
    batches: CalibrationBatches,
    *,
    task: Task,
    ignore_index: int | None,
    **options: Any,
) -> Outcome:
    """:func:`~lightning_clamp.fit_clamp` of a module of a running Trainer, on all ranks."""
    ranks, stage = ranks_of(trainer), trainer.state.stage
    # Transfer hooks that augment ask whether the Trainer is training; these batches are for measuring.
    trainer.validating = True
    try:
        with shown_progress(trainer, batches.n_batches) as progress:
            result = fit_clamp(
                TrainedNetwork(trainer, module),
                batches,
                task=task,
                ignore_index=ignore_index,
                progress=progress,
                process_group=ranks.group,
                **options,
            )
    finally:
        trainer.state.stage = stage
    # Statistics of a batch normalisation differ from rank to rank; the first rank's are calibrated, and saved.
    belongs_to = ranks.gather(fingerprint(module))[0]
    calibrated = Calibrated(result.clamp, belongs_to, task, ignore_index, dict(result.before), dict(result.after))
    return Outcome(result, calibrated, None)


def publish(
    trainer: Trainer, module: LightningModule, outcome: Outcome, path: str | None, moment: Moment, mailbox: Mailbox
) -> Outcome:
    """Show the outcome, save it (None for nowhere), post it to the process that started this one, and log it."""
    rank_zero_info(table(outcome.result))
    if path is not None:
        with ranks_of(trainer).agreeing():
            # All ranks take part in making it: a module's own hook may want that.
            checkpoint = calibrated_checkpoint(module, outcome.calibrated, *moment)
            if trainer.is_global_zero:
                save(trainer, checkpoint, path)
        outcome = outcome._replace(path=path)
        rank_zero_info(f"saved: {path}")
    if trainer.local_rank == 0:
        mailbox.send(outcome)
    log_result(trainer, outcome.result)
    return outcome


class TrainedNetwork(nn.Module):
    """The module's forward in the Trainer's precision."""

    def __init__(self, trainer: Trainer, module: LightningModule) -> None:
        super().__init__()
        self.module = module
        self.precision = trainer.precision_plugin

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits as the module's own steps would see them."""
        with self.precision.forward_context():
            logits: Tensor = self.module(inputs)
        return logits
