"""The loss of mapped logits over rows: value, derivatives, and how sure a change of it is."""

import math

import torch
from torch import Tensor

from lightning_clamp._rows import Rows, log_softmax, softmax
from lightning_clamp.clamping.newton import LossDerivatives
from lightning_clamp.clamping.output_map import MapSpace, temperature_space
from lightning_clamp.clamping.passes import RowSource, summed


class MapLoss:
    """Summed loss of maps of one kind on the same rows, and its gradient in the free parameters, ``(q,)``.

    The last point is remembered: a fit mostly starts where another one ended.
    """

    def __init__(self, rows: RowSource, space: MapSpace) -> None:
        self.rows = rows
        self.space = space
        self._last: tuple[Tensor, tuple[float, Tensor]] | None = None
        self._of_rows: list[Tensor] = []

    def __call__(self, free: Tensor) -> tuple[float, Tensor]:
        """Loss and gradient at a point."""
        if self._last is None or not torch.equal(self._last[0], free):
            self._last = free, self._computed(free)
        return self._last[1]

    def of_rows(self, free: Tensor) -> list[Tensor]:
        """Loss of every row at a point, batch by batch."""
        self(free)
        return self._of_rows

    def _computed(self, free: Tensor) -> tuple[float, Tensor]:
        self._of_rows = []

        def batch_sums(batch: Rows) -> tuple[Tensor, ...]:
            space = self.space.beside(batch.logits)
            log_probs = log_softmax(space.apply(batch.logits, free, batch.label))
            loss, weight = space.loss_of_label(log_probs, batch.target)
            self._of_rows.append(loss)
            return loss.sum(), space.pull(batch.logits, errors(log_probs.exp_(), batch, weight), batch.label)

        shapes = [(), (len(free),)]
        loss, gradient = summed((batch_sums(batch) for batch in self.rows), shapes, self.rows.ranks)
        return float(loss), gradient


def map_derivatives(rows: RowSource, space: MapSpace, free: Tensor, *, dense: bool) -> LossDerivatives:
    """Gradient, curvature and covariance of the summed loss in the free parameters.

    The curvature is exact (that of the loss, which for these maps is also the Fisher information), but for a uniform
    share: rows then count by the part of their label's probability that the softmax has. It is the covariance too, with
    less noise than the outer products of the items' gradients, unless the rows of an item are correlated (``dense``).
    """

    def batch_sums(batch: Rows) -> tuple[Tensor, ...]:
        here = space.beside(batch.logits)
        log_probs = log_softmax(here.apply(batch.logits, free, batch.label))
        _, weight = here.loss_of_label(log_probs, batch.target)
        probs = log_probs.exp()
        error = errors(probs.clone(), batch, weight)
        curvature = here.curvature(batch.logits, probs, weight, batch.label)
        terms = (here.pull(batch.logits, error, batch.label), curvature)
        if not dense:
            return terms
        scores = here.pull_per_item(batch, error)
        return (*terms, scores.T @ scores)

    n = len(free)
    shapes = [(n,), (n, n), (n, n)][: 3 if dense else 2]
    gradient, curvature, *outer = summed((batch_sums(batch) for batch in rows), shapes, rows.ranks)
    return LossDerivatives(gradient, curvature, outer[0] if dense else curvature)


def scale_curvature(rows: RowSource, space: MapSpace, free: Tensor) -> float:
    """The curvature of :func:`map_derivatives` in the common scale alone."""

    def batch_sums(batch: Rows) -> tuple[Tensor, ...]:
        log_probs = log_softmax(space.beside(batch.logits).apply(batch.logits, free, batch.label))
        _, weight = space.loss_of_label(log_probs, batch.target)
        return (temperature_space(space.n_classes).curvature(batch.logits, log_probs.exp_(), weight),)

    return float(summed((batch_sums(batch) for batch in rows), [(1, 1)], rows.ranks)[0])


def curvature_product(rows: RowSource, space: MapSpace, free: Tensor, direction: Tensor) -> Tensor:
    """The curvature of :func:`map_derivatives` at a point, ``(q, q)``, times a direction: one pass, and no matrix."""

    def batch_sums(batch: Rows) -> tuple[Tensor, ...]:
        here = space.beside(batch.logits)
        probs = softmax(here.apply(batch.logits, free))
        turned = here.apply(batch.logits, direction).mul_(probs)
        return (here.pull(batch.logits, turned.addcmul_(probs, turned.sum(1, keepdim=True), value=-1)),)

    return summed((batch_sums(batch) for batch in rows), [(len(free),)], rows.ranks)[0]


def errors(probs: Tensor, batch: Rows, weight: Tensor | None = None) -> Tensor:
    """Every row's derivative in its mapped logits, ``(M, C)``: probabilities less one at the target, in place."""
    error = probs.scatter_add_(1, batch.target[:, None], -torch.ones_like(probs[:, :1]))
    return error if weight is None else error.mul_(weight)


def row_losses(rows: RowSource, space: MapSpace, free: Tensor) -> list[Tensor]:
    """Loss of every row, batch by batch."""
    mapped = ((space.beside(batch.logits).apply(batch.logits, free, batch.label), batch.target) for batch in rows)
    return [space.loss_of_label(log_softmax(logits), target)[0] for logits, target in mapped]


def total_loss(rows: RowSource, losses: list[Tensor]) -> float:
    """The summed loss of rows, from that of every row of this rank: :func:`row_losses`."""
    return float(summed(((loss.sum(),) for loss in losses), [()], rows.ranks)[0])


def standard_error(rows: RowSource, losses: list[Tensor], reference: list[Tensor]) -> float:
    """Standard error of the mean loss's change from one map, ``reference``, to another on the same rows, in nats.

    Items are the independent draws: the rows of one (the pixels of an image) go together.

    Args:
        rows: Rows of logits.
        losses: Loss of every row, batch by batch: :func:`row_losses`.
        reference: The same of the other map.
    """

    def batch_sums(batch: Rows, change: Tensor) -> tuple[Tensor, ...]:
        pair = batch.per_item(torch.stack([change, torch.ones_like(change)], 1))
        return pair.sum(0), pair.T @ pair

    changes = (one - other for one, other in zip(losses, reference, strict=True))
    total, products = summed(
        (batch_sums(*pair) for pair in zip(rows, changes, strict=True)), [(2,), (2, 2)], rows.ranks
    )
    # Of a ratio of sums: items have different numbers of rows, and some none.
    residual = torch.stack([torch.ones_like(total[0]), -total[0] / total[1]])
    return math.sqrt(max(float(residual @ products @ residual), 0.0)) / float(total[1])
