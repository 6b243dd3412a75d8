"""The output side beyond the temperature: a scale and a bias per class, shrunk towards the temperature alone."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_clamp._rows import Rows
from lightning_clamp.clamping.newton import LossDerivatives, effective_parameters, newton_step
from lightning_clamp.clamping.passes import RowSource, summed
from lightning_clamp.clamping.temperature import TemperatureFit, fit_temperature

OutputMap: TypeAlias = Literal["temperature", "bias", "vector"]
OUTPUT_MAPS: tuple[OutputMap, ...] = ("temperature", "bias", "vector")

# Strengths of the shrinkage, strongest first: the prior of a class's bias has standard deviations from .03 to 3.
SHRINKAGES = (1000.0, 300.0, 100.0, 30.0, 10.0, 3.0, 1.0, 0.3, 0.1)

_MAX_STEPS = 100
_TOLERANCE = 1e-9


@dataclass(frozen=True)
class MapSpace:
    r"""The free parameters of an output map ``scale * logits + bias``, and what shrinks them.

    Scale and bias of a class are those of the temperature plus deviations with mean zero over the classes. A ridge of
    strength λ on these, :math:`\tfrac{\lambda}{2}(s^2 \sum_k (a_k - \bar a)^2 + \sum_k b_k^2)` with s² the mean square
    of the logits about their row's mean, charges a deviation by what it does to the logits. The loss stays convex. The
    scales multiply the logits as the network returns them: log-probabilities, or another number added to all logits of
    a row, are the same softmax and not quite the same map.

    Attributes:
        kind: ``"temperature"``, ``"bias"`` or ``"vector"``.
        weight: What the ridge charges each free parameter, ``(q,)``; the common scale 1/T is the last, and free.
    """

    kind: OutputMap
    n_classes: int
    weight: Tensor

    @property
    def n_parameters(self) -> int:
        """Free parameters: 1, C or 2C - 1 (a common bias changes nothing)."""
        return len(self.weight)

    def temperature_only(self, temperature: float) -> Tensor:
        """The free parameters of a temperature alone."""
        free = torch.zeros_like(self.weight)
        free[-1] = 1 / temperature
        return free

    def point(self, free: Tensor) -> Tensor:
        """Scale and bias of every class, ``(2C,)``, that these free parameters are."""
        reflected = free.new_zeros(2 * self.n_classes).index_put((self._index,), free * self._length)
        return _reflected(reflected)

    def reduced(self, derivatives: Tensor) -> Tensor:
        """Derivatives in the free parameters, ``(..., q)``, from those in scale and bias, ``(..., 2C)``."""
        return _reflected(derivatives)[..., self._index.to(derivatives.device)] * self._length.to(derivatives)

    def reduced_twice(self, curvature: Tensor) -> Tensor:
        """Second derivatives in the free parameters, ``(q, q)``, from those in scale and bias, ``(2C, 2C)``."""
        return self.reduced(self.reduced(curvature).T)

    @property
    def _index(self) -> Tensor:
        """Which coordinates after the reflection are free: deviations of scale and bias, and the common scale."""
        scale, bias = torch.arange(2 * self.n_classes).chunk(2)
        parts = {"temperature": [], "bias": [bias[1:]], "vector": [scale[1:], bias[1:]]}[self.kind]
        return torch.cat([*parts, scale[:1]])

    @property
    def _length(self) -> Tensor:
        length = torch.ones_like(self.weight)
        length[-1] = self.n_classes**0.5
        return length


def map_space(kind: OutputMap, n_classes: int, logit_square: float, repeats: float = 1.0) -> MapSpace:
    """The space of one kind of output map.

    Args:
        kind: Which.
        n_classes: C.
        logit_square: s², see :func:`logit_square`.
        repeats: How many rows say what one independent row would (the design effect of correlated pixels): the ridge
            is as many times stronger, so that it shrinks as it would that one.
    """
    charged = {"temperature": [], "bias": [repeats], "vector": [repeats * logit_square, repeats]}[kind]
    weight = [charge for charge in charged for _ in range(n_classes - 1)]
    return MapSpace(kind, n_classes, torch.tensor([*weight, 0.0], dtype=torch.float64))


def _reflected(values: Tensor) -> Tensor:
    """Householder's reflection of scale and bias, ``(..., 2C)``, that takes their mean to the first coordinate of each.

    The others are then coordinates of the deviations in an orthonormal basis, at the cost of O(C) in place of a
    product with it.
    """
    halves = values.reshape(*values.shape[:-1], 2, -1)
    n_classes = halves.shape[-1]
    normal = halves.new_full((n_classes,), -(n_classes**-0.5))
    normal[0] += 1
    normal = normal / normal.norm()
    reflected: Tensor = halves - 2 * (halves @ normal)[..., None] * normal
    return reflected.flatten(-2)


@dataclass(frozen=True)
class MapFit:
    """The best output map of one kind and shrinkage for given logits.

    Attributes:
        space: Its free parameters.
        shrinkage: λ.
        free: Their values, ``(q,)``, float64.
        nll: Mean negative log-likelihood per row, in nats, without the ridge.
        sums: Score sums there, without the ridge.
    """

    space: MapSpace
    shrinkage: float
    free: Tensor
    nll: float
    sums: LossDerivatives

    @property
    def point(self) -> Tensor:
        """Scale and bias of every class, ``(2C,)``."""
        return self.space.point(self.free)

    @property
    def ridge(self) -> Tensor:
        """What the shrinkage adds to the curvature's diagonal, ``(q,)``."""
        return self.shrinkage * self.space.weight

    @cached_property
    def effective_parameters(self) -> float:
        """What the parameters cost under the shrinkage, the temperature included."""
        return effective_parameters(self.sums, self.ridge)

    @property
    def is_usable(self) -> bool:
        """Whether everything is finite and every class has a positive scale."""
        return bool(torch.isfinite(self.free).all()) and float(self.point.chunk(2)[0].min()) > 0


