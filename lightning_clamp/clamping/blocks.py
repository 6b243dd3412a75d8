r"""The quadratic model of the loss where the output map has so many parameters that its own block is most of the work.

With A the block of the p coefficients, B that of both and M that of the map's q parameters with their ridge, the map
answers a move of the coefficients with :math:`-M^{-1} B^T` of it, and :math:`A - B M^{-1} B^T` is left of A. M is
formed and factorised once for all grids that share a pass.
"""

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from lightning_clamp.clamping.newton import ScoreTest, solve


class MapBlock:
    """Outer products of the map's own scores, ``(q, q)``; the last factor is remembered."""

    def __init__(self, products: Tensor) -> None:
        self.products = products
        self._last: tuple[Tensor, Tensor] | None = None

    def solve(self, ridge: Tensor, right: Tensor) -> Tensor:
        """``(products + diag(ridge))⁻¹ right``, ``(q, k)``."""
        if self._last is None or not torch.equal(self._last[0], ridge):
            matrix = self.products.clone()
            matrix.diagonal().add_(ridge)
            root, failed = torch.linalg.cholesky_ex(matrix)
            if int(failed):
                return solve(matrix, right)
            self._last = ridge, root
        return torch.cholesky_solve(right, self._last[1])


@dataclass(frozen=True)
class BlockDerivatives:
    """Sums over samples as :class:`.LossDerivatives` of class outputs, in blocks.

    Attributes:
        gradient: Sum of the scores, ``(p + q,)``.
        own: Outer products of the coefficients' scores, A, ``(p, p)``.
        cross: And of theirs with the map's, B, ``(p, q)``.
        of_map: And of the map's.
        ridge: What is added to the diagonal of the map's, ``(q,)``.
    """

    gradient: Tensor
    own: Tensor
    cross: Tensor
    of_map: MapBlock
    ridge: Tensor

    def shrunk(self, point: Tensor, ridge: Tensor) -> "BlockDerivatives":
        """The sums of the loss and a ridge on the map, ``0.5 * (ridge * point**2).sum()``."""
        return replace(self, gradient=self.gradient + ridge * point, ridge=self.ridge + ridge[len(self.own) :])

    def damped(self, n_first: int, damping: float) -> "BlockDerivatives":
        """With so many times the coefficients' mean curvature added to that of each of them."""
        if not damping:
            return self
        added = damping * self.own.diagonal().mean()
        return replace(self, own=self.own + added * torch.eye(n_first, dtype=torch.float64))

    def at_best_map(self, shift: Tensor, gradient: Tensor) -> "BlockDerivatives":
        """To first order, where the map's parameters have moved by ``shift`` to have this gradient."""
        own = self.gradient[: len(self.own)] + self.cross @ shift
        return replace(self, gradient=torch.cat([own, gradient]))

    def newton_step(self) -> tuple[Tensor, float]:
        """The step, and the fall of the summed loss that it promises."""
        answer, left, score = self._profiled
        coefficients = -solve(left, score)
        of_map = self.gradient[len(self.own) :]
        step = torch.cat([coefficients, answer @ coefficients - self.of_map.solve(self.ridge, of_map[:, None])[:, 0]])
        return step, -0.5 * float(self.gradient @ step)

    def score_test(self, n_tested: int) -> ScoreTest:
        """Rao's test of the coefficients, the map profiled out."""
        answer, _, score = self._profiled
        explained = self.cross @ answer
        covariance = self.own + explained + explained.T + answer.T @ self.of_map.products @ answer
        return ScoreTest(float(score @ solve(covariance, score)), n_tested)

    def variance(self, step: Tensor) -> float:
        """Sum of the squares of what a step changes in the samples' losses, to first order."""
        first, second = step[: len(self.own)], step[len(self.own) :]
        both = 2 * float(first @ self.cross @ second)
        return float(first @ self.own @ first) + both + float(second @ self.of_map.products @ second)

    @cached_property
    def _profiled(self) -> tuple[Tensor, Tensor, Tensor]:
        """The map's answer ``(q, p)``; and with it the coefficients' curvature and gradient."""
        p = len(self.own)
        answer = -self.of_map.solve(self.ridge, self.cross.T)
        return answer, self.own + self.cross @ answer, self.gradient[:p] + answer.T @ self.gradient[p:]
