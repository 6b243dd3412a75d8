"""One sample that holds most of the loss: a wrong label, or a broken input."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_clamp._rows import Rows
from lightning_clamp.clamping.ranks import Ranks

# Nats of one row that no honest network loses: its label had a probability of e^-100.
_SUSPECT = 100.0


class Heaviest(NamedTuple):
    """The largest loss of a row, in nats, and the number of its sample."""

    loss: float = 0.0
    sample: int = 0


def heaviest_of(losses: Tensor, rows: Rows, offset: int) -> Tensor:
    """Loss and sample of the heaviest row of a batch, of which ``offset`` samples were read before, ``(2,)``."""
    if not len(losses):
        return losses.new_zeros(2)
    loss, row = losses.max(0)
    return torch.stack([loss, (rows.item.gather(0, row[None])[0] + offset).to(loss)])


def heaviest_in(batches: Sequence[Tensor]) -> Heaviest:
    """The heaviest of all batches."""
    found = [(loss, int(sample)) for loss, sample in torch.stack([*batches]).tolist()] if batches else []
    return max(Heaviest(), *(Heaviest(*one) for one in found)) if found else Heaviest()


def warn_of_one_sample(of_ranks: Sequence[Heaviest], total: float, ranks: Ranks) -> None:
    """Name the sample if it alone holds more than half of the summed loss."""
    (loss, sample), rank = max((one, rank) for rank, one in enumerate(of_ranks))
    if loss > max(_SUSPECT, total / 2):
        where = "" if len(of_ranks) == 1 else f" of rank {rank}"
        ranks.warn(
            f"Sample {sample}{where} alone holds {loss / total:.1%} of the calibration set's NLL, {loss:.4g} nats: "
            "look at its label and its input, and leave it out if they are wrong.",
            stacklevel=5,
        )
