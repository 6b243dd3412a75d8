"""The temperature, fitted on given logits."""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_clamp._rows import Rows
from lightning_clamp.clamping.passes import RowSource, summed

# Temperatures between 4.5e-5 and 2.2e4; an optimum at the edge means that no finite temperature is best.
LOG_TEMPERATURE_BOUND = 10.0
NO_TEMPERATURE = (
    "no finite temperature minimises the NLL of this calibration set (every sample right, or outputs that say nothing "
    "of the labels); check the labels, or take more data"
)
_MAX_STEPS = 100
_TOLERANCE = 1e-9
_FLAT = 1e-9


class TemperatureFit(NamedTuple):
    """The best temperature for given logits.

    Attributes:
        log_temperature: Its logarithm.
        nll: Mean negative log-likelihood per row at it, in nats.
        interior: False if the optimum is not inside the bounds: the labels do not determine a temperature.
    """

    log_temperature: float
    nll: float
    interior: bool


def fit_temperature(rows: RowSource, start: float = 0.0) -> TemperatureFit:
    r"""Minimise the mean cross-entropy of ``logits / T`` by safeguarded Newton steps in log T.

    The loss is convex in 1/T, so it has one minimum in log T, and the sign of its slope brackets it; a Newton step that
    leaves the bracket is replaced by a bisection. Every evaluation is one pass over the rows.

    Args:
        rows: Rows of logits, re-iterable.
        start: log T to start from.

    Reference:
        Guo et al., "On Calibration of Modern Neural Networks", ICML 2017, section 4.2.
    """
    low, high = -LOG_TEMPERATURE_BOUND, LOG_TEMPERATURE_BOUND
    here = min(max(start, low), high)
    for _ in range(_MAX_STEPS):
        nll, slope, curvature = _temperature_derivatives(rows, here)
        low, high = (here, high) if slope < 0 else (low, here)
        step = -slope / curvature if curvature > 0 else math.inf
        if abs(step) < _TOLERANCE or high - low < _TOLERANCE:
            break
        here = here + step if low < here + step < high else (low + high) / 2
    # A loss that has gone flat (everything right with certainty) has no minimum either.
    interior = abs(here) < LOG_TEMPERATURE_BOUND - 0.01 and curvature > _FLAT
    return TemperatureFit(here, nll, interior)


def _temperature_derivatives(rows: RowSource, log_temperature: float) -> tuple[float, float, float]:
    """Mean loss per row, and its first and second derivative in log T."""

    def batch_sums(batch: Rows) -> tuple[Tensor, ...]:
        scaled = batch.logits * math.exp(-log_temperature)
        log_probs = scaled.log_softmax(1)
        probs = log_probs.exp()
        mean = (probs * scaled).sum(1, keepdim=True)
        slope = (scaled.gather(1, batch.target[:, None]) - mean).sum()
        variance = (probs * (scaled - mean) ** 2).sum()
        nll = F.nll_loss(log_probs, batch.target, reduction="sum")
        return nll, slope, variance - slope, torch.tensor(float(len(batch.target)))

    total = summed((batch_sums(batch) for batch in rows), [()] * 4, rows.ranks)
    nll, slope, curvature, count = (float(term) for term in total)
    return nll / count, slope / count, curvature / count
