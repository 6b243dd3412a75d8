"""The engine as a Trainer runs it: in its precision and stage, with its progress bar and loggers, on all its ranks."""

import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor, nn

from lightning_clamp._digest import fingerprint
from lightning_clamp._files import is_url
from lightning_clamp._trainer.data import CalibrationBatches, as_validation
from lightning_clamp._trainer.devices import is_dry_run, ranks_of, take_group_down_at_exit
from lightning_clamp._trainer.mailbox import Mailbox
from lightning_clamp._trainer.progress import shown_progress
from lightning_clamp._trainer.weights import Moment
from lightning_clamp.checkpoint import SaveTo, calibrated_checkpoint, calibrated_path, save
from lightning_clamp.clamping.fit import fit_by_plan
from lightning_clamp.clamping.options import Plan
from lightning_clamp.clamping.result import CalibrationResult


def check_place(trainer: Trainer, save_to: SaveTo) -> None:
    """Refuse a place where nothing can be saved, before there is anything to lose.

    Raises:
        MisconfigurationException: If the file's name is that of a folder, a folder's that of a file, or the folder may
            not be written in.
    """
    path = _path_for(trainer, save_to, Moment(0, 0))
    if path is None or is_url(path) or not trainer.is_global_zero:
        return
    folder = os.path.dirname(os.path.abspath(path))
    while not os.path.lexists(folder):
        folder = os.path.dirname(folder)
    if os.path.isdir(path):
        problem = "that is a folder"
    elif not os.path.isdir(folder):
        problem = f"{folder!r} is no folder"
    elif not os.access(folder, os.W_OK | os.X_OK):
        problem = f"{folder!r} may not be written in"
    else:
        return
    raise MisconfigurationException(
        f"The calibrated model cannot be saved as {path!r}, for {problem}: give `save_to` another place."
    )


def run_in_trainer(
    trainer: Trainer, module: LightningModule, batches: CalibrationBatches, plan: Plan, cache_bytes: int | None
) -> CalibrationResult:
    """:func:`~lightning_clamp.fit_clamp` of a module of a running Trainer, on all ranks."""
    take_group_down_at_exit()
    ranks, network = ranks_of(trainer), TrainedNetwork(trainer, module)
    with as_validation(trainer), shown_progress(trainer, batches.n_batches) as shown:

        def progress(what: str, done: int) -> None:
            # A Trainer only notes the signal, and looks at the note between batches of training.
            if trainer.received_sigterm:
                raise SIGTERMException
            if shown is not None:
                shown(what, done)

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
    dry = (
        "This was a trial run (fast_dev_run) of a network that is hardly trained: the numbers mean nothing, and "
        "nothing is saved.\n"
    )
    rank_zero_info(f"{dry if is_dry_run(trainer) else ''}{result}")
    ranks, path = ranks_of(trainer), _path_for(trainer, save_to, moment)
    _post(trainer, mailbox, result, None)
    if path is not None:
        # All ranks take part in making it: a module's own hook may want that.
        checkpoint: dict[str, Any] = {}
        with ranks.raise_together():
            checkpoint = calibrated_checkpoint(module, result, *moment)
        with ranks.raise_together():
            if trainer.is_global_zero:
                _save(trainer, checkpoint, path)
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


def _save(trainer: Trainer, checkpoint: dict[str, Any], path: str) -> None:
    try:
        save(trainer, checkpoint, path)
    except OSError as error:
        if error.filename is not None:
            raise
        raise OSError(error.errno, f"{path!r} was not saved: {error.strerror or error}") from error


def _path_for(trainer: Trainer, save_to: SaveTo, moment: Moment) -> str | None:
    """Where to save, beside the files of the Trainer's ModelCheckpoint unless a place was named; None for nowhere."""
    if is_dry_run(trainer):
        return None
    folder = getattr(trainer.checkpoint_callback, "dirpath", None)
    return calibrated_path(save_to, folder, f"epoch={moment.epoch}-step={moment.step}")


def _described(args: Iterable[Any], kwargs: Mapping[str, Any]) -> str:
    """The arguments of a call, tensors by dtype and shape."""

    def kind(value: Any) -> str:
        is_tensor = isinstance(value, Tensor)
        return f"{value.dtype} of shape {tuple(value.shape)}" if is_tensor else type(value).__name__

    return ", ".join([*map(kind, args), *(f"{name}: {kind(value)}" for name, value in kwargs.items())])


# What a Trainer is told, so that inputs have the dtype of the weights.
_PRECISIONS = {
    torch.bfloat16: "bf16-true",
    torch.float16: "16-true",
    torch.float64: "64-true",
    torch.float32: "32-true",
}


def _way_out(module: nn.Module, inputs: Iterable[Any]) -> str:
    """What is mostly wrong with a call that fails: the dtype, or which entries of a batch are the input."""
    weights = next((parameter.dtype for parameter in module.parameters() if parameter.is_floating_point()), None)
    given = [value.dtype for value in inputs if isinstance(value, Tensor) and value.is_floating_point()]
    if given and weights in _PRECISIONS and weights not in given:
        return f"Its weights are {weights}: Trainer(precision={_PRECISIONS[weights]!r}) makes inputs of that dtype."
    return (
        "If that is not what its forward takes: `batch_keys` says which entries of a batch are input and target. "
        "Several inputs are arguments of their own, batch_keys=((0, 1), 2) for forward(a, b), and "
        "batch_keys=(['ids', 'mask'], 'labels') for forward(ids, mask)."
    )


class TrainedNetwork(nn.Module):
    """The module's forward in the Trainer's precision."""

    def __init__(self, trainer: Trainer, module: LightningModule) -> None:
        super().__init__()
        self.module = module
        self.precision = trainer.precision_plugin
        self._has_run = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The output as the module's own steps would see it.

        Raises:
            RuntimeError: If the first call fails, for that may not be the input that the module takes.
            MisconfigurationException: If the forward logs, which a Trainer takes in steps alone.
        """
        try:
            with self.precision.forward_context():
                output = self.module(*args, **kwargs)
        except MisconfigurationException as error:
            if "self.log" not in str(error):
                raise
            raise MisconfigurationException(
                f"{error} A forward that logs cannot be called when training has ended: log in the steps, or "
                "`if self.training`."
            ) from error
        except (TypeError, ValueError, RuntimeError, LookupError, AttributeError) as error:
            if self._has_run or isinstance(error, torch.OutOfMemoryError):
                raise
            raise RuntimeError(
                f"The network fails when it is called with {_described(args, kwargs)}. {type(error).__name__}: {error} "
                f"({_way_out(self.module, [*args, *kwargs.values()])})"
            ) from error
        self._has_run = True
        return output

    def get_submodule(self, target: str) -> nn.Module:
        """A submodule by the name that it has in the user's module."""
        return self.module.get_submodule(target)
