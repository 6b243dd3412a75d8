"""The output side: what is done to the logits, from the temperature alone to a matrix, and what shrinks it."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_clamp._rows import Rows
from lightning_clamp.clamping.newton import LossDerivatives
from lightning_clamp.clamping.passes import RowSource, summed

OutputMap: TypeAlias = Literal["temperature", "bias", "vector", "matrix"]
OUTPUT_MAPS: tuple[OutputMap, ...] = ("temperature", "bias", "vector", "matrix")
# Numbers of a chunk of rows that are held at once: 128 MB in float64, and a few times that in what is made of them.
_MOST_ELEMENTS = 2**24


def n_parameters(kind: OutputMap, n_classes: int) -> int:
    """Parameters that matter, the temperature included; a common bias, or a common row of a matrix, changes nothing."""
    counts = {"temperature": 1, "bias": n_classes, "vector": 2 * n_classes - 1, "matrix": n_classes**2 - 1}
    return counts[kind]


@dataclass(frozen=True)
class MapSpace:
    r"""The free parameters of an output map, and what shrinks them towards the temperature.

    .. math:: s z + D (z - c) + b

    with the common scale s = 1/T, deviations D (a diagonal for ``"vector"``, all entries for ``"matrix"``), biases b,
    and c the mean logit of every class: a number added to all logits changes nothing. A ridge of strength λ on the
    deviations, :math:`\tfrac{\lambda}{2}(v \sum_k D_{kk}^2 + (C - 1) v \sum_{j \ne k} D_{jk}^2 + \sum_k b_k^2)` with v
    the mean square of z - c, charges each by what it does to the logits; the C - 1 entries of a row beside the diagonal
    cost together what one on it does. The loss is convex in all of them. Scales may come out negative.

    Attributes:
        kind: Which deviations there are.
        n_classes: C.
        centre: c, ``(C,)``, float64.
        weight: What the ridge charges each free parameter, ``(q,)``: D row by row, b, and s, which is free (0).
    """

    kind: OutputMap
    n_classes: int
    centre: Tensor
    weight: Tensor

    def temperature_only(self, temperature: float) -> Tensor:
        """The free parameters of a temperature alone."""
        free = torch.zeros_like(self.weight)
        free[-1] = 1 / temperature
        return free

    def deviations(self, free: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """D, ``(C,)`` or ``(C, C)``, and b, ``(C,)``; None where the kind has none."""
        classes = self.n_classes
        if self.kind == "temperature":
            return None, None
        own, bias = free[: -1 - classes], free[-1 - classes : -1]
        if self.kind == "bias":
            return None, bias
        return (own.reshape(classes, classes) if self.kind == "matrix" else own), bias

    def linear(self, change: Tensor, free: Tensor) -> Tensor:
        """What the map makes of a change of the logits, ``(..., C)``."""
        own, _ = self.deviations(free.to(change))
        if own is None:
            return free[-1].to(change) * change
        if own.ndim == 1:
            return (own + free[-1].to(change)) * change
        return change @ (own + free[-1].to(change) * torch.eye(len(own)).to(change)).T

    def offset(self, free: Tensor) -> Tensor:
        """What the map makes of logits that are all 0, ``(C,)``."""
        own, bias = self.deviations(free)
        if bias is None:
            return free.new_zeros(self.n_classes)
        if own is None:
            return bias
        return bias - (own @ self.centre if own.ndim == 2 else own * self.centre)

    def apply(self, logits: Tensor, free: Tensor) -> Tensor:
        """The mapped logits of rows ``(M, C)``."""
        return self.linear(logits, free) + self.offset(free).to(logits)

    def pull(self, logits: Tensor, slopes: Tensor) -> Tensor:
        """Derivatives in the free parameters, ``(q,)``, from those in the mapped logits, ``(M, C)``, over all rows."""
        if self.kind == "matrix":
            sums, product = slopes.sum(0), slopes.T @ logits
            own = product - sums[:, None] * self.centre.to(logits)
            return torch.cat([own.flatten(), sums, product.trace().reshape(1)])
        product = (slopes * logits).sum(0)
        common = product.sum().reshape(1)
        if self.kind == "temperature":
            return common
        sums = slopes.sum(0)
        scales = [product - sums * self.centre.to(logits)] if self.kind == "vector" else []
        return torch.cat([*scales, sums, common])

    def pull_per_item(self, rows: Rows, slopes: Tensor) -> Tensor:
        """The same per item, ``(n_items, q)``."""
        total = slopes.new_zeros(rows.n_items, len(self.weight))
        for part in self._chunks(len(slopes)):
            total.index_add_(0, rows.item[part], self._columns(rows.logits[part], slopes[part]))
        return total

    def curvature(self, logits: Tensor, probs: Tensor) -> Tensor:
        """Curvature of the summed loss of rows ``(M, C)``, ``(q, q)``, at these probabilities."""
        total = logits.new_zeros(len(self.weight), len(self.weight))
        for part in self._chunks(len(logits)):
            spread = self._columns(logits[part], probs[part])
            total += self._expected_square(logits[part], probs[part]) - spread.T @ spread
        return total

    def _chunks(self, n_rows: int) -> Iterator[slice]:
        """Rows of which each has a number per free parameter, so many at once."""
        size = max(1, _MOST_ELEMENTS // len(self.weight))
        return (slice(first, first + size) for first in range(0, n_rows, size))

    def _columns(self, logits: Tensor, slopes: Tensor) -> Tensor:
        """Each row's derivatives in the free parameters, ``(M, q)``."""
        common = (slopes * logits).sum(1, keepdim=True)
        if self.kind == "temperature":
            return common
        if self.kind == "bias":
            return torch.cat([slopes, common], 1)
        centred = logits - self.centre.to(logits)
        if self.kind == "vector":
            return torch.cat([slopes * centred, slopes, common], 1)
        outer = slopes[:, :, None] * centred[:, None, :]
        return torch.cat([outer.flatten(1), slopes, common], 1)

    def _expected_square(self, logits: Tensor, probs: Tensor) -> Tensor:
        """Sum over rows of the expected outer product of the derivatives of one class's logit, ``(q, q)``.

        A class's logit depends on its own row of D and its own bias alone: blocks, class by class, and the border of s.
        """
        corner = (probs * logits**2).sum().reshape(1, 1)
        if self.kind == "temperature":
            return corner
        classes, centred = self.n_classes, logits - self.centre.to(logits)
        features = {"bias": [], "vector": [centred[:, :, None]], "matrix": [centred[:, None].expand(-1, classes, -1)]}
        inputs = torch.cat([*features[self.kind], torch.ones_like(logits)[:, :, None]], 2)  # (M, C, m)
        weighted = probs[:, :, None] * inputs
        blocks = torch.einsum("nki,nkj->kij", weighted, inputs)
        border = (weighted * logits[:, :, None]).sum(0)
        order = self._order.to(logits.device)
        square = logits.new_zeros(len(self.weight), len(self.weight))
        square[order[:, :, None], order[:, None, :]] = blocks
        square[order, -1] = square[-1, order] = border
        square[-1, -1] = corner[0, 0]
        return square

    @property
    def _order(self) -> Tensor:
        """Which free parameters class k's logit depends on: its row of D, and its bias, ``(C, m)``."""
        classes = self.n_classes
        count = len(self.weight) - 1
        bias = torch.arange(count - classes, count)[:, None]
        return torch.cat([torch.arange(count - classes).reshape(classes, -1), bias], 1)


