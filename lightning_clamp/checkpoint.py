"""The calibrated checkpoint: a Lightning checkpoint of the weights, with the clamp and the weights' fingerprint.

It holds tensors, numbers and strings only, so that ``torch.load(weights_only=True)`` reads it.
"""

import errno
import hashlib
import io
import os
import pickle
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, NamedTuple

import lightning
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lightning_clamp._rows import Task
from lightning_clamp.clamping import BatchKeys, CalibrationResult, Clamp

FORMAT = 2
# Key of the callback's state in every checkpoint, this one and Lightning's own.
STATE_KEY = "NeuralClamping"


class Calibrated(NamedTuple):
    """What a calibration leaves behind, and what it belongs to.

    Attributes:
        result: What was done; the clamp is part of it.
        fingerprint: :func:`fingerprint` of the network it was fitted to.
        task: How the logits are read.
        ignore_index: Target value left out.
        batch_keys: Which entries of a batch are input and target.
        perturb_at: The submodule at whose input the perturbation is added; None for the network's own.
    """

    result: CalibrationResult
    fingerprint: str
    task: Task = "multiclass"
    ignore_index: int | None = None
    batch_keys: BatchKeys | None = None
    perturb_at: str | None = None

    @property
    def clamp(self) -> Clamp:
        """The clamp."""
        return self.result.clamp


def fingerprint(network: nn.Module) -> str:
    """Digest of names, dtypes, shapes and values of a module's state: equal weights, equal fingerprint."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in network.state_dict().items():
        if isinstance(tensor, Tensor):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def to_state(calibrated: Calibrated) -> dict[str, Any]:
    """A plain dict that ``weights_only=True`` loads."""
    return {**calibrated._asdict(), "format": FORMAT, "result": calibrated.result.to_state()}


def from_state(state: Mapping[str, Any]) -> Calibrated:
    """The inverse of :func:`to_state`."""
    if state.get("format") != FORMAT:
        raise ValueError(
            f"The saved clamp has format {state.get('format')!r}, and this version reads format {FORMAT}: "
            "use the version of lightning_clamp that wrote it."
        )
    kept = {name: state[name] for name in Calibrated._fields}
    return Calibrated(**{**kept, "result": CalibrationResult.from_state(state["result"])})


def calibrated_checkpoint(module: LightningModule, calibrated: Calibrated, epoch: int, step: int) -> dict[str, Any]:
    """A checkpoint for ``load_from_checkpoint``, :func:`read_calibrated`, and ``ckpt_path`` of test and predict.

    Args:
        module: Holds the calibrated weights.
        calibrated: What was fitted to them.
        epoch: Index of the epoch that they are from, as in Lightning's checkpoints.
        step: Optimizer steps until then.
    """
    checkpoint: dict[str, Any] = {
        "epoch": epoch,
        "global_step": step,
        "pytorch-lightning_version": lightning.__version__,
        "state_dict": module.state_dict(),
        "callbacks": {STATE_KEY: to_state(calibrated)},
    }
    if hparams := _plain(dict(module.hparams)):
        checkpoint[module.CHECKPOINT_HYPER_PARAMS_KEY] = hparams
        # Private, and written as Lightning's own checkpoints do: the name of the one argument that holds all
        # hyperparameters, without which load_from_checkpoint cannot put them back.
        checkpoint[module.CHECKPOINT_HYPER_PARAMS_NAME] = getattr(module, "_hparams_name", None)
    module.on_save_checkpoint(checkpoint)
    return checkpoint


def save(trainer: Trainer, checkpoint: dict[str, Any], path: str) -> None:
    """Write a checkpoint from this rank; to a URL (``s3://…``) as the Trainer writes its own."""
    if "://" in path:
        trainer.strategy.checkpoint_io.save_checkpoint(checkpoint, path)
    else:
        write_atomically(checkpoint, path)


def write_atomically(content: Any, path: str | os.PathLike[str]) -> None:
    """``torch.save`` under a temporary name in the same folder, then rename: the file is old, or new, and never half.

    Lightning's own way writes to the system's temporary folder first, and moves from there: a copy, where that is
    another disk.
    """
    path = os.path.abspath(path)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    temporary = f"{path}.tmp"
    try:
        with open(temporary, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(FileNotFoundError):
            os.remove(temporary)
        raise


def _plain(hparams: dict[str, Any]) -> dict[str, Any]:
    """Those hyperparameters that ``weights_only=True`` loads; the others are named in a warning."""
    left_out = [name for name, value in hparams.items() if not _loads_safely(value)]
    if left_out:
        rank_zero_warn(
            f"The hyperparameters {', '.join(left_out)} are objects that a safe load refuses, so they are not in the "
            "calibrated checkpoint: pass them to CalibrationModule.from_checkpoint."
        )
    return {name: value for name, value in hparams.items() if name not in left_out}


def _loads_safely(value: Any) -> bool:
    buffer = io.BytesIO()
    try:
        torch.save(value, buffer)
        buffer.seek(0)
        torch.load(buffer, weights_only=True)
    except (pickle.PickleError, AttributeError, TypeError):
        return False
    return True


def read_calibrated(path: str | os.PathLike[str]) -> Calibrated:
    """Read the clamp, to the CPU, from a calibrated checkpoint or any that Lightning saved after calibration.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged, holds objects a safe load refuses, or holds no clamp.
    """
    checkpoint = read_safely(path)
    states = checkpoint.get("callbacks", {}) if isinstance(checkpoint, dict) else {}
    if STATE_KEY not in states:
        raise ValueError(
            f"{os.fspath(path)!r} holds no clamp: pass the file whose name ends in -calibrated.ckpt, "
            "or calibrate this one first."
        )
    return from_state(states[STATE_KEY])


def read_safely(path: str | os.PathLike[str]) -> Any:
    """``torch.load`` to the CPU, of tensors and plain values only; errors as in :func:`read_calibrated`."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, EOFError, RuntimeError, OSError) as error:
        # Torch seeks to before the start of a truncated file. What else the system objects to, it says itself.
        if isinstance(error, OSError) and error.errno != errno.EINVAL:
            raise
        raise ValueError(
            f"{os.fspath(path)!r} is damaged, or no checkpoint that can be loaded safely: "
            f"{str(error).splitlines()[0] if str(error) else type(error).__name__}"
        ) from error
