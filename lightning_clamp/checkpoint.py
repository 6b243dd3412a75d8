"""The calibrated checkpoint: a Lightning checkpoint of the weights, with the clamp and digests of all that is in it.

It holds tensors, numbers and strings only, so that ``torch.load(weights_only=True)`` reads it.
"""

import io
import os
import pickle
import re
from collections.abc import Mapping
from typing import Any, TypeAlias

import lightning
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from lightning_clamp._digest import digest
from lightning_clamp._files import is_url, read_safely, write_atomically
from lightning_clamp.clamping.result import CalibrationResult

FORMAT = 4
# Key of the callback's state in every checkpoint, this one and Lightning's own.
STATE_KEY = "NeuralClamping"
# Key of the digests, one for each of the other keys.
SEAL_KEY = "lightning_clamp_digests"
VERSION_KEY = "pytorch-lightning_version"
_MARK, _SUFFIX = "-calibrated", ".ckpt"
_OTHER_SUFFIXES = (".pt", ".pth", ".pkl", ".bin", ".safetensors", ".onnx")


# Where to save: True beside the checkpoints that are there, False nowhere; or a folder, or a file that ends in .ckpt.
# Command lines try the types in this order.
SaveTo: TypeAlias = bool | str | os.PathLike[str]


def check_save_to(save_to: object) -> None:
    """Refuse what is neither a path nor a bool, and files of other kinds, which would be taken for folders."""
    other_file = isinstance(save_to, str | os.PathLike) and os.fspath(save_to).endswith(_OTHER_SUFFIXES)
    if other_file or not isinstance(save_to, str | os.PathLike | bool):
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
    # As a ModelCheckpoint reads its folder.
    place = os.fspath(folder or "") if save_to is True else os.path.expanduser(os.fspath(save_to))
    if save_to is not True and place.endswith(_SUFFIX):
        return place
    # What is calibrated once more has the mark already, perhaps before the number that Lightning gives to a copy.
    plain = re.sub(rf"({_MARK})+(?=(-v\d+)?$)", "", stem)
    return os.path.join(place, f"{plain}{_MARK}{_SUFFIX}")


def check_resumable(checkpoint: Mapping[str, Any], path: object) -> None:
    """Refuse to go on with a training of which a checkpoint has the model alone.

    Raises:
        MisconfigurationException: If it has no state of an optimizer.
    """
    if "optimizer_states" not in checkpoint:
        raise MisconfigurationException(
            f"{str(path)!r} is a model without its training, such as a calibrated one: a fit is resumed from a "
            "checkpoint that ModelCheckpoint saved."
        )


def state_of_result(result: CalibrationResult) -> dict[str, Any]:
    """A plain dict that ``weights_only=True`` loads, with a digest of all of it."""
    state = {"format": FORMAT, **result.to_state()}
    return {**state, "digest": digest(state)}


def result_from_state(state: Any) -> CalibrationResult:
    """The inverse of :func:`state_of_result`.

    Raises:
        ValueError: If it is of another format, or is not what was saved.
    """
    held = dict(state) if isinstance(state, Mapping) else {}
    if held.get("format") != FORMAT:
        raise ValueError(
            f"The saved clamp has format {held.get('format')!r}, and this version reads format {FORMAT}: "
            "use the version of lightning_clamp that wrote it."
        )
    if held.pop("digest", None) != digest(held):
        raise ValueError("The saved clamp is not as it was saved: take another copy of the file, or calibrate again.")
    return CalibrationResult.from_state({name: value for name, value in held.items() if name != "format"})


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
        VERSION_KEY: lightning.__version__,
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
    """Seal a checkpoint and write it from this rank; to a URL (``s3://…``) as the Trainer writes its own."""
    if is_url(path):
        trainer.strategy.checkpoint_io.save_checkpoint(sealed(checkpoint), path)
    else:
        write_atomically(sealed(checkpoint), path)


def sealed(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """The checkpoint with digests of what is in it."""
    # With the key: a file has each string once, so that a damaged one is wrong in both places.
    return {**checkpoint, SEAL_KEY: {key: digest([key, value]) for key, value in checkpoint.items()}}


def check_seal(checkpoint: Any, path: str | os.PathLike[str], *, migrated: bool = False) -> None:
    """Refuse a checkpoint of :func:`sealed` that is not what it was; others have nothing to be held to.

    Args:
        checkpoint: What was read.
        path: Where from, for the error.
        migrated: Whether Lightning has read it, which rewrites its version.

    Raises:
        ValueError: If a part was changed or is missing.
    """
    seal = checkpoint.get(SEAL_KEY, {}) if isinstance(checkpoint, dict) else {}
    if not isinstance(seal, dict):
        seal = {SEAL_KEY: "damaged"}
    held = set(seal) - {VERSION_KEY} if migrated else set(seal)
    changed = [key for key in held if key not in checkpoint or digest([key, checkpoint[key]]) != seal[key]]
    if changed:
        raise ValueError(
            f"{os.fspath(path)!r} is not as it was saved ({', '.join(sorted(map(str, changed)))}): it is damaged, or "
            "was edited; take another copy, or calibrate again."
        )


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


def read_checkpoint(path: str | os.PathLike[str]) -> Any:
    """What a file holds, to the CPU, as it was saved.

    Raises:
        OSError: If there is no such file, or it may not be read.
        ValueError: If it is a folder, is damaged, was edited, or holds objects a safe load refuses.
    """
    checkpoint = read_safely(path)
    check_seal(checkpoint, path)
    return checkpoint


def read_result(path: str | os.PathLike[str]) -> CalibrationResult:
    """Read the clamp, to the CPU, from a calibrated checkpoint or any that Lightning saved after calibration.

    Raises:
        OSError: If there is no such file, or it may not be read.
        ValueError: As in :func:`read_checkpoint`, or if it holds no clamp.
    """
    return result_in(read_checkpoint(path), path)


def result_in(checkpoint: Any, path: str | os.PathLike[str]) -> CalibrationResult:
    """The result that a checkpoint holds; errors as in :func:`read_result`."""
    states = checkpoint.get("callbacks") if isinstance(checkpoint, dict) else None
    if not isinstance(states, dict) or STATE_KEY not in states:
        raise ValueError(
            f"{os.fspath(path)!r} holds no clamp: pass the file whose name ends in -calibrated.ckpt, "
            "or calibrate this one first."
        )
    return result_from_state(states[STATE_KEY])
