r"""Beta calibration, the output map of two classes: evidence for the one and for the other has a slope each.

With p the probability of class 1 at the temperature alone, the log-odds become :math:`a \log p - b \log(1 - p) + c`.
Since :math:`\log p - \log(1 - p)` are the log-odds themselves, only half the difference of a and b is new, the *skew*
:math:`w = (a - b) / 2`, which is a factor of :math:`h = \log p + \log(1 - p)`.

Reference:
    Kull, Silva Filho and Flach, "Beta calibration: a well-founded and easily implemented improvement on logistic
    calibration for binary classifiers", AISTATS 2017.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_clamp._rows import MASKED, Rows, log_softmax
from lightning_clamp.clamping.moments import LogitMoments
from lightning_clamp.clamping.output_map import MapSpace
from lightning_clamp.clamping.passes import RowSource, summed


@dataclass(frozen=True)
class BetaSpace(MapSpace):
    r"""The free parameters of a beta map, and what shrinks them.

    .. math:: s z + D (z - c) + b \mp \tfrac{w}{2} (h - m)

    with m the mean of h. The ridge is that of two scales of the log-probabilities, which are -w and w beside the common
    one: :math:`\tfrac{\lambda}{2} (2 v w^2 + \sum_k b_k^2)` with v the mean square of the log-probabilities about their
    means. D stays 0 in a fit; it is what the average with maps of other kinds has.

    Attributes:
        weight: What the ridge charges each free parameter, ``(6,)``: D, w, b, and s, which is free (0).
        temperature: That of p: the temperature alone, beside a uniform share where that pays.
        middle: m.
    """

    temperature: float = 1.0
    middle: float = 0.0

    def skewness(self, logits: Tensor) -> Tensor:
        """Of rows ``(M, 2)`` h - m, ``(M,)``; 0 where a class is masked, of which nothing is to be changed."""
        # From the log-odds: a softmax of two columns is slow.
        size = (logits[:, 1] - logits[:, 0]).abs_().div_(self.temperature)
        away = (-size).exp_().log1p_().mul_(-2).sub_(size).sub_(self.middle)
        return away.where((logits > MASKED).all(1), 0.0) if self.masked else away

    def is_usable(self, free: Tensor) -> bool:
        """Whether more evidence never counts less: neither slope is negative."""
        return abs(float(free[2])) <= self.temperature * float(free[-1])

    def deviations(self, free: Tensor) -> tuple[Tensor, Tensor]:
        """D, ``(2,)``, and b, ``(2,)``."""
        free = self._of_seen(free)
        return free[:2], free[3:5]

    def skew(self, free: Tensor) -> Tensor:
        """w, a scalar."""
        return self._of_seen(free)[2]

    def offset(self, free: Tensor) -> Tensor:
        """What is added to every row, ``(2,)``."""
        return super().offset(free) - self.middle * self.skew(free) * _halves(free)

    def apply(self, logits: Tensor, free: Tensor, label: Tensor | None = None) -> Tensor:
        """The mapped logits of rows ``(M, 2)``."""
        free = free.to(logits)
        own, bias = self.deviations(free)
        mapped = torch.addcmul(bias - own * self.centre.to(logits), logits, own + free[-1])
        mapped.addcmul_(self.skewness(logits)[:, None], self.skew(free) * _halves(logits))
        return mapped.where(logits > MASKED, logits) if self.masked else mapped

    def pull(self, logits: Tensor, slopes: Tensor, label: Tensor | None = None) -> Tensor:
        """Derivatives in the free parameters, ``(q,)``, from those in the mapped logits, ``(M, 2)``, over all rows."""
        none, skew = slopes.new_zeros(2), (slopes @ _halves(slopes)) @ self.skewness(logits)
        return self._of_seen(torch.cat([none, skew[None], slopes.sum(0), (slopes * logits).sum()[None]]))

    def curvature(
        self, logits: Tensor, probs: Tensor, weight: Tensor | None = None, label: Tensor | None = None
    ) -> Tensor:
        """Curvature of the summed loss of rows ``(M, 2)``, ``(q, q)``, each counted ``weight`` ``(M, 1)`` times."""
        columns = self._columns(logits, (2 * _halves(logits)).expand_as(logits))
        variance = probs[:, :1] * probs[:, 1:]
        total = columns.T @ (columns * (variance if weight is None else variance * weight))
        return self._of_seen(self._of_seen(total).T)

    def _columns(self, logits: Tensor, slopes: Tensor) -> Tensor:
        """Each row's derivatives in the free parameters, ``(M, q)``."""
        skew = (slopes @ _halves(slopes)) * self.skewness(logits)
        common = (slopes * logits).sum(1, keepdim=True)
        return torch.cat([torch.zeros_like(slopes), skew[:, None], slopes, common], 1)

    def _of_seen(self, values: Tensor) -> Tensor:
        """Along the last axis, ``(..., q)``: where a single class is seen, it has nothing of its own."""
        if self.seen is None:
            return values
        return torch.cat([torch.zeros_like(values[..., :-1]), values[..., -1:]], -1)


def _halves(like: Tensor) -> Tensor:
    """Of what is added to the log-odds, the classes' logits get one half each; made on the device, not sent there."""
    return torch.linspace(-0.5, 0.5, 2, dtype=like.dtype, device=like.device)


def _log_probs(logits: Tensor, temperature: float) -> Tensor:
    """Log-probabilities of rows ``(M, 2)`` at a temperature."""
    return log_softmax(logits / temperature)


def beta_space(rows: RowSource, moments: LogitMoments, temperature: float, repeats: float = 1.0) -> BetaSpace:
    """The space of beta maps for given logits of two classes.

    Args:
        rows: Rows of logits.
        moments: Of the same.
        temperature: See :class:`BetaSpace`.
        repeats: How many rows say what one independent row would (the design effect of correlated pixels): the ridge
            is as many times stronger.
    """

    def sums(batch: Rows) -> tuple[Tensor, ...]:
        present = (batch.logits > MASKED).all(1, keepdim=True)
        values = _log_probs(batch.logits, temperature).where(present, 0.0)
        return present.sum(), values.sum(0), (values**2).sum(0)

    count, total, squares = summed((sums(batch) for batch in rows), [(), (2,), (2,)], rows.ranks)
    mean = total / count.clamp_min(1)
    square = max(float((squares / count.clamp_min(1) - mean**2).mean()), torch.finfo(torch.float64).tiny)
    own, skew, bias = torch.ones(2).double(), torch.tensor([2 * square]).double(), torch.ones(2).double()
    weight = torch.cat([repeats * torch.cat([own, skew, bias]), torch.zeros(1).double()])
    seen = None if bool(moments.seen.all()) else moments.seen
    return BetaSpace(
        "beta",
        2,
        moments.centre,
        weight,
        seen,
        moments.masked,
        temperature=temperature,
        middle=float(mean.sum()),
    )
