"""Whether a network gives the same logits for the same inputs in every call, whatever else is in the batch."""

import torch
from torch import Tensor

from lightning_clamp._batch import map_tensors, n_items
from lightning_clamp._rows import MASKED
from lightning_clamp.clamping.passes import CalibrationSet

# Of the largest logit: rounding is less, in half precision too, and dropout is more.
_MOST = 0.05


def warn_if_unsteady(data: CalibrationSet) -> None:
    """Call the network on the first batch, and again on half of it twice, and warn if that makes a difference.

    All ranks take part, and one of them warns. Freezing the network is the caller's business.
    """
    difference = 0.0
    with data.ranks.raise_together():
        if (first := next(data.read("first look"), None)) is not None:
            # Of the same size, which a network may count on.
            again = torch.arange(n_items(first[0]), device=data.device) % max(1, n_items(first[0]) // 2)
            with torch.no_grad():
                before = data.bare_logits(first[0])[again].float()
                after = data.bare_logits(map_tensors(first[0], lambda value: value[again])).float()
            difference = _difference(before, after)
    if (worst := max(data.ranks.gather(difference))) > _MOST:
        data.ranks.warn(
            f"The network returns other logits for the same inputs when they come in another batch, by {worst:.0%} of "
            "the largest: dropout or noise that stays on in eval mode, or a batch's own statistics in place of running "
            "ones? What is calibrated is then another network in every call.",
            stacklevel=2,
        )


def _difference(first: Tensor, second: Tensor) -> float:
    """The largest difference, as a fraction of the largest logit; 0 where there is nothing to compare."""
    usable = torch.isfinite(first) & torch.isfinite(second) & (first > MASKED) & (second > MASKED)
    first, second = first[usable], second[usable]
    scale = float(first.abs().max()) if first.numel() else 0.0
    return float((first - second).abs().max()) / scale if scale > 0 else 0.0
