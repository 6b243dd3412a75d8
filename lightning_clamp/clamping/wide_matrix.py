r"""A matrix of many classes: its curvature in a basis in which it is nearly diagonal.

The deviations D are written as a diagonal and a whole matrix, :math:`D = \operatorname{diag}(a) + B`. What the vector
map has too, a, the biases and the common scale, keeps its whole curvature. That of B is a sum over rows of Kronecker
products, :math:`\sum_n (\operatorname{diag} p_n - p_n p_n^T) \otimes (z_n - c)(z_n - c)^T`, and nearly diagonal in the
eigenvectors of the two factors' sums; its diagonal there is exact. The fit is exact all the same: this only says where
it steps, and, corrected by a few products (:mod:`~.price`), what it costs.

Reference:
    George, Laurent, Bouthillier, Ballas and Vincent, "Fast Approximate Natural Gradient Descent in a Kronecker-factored
    Eigenbasis", NeurIPS 2018.
"""

from collections.abc import Iterable
from dataclasses import replace
from functools import cached_property, partial

import torch
from torch import Tensor

from lightning_clamp._rows import Rows, log_softmax
from lightning_clamp.clamping.descent import Inverse
from lightning_clamp.clamping.map_loss import curvature_product
from lightning_clamp.clamping.newton import LossDerivatives
from lightning_clamp.clamping.output_map import MapSpace
from lightning_clamp.clamping.passes import RowSource, summed
from lightning_clamp.clamping.paths import WholePath
from lightning_clamp.clamping.price import Probe, profiled_product, quadrature, random_signs

# Products with the curvature, a pass over the rows each.
_STEPS = 12


