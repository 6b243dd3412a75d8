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
from typing import Any, TypeAlias

import lightning
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lightning_clamp.clamping.result import CalibrationResult

FORMAT = 3
# Key of the callback's state in every checkpoint, this one and Lightning's own.
STATE_KEY = "NeuralClamping"
_MARK, _SUFFIX = "-calibrated", ".ckpt"


# Where to save: True beside the checkpoints that are there, False nowhere; or a folder, or a file that ends in .ckpt.
# Command lines try the types in this order.
SaveTo: TypeAlias = bool | str | os.PathLike[str]


def check_save_to(save_to: object) -> None:
    """Refuse what is neither a path nor a bool."""
    if not isinstance(save_to, str | os.PathLike | bool):
        raise ValueError(f"`save_to` must be a folder, a file that ends in .ckpt, True or False, got {save_to!r}.")


def calibrated_path(save_to: SaveTo, folder: str | os.PathLike[str] | None, stem: str) -> str | None:
    """Path of the calibrated checkpoint: ``…-calibrated.ckpt``, unless a file was named; None for nowhere.

    Args:
        save_to: What the user asked for.
        folder: Where the checkpoints are that True means, None where there are none.
        stem: What the name begins with.
    """
    if save_to is False or (save_to is True and folder is None):
        return None
    place = os.fspath(folder or "") if save_to is True else os.fspath(save_to)
    if save_to is not True and place.endswith(_SUFFIX):
        return place
    return os.path.join(place, f"{stem.removesuffix(_MARK)}{_MARK}{_SUFFIX}")


def fingerprint(network: nn.Module) -> str:
    """Digest of names, dtypes, shapes and values of a module's state: equal weights, equal fingerprint."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in network.state_dict().items():
        if isinstance(tensor, Tensor):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def state_of_result(result: CalibrationResult) -> dict[str, Any]:
    """A plain dict that ``weights_only=True`` loads."""
    return {"format": FORMAT, **result.to_state()}


def result_from_state(state: Mapping[str, Any]) -> CalibrationResult:
    """The inverse of :func:`state_of_result`."""
    if state.get("format") != FORMAT:
        raise ValueError(
            f"The saved clamp has format {state.get('format')!r}, and this version reads format {FORMAT}: "
            "use the version of lightning_clamp that wrote it."
        )
    return CalibrationResult.from_state({name: value for name, value in state.items() if name != "format"})


def calibrated_checkpoint(module: LightningModule, result: CalibrationResult, epoch: int, step: int) -> dict[str, Any]:
    """A checkpoint for ``load_from_checkpoint``, :func:`read_result`, and ``ckpt_path`` of test and predict.

    Args:
        module: Holds the calibrated weights.
        result: What was fitted to them.
        epoch: Index of the epoch that they are from, as in Lightning's checkpoints.
        step: Optimizer steps until then.
    """
    checkpoint: dict[str, Any] = {
        "epoch": epoch,
        "global_step": step,
        "pytorch-lightning_version": lightning.__version__,
        "state_dict": module.state_dict(),
        "callbacks": {STATE_KEY: state_of_result(result)},
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


def read_result(path: str | os.PathLike[str]) -> CalibrationResult:
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
    return result_from_state(states[STATE_KEY])


def read_safely(path: str | os.PathLike[str]) -> Any:
    """``torch.load`` to the CPU, of tensors and plain values only; errors as in :func:`read_result`."""
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
