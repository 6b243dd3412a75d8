r"""A share of the uniform distribution beside a map, :math:`(1 - ε) \mathrm{softmax} + ε / C`.

Where a few rows have a wrong label that the network is sure of, a temperature alone must be hot enough for them, and
all others pay. The share takes them on, if that is worth it: most data want none.
"""

import math
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_clamp._rows import Rows, log_softmax
from lightning_clamp.clamping.map_loss import errors
from lightning_clamp.clamping.newton import solve
from lightning_clamp.clamping.output_map import MapSpace, temperature_space
from lightning_clamp.clamping.passes import RowSource, summed
from lightning_clamp.clamping.temperature import TemperatureFit

# Where to start from: the logarithm of the common scale, against the temperature alone, and of ε / (1 - ε).
_STARTS = ((0.0, -5.0), (0.2, -3.0))
# And where a single row makes the temperature useless: against the logits' spread.
_SPREAD_START = (0.7, -5.0)
_MOST_STEPS = 30
# Nats of the summed loss that another step would have to promise.
_TOLERANCE = 0.01
_LONGEST_STEP = 1.5
_MOST_SHARE = 0.99
_BISECTIONS = 30


class ShareFit(NamedTuple):
    """A temperature and a share: logarithm of the common scale and of ε / (1 - ε), with the loss's derivatives there.

    Attributes:
        at: Both, ``(2,)``, float64.
        loss: Summed loss.
        gradient: Of the summed loss, ``(2,)``.
        information: Sum of the outer products of the rows' gradients, ``(2, 2)``.
    """

    at: Tensor
    loss: float
    gradient: Tensor
    information: Tensor

    @property
    def free(self) -> Tensor:
        """The common scale, ``(1,)``."""
        return self.at[:1].exp()

    @property
    def share(self) -> float:
        """ε."""
        return float(self.at[1].sigmoid())


def fit_temperature_and_share(rows: RowSource, fit: TemperatureFit, n_classes: int) -> ShareFit | None:
    """The best temperature and share together; None where the first bit of a share does not lower the loss.

    Args:
        rows: Rows of logits.
        fit: The temperature alone.
        n_classes: C.
    """
    if not fit.informed:
        starts = [(_SPREAD_START[0] - math.log(fit.spread), _SPREAD_START[1])]
    elif _gains_at_first(rows, math.exp(-fit.log_temperature), n_classes):
        starts = [(scale - fit.log_temperature, share) for scale, share in _STARTS]
    else:
        return None
    fits = [_minimum(rows, torch.tensor(start, dtype=torch.float64), n_classes) for start in starts]
    return min(fits, key=lambda one: one.loss)


def with_best_share(rows: RowSource, space: MapSpace, free: Tensor) -> MapSpace:
    """The space with the share that is best beside a map, which may be none; the loss is convex in it."""
    mapped = ((space.apply(batch.logits, free, batch.label), batch.target) for batch in rows)
    labels = [log_softmax(logits).gather(1, target[:, None]) for logits, target in mapped]
    odds = [(own + math.log(space.n_classes)).exp() for own in labels]  # of the softmax against the uniform

    def slope(share: float) -> float:
        parts = (((one - 1) / (share + (1 - share) * one)).sum() for one in odds)
        return float(summed(((part,) for part in parts), [()], rows.ranks)[0])

    low, high = 0.0, _MOST_SHARE
    if slope(low) >= 0:
        return replace(space, share=0.0)
    for _ in range(_BISECTIONS):
        middle = math.sqrt(max(low, 1e-7) * high)
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    return replace(space, share=high)


def _gains_at_first(rows: RowSource, scale: float, n_classes: int) -> bool:
    def batch_sums(batch: Rows) -> tuple[Tensor, ...]:
        loss = F.cross_entropy(scale * batch.logits, batch.target, reduction="none")
        return ((1 - (loss - math.log(n_classes)).exp()).sum(),)

    (slope,) = summed((batch_sums(batch) for batch in rows), [()], rows.ranks)
    return float(slope) < 0


def _minimum(rows: RowSource, start: Tensor, n_classes: int) -> ShareFit:
    """Damped Gauss-Newton steps."""
    here, damping = _evaluated(rows, start, n_classes), 1e-3
    for _ in range(_MOST_STEPS):
        largest = here.information.diagonal().max()
        step = -solve(here.information + damping * largest * torch.eye(2).double(), here.gradient)
        step = step * min(1.0, _LONGEST_STEP / max(float(step.abs().max()), 1e-300))
        if -0.5 * float(here.gradient @ step) < _TOLERANCE:
            break
        trial = _evaluated(rows, here.at + step, n_classes)
        here, damping = (trial, damping / 4) if trial.loss < here.loss else (here, damping * 8)
    return here


def _evaluated(rows: RowSource, at: Tensor, n_classes: int) -> ShareFit:
    scale, share = float(at[0].exp()), float(at[1].sigmoid())
    space = temperature_space(n_classes, share=share)

    def batch_sums(batch: Rows) -> tuple[Tensor, ...]:
        scaled = scale * batch.logits
        log_probs = log_softmax(scaled)
        loss, weight = space.loss_of_label(log_probs, batch.target)
        assert weight is not None
        in_scale = (errors(log_probs.exp(), batch, weight) * scaled).sum(1, keepdim=True)
        scores = torch.cat([in_scale, share - 1 + weight], 1)
        return loss.sum(), scores.sum(0), scores.T @ scores

    loss, gradient, information = summed((batch_sums(batch) for batch in rows), [(), (2,), (2, 2)], rows.ranks)
    return ShareFit(at, float(loss), gradient, information)