class MatrixBlocks:
    """The curvature at a point: whole in what a vector map has, diagonal in the rest.

    Args:
        rows: Rows of logits.
        space: The free parameters of a matrix.
        free: The point, ``(q,)``.
    """

    patience = 10

    def __init__(self, rows: RowSource, space: MapSpace, free: Tensor) -> None:
        self.rows, self.space, self.free = rows, space, free
        self.charge = float(space.weight[1])
        shapes = [*3 * [2 * (space.n_classes,)], ()]
        outputs, inputs, border, corner = summed((self._factors(batch, free) for batch in rows), shapes, rows.ranks)
        self.left, self.right = (torch.linalg.eigh(factor)[1] for factor in (outputs, inputs))
        (values,) = summed((self._diagonal(batch, free) for batch in rows), shapes[:1], rows.ranks)
        border = self.left.T @ border @ self.right
        self.values = ((values - border**2 / corner) / self.charge).clamp_min(0.0)

    @cached_property
    def vector(self) -> WholePath:
        """The curvature in what a vector map has."""
        space = vector_space(self.space)

        def batch_sums(batch: Rows) -> tuple[Tensor]:
            probs, weight, _ = self._weighted(batch, self.free)
            return (space.beside(batch.logits).curvature(batch.logits, probs, weight),)

        (whole,) = summed((batch_sums(batch) for batch in self.rows), [2 * (len(space.weight),)], self.rows.ranks)
        return WholePath(LossDerivatives(whole[0], whole, whole), space.weight)

    def _weighted(self, batch: Rows, free: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Probabilities, how much each row counts, and logits about their means."""
        space = self.space.beside(batch.logits)
        log_probs = log_softmax(space.apply(batch.logits, free))
        _, weight = space.loss_of_label(log_probs, batch.target)
        probs = log_probs.exp_()
        weight = torch.ones_like(probs[:, :1]) if weight is None else weight
        return probs, weight, batch.logits - space.centre

    def _factors(self, batch: Rows, free: Tensor) -> tuple[Tensor, ...]:
        probs, weight, centred = self._weighted(batch, free)
        far = probs * (weight * (centred**2).sum(1, keepdim=True))
        spread = centred * (weight * (1 - (probs**2).sum(1, keepdim=True)))
        common = weight * probs * (batch.logits - (probs * batch.logits).sum(1, keepdim=True))
        corner = (common * batch.logits).sum()
        return far.sum(0).diag() - far.T @ probs, spread.T @ centred, common.T @ centred, corner

    def _diagonal(self, batch: Rows, free: Tensor) -> tuple[Tensor]:
        probs, weight, centred = self._weighted(batch, free)
        left = self.left.to(probs)
        variance = weight * (probs @ left**2 - (probs @ left) ** 2)
        return (variance.T @ (centred @ self.right.to(probs)) ** 2,)

    def solve(self, shrinkage: float, gradient: Tensor) -> Tensor:
        """``(H + λ diag(weight))⁻¹ gradient``, nearly."""
        whole, rest = self.parts(gradient)
        own = self.vector.solve(shrinkage, torch.cat([whole.diagonal(), rest]))
        turned = self.left.T @ whole @ self.right / (self.charge * (self.values + shrinkage))
        return self.joined(own, self.left @ turned @ self.right.T)

    def parts(self, free: Tensor) -> tuple[Tensor, Tensor]:
        """Derivatives in the matrix, ``(C, C)``, and in the biases and the common scale."""
        classes = self.space.n_classes
        return free[: classes**2].reshape(classes, classes), free[classes**2 :]

    def joined(self, vector: Tensor, matrix: Tensor) -> Tensor:
        """The free parameters of a vector map and a matrix together."""
        classes = self.space.n_classes
        return torch.cat([(vector[:classes].diag() + matrix).flatten(), vector[classes:]])

    def promise(self, gradient: Tensor, strengths: Iterable[float]) -> float:
        """What the matrix is expected to change on new data at the best strength, in nats, from a gradient there.

        A quadratic model of the loss in B alone says by how much a step of strength λ lowers it; what B costs is added.
        """
        whole, _ = self.parts(gradient)
        squares, values = (self.left.T @ whole @ self.right) ** 2 / self.charge, self.values
        return min(
            float(((values * (values + strength) - squares * (values / 2 + strength)) / (values + strength) ** 2).sum())
            for strength in strengths
        )

    def renewed(self, rows: RowSource, space: MapSpace, point: Tensor, shrinkage: float) -> Inverse:
        """The like of :meth:`solve` at another point."""
        return partial(MatrixBlocks(rows, space, point).solve, shrinkage)


class MatrixPath(MatrixBlocks):
    """One strength after the other, see :class:`~.paths.ShrinkagePath`."""

    def __init__(self, rows: RowSource, space: MapSpace, free: Tensor) -> None:
        super().__init__(rows, space, free)
        self._probe = self._probed(rows, free)

    def effective_parameters(self, shrinkage: float, n_free: int = 1) -> float:
        """See :class:`~.paths.ShrinkagePath`."""
        return n_free + self._probe.price(shrinkage)

    def _probed(self, rows: RowSource, free: Tensor) -> Probe:
        classes, roots = self.space.n_classes, self.vector.root
        root = torch.cat([roots, torch.full((classes**2,), self.charge**-0.5, dtype=torch.float64)])

        def spread(own: Tensor) -> Tensor:
            own = own * root
            vector = torch.cat([own[: 2 * classes], own.new_zeros(1)])
            return self.joined(vector, own[2 * classes :].reshape(classes, classes))

        def gathered(whole: Tensor) -> Tensor:
            matrix, rest = self.parts(whole)
            return torch.cat([matrix.diagonal(), rest[:-1], matrix.flatten()]) * root

        product = profiled_product(partial(curvature_product, rows, self.space, free), spread, gathered, like=free)
        signs = random_signs(len(root))
        vector, matrix = signs[: 2 * classes], signs[2 * classes :].reshape(classes, classes)
        along = torch.cat([self.vector.vectors.T @ vector, (self.left.T @ matrix @ self.right).flatten()])
        values = torch.cat([self.vector.values, self.values.flatten()])
        return Probe(values, along**2, *quadrature(product, signs, _STEPS))


def vector_space(space: MapSpace) -> MapSpace:
    """What of the parameters a vector map has too, charged as they are."""
    own = space.weight[: space.n_classes**2].reshape(space.n_classes, -1).diagonal()
    return replace(space, kind="vector", weight=torch.cat([own, space.weight[space.n_classes**2 :]]))