def fit_output_map(rows: RowSource, space: MapSpace, shrinkage: float, start: Tensor, *, dense: bool) -> MapFit | None:
    """Minimise the cross-entropy of ``scale * logits + bias`` and the ridge, by Newton steps.

    The objective is convex; steps are halved until it falls. Every evaluation is a pass over the rows.

    Args:
        rows: Rows of logits, re-iterable.
        space: The free parameters.
        shrinkage: λ, at least 0.
        start: The free parameters to start from.
        dense: Whether the rows of an item are correlated, see :func:`map_derivatives`.

    Returns:
        The minimum, or None where there is none with a finite temperature and positive scales.

    Reference:
        Guo et al., ICML 2017, section 4.2 (vector scaling); the ridge is that of Hoerl and Kennard, 1970.
    """
    if space.kind == "temperature":
        return _fit_temperature_map(rows, space, start, dense=dense)
    ridge = shrinkage * space.weight

    def derivatives(free: Tensor) -> tuple[float, float, LossDerivatives]:
        nll, n_rows, sums = map_derivatives(rows, space, free, dense=dense)
        return nll + 0.5 * float(ridge @ free**2) / n_rows, nll, sums

    free = start
    objective, nll, sums = derivatives(free)
    for _ in range(_MAX_STEPS):
        step, gain = newton_step(sums.shrunk(free, ridge))
        if abs(gain) < _TOLERANCE:
            fit = MapFit(space, shrinkage, free, nll, sums)
            return fit if fit.is_usable else None
        trial = derivatives(free + step)
        while not trial[0] <= objective and float(step.abs().max()) > 1e-12:
            step = step / 2
            trial = derivatives(free + step)
        free = free + step
        objective, nll, sums = trial
    return None


def _fit_temperature_map(rows: RowSource, space: MapSpace, start: Tensor, *, dense: bool) -> MapFit | None:
    """The temperature by its own solver, which needs no matrices of the classes' size."""
    fit = fit_temperature(rows, -math.log(float(start[-1])) if float(start[-1]) > 0 else 0.0)
    return temperature_fit(rows, space, fit, dense=dense) if fit.interior else None


def temperature_fit(rows: RowSource, space: MapSpace, fit: TemperatureFit, *, dense: bool) -> MapFit:
    """A temperature that was fitted to rows, as an output map."""
    scale = math.exp(-fit.log_temperature)

    def batch_sums(batch: Rows) -> tuple[Tensor, ...]:
        probs = (scale * batch.logits).softmax(1)
        mean = (probs * batch.logits).sum(1, keepdim=True)
        scores = batch.per_item(mean - batch.logits.gather(1, batch.target[:, None]))
        return scores.sum(0), (probs * (batch.logits - mean) ** 2).sum().reshape(1, 1), scores.T @ scores

    gradient, curvature, outer = summed((batch_sums(batch) for batch in rows), [(1,), (1, 1), (1, 1)], rows.ranks)
    sums = LossDerivatives(gradient, curvature, outer if dense else curvature)
    free = torch.tensor([scale], dtype=torch.float64)
    return MapFit(space, 0.0, free, fit.nll, sums)


