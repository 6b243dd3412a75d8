"""The config of a run, saved with its logs."""

import os
from itertools import chain, count

from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback


class SaveConfig(SaveConfigCallback):
    """Saves the config with the logs as ``config.yaml``, or where there is one already, as ``config-1.yaml`` and so on.

    Lightning's own stops the run instead, or overwrites what may have been written by hand: some loggers have no folder
    of their own, and then it is the working directory. Without a logger nothing is saved.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Save the config."""
        if trainer.loggers and not self.already_saved:
            self.config_filename = trainer.strategy.broadcast(_free_name(trainer))
            super().setup(trainer, pl_module, stage)


def _free_name(trainer: Trainer) -> str:
    folder = trainer.log_dir or ""
    exists = get_filesystem(folder).exists
    names = chain(["config.yaml"], (f"config-{number}.yaml" for number in count(1)))
    return next(name for name in names if not exists(os.path.join(folder, name)))