def map_space(kind: OutputMap, rows: RowSource, n_classes: int, repeats: float = 1.0) -> MapSpace:
    """The space of one kind of output map, for these logits.

    Args:
        kind: Which.
        rows: Rows of logits.
        n_classes: C.
        repeats: How many rows say what one independent row would (the design effect of correlated pixels): the ridge
            is as many times stronger, so that it shrinks as it would that one.
    """
    centre, square = _moments(rows, n_classes) if kind in ("vector", "matrix") else (torch.zeros(n_classes), 1.0)
    weight = torch.cat([repeats * _charges(kind, n_classes, square), torch.zeros(1, dtype=torch.float64)])
    return MapSpace(kind, n_classes, centre.double(), weight)


def _charges(kind: OutputMap, n_classes: int, square: float) -> Tensor:
    """What the ridge charges the deviations and the biases, float64."""
    if kind == "temperature":
        return torch.zeros(0, dtype=torch.float64)
    bias = torch.ones(n_classes, dtype=torch.float64)
    if kind == "bias":
        return bias
    if kind == "vector":
        return torch.cat([square * bias, bias])
    entries = (n_classes - 1) * torch.ones(n_classes, n_classes, dtype=torch.float64)
    return torch.cat([square * entries.fill_diagonal_(1.0).flatten(), bias])