def map_derivatives(
    rows: RowSource, space: MapSpace, free: Tensor, *, dense: bool
) -> tuple[float, int, LossDerivatives]:
    """Mean loss per row, the number of rows, and the score sums in the free parameters.

    The curvature is exact (that of the loss, which for these maps is also the Fisher information). It is the covariance
    too, with less noise than the outer products of the scores, unless the rows of an item are correlated (``dense``).
    """
    point = space.point(free)

    def batch_sums(batch: Rows) -> tuple[Tensor, ...]:
        log_probs = apply_map(batch.logits, point).log_softmax(1)
        probs = log_probs.exp()
        scores = map_scores(probs, batch)
        nll = F.nll_loss(log_probs, batch.target, reduction="sum")
        count = torch.tensor(float(len(batch.target)))
        terms = (nll, count, scores.sum(0), map_curvature(probs, batch.logits))
        return (*terms, scores.T @ scores) if dense else terms

    n = len(point)
    shapes = [(), (), (n,), (n, n), (n, n)][: 5 if dense else 4]
    nll, count, *sums = summed((batch_sums(batch) for batch in rows), shapes, rows.ranks)
    gradient, (curvature, *outer) = space.reduced(sums[0]), [space.reduced_twice(matrix) for matrix in sums[1:]]
    return float(nll) / float(count), int(count), LossDerivatives(gradient, curvature, outer[0] if dense else curvature)


def apply_map(logits: Tensor, point: Tensor) -> Tensor:
    """``scale * logits + bias`` for rows of logits ``(M, C)``."""
    scale, bias = point.to(logits).chunk(2)
    return scale * logits + bias


def map_scores(probs: Tensor, batch: Rows) -> Tensor:
    """Score of every item in ``(scale, bias)``, ``(n_items, 2C)``, at these probabilities of its rows."""
    error = probs.scatter_add(1, batch.target[:, None], -torch.ones_like(probs[:, :1]))
    return batch.per_item(torch.cat([error * batch.logits, error], 1))


def map_curvature(probs: Tensor, logits: Tensor) -> Tensor:
    """Curvature of the summed loss of rows in ``(scale, bias)``, ``(2C, 2C)``, at these probabilities."""
    spread = torch.cat([probs * logits, probs], 1)
    cross = (probs * logits).sum(0).diag()
    blocks = [[(probs * logits**2).sum(0).diag(), cross], [cross, probs.sum(0).diag()]]
    return torch.cat([torch.cat(row, 1) for row in blocks]) - spread.T @ spread


def standard_error(rows: RowSource, point: Tensor, reference: Tensor) -> float:
    """Standard error of the mean loss's change from one map to another on the same rows, in nats per row.

    Items are the independent draws: the rows of one (the pixels of an image) go together.
    """

    def batch_sums(batch: Rows) -> tuple[Tensor, ...]:
        losses = [
            F.cross_entropy(apply_map(batch.logits, p), batch.target, reduction="none") for p in (point, reference)
        ]
        change = losses[0] - losses[1]
        pair = batch.per_item(torch.stack([change, torch.ones_like(change)], 1))
        return pair.sum(0), pair.T @ pair

    total, products = summed((batch_sums(batch) for batch in rows), [(2,), (2, 2)], rows.ranks)
    # Of a ratio of sums: items have different numbers of rows, and some none.
    residual = torch.stack([torch.ones_like(total[0]), -total[0] / total[1]])
    return math.sqrt(max(float(residual @ products @ residual), 0.0)) / float(total[1])


def logit_square(rows: RowSource) -> float:
    """Mean square of the logits about the mean of their row."""

    def batch_sums() -> Iterator[tuple[Tensor, ...]]:
        for batch in rows:
            centred = batch.logits - batch.logits.mean(1, keepdim=True)
            yield (centred**2).sum(), torch.tensor(float(centred.numel()))

    total, count = summed(batch_sums(), [(), ()], rows.ranks)
    return float(total) / float(count)
