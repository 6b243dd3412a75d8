r"""How an output map is shrunk: every strength of the ridge is fitted, priced by one curvature, and all are averaged.

Instead of the one strength that looks best, all of them are averaged, weighted by how good they look (exp of minus the
criterion): the best of many looks good by chance. The averages of all kinds that a map can be are then averaged in the
same way: a matrix can be a vector. The loss is convex, so that of the mean map is at most the mean loss.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_clamp.clamping.class_blocks import BlockPath
from lightning_clamp.clamping.criterion import estimate
from lightning_clamp.clamping.descent import minimise
from lightning_clamp.clamping.label_path import LabelPath
from lightning_clamp.clamping.labels import LabelSpace
from lightning_clamp.clamping.map_loss import (
    MapLoss,
    map_derivatives,
    row_losses,
    scale_curvature,
    standard_error,
    total_loss,
)
from lightning_clamp.clamping.newton import LossDerivatives
from lightning_clamp.clamping.output_map import MapSpace, temperature_space
from lightning_clamp.clamping.passes import RowSource
from lightning_clamp.clamping.paths import ShrinkagePath, WholePath
from lightning_clamp.clamping.share import fit_temperature_and_share, with_best_share
from lightning_clamp.clamping.temperature import TemperatureFit, fit_temperature
from lightning_clamp.clamping.wide_matrix import MatrixBlocks, MatrixPath

# Strengths, strongest first, in half decades: a class's bias has a prior standard deviation from .02 to 6.
SHRINKAGES = tuple(10 ** (k / 2) for k in range(7, -4, -1))
# A fit ends where another step would lower the summed loss by less than this many nats per effective parameter; half a
# nat each is what over-fitting alone brings.
_TOLERANCE = 0.002
# Nats of the criterion by which a strength's weight in the average falls to 1/e of another's.
_TEMPER = 3.0
# Nats that the temperature alone is ahead of strengths by: the best of many looks good by chance.
HEAD_START = 3.0
# Standard errors charged beside the effective parameters when strengths are weighed against each other.
_CAUTION = 0.5
# Weaker and weaker shrinkage is tried until the criterion is this many nats above the best.
_HOPELESS = 15.0
# Free parameters up to which the curvature is taken in all pairs of them.
_MOST_TOGETHER = 1000


@dataclass(frozen=True)
class MapFit:
    """An output map for given logits.

    Attributes:
        space: Its free parameters.
        free: Their values, ``(q,)``, float64.
        nll: Mean negative log-likelihood per row, in nats, without the ridge.
        effective_parameters: What the parameters cost under the shrinkage, the temperature included.
        shrinkage: λ.
        path: What it was fitted with; None for the temperature.
    """

    space: MapSpace
    free: Tensor
    nll: float
    effective_parameters: float
    shrinkage: float = 0.0
    path: ShrinkagePath | None = field(default=None, repr=False, compare=False)

    @property
    def ridge(self) -> Tensor:
        """What the shrinkage adds to the curvature's diagonal, ``(q,)``."""
        return self.shrinkage * self.space.weight

    @property
    def is_negative(self) -> bool:
        """Whether the common scale is not positive."""
        return float(self.free[-1]) <= 0

    @property
    def temperature(self) -> float:
        """T, of the common scale."""
        return 1 / float(self.free[-1])


class Reference(NamedTuple):
    """What criteria are taken against: the temperature alone on some rows, without a uniform share.

    Attributes:
        rows: Rows of logits.
        fit: The temperature.
        losses: Its loss of every row, batch by batch.
        repeats: For dense outputs, how many rows say what one independent row would; 1 otherwise.
        n_rows: Number of rows.
    """

    rows: RowSource
    fit: MapFit
    losses: list[Tensor]
    repeats: float
    n_rows: int

    def criterion(self, fit: MapFit, losses: list[Tensor]) -> float:
        """Nats of the summed loss by which a map with these losses is expected to differ, with caution."""
        change = self.n_rows * (fit.nll - self.fit.nll) + fit.effective_parameters - self.fit.effective_parameters
        caution = _CAUTION * self.n_rows * standard_error(self.rows, losses, self.losses)
        return (change + caution) / self.repeats

    @classmethod
    def of(cls, rows: RowSource, fit: MapFit, repeats: float, n_rows: int) -> "Reference":
        """With the losses, which are a pass over the rows."""
        return cls(rows, fit, row_losses(rows, fit.space, fit.free), repeats, n_rows)

    def rated(self, fit: MapFit, losses: list[Tensor]) -> "Rated":
        """A map with its criterion."""
        return Rated(fit, self.criterion(fit, losses))