def _moments(rows: RowSource, n_classes: int) -> tuple[Tensor, float]:
    """Mean logit of every class, and the mean square about it."""

    def batch_sums(centre: Tensor) -> Iterator[tuple[Tensor, ...]]:
        for batch in rows:
            logits = batch.logits - centre.to(batch.logits)
            yield logits.sum(0), (logits**2).sum(), torch.tensor(float(len(logits)))

    shapes = [(n_classes,), (), ()]
    total, _, count = summed(batch_sums(torch.zeros(n_classes)), shapes, rows.ranks)
    centre = total / count
    _, square, _ = summed(batch_sums(centre), shapes, rows.ranks)
    return centre, max(float(square / count / n_classes), torch.finfo(torch.float64).tiny)


class MapLoss:
    """Summed loss of maps of one kind on the same rows, and its gradient in the free parameters, ``(q,)``.

    The last point is remembered: a fit mostly starts where another one ended.
    """

    def __init__(self, rows: RowSource, space: MapSpace) -> None:
        self.rows = rows
        self.space = space
        self._last: tuple[Tensor, tuple[float, Tensor]] | None = None

    def __call__(self, free: Tensor) -> tuple[float, Tensor]:
        """Loss and gradient at a point."""
        if self._last is None or not torch.equal(self._last[0], free):
            self._last = free, self._computed(free)
        return self._last[1]

    def _computed(self, free: Tensor) -> tuple[float, Tensor]:
        def batch_sums(batch: Rows) -> tuple[Tensor, ...]:
            log_probs = self.space.apply(batch.logits, free).log_softmax(1)
            loss = F.nll_loss(log_probs, batch.target, reduction="sum")
            return loss, self.space.pull(batch.logits, errors(log_probs.exp(), batch))

        shapes = [(), (len(free),)]
        loss, gradient = summed((batch_sums(batch) for batch in self.rows), shapes, self.rows.ranks)
        return float(loss), gradient


def map_derivatives(rows: RowSource, space: MapSpace, free: Tensor, *, dense: bool) -> LossDerivatives:
    """Gradient, curvature and covariance of the summed loss in the free parameters.

    The curvature is exact (that of the loss, which for these maps is also the Fisher information). It is the covariance
    too, with less noise than the outer products of the items' gradients, unless the rows of an item are correlated
    (``dense``).
    """

    def batch_sums(batch: Rows) -> tuple[Tensor, ...]:
        probs = space.apply(batch.logits, free).softmax(1)
        error = errors(probs, batch)
        terms = (space.pull(batch.logits, error), space.curvature(batch.logits, probs))
        if not dense:
            return terms
        scores = space.pull_per_item(batch, error)
        return (*terms, scores.T @ scores)

    n = len(free)
    shapes = [(n,), (n, n), (n, n)][: 3 if dense else 2]
    gradient, curvature, *outer = summed((batch_sums(batch) for batch in rows), shapes, rows.ranks)
    return LossDerivatives(gradient, curvature, outer[0] if dense else curvature)


def errors(probs: Tensor, batch: Rows) -> Tensor:
    """Derivative of every row's loss in its mapped logits, ``(M, C)``: probabilities less one at the target."""
    return probs.scatter_add(1, batch.target[:, None], -torch.ones_like(probs[:, :1]))


def standard_error(rows: RowSource, space: MapSpace, free: Tensor, reference: tuple[MapSpace, Tensor]) -> float:
    """Standard error of the mean loss's change from one map, ``reference``, to another on the same rows, in nats.

    Items are the independent draws: the rows of one (the pixels of an image) go together.
    """

    def batch_sums(batch: Rows) -> tuple[Tensor, ...]:
        losses = [
            F.cross_entropy(one.apply(batch.logits, point), batch.target, reduction="none")
            for one, point in ((space, free), reference)
        ]
        change = losses[0] - losses[1]
        pair = batch.per_item(torch.stack([change, torch.ones_like(change)], 1))
        return pair.sum(0), pair.T @ pair

    total, products = summed((batch_sums(batch) for batch in rows), [(2,), (2, 2)], rows.ranks)
    # Of a ratio of sums: items have different numbers of rows, and some none.
    residual = torch.stack([torch.ones_like(total[0]), -total[0] / total[1]])
    return math.sqrt(max(float(residual @ products @ residual), 0.0)) / float(total[1])
