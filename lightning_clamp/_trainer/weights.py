"""Which weights are calibrated: those that training ends with, or those of the best checkpoint for a while."""

import copy
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple, TypeAlias

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, StochasticWeightAveraging, WeightAveraging
from torch import Tensor

from lightning_clamp._trainer.devices import is_dry_run
from lightning_clamp.clamping.ranks import Ranks

Weights: TypeAlias = Literal["last", "best"]


class Moment(NamedTuple):
    """When in training the weights were those.

    Attributes:
        epoch: Index of the epoch.
        step: Optimizer steps until then.
    """

    epoch: int
    step: int


def check_best(trainer: Trainer) -> None:
    """Refuse ``weights="best"`` where no callback keeps them; a dry run has none to keep.

    Raises:
        MisconfigurationException: If there is no ``ModelCheckpoint`` with a monitor, or it keeps nothing.
    """
    if _keeper(trainer) is None and not is_dry_run(trainer):
        raise MisconfigurationException(
            "weights='best' calibrates the checkpoint that a ModelCheckpoint found best, and this Trainer has none "
            "that says by what: add ModelCheckpoint(monitor='val_loss'), or use weights='last'."
        )


def averages_weights(callback: Callback) -> bool:
    """Whether a callback replaces the weights by an average of those of training (EMA, SWA)."""
    return isinstance(callback, WeightAveraging | StochasticWeightAveraging)


@contextmanager
def weights_of(which: Weights, trainer: Trainer, module: LightningModule, ranks: Ranks) -> Iterator[Moment]:
    """Put weights into the module for a while, on all ranks, and its own back after, to the last bit.

    Raises:
        MisconfigurationException: If the best checkpoint was never saved, or holds objects that a safe load refuses.
    """
    if which == "last" or is_dry_run(trainer):
        yield Moment(trainer.current_epoch - 1, trainer.global_step)
        return
    best: dict[str, Any] = {}
    with ranks.raise_together():
        best = _read_best(trainer)
    own = {name: _kept(value) for name, value in module.state_dict().items()}
    try:
        module.load_state_dict(best["state_dict"], strict=module.strict_loading)
        yield Moment(best["epoch"], best["global_step"])
    finally:
        module.load_state_dict(own, strict=module.strict_loading)


def _keeper(trainer: Trainer) -> ModelCheckpoint | None:
    """The first callback that keeps the best checkpoint."""
    keepers = [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, ModelCheckpoint)]
    return next((keeper for keeper in keepers if keeper.monitor is not None and keeper.save_top_k != 0), None)


def _read_best(trainer: Trainer) -> dict[str, Any]:
    keeper = _keeper(trainer)
    path = "" if keeper is None else keeper.best_model_path
    if not path:
        raise MisconfigurationException(
            "weights='best', but the ModelCheckpoint saved nothing: was its monitor ever logged? Use weights='last'."
        )
    try:
        checkpoint: dict[str, Any] = trainer.strategy.load_checkpoint(path, weights_only=True)
    except pickle.UnpicklingError as error:
        raise MisconfigurationException(
            f"The best checkpoint {path!r} holds objects that a safe load refuses (hyperparameters that are "
            "no numbers or strings?), so it was not loaded: use weights='last'."
        ) from error
    return checkpoint


def _kept(value: Any) -> Any:
    return value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else copy.deepcopy(value)
