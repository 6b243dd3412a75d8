"""Checkpoints that are named on the command line: what is wrong with one is said in a sentence."""

from collections.abc import Iterator
from contextlib import contextmanager
from textwrap import shorten
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule

from lightning_clamp.checkpoint import read_checkpoint


def load_weights(model: LightningModule, path: str) -> None:
    """Put the weights of a checkpoint into a model, loading nothing but tensors and plain values.

    Raises:
        MisconfigurationException: If the file cannot be read, or is no checkpoint of such a model.
    """
    checkpoint = checkpoint_in(path)
    model.configure_model()
    model.on_load_checkpoint(checkpoint)
    try:
        model.load_state_dict(checkpoint["state_dict"], strict=model.strict_loading)
    except RuntimeError as error:
        raise MisconfigurationException(
            f"{path!r} is no checkpoint of this {type(model).__name__}: {shorten(str(error), 300)}"
        ) from error


def checkpoint_in(path: str) -> dict[str, Any]:
    """What a checkpoint of Lightning holds; errors as in :func:`load_weights`."""
    with refusals(path):
        checkpoint = read_checkpoint(path)
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise MisconfigurationException(f"{path!r} is no checkpoint of Lightning: it has no state_dict.")
    return checkpoint


@contextmanager
def refusals(path: str) -> Iterator[None]:
    """Turn what is wrong with a file into a sentence."""
    try:
        yield
    except OSError as error:
        raise MisconfigurationException(f"{path!r} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise MisconfigurationException(str(error)) from error