class Rated(NamedTuple):
    """A map, and its criterion: nats of the summed loss against the temperature alone."""

    fit: MapFit
    criterion: float


def temperature_map(rows: RowSource, n_classes: int, fit: TemperatureFit, *, dense: bool) -> MapFit:
    """A temperature that was fitted to rows, as an output map.

    For dense outputs it counts as many parameters as rows say what one independent row would: the design effect.
    """
    space = temperature_space(n_classes)
    free = space.temperature_only(math.exp(fit.log_temperature))
    if not dense:
        return MapFit(space, free, fit.nll, 1.0)
    at = map_derivatives(rows, space, free, dense=True)
    return MapFit(space, free, fit.nll, float(at.covariance / at.curvature))


def with_share(rows: RowSource, base: MapFit, fit: TemperatureFit, n_rows: int) -> MapFit | None:
    """A temperature and a share of the uniform distribution; None where the share is not worth its cost.

    Args:
        rows: Rows of logits.
        base: The temperature alone; its effective parameters are what one more parameter costs.
        fit: As it was fitted.
        n_rows: Number of rows.
    """
    both = fit_temperature_and_share(rows, fit, base.space.n_classes)
    if both is None:
        return None
    space = temperature_space(base.space.n_classes, share=both.share)
    error = standard_error(rows, row_losses(rows, space, both.free), row_losses(rows, base.space, base.free))
    gain, price = base.nll - both.loss / n_rows, base.effective_parameters
    if not estimate(gain, price, n_rows, error).criterion < 0:
        return None
    return MapFit(space, both.free, both.loss / n_rows, 2 * price)


def fit_output_map(loss: MapLoss, path: ShrinkagePath, shrinkage: float, start: Tensor, n_rows: int) -> MapFit | None:
    """Minimise the cross-entropy of the mapped logits and the ridge; every evaluation is a pass over the rows.

    Args:
        loss: Of a kind of map on rows of logits.
        path: Of these logits, or of like ones: what is stepped with, and what the map costs.
        shrinkage: λ, above 0.
        start: The free parameters to start from.
        n_rows: Number of rows.

    Returns:
        The minimum, or None where it is not finite. The common scale may come out negative: scales of the classes'
        own can make up for it, a bias cannot.

    Reference:
        Guo et al., ICML 2017, section 4.2 (vector and matrix scaling); the ridge is that of Hoerl and Kennard, 1970.
    """
    space = loss.space
    ridge = shrinkage * space.weight

    def objective(free: Tensor) -> tuple[float, Tensor]:
        value, gradient = loss(free)
        return value + 0.5 * float(ridge @ free**2), gradient + ridge * free

    effective = path.effective_parameters(shrinkage, space.n_free)
    free, value = minimise(
        objective,
        start,
        partial(path.solve, shrinkage),
        lambda point: path.renewed(loss.rows, space, point, shrinkage),
        tolerance=_TOLERANCE * effective,
        patience=path.patience,
    )
    if not bool(torch.isfinite(free).all()):
        return None
    nll = (value - 0.5 * float(ridge @ free**2)) / n_rows
    return MapFit(space, free, nll, effective, shrinkage, path)


def refit(rows: RowSource, like: MapFit, start: Tensor, n_rows: int, *, dense: bool) -> MapFit | None:
    """A map of the same kind and shrinkage, fitted to other logits from ``start``.

    None where there is none with a positive common scale, by which steps of a grid are bounded.
    """
    if like.path is not None:
        fit = fit_output_map(MapLoss(rows, like.space), like.path, like.shrinkage, start, n_rows)
        return None if fit is None or fit.is_negative else fit
    alone = fit_temperature(rows, -math.log(float(start[-1])) if float(start[-1]) > 0 else 0.0)
    return temperature_map(rows, like.space.n_classes, alone, dense=dense) if alone.determined else None


