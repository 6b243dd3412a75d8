"""Losses that learn as training goes on: what they have learned is in checkpoints, on all ranks, and comes back."""

from collections.abc import Mapping
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

# Lightning has no public name for "the processes of this fit end with it, and send home the state_dict alone".
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from lightning_clamp.losses.mixin import LossMixin
from lightning_clamp.losses.samples import SampleValues

_STATE = "calibrated_loss"


class Learning(LossMixin):
    """A mixin whose loss learns.

    What was learned is in every checkpoint, and not in the ``state_dict``, so that the plain module takes that. Only
    where Lightning has started processes for a fit, which send their ``state_dict`` home at its end, it goes along.
    """

    _calibrated_loss_goes_home = False

    def calibrated_loss_state(self) -> dict[str, Tensor]:
        """All that was learned, by names that no other loss has."""
        raise NotImplementedError

    def restore_calibrated_loss(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what :meth:`calibrated_loss_state` was."""
        raise NotImplementedError

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save what was learned."""
        super().on_save_checkpoint(checkpoint)
        checkpoint[_STATE] = {name: value.cpu() for name, value in self.calibrated_loss_state().items()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on where the checkpoint was; one of another loss says nothing of this one."""
        super().on_load_checkpoint(checkpoint)
        state = checkpoint.get(_STATE, {})
        if state.keys() == self.calibrated_loss_state().keys():
            self.restore_calibrated_loss(state)

    def teardown(self, stage: str) -> None:
        """What follows in a process that Lightning has started is its state_dict, for the one that started it."""
        super().teardown(stage)
        started = isinstance(self.trainer.strategy.launcher, _MultiProcessingLauncher)
        self._calibrated_loss_goes_home = started and stage == "fit"

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own; from a process that ends with its fit, also what was learned."""
        values = super().state_dict(*args, **kwargs)
        if self._calibrated_loss_goes_home:
            values.update({f"{_STATE}.{name}": value for name, value in self.calibrated_loss_state().items()})
        return values

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """The module's own; and what was learned in a process that ended with its fit."""
        names = {f"{_STATE}.{name}": name for name in self.calibrated_loss_state()}
        if names.keys() <= state_dict.keys():
            self.restore_calibrated_loss({name: state_dict[key] for key, name in names.items()})
            state_dict = {key: value for key, value in state_dict.items() if key not in names}
        return super().load_state_dict(state_dict, *args, **kwargs)

    def over_ranks(self, values: Tensor, how: str) -> Tensor:
        """``values`` reduced over the ranks, by "sum", "mean" or "max"; the strategy may do so in place."""
        reduced: Tensor = self.trainer.strategy.reduce(values.clone(), reduce_op=how)
        return reduced


class LearningBySample(Learning):
    """Keeps a number for each sample, and gives all ranks all of them after every epoch."""

    def kept_by_sample(self) -> SampleValues:
        """What is kept."""
        raise NotImplementedError

    def checked_index(self, index: Tensor | None, device: torch.device) -> Tensor:
        """The index of a batch, on the device.

        Raises:
            TypeError: If there is none.
        """
        if index is None:
            raise TypeError(
                f"{type(self).__name__} keeps a number for each sample and needs batches (inputs, target, index), or "
                "with an 'index' where they are mappings: wrap the training set in lightning_clamp.losses.Indexed."
            )
        return index.to(device)

    def on_train_epoch_end(self) -> None:
        """Bring the ranks together."""
        super().on_train_epoch_end()
        self.kept_by_sample().merge(self.over_ranks)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Bring the ranks together in mid-epoch too."""
        # After an epoch there is nothing to do, and one rank may save alone.
        if self.kept_by_sample().pending:
            self.kept_by_sample().merge(self.over_ranks)
        super().on_save_checkpoint(checkpoint)


class LearningFromValidation(Learning):
    """Measures additive sums on the first validation set of a fit, over all ranks, and learns from them.

    Every batch is run through the network once more, after the module's own validation step.
    """

    _calibrated_loss_sums: Tensor | None = None

    def measured(self, logits: Tensor, target: Tensor) -> Tensor:
        """Sums of a batch, ``(3, K)``, float64."""
        raise NotImplementedError

    def learn(self, sums: Tensor) -> None:
        """Learn from the sums of a validation."""
        raise NotImplementedError

    def on_fit_start(self) -> None:
        """Refuse a run that never validates."""
        super().on_fit_start()
        if not self.trainer.enable_validation:
            raise MisconfigurationException(
                f"{type(self).__name__} learns from validation data: give the Trainer a validation loader, and the "
                "module a validation_step."
            )

    def on_validation_epoch_start(self) -> None:
        """Forget the validation before."""
        super().on_validation_epoch_start()
        self._calibrated_loss_sums = None

    def on_validation_batch_end(self, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Measure the batch, in a fit."""
        super().on_validation_batch_end(outputs, batch, batch_idx, dataloader_idx)
        if not self._learns_now() or dataloader_idx:
            return
        inputs, target, _ = self.calibrated_loss_batch(batch)
        with torch.no_grad(), self.trainer.precision_plugin.val_step_context():
            logits = self.calibrated_logits(inputs)
        sums = self.measured(logits, target)
        before = self._calibrated_loss_sums
        self._calibrated_loss_sums = sums if before is None else before + sums

    def on_validation_epoch_end(self) -> None:
        """Learn from all ranks, in a fit."""
        # Before on_validation_end, where ModelCheckpoint may save.
        super().on_validation_epoch_end()
        if not self._learns_now():
            return
        mine = self._calibrated_loss_sums
        # A rank may have had no batch.
        size = int(self.over_ranks(torch.tensor(0 if mine is None else mine.shape[1], device=self.device), "max"))
        total = self.over_ranks(
            torch.zeros(3, size, dtype=torch.float64, device=self.device) if mine is None else mine, "sum"
        )
        self._calibrated_loss_sums = None
        # What is learned is part of losses that are differentiated, which tensors of inference mode cannot be.
        with torch.inference_mode(False):
            if bool(total[0].any()):
                self.learn(total.clone())

    def _learns_now(self) -> bool:
        return self.trainer.state.fn == TrainerFn.FITTING and not self.trainer.sanity_checking
