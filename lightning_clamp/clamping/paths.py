r"""One curvature for every strength of the ridge: what an output map costs, and where its fit steps.

The curvature H is taken once, at the temperature alone. In the ridge's metric, with the common scale profiled out, one
eigendecomposition says for every strength λ what the deviations cost, :math:`\sum_i e_i / (e_i + \lambda)`, and serves
as the first inverse Hessian of the exact fit. The price is that at the temperature, not at the fit: where classes come
out nearly separated, the curvature vanishes there, and with it a price taken there.
"""

from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from lightning_clamp.clamping.descent import Inverse
from lightning_clamp.clamping.map_loss import map_derivatives
from lightning_clamp.clamping.newton import LossDerivatives
from lightning_clamp.clamping.output_map import MapSpace
from lightning_clamp.clamping.passes import RowSource


class ShrinkagePath(Protocol):
    """What every strength of the ridge costs, and a first inverse Hessian for its fit."""

    @property
    def patience(self) -> int:
        """Gradients after which :meth:`renewed` is worth its cost."""
        ...

    def effective_parameters(self, shrinkage: float, n_free: int = 1) -> float:
        """What the deviations cost at this strength, and what is free, in units of one free parameter.

        Also for maps with a uniform share: the rows that it takes on beside the temperature are not those that it takes
        on beside a map, and a price without them would be too low.
        """
        ...

    def solve(self, shrinkage: float, gradient: Tensor) -> Tensor:
        """``(H + λ diag(weight))⁻¹ gradient``, or nearly."""
        ...

    def renewed(self, rows: RowSource, space: MapSpace, point: Tensor, shrinkage: float) -> Inverse:
        """The like of :meth:`solve` at another point of the fit."""
        ...


class WholePath:
    """The curvature in all pairs of parameters.

    Args:
        at: Derivatives of the summed loss at the temperature alone.
        weight: What the ridge charges each free parameter, the common scale last.
    """

    def __init__(self, at: LossDerivatives, weight: Tensor) -> None:
        self.root = weight[:-1].rsqrt()
        self._corner = at.curvature[-1, -1]
        self._border = at.curvature[:-1, -1] * self.root
        share = self._border / self._corner
        matrix = _scaled(at.curvature, self.root) - torch.outer(self._border, share)
        values, self.vectors = torch.linalg.eigh(matrix)
        self.values = values.clamp_min(0.0)
        if at.covariance is at.curvature:
            self._costs, self._base = self.values, 1.0
            return
        # Of the deviations' scores with that of the common scale profiled out (Takeuchi, 1976).
        covariance, edge, corner = at.covariance, at.covariance[:-1, -1] * self.root, at.covariance[-1, -1]
        profiled = _scaled(covariance, self.root) - torch.outer(edge, share) - torch.outer(share, edge)
        profiled = profiled + corner * torch.outer(share, share)
        self._costs = ((profiled @ self.vectors) * self.vectors).sum(0).clamp_min(0.0)
        self._base = float(corner / self._corner)

    @property
    def patience(self) -> int:
        """A curvature costs about as many gradients as there are parameters to the hundred."""
        return 8 + len(self.values) // 100

    def effective_parameters(self, shrinkage: float, n_free: int = 1) -> float:
        """See :class:`ShrinkagePath`."""
        return n_free * self._base + float((self._costs / (self.values + shrinkage)).sum())

    def solve(self, shrinkage: float, gradient: Tensor) -> Tensor:
        """``(H + λ diag(weight))⁻¹ gradient``."""
        right = gradient[:-1] * self.root - gradient[-1] * self._border / self._corner
        own = self.vectors @ ((self.vectors.T @ right) / (self.values + shrinkage))
        common = (gradient[-1] - own @ self._border) / self._corner
        return torch.cat([own * self.root, common.reshape(1)])

    def renewed(self, rows: RowSource, space: MapSpace, point: Tensor, shrinkage: float) -> Inverse:
        """The inverse at a point; that of the start where rounding leaves none."""
        curvature = map_derivatives(rows, space, point, dense=False).curvature + (shrinkage * space.weight).diag()
        root, failed = torch.linalg.cholesky_ex(curvature)
        if int(failed):
            return partial(self.solve, shrinkage)
        return lambda gradient: torch.cholesky_solve(gradient[:, None], root)[:, 0]


def _scaled(matrix: Tensor, root: Tensor) -> Tensor:
    """The deviations' block in the ridge's metric."""
    return root[:, None] * matrix[:-1, :-1] * root