def shrinkage_path(rows: RowSource, space: MapSpace, start: MapFit, *, dense: bool) -> ShrinkagePath | None:
    """The path from a temperature alone; None where outputs are certain, or all the same: there is no curvature."""
    free = space.temperature_only(start.temperature)
    if isinstance(space, LabelSpace):
        by_label = LabelPath(rows, space, free)
        return by_label if by_label.has_curvature else None
    if is_wide_matrix(space):
        alone = map_derivatives(rows, start.space, start.free, dense=False)
        return MatrixPath(rows, space, free) if _has_curvature(alone) else None
    if len(free) > _MOST_TOGETHER:
        path = BlockPath(rows, space, free, dense=dense)
        return path if float(path.corner) > 0 else None
    at = map_derivatives(rows, space, free, dense=dense)
    return WholePath(at, space.weight) if _has_curvature(at) else None


def _has_curvature(at: LossDerivatives) -> bool:
    return bool(torch.isfinite(at.curvature).all()) and float(at.curvature[-1, -1]) > 0


def is_wide_matrix(space: MapSpace) -> bool:
    """Whether a matrix has too many entries for a curvature in all pairs of them."""
    return space.kind == "matrix" and len(space.weight) > _MOST_TOGETHER


def promise(rows: RowSource, space: MapSpace, best: MapFit) -> float:
    """What a wide matrix is expected to change beyond the best smaller map, in nats; below 0 it is worth its fit."""
    if not scale_curvature(rows, best.space, best.free) > 0:
        return 0.0
    space = space.starting_at(best.temperature, best.space.share)
    free = space.widened(best.free, best.space)
    _, gradient = MapLoss(rows, space)(free)
    return MatrixBlocks(rows, space, free).promise(gradient, SHRINKAGES)


def fit_path(space: MapSpace, path: ShrinkagePath, start: MapFit, reference: Reference) -> Iterator[Rated]:
    """The map at every strength, from the strongest on.

    Args:
        space: The free parameters.
        path: What is stepped with, and what the maps cost.
        start: The temperature alone on the reference's rows, with the space's uniform share.
        reference: What criteria are taken against.
    """
    rows, free, best = reference.rows, space.temperature_only(start.temperature), 0.0
    loss = MapLoss(rows, space)
    for shrinkage in SHRINKAGES:
        if loss.space.share:
            # From where the stronger shrinkage ended: the share has to follow the map.
            loss = MapLoss(rows, with_best_share(rows, loss.space, free))
        fit = fit_output_map(loss, path, shrinkage, free, reference.n_rows)
        if fit is None or not space.is_usable(fit.free):
            # Such as a network whose logits say the opposite: so strongly shrunk, only a negative temperature would do.
            continue
        free = fit.free
        criterion = reference.criterion(fit, loss.of_rows(free))
        yield Rated(fit, criterion)
        best = min(best, criterion)
        if criterion > best + _HOPELESS:
            return


def average(fits: Sequence[Rated], reference: Reference, *, head_start: float = 0.0) -> tuple[MapFit, list[Tensor]]:
    """The mean of maps and the temperature alone, weighted by exp(-criterion / 3 nats).

    Its effective parameters are the mean of theirs, and so is its uniform share, if that is none; else it has the share
    that is best beside it.

    Args:
        fits: Those of the widest kind last.
        reference: What their criteria were taken against.
        head_start: Nats that the temperature is ahead by.

    Returns:
        The mean, and its loss of every row, batch by batch.
    """
    weights = torch.softmax(-torch.tensor([-head_start, *(one.criterion for one in fits)]).double() / _TEMPER, 0)
    space, maps = fits[-1].fit.space, [reference.fit, *(one.fit for one in fits)]
    free = weights @ torch.stack([space.widened(fit.free, fit.space) for fit in maps])
    costs, shares = (
        float(weights @ torch.tensor(values).double())
        for values in ([fit.effective_parameters for fit in maps], [fit.space.share for fit in maps])
    )
    space = with_best_share(reference.rows, space, free) if shares else replace(space, share=0.0)
    losses = row_losses(reference.rows, space, free)
    strongest = min(fits, key=lambda one: one.criterion).fit
    nll = total_loss(reference.rows, losses) / reference.n_rows
    return MapFit(space, free, nll, costs, strongest.shrinkage), losses
