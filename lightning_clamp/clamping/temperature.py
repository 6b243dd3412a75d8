"""The temperature, fitted on given logits."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_clamp._rows import MASKED, Rows, log_softmax
from lightning_clamp.clamping.passes import RowSource, summed

# Bounds on log T, counted from the logits' spread. An optimum at the cold end is none; at the hot end all classes are
# equally likely, which is the best that can be said where the outputs know nothing of the labels.
_COLDEST, _HOTTEST = -15.0, 10.0
NO_TEMPERATURE = (
    "no temperature minimises the NLL of this calibration set (every sample is right, or all outputs are the same); "
    "check the labels, or take more data"
)
_MAX_STEPS = 100
_TOLERANCE = 1e-9
_FLAT = 1e-9
# Nats by which a parameter has to lower the summed loss to be better than none; twice that is the summed curvature in
# log T of logits that say next to nothing.
_NOTHING = 2.0


class TemperatureFit(NamedTuple):
    """The best temperature for given logits.

    Attributes:
        log_temperature: Its logarithm.
        nll: Mean negative log-likelihood per row at it, in nats.
        determined: False if the colder the better (every sample is right), or all are as good as one (constant logits).
        spread: Mean standard deviation of a row's logits.
        informed: False if the logits say next to nothing of the labels; the temperature is then the hottest.
    """

    log_temperature: float
    nll: float
    determined: bool
    spread: float
    informed: bool = True


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
    spread, nll = _spread(rows)
    if spread == 0:
        return TemperatureFit(0.0, nll, determined=False, spread=0.0)
    coldest, hottest = math.log(spread) + _COLDEST, math.log(spread) + _HOTTEST
    low, high = coldest, hottest
    here = min(max(start, low), high)
    for _ in range(_MAX_STEPS):
        nll, slope, curvature, count = _temperature_derivatives(rows, here)
        low, high = (here, high) if slope < 0 else (low, here)
        step = -slope / curvature if curvature > 0 else math.inf
        if abs(step) < _TOLERANCE or high - low < _TOLERANCE:
            break
        here = here + step if low < here + step < high else (low + high) / 2
    # A curvature that small is that of certainty, where the loss is smaller yet, or of logits that hardly count.
    if count * curvature < 2 * _NOTHING and nll > 10 * curvature:
        here, nll = hottest, _temperature_derivatives(rows, hottest)[0]
        return TemperatureFit(here, nll, determined=True, spread=spread, informed=False)
    # A loss that has gone flat (everything right with certainty) has no minimum either.
    return TemperatureFit(here, nll, determined=here > coldest + 0.01 and curvature > _FLAT, spread=spread)


def _spread(rows: RowSource) -> tuple[float, float]:
    """Mean standard deviation of a row's logits, and the mean loss per row if they said nothing."""

    def batch_sums(batch: Rows) -> tuple[Tensor, ...]:
        present = batch.logits > MASKED
        count = present.sum(1).double()
        mean = batch.logits.where(present, 0.0).sum(1) / count
        size = torch.linalg.vector_norm((batch.logits - mean[:, None]).where(present, 0.0), dim=1)
        return (size / count.sqrt()).sum(), count.log().sum(), torch.tensor(float(len(count)))

    total, loss, n = (float(term) for term in summed((batch_sums(batch) for batch in rows), [()] * 3, rows.ranks))
    return total / n, loss / n


def _temperature_derivatives(rows: RowSource, log_temperature: float) -> tuple[float, float, float, float]:
    """Mean loss per row, its first and second derivative in log T, and the number of rows."""

    def batch_sums(batch: Rows) -> tuple[Tensor, ...]:
        log_probs = log_softmax(batch.logits * math.exp(-log_temperature))
        of_label = log_probs.gather(1, batch.target[:, None]).sum()
        # Moments of the scaled logits less one number for each row, which changes no variance.
        first = log_probs.exp().mul_(log_probs)
        mean = first.sum(1)
        slope = of_label - mean.sum()
        variance = first.mul_(log_probs).sum() - mean @ mean
        return -of_label, slope, variance - slope, torch.tensor(float(len(batch.target)))

    total = summed((batch_sums(batch) for batch in rows), [()] * 4, rows.ranks)
    nll, slope, curvature, count = (float(term) for term in total)
    return nll / count, slope / count, curvature / count, count
