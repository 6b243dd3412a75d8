r"""What a map of labels costs at every strength of the ridge, and where its fit steps.

With the blocks :math:`A_k` of the labels' own parameters, their borders :math:`B_k`, and the corner C of the common
scale and bias, the inverse of curvature and ridge needs a 2x2 matrix for each label and one more,
:math:`S = C - \sum_k B_k^T (A_k + λ)^{-1} B_k`. The price is Takeuchi's trace,

.. math:: \sum_k \operatorname{tr}((A_k + λ)^{-1} J_k) + \operatorname{tr}(S^{-1} R)

J is the covariance of a label's scores, which for one row per item and label is A. The labels of an item are
correlated: R is the covariance over items of their summed scores in the common parameters, those of their own profiled
out.
"""

from functools import partial

import torch
from torch import Tensor

from lightning_clamp._rows import Rows, log_softmax
from lightning_clamp.clamping.descent import Inverse
from lightning_clamp.clamping.labels import LabelSpace
from lightning_clamp.clamping.map_loss import errors
from lightning_clamp.clamping.output_map import MapSpace
from lightning_clamp.clamping.passes import RowSource, summed


class LabelPath:
    """The curvature of labels at a point.

    Args:
        rows: Rows of logits.
        space: The free parameters.
        point: Their values.
    """

    patience = 8

    def __init__(self, rows: RowSource, space: LabelSpace, point: Tensor) -> None:
        self._rows, self._space, self._point = rows, space, point
        (blocks,) = summed(((space.blocks(batch, point),) for batch in rows), [(len(space.centre), 2, 2)], rows.ranks)
        features = space.features
        self._own = features @ blocks @ features.mT
        self._border = features @ blocks
        self._corner = blocks.sum(0)

    @property
    def has_curvature(self) -> bool:
        """Whether outputs are neither certain nor all the same."""
        low, high = torch.linalg.eigvalsh(self._corner.nan_to_num())
        return bool(self._corner.isfinite().all()) and float(low) > torch.finfo(torch.float64).eps * float(high)

    def _inverses(self, shrinkage: float) -> tuple[Tensor, Tensor]:
        """``(A_k + λ)⁻¹``, ``(K, m, m)``, and S, ``(2, 2)``."""
        ridge = shrinkage * self._space.own(self._space.weight).diag_embed()
        own = torch.linalg.inv(self._own + ridge)
        return own, self._corner - (self._border.mT @ own @ self._border).sum(0)

    def effective_parameters(self, shrinkage: float, n_free: int = 1) -> float:
        """What deviations cost at this strength, and what is free, in units of one parameter of independent rows."""
        own, common = self._inverses(shrinkage)
        profiled = torch.eye(2, dtype=torch.float64) - self._space.features.mT @ own @ self._border
        covariance = self._covariance(profiled * self._space.part[:, None, None])
        of_labels = self._space.repeats * (own * self._own.mT).sum()
        return float(of_labels + torch.linalg.solve(common, covariance).trace())

    def _covariance(self, profiled: Tensor) -> Tensor:
        """R, from the derivatives that rows of each label have in common parameters, ``(K, 2, 2)``, of 1 and z."""

        def batch_sums(batch: Rows) -> tuple[Tensor, ...]:
            log_probs = log_softmax(self._space.apply(batch.logits, self._point, batch.label))
            error = errors(log_probs.exp(), batch)[:, 1:]
            values = torch.stack([torch.ones_like(error), batch.logits[:, 1:]], 2)
            scores = batch.per_item(error * (values @ profiled.to(error)[batch.label])[:, 0])
            return scores.sum(0), scores.T @ scores, torch.tensor(float(batch.n_items))

        total, products, n_items = summed(
            (batch_sums(batch) for batch in self._rows), [(2,), (2, 2), ()], self._rows.ranks
        )
        return products - torch.outer(total, total) / n_items

    def solve(self, shrinkage: float, gradient: Tensor) -> Tensor:
        """``(H + λ diag(weight))⁻¹ gradient``."""
        own, common = self._inverses(shrinkage)
        right = self._space.own(gradient)[:, :, None]
        shared = torch.linalg.solve(common, gradient[-2:, None] - (self._border.mT @ own @ right).sum(0))
        return self._space.free((own @ (right - self._border @ shared))[:, :, 0], shared[:, 0])

    def renewed(self, rows: RowSource, space: MapSpace, point: Tensor, shrinkage: float) -> Inverse:
        """The like of :meth:`solve` at another point of the fit."""
        assert isinstance(space, LabelSpace)
        return partial(LabelPath(rows, space, point).solve, shrinkage)
