"""Whether a network can be differentiated in its input, as a perturbation needs: asked of a few items."""

from textwrap import shorten

import torch

from lightning_clamp._batch import chunks
from lightning_clamp.clamping.passes import CalibrationSet

# Enough for whoever takes statistics over a batch.
_ITEMS = 2


def gradient_problem(data: CalibrationSet) -> str | None:
    """Why the network cannot be differentiated in what a perturbation is added to; None if it can.

    The first items of every rank that a pass has seen are tried, and all ranks get the same answer.
    """
    problem = None
    with data.ranks.raise_together():
        problem = _problem(data)
    found = next(filter(None, data.ranks.gather(problem)), None)
    return None if found is None else f"the network cannot be differentiated in its input ({found})"


def _problem(data: CalibrationSet) -> str | None:
    if data.first is None:
        return None
    inputs = chunks(data.first[0], _ITEMS)[0]
    try:
        logits, moved = data.tracked(inputs, None)
        if not logits.requires_grad:
            return "a forward under `no_grad`, `detach` or rounding?"
        torch.autograd.grad(logits.sum(), moved)
    except (torch.OutOfMemoryError, MemoryError):
        # Smaller batches would do.
        raise
    except Exception as error:  # noqa: BLE001 - whatever it is, the outputs can be calibrated without
        return f"{type(error).__name__}: {shorten(str(error), 160)}"
    return None
