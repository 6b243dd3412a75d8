"""A calibrated network out of its file: built by its class, and held to the weights that were calibrated."""

import os
from textwrap import shorten
from typing import IO, Any

import torch
from lightning.pytorch import LightningModule

from lightning_clamp._digest import fingerprint
from lightning_clamp._files import load_safely, opened
from lightning_clamp.checkpoint import VERSION_KEY, check_seal, result_in
from lightning_clamp.clamping.result import CalibrationResult


def load_calibrated(
    path: str | os.PathLike[str], network_class: type[LightningModule], map_location: Any, arguments: dict[str, Any]
) -> tuple[LightningModule, CalibrationResult]:
    """The network of a calibrated checkpoint and what was fitted to it; see :meth:`.CalibrationModule.from_checkpoint`.

    Raises:
        OSError: If there is no such file, or it may not be read.
        ValueError: As in :func:`read_result`, or if the network does not come out with the weights of the calibration.
        TypeError: If ``network_class`` needs arguments that are neither saved nor given.
    """
    # Both from one open file: who replaces it meanwhile cannot make them the halves of two.
    with opened(path) as file:
        checkpoint = load_safely(file, path)
        check_seal(checkpoint, path)
        result = result_in(checkpoint, path)
        if missing := {"state_dict", VERSION_KEY} - set(checkpoint):
            raise ValueError(f"{os.fspath(path)!r} is no checkpoint of Lightning: it has no {', '.join(missing)}.")
        file.seek(0)
        network = _built(network_class, file, path, map_location, arguments)
    if fingerprint(network, checkpoint["state_dict"]) != result.fingerprint:
        raise ValueError(
            f"{network_class.__name__} with the weights in {os.fspath(path)!r} is not the network that was calibrated: "
            "the file was edited, or saved after more training; or what it does not hold, such as a frozen backbone, "
            "is another one."
        )
    return network, result


def _built(
    network_class: type[LightningModule],
    file: IO[bytes],
    path: str | os.PathLike[str],
    map_location: Any,
    arguments: dict[str, Any],
) -> LightningModule:
    name = network_class.__name__
    try:
        return network_class.load_from_checkpoint(
            file, map_location=_where_it_was if map_location is None else map_location, weights_only=True, **arguments
        )
    except TypeError as error:
        raise TypeError(
            f"{name} could not be built from {os.fspath(path)!r} ({error}): pass its arguments "
            "to from_checkpoint, or call self.save_hyperparameters() in its __init__ before training."
        ) from error
    except RuntimeError as error:
        # What torch says of weights that do not fit, or belong on a device that is not there; memory, for one, runs
        # out in other words.
        if not str(error).startswith(("Error(s) in loading state_dict", "don't know how to restore", "Attempting to")):
            raise
        raise ValueError(f"{os.fspath(path)!r} cannot be loaded into {name}: {shorten(str(error), 300)}") from error


def _where_it_was(storage: torch.UntypedStorage, location: object) -> torch.UntypedStorage | None:
    """For ``torch.load``: leave the tensors on the device that they were saved from, if it is here; else on the CPU."""
    kind = str(location).partition(":")[0]
    if kind == "cpu" or not torch.accelerator.is_available():
        return storage
    here = torch.accelerator.current_accelerator()
    return None if here is not None and here.type == kind else storage
