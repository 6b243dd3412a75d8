"""Many classes: the curvature class by class, and no matrix with a row and a column for each.

What is kept of the curvature are the blocks on its diagonal, of a class's own scale and bias. The fit is exact all the
same: the blocks only say where it steps. Its price is read from them and from a few products (:mod:`~.price`).
"""

from functools import partial

import torch
from torch import Tensor

from lightning_clamp._rows import Rows, log_softmax
from lightning_clamp.clamping.descent import Inverse
from lightning_clamp.clamping.map_loss import curvature_product, errors
from lightning_clamp.clamping.output_map import MapSpace
from lightning_clamp.clamping.passes import RowSource, summed
from lightning_clamp.clamping.price import Probe, profiled_product, quadrature, random_signs

# Products with the curvature, a pass over the rows each. Where they are too few the price comes out too high.
_STEPS = 6


class ClassBlocks:
    """The curvature at a point in each class's own parameters, and in the common scale.

    Args:
        rows: Rows of logits.
        space: The free parameters; no matrix.
        free: The point, ``(q,)``.
    """

    patience = 8

    def __init__(self, rows: RowSource, space: MapSpace, free: Tensor) -> None:
        def batch_sums(batch: Rows) -> tuple[Tensor, ...]:
            log_probs = log_softmax(space.beside(batch.logits).apply(batch.logits, free))
            _, weight = space.loss_of_label(log_probs, batch.target)
            return _blocks(space, batch.logits, log_probs.exp_(), weight)

        classes, size = space.n_classes, space.n_own
        blocks, self.corner = summed((batch_sums(batch) for batch in rows), [(classes, size, size), ()], rows.ranks)
        self.space, self.root = space, space.by_class(space.weight).rsqrt()
        values, self.vectors = torch.linalg.eigh(self.in_metric(blocks))
        self.values = values.clamp_min(0.0)

    def in_metric(self, blocks: Tensor) -> Tensor:
        """Blocks ``(C, m, m)`` in the ridge's metric."""
        return blocks * self.root[:, :, None] * self.root[:, None, :]

    def solve(self, shrinkage: float, gradient: Tensor) -> Tensor:
        """The blocks' ``(B + λ diag(weight))⁻¹ gradient``."""
        right = self.vectors.mT @ (self.space.by_class(gradient) * self.root)[:, :, None]
        own = (self.vectors @ (right / (self.values + shrinkage)[:, :, None]))[:, :, 0] * self.root
        return self.space.joined(own, gradient[-1] / self.corner)

    def renewed(self, rows: RowSource, space: MapSpace, point: Tensor, shrinkage: float) -> Inverse:
        """The like of :meth:`solve` at another point."""
        return partial(ClassBlocks(rows, space, point).solve, shrinkage)


def _blocks(space: MapSpace, logits: Tensor, probs: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor]:
    """Sums over rows ``(M, C)``, each counted ``weight`` ``(M, 1)`` times: ``(C, m, m)``, and of the common scale."""
    weighted = probs if weight is None else probs * weight
    variance = weighted * (1 - probs)
    if space.seen is not None:
        variance = variance * space.seen.to(variance)
    common = (weighted * logits * (logits - (probs * logits).sum(1, keepdim=True))).sum()
    if space.kind == "bias":
        return variance.sum(0)[:, None, None], common
    centred = logits - space.centre.to(logits)
    first = variance * centred
    mixed = first.sum(0)
    sums = [(first * centred).sum(0), mixed, mixed, variance.sum(0)]
    return torch.stack(sums, 1).reshape(-1, 2, 2), common


class BlockPath(ClassBlocks):
    """One strength after the other from the blocks.

    Args:
        rows: Rows of logits.
        space: The free parameters; no matrix.
        free: A temperature alone.
        dense: Whether the rows of an item are correlated: costs are then those of the items' scores within a class
            (Takeuchi, 1976), and no products are taken.
    """

    def __init__(self, rows: RowSource, space: MapSpace, free: Tensor, *, dense: bool) -> None:
        super().__init__(rows, space, free)
        self._costs, self._base, self._probe = self.values, 1.0, None if dense else self._probed(rows, free)
        if dense:
            covariance, corner = _score_blocks(rows, space, free)
            self._costs = ((self.in_metric(covariance) @ self.vectors) * self.vectors).sum(1)
            self._base = float(corner / self.corner)

    def effective_parameters(self, shrinkage: float, n_free: int = 1) -> float:
        """See :class:`~.paths.ShrinkagePath`."""
        if self._probe is not None:
            return n_free + self._probe.price(shrinkage)
        return n_free * self._base + float((self._costs / (self.values + shrinkage)).sum())

    def _probed(self, rows: RowSource, free: Tensor) -> Probe:
        root, space = self.root, self.space
        product = profiled_product(
            partial(curvature_product, rows, space, free),
            lambda own: space.joined(own.reshape(root.shape) * root, root.new_zeros(())),
            lambda whole: (space.by_class(whole) * root).flatten(),
            like=free,
        )
        signs = random_signs(root.numel())
        squares = (self.vectors.mT @ signs.reshape(root.shape)[:, :, None])[:, :, 0] ** 2
        return Probe(self.values, squares, *quadrature(product, signs, _STEPS))


def _score_blocks(rows: RowSource, space: MapSpace, free: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of the outer products of the items' scores in each class's own parameters, ``(C, m, m)``; in the common."""

    def batch_sums(batch: Rows) -> tuple[Tensor, ...]:
        scores = space.pull_per_item(batch, errors(space.apply(batch.logits, free).softmax(1), batch))
        own = space.by_class(scores)
        return torch.einsum("nki,nkj->kij", own, own), (scores[:, -1] ** 2).sum()

    shapes = [(space.n_classes, space.n_own, space.n_own), ()]
    blocks, corner = summed((batch_sums(batch) for batch in rows), shapes, rows.ranks)
    return blocks, corner
